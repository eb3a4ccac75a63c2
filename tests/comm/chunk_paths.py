"""Both paths of comm/chunks.py on the same chunks: python chunk_paths.py OUT, with TRITON_INTERPRET=1 on the CPU.

OUT gets by case what went wrong, None where nothing did; tests/gpu/test_demo.py runs the cases on CUDA.
"""

import sys
import traceback
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from torch import nn

from stepline.comm.chunking import Chunking
from stepline.comm.chunks import Chunks, Rule
from stepline.comm.codec import ChunkCodec, dequantise
from stepline.comm.dct import inverse_dct
from stepline.comm.demo import DeMo, DeMoSettings
from stepline.comm.packets import Batch, PacketFormat, make_batches, scattered
from stepline.kernels import triton_demo
from stepline.trainer.optim import muon
from stepline.trainer.optim.build import AdamW
from stepline.trainer.optim.muon import Muon

REPLICAS = 2


@dataclass(frozen=True)
class Case:
    shapes: tuple[tuple[int, ...], ...]
    limit: int
    codec: str
    transformed: bool = True
    published: bool = False
    values: str = "normal"
    """normal; ties; gaps: chunks of zeros, of one value, of tiny and of large ones."""
    density: float = 0.02

    def __str__(self) -> str:
        kind = ("dct" if self.transformed else "flat") + ("-published" if self.published else "")
        return f"{'+'.join('x'.join(map(str, s)) for s in self.shapes)}-{self.limit}-{self.codec}-{kind}-{self.values}"


CODECS = ("fp32", "int8", "sign")
PADDED = ((26, 33), (51, 17), (2, 5, 20))  # the first two are one batch
CASES = [
    *(Case(PADDED, 32, codec) for codec in CODECS),
    Case(PADDED, 32, "int8", published=True),
    Case(((32, 64),), 32, "sign"),
    *(Case(((64, 64), (45, 63)), 64, codec, published=p) for codec, p in (("int8", False), ("sign", True))),
    *(Case(((50, 70), (25, 70)), 32, codec, transformed=False) for codec in CODECS),
    Case(((99, 41),), 64, "sign", transformed=False, published=True),
    Case(((20, 70),), 32, "fp32", transformed=False, values="ties", density=0.1),
    *(Case(((20, 70),), 32, codec, transformed=False, values="gaps") for codec in ("int8", "sign")),
    *(Case(((52, 20),), 32, codec, values="gaps") for codec in ("int8", "sign")),
    Case(((13,), (40,)), 64, "sign", published=True, density=0.3),  # vectors of the published algorithm
    Case(((16, 16),), 32, "int8", density=1.0),
]


