"""configs/methods/README.md, the page on published code, against the script that measures its figures."""

import re

import pytest

from benchmarks.published import ROWS, main
from utils.config import HOME

TRAINED = ("pcmepp_mean", "prolip_mean")  # R@1 after training of the means, in which machines differ
PAGE = (HOME / "configs" / "methods" / "README.md").read_text(encoding="utf-8")


def test_the_page_and_the_script_have_the_same_rows():
    assert re.findall(r"\| `(\w+_\w+)`: ", PAGE) == list(ROWS)


# The fast rows whose figures no other test checks, and all others in `make test-published`.
FAST = ["asymvlm_normalizer", "probvlm_variance", "probvlm_blow_up"]


@pytest.mark.parametrize(
    "row", [*FAST, *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS if row not in FAST)]
)
def test_the_page_gives_the_figures(row, capsys):
    main([row])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{row} ") and "; right " in printed and printed.count("\n") == 1
    (line,) = (line for line in PAGE.splitlines() if f"`{row}`" in line)
    printed = re.sub(r"\d[\d.]* (s|MB)\b", "", printed)  # which are the machine's
    for figure in re.findall(r"\d\S*\d", printed):
        assert figure in line or (row in TRAINED and is_near(figure, line)), figure


def is_near(figure, line):
    return any(float(figure) == pytest.approx(float(other), rel=0.03) for other in re.findall(r"\d+\.\d+", line))
