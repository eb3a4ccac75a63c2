"""The memory of a step: exact where it can be counted, measured where it cannot, and what is decided by it."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepline.comm.fsdp import ONE_GROUP_BYTES
from stepline.kernels.cross_entropy import CPU_LOGITS, CUDA_LOGITS
from stepline.models.config import ModelConfig, RevFFNConfig
from stepline.models.flops import parameter_counts
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.errors import UserError
from stepline.trainer.optim import muon
from stepline.trainer.optim.build import build_optimizer
from stepline.trainer.plan import replay, update
from stepline.trainer.plan.memory import MARGIN, PARTS, Layout, estimate
from stepline.trainer.plan.resolve import Machine, resolve
from stepline.trainer.plan.tensors import block_group, cast_group, root_group

ROOT = Path(__file__).resolve().parents[3]
ODD = ModelConfig(
    vocab_size=331, hidden_size=36, num_layers=2, num_heads=3, ffn_size=50, qk_norm=True, tied_embeddings=True
)
BIG = ModelConfig(vocab_size=32_000, hidden_size=2048, num_layers=16, num_heads=16, ffn_size=5632)


def config(model: ModelConfig = ODD, device: str = "cpu", **sections) -> Config:
    settled = Config(model=model, **sections)
    settled.run.device, settled.run.compile = device, device == "cuda"
    settled.precision.compute = "bf16" if device == "cuda" else "fp32"
    return settled


@pytest.fixture(scope="module")
def benchmark_cases(benchmark):
    """benchmarks/memory.py as a module."""
    return benchmark("memory")


@pytest.mark.parametrize("changed", [{"canon": "AC"}, {"canon": "C", "blocks": "revffn", "hidden_size": 48}])
def test_canon_layers_are_counted(changed):
    model = ModelConfig(**ODD.model_dump() | changed)
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in Transformer(model).parameters()]
    assert sorted(root_group(model).shapes + block_group(model).shapes * model.num_layers) == sorted(shapes)


def test_parameters_and_state_are_those_of_the_model():
    with torch.device("meta"):
        model = Transformer(ODD)
    shapes = [tuple(p.shape) for p in model.parameters()]
    groups = root_group(ODD).shapes + block_group(ODD).shapes * ODD.num_layers
    assert sorted(groups) == sorted(shapes)
    for name in ("adamw", "muon"):
        memory = estimate(config(optimizer={"name": name}), Layout(1, 1, 1, 1))
        assert memory.parts["parameters"] == 4 * parameter_counts(ODD).total
        live = build_optimizer(dict(Transformer(ODD).named_parameters()), name=name).state().values()
        kept = sum(t.untyped_storage().nbytes() for t in live)
        if name == "adamw":
            assert memory.parts["optimizer"] == kept
        else:
            root, blocks = root_group(ODD), type(root_group(ODD))(block_group(ODD).shapes * ODD.num_layers)
            assert update.muon_state(root, blocks, 1, 4) == kept


@pytest.mark.parametrize("shard", [1, 2, 4])
def test_shards_by_hand(shard):
    """Rows are cut into equal chunks: 331 rows on 2 ranks are 166, on 4 ranks 83."""
    replayed = replay.Replay(config(), 4, shard, 1, 1)
    replayed.run()

    def rows(n: int) -> int:
        return math.ceil(n / shard)

    attention = 4 * rows(36) * 36 + 2 * rows(12)
    elements = rows(331) * 36 + rows(36) + 2 * (attention + 2 * rows(36) + 2 * rows(50) * 36 + rows(36) * 50)
    left = replayed.tally.live
    assert left["parameters"] == left["gradients"] == 4 * elements
    assert left["optimizer"] == 8 * elements + 4 * (2 + 2 * 11)
    assert left["activations"] == left["logits"] == left["all-gather"] == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("reshard", [True, False])
def test_all_that_is_made_is_dropped(device, world, recompute, reshard):
    settled = config(BIG, device, parallel={"reshard_after_forward": reshard}, run={"recompute": recompute})
    replayed = replay.Replay(settled, world, world, 2, 2)
    replayed.run()
    for part in ("activations", "logits", "all-gather"):
        assert replayed.tally.live[part] == 0, part
    held = replayed.tally.live
    assert held["gradients"] == held["parameters"]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("sections", [{}, {"precision": {"fp8": True}, "sparse": {"mode": "s-ste"}}])
@pytest.mark.parametrize("changed", [{}, {"blocks": "revffn"}, {"canon": "AC"}])
def test_all_that_experts_make_is_dropped(world, experts, sections, changed):
    model = BIG.model_copy(update={"ffn": "moe"} | changed)
    for reshard in (True, False):
        parallel = {"experts": min(experts, world), "reshard_after_forward": reshard}
        replayed = replay.Replay(config(model, parallel=parallel, **sections), world, world, 2, 2)
        replayed.run()
        left = replayed.tally.live
        assert left["activations"] == left["logits"] == left["all-gather"] == 0
        assert left["gradients"] == left["parameters"] - casts(replayed)


def casts(replayed: replay.Replay) -> int:
    """Bytes of the 8-bit shards that are held beside the parameters."""
    fp8 = replayed.config.precision.fp8 and replayed.fsdp
    return cast_group(replayed.model).shard(replayed.shard) * replayed.layers if fp8 else 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("coupling", ["exact", "revffn"])
@pytest.mark.parametrize("ffn", ["dense", "moe"])
@pytest.mark.parametrize("anchor_every", [None, 1, 3, 16])
def test_all_that_reversible_blocks_make_is_dropped(device, coupling, ffn, anchor_every):
    revffn = RevFFNConfig(anchor_every=anchor_every, adapters=coupling == "revffn")
    model = BIG.model_copy(update={"blocks": "revffn", "coupling": coupling, "ffn": ffn, "revffn": revffn})
    replayed = replay.Replay(config(model, device), 2, 2, 2, 2)
    replayed.run()
    left = replayed.tally.live
    assert left["activations"] == left["logits"] == left["all-gather"] == 0
    assert left["gradients"] == left["parameters"]


def test_constants_are_those_of_the_code():
    assert replay.CHUNK_LOGITS == {"cuda": CUDA_LOGITS, "cpu": CPU_LOGITS}
    assert (replay.ONE_GROUP_BYTES, update.BUCKET_ELEMENTS) == (ONE_GROUP_BYTES, muon.BUCKET_ELEMENTS)


def test_what_is_not_settled_is_refused():
    with pytest.raises(ValueError, match="must be settled"):
        estimate(Config(model=ODD), Layout(1, 1, 1, 1))


def close(row: dict) -> None:
    assert row["ratio"] == pytest.approx(1, abs=0.1), row


@pytest.mark.parametrize(
    ("case", "world"),
    [
        ("logits", 1),
        ("reversible, anchors", 1),
        ("reversible, coupling revffn, adapters", 1),
        ("reversible, experts", 1),
        ("adapters alone", 1),
        ("adapters alone, two ranks", 2),
        ("adapters alone, experts", 1),
        ("fsdp, recompute full, accumulation 2", 2),
        ("fsdp, recompute full, accumulation 2, bf16 sums", 2),
        ("2:4, estimator", 1),
        ("fp8, scales of rows", 1),
        ("experts dealt", 2),
        ("fsdp, 2:4, fp8, parameters", 2),
        ("demo, half of each chunk", 2),
        ("demo, half of each chunk, owners", 2),
        ("demo, faithful", 2),
    ],
)
def test_measured(pool, benchmark_cases, case, world):
    found = next(c for c in benchmark_cases.CASES if c.name == case)
    small = dataclasses.replace(found, model=found.model | {"num_layers": 2}, seq_len=128)
    for row in pool.run(world, benchmark_cases.measure, small, torch.device("cpu")):
        close(row)


def test_recompute_and_sharding_save_what_they_promise():
    def peak(recompute: str, shard: int) -> dict[str, int]:
        return estimate(config(BIG, "cuda", run={"recompute": recompute}), Layout(8, shard, 8, 1)).largest

    none, selective, full = (peak(mode, 8) for mode in ("none", "selective", "full"))
    assert none["activations"] > selective["activations"] > full["activations"]
    hidden = 8 * 1024 * BIG.hidden_size * 2
    assert full["activations"] > BIG.num_layers * hidden  # each block's input
    whole, eighth = peak("none", 1), peak("none", 8)
    assert whole["parameters"] == 8 * eighth["parameters"] == 4 * parameter_counts(BIG).total
    assert whole["activations"] == eighth["activations"]


def test_reversible_blocks_keep_no_activations():
    """Flat in depth, while a recomputed block keeps its input, an anchor two streams and a router its choices."""

    def activations(layers: int, recompute: str = "none", **model) -> int:
        shape = BIG.model_copy(update={"num_layers": layers} | model)
        settled = config(shape, "cpu", run={"recompute": recompute})
        return estimate(settled, Layout(1, 1, 8, 1)).largest["activations"]

    tokens = 8 * 1024
    hidden = tokens * BIG.hidden_size * 4
    reversible = {"blocks": "revffn"}
    assert activations(4, **reversible) == activations(64, **reversible)
    assert activations(64, "full") - activations(4, "full") == 60 * hidden
    assert activations(4, **reversible) < activations(4, "full") < activations(4)
    anchors = reversible | {"revffn": RevFFNConfig(anchor_every=8)}
    assert activations(64, **anchors) - activations(8, **anchors) == 7 * hidden
    experts = reversible | {"ffn": "moe"}
    ids = 8 * tokens * BIG.moe.top_k
    assert activations(64, **experts) - activations(4, **experts) == 60 * ids


def decide(memory: float | None, world: int = 8, device: str = "cuda", model: ModelConfig = BIG, **sections):
    sections = {"run": {"recompute": "full"}} | sections
    run = Config(model=model, budget={"tokens": 20_000_000_000}, **sections)
    plan, warnings = resolve(
        run, {}, Machine(world, device, True, None if memory is None else int(memory)), None
    )
    assert plan.inputs.micro_batch == run.parallel.micro_batch
    return run, [w for w in warnings if "needs an estimated" in w]


def test_as_few_ranks_as_fit_share_a_replica():
    unknown, _ = decide(None)
    assert unknown.parallel.shard == 8
    shards, batches = [], set()
    for gigabytes in (30, 16, 10, 7):
        run, warnings = decide(gigabytes * 1e9)
        shards.append(run.parallel.shard)
        batches.add(run.budget.batch_tokens)
        assert not warnings
        assert run.parallel.micro_batch == unknown.parallel.micro_batch
        memory = estimate(run, Layout.of(run, 8))
        assert memory.total <= (1 - MARGIN["cuda"]) * gigabytes * 1e9
        if run.parallel.shard > 1:  # the next smaller divisor would not do
            fewer = dataclasses.replace(Layout.of(run, 8), shard=run.parallel.shard // 2)
            assert estimate(run, fewer).total > (1 - MARGIN["cuda"]) * gigabytes * 1e9
    assert shards == [1, 2, 4, 8]
    assert batches == {unknown.budget.batch_tokens}


def test_the_micro_batch_shrinks_and_the_batch_stays():
    unknown, _ = decide(None)
    run, _ = decide(5e9)
    assert run.parallel.micro_batch < unknown.parallel.micro_batch
    assert run.budget == unknown.budget
    assert (run.optimizer.lr, run.optimizer.weight_decay) == (
        unknown.optimizer.lr,
        unknown.optimizer.weight_decay,
    )
    assert estimate(run, Layout.of(run, 8)).total <= 4.5e9


def test_cpus_share_over_all_ranks():
    assert decide(64e9, device="cpu")[0].parallel.shard == 8
    small = decide(5.5e9, device="cpu")[0]
    assert small.parallel.shard == 8
    assert small.parallel.micro_batch < decide(64e9, device="cpu")[0].parallel.micro_batch


@pytest.mark.parametrize(
    ("world", "node", "shard"),
    [(8, 8, 1), (8, 4, 4), (16, 8, 8), (6, 4, 2), (2, 1, 1)],
)
def test_over_slow_links_a_replica_is_a_node(world, node, shard):
    for device, memory in (("cuda", 80e9), ("cpu", 64e9), ("cuda", None)):
        run = Config(model=ODD, budget={"tokens": 10**8}, parallel={"sync": "demo"})
        resolve(run, {}, Machine(world, device, True, memory and int(memory), node), None)
        assert run.parallel.shard == shard


def test_when_nothing_fits():
    with pytest.raises(
        UserError, match=r"set run.recompute=full or start more ranks, or set parallel.micro_batch=1"
    ):
        decide(4.2e9, run={})
    with pytest.raises(UserError, match=r"stay free\); start more ranks, or set parallel.micro_batch=1"):
        decide(2e9, run={})  # recompute is not enough
    run, warnings = decide(2e9, parallel={"micro_batch": 4, "shard": 2})
    assert (run.parallel.micro_batch, run.parallel.shard) == (4, 2)
    assert len(warnings) == 1
    assert "lower parallel.micro_batch or shard over more ranks (parallel.shard)" in warnings[0]
    reversible = BIG.model_copy(update={"blocks": "revffn"})
    with pytest.raises(UserError, match=r"stay free\); start more ranks, or set parallel.micro_batch=1"):
        decide(1e9, model=reversible, run={})


def test_plan_of_a_config_tells_the_memory_without_torch():
    code = (
        "import sys; from stepline.trainer.plan.command import Request, run_plan;"
        "run_plan(Request('dense-1b', [], None, None, None, None, 8, None, None, None, None, None), True);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    memory = json.loads(done.stdout)["memory"]
    assert memory["total"] == sum(memory["parts"].values()) > 10e9
    assert memory["parts"].keys() == set(PARTS)
