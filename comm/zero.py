"""DeepSpeed ZeRO (arXiv 1910.02054), stages 1 to 3, as a synchroniser of one replica over all ranks.

DeepSpeed fuses what trainer/run/build.py does step by step for FSDP2. Its order, after recompute:

weights in the compute type, one after the other -> (stage 3) cut among the ranks -> deepspeed.initialize: flat
master weights, of which every rank keeps its part, and hooks -> (stage 3) weights of a block gathered together ->
the optimizer over this rank's flat parts -> initial values -> weights from masters (`adopt`) -> checkpoint load
(`adopt` again).

DeepSpeed moves weights and gradients. Clipping, the guard, the learning rate and the update itself are Stepline's:
DeepSpeed is given an optimizer that calls back.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.pieces import Pieces
from stepline.comm.synchronizer import Optimizer, StepResult, Synchronizer


@dataclass(frozen=True)
class ZeROSettings:
    """Of `parallel.zero` and what goes with it."""

    stage: int
    """1 cuts the optimizer's state, 2 gradients too, 3 weights too."""
    offload: str
    """none; optimizer: masters and optimizer's state in host memory; all: weights too (stage 3)."""
    compute_dtype: torch.dtype
    """fp32 or bf16; masters and the optimizer's state are fp32."""
    reduce_dtype: torch.dtype
    """In which gradients are summed over ranks."""
    weight_decay: float
    reshard_after_forward: bool
    """Stage 3: free gathered weights after a forward even where they are used again soon."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's `zero_optimization`."""

    def config(self) -> dict[str, Any]:
        """What DeepSpeed is told."""
        zero: dict[str, Any] = {"stage": self.stage}
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.offload != "none":
            zero["offload_optimizer"] = host
        elif self.stage < 3:
            zero["compute_grad_norm"] = False  # the guard has computed it
        if self.offload == "all":
            zero["offload_param"] = host
        if self.stage == 3 and self.reshard_after_forward:
            zero["stage3_max_reuse_distance"] = 0
        half = self.compute_dtype == torch.bfloat16
        return {
            "train_micro_batch_size_per_gpu": 1,  # it counts samples for its own log alone
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": half, "check_grad_overflow": False} if half else {"enabled": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "bf16" if self.reduce_dtype == torch.bfloat16 else "fp32",
            "steps_per_print": None,
            "zero_optimization": zero | dict(self.deepspeed),
        }


