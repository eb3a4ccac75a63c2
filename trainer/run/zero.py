"""`parallel.backend: zero`: the model behind DeepSpeed, with Stepline's optimizer and initial values."""

import importlib.util

import torch
from torch import Tensor, nn

from stepline.comm.zero import ZeRO, ZeROSettings, materialise
from stepline.trainer.config import Config
from stepline.trainer.errors import UserError
from stepline.trainer.optim.build import AdamW, decay_groups
from stepline.trainer.plan.zero import reduce_bucket
from stepline.trainer.run.build import initialise
from stepline.trainer.run.precision import compute_dtype, reduce_dtype


def check_installed(config: Config) -> None:
    """Raises UserError where the config asks for DeepSpeed and there is none."""
    if config.parallel.backend == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.backend=zero needs DeepSpeed: run `pip install 'stepline[zero]'`, or set parallel.backend to fsdp"
        )


def build_zero(config: Config, model: nn.Module, device: torch.device) -> ZeRO:
    """Over all ranks; `model` as build_model leaves it for this backend, on the meta device."""
    parallel, optimizer = config.parallel, config.optimizer
    names, decayed = decay_groups(dict(model.named_parameters()))  # by their shapes, which stage 3 hides
    bucket = reduce_bucket(config, sum(p.numel() for p in names.values()))
    settings = ZeROSettings(
        stage=parallel.zero.stage,
        offload=parallel.zero.offload,
        compute_dtype=compute_dtype(config),
        reduce_dtype=reduce_dtype(config),
        weight_decay=optimizer.weight_decay,
        reshard_after_forward=parallel.reshard_after_forward,
        deepspeed=parallel.deepspeed.given() | {"reduce_bucket_size": bucket},
    )
    materialise(model, settings, device)
    parameters = {name: p for name, p in model.named_parameters() if name in names}

    def adamw(flat: Tensor, decays: bool) -> AdamW:
        return AdamW(
            {"flat": flat}, {"flat"} if decays else set(), optimizer.beta1, optimizer.beta2, optimizer.eps
        )

    zero = ZeRO(
        model, parameters, settings, decayed=decayed, blocks=model.layers, device=device, make_optimizer=adamw
    )
    initialise(zero.masters(), config)
    zero.adopt()
    return zero
