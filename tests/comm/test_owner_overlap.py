"""Both messages of owners who reduce travel beside computing, and change nothing: the trainer's own step on gloo,
against the same with the second message sent when it is needed."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.comm.demo import DeMo
from stepline.comm.exchange import PacketExchange
from stepline.comm.fsdp import local
from stepline.comm.mesh import build_mesh
from stepline.models.config import ModelConfig
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

STEPS, SAVED, SKIPPED = 12, 4, 8
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 48}


def trainee(shard: int) -> Trainee:
    demo = {"delay": 1, "owner_reduce_above": 1, "chunk": 8, "density": 0.1}
    config = Config(model=ModelConfig(**SHAPE), parallel={"sync": "demo", "demo": demo, "shard": shard})
    config.run.compile, config.optimizer.weight_decay, config.precision.compute = False, 0.1, "fp32"
    cpu = torch.device("cpu")
    return Trainee.build(config, cpu, build_mesh(cpu, dist.get_world_size(), shard))


def batch(step: int, accumulation: int) -> Batch:
    draw = torch.Generator().manual_seed(100 * step + dist.get_rank())
    tokens = torch.randint(0, SHAPE["vocab_size"], (accumulation, 2, 17), generator=draw)
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})


def saved(state: Trainee) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, this rank's part."""
    found = state.synchronizer.state_dict(state.synchronizer.replica)
    found |= {f"model.{n}": p for n, p in state.synchronizer.shared_parameters().items()}
    return {n: local(t).clone() for n, t in found.items()}


def run(shard: int, accumulation: int, beside: bool, again: bool = False) -> tuple[list, list[str]]:
    """Parameters after each step, with what is saved after two of them, and what happened in which order.

    A step is skipped, after which a second message is under way when the state is saved. again: from there on by a
    trainee that is made anew.
    """
    state, seen, events = trainee(shard), [], []
    state.model.register_forward_pre_hook(lambda *_: events.append("forward"))
    pass_on, backward, send = PacketExchange.pass_on, torch.Tensor.backward, PacketExchange.send

    def passed_on(self, flight):
        if not flight.reduced:
            events.append("second")
        return pass_on(self, flight)

    def went_back(self):
        events.append("backward")
        return backward(self)

    def sent(self, packets):
        events.append("first")
        return send(self, packets)

    with (
        mock.patch.object(PacketExchange, "pass_on", passed_on),
        mock.patch.object(PacketExchange, "send", sent),
        mock.patch.object(torch.Tensor, "backward", went_back),
        mock.patch.object(DeMo, "midway", DeMo.midway if beside else lambda self: None),
    ):
        for step in range(STEPS):
            skip = torch.tensor(float(step == SKIPPED))
            with mock.patch.object(state.guard, "check", lambda *_, skip=skip: skip):
                train_step(state, batch(step, accumulation), 3e-3)
            if step in (SAVED, SKIPPED):
                if step == SKIPPED and beside:
                    assert state.synchronizer.flight.reduced
                seen.append(saved(state))
                assert state.synchronizer.flight is None
            if step == SKIPPED and again:
                before, state = saved(state), trainee(shard)
                found = state.synchronizer.state_dict(state.synchronizer.replica)
                found |= {f"model.{n}": p for n, p in state.synchronizer.shared_parameters().items()}
                for name, tensor in found.items():
                    local(tensor).copy_(before[name])
            seen.append({n: local(p.data).clone() for n, p in state.model.named_parameters()})
        assert state.synchronizer.first_difference() is None
    return seen, events


def same(a: list[dict], b: list[dict]) -> bool:
    return all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True)
    )


def compare(shard: int, accumulation: int) -> list[str]:
    """What happened in the first three steps beside computing."""
    late, _ = run(shard, accumulation, beside=False)
    seen, events = run(shard, accumulation, beside=True)
    assert same(seen, late)
    assert not torch.equal(seen[0]["embed.weight"], seen[-1]["embed.weight"])
    assert same(run(shard, accumulation, beside=True, again=True)[0], late)
    return events[: 3 * (2 * accumulation + 1) + 2]


@pytest.mark.parametrize(
    ("shard", "accumulation"),
    [(1, 1), (2, 2), *(pytest.param(*layout, marks=pytest.mark.e2e) for layout in ((1, 2), (2, 1)))],
)
def test_the_second_message_leaves_between_a_forward_and_its_backward(pool, shard, accumulation):
    before = ["forward", "backward"] * (accumulation - 1)
    first = [*before, "forward", "backward", "first"]
    later = [*before, "forward", "second", "backward", "first"]
    assert pool.run(4, compare, shard, accumulation) == [first + later + later] * 4
