"""law.json as a stranger may have left it: what is refused, and that nothing overflows within what is not."""

import json
import math

import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.plan.law_file import find_law, read_law
from stepline.trainer.plan.planner import Inputs, make_plan


def damaged(content, where, value):
    """The law with one value changed, as text; JSON's NaN and Infinity are what Python's are written as."""
    *path, last = where.split(".")
    at = tree = json.loads(json.dumps(content))
    for key in path:
        at = at[key]
    at[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("where", "value", "why"),
    [
        ("lr.spread.covariance", [[0.1]], "lr.spread: covariance must have 3 rows of 3 numbers"),
        (
            "batch_tokens.spread.covariance",
            [[0.1, 0], [0]],
            "batch_tokens.spread: covariance must have 2 rows",
        ),
        ("batch_tokens.spread.covariance", [[-1, 0], [0, 0]], "negative number on its diagonal"),
        ("lr.spread.mean", [1.0], "lr.spread: mean has 1 numbers; centre asks for 3"),
        (
            "lr.spread",
            {"centre": [1], "mean": [1, 1], "covariance": [[0, 0]] * 2, "quantile": 2},
            "lr: spread",
        ),
        ("lr.spread.quantile", 1e9, "lr.spread.quantile: "),
        ("lr.scale", math.inf, "lr.scale: "),
        ("lr.scale", math.nan, "lr.scale: "),
        ("lr.exponents", [-0.7, 11], "lr.exponents.1: "),
        ("lr.exponents", [-0.7], "centre must have 1 numbers"),
        ("params", [2e9, 1e9], "params: the range goes from 2e+09 down to 1e+09"),
        ("tokens", [-1, 1e9], "tokens.0: "),
        ("optimizer", "sgd", "optimizer: "),
        ("loss.entropy", math.nan, "loss.entropy: "),
    ],
)
def test_a_damaged_law_is_refused(tmp_path, where, value, why):
    content = json.loads(find_law("quickstart").read_text())
    (tmp_path / "law.json").write_text(damaged(content, where, value))
    with pytest.raises(UserError) as error:
        read_law(tmp_path / "law.json")
    assert str(error.value).startswith(
        f"{tmp_path / 'law.json'} is no law of `stepline laws fit`: {where[:2]}"
    )
    assert why in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("n", "d"), [(1.0, 1e18), (1e15, 1e18), (2e5, 3e5)])
def test_a_law_within_its_bounds_overflows_nowhere(tmp_path, n, d):
    content = json.loads(find_law("quickstart").read_text())
    content["lr"] |= {"scale": 1e30, "exponents": [10, 10]}
    content["lr"]["spread"] |= {"quantile": 1e3, "mean": [1e12, 10, 10]}
    (tmp_path / "law.json").write_text(json.dumps(content))
    law = read_law(tmp_path / "law.json")
    assert all(map(math.isfinite, law.lr_law.interval(n, d)))
    with pytest.raises(UserError, match="which cannot be used"):
        make_plan(Inputs(n, d), law)
