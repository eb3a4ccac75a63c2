"""Which optimizer updates which parameter: AdamW, or Muon for the blocks' matrices and AdamW for the rest.

Both work on this rank's shards, take the learning rate and the weight decay at each step, and skip an update
on the device when told so, without waiting for it.
"""

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stepline.comm.fsdp import local
from stepline.trainer.errors import UserError, nearest
from stepline.trainer.optim.muon import Muon

OPTIMIZERS = ("adamw", "muon")


class AdamW:
    """Fused AdamW (arXiv 1711.05101) on this rank's shards; `decayed` names what weight decay applies to.

    beta1: None for no first moment, which is that of 0 without its state.
    """

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        decayed: set[str],
        beta1: float | None = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
    ) -> None:
        self.params, self.decayed = params, decayed
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        zeros = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.exp_avg_sq = zeros
        kept = {} if beta1 is None else zeros
        self.exp_avg = {name: torch.zeros_like(zero) for name, zero in kept.items()}
        # One counter each, in fp32: what the fused kernels take.
        self.steps = {name: torch.zeros((), device=local(p).device) for name, p in params.items()}

    def state(self) -> dict[str, Tensor]:
        """The live moments and counters of each parameter, sharded as the parameter is."""
        flat = {}
        for name in self.params:
            if name in self.exp_avg:
                flat[f"{name}.exp_avg"] = self.exp_avg[name]
            flat[f"{name}.exp_avg_sq"] = self.exp_avg_sq[name]
            flat[f"{name}.step"] = self.steps[name]
        return flat

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, skip: Tensor | None = None) -> None:
        """One update; parameters without a gradient are left alone."""
        present = [name for name, p in self.params.items() if p.grad is not None]
        for decay in (True, False):
            names = [name for name in present if (name in self.decayed) == decay]
            if not names:
                continue
            gradients = [local(self.params[n].grad) for n in names]
            # the mean of one gradient, written into it, is that gradient
            means = gradients if self.beta1 is None else [local(self.exp_avg[n]) for n in names]
            adamw(
                [local(self.params[n]) for n in names],
                gradients,
                means,
                [local(self.exp_avg_sq[n]) for n in names],
                [],
                [self.steps[n] for n in names],
                fused=True,
                found_inf=skip,
                amsgrad=False,
                beta1=self.beta1 or 0.0,
                beta2=self.beta2,
                lr=lr,
                weight_decay=weight_decay if decay else 0.0,
                eps=self.eps,
                maximize=False,
            )


class Optimizer:
    """AdamW, and Muon beside it where chosen; every parameter is updated by exactly one of them."""

    def __init__(self, adamw: AdamW, muon: Muon | None) -> None:
        self.adamw, self.muon = adamw, muon

    def step(self, lr: float, weight_decay: float, skip: Tensor | None = None) -> None:
        """One update of all parameters.

        skip: 0-dim float32 tensor on the parameters' device; where it is 1 neither a parameter nor a state
        changes, whatever the gradients hold. It is not read by the host.
        """
        self.adamw.step(lr, weight_decay, skip)
        if self.muon is not None:
            self.muon.step(lr, weight_decay, skip)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for param in self._params().values():
            param.grad = None

    def state(self) -> dict[str, Tensor]:
        """All live state tensors, `{parameter}.{exp_avg | exp_avg_sq | step | momentum}`: DTensors where the
        parameter is one. They are there from the start, so that a checkpoint can be loaded into them."""
        return self.adamw.state() | (self.muon.state() if self.muon is not None else {})

    def describe(self) -> dict[str, str]:
        """By parameter: `adamw, decayed`, `adamw, not decayed` or `muon, decayed`."""
        adam = {n: f"adamw, {'' if n in self.adamw.decayed else 'not '}decayed" for n in self.adamw.params}
        return adam | (dict.fromkeys(self.muon.params, "muon, decayed") if self.muon is not None else {})

    def _params(self) -> dict[str, nn.Parameter]:
        return self.adamw.params | (self.muon.params if self.muon is not None else {})


def build_optimizer(
    named_parameters: dict[str, nn.Parameter],
    *,
    name: str = "adamw",
    beta1: float | None = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
) -> Optimizer:
    """The optimizer `name` over all of `named_parameters` (unsharded, or sharded by FSDP2).

    Weight decay applies to the matrices of linear layers, the head included, and neither to norms, biases and
    other vectors nor to embeddings (a head tied to the embedding is the embedding). A parameter that appears
    under two names is updated once, under the first. `muon` takes the matrices of the blocks (`layers.`), each of
    an expert's by itself, but not the routers.

    Raises UserError for another name.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"optimizer.name '{name}' is not one of {', '.join(OPTIMIZERS)}{nearest(name, OPTIMIZERS)}"
        )
    params, decayed = decay_groups(named_parameters)
    for key, param in params.items():
        if param.is_meta:
            raise ValueError(
                f"parameter {key} is on the meta device: initialise the model before its optimizer"
            )
    matrices = {n: p for n, p in params.items() if name == "muon" and n in decayed and _in_block(n, p)}
    rest = {n: p for n, p in params.items() if n not in matrices}
    muon = Muon(matrices, momentum, nesterov, ns_steps) if matrices else None
    return Optimizer(AdamW(rest, decayed & rest.keys(), beta1, beta2, eps), muon)


def decay_groups(named_parameters: dict[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], set[str]]:
    """The distinct trainable parameters by their first name, and the names of those that decay."""
    params: dict[str, nn.Parameter] = {}
    first: dict[int, str] = {}
    plain: set[str] = set()
    for name, param in named_parameters.items():
        if not param.requires_grad:
            continue
        known = first.setdefault(id(param), name)
        params.setdefault(known, param)
        if param.ndim < 2 or any("embed" in part for part in name.split(".")):
            plain.add(known)
    return params, params.keys() - plain


def _in_block(name: str, param: nn.Parameter) -> bool:
    parts = name.split(".")
    return param.ndim in (2, 3) and "layers" in parts and "router" not in parts
