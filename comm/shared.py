"""The model that the replicas agree on, kept beside parameters that go their own way between exchanges."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from stepline.comm.fsdp import local


class SharedModel:
    """A copy of `parameters`, by name, in tensors of their kind."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = {n: p.data.clone() for n, p in parameters.items()}

    @torch.no_grad()
    def take(self) -> None:
        """The parameters as they are become the shared model."""
        for name, parameter in self.parameters.items():
            local(self.values[name]).copy_(local(parameter.data))

    @torch.no_grad()
    def give(self) -> None:
        """The parameters become the shared model."""
        for name, parameter in self.parameters.items():
            local(parameter.data).copy_(local(self.values[name]))

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """The parameters are the shared model within, and what they were afterwards."""
        own: dict[str, Tensor] = {n: local(p.data).clone() for n, p in self.parameters.items()}
        self.give()
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                local(parameter.data).copy_(own[name])
