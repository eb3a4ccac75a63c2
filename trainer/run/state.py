"""What a run is at a step: everything that a checkpoint holds."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from stepline.comm.replicas import first_difference
from stepline.comm.synchronizer import Synchronizer
from stepline.comm.traffic import Traffic
from stepline.models.canon import is_canon
from stepline.models.sparse_linear import sparse_weights
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.data.loader import TrainLoader
from stepline.trainer.hf.adapters import holders, is_new, pretrained, start_adapters
from stepline.trainer.optim.guard import Guard
from stepline.trainer.run.balance import ExpertBalance
from stepline.trainer.run.build import build_model
from stepline.trainer.run.manifest import find_checkpoint, read_state
from stepline.trainer.run.sparsity import Sparsity, set_betas
from stepline.trainer.run.stored import load_tensors, misfit, stored_names, stored_shapes
from stepline.trainer.run.synchronize import build_synchronizer
from stepline.trainer.run.zero import build_zero

log = logging.getLogger("stepline")
EMPTY: Mapping[str, torch.Tensor] = MappingProxyType({})


LEAST_SPREAD = 16
"""Steps that tell how much losses and norms spread."""


def least_history(config: Config) -> int:
    """Steps that the guard sees before it judges: half of its window, or of a turn of DiLoCo's, whose outer steps begin
    its history anew."""
    half, parallel = config.optimizer.guard.window // 2, config.parallel
    turn = parallel.diloco.every // parallel.diloco.fragments // 2 if parallel.sync == "diloco" else half
    return min(half, turn) if turn >= LEAST_SPREAD else half


@dataclass(kw_only=True)
class Trainee:
    """What a step updates, on one rank."""

    config: Config
    device: torch.device
    mesh: DeviceMesh | None
    model: Transformer
    synchronizer: Synchronizer
    guard: Guard
    balance: ExpertBalance
    sparsity: Sparsity
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def build(cls, config: Config, device: torch.device, mesh: DeviceMesh | None, **more: Any) -> Self:
        """Model, synchroniser with the optimizer, and guard, before the first step; mesh None: one rank alone."""
        model = build_model(config, device, mesh)
        if mesh is not None and config.parallel.backend == "zero":
            synchronizer = build_zero(config, model, device)
        else:
            synchronizer = build_synchronizer(config, dict(model.named_parameters()), mesh)
        settings = config.optimizer.guard
        return cls(
            config=config, device=device, mesh=mesh, model=model, synchronizer=synchronizer,
            balance=ExpertBalance(model),
            sparsity=Sparsity(config, model),
            guard=Guard(settings.window, settings.sigma, min_history=least_history(config), device=device), **more,
        )  # fmt: skip

    def first_difference(self) -> str | None:
        """The parameter, trained or frozen, in which the replicas are not bit-identical; a collective of all ranks."""
        sync = self.synchronizer
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        if (name := sync.first_difference()) is None and frozen and sync.replicas > 1:
            return first_difference(frozen, sync.group)
        return name


@dataclass(kw_only=True)
class TrainState(Trainee):
    """A trainee with its data cursor and counters: a whole run at a step."""

    loader: TrainLoader
    fingerprints: list[str]
    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Training tokens with loss that were consumed."""
    train_seconds: float = 0.0
    """What these steps took, over all attempts, without starts, validations and saves."""
    run_id: str = ""
    """Of wandb; known to rank 0."""

    @classmethod
    def create(
        cls, config: Config, device: torch.device, mesh: DeviceMesh, rank: int, fingerprints: list[str]
    ) -> "TrainState":
        """The state before the first step."""
        loader = TrainLoader(
            [(source.path, source.weight) for source in config.data.folders()],
            seq_len=config.data.seq_len,
            batch_windows=config.budget.batch_tokens // config.data.seq_len,
            micro_batch=config.parallel.micro_batch,
            rank=rank,
            world_size=mesh.size(),
            seed=config.run.seed,
            confine_attention=config.data.confine_attention,
            prefetch=config.data.prefetch,
        )
        return cls.build(config, device, mesh, loader=loader, fingerprints=fingerprints)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live tensors of a checkpoint by name; loading writes into them."""
        return {
            **self._shared_tensors(),
            **self.synchronizer.state_dict(self.synchronizer.replica),
            **self._random_states(),
        }

    def _shared_tensors(self) -> dict[str, torch.Tensor]:
        """Alike on all replicas, whatever the synchroniser."""
        model = {f"model.{name}": p for name, p in self.synchronizer.shared_parameters().items()}
        model |= {f"model.{name}": buffer for name, buffer in saved_buffers(self.model).items()}
        return model | {f"guard.{name}": tensor for name, tensor in self.guard.state().items()}

    def _random_states(self) -> dict[str, torch.Tensor]:
        """torch's generators of this rank; every rank's are in the checkpoint, under its own names."""
        rank = dist.get_rank()
        states = {f"rank{rank}.random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states[f"rank{rank}.random.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def counters(self) -> dict[str, Any]:
        """The rest of a checkpoint, plain values."""
        return {
            "step": self.step,
            "replicas": self.synchronizer.replicas,
            "tokens": self.tokens,
            "train_seconds": self.train_seconds,
            "loader": self.loader.state_dict(),
            "fingerprints": self.fingerprints,
            "run_id": self.run_id,
        }

    def load(self, checkpoint: Path, group: dist.ProcessGroup) -> dict[str, Any]:
        """Continues where `checkpoint` stands, whatever layout of ranks wrote it; returns its counters.

        group: of gloo, for the planning. Generators of ranks or devices that the checkpoint does not know start anew
        from the run's seed, the rank and the step.
        """
        counters = read_state(checkpoint)
        known, sync, random = stored_names(checkpoint), self.synchronizer, self._random_states()
        replicas = counters.get("replicas", sync.replicas)
        tensors = self._shared_tensors() | sync.to_load(replicas)
        # What belongs to one replica or rank may be missing after the layout has changed.
        own = {n: t for n, t in (tensors | random).items() if n.startswith(("replica", "rank"))}
        load = functools.partial(load_tensors, checkpoint, group=group)
        load({n: t for n, t in (tensors | random).items() if n not in own or n in known})
        sync.loaded()
        if replicas != sync.replicas and (sentence := sync.resized(replicas, load)):
            log.warning("%s", sentence)
            self.guard.forget()  # a replica's norm is one of another share of the batch, its model perhaps another
        elif anew := sorted(
            n for n in own if n not in known | random.keys() and not n.endswith(sync.optional)
        ):
            log.warning("%s and %d more begin anew: the ranks' layout has changed", anew[0], len(anew) - 1)
        self.step, self.tokens = counters["step"], counters["tokens"]
        self.train_seconds = counters.get("train_seconds", 0.0)  # older checkpoints do not say
        self.loader.load_state_dict(counters["loader"])
        if not random.keys() <= known:
            torch.manual_seed(hash((self.config.run.seed, dist.get_rank(), self.step)))
            return counters
        for name, state in random.items():
            if name.endswith("cuda"):
                torch.cuda.set_rng_state(state, self.device)
            else:
                torch.set_rng_state(state)
        return counters


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters under their names in a checkpoint."""
    tensors = {name: parameter.data for name, parameter in model.named_parameters()} | saved_buffers(model)
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are part of the model: the experts' balance biases, the scales of sparse weights."""
    state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def check_weights(config: Config) -> None:
    """Raises UserError, before anything starts, where what run.init_from names has a parameter in another shape."""
    checkpoint = find_checkpoint(
        config.run.init_from, checksums=False
    )  # the ranks share that once they have met
    with torch.device("meta"):
        model = Transformer(config.model)
    shapes, anew = stored_shapes(checkpoint), pretrained(model, checkpoint)
    for name, parameter in model.named_parameters():
        held = shapes.get(f"model.{name}", tuple(parameter.shape))
        if held != tuple(parameter.shape) and not (anew and is_new(name)):
            raise misfit(checkpoint, f"{name} is {held} there and {tuple(parameter.shape)} here")
    own = {f"model.{name}" for name, _ in model.named_parameters()}
    dropped = [name for name in shapes if is_canon(name) and name not in own]
    if dropped and not anew:
        raise misfit(
            checkpoint, f"it has {dropped[0].removeprefix('model.')}, which model.canon here leaves out"
        )


