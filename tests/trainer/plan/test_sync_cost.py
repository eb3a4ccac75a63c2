"""What a step sends, counted from shapes, is what the real synchronisers declare; and what the counts come to."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.comm import chunking, diloco
from stepline.comm.mesh import build_mesh
from stepline.models.flops import parameter_counts
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.hf.adapters import freeze
from stepline.trainer.plan import sync_cost
from stepline.trainer.plan.sync_cost import Exchange, SyncBytes, link_bytes, model_parameters
from stepline.trainer.run import synchronize
from stepline.trainer.run.build import build_model

MODEL = {
    "vocab_size": 331,
    "hidden_size": 36,
    "num_layers": 2,
    "num_heads": 3,
    "ffn_size": 50,
    "qk_norm": True,
}
"""No number of ranks divides its rows, and no chunk its columns."""
DEMO = {"chunk": 16}
MIXTURE = {"hidden_size": 48, "ffn": "moe", "ffn_size": 32, "moe": {"experts": 3, "shared_size": 20}}
"""Three experts, which two ranks share by row."""
CASES = {
    "all-reduce": {},
    "bf16": {"precision": {"reduce": "bf16"}},
    "demo": {"sync": "demo", "demo": DEMO},
    "sign": {"sync": "demo", "demo": DEMO | {"codec": "sign", "density": 0.02}},
    "fp32": {"sync": "demo", "demo": {"codec": "fp32", "kept": 5}, "model": {"tied_embeddings": True}},
    "gradients": {"sync": "demo", "demo": DEMO | {"accumulate": "gradients", "delay": 1}},
    "faithful": {"sync": "demo", "demo": DEMO | {"faithful": True, "kept": 3}},
    "owners": {"sync": "demo", "demo": DEMO | {"owner_reduce_above": 1}},
    "owners, fp64": {
        "sync": "demo",
        "demo": DEMO | {"codec": "fp32", "owner_reduce_above": 1},
        "precision": {"compute": "fp64"},
    },
    "random-k": {"sync": "random_k", "random_k": {"density": 0.25}},
    "random-k, fp32": {"sync": "random_k", "random_k": {"density": 1.0, "codec": "fp32"}},
    "diloco": {"sync": "diloco", "diloco": {"every": 4, "fragments": 3}},
    "diloco, int8": {"sync": "diloco", "diloco": {"every": 3, "fragments": 2, "codec": "int8"}},
    "diloco, bf16": {"sync": "diloco", "diloco": {"every": 2, "codec": "bf16"}},
    "mixture": {"sync": "demo", "demo": DEMO, "model": MIXTURE},
    "mixture, bf16": {"precision": {"reduce": "bf16"}, "model": MIXTURE},
    "mixture, muon": {"sync": "demo", "demo": DEMO, "model": MIXTURE, "optimizer": "muon"},
}
DEALT = {
    "dealt": {"sync": "demo", "demo": DEMO, "experts": 2, "model": MIXTURE | {"moe": {"experts": 6}}},
    "dealt, all-reduce": {"experts": 2, "model": MIXTURE | {"moe": {"experts": 6}}},
}
"""For two shards."""
STEPS = 12  # whole turns of every DiLoCo


def config_of(case: dict) -> Config:
    parallel = {key: value for key, value in case.items() if key not in ("precision", "model", "optimizer")}
    config = Config(
        model=MODEL | case.get("model", {}),
        parallel=parallel,
        precision={"compute": "fp32"} | case.get("precision", {}),
        budget={"steps": 1000, "batch_tokens": 192},
        optimizer={"lr": 1e-3, "weight_decay": 0.1, "name": case.get("optimizer", "adamw")},
    )
    config.run.device, config.run.compile = "cpu", False
    return config


def declare(cases: dict[str, dict], shard: int, batch_elements: int) -> dict[str, list[tuple[int, int]]]:
    """(sent, received) by step, that the synchroniser of each case declares on this rank."""
    mesh = build_mesh(torch.device("cpu"), dist.get_world_size(), shard)
    found = {}
    for name, case in cases.items():
        config = config_of(case)
        model = build_model(config, torch.device("cpu"), mesh)
        with mock.patch.object(chunking, "BATCH_ELEMENTS", batch_elements):
            synchronizer = synchronize.build_synchronizer(config, dict(model.named_parameters()), mesh)
        found[name] = []
        for _ in range(STEPS if "diloco" in name or "random" in name else 2):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            result = synchronizer.step(1e-3)
            found[name].append((result.bytes_sent, result.bytes_received))
    return found


def counted(case: dict, shard: int, replicas: int, rank: int, replica: int) -> Exchange:
    config = config_of(case)
    mine = SyncBytes(config, shard, replicas, rank, replica)
    if config.parallel.sync == "all_reduce":
        return mine.all_reduce(2 if config.precision.reduce == "bf16" else 4)
    return getattr(mine, config.parallel.sync)()


@pytest.mark.parametrize(
    ("world", "shard", "batch_elements"),
    [(2, 1, chunking.BATCH_ELEMENTS), (4, 1, 2000), (4, 2, chunking.BATCH_ELEMENTS)],
)
def test_bytes_are_those_that_the_synchronisers_declare(pool, monkeypatch, world, shard, batch_elements):
    monkeypatch.setattr(chunking, "BATCH_ELEMENTS", batch_elements)
    cases = CASES | (DEALT if shard == 2 else {})
    seen = pool.run(world, declare, cases, shard, batch_elements)
    for global_rank, found in enumerate(seen):
        replica, rank = divmod(global_rank, shard)
        for name, steps in found.items():
            exchange = counted(cases[name], shard, world // shard, rank, replica)
            sent, received = (sum(way) / len(steps) for way in zip(*steps, strict=True))
            if name == "random-k":  # whether the last run of a parameter has a value is drawn
                assert exchange.sent == exchange.received == pytest.approx(sent, rel=2e-3)
                assert sent == received
            else:
                assert (exchange.sent, exchange.received) == (sent, received), name
            assert sent > 0


def test_constants_are_those_of_the_synchronisers():
    assert sync_cost.INT8_CHUNK == diloco.INT8_CHUNK


SHAPES = [
    ("dense-1b", ["model.tied_embeddings=true", "model.canon=AC", "model.qk_norm=true"]),
    ("dense-1b", ["model.tied_embeddings=false", "model.canon=C"]),
    ("olmoe-1b-7b", []),
    ("revffn-1b", ["model.canon=AC"]),
    ("revffn-1b-paper", ["model.canon=C", "model.qk_norm=true"]),
    (
        "revffn-1b-paper",
        ["model.canon=none", "model.num_heads=2", "model.qk_norm=true"],
    ),  # a head as wide as a stream
    ("revffn-1b-paper", ["model.ffn=moe", "model.moe.experts=4"]),
]


@pytest.mark.parametrize(
    ("name", "options", "only"),
    [(*case, only) for case in SHAPES for only in ("all", "adapters") if only == "all" or "paper" in case[0]],
)
def test_parameters_come_in_the_models_order_and_without_frozen_ones(name, options, only):
    config = load_config(name, [*options, "model.num_layers=2", f"optimizer.only={only}"])[0]
    with torch.device("meta"):
        model = Transformer(config.model)
    if only == "adapters":
        freeze(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ends = [p.ndim > 1 and n.split(".")[0] in ("embed", "head") for n, p in trained.items()]
    expected = [(tuple(p.shape), end) for p, end in zip(trained.values(), ends, strict=True)]
    assert sync_cost.trained_parameters(config) == expected


def test_adapters_alone_send_a_share_of_the_model():
    """revffn-1b-paper: 24 layers x 4 adapters of 2048 x 1024 and three norms of a stream, twice 3/4 of fp32."""
    config = load_config("revffn-1b-paper", ["optimizer.only=adapters"])[0]
    trained = 24 * (4 * 2048 * 1024 + 3 * 1024)
    assert SyncBytes(config, 1, 4).all_reduce(4).sent == trained * 4 * 2 * 3 / 4


def test_a_square_matrix_by_hand():
    """Four chunks of 64 x 64: 32 indices of 12 bits, 32 bytes and a bf16 scale each, .02 bytes a parameter."""
    packet = sync_cost.Packet(((4, 4096, 32),), dense=10, codec="int8", item=4)
    assert packet.num_bytes(0, 1) == packet.total(1) == 4 * (32 * 12 // 8 + 32 + 2) + 2 * 10
    # 3 owners: 1, 1 and 2 chunks, 3, 3 and 4 dense values
    assert [packet.num_bytes(i, 3) for i in range(3)] == [82 + 6, 82 + 6, 164 + 8]
    assert packet.total(3) == 348


def test_rates_of_a_large_model_are_those_of_the_documentation():
    """Bytes a parameter and step: docs/slow-links.md."""
    config = load_config("dense-1b", ["parallel.diloco.codec=int8"])[0]
    total = parameter_counts(config.model).total
    for replicas in (2, 8, 64):
        fp32, bf16, demo, random_k, int8 = (e.received / total for e in link_bytes(config, 1, replicas))
        assert fp32 == pytest.approx(8 * (replicas - 1) / replicas, rel=1e-6)
        assert bf16 == pytest.approx(fp32 / 2)
        assert demo == pytest.approx(0.029 * (replicas - 1) if replicas <= 8 else 0.058, rel=0.02)
        assert random_k == pytest.approx(fp32 / 2 / 32, rel=0.01)
        assert int8 == pytest.approx((replicas - 1) / 32, rel=0.01)


@pytest.mark.parametrize(
    ("parts", "shard"),
    [*((parts, n) for parts in (None, 1) for n in (1, 3, 5, 40, 200, 1000)), (2, 6), (2, 40)],
)
def test_the_ranks_of_a_replica_share_its_link(shard, parts):
    model = {} if parts is None else MIXTURE | {"moe": {"experts": 6}}
    config = config_of({"sync": "demo", "demo": DEMO | {"delay": 1}, "experts": parts or 1, "model": model})
    ranks = [SyncBytes(config, shard, 2, rank).every() for rank in range(shard)]
    for i, link in enumerate(link_bytes(config, shard, 2)):
        for way in ("sent", "received", "overlapped", "onward"):
            assert getattr(link, way) == pytest.approx(sum(getattr(mine[i], way) for mine in ranks))
    whole = sum(math.prod(shape) for shape, _ in model_parameters(config.model))
    assert link_bytes(config, shard, 2)[0].sent == pytest.approx(4 * whole, abs=shard)
    assert link_bytes(config, 10**12, 2)[0].sent == 4 * whole  # at once


def test_seconds_of_a_step():
    """12.5 MB at 100 Mbit/s take a second."""
    plain = Exchange("", (), sent=12.5e6, received=6e6)
    beside = Exchange("", (), sent=12.5e6, received=12.5e6, overlapped=12.5e6)
    half = Exchange("", (), sent=12.5e6, received=12.5e6, overlapped=10e6)
    owners = Exchange("", (), sent=12.5e6, received=12.5e6, overlapped=7.5e6, onward=5e6)
    encoded = replace(half, codec_s=0.04)
    assert plain.seconds(100) == pytest.approx(1)
    for compute in (0.5, 4.0):
        assert plain.step_seconds(100, compute) == pytest.approx(compute + 1)
        assert beside.step_seconds(100, compute) == pytest.approx(max(compute, 1))
        assert half.step_seconds(100, compute) == pytest.approx(max(compute, 0.8) + 0.2)
        waited = max(compute / 3, 0.6) + max(compute * 2 / 3, 0.4)  # each message beside its own part
        assert owners.step_seconds(100, compute) == pytest.approx(waited)
        assert encoded.step_seconds(100, compute) == pytest.approx(max(compute, 0.8) + 0.24)
        for exchange in (plain, beside, half, owners, encoded):
            mbit = exchange.harmless_mbit(compute)
            assert exchange.step_seconds(mbit, compute) == pytest.approx(1.1 * compute)
    assert encoded.harmless_mbit(0.39) == math.inf


@pytest.mark.parametrize(
    ("demo", "percent"),
    [
        ({}, 0.46),
        ({"density": 0.01}, 1.58),
        ({"codec": "int8", "density": 0.0078125, "chunk": 64}, 1.2),
        ({"density": 0.005}, None),
        ({"density": 0.0025}, 5.34),
        ({"delay": 1}, 1.34),
        ({"delay": 1, "ahead": False}, 10.85),
        ({"delay": 1, "density": 0.01}, None),
        ({"faithful": True}, None),
        ({"accumulate": "gradients"}, None),
        ({"beta": 0.98}, None),
        ({"owner_reduce_above": 1}, None),
    ],
)
def test_the_loss_that_was_measured(demo, percent):
    config = config_of({"sync": "demo", "demo": demo})
    assert SyncBytes(config, 1, 2).demo().loss_percent == percent
    every = {exchange.label: exchange.loss_percent for exchange in SyncBytes(config, 1, 2).every()}
    assert [every[name] for name in ("all-reduce fp32", "all-reduce bf16")] == [0, 0]
    assert [loss for name, loss in every.items() if name.startswith(("random-k", "diloco"))] == [None, None]


def test_a_rank_encodes_what_it_holds():
    config = load_config("dense-1b", [])[0]
    whole, quarter = (link_bytes(config, shard, 2)[2].codec_s for shard in (1, 4))
    assert whole == pytest.approx(parameter_counts(config.model).total * 44.2e-3 / 3_443_520)
    assert quarter == pytest.approx(whole / 4, rel=1e-3)
