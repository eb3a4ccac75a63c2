"""The doctor's checks of GPUs: what they are, their driver and links, and products that are really tried."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from stepline.kernels.sparse_mm import loaded_version
from stepline.trainer.run.devices import hides_gpus
from stepline.trainer.run.doctor_report import Check, reason
from stepline.trainer.run.doctor_software import run_tool
from stepline.trainer.watch.peaks import peak_flops

GB = 1e9
BUSY = 0.1
"""Share of a GPU's memory that others may hold before it is said."""


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    bf16: bool
    """Products of bf16 in hardware."""
    peak_flops: float | None
    """Dense bf16 FLOP/s, where known."""


def read_gpus() -> list[Gpu]:
    """The GPUs that torch can use, none where there are none."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        found.append(
            Gpu(
                index,
                properties.name,
                properties.total_memory,
                free,
                capability,
                torch.version.hip is not None or capability >= (8, 0),
                peak_flops(properties.name),
            )
        )
    return found


def check_gpus(gpus: Sequence[Gpu], local_ranks: int, present: bool) -> Check:
    """Names, memory, capability, bf16 and whether MFU can be shown.

    present: whether the machine has a GPU at all.
    """
    if not gpus and present:
        build = torch.version.cuda or torch.version.hip
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if build is None:
            why = "this torch is built for CPUs: install torch's CUDA build"
        elif hides_gpus(hidden):
            why = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it"
        else:
            why = f"torch for CUDA {build} cannot use it ({_cuda_error()}): update the driver"
        return Check("gpus", "broken", [], f"there is a GPU but {why}")
    if not gpus:
        return Check("gpus", "missing", [], "none: training runs on the CPU, which is for trials")
    value = [asdict(gpu) for gpu in gpus]
    kinds: dict[tuple, int] = {}
    for gpu in gpus:
        kinds[gpu.name, round(gpu.memory_bytes / GB), gpu.capability] = (
            kinds.get((gpu.name, round(gpu.memory_bytes / GB), gpu.capability), 0) + 1
        )
    says = ", ".join(f"{n} x {name} ({gb} GB, sm_{a}{b})" for (name, gb, (a, b)), n in kinds.items())
    problems = []
    if len(gpus) < local_ranks:
        problems.append(f"{local_ranks} ranks would train on the CPU, start {len(gpus)}")
    if len(kinds) > 1:
        problems.append("the slowest sets the pace of all")
    if not all(gpu.bf16 for gpu in gpus):
        problems.append("no bf16: set precision.compute=fp32")
    busy = [gpu for gpu in gpus if gpu.free_bytes < (1 - BUSY) * gpu.memory_bytes]
    if busy:
        held = max(gpu.memory_bytes - gpu.free_bytes for gpu in busy) / GB
        numbers = ",".join(str(gpu.index) for gpu in busy)
        problems.append(f"another program holds up to {held:.0f} GB of GPU {numbers}, end it")
    unknown = sorted({gpu.name for gpu in gpus if gpu.peak_flops is None})
    if unknown:
        says += f"; no MFU for {', '.join(unknown)}, whose peak is not known"
    if problems:
        return Check("gpus", "warning", value, f"{says}: {'; '.join(problems)}")
    return Check("gpus", "ok", value, says)


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return reason(error)
    return "it counts none"


def driver_cuda() -> int | None:
    """The newest CUDA that the driver can run, as 12040 for 12.4; None where there is no driver."""
    version = torch._C._cuda_getDriverVersion() if torch.version.cuda else 0
    return version or None


def check_driver(driver: int | None, built_for: str | None) -> Check:
    """The driver against the CUDA that torch was built for, e.g. `12.8`."""
    if built_for is None or driver is None:
        return Check("driver", "missing", None, "no NVIDIA driver, or a torch without CUDA")
    has = (driver // 1000, driver % 1000 // 10)
    wants = tuple(int(part) for part in built_for.split(".")[:2])
    told = run_tool("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    name = f"driver {told.splitlines()[0]}" if told else "the driver"
    value = {
        "driver_cuda": f"{has[0]}.{has[1]}",
        "torch_cuda": built_for,
        "driver": told and told.splitlines()[0],
    }
    says = f"{name} runs CUDA {has[0]}.{has[1]}, torch is built for {built_for}"
    if has[0] < wants[0]:
        return Check(
            "driver", "broken", value, f"{says}: update the driver or take an older CUDA build of torch"
        )
    if has < wants:
        return Check("driver", "warning", value, f"{says}: compiled kernels may fail, update the driver")
    return Check("driver", "ok", value, says)


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """`nvidia-smi topo -m`: the link of each pair of GPUs, e.g. NV18, PIX or SYS."""
    rows = [line.split() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines() if line.strip()]
    columns = [int(word[3:]) for word in rows[0] if re.fullmatch(r"GPU\d+", word)] if rows else []
    links = {}
    for row in rows[1:]:
        if re.fullmatch(r"GPU\d+", row[0]):
            for other, link in zip(columns, row[1:]):
                if (mine := int(row[0][3:])) < other:
                    links[mine, other] = link
    return links


def check_links(gpus: Sequence[Gpu]) -> Check:
    """Whether the GPUs of this machine reach each other directly (P2P), and by which link."""
    if len(gpus) < 2:
        return Check("gpu links", "missing", None, f"{'one GPU' if gpus else 'no GPUs'}: nothing to link")
    pairs = [(a.index, b.index) for a in gpus for b in gpus if a.index < b.index]
    blocked = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    # nvidia-smi counts all GPUs of the machine, torch the visible ones.
    shown = not os.environ.get("CUDA_VISIBLE_DEVICES")
    links = parse_topology(run_tool("nvidia-smi", "topo", "-m") or "") if shown else {}
    kinds = sorted({links[pair] for pair in pairs if pair in links})
    value = {"pairs": len(pairs), "without_p2p": [list(pair) for pair in blocked], "links": kinds}
    says = f"{len(pairs) - len(blocked)} of {len(pairs)} pairs reach each other directly"
    says += f", by {', '.join(kinds)}" if kinds else ""
    if blocked:
        says += ": the others go through the CPU's memory, which is slow; look at IOMMU and ACS settings"
        return Check("gpu links", "warning", value, says)
    if kinds and not all(kind.startswith("NV") for kind in kinds):
        says += " (NV: NVLink; the rest: PCIe, which is slow for parallel.shard above 1)"
    return Check("gpu links", "ok", value, says)


def _small_numbers(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """-1, 0 and 1: exact in every type, and so are the sums of 64 products."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, 2, (rows, columns), generator=generator).float().to(device)


