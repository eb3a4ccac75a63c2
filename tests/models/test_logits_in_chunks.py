"""The logits of a whole micro-batch never exist at once: what forward and backward allocate, operation by operation."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepline.kernels import cross_entropy
from stepline.kernels.cross_entropy import linear_cross_entropy
from stepline.models.config import ModelConfig
from stepline.models.transformer import Transformer

BATCH, SEQ, HIDDEN, VOCAB, CHUNK = 2, 192, 16, 640, 128


class Allocations(TorchDispatchMode):
    """Elements of the largest storage behind any result, those of backward too, and of the largest tensor kept for
    it."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.kept = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, held)
        return result

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept = max(self.kept, tensor.numel())
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)


def chunked(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets, chunk=CHUNK).nll


def plain(hidden, weight, targets):
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("loss", "tokens"), [(chunked, CHUNK), (plain, BATCH * SEQ)])
def test_the_largest_tensor_of_a_loss(loss, tokens, dtype):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, SEQ, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (BATCH, SEQ), generator=draw)
    with Allocations() as seen:
        nll = loss(hidden, weight, targets)
        torch.autograd.backward([nll])
    assert seen.largest == tokens * VOCAB
    kept = BATCH * SEQ * VOCAB if loss is plain else VOCAB * HIDDEN  # the weight's gradient
    assert seen.kept == kept
    assert hidden.grad.abs().max() > 0
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize(("logits_at_once", "tokens"), [(CHUNK * VOCAB, CHUNK), (2**21, BATCH * SEQ)])
def test_the_largest_tensor_of_a_model(monkeypatch, logits_at_once, tokens):
    """It takes as many tokens at a time as the device's limit lets it: all of this micro-batch where they are few."""
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", logits_at_once)
    config = ModelConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=1, num_heads=1, ffn_size=24)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens_in = torch.randint(VOCAB, (BATCH, SEQ))
    with Allocations() as seen:
        model(tokens_in, tokens_in).nll.backward()
    assert seen.largest == tokens * VOCAB