def load_weights(
    model: nn.Module,
    path: Path,
    masters: Mapping[str, torch.Tensor] = EMPTY,
    *,
    checksums: bool = True,
    of_base: bool = True,
) -> Path:
    """Fills the model from another run or checkpoint; returns the checkpoint. Raises UserError.

    masters: what holds the values of parameters, by name, where they are not in the parameters themselves. checksums:
    whether all files are read and compared first, as `find_checkpoint` does; of_base: those of the checkpoints that it
    leaves weights to.

    The weights of a dense run may become sparse: their betas are computed then. A model with adapters may start from a
    checkpoint of standard blocks (hf/adapters.py). A synchroniser over the model must be told (`adopt`).
    """
    checkpoint, tensors = find_checkpoint(path, checksums=checksums), model_tensors(model)
    tensors |= {f"model.{name}": tensor for name, tensor in masters.items()}
    held = holders(checkpoint, tensors, checksums=of_base)
    known = set().union(*(stored_names(holder) for holder in {checkpoint, *held}))
    betas = {id(beta) for _, _, beta in sparse_weights(model)}
    without_beta = {name for name, tensor in tensors.items() if id(tensor) in betas and name not in known}
    without_canon = {name for name in tensors if is_canon(name) and name not in known}
    for name in without_beta | without_canon:
        del tensors[name]
    if pretrained(model, checkpoint):
        start_adapters(model, checkpoint, tensors)
    else:
        for holder, names in held.items():
            if own := {name: tensors[name] for name in names if name in tensors}:
                load_tensors(holder, own)
    if without_canon:
        log.info("%s has no Canon layers like these: they start as ones that do nothing", checkpoint)
    if not betas and any(name.endswith("beta") and name.startswith("model.") for name in known):
        log.info(
            "%s has 2:4 sparse layers: this run starts from their dense master weights, which is another model unless "
            "its last steps were dense (sparse.dense_fraction); sparse.mode=s-ste goes on with the sparse one",
            checkpoint,
        )
    if without_beta:
        log.info("%s was dense: the scales of sparse weights are computed from its weights", checkpoint)
        set_betas(model)
    return checkpoint
