"""Makes this process of torch's CPU build, which has loaded guard.cpp before torch, believe in one Hopper GPU. Its
tensors are fake: they have a shape, a type and a device, and no values."""

import contextlib
import traceback
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import fake_impls

WAITS: list[str] = []
"""Where the host has asked the device for a number since this was emptied."""


class Stream:
    """Takes any call that a stream or an event takes."""

    device, device_index, device_type, stream_id, cuda_stream = torch.device("cuda", 0), 0, 1, 0, 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str):
        return lambda *_: Stream() if name == "record_event" else None


def pretend() -> None:
    """Before a tensor is made."""
    stream = Stream()
    for name, value in {
        "current_stream": stream, "default_stream": stream, "stream": contextlib.nullcontext(), "set_stream": None,
        "current_device": 0, "set_device": None, "device_count": 1, "synchronize": None, "is_initialized": True,
        "get_device_capability": (9, 0), "get_device_name": "NVIDIA H200", "_lazy_init": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.Stream = torch.cuda.Event = torch.Event = Stream
    torch.Tensor.record_stream = lambda *_: None
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.equal = lambda *_: True  # of states of generators
    nn.Module.to = lambda module, *_, **__: module
    nn.Module.to_empty = _to_empty
    fake_impls.op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = _item


def _item(_mode: object, _operator: object, tensor: torch.Tensor) -> float | int | bool:
    if tensor.is_cuda:
        own = [f for f in traceback.extract_stack() if "/comm/" in f.filename or "/trainer/" in f.filename]
        WAITS.append(f"{Path(own[-1].filename).name} {own[-1].name}")
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.dtype.is_floating_point else 0


def _to_empty(module: nn.Module, *, device: torch.device) -> nn.Module:
    """Torch swaps parameters for fake ones only where nothing else knows them."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                empty.__dict__.update(parameter.__dict__)
                part._parameters[name] = empty
        for name, buffer in list(part._buffers.items()):
            part._buffers[name] = torch.empty_like(buffer, device=device)
    for part in module.modules():
        state = part._get_fsdp_state() if hasattr(part, "_get_fsdp_state") else None
        for group in [state._fsdp_param_group] if state is not None and state._fsdp_param_group else []:
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()
    return module