def check_fp8(device: torch.device) -> Check:
    """Tries products of E4M3 and of E5M2 by E4M3 against exact ones."""
    if device.type != "cuda":
        return Check("fp8", "missing", None, "no GPU here: FP8 products need one of compute capability 8.9")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        says = f"this GPU (sm_{capability[0]}{capability[1]}) has no FP8 products; they need 8.9"
        return Check("fp8", "missing", None, says)
    wrong = []
    for name, kind in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)):
        try:
            if not fp8_product_is_right(kind, device):
                wrong.append(f"{name} products are wrong")
        except Exception as error:
            wrong.append(f"{name} products fail ({reason(error)})")
    if wrong:
        return Check("fp8", "warning", None, f"{' and '.join(wrong)}: keep precision to bf16")
    return Check("fp8", "ok", ["E4M3", "E5M2"], "E4M3 and E5M2 products are right")


def fp8_product_is_right(kind: torch.dtype, device: torch.device) -> bool:
    """One `torch._scaled_mm`, of `kind` by E4M3, against the exact product."""
    a, b = _small_numbers(64, 64, device), _small_numbers(64, 64, device).flip(0)
    one = torch.ones((), device=device)
    got = torch._scaled_mm(
        a.to(kind), b.to(torch.float8_e4m3fn).t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
    )
    return torch.equal(got.float(), a @ b.t())


def check_sparse(device: torch.device) -> Check:
    """Tries 2:4 sparse products of cuSPARSELt in bf16 and E4M3 against exact ones."""
    name, version = "2:4 sparsity", loaded_version()
    if device.type != "cuda":
        return Check(name, "missing", None, "no GPU here: 2:4 products need one of compute capability 8.0")
    if not torch.backends.cusparselt.is_available():
        return Check(name, "missing", None, "this torch is built without cuSPARSELt: no 2:4 products")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        says = f"this GPU (sm_{capability[0]}{capability[1]}) has no 2:4 products; they need 8.0"
        return Check(name, "missing", {"version": version}, says)
    works, wrong = [], []
    kinds = [("bf16", torch.bfloat16)] + [("E4M3", torch.float8_e4m3fn)] * (capability >= (8, 9))
    for word, kind in kinds:
        try:
            (works if sparse_product_is_right(kind, device) else wrong).append(word)
        except Exception as error:
            wrong.append(f"{word} ({reason(error)})")
    value = {"version": version, "works": works}
    says = f"cuSPARSELt {version}"
    if wrong:
        says += (
            f": 2:4 products of {' and '.join(wrong)} fail, take torch 2.12 or newer or keep sparse.mode=none"
        )
        return Check(name, "warning", value, says)
    return Check(name, "ok", value, f"{says}: products of {' and '.join(works)} are right")


def sparse_product_is_right(kind: torch.dtype, device: torch.device) -> bool:
    """One 2:4 product in `kind` against the exact one; the second operand is column-major, as hardware takes it."""
    a, b = _small_numbers(128, 128, device), _small_numbers(128, 128, device).flip(0)
    a.view(128, 32, 4)[..., 2:] = 0  # so that sums have at most 64 terms
    packed = torch._cslt_compress(a.to(kind))
    options = {"out_dtype": torch.bfloat16} if kind == torch.float8_e4m3fn else {}
    got = torch._cslt_sparse_mm(packed, b.to(kind).t(), **options)
    return torch.equal(got.float(), a @ b.t())
