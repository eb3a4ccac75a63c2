"""Linear layers whose products are 2:4 sparse (S-STE, arXiv 2409.09099), in FP8, or both.

    Y  = X W~^T,   W~ = beta S(W)          E4M3 x E4M3
    dX = dY W~                             E5M2 x E4M3
    dW = dY^T X,   or MVUE(dY^T) X         E5M2 x E4M3

The gradient with respect to W~ is taken for that of W, unchanged (straight-through). The products themselves:
models/linear_products.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepline.kernels import ops
from stepline.kernels.fp8 import E4M3, E5M2, as_type, cast, scale_for
from stepline.kernels.grouped import grouped_gradients, grouped_linear
from stepline.kernels.sparse24 import GROUP, sparse_weight
from stepline.kernels.sparse_mm import Algorithm
from stepline.models.attention import Attention
from stepline.models.ffn import SwiGLU
from stepline.models.linear_products import Fp8Products, Products, RowFp8Products
from stepline.models.moe import Experts, MoE, grouped_swiglu

WEIGHTS = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Recipe:
    """How the three products of a layer are made."""

    sparse: bool = False
    """Weights 2:4 in Y and dX."""
    mvue: bool = False
    """The gradient of the result 2:4 along tokens in dW, by the estimator."""
    fp8: bool = False
    row_scales: bool = False
    """In FP8 a scale for each token and each row of a weight, which is dense; otherwise one for each tensor."""

    def __post_init__(self) -> None:
        if self.row_scales and (self.sparse or not self.fp8):
            raise ValueError("scales of rows are for dense weights in FP8")


@dataclass
class Mode:
    """What all layers of a model share."""

    sparse: bool = True
    """False in a dense phase at the end."""


class SparseLinear(nn.Linear):
    """A linear layer without bias by `recipe`; its weight is the dense master weight.

    beta, a buffer in at least fp32, is computed once after initialisation and frozen. seed, a buffer of the estimator,
    0-dim int64, is whoever trains the layer's to change from one micro-batch to the next.
    """

    gathered: Tensor | None = None
    """`[out, in]` E4M3, where the weight is sharded and gathered as this (comm/fsdp_cast.py): `weight` is then a
    placeholder while it is gathered, and only its gradient counts."""
    gathered_scale: Tensor | None = None
    """0-dim fp32, without beta; `[out, 1]` with scales of rows."""
    algorithm: Algorithm | None = None
    """How the sparse tensor cores make Y; None: Y is a dense product of the same numbers."""

    def __init__(self, in_features: int, out_features: int, recipe: Recipe, mode: Mode):
        super().__init__(in_features, out_features, bias=False)
        if recipe.sparse and in_features % GROUP:
            raise ValueError(
                f"2:4 sparsity takes inputs whose width is a multiple of {GROUP}, not {in_features}"
            )
        self.recipe, self.mode = recipe, mode
        if recipe.sparse:
            self.register_buffer("beta", torch.zeros(()))
        if recipe.mvue:
            self.register_buffer("seed", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def sparse(self) -> bool:
        """Whether the forward is sparse now."""
        return self.recipe.sparse and self.mode.sparse

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        estimated = self.recipe.mvue and self.mode.sparse
        rows, seed = x.flatten(0, -2), self.seed.clone() if estimated else None
        if self.recipe.row_scales:
            y = RowFp8Products.apply(rows, self.weight, *self.cast_weight())
        elif self.recipe.fp8:
            data, scale = self.cast_weight()
            scale, algorithm = (scale * self.beta, self.algorithm) if self.sparse else (scale, None)
            y = Fp8Products.apply(rows, self.weight, data, scale, seed, algorithm)
        else:
            y = Products.apply(rows, self.weight, self.beta if self.sparse else None, seed)
        return y.unflatten(0, x.shape[:-1])

    def cast_weight(self) -> tuple[Tensor, Tensor]:
        """S(W), or W, in E4M3 and its scale: 0-dim, or `[out, 1]` with scales of rows."""
        if self.gathered is not None:
            return self.gathered, self.gathered_scale
        w = self.weight.detach()
        if self.recipe.row_scales:
            q = cast(w, E4M3, dim=-1)
            return q.data, q.scale
        scale = scale_for(ops.weight_amax(w, w.dtype, self.sparse), E4M3)
        return ops.weight_cast(w, scale, E4M3, w.dtype, self.sparse), scale

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W~, or W in a dense phase: what a forward multiplies by."""
        return sparse_weight(self.weight, self.beta) if self.sparse else self.weight * 1

    def _apply(self, fn, recurse=True):
        return _keeping_betas(self, super()._apply, fn, recurse)


def _keeping_betas(
    module: nn.Module, apply: Callable[..., nn.Module], fn: Callable, recurse: bool
) -> nn.Module:
    """`apply`, the `_apply` of `module`; a cast leaves betas in fp32 at least: in bf16 weights move by up to .4 %."""
    kept = {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("beta")}
    apply(fn, recurse)
    for name, beta in kept.items():
        cast = getattr(module, name)
        if cast.dtype.itemsize < 4:
            setattr(module, name, beta.to(cast.device))
    return module


