"""How replicas agree: one interface for all-reduce, DeMo, DiLoCo and random-k."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.fsdp import all_reduce_on_last, local
from stepline.comm.replicas import first_difference, gather_replicas
from stepline.comm.traffic import ring_bytes


class Optimizer(Protocol):
    """What updates parameters from their gradients, given `lr` and, on the device, whether to skip."""

    def step(self, lr: float, weight_decay: float, skip: Tensor | None = None) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def describe(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class StepResult:
    """What one step sent over the links between replicas, on this rank."""

    bytes_sent: int
    bytes_received: int
    skipped: Tensor | None
    """0-dim, on the device: 1 where nothing was updated."""
    jumped: bool = False
    """Whether the parameters moved otherwise than by a step's gradients, on all ranks alike: the losses until now say
    nothing of those to come."""


class Synchronizer(ABC):
    """Updates all parameters once for each global batch, and keeps the replicas together.

    named_parameters: by name; plain tensors, or DTensors sharded over the ranks of one replica.
    group: the ranks that hold the same shard in each replica; None where there is one replica.
    """

    averages_replicas = True
    """Whether a gradient is the mean over one replica's tokens, which `step` averages; otherwise it is, when `step`
    is called, that of the global batch already."""

    left_behind: tuple[str, ...] = ()
    """Parts of the names of states that belong to the replicas that were, when their number changes."""
    optional: tuple[str, ...] = ()
    """Ends of the names of states that a checkpoint may lack, with nothing lost."""

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self.parameters = dict(named_parameters)
        self.group = group
        self.replicas = 1 if group is None else dist.get_world_size(group)
        self.replica = 0 if group is None else dist.get_rank(group)

    @abstractmethod
    def step(self, lr: float, skip: Tensor | None = None) -> StepResult:
        """One update from the gradients of an accumulated step.

        They are normalised by the global number of valid tokens (over the number of replicas where
        `averages_replicas`) and clipped. skip: 0-dim, alike on all ranks; where it is 1 nothing changes.
        """

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What updates each parameter, by its name: every parameter is there once."""

    @abstractmethod
    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """All live state tensors, which a checkpoint saves and loads in place.

        Those that differ between replicas stand under `replica{replica}.`; a packet in flight is completed first.
        """

    def to_load(self, replicas_before: int) -> dict[str, Tensor]:
        """What of `state_dict` to load from a checkpoint of that many replicas, by the names that it has there.

        On another number each continues with a replica that was there, but for what is left behind.
        """
        if replicas_before == self.replicas:
            return self.state_dict(self.replica)
        state = self.state_dict(self.replica % replicas_before)
        return {n: t for n, t in state.items() if not any(part in n for part in self.left_behind)}

    def resized(self, replicas_before: int, load: Callable[[dict[str, Tensor]], None]) -> str | None:
        """After a checkpoint of another number of replicas was loaded: says what begins anew.

        load: reads more of that checkpoint in place, by the names that it has there; a collective of all ranks.
        """
        return None

    def adopt(self) -> None:  # noqa: B027 (most have nothing to note)
        """Takes note of parameters that were set from outside."""

    def masters(self) -> dict[str, Tensor]:
        """What to set from outside, by parameter name, before `adopt`."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def loaded(self) -> None:  # noqa: B027
        """After a checkpoint was loaded into the parameters and the state."""

    def through(self, model: nn.Module) -> nn.Module:
        """What a training forward of `model` is called on."""
        return model

    def announce(self, model: nn.Module, last: bool) -> None:
        """Before the forward of a micro-batch on what `through` gives: whether it is the step's last one."""
        all_reduce_on_last(model, last)

    def midway(self) -> None:  # noqa: B027
        """Between a forward and its backward, once in a step and at the same place on all ranks: the time to pass on
        what has arrived."""

    @property
    def parts(self) -> int:
        """Into how many parts the sum over a global batch is left by backward: their mean is the gradient."""
        return self.replicas if self.averages_replicas else 1

    def gradients(self) -> list[Tensor]:
        """All accumulated gradients, this rank's parts of them at least."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def shared_parameters(self) -> dict[str, Tensor]:
        """The model that the replicas agree on, by parameter name."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    @contextlib.contextmanager
    def shared_model(self) -> Iterator[None]:
        """Within it the parameters hold the model that the replicas agree on."""
        yield

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def first_difference(self) -> str | None:
        """The parameter in which the replicas are not bit-identical; a collective of all ranks."""
        return first_difference(self.shared_parameters(), self.group) if self.replicas > 1 else None

    def agree(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the replicas' losses, largest of their norms), 0-dim, the same on all; NaN where one of them is."""
        losses, norms = gather_replicas(torch.stack([loss, norm.to(loss.dtype)]), self.group).unbind(dim=1)
        return losses.sum(), norms.amax()

    def gradient(self, name: str) -> Tensor:
        """This rank's part of a gradient, zeros where the parameter had none."""
        parameter = self.parameters[name]
        return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)

    def set_gradient(self, name: str, mean: Tensor) -> None:
        """Puts what all replicas agreed on in the place of this rank's part of a gradient."""
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter.data)
        local(parameter.grad).copy_(mean.view_as(local(parameter.grad)))


class AllReduce(Synchronizer):
    """The ordinary optimizer: HSDP has summed the gradients over the replicas in backward."""

    averages_replicas = False

    def __init__(
        self, named_parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None,
        optimizer: Optimizer, weight_decay: float, reduce_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__(named_parameters, group)
        self.optimizer, self.weight_decay = optimizer, weight_decay
        size = sum(local(p).numel() for p in self.parameters.values()) * reduce_dtype.itemsize
        self.num_bytes = ring_bytes(size, self.replicas)

    def step(self, lr: float, skip: Tensor | None = None) -> StepResult:
        """The optimizer's update."""
        self.optimizer.step(lr, self.weight_decay, skip)
        return StepResult(self.num_bytes, self.num_bytes, skip)

    def describe(self) -> dict[str, str]:
        """What the optimizer says."""
        return self.optimizer.describe()

    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """The optimizer's state, alike on all replicas."""
        return {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
