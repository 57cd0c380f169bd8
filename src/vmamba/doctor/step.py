"""The examination of one training step, in a process of its own, every part of it under a time limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .bisect import search, verdict_of
from .position import SET_UP
from .probes import ORDER, work
from .session import Job, Report, Source, run_jobs
from .stacks import users_frames
from .subject import Subject
from .verdict import Level, Verdict
from .watching import named
from .wording import listed

__all__ = ["examine"]

PASSES = {"forward": "forward pass", "backward": "backward pass", "optimiser": "optimiser's step"}

# trials of a bisection of a step that stalls each wait this share of the limit, and at least so many seconds
TRIAL_SHARE, TRIAL_LEAST = 0.2, 2.0


def examine(
    target: str | Subject,
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    bisect: bool = False,
    time_limit: float = 120.0,
) -> list[Verdict]:
    """Examine one training step: loading, batch, loss, gradients, precision, learning rate, memory, time.

    Everything runs in a child process; this one never hangs, and its model, batch and random numbers stay as they are.

    Args:
        target: a config (RUN.yaml), a run directory, "module:function", or a :class:`Subject` (see
            :func:`~.subject.load` and there what the function returns).
        overrides: SECTION.FIELD=VALUE for a config.
        device: "auto", or where to run. A :class:`Subject` is examined where it is.
        bisect: name the smallest module without which the trouble is gone.
        time_limit: seconds that a single examination, and setting up, may take.

    Returns:
        The verdicts in the order of the examinations.

    Raises:
        FileNotFoundError, ModuleNotFoundError: there is no such config, run or module.
        ValueError, TypeError: the config cannot be, or the subject cannot be given to another process.
    """
    if time_limit <= 0:
        raise ValueError(f"time_limit must be positive, not {time_limit}")
    if isinstance(target, Subject) and (overrides or device != "auto"):
        raise ValueError("a Subject is examined as it is: overrides and device belong to a config or a function")
    source = Source(target, tuple(overrides), device)
    report = _run(source, [Job(name) for name in ORDER], time_limit)
    verdicts = report.verdicts
    if report.stalled is not None:
        verdicts.append(_ended(report, time_limit))
        verdicts += _after(source, report, time_limit)
    elif report.stopped and report.left:
        verdicts[-1] = _unfinished(verdicts[-1])
    if bisect:
        verdicts += _bisect(source, report, verdicts, time_limit)
    return verdicts


def _run(source: Source, jobs: Sequence[Job], time_limit: float) -> Report:
    report = run_jobs(source, jobs, time_limit, work)
    if report.mistake is not None:
        raise report.mistake
    return report


def _after(source: Source, report: Report, time_limit: float) -> list[Verdict]:
    """What can still be examined when a probe did not come back: how the work grows, at shorter lengths, when the step
    was too slow; all others when it was only loading or a special probe that failed."""
    name, names = report.stalled.name, [job.name for job in report.left]
    if name == SET_UP:
        return []
    if name == "loader":
        if _needs_loader(source):
            return []
        rest = [job for job in report.left if job.name != "loader"]
    elif report.moving and name in ("loss", "gradients"):
        rest = [Job("growth")]
    elif name in ("loss", "gradients"):
        return []
    else:
        rest = [job for job in report.left if job.name in names[1:]]
    if not rest:
        return []
    again = _run(source, [Job("loader"), *rest] if _needs_loader(source) else rest, time_limit)
    verdicts = [verdict for verdict in again.verdicts if verdict.name != "data loader"]
    if again.stalled is None:
        return verdicts
    return [*verdicts, _ended(again, time_limit), *_after(source, again, time_limit)]


def _unfinished(verdict: Verdict) -> Verdict:
    if verdict.level is not Level.PROBLEM:
        return verdict
    return dataclasses.replace(verdict, remedy=f"{verdict.remedy} Then run the doctor again: the rest waits for this.")


def _ended(report: Report, time_limit: float) -> Verdict:
    """A probe that did not come back, as a verdict."""
    place, job = report.place, report.stalled.name
    owner, _, operation = place.where.partition("|")
    module = f" in {named(owner)}{f' ({operation})' if operation else ''}" if owner or operation else ""
    figures = {"phase": place.phase, "module": owner, "examination": job, "done": place.done, "total": place.total}
    frames = users_frames(report.stacks)
    at = f" Stack: {listed(frames, 3)}." if frames else ""
    figures |= {"stacks": report.stacks, "frames": frames}
    if report.died:
        last = report.output.strip().splitlines()[-1:]
        what = "Setting up" if job == SET_UP else f"The step, in {place.phase}{module},"
        return Verdict(
            Level.PROBLEM,
            "set-up fails" if job == SET_UP else "process died",
            f"{what} ended its process: it {report.died}.{at} {' '.join(last)}".strip(),
            "Run it by itself to see the whole message. SIGKILL mostly means that memory ran out (make the batch "
            "smaller), SIGSEGV a library that does not fit torch or CUDA.",
            {**figures, "died": report.died},
        )
    if place.phase == "data":
        return Verdict(
            Level.PROBLEM,
            "data loader is stuck",
            f"No batch came for {time_limit:.0f} s: the data loader or one of its workers waits for ever.{at}",
            "Look at the line named here for a lock, a queue or a pool taken in the main process before the workers "
            "were forked; try num_workers=0, or multiprocessing_context='spawn'.",
            figures,
        )
    phase = PASSES.get(place.phase, place.phase)
    progress = f", {place.done} of {place.total} nodes done" if place.total else ""
    if report.moving:
        return Verdict(
            Level.PROBLEM,
            f"{place.phase} is slow",
            f"The {phase} is not stuck, but not through after {time_limit:.0f} s{progress}; it was"
            f"{module or ' under way'}.{at}",
            "Look at the growth verdict for a loop that is quadratic in the length, and at the backend; a smaller "
            "batch, or a longer time limit, lets the examination go on.",
            figures,
        )
    return Verdict(
        Level.PROBLEM,
        f"{place.phase} never returns",
        f"The {phase} did not come back within {time_limit:.0f} s{progress}; it hangs{module}.{at}",
        "Look at the line named here: a lock, a queue, a collective or another process that it waits for. Only code of "
        "your own or an extension can wait there; torch's operators do not.",
        figures,
    )


def _bisect(source: Source, report: Report, verdicts: Sequence[Verdict], time_limit: float) -> list[Verdict]:
    if all(verdict.level is Level.OK for verdict in verdicts):
        return [Verdict(Level.OK, "bisect", "No problem to look for.")]
    stalled = report.stalled is not None and report.stalled.name in ("loss", "gradients")
    first = [Job("loader")] if _needs_loader(source) else []
    if not stalled:
        found = _run(source, [*first, Job("bisect")], time_limit)
        return found.verdicts[len(found.verdicts) - 1 :] if found.stalled is None else [_ended(found, time_limit)]
    trial_limit = max(TRIAL_LEAST, TRIAL_SHARE * time_limit)
    runs_forward = report.stalled.name == "gradients"
    tree = _run(source, [*first, Job("parts", (runs_forward,))], time_limit).verdicts[-1].figures

    def troubled(replaced: frozenset[str]) -> bool:
        jobs = [*first, Job("symptom", (sorted(replaced), runs_forward))]
        trial = run_jobs(source, jobs, trial_limit, work, set_up_limit=time_limit)
        return trial.stalled is not None or bool(trial.verdicts[-1].message)

    found = search(troubled, lambda name: tree["parts"][name])
    return [verdict_of(found, f"{report.place.phase} that does not come back", tree["kinds"])]


def _needs_loader(source: Source) -> bool:
    """Whether the batch is what the loader gives."""
    return not isinstance(source.target, Subject) or source.target.batch is None
