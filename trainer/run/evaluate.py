"""Loss and bits per byte on held-out text, over all ranks."""

import math
from collections.abc import Callable

import torch
from torch import nn

from stepline.trainer.data.loader import ValidationLoader
from stepline.trainer.run.step import all_sum, to_device


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ValidationLoader,
    device: torch.device,
    interrupted: Callable[[], int] = lambda: 0,
) -> dict[str, float] | None:
    """`val_loss` (nats per token) and `val_bits_per_byte`: the target tokens' loss in bits, end-of-document
    tokens included, over the UTF-8 bytes of the documents' text.

    Every rank runs the same number of micro-batches (the loader pads with targets of -100), so that no
    collective of FSDP waits for a rank that has no data left. None as soon as `interrupted` says so, which is asked
    after each micro-batch and answers alike on all ranks.
    """
    model.eval()
    sums = torch.zeros(2, device=device, dtype=torch.float64)
    for batch in loader:
        inputs, targets = to_device(batch.inputs, device), to_device(batch.targets, device)
        doc_ids = to_device(batch.doc_ids, device)
        for i in range(len(inputs)):
            result = model(inputs[i], targets[i], None if doc_ids is None else doc_ids[i])
            sums += torch.stack([result.nll.double(), (targets[i] != -100).sum().double()])
        if interrupted():
            model.train()
            return None
    model.train()
    nll, tokens = all_sum(sums).tolist()
    return {"val_loss": nll / tokens, "val_bits_per_byte": nll / math.log(2) / loader.num_bytes}
