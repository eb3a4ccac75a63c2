"""A trained model continues a text, in one process."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from stepline.kernels.sparse24 import sparse_weight
from stepline.models.cache import KVCache
from stepline.models.sparse_linear import mode_of, sparse_weights
from stepline.models.transformer import Transformer
from stepline.trainer.errors import UserError
from stepline.trainer.run.infer import ALONE, device_for, load_run, must_fit, run_tokenizer

CONTEXT_OF_TEXT = 8
"""Tokens of the prompt before which new ones are decoded."""
READ_AT_ONCE = 512
"""Tokens of a prompt whose logits exist at once."""


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: list[int],
    *,
    max_tokens: int,
    context: int,
    eod_id: int,
    vocab_size: int,
    confined: bool = False,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Yields tokens that follow `prompt`, which is not empty, until end-of-document or max_tokens.

    temperature 0 takes the likeliest token; otherwise the smallest set of tokens with probability >= top_p is
    drawn from; only ids below `vocab_size` are. Keys and values of what was read are kept. Of a longer prompt the last
    `context` tokens are read; once there are as many, the last half of them is read anew, and so on.
    confined: the model has never seen beyond the beginning of a document.
    """
    weight = model.embed.weight
    cache = KVCache(model.config, context, device=weight.device, dtype=weight.dtype)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    new = prompt[-context:]
    if confined and eod_id in new[:-1]:
        new = new[len(new) - new[:-1][::-1].index(eod_id) - 1 :]
    read: list[int] = []
    for _ in range(max_tokens):
        if confined and read == [eod_id]:
            read, cache.length = [], 0
        elif len(read) + len(new) > context:
            read, new, cache.length = [], [*read, *new][-max(1, context // 2) :], 0
        for part in torch.tensor([new], device=weight.device).split(READ_AT_ONCE, dim=1):
            logits = model(part, cache=cache)[0, -1, :vocab_size]
        read += new
        token = draw(logits.float().cpu(), temperature, top_p, generator)
        if token == eod_id:
            return
        yield token
        new = [token]


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token by its logits `[vocab]`; arguments as in `sample`. Raises UserError where a logit is no number."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, or the run diverged")
    if temperature == 0:
        return int(logits.argmax())
    # the largest is 0 before it is divided, as of a tiny temperature the quotient has no bound; below 1e-30 it is none
    scaled = (logits - logits.max()) / max(temperature, 1e-30)
    probabilities, order = torch.softmax(scaled, -1).sort(descending=True)
    # A token stays while the mass before it is below top_p; the first one always does.
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def settle(model: Transformer) -> None:
    """Puts 2:4 sparse weights, as the forward makes them, in the place of their dense masters."""
    mode = mode_of(model)
    for _, weight, beta in sparse_weights(model) if mode.sparse else ():
        weight.copy_(sparse_weight(weight, beta))
    mode.sparse = False


def check_sampling(*, temperature: float = 0, top_p: float = 1, seed: int = 0, **_: float) -> None:
    """Raises UserError for values outside of their ranges."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature is {temperature:g}; it must be a finite number of at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p is {top_p:g}; it must be above 0 and at most 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}; it must be a whole number of at least 0 and below 2**63")


def generate_text(
    path: Path, prompt: str, asked: str = "auto", *, max_tokens: int = 128, **options: float
) -> Iterator[str]:
    """Yields the prompt, then its continuation as text, piece by piece; asked: the kind of device, or auto; options:
    those of `sample`.

    Where the run's window may become too short, standard error says so beforehand. Raises UserError.
    """
    check_sampling(**options)
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8; give it as UTF-8 text") from None
    device, notes = device_for(asked, ALONE)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    with must_fit(device):
        model, config, _ = load_run(path, device, fp8=False)
        settle(model)
    tokenizer, context = run_tokenizer(config), config.data.seq_len
    # A text begins where another ends: end-of-document is what the model saw before every document.
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt)]
    if len(ids) + max_tokens > context:
        longer = f"of the prompt the last {context} are read, and " if len(ids) > context else ""
        print(
            f"note: prompt and text may be {len(ids) + max_tokens} tokens, and the model was trained on {context} "
            f"(data.seq_len): {longer}when these are full the last {max(1, context // 2)} of them are read anew",
            file=sys.stderr,
        )
    yield prompt
    stream = sample(
        model,
        ids,
        max_tokens=max_tokens,
        context=context,
        eod_id=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        confined=config.data.confine_attention,
        **options,
    )
    # Behind the prompt's end: alone, some tokenizers would drop the text's first space.
    before = ids[1:][-CONTEXT_OF_TEXT:]
    head = len(tokenizer.decode(before))
    said, new = "", []
    with must_fit(device):
        for token in stream:
            new.append(token)
            text = tokenizer.decode([*before, *new])[head:]
            # A character may need several byte tokens: wait until it is whole, and leave out bytes that become none.
            if not text.endswith("\ufffd"):
                text = text.replace("\ufffd", "")
                yield text[len(said) :]
                said = text
