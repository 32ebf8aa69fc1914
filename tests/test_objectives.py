"""Every method with either objective and every mean: what a table needs to tell the one from the other."""

import pytest
from test_methods import every_case, must_keep

from utils.config import MEANS, known, load_config


@every_case
def test_every_mean_trains_by_either_objective(case):
    must_keep("means", case)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("objective", ["native", "infonce"])
@pytest.mark.parametrize("method", known("methods"))
def test_a_run_is_named_after_objective_and_mean(method, objective, mean):
    variant = load_config("shapes", method, objective=objective, mean=mean).variant
    assert variant.startswith(method) and variant.endswith(mean)
    assert ("infonce" in variant) == (objective == "infonce")
