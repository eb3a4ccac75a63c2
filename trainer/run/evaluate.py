"""Loss and bits per byte on held-out text, over all ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from stepline.comm.host_copy import to_device
from stepline.trainer.data.held_out import ValidationLoader
from stepline.trainer.run.step import all_sum


@dataclass(frozen=True)
class Score:
    """Sums over held-out text; they add up over several."""

    nll: float
    """Negative log likelihood of the target tokens, end-of-document tokens included, in nats."""
    tokens: int
    """Target tokens."""
    bytes: float
    """UTF-8 bytes of the documents' text."""

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nll + other.nll, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.inf if self.loss > 700 else math.exp(self.loss)

    def row(self) -> dict[str, float]:
        """`val_loss` (nats per token) and `val_bits_per_byte`, as in metrics.jsonl."""
        return {"val_loss": self.loss, "val_bits_per_byte": self.nll / math.log(2) / self.bytes}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ValidationLoader,
    device: torch.device,
    interrupted: Callable[[], int] = lambda: 0,
) -> Score | None:
    """The score of all of the loader's tokens, summed in float64 over micro-batches and ranks.

    Every rank runs the same number of micro-batches (the loader pads with targets of -100), so that no
    collective of FSDP waits for a rank that has no data left. None as soon as `interrupted` says so, which is asked
    after each micro-batch and answers alike on all ranks.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(2, device=device, dtype=torch.float64)
    for batch in loader:
        inputs, targets = to_device(batch.inputs, device), to_device(batch.targets, device)
        doc_ids = to_device(batch.doc_ids, device)
        for i in range(len(inputs)):
            result = model(inputs[i], targets[i], None if doc_ids is None else doc_ids[i])
            sums += torch.stack([result.nll.double(), (targets[i] != -100).sum().double()])
        if interrupted():
            model.train(training)
            return None
    model.train(training)
    nll, tokens = all_sum(sums).tolist()
    return Score(nll, int(tokens), loader.num_bytes)
