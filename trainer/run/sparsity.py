"""2:4 sparse layers in a run: their scales after initialisation, the phases of the run, and what is shown of them."""

import functools
import itertools
from types import EllipsisType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stepline.comm.fsdp import local, shard_slice
from stepline.comm.fsdp_cast import CastShard
from stepline.comm.host_copy import to_device
from stepline.kernels import ops
from stepline.kernels.fp8 import E4M3, largest, quantise, scale_for
from stepline.kernels.sparse24 import scale_of, scale_sums, soft_threshold
from stepline.models.sparse_linear import SparseLinear, mode_of, sparse_weights
from stepline.trainer.config import Config
from stepline.trainer.run.precision import compute_dtype
from stepline.trainer.run.step import all_sum


@torch.no_grad()
def set_betas(model: nn.Module) -> None:
    """beta of every sparse weight from its values now: one all-reduce over all ranks.

    Every value is there as often as there are replicas, which their quotient does not show.
    """
    found = list(sparse_weights(model))
    if not found:
        return
    sums = torch.stack([_sums(local(weight)) for _, weight, _ in found])
    all_sum(sums)
    for (_, _, beta), value in zip(found, scale_of(sums), strict=True):
        beta.copy_(value)


def _sums(weight: Tensor) -> Tensor:
    """`scale_sums` of all of this rank's matrices, zeros where it holds none."""
    if not weight.numel():
        return weight.new_zeros(2, dtype=torch.float64)
    return scale_sums(weight).reshape(-1, 2).sum(0)


