"""Reversible blocks under FSDP2 against one process with stored activations, bit by bit."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stepline.comm import fsdp
from stepline.models import transformer
from stepline.models.config import ModelConfig
from stepline.models.init import init_parameter
from stepline.models.revffn import run_reversible
from stepline.models.transformer import Transformer

VOCAB, BATCHES = 61, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(Transformer):
    """With `stored`, backward reads stored activations: the reference, of the same arithmetic."""

    def forward(self, tokens, stored=False, doc_ids=None):
        run = functools.partial(run_reversible, stored=stored)
        with mock.patch.object(transformer, "run_reversible", run):
            return super().forward(tokens, doc_ids=doc_ids)


@torch.no_grad()
def build(options):
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=2, ffn_size=24, init_std=0.2, blocks="revffn",
        coupling=options.get("coupling", "exact"), revffn=options.get("revffn", {}),
    )  # fmt: skip
    model = Model(config)
    for name, p in model.named_parameters():
        p.copy_(init_parameter(name, p.shape, config, seed=0))
    model.embed.weight.requires_grad_(not options.get("frozen", False))
    return model


def tokens(rank, batch):
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(10 * rank + batch))


def loss_of(logits):
    return logits.float().logsumexp(-1).sum() - logits.float()[..., 7].sum()


def expected(world, options):
    """One process: for each batch the sum over ranks, then over batches, in fp32."""
    model, sums = build(options).to(DTYPES[options["compute"]]), {}
    for batch in range(BATCHES):
        of_ranks = []
        for rank in range(world):
            model.zero_grad()
            loss_of(model(tokens(rank, batch), stored=True)).backward()
            of_ranks.append({n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None})
        for name in of_ranks[0]:
            total = sum(g[name] for g in of_ranks)
            sums[name] = total if batch == 0 else sums[name] + total
    return sums


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
    """Gradients of some micro-batches, and what is gathered after forwards and after backwards."""
    import torch.distributed as dist

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
    assert len(groups) == (0 if options.get("one_group") else 4)
    after_forward, after_backward = [], []
    for batch in range(BATCHES):
        loss = loss_of(model(tokens(dist.get_rank(), batch)))
        after_forward.append(sum(map(gathered, groups)))
        loss.backward()
        after_backward.append(sum(map(gathered, [*groups, model])))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return found, after_forward, after_backward


CASES = [
    {"compute": compute, "reshard": reshard, **more}
    for compute in DTYPES
    for reshard, more in ((True, {}), (False, {}), (False, {"one_group": True}))
] + [
    {"compute": "fp32", "reshard": True, "frozen": True},
    {"compute": "bf16", "reshard": True, "frozen": True, "revffn": {"anchor_every": 3, "adapters": True}},
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("options", CASES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_gradients_equal_stored_ones_of_one_process(pool, world, options):
    reference = expected(world, options)
    for found, after_forward, after_backward in pool.run(world, train, options):
        assert found.keys() == reference.keys()
        assert [n for n in found if not torch.equal(found[n], reference[n])] == []
        assert after_backward == [0] * BATCHES
        if options["reshard"]:
            assert after_forward == [0] * BATCHES
        elif not options.get("one_group"):
            assert all(after_forward)


def test_fixed_point_under_fsdp(pool):
    options = {"compute": "fp32", "reshard": True, "coupling": "revffn"}
    options["revffn"] = {"streams": "fp32", "iterations": 64}
    reference = expected(2, options)
    for found, after_forward, after_backward in pool.run(2, train, options):
        assert not any(after_forward + after_backward)
        for name, gradient in reference.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4)  # of up to 70
