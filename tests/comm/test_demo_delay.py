"""DeMo with a delay of one step: vectors are those of plain AdamW a step later; a first step applies nothing."""

import pytest
import torch
from torch import nn

from stepline.comm.demo import DeMo, DeMoSettings
from stepline.trainer.optim.build import AdamW

BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.1
RATES = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]


def draw(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def build(ahead: bool = False) -> tuple[DeMo, dict[str, nn.Parameter]]:
    """A matrix and a vector, both decayed, in this process alone; everything is sent as it is."""
    named = {"matrix": nn.Parameter(draw(98, (4, 6))), "vector": nn.Parameter(draw(99, (5,)))}

    def adamw(params: dict[str, nn.Parameter]) -> AdamW:
        return AdamW(params, {"matrix", "vector"}, BETA1, BETA2, EPS)

    settings = DeMoSettings(delay=1, ahead=ahead, codec="fp32", density=1.0, chunk=8, weight_decay=DECAY)
    dense = adamw({"vector": named["vector"]})
    return DeMo(named, None, settings, decayed={"matrix", "vector"}, dense=dense, make_optimizer=adamw), named


def train(sync: DeMo, named: dict[str, nn.Parameter], steps: range, skipped: tuple = ()) -> list[dict]:
    seen = []
    for step in steps:
        for p in named.values():
            p.grad = draw(step, p.shape)
        sync.step(RATES[step], torch.tensor(float(step in skipped)))
        seen.append({name: p.detach().clone() for name, p in named.items()})
    return seen


def plain(gradients: list[int], rates: list[float], shape: tuple[int, ...], start: torch.Tensor) -> list:
    """AdamW written out (arXiv 1711.05101, algorithm 2)."""
    p, m, v, seen = start.clone(), torch.zeros(shape).double(), torch.zeros(shape).double(), []
    for t, (number, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        g = draw(number, shape)
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        update = (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
        p = p - lr * (update + DECAY * p)
        seen.append(p)
    return seen


def close(seen: list[dict], name: str, expected: list[torch.Tensor]) -> None:
    for own, right in zip(seen, expected, strict=True):
        torch.testing.assert_close(own[name], right, rtol=0, atol=1e-12)


def test_vectors_move_by_plain_adamw_a_step_late():
    sync, named = build()
    seen, start = train(sync, named, range(6)), draw(99, (5,))
    close(seen, "vector", [start, *plain([0, 1, 2, 3, 4], RATES[1:], (5,), start)])
    assert torch.equal(seen[0]["matrix"], draw(98, (4, 6)))  # no decay without an update
    assert not torch.equal(seen[1]["matrix"], seen[0]["matrix"])


def test_skipped_steps_and_a_first_one_too():
    sync, named = build()
    seen, start = train(sync, named, range(6), skipped=(0, 3)), draw(99, (5,))
    first, second, third = plain([1, 2, 4], [RATES[2], RATES[4], RATES[5]], (5,), start)
    close(seen, "vector", [start, start, first, first, second, third])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_resume_is_bitwise_wherever_it_is(ahead):
    """Before anything has landed (a first step that was skipped), with a packet under way, and a skip after that."""
    skipped = (0, 3)
    sync, named = build(ahead)
    straight = train(sync, named, range(6), skipped)
    for stop in range(1, 6):
        sync, named = build(ahead)
        train(sync, named, range(stop), skipped)
        held = {n: t.detach().clone() for n, t in sync.state_dict(0).items()}
        assert bool(held["replica0.optimizer.landed"]) == (stop > 1)
        again, copies = build(ahead)
        load(again, held, sync)
        for name, p in copies.items():
            assert torch.equal(p, named[name]), (stop, name)
        for own, right in zip(train(again, copies, range(stop, 6), skipped), straight[stop:], strict=True):
            for name, tensor in own.items():
                assert torch.equal(tensor, right[name]), (stop, name)


def load(again: DeMo, held: dict, sync: DeMo) -> None:
    """As a checkpoint: the shared model of `sync`, and of `held` what is there."""
    for name, tensor in again.shared_parameters().items():
        tensor.copy_(sync.shared_parameters()[name])
    for name, tensor in again.to_load(1).items():
        tensor.data.copy_(held.get(name, tensor.data))
    again.loaded()


def test_what_looks_ahead_shares_the_model_of_what_does_not():
    """Gradients alike. Between steps its matrix is the shared one with the update that the next step applies."""
    (sync, named), (plain_sync, plain_named), last = build(ahead=True), build(), {}
    for step in range(6):
        (own,), (shared,) = (
            train(s, n, range(step, step + 1)) for s, n in ((sync, named), (plain_sync, plain_named))
        )
        for name, tensor in sync.shared_parameters().items():
            assert torch.equal(tensor, shared[name]), (step, name)
        assert torch.equal(own["vector"], shared["vector"])
        with sync.shared_model():
            assert torch.equal(named["matrix"], shared["matrix"])
        assert torch.equal(named["matrix"], own["matrix"])
        if step:  # all is sent, so that the whole update is known
            torch.testing.assert_close(
                shared["matrix"],
                last["shared"] * (1 - RATES[step] * DECAY) + last["ahead"],
                rtol=0,
                atol=1e-12,
            )
        last = {"shared": shared["matrix"], "ahead": own["matrix"] - shared["matrix"]}
        assert last["ahead"].abs().max() > 0.1 * RATES[step]


@pytest.mark.parametrize(
    "settings", [{}, {"delay": 1, "accumulate": "gradients"}, {"delay": 1, "faithful": True}]
)
def test_only_updates_that_are_late_can_be_looked_ahead_to(settings):
    with pytest.raises(ValueError, match="only updates that are a step late"):
        DeMoSettings(ahead=True, **settings)


@pytest.mark.parametrize("gone", [("own", "looked"), ("own", "looked", "landed")])
def test_a_checkpoint_without_own_parameters_goes_on_from_the_shared_model(gone):
    sync, named = build(ahead=True)
    train(sync, named, range(3))
    held = {n: t.detach().clone() for n, t in sync.state_dict(0).items() if n.split(".")[-1] not in gone}
    again, copies = build(ahead=True)
    load(again, held, sync)
    for name, p in copies.items():
        assert torch.equal(p, sync.shared_parameters()[name])


def test_a_checkpoint_that_does_not_tell_holds_an_update():
    sync, named = build()
    train(sync, named, range(3))
    held = {n: t.detach().clone() for n, t in sync.state_dict(0).items() if not n.endswith("landed")}
    again, copies = build()
    for name, tensor in again.to_load(1).items():
        tensor.data.copy_(held.get(name, tensor))
    assert int(again.landed) == 1
    for name, p in copies.items():
        p.data.copy_(named[name].data)
    assert torch.equal(
        train(again, copies, range(3, 4))[0]["vector"], train(sync, named, range(3, 4))[0]["vector"]
    )