class _Callback(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer: it hands each flat part on."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.update: Callable[[Tensor], None]

    def step(self, closure: None = None) -> None:
        """Of the parts that DeepSpeed has put into the groups."""
        for group in self.param_groups:
            for part in group["params"]:
                self.update(part)


class ZeRO(Synchronizer):
    """Over all ranks, of a model that `materialise` has put on its device.

    parameters: the trainable ones by name, all of `model`. decayed: names of those with weight decay. blocks: modules
    whose weights are gathered together in stage 3; the rest is gathered with the model. make_optimizer: of a flat part
    `[elements]` and whether it decays, the optimizer, whose state has `exp_avg`, `exp_avg_sq` and `step`.
    """

    averages_replicas = False

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: ZeROSettings, *, decayed: set[str],
        blocks: Iterable[nn.Module], device: torch.device, make_optimizer: Callable[[Tensor, bool], Optimizer],
    ) -> None:  # fmt: skip
        super().__init__(parameters, None)
        self.settings, self.decayed = settings, decayed
        groups = [
            {"params": [p for n, p in parameters.items() if (n in decayed) == decays], "decays": decays}
            for decays in (True, False)
        ]
        with _quiet(device) as deepspeed:
            callback = _Callback(groups)
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=model, optimizer=callback, config=settings.config(), dist_init_required=False
            )
            if settings.stage == 3:
                _gather_by_block(model, blocks, deepspeed)
        callback.update = self._update
        stage3 = settings.stage == 3
        self.flat: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if stage3 else self.zero.single_partition_of_fp32_groups
        )
        decays = [g["decays"] for g in callback.param_groups]
        of_group = self.zero.sub_group_to_group_id if stage3 else range(len(self.flat))
        self.optimizers = [make_optimizer(part, decays[of_group[i]]) for i, part in enumerate(self.flat)]
        self.places = {name: self._place(p) for name, p in parameters.items()}
        self._lr, self._skip = 0.0, None

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, int, int]:
        """(flat part, first value in it, first value of the flattened parameter, values) that this rank holds."""
        if self.settings.stage == 3:
            part, at, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(dist.get_rank() * size, parameter.ds_numel)
            return part, at, start, min(size, parameter.ds_numel - start)
        held = parameter._hp_mapping
        if held is None:
            return 0, 0, 0, 0
        flat, whole = held.hp_fragment_address, held.lp_fragment_address
        return held.param_group_index, flat.start, whole.start, flat.numel

    def _shape(self, name: str) -> tuple[int, ...]:
        parameter = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _pieces(self, name: str, flat: list[Tensor]) -> Pieces:
        part, at, start, size = self.places[name]
        return Pieces(flat[part].detach()[at : at + size], self._shape(name), start)

    # a step

    def through(self, model: nn.Module) -> nn.Module:
        """The engine."""
        return self.engine

    def announce(self, model: nn.Module, last: bool) -> None:
        """The engine reduces what stage 1 has kept, and counts a step, in the last one."""
        self.engine.set_gradient_accumulation_boundary(last)

    @property
    def parts(self) -> int:
        """DeepSpeed averages gradients over ranks: their sum is the mean of that many times as much."""
        return dist.get_world_size()

    def gradients(self) -> list[Tensor]:
        """This rank's part of the accumulated gradients, after the last backward."""
        if self.settings.offload != "none":
            return [part.grad for part in self.flat]
        return [gradient for group in self.zero.averaged_gradients.values() for gradient in group]

    def step(self, lr: float, skip: Tensor | None = None) -> StepResult:
        """DeepSpeed gives each flat part its gradient, calls back, and gathers the weights anew."""
        self._lr, self._skip = lr, skip
        self.engine.step()
        return StepResult(0, 0, skip)

    def _update(self, part: Tensor) -> None:
        i = next(i for i, mine in enumerate(self.flat) if mine is part)
        skip = None if self._skip is None else self._skip.to(part.device)
        self.optimizers[i].step(self._lr, self.settings.weight_decay, skip)

    def zero_grad(self) -> None:
        """DeepSpeed has dropped them."""

    # state

    def describe(self) -> dict[str, str]:
        """The same words as FSDP2's."""
        return {n: f"adamw, {'' if n in self.decayed else 'not '}decayed" for n in self.parameters}

    def shared_parameters(self) -> dict[str, Tensor]:
        """The masters."""
        return self.masters()

    def masters(self) -> dict[str, Tensor]:
        """Flat fp32 parts; the weights that the model computes with follow them."""
        return {name: self._pieces(name, self.flat) for name in self.parameters}

    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """The optimizer's state under the names that it has with FSDP2."""
        states = [optimizer.state() for optimizer in self.optimizers]
        moments = {key: [state[f"flat.{key}"] for state in states] for key in ("exp_avg", "exp_avg_sq")}
        found = {}
        for name, (part, *_) in self.places.items():
            for key, flat in moments.items():
                found[f"optimizer.{name}.{key}"] = self._pieces(name, flat)
            found[f"optimizer.{name}.step"] = states[part]["flat.step"]  # one for all of a part
        return found

    def loaded(self) -> None:
        """The masters were."""
        self.adopt()

    @torch.no_grad()
    def adopt(self) -> None:
        """The weights from the masters, which were set from outside."""
        zero = self.zero
        if self.settings.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for part in range(len(self.flat)):
            zero._reassign_or_swap_out_partitioned_parameters(part)
        if zero.persistent_parameters:  # small ones stay gathered
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()


@torch.no_grad()
def materialise(model: nn.Module, settings: ZeROSettings, device: torch.device) -> None:
    """The meta model's weights on the device in the compute type, zeros; its buffers in their own.

    In stage 3 one weight at a time, of which each rank keeps its part.
    """
    with _quiet(device) as deepspeed:
        init = None
        if settings.stage == 3:
            # It wraps a module; of an empty one only the method that cuts a parameter is of use.
            init = deepspeed.zero.Init(
                module=nn.Module(), dtype=settings.compute_dtype, config_dict_or_path=settings.config()
            )
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                values = torch.zeros(parameter.shape, dtype=settings.compute_dtype, device=device)
                made = nn.Parameter(values, requires_grad=parameter.requires_grad)
                if init is not None:
                    init._convert_to_zero_parameters([made])
                setattr(module, name, made)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device=device))


def _gather_by_block(model: nn.Module, blocks: Iterable[nn.Module], deepspeed: Any) -> None:
    """All weights of a block with the block, and the rest with the model: what a module uses of another one is there,
    in a recompute within backward too."""
    inside = set()
    for block in blocks:
        for parameter in block.parameters():
            inside.add(id(parameter))
            deepspeed.zero.register_external_parameter(block, parameter)
    for parameter in model.parameters():
        if id(parameter) not in inside:
            deepspeed.zero.register_external_parameter(model, parameter)


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[Any]:
    """DeepSpeed, which says nothing but errors meanwhile and warnings later."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed's calls, for good
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
    import deepspeed

    # Collectives of inference on CPUs, which would be compiled for minutes.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.ERROR)
    deepspeed.init_distributed()
    try:
        yield deepspeed
    finally:
        log.setLevel(logging.WARNING)
