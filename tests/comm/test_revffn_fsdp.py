"""Reversible blocks under FSDP2 against one process with stored activations, bit by bit."""

import contextlib
import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stepline.comm import fsdp
from stepline.models.config import ModelConfig
from stepline.models.init import init_parameter

reversible = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "reversible_models.py")))
MOES, DTYPES = reversible.MOES, {name: reversible.DTYPES[name] for name in ("fp32", "bf16")}


def loss_of(model, tokens, stored=False):
    if model.config.ffn == "dense":
        return reversible.loss_of(model(tokens, stored=stored))
    targets = reversible.targets_of(tokens)
    return model(tokens, targets, loss_scale=torch.tensor(0.5), stored=stored).nll * 0.5


@torch.no_grad()
def build(options):
    moe = reversible.mixture(options["moe"]) if "moe" in options else {}
    config = ModelConfig(
        vocab_size=reversible.VOCAB, hidden_size=32, num_layers=options.get("layers", 4), num_heads=2, ffn_size=24,
        init_std=0.2, blocks="revffn", coupling=options.get("coupling", "exact"),
        revffn=options.get("revffn", {}), **moe,
    )  # fmt: skip
    model = reversible.Model(config)
    for name, p in model.named_parameters():
        p.copy_(init_parameter(name, p.shape, config, seed=0))
    if options.get("moe") == "bias":
        reversible.tilt(model)
    model.embed.weight.requires_grad_(not options.get("frozen", False))
    return model


def tokens(rank, batch):
    return reversible.tokens(10 * rank + batch, seq=9)


def batches(options):
    return 3 if options.get("layers", 4) < 48 else 2


def buffers(model):
    """Loads, sums and biases of the mixtures."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def expected(world, options):
    """One process: gradients, for each batch the sum over ranks, then over batches, in fp32; each rank's streams that
    a block reads, by batch and block; each rank's buffers."""
    models, streams = [build(options) for _ in range(world)], [[] for _ in range(world)]
    for model, seen in zip(models, streams, strict=True):
        for p in model.parameters():  # buffers stay as they are, as under FSDP
            p.data = p.data.to(DTYPES[options["compute"]])
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[:2]))
    sums = {}
    for batch in range(batches(options)):
        of_ranks = []
        for rank, model in enumerate(models):
            model.zero_grad()
            loss_of(model, tokens(rank, batch), stored=True).backward()
            of_ranks.append({n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None})
        for name in of_ranks[0]:
            total = sum(g[name] for g in of_ranks)
            sums[name] = total if batch == 0 else sums[name] + total
    return sums, streams, [buffers(model) for model in models]


def gathered(module):
    """Bytes of this module's gathered parameters, children's FSDP groups not included."""
    state = module._get_fsdp_state()
    groups = (
        state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    )  # 2.11
    parameters = [p for group in groups if group is not None for p in group.fsdp_params]
    full = [p._unsharded_param for p in parameters if hasattr(p, "_unsharded_param")]
    return sum(p.untyped_storage().nbytes() for p in full)


def train(options):
    """Gradients of some micro-batches, the streams that each block's inversion ended with, buffers, and what is
    gathered after forwards and after backwards."""
    model = build(options)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    blocks_of_their_own = mock.patch.object(fsdp, "ONE_GROUP_BYTES", 0)
    with contextlib.nullcontext() if options.get("one_group") else blocks_of_their_own:
        fsdp.shard_model(
            model,
            model.layers,
            mesh,
            compute_dtype=DTYPES[options["compute"]],
            reduce_dtype=torch.float32,
            reshard_after_forward=options["reshard"],
        )
    groups = [m for m in model.layers if isinstance(m, FSDPModule)]
    assert len(groups) == (0 if options.get("one_group") else len(model.layers))
    after_forward, after_backward = [], []
    with reversible.inversions() as inverted:
        for batch in range(batches(options)):
            loss = loss_of(model, tokens(dist.get_rank(), batch))
            after_forward.append(sum(map(gathered, groups)))
            loss.backward()
            after_backward.append(sum(map(gathered, [*groups, model])))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return found, inverted[1::2], buffers(model), after_forward, after_backward


LAYOUTS = [
    {"compute": compute, "reshard": reshard} for compute, reshard in itertools.product(DTYPES, (True, False))
]
CASES = [
    *LAYOUTS,
    *({"compute": compute, "reshard": False, "one_group": True} for compute in DTYPES),
    {"compute": "fp32", "reshard": True, "frozen": True},
    {"compute": "bf16", "reshard": True, "frozen": True, "revffn": {"anchor_every": 3, "adapters": True}},
    *({**layout, "moe": moe} for moe in MOES for layout in LAYOUTS),
]
DEEP = [{**layout, **moe, "layers": 48} for moe in ({}, *({"moe": m} for m in MOES)) for layout in LAYOUTS]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "options",
    [*CASES, *(pytest.param(deep, marks=pytest.mark.e2e) for deep in DEEP)],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()),
)
def test_gradients_equal_stored_ones_of_one_process(pool, world, options):
    gradients, streams, counts = expected(world, options)
    none, layers = [0] * batches(options), options.get("layers", 4)
    ranks = pool.run(world, train, options)
    for (found, inverted, counted, after_forward, after_backward), seen, own in zip(
        ranks, streams, counts, strict=True
    ):
        assert found.keys() == gradients.keys()
        assert [n for n in found if not torch.equal(found[n], gradients[n])] == []
        assert [n for n in own if not torch.equal(counted[n], own[n])] == []
        assert all(n.endswith("bias") or t.any() for n, t in own.items())  # loads and sums were counted
        assert len(seen) == layers * batches(options)
        for batch in range(batches(options)):  # of each, the last block is inverted first
            of_batch = slice(batch * layers, (batch + 1) * layers)
            for mine, theirs in zip(inverted[of_batch], reversed(seen[of_batch]), strict=True):
                assert all(map(torch.equal, mine, theirs))
        assert after_backward == none
        if options["reshard"]:
            assert after_forward == none
        elif not options.get("one_group"):
            assert all(after_forward)


def test_fixed_point_under_fsdp(pool):
    options = {"compute": "fp32", "reshard": True, "coupling": "revffn"}
    options["revffn"] = {"streams": "fp32", "iterations": 64}
    reference, _, _ = expected(2, options)
    for found, _, _, after_forward, after_backward in pool.run(2, train, options):
        assert not any(after_forward + after_backward)
        for name, gradient in reference.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4)  # of up to 70
