"""docs/stuck.md knows every finding of the doctor by its name, and no other."""

import ast
import re
from pathlib import Path

import vmamba.doctor
from vmamba.doctor.losses import _FAILURES
from vmamba.doctor.watcher import WHAT_IT_MEANS, WHAT_TO_DO

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "stuck.md").read_text()
PHASES = ("forward", "loss", "backward", "optimiser")
# names that are put together: their parts stand in the code
MADE = {
    *(f"{role} is not finite" for role in ("input", "target")),
    *(f"{phase} {how}" for phase in (*PHASES, "set-up") for how in ("never returns", "is slow")),
    *(f"{phase} fails" for phase in PHASES),
    *(f"slow {phase}" for phase in ("forward", "backward")),
}


def findings():
    """The literal names of all verdicts that are not ok."""
    names = set()
    for path in Path(vmamba.doctor.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Verdict" and len(node.args) > 3:
                literals = [part for part in ast.walk(node.args[1]) if isinstance(part, ast.Constant)]
                joined = any(isinstance(part, ast.JoinedStr) for part in ast.walk(node.args[1]))
                names |= {part.value for part in literals if isinstance(part.value, str) and not joined}
    return names | {name for _, name, _ in _FAILURES} | MADE


def test_every_finding_is_on_the_page():
    missing = {name for name in findings() if f"`{name}`" not in PAGE}
    assert not missing
    assert len(findings()) > 50


def test_the_page_promises_no_other():
    tables = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith("|--")]
    headed, says = [], 0
    for line in tables:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "what the doctor says" in cells:
            says = cells.index("what the doctor says")
        else:
            headed += re.findall(r"`([^`]+)`", cells[says])
    assert set(headed) - findings() == set()


def test_the_phases_of_the_watchdog_are_on_the_page():
    assert set(WHAT_IT_MEANS) == set(WHAT_TO_DO)
    assert all(f"`{phase}`" in PAGE for phase in WHAT_IT_MEANS)
