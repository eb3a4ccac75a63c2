"""A trained model, loaded from a run or one of its checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from stepline.comm.mesh import World
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import read_run_config
from stepline.trainer.data.dataset import Meta, load_meta
from stepline.trainer.data.tokenizer import Tokenizer, load_tokenizer
from stepline.trainer.errors import UserError
from stepline.trainer.run.build import build_model
from stepline.trainer.run.devices import pick_device
from stepline.trainer.run.folder import TOKENIZER
from stepline.trainer.run.manifest import find_checkpoint, read_state, run_of
from stepline.trainer.run.sparsity import Sparsity
from stepline.trainer.run.state import load_weights

ALONE = World(0, 1, 0, 1)


def device_for(asked: str, world: World) -> tuple[torch.device, list[str]]:
    """The device of --device, auto, cpu or cuda, and what was done instead of what one would expect; raises
    UserError."""
    if asked not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {asked}; it must be auto, cpu or cuda")
    return pick_device(asked, world, "--device ")


@contextlib.contextmanager
def must_fit(device: torch.device, instead: str = "use --device cpu") -> Iterator[None]:
    """Raises UserError where the device has not the memory for what is done within."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device} has not enough free memory for this model; {instead}") from error


def load_run(
    path: Path,
    device: torch.device | None = None,
    mesh: DeviceMesh | None = None,
    *,
    fp8: bool = True,
    checked: bool = False,
) -> tuple[Transformer, Config, Path]:
    """Model in evaluation mode, config and checkpoint of a run or of one of its checkpoints; fp32.

    device: default, the first GPU where there is one. mesh: over whose ranks FSDP2 shards the model; default: it is
    whole on the device. fp8: products in FP8 where the run has them; their scales are those of whole batches.
    checked: the checkpoint's files are known to be as they were written. Raises UserError.
    """
    checkpoint = find_checkpoint(path, checksums=not checked)
    config = read_run_config(run_of(checkpoint))
    config.run.compile, config.run.recompute = False, "none"
    # How ranks shared the training is nothing to whom its model is given.
    config.parallel.backend, config.parallel.sync, config.parallel.experts = "fsdp", "all_reduce", 1
    if config.precision.compute in ("bf16", "auto"):
        config.precision.compute = "fp32"
    config.precision.fp8 &= fp8
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, device, mesh, initial=False)
    load_weights(model, checkpoint, checksums=False)
    Sparsity(config, model).begin(read_state(checkpoint)["step"] - 1, watched=False)
    return model.eval(), config, checkpoint


def tokenizer_path(config: Config) -> Path:
    """Where the tokenizer of a run is: in its folder, else with its data; raises UserError."""
    if (kept := config.run.folder / TOKENIZER).is_dir():
        return kept
    folders = config.data.folders()
    if not folders:
        raise UserError("the run has no data and so no tokenizer; set data.path in its config.yaml")
    try:
        return load_meta(folders[0].path).tokenizer_path
    except UserError as error:
        raise UserError(f"the run's tokenizer lies with its data, and {error}") from None


def other_tokenizer(config: Config, meta: Meta) -> list[str]:
    """A note where the tokens of the data are not those of the run whose weights this one starts from."""
    origin = read_run_config(run_of(find_checkpoint(config.run.init_from, checksums=False)))
    try:
        same = run_tokenizer(origin).sha256 == meta.tokenizer_sha256
    except UserError:  # nothing is known of it
        return []
    if same:
        return []
    return [
        f"{meta.path} was prepared with another tokenizer than that of run.init_from {config.run.init_from}, whose "
        "embeddings mean other tokens"
    ]


def run_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run; raises UserError where there is none."""
    return load_tokenizer(tokenizer_path(config))