def drawn(case: Case, replica: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(replica)
    tensors = {str(i): torch.randn(shape, generator=draw) for i, shape in enumerate(case.shapes)}
    for x in tensors.values():
        flat = x.view(-1)
        if case.values == "ties":
            flat.mul_(2).round_()
        if case.values == "gaps":
            x[: len(x) // 2] = 0  # the first chunks
            flat[5] = -3e-9
            x[-len(x) // 4 :] *= 1e12
    return tensors


def batches(case: Case) -> list[Batch]:
    kind = {"transformed": case.transformed, "published": case.published}
    cut = Chunking.of if case.transformed else Chunking.flat
    limit = case.limit if case.transformed else case.limit**2
    chunkings = {str(i): cut(shape, limit) for i, shape in enumerate(case.shapes)}
    return make_batches(chunkings, case.density, **kind)


def close(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, eps: float = 2e-6) -> None:
    error = (a.double() - b.double()).abs() / torch.as_tensor(scale, device=a.device).double()
    assert not error.numel() or error.max() <= eps, f"{error.max():.2e} apart"


def check_encode(batch: Batch, case: Case, fused: Chunks, torch_: Chunks, x: dict, alpha: float) -> tuple:
    """What both send, after a look at it."""
    mine = {n: t.clone() for n, t in x.items()}
    other = {n: t.clone() for n, t in x.items()}
    indices, numbers, scale = fused.encode(batch, mine, alpha)
    wanted, wanted_numbers, wanted_scale = torch_.encode(batch, other, alpha)
    assert indices.dtype == torch.int32
    assert numbers.dtype == wanted_numbers.dtype
    order, wanted_order = indices.argsort(1), wanted.argsort(1)
    assert torch.equal(indices.gather(1, order), indices), "indices ascend"
    chunks = batch.split(x)
    if case.transformed:
        down, across = torch_._bases(batch)
        chunks = down.T @ (chunks @ across)
    chunks = chunks.reshape(batch.chunks, -1)
    largest = chunks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert all(len(set(row)) == batch.kept for row in indices.tolist())
    held, wanted_held = chunks.gather(1, indices.long()).abs(), chunks.gather(1, wanted).abs()
    close(held.sort(1).values, wanted_held.sort(1).values, largest)
    if case.values == "normal":
        # where it is clear which coefficient is the last
        edge = chunks.abs().topk(min(batch.kept + 1, batch.elements), 1).values
        clear = edge[:, batch.kept - 1] - edge[:, -1] > 1e-5 * largest[:, 0]
        clear |= edge.shape[1] == batch.kept
        assert clear.float().mean() > 0.9
        assert torch.equal(indices.long()[clear], wanted.gather(1, wanted_order)[clear]), "other indices"
        if scale is not None:
            assert (scale.view(torch.int16) - wanted_scale.view(torch.int16)).abs().max() <= 1, (
                "a bf16 beside"
            )
            clear &= scale == wanted_scale
            assert clear.float().mean() > 0.8
        values = dequantise(numbers, scale, torch.float32)[clear]
        wanted_values = dequantise(wanted_numbers, wanted_scale, torch.float32).gather(1, wanted_order)[clear]
        # steps of int8 may be rounded apart where fp32 sums put them on the other side of a half
        close(values, wanted_values, largest[clear], 0.01 if case.codec == "int8" else 2e-6)
        if case.codec == "int8":
            assert ((values - wanted_values).abs() > 1e-5 * largest[clear]).float().mean() < 1e-3
    if case.values == "ties":  # lower indices first
        for row, found in zip(chunks.abs().tolist(), indices.tolist(), strict=True):
            assert found == sorted(sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[: batch.kept])

    sent = scattered((indices.long(), dequantise(numbers, scale, torch.float32)), batch.elements)
    own = sent.view(batch.chunks, batch.height, batch.width)
    own = inverse_dct(own, *torch_._bases(batch)) if case.transformed else own
    for name, decoded in batch.join(own).items():
        expected = x[name] - alpha * decoded.view_as(x[name])
        close(mine[name], expected, x[name].abs().max())
    return (indices, numbers, scale), (wanted, wanted_numbers, wanted_scale)


def check(case: Case, device: str) -> None:
    """Raises AssertionError where the two paths, or a packet of one that the other reads, differ."""
    found = batches(case)
    sample = torch.zeros((), device=device)
    fused, torch_ = Chunks(found, case.codec, sample, triton_demo), Chunks(found, case.codec, sample)
    inputs = [{n: t.to(device) for n, t in drawn(case, r).items()} for r in range(REPLICAS)]
    forms = [PacketFormat(found, 0, case.codec, torch.float32, 1, path.packing) for path in (fused, torch_)]
    packets = []
    for r, x in enumerate(inputs):
        sent = [check_encode(batch, case, fused, torch_, x, 1.0 if r else 0.2) for batch in found]
        by_kernels, by_torch = (
            form.write(0, [own[i] for own in sent], sample.new_zeros(0)) for i, form in enumerate(forms)
        )
        again = forms[1].write(0, [(own[0][0].long(), *own[0][1:]) for own in sent], sample.new_zeros(0))
        assert torch.equal(by_kernels, again), "other bits"
        packets.append(by_torch if r else by_kernels)
    both = [form.read(0, torch.stack(packets))[0] for form in forms]
    for batch, mine, other in zip(found, *both, strict=True):
        assert torch.equal(mine[0].long(), other[0])
        assert torch.equal(mine[1], other[1])
        names = [part.name for part in batch.parts]
        like = {n: inputs[0][n] for n in names}
        expected = torch_.decode(batch, other, like)
        size = {n: t.abs().max().clamp(min=1e-30) for n, t in expected.items()}
        decoded = fused.decode(batch, mine, like)
        for n in names:
            close(decoded[n], expected[n].view_as(decoded[n]), size[n])
        for rule in (Rule(0.9, -0.5), Rule(0.9, -0.5, sign=True)):
            p, wanted = ({n: torch.ones_like(t) for n, t in like.items()} for _ in range(2))
            fused.apply(batch, mine, p, lambda name, rule=rule: rule)
            torch_.apply(batch, other, wanted, lambda name, rule=rule: rule)
            for n in names:
                if rule.sign:  # of what is next to nothing, either
                    clear = expected[n].view_as(p[n]).abs() > 1e-5 * size[n]
                    clear |= expected[n].view_as(p[n]) == 0 if not case.transformed else False
                    close(p[n][clear], wanted[n][clear], 1.0)
                else:
                    close(p[n], wanted[n], size[n].clamp(min=1.0))
        check_owner(batch, fused, torch_, mine, other)


def check_owner(batch: Batch, fused: Chunks, torch_: Chunks, mine: tuple, other: tuple) -> None:
    """Sums of an owner, and what of them is sent on and owed."""
    owed = (
        torch.linspace(-1, 1, batch.chunks * batch.elements, device=mine[1].device).view(batch.chunks, -1)
        ** 3
    )
    a, b = owed.clone(), owed.clone()
    fused.add_mean(a, batch, mine)
    torch_.add_mean(b, batch, other)
    largest = b.abs().max()
    close(a, b, largest)
    whole = a.clone()
    indices, numbers, scale = fused.take(a, batch)
    sent = scattered((indices.long(), dequantise(numbers, scale, torch.float32)), batch.elements)
    close(a + sent, whole, largest)
    kept = whole.abs().topk(batch.kept, 1).values
    close(whole.gather(1, indices.long()).abs().sort(1, descending=True).values, kept, largest)


def check_packing(device: str) -> None:
    """Of every number of bits, several rows that lie apart."""
    for bits in (1, 3, 7, 8, 10, 12, 13, 20, 24):
        count = 1031
        draw = torch.Generator().manual_seed(bits)
        numbers = torch.randint(2**bits, (2, count), generator=draw).to(device)
        path = Chunks([], "sign", torch.zeros((), device=device), triton_demo).packing
        codec = ChunkCodec(1, 2**bits, count, "fp32", torch.float32)
        packed = [codec.packing.pack(row, bits) for row in numbers]
        assert all(torch.equal(path.pack(row, bits), wide) for row, wide in zip(numbers, packed, strict=True))
        apart = torch.stack([torch.cat([p.new_full((3,), 255), p]) for p in packed])[:, 3:]
        assert torch.equal(path.unpack(apart, bits, count).long(), numbers), bits
        assert torch.equal(codec.packing.unpack(apart, bits, count), numbers), bits


def steps(
    device: str, kernels: ModuleType | None, side: int, count: int, saved: int = 0, **settings
) -> list[torch.Tensor]:
    """Parameters after some steps of one replica, which learns a matrix, an embedding and a vector, and saves after
    step `saved`."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (side, 50), "embed": (30, side), "vector": (side,)}
    named = {n: nn.Parameter(torch.randn(s, generator=draw).to(device)) for n, s in shapes.items()}
    sync = DeMo(
        named, None, DeMoSettings(density=0.05, weight_decay=0.1, **settings), decayed={"matrix"},
        untransformed={"embed"}, dense=AdamW({"vector": named["vector"]}, set()), make_optimizer=Muon, kernels=kernels,
    )  # fmt: skip
    for step in range(1, count + 1):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
        sync.step(1e-2)
        if step == saved:
            sync.state_dict(0)
    sync.state_dict(0)  # decodes what is under way
    return [*(p.detach().cpu() for p in named.values()), *(p.cpu() for p in sync.pending.values())]


STEPS = (
    {"codec": "int8"},
    {"codec": "fp32", "delay": 1, "ahead": True},
    {"codec": "sign", "delay": 1},
    {"codec": "fp32", "version": 2, "accumulate": "gradients"},
)


def check_steps(device: str) -> None:
    """Whole steps by the kernels against those of torch on the CPU, both with Muon's products in fp32."""
    for settings in STEPS:
        with mock.patch.object(muon, "_narrow", lambda direction: direction):
            mine = steps(device, triton_demo, 40, 3, **settings)
        other = steps("cpu", None, 40, 3, **settings)
        for a, b in zip(mine, other, strict=True):
            apart = (a - b).abs()
            assert apart.median() < 1e-6, settings
            # near the threshold another coefficient may be the larger one, near zero a sign the other one
            assert (apart > 1e-5).float().mean() < 0.02, settings
    for settings in (
        {"codec": "sign", "ahead": True},
        {"codec": "int8", "accumulate": "gradients", "phi": "identity"},
    ):
        runs = [steps(device, triton_demo, 40, 4, saved, delay=1, **settings) for saved in (0, 2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), settings


def check_fallback(device: str) -> None:
    """Larger chunks, tensors that lie apart and other types go through torch, with the kernels handed in."""
    for shapes, limit, dtype in (((90, 80), 128, torch.float32), ((12, 10), 8, torch.float64)):
        case = Case((shapes,), limit, "int8")
        x = {n: t.to(device, dtype) for n, t in drawn(case, 0).items()}
        for apart in (False, True):
            x = {n: t.mT.contiguous().mT if apart else t for n, t in x.items()}
            both = [({n: t.clone() for n, t in x.items()}, kernels) for kernels in (None, triton_demo)]
            sample = torch.zeros((), device=device, dtype=dtype)
            paths = [(Chunks(batches(case), "int8", sample, kernels), own) for own, kernels in both]
            sent = [chunks.encode(batch, own) for chunks, own in paths for batch in batches(case)]
            assert all(torch.equal(a, b) for a, b in zip(*sent, strict=True))
            assert all(torch.equal(both[0][0][n], both[1][0][n]) for n in x)


def outcome(work, *arguments) -> str | None:
    try:
        work(*arguments)
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {str(case): outcome(check, case, "cpu") for case in CASES}
    found |= {"packing": outcome(check_packing, "cpu"), "steps": outcome(check_steps, "cpu")}
    found["fallback"] = outcome(check_fallback, "cpu")
    torch.save(found, sys.argv[1])
