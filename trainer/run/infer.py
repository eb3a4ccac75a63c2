"""A trained model in one process: loaded from a run, evaluated, sampled from."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import read_run_config
from stepline.trainer.data.dataset import load_meta
from stepline.trainer.data.loader import ValidationLoader
from stepline.trainer.data.tokenizer import Tokenizer, load_tokenizer
from stepline.trainer.errors import UserError
from stepline.trainer.run.build import build_model
from stepline.trainer.run.evaluate import evaluate
from stepline.trainer.run.manifest import find_checkpoint, read_state, run_of
from stepline.trainer.run.sparsity import Sparsity
from stepline.trainer.run.state import load_weights


def load_run(path: Path) -> tuple[Transformer, Config, Path]:
    """Model in evaluation mode, config and checkpoint of a run or of one of its checkpoints; fp32, one device."""
    checkpoint = find_checkpoint(path)
    config = read_run_config(run_of(checkpoint))
    config.run.compile, config.run.recompute = False, "none"
    if config.precision.compute in ("bf16", "auto"):
        config.precision.compute = "fp32"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, device, mesh=None)
    load_weights(model, checkpoint)
    Sparsity(config, model).begin(read_state(checkpoint)["step"] - 1, watched=False)
    return model.eval(), config, checkpoint


def evaluate_run(path: Path, data: Path, split: str = "val") -> dict[str, float]:
    """Loss and bits per byte of a run on one split of a prepared data folder."""
    model, config, checkpoint = load_run(path)
    meta = load_meta(data)
    if meta.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer of {data} has {meta.vocab_size} tokens, the model {config.model.vocab_size}; "
            "evaluate on data prepared with the run's tokenizer"
        )
    loader = ValidationLoader(
        data,
        split,
        seq_len=config.data.seq_len,
        micro_batch=max(1, 8192 // config.data.seq_len),
        rank=0,
        world_size=1,
        confine_attention=config.data.confine_attention,
    )
    values = evaluate(model, loader, next(model.parameters()).device)
    return {"checkpoint": str(checkpoint), **values}


def run_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run's data."""
    return load_tokenizer(load_meta(config.data.folders()[0].path).tokenizer_path)


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt: list[int],
    *,
    max_tokens: int,
    context: int,
    eod_id: int,
    vocab_size: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Yields tokens that follow `prompt` until end-of-document or max_tokens.

    temperature 0 takes the likeliest token; otherwise the smallest set of tokens with probability >= top_p is
    drawn from. The model sees the last `context` tokens; only ids below `vocab_size` are drawn.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        logits = model(window)[0, -1, :vocab_size].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True)
            # A token stays while the mass before it is below top_p; the first one always does.
            probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
            token = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        if token == eod_id:
            return
        tokens.append(token)
        yield token


def _check_sampling(*, temperature: float = 0, top_p: float = 1, seed: int = 0, **_: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature is {temperature:g}; it must be a finite number of at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p:g}; it must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; it must be a whole number of at least 0 and below 2**63")


def generate_text(path: Path, prompt: str, **options: float) -> Iterator[str]:
    """Yields the prompt, then its continuation as text, piece by piece; options: those of `sample`."""
    _check_sampling(**options)
    model, config, _ = load_run(path)
    tokenizer = run_tokenizer(config)
    # A text begins where another ends: end-of-document is what the model saw before every document.
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt)]
    said, new = "", []
    yield prompt
    stream = sample(
        model,
        ids,
        context=config.data.seq_len,
        eod_id=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        **options,
    )
    for token in stream:
        new.append(token)
        text = tokenizer.decode(new)
        # A character may need several byte tokens: wait until it is whole, and leave out bytes that become none.
        if not text.endswith("\ufffd"):
            text = text.replace("\ufffd", "")
            yield text[len(said) :]
            said = text
