"""The plumbing of benchmarks/demo_codec.py: a round at a tiny shape."""

from pathlib import Path

import torch

from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee


def test_a_round_times_each_part_of_a_step(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    codec = benchmark("demo_codec")
    shape = [f"model.{k}={v}" for k, v in {"hidden_size": 32, "num_layers": 1, "num_heads": 2}.items()]
    trainee = Trainee.build(
        codec.settled(None, [*shape, "model.ffn_size=64"], False), torch.device("cpu"), None
    )
    tokens = torch.randint(0, 64, (1, 2, 16))
    before = {n: p.detach().clone() for n, p in trainee.model.named_parameters()}
    for replicas in (1, 3):
        (row,) = codec.measure(trainee, Batch(tokens, tokens, None, {}), replicas, 1, False)
        assert all(value > 0 for value in row.values())
        assert 0 < row["share"] < 1
    assert all(not torch.equal(p, before[n]) for n, p in trainee.model.named_parameters())
