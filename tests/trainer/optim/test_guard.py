"""The guard against a plain Python reference."""

import math

import numpy as np
import pytest
import torch

from stepline.trainer.optim.guard import Guard

NAN, INF = float("nan"), float("inf")


class Reference:
    """The same rule with lists."""

    def __init__(self, window, sigma, min_history):
        self.window, self.sigma, self.min_history = window, sigma, min_history
        self.accepted = []

    def check(self, loss, norm):
        skip = not (math.isfinite(loss) and math.isfinite(norm))
        if not skip and len(self.accepted) >= self.min_history:
            for value, column, floor in ((loss, 0, 0.01), (norm, 1, 0.25)):
                recent = np.array(self.accepted[-self.window :])[:, column]
                skip |= value > recent.mean() + self.sigma * max(recent.std(), floor * abs(recent.mean()))
        if not skip:
            self.accepted.append((loss, norm))
        return float(skip)


def feed(guard, loss, norm):
    return guard.check(torch.tensor(loss), torch.tensor(norm)).item()


def test_decisions_equal_the_reference_on_a_noisy_run():
    rng = np.random.default_rng(0)
    guard, reference = Guard(window=16, sigma=3.0, min_history=5), Reference(16, 3.0, 5)
    skips = []
    for step in range(400):
        loss = 2 + 6 * math.exp(-step / 40) + 0.1 * rng.standard_normal()
        norm = abs(1 + 0.3 * rng.standard_normal())
        if rng.random() < 0.1:
            loss, norm = [(NAN, norm), (loss, INF), (loss + 5, norm), (loss, 20.0), (-INF, NAN)][step % 5]
        loss, norm = float(np.float32(loss)), float(np.float32(norm))
        skips.append(reference.check(loss, norm))
        assert feed(guard, loss, norm) == skips[-1], step
    assert 25 < sum(skips) < 80
    assert guard.skipped_total.item() == sum(skips)
    assert guard.accepted.item() == 400 - sum(skips)
    recent = np.array(reference.accepted[-16:])
    np.testing.assert_allclose(np.sort(guard.losses.numpy()), np.sort(recent[:, 0]))
    np.testing.assert_allclose(np.sort(guard.grad_norms.numpy()), np.sort(recent[:, 1]))


def test_nan_in_the_first_step_and_recovery():
    guard = Guard(window=8, min_history=4)
    assert [feed(guard, NAN, 1.0), feed(guard, 3.0, NAN)] == [1, 1]
    assert guard.skipped_in_a_row.item() == 2
    assert feed(guard, 3.0, 1.0) == 0
    assert (guard.skipped_in_a_row.item(), guard.skipped_total.item(), guard.accepted.item()) == (0, 2, 1)
    assert [guard.take_longest(), guard.take_longest()] == [2, 0]


def test_a_flat_history_does_not_make_noise_a_spike():
    guard = Guard(window=8, min_history=4)
    for _ in range(8):
        assert feed(guard, 2.0, 1.0) == 0
    assert feed(guard, 2.1, 2.4) == 0
    assert feed(guard, 2.8, 1.0) == 1
    assert feed(guard, 2.0, 12.0) == 1


def test_no_spike_before_there_is_enough_history():
    guard = Guard(window=8, min_history=4)
    assert [feed(guard, loss, 1.0) for loss in (2.0, 2.0, 2.0, 50.0)] == [0, 0, 0, 0]


def test_state_is_live_and_continues():
    first, second = Guard(window=8, min_history=2), Guard(window=8, min_history=2)
    for loss in (3.0, 2.0, NAN, 2.5):
        feed(first, loss, 1.0)
    for name, tensor in second.state().items():
        tensor.copy_(first.state()[name])
    for loss in (2.2, 90.0, NAN, 2.1):
        assert feed(first, loss, 1.0) == feed(second, loss, 1.0)
    assert all(torch.equal(t, second.state()[name]) for name, t in first.state().items())


def test_impossible_history():
    with pytest.raises(ValueError, match="min_history 9"):
        Guard(window=8, min_history=9)