class SparseExperts(Experts):
    """A mixture's experts with 2:4 sparse weights, or in simulated FP8, in grouped products.

    No grouped 2:4 product exists: the weights are masked, which is the same function. One beta for each stack. With
    scales of rows, tokens and the rows of each weight have their own, and gradients a scale for each token.
    """

    def __init__(self, experts: int, width: int, inner: int, recipe: Recipe, mode: Mode) -> None:
        super().__init__(experts, width, inner)
        self.recipe, self.mode = recipe, mode
        if recipe.sparse:
            for name in WEIGHTS:
                self.register_buffer(f"{name}_beta", torch.zeros(()))

    def _apply(self, fn, recurse=True):
        return _keeping_betas(self, super()._apply, fn, recurse)

    def product(self, x: Tensor, weights: tuple[Tensor, Tensor, Tensor], counts: Tensor) -> Tensor:
        """As that of `Experts`, with W~ in the place of W."""
        fp8, dim = self.recipe.fp8, -1 if self.recipe.row_scales else None
        sparse = self.recipe.sparse and self.mode.sparse
        if not (sparse or fp8):
            return grouped_swiglu(x, *weights, counts)

        def linear(x: Tensor, name: str, weight: Tensor) -> Tensor:
            beta = getattr(self, f"{name}_beta") if sparse else None
            y = _Grouped.apply(x, weight, counts, beta, E4M3 if fp8 else None, dim)
            return _Rounded.apply(y, None, E5M2, dim) if fp8 else y

        w1, w3, w2 = weights
        x = _Rounded.apply(x, E4M3, None, dim) if fp8 else x
        inner = nn.functional.silu(linear(x, "w1", w1)) * linear(x, "w3", w3)
        return linear(_Rounded.apply(inner, E4M3, None, dim) if fp8 else inner, "w2", w2)


class _Grouped(torch.autograd.Function):
    """`grouped_linear` by W~ = beta S(W) (W without beta), rounded to `dtype` and back where there is one; its gradient
    is taken for W's. As in `Products`, only W is held for backward. dim: of `cast`."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        counts: Tensor,
        beta: Tensor | None,
        dtype: torch.dtype | None,
        dim: int | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, counts, beta)
        ctx.dtype, ctx.dim = dtype, dim
        return grouped_linear(x, _made(weight, beta, dtype, dim), counts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, counts, beta = ctx.saved_tensors
        w = _made(weight, beta, ctx.dtype, ctx.dim)
        dx, dw = grouped_gradients(grad, x, w, counts, ctx.needs_input_grad[:2])
        return dx, dw, None, None, None, None


def _made(weight: Tensor, beta: Tensor | None, dtype: torch.dtype | None, dim: int | None) -> Tensor:
    w = weight if beta is None else sparse_weight(weight, beta)
    return w if dtype is None else _rounded(w, dtype, dim)


class _Rounded(torch.autograd.Function):
    """Rounds to 8 bits and back: what goes forward, the gradient, or neither. dim: of `cast`."""

    @staticmethod
    def forward(
        ctx, x: Tensor, forward: torch.dtype | None, backward: torch.dtype | None, dim: int | None
    ) -> Tensor:
        ctx.backward_dtype, ctx.dim = backward, dim
        return x.view_as(x) if forward is None else _rounded(x, forward, dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rounded = grad if ctx.backward_dtype is None else _rounded(grad, ctx.backward_dtype, ctx.dim)
        return rounded, None, None, None


def _rounded(x: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    if not x.numel():
        return x.clone()
    return as_type(cast(x, dtype, dim=dim).float(torch.promote_types(x.dtype, torch.float32)), x.dtype)


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, master weight, its beta) of every sparse weight of `model`."""
    for prefix, module in model.named_modules():
        if not isinstance(module, SparseLinear | SparseExperts) or not module.recipe.sparse:
            continue
        names = WEIGHTS if isinstance(module, SparseExperts) else ("weight",)
        for name in names:
            beta = module.beta if name == "weight" else getattr(module, f"{name}_beta")
            yield f"{prefix}.{name}", getattr(module, name), beta


def mode_of(model: nn.Module) -> Mode:
    """What the layers of `model` by recipes share."""
    layers = (m for m in model.modules() if isinstance(m, SparseLinear | SparseExperts))
    return next((layer.mode for layer in layers), Mode())


def convert(model: nn.Module, ffn: Recipe, attention: Recipe) -> None:
    """Puts layers by these recipes in the place of the blocks' linear layers and experts, in place, on meta.

    Names of parameters stay. Routers, adapters, embedding and head are left as they are.
    """
    mode = Mode()
    for module in list(model.modules()):
        if isinstance(module, SwiGLU):
            _replace(module, ("w1", "w3", "w2"), ffn, mode)
        elif isinstance(module, Attention):
            _replace(module, ("wq", "wk", "wv", "wo"), attention, mode)
        elif isinstance(module, MoE) and ffn != Recipe():
            dense = module.experts
            with dense.w1.device:
                made = SparseExperts(*dense.w1.shape[::2], dense.w1.shape[1], ffn, mode).to(dense.w1.dtype)
            module.experts = made


def _replace(module: nn.Module, names: tuple[str, ...], recipe: Recipe, mode: Mode) -> None:
    for name in names if recipe != Recipe() else ():
        linear = getattr(module, name)
        with linear.weight.device:
            made = SparseLinear(linear.in_features, linear.out_features, recipe, mode).to(linear.weight.dtype)
        setattr(module, name, made)
