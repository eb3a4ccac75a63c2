"""The load of a mixture's experts: counted over a whole step and all ranks, then evened and shown."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepline.models.moe import SUMS, MoE
from stepline.trainer.run.step import all_sum


@dataclass(frozen=True)
class Load:
    """Of one step's global batch, on the device; alike on all ranks."""

    experts: Tensor
    """`[layers, experts]`: tokens that were sent to each."""
    sums: Tensor
    """`[layers, SUMS]`."""


class ExpertBalance:
    """Over the MoE layers of `model`, of which there may be none."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.last: Load | None = None

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """One exchange after the step's micro-batches. Biases move, but for where `skip` (0-dim) is 1."""
        if not self.layers:
            return
        load = torch.stack([layer.load for layer in self.layers])
        counted = torch.cat([load.double(), torch.stack([layer.sums for layer in self.layers]).double()], 1)
        all_sum(counted)  # counts are exact in float64
        load, sums = counted.split([load.shape[1], len(SUMS)], 1)
        for layer, its_load in zip(self.layers, load, strict=True):
            frozen = not layer.router.weight.requires_grad
            if layer.config.balance == "bias" and not frozen:
                layer.move_bias(its_load, keep=skip)
            layer.load.zero_()
            layer.sums.zero_()
        self.last = Load(load, sums)

    def row(self) -> dict[str, float | list[list[float]]]:
        """Of a row of metrics.jsonl, for the last step; the host waits for the device.

        Means over the layers, but for the worst layer's load and bias; the losses are means per token. `expert_load`:
        `[layers][experts]`, 1 for an even share.
        """
        if self.last is None:
            return {}
        moe = self.layers[0].config
        load, sums = self.last.experts.cpu(), dict(zip(SUMS, self.last.sums.cpu().T, strict=True))
        tokens = sums["tokens"].clamp(min=1)
        relative = load / load.mean(1, keepdim=True).clamp(min=1e-9)
        z, balance = (float((sums[name] / tokens).mean()) for name in ("z", "balance"))
        used = moe.balance_loss * balance if moe.balance in ("global", "switch") else 0.0
        bias = torch.stack([layer.router.balance_bias for layer in self.layers]).double()
        return {
            "expert_load_max": float(relative.max()),
            "experts_dead": int((load == 0).sum()),
            "router_entropy": float((sums["entropy"] / tokens).mean()),
            "router_z": z,
            "router_balance": balance,
            "router_loss": (moe.z_loss * z + used) * len(self.layers),
            "router_bias_range": float((bias.amax(1) - bias.amin(1)).max()),
            "tokens_dropped": float((sums["dropped"] / (tokens * moe.top_k)).mean()),
            "expert_load": [[round(share, 4) for share in layer] for layer in relative.tolist()],
        }
