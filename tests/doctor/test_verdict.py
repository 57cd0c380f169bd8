import pytest

from vmamba.doctor import Level, Verdict, exit_code

FINE = Verdict(Level.OK, "loss", "a finite scalar: 2.3")
SLOW = Verdict(Level.WARNING, "slow backend", "portable on a GPU machine", "install Triton")
BROKEN = Verdict(Level.PROBLEM, "loss is not a scalar", "shape (8,)", "average it: loss.mean()")


@pytest.mark.parametrize(
    ("verdicts", "code"), [([], 0), ([FINE], 0), ([FINE, SLOW], 0), ([SLOW, BROKEN], 1), ([BROKEN, FINE], 1)]
)
def test_only_a_problem_fails_the_command(verdicts, code):
    assert exit_code(iter(verdicts)) == code


@pytest.mark.parametrize(("level", "remedy"), [(Level.OK, "do this"), (Level.WARNING, ""), (Level.PROBLEM, "")])
def test_a_remedy_belongs_to_what_is_wrong(level, remedy):
    with pytest.raises(ValueError, match="remedy"):
        Verdict(level, "name", "message", remedy)


def test_plain_data():
    assert BROKEN.as_dict() == {
        "level": "problem",
        "name": "loss is not a scalar",
        "message": "shape (8,)",
        "remedy": "average it: loss.mean()",
        "figures": {},
    }
