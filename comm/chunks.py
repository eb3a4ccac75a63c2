"""A batch's chunks, from what waits to what travels and back into the parameters: DCT, choice, codec, mean.

In torch, by large products over a whole batch; or, where the device has kernels that do it in one pass over the values
(kernels/triton_demo.py, handed in), by those. Both write the same packets and read each other's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from stepline.comm.chunking import SPARSE_INVERSE, Chunking
from stepline.comm.codec import Packing, dequantise, quantise
from stepline.comm.dct import dct, dct_basis, inverse_dct, inverse_dct_of
from stepline.comm.packets import (
    Batch,
    Chosen,
    Quantised,
    contributors_mean,
    largest,
    replicas_mean,
    scattered,
)

NUMBERS = {"fp32": torch.float32, "int8": torch.int8, "sign": torch.uint8}
"""Of codec.quantise, in a fp32 run."""


@dataclass(frozen=True)
class Rule:
    """How a decoded update u moves a parameter: p <- decay p + gain f(u)."""

    decay: float = 1.0
    gain: float = 1.0
    sign: bool = False
    """f: the sign, or nothing."""

    def apply(self, p: Tensor, update: Tensor) -> None:
        """In place."""
        if self.decay != 1.0:
            p.mul_(self.decay)
        p.add_(update.sign() if self.sign else update, alpha=self.gain)


class Chunks:
    """Of `batches`, by the codec; sample: of the dtype and the device.

    kernels: a module like kernels/triton_demo.py, which is used for the shapes that it supports; None: torch alone.
    """

    def __init__(
        self, batches: Sequence[Batch], codec: str, sample: Tensor, kernels: ModuleType | None = None
    ) -> None:
        self.codec, self.dtype = codec, sample.dtype
        self.kernels = kernels if sample.dtype == torch.float32 else None
        sides = {side for b in batches if b.transformed for side in (b.height, b.width)}
        self.basis = {side: dct_basis(side, sample.dtype, sample.device) for side in sides}

    @property
    def packing(self) -> Packing:
        """Of bits, on this device."""
        return (
            Packing() if self.kernels is None else Packing(self.kernels.pack_bits, self.kernels.unpack_bits)
        )

    def encode(self, batch: Batch, tensors: Mapping[str, Tensor], alpha: float = 1.0) -> Quantised:
        """The largest values of all chunks as they travel; `alpha` times what receivers decode leaves the tensors."""
        if self._fused(batch, tensors):
            sent = self._room(batch.chunks, batch.kept, tensors[batch.parts[0].name])
            for part in batch.parts:
                self.kernels.encode(
                    _cube(tensors[part.name], part.chunking), (batch.height, batch.width), part.span, sent, self.codec,
                    self._bases(batch), alpha,
                )  # fmt: skip
            return sent
        chunks = batch.split(tensors)
        if batch.transformed:
            chunks = dct(chunks, *self._bases(batch))
        indices, values = largest(chunks.view(batch.chunks, -1), batch.kept)
        numbers, scale = quantise(values, self.codec)
        for name, own in self._own(batch, (indices, dequantise(numbers, scale, self.dtype))).items():
            tensors[name].sub_(own.view_as(tensors[name]), alpha=alpha)
        return indices, numbers, scale

    def decode(self, batch: Batch, arrived: Chosen, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The replicas' mean `[*parameter]` by name, of indices and values `[replicas, chunks, kept]`.

        like: tensors of the parameters' shapes.
        """
        if self._fused(batch, like):
            updates = {part.name: torch.empty_like(like[part.name]) for part in batch.parts}
            self._land(batch, arrived, updates, lambda _: {"store": True})
            return updates
        return self._decode(batch, _mean(batch, arrived))

    def apply(
        self, batch: Batch, arrived: Chosen, parameters: Mapping[str, Tensor], rule: Callable[[str], Rule]
    ) -> None:
        """Moves the parameters by the replicas' mean, each by its rule."""
        if self._fused(batch, parameters):
            self._land(batch, arrived, parameters, lambda name: vars(rule(name)))
            return
        for name, update in self._decode(batch, _mean(batch, arrived)).items():
            rule(name).apply(parameters[name], update.view_as(parameters[name]))

    def add_mean(self, total: Tensor, batch: Batch, arrived: Chosen) -> None:
        """`total += mean` over the replicas, of chunks `[chunks, elements]` as they were chosen."""
        if total.numel() and self._supports(1, batch.elements, False):
            self.kernels.decode(
                total.view(1, 1, -1), (1, batch.elements), slice(0, len(total)), arrived, None,
                published=batch.published, **vars(Rule()),
            )  # fmt: skip
        else:
            total.add_(_mean(batch, arrived))

    def take(self, total: Tensor, batch: Batch) -> Quantised:
        """The largest of chunks `[chunks, elements]` as they travel; what receivers decode leaves `total`."""
        if total.numel() and self._supports(1, batch.elements, False):
            sent = self._room(len(total), batch.kept, total)
            whole = slice(0, len(total))
            self.kernels.encode(total.view(1, 1, -1), (1, batch.elements), whole, sent, self.codec, None)
            return sent
        indices, values = largest(total, batch.kept)
        numbers, scale = quantise(values, self.codec)
        total.scatter_add_(1, indices, -dequantise(numbers, scale, self.dtype))
        return indices, numbers, scale

    def _bases(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        return (self.basis[batch.height], self.basis[batch.width]) if batch.transformed else None

    def _supports(self, height: int, width: int, transformed: bool) -> bool:
        return self.kernels is not None and self.kernels.supports(height, width, transformed, self.dtype)

    def _fused(self, batch: Batch, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the kernels can take the batch: they address chunks in the tensors themselves."""
        whole = all(tensors[part.name].is_contiguous() for part in batch.parts)
        return whole and self._supports(batch.height, batch.width, batch.transformed)

    def _room(self, chunks: int, kept: int, like: Tensor) -> Quantised:
        indices = like.new_empty(chunks, kept, dtype=torch.int32)
        scale = None if self.codec == "fp32" else like.new_empty(chunks, dtype=torch.bfloat16)
        return indices, like.new_empty(chunks, kept, dtype=NUMBERS[self.codec]), scale

    def _land(
        self, batch: Batch, arrived: Chosen, tensors: Mapping[str, Tensor], how: Callable[[str], dict]
    ) -> None:
        for part in batch.parts:
            self.kernels.decode(
                _cube(tensors[part.name], part.chunking), (batch.height, batch.width), part.span, arrived,
                self._bases(batch), published=batch.published, **how(part.name),
            )  # fmt: skip

    def _own(self, batch: Batch, sent: Chosen) -> dict[str, Tensor]:
        """What this replica has sent, decoded: tensors of the parameters in the batch."""
        if batch.transformed and batch.kept < (batch.height + batch.width) / SPARSE_INVERSE:
            return batch.join(inverse_dct_of(*sent, *self._bases(batch)))
        return self._decode(batch, scattered(sent, batch.elements))

    def _decode(self, batch: Batch, flat: Tensor) -> dict[str, Tensor]:
        """Tensors of the parameters in the batch, of `[chunks, elements]` as they were chosen."""
        chunks = flat.view(batch.chunks, batch.height, batch.width)
        return batch.join(inverse_dct(chunks, *self._bases(batch)) if batch.transformed else chunks)


def _mean(batch: Batch, arrived: Chosen) -> Tensor:
    return (contributors_mean if batch.published else replicas_mean)(arrived, batch.elements)


def _cube(tensor: Tensor, chunking: Chunking) -> Tensor:
    """`[leading, rows, cols]`, as it is cut; shares storage."""
    shape = chunking.shape
    return tensor.view(-1, shape[-2] if len(shape) > 1 else 1, shape[-1])
