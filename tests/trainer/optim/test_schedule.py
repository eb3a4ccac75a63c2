"""Schedules against values worked by hand, and properties for any length."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepline.trainer.errors import UserError
from stepline.trainer.optim.schedule import SCHEDULES, lr_multiplier


def values(total, warmup, name, **kwargs):
    return [lr_multiplier(step, total, warmup, name, **kwargs) for step in range(total)]


def test_linear_to_zero():
    assert values(10, 2, "linear") == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert lr_multiplier(10, 10, 2, "linear") == 0
    assert values(4, 0, "linear", final_fraction=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])


def test_cosine():
    half = math.sqrt(0.5)
    assert values(4, 0, "cosine") == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert values(5, 1, "cosine", final_fraction=0.1)[3] == pytest.approx(0.1 + 0.9 * 0.5)


def test_wsd():
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert values(10, 2, "wsd", decay_fraction=0.4) == pytest.approx(expected)
    assert values(6, 4, "wsd", decay_fraction=1.0) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5])


def test_warmup_longer_than_the_run():
    assert values(3, 6, "cosine") == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert lr_multiplier(3, 3, 3) == 1.0


@given(
    name=st.sampled_from(SCHEDULES),
    total=st.integers(1, 300),
    warmup=st.integers(0, 50),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_rises_then_falls_and_never_wastes_an_update(name, total, warmup, final, decay):
    lrs = values(total, warmup, name, final_fraction=final, decay_fraction=decay)
    assert all(0 < lr <= 1 for lr in lrs)
    rise, fall = lrs[:warmup], lrs[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    if fall:
        assert fall[0] == 1
        assert fall[-1] >= final - 1e-12


def test_unknown_name():
    with pytest.raises(UserError, match=r"schedule.name 'cosin' is not one of .* did you mean 'cosine'"):
        lr_multiplier(0, 10, 0, "cosin")