class Fp8Gather:
    """Weights of FP8 layers that FSDP2 shards are gathered as E4M3: thresholded and cast on the shard, once a step.

    The largest value of each weight is that of all its shards. With scales of rows it is each row's own, of which every
    rank gets all: FSDP2 would gather scales beside the values only where ranks have the same number of rows.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        layers = [m for m in model.modules() if isinstance(m, SparseLinear) and m.recipe.fp8]
        self.whole = [layer for layer in layers if not isinstance(layer.weight, DTensor)]
        self.layers = [layer for layer in layers if isinstance(layer.weight, DTensor)]
        self.weights = [layer.weight for layer in self.layers]
        # the weights would be gathered in the type of computing: the shards are rounded to it first
        self.compute = compute_dtype(config) if self.layers else None
        self.casts = [
            CastShard(layer.weight, functools.partial(setattr, layer, "gathered")) for layer in self.layers
        ]
        for layer in self.layers:
            shape = (layer.out_features, 1) if layer.recipe.row_scales else ()
            layer.gathered_scale = torch.ones(shape, device=layer.weight.device)
        self.sizes = [layer.gathered_scale.numel() for layer in self.layers]
        self.mine = [_own_rows(layer) for layer in self.layers]

    @torch.no_grad()
    def refresh(self) -> None:
        """After the weights, or whether they are sparse, have changed; a collective of the ranks of a replica."""
        if not self.layers:
            return
        shards = [local(weight) for weight in self.weights]
        amax = torch.zeros(sum(self.sizes), device=shards[0].device)
        for layer, shard, part, rows in zip(
            self.layers, shards, amax.split(self.sizes), self.mine, strict=True
        ):
            if shard.numel():
                part.view_as(layer.gathered_scale)[rows] = self._largest(layer, shard)
        dist.all_reduce(amax, dist.ReduceOp.MAX, self.casts[0].group)
        scales = scale_for(amax, E4M3).split(self.sizes)
        for layer, cast, shard, scale, rows in zip(
            self.layers, self.casts, shards, scales, self.mine, strict=True
        ):
            layer.gathered_scale.copy_(scale.view_as(layer.gathered_scale))
            cast.shard = self._cast(layer, shard, layer.gathered_scale[rows])

    def _largest(self, layer: SparseLinear, shard: Tensor) -> Tensor:
        """The largest magnitude of a shard, or of each of its rows, `[rows, 1]`."""
        if layer.recipe.row_scales:
            return largest(shard.to(self.compute), -1)
        return ops.weight_amax(shard, self.compute, layer.sparse)

    def _cast(self, layer: SparseLinear, shard: Tensor, scale: Tensor) -> Tensor:
        if layer.recipe.row_scales:
            return quantise(shard.to(self.compute), scale, E4M3)
        return ops.weight_cast(shard, scale, E4M3, self.compute, layer.sparse)

    @torch.no_grad()
    def flushed(self) -> Tensor | None:
        """(values of this rank's weights that are not zero, those of them whose 8 bits are zero); None without any."""
        dealt = (  # one weight after the other: all of them in the products' type would be half of the model again
            (local(weight).to(self.compute), cast.shard, layer.sparse)
            for layer, weight, cast in zip(self.layers, self.weights, self.casts, strict=True)
        )
        whole = ((layer.weight, layer.cast_weight()[0], layer.sparse) for layer in self.whole)
        counts = []
        for x, q, sparse in itertools.chain(dealt, whole):
            there = (soft_threshold(x) if sparse else x) != 0
            counts.append(torch.stack([there.sum(), (there & (q.float() == 0)).sum()]))
        return torch.stack(counts).sum(0).double() if counts else None


def _own_rows(layer: SparseLinear) -> slice | EllipsisType:
    """Which of the layer's scales are those of this rank's rows; the one of a tensor is every rank's."""
    if not layer.recipe.row_scales:
        return ...
    (rows, _), (begin, _) = shard_slice(layer.weight)
    return slice(begin, begin + rows)


class Sparsity:
    """Of the 2:4 sparse and the FP8 layers of `model`; where there are none, nothing happens."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.mode, self.weights = mode_of(model), list(sparse_weights(model))
        self.seeds = [m.seed for m in model.modules() if isinstance(m, SparseLinear) and m.recipe.mvue]
        self.key = config.run.seed, dist.get_rank() if dist.is_initialized() else 0
        if self.seeds:  # of each micro-batch; what runs again in a backward is inside of the model's forward
            model.register_forward_pre_hook(self._next_micro_batch)
        self.fp8 = Fp8Gather(model, config)
        self.dense_from = config.dense_from()
        self._before: list[Tensor] = []
        self._flushed: Tensor | None = None
        self._begun = False

    def enter_phase(self, step: int) -> None:
        """Whether forwards are sparse in the step with index `step`."""
        self.mode.sparse = step < self.dense_from

    @torch.no_grad()
    def begin(self, step: int, watched: bool) -> None:
        """Before the step with index `step`; watched: `row` will be asked for after it. Raises RuntimeError where a
        scale has not been set, with which the layer would give zeros."""
        if not self._begun:
            unset = [name for name, _, beta in self.weights if not beta.item() > 0]
            if unset:
                raise RuntimeError(f"the scale of {unset[0]} has not been set: no forward can be made")
            self._begun = True
        self.enter_phase(step)
        if self.seeds:  # a function of the run's seed, rank, step and layer: a resumed run repeats them
            keys = [hash((*self.key, step, layer)) & (2**62 - 1) for layer in range(len(self.seeds))]
            drawn = to_device(torch.tensor(keys), self.seeds[0].device)
            torch._foreach_copy_(self.seeds, list(drawn.unbind()))
        self.refresh()
        self._before = [self._mask(weight) for _, weight, _ in self.weights] if watched else []
        self._flushed = self.fp8.flushed() if watched else None

    def _next_micro_batch(self, *_: object) -> None:
        torch._foreach_add_(self.seeds, 1)

    def refresh(self) -> None:
        """After the model's weights have changed and before it runs."""
        self.fp8.refresh()

    @staticmethod
    def _mask(weight: Tensor) -> Tensor:
        """Which of four weights are kept, a bit each: uint8 [numel / 4] of this rank's part."""
        part = local(weight.data)
        kept = (soft_threshold(part) != 0 if part.numel() else part).to(torch.uint8)
        a, b, c, d = kept.reshape(part.numel() // 4, 4).unbind(1)
        return a | b << 1 | c << 2 | d << 3

    @torch.no_grad()
    def row(self) -> dict[str, float]:
        """`flip_rate`: share of all mask entries that the step changed; the range of beta; `fp8_flushed`: share of the
        values of FP8 weights that 8 bits turned into zeros (scales are exact, so that none is clipped). A collective.
        """
        row = {}
        if self._before:
            flips = torch.zeros(2, dtype=torch.float64, device=self._before[0].device)
            for (_, weight, _), before in zip(self.weights, self._before, strict=True):
                changed = self._mask(weight) ^ before
                flips[0] += sum((changed >> bit & 1).sum() for bit in range(4))
                flips[1] += 4 * before.numel()
            changed, total = all_sum(flips).tolist()
            betas = torch.stack([beta.double() for _, _, beta in self.weights])
            row = {
                "flip_rate": changed / total,
                "beta_min": betas.min().item(),
                "beta_max": betas.max().item(),
            }
        if self._flushed is not None:
            there, flushed = all_sum(self._flushed).tolist()
            row["fp8_flushed"] = flushed / max(there, 1)
        return row
