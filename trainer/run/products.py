"""Which products of a run go through the sparse tensor cores: what is possible, then what is faster on this machine."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stepline.kernels import ops, sparse_mm
from stepline.kernels.fp8 import E4M3, MULTIPLE, Scaled, cast, has_fp8, scaled_mm
from stepline.kernels.sparse_mm import Algorithm, Cache, cache_path
from stepline.models.sparse_linear import SparseLinear
from stepline.trainer.config import Config
from stepline.trainer.errors import UserError
from stepline.trainer.run.precision import compute_dtype

WARM_UP, REPEATS = 3, 10
AHEAD_CYCLES = 2_000_000
"""For which a GPU waits (about 1 ms) while the host launches what is timed."""

Shape = tuple[int, int, int]
"""out, in, tokens of a micro-batch."""


@dataclass(frozen=True)
class Timing:
    """Of one shape, milliseconds; the sparse product compresses its weight first."""

    sparse_ms: float
    dense_ms: float
    algorithm: Algorithm


def check_products_of_batch(config: Config, device: torch.device) -> None:
    """Raises UserError where this device or the micro-batch cannot have the products that the config asks for."""
    sparse, tokens = config.sparse, config.parallel.micro_batch * config.data.seq_len
    forced = sparse.force or sparse.forward == "sparse"
    reason = sparse_mm.missing(device) if forced else None
    if reason is not None:
        asked = "sparse.force=true" if sparse.force else "sparse.forward=sparse"
        raise UserError(f"{asked} needs sparse tensor cores, and {reason}; leave it out")
    if config.precision.fp8 and tokens % MULTIPLE:
        raise UserError(
            f"FP8 products take micro-batches of a multiple of {MULTIPLE} tokens, not {tokens}; change "
            "parallel.micro_batch or data.seq_len"
        )


def cannot_compile_fp8(config: Config, device: torch.device) -> bool:
    """Whether what torch.compile makes of FP8 numbers would end in an error: torch before 2.13 gives Triton their types
    on GPUs that have none (pytorch issue 184081). Raises UserError where it is asked for."""
    emulated = config.precision.fp8 and device.type == "cuda" and not has_fp8(device)
    if not emulated or torch.__version__ >= (2, 13):
        return False
    if config.run.compile is True:
        raise UserError(
            f"torch {torch.__version__} cannot compile FP8 numbers for a GPU that has none; leave run.compile out, or "
            "install torch 2.13"
        )
    return True


def products_done_instead(config: Config, device: torch.device) -> list[str]:
    """What of FP8 and 2:4 sparse products this device does in another way, one sentence each."""
    notes, experts = [], config.model.ffn == "moe"
    if config.precision.fp8 and not has_fp8(device):
        notes.append(
            f"the {device.type} has no FP8 products: FP8 numbers are multiplied in wider ones, no faster than those"
        )
    elif config.precision.fp8 and experts:
        notes.append(
            "experts' products are grouped ones of numbers rounded to FP8: no FP8 product exists for them"
        )
    if config.precision.fp8_scales == "row" and compute_dtype(config) == torch.float32:
        notes.append(
            "FP8 products with scales of rows give bf16: their results are rounded to it before the run goes on in fp32"
        )
    if config.sparse.mode != "s-ste":
        return notes
    reason = sparse_mm.missing(device)
    if reason is None and not config.precision.fp8:
        reason = "they are in FP8 alone: set precision.fp8=true"
    elif reason is None and config.sparse.forward == "dense":
        reason = "sparse.forward=dense"
    if reason is not None:
        what = "2:4 sparse weights are multiplied as dense ones with zeros: the same numbers, no faster than dense"
        notes.append(f"{what} ({reason})")
    elif experts:
        notes.append(
            "experts' 2:4 sparse weights are multiplied as dense ones with zeros: no grouped 2:4 product exists"
        )
    return notes


def choose_products(
    config: Config, model: nn.Module, device: torch.device, group: dist.ProcessGroup,
    measure: Callable[[Shape, torch.device, torch.dtype], Timing] | None = None, cache: Cache | None = None,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Sets how each 2:4 sparse FP8 layer makes its forward product, alike on all ranks of `group`: rank 0 decides.

    Each shape is timed once on a machine; measure and cache: by default this device and the user's cache. Returns what
    environment.json records by shape, and sentences for the log. Raises UserError on all ranks where a product that
    was asked for fails.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseLinear) and m.recipe.sparse and m.recipe.fp8]
    if config.sparse.forward == "dense" or (measure is None and sparse_mm.missing(device) is not None):
        layers = []
    tokens = config.parallel.micro_batch * config.data.seq_len
    shapes = sorted({(layer.out_features, layer.in_features, tokens) for layer in layers})
    decided: list = [None]
    if shapes and dist.get_rank(group) == 0:
        found = Cache(cache_path()) if cache is None else cache
        try:
            decided = [decide(shapes, config, device, measure or measure_shape, found)]
        except UserError as error:
            decided = [error]
    dist.broadcast_object_list(decided, src=0, group=group)
    if isinstance(decided[0], UserError):
        raise decided[0]
    if decided[0] is None:
        return {}, []
    chosen, record, notes = decided[0]
    for layer in layers:
        layer.algorithm = chosen[layer.out_features, layer.in_features, tokens]
    return record, notes


def decide(
    shapes: list[Shape], config: Config, device: torch.device, measure: Callable, cache: Cache
) -> tuple[dict[Shape, Algorithm | None], dict[str, Any], list[str]]:
    """By shape: the algorithm of the sparse product, or None for the dense one; the record; what is to be said."""
    chosen: dict[Shape, Algorithm | None] = {}
    record, notes, new, dtype = {}, [], {}, compute_dtype(config)
    for shape in shapes:
        rows, cols, tokens = shape
        name = f"{rows} x {cols}, {tokens} tokens"
        try:
            sparse_mm.check_widths(*shape)
        except ValueError as error:
            chosen[shape], record[name] = None, {"product": "dense", "reason": str(error)}
            notes.append(f"the product of {name} is dense FP8: {error}")
            continue
        key = Cache.key(device, rows, cols, tokens, dtype)
        timing = _read(cache.entries.get(key))
        if timing is None:
            try:
                timing = measure(shape, device, dtype)
            except RuntimeError as error:  # of cuSPARSELt, which knows more reasons than are checked here
                reason = str(error).splitlines()[0]
                if config.sparse.force or config.sparse.forward == "sparse":
                    raise UserError(
                        f"the 2:4 sparse product of {name} fails on this machine ({reason}); set sparse.forward to "
                        "auto and leave sparse.force out"
                    ) from error
                chosen[shape], record[name] = None, {"product": "dense", "reason": reason}
                notes.append(f"the 2:4 sparse product of {name} fails ({reason}): dense FP8 is used")
                continue
            new[key] = asdict(timing)
        loses = timing.sparse_ms >= timing.dense_ms
        dense = loses and not config.sparse.force
        chosen[shape] = None if dense else timing.algorithm
        record[name] = {"product": "dense" if dense else "sparse"} | asdict(timing)
        if loses:
            instead = (
                "dense FP8 is used (sparse.force=true keeps it sparse)"
                if dense
                else "sparse.force keeps it sparse"
            )
            notes.append(
                f"the 2:4 sparse product of {name} takes {timing.sparse_ms:.3f} ms and the dense one "
                f"{timing.dense_ms:.3f} ms: {instead}"
            )
    if new:
        cache.put(new)
    return chosen, record, notes + ([cache.problem] if cache.problem else [])


def _read(entry: Any) -> Timing | None:
    """A cached timing; None where the entry is not one."""
    try:
        algorithm = Algorithm(**{key: int(value) for key, value in entry["algorithm"].items()})
        return Timing(float(entry["sparse_ms"]), float(entry["dense_ms"]), algorithm)
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def measure_shape(shape: Shape, device: torch.device, dtype: torch.dtype) -> Timing:
    """Times both products of one shape on CUDA, the sparse one by cuSPARSELt's default and by what its search finds."""
    rows, cols, tokens = shape
    x = cast(torch.randn(tokens, cols, device=device), E4M3)
    weight = torch.randn(rows, cols, device=device)
    w = Scaled(ops.weight_cast(weight, x.scale, E4M3, weight.dtype, True), x.scale)
    alpha = torch.ones(rows, device=device)
    packed = torch._cslt_compress(w.data)
    candidates = {Algorithm(), sparse_mm.search(packed, x.data, alpha, dtype)}

    def sparse(algorithm: Algorithm) -> float:
        return time_ms(lambda: sparse_mm.by_cusparselt(
            x.data, w.data, x.scale, dtype, algorithm.alg_id, algorithm.split_k, algorithm.split_k_mode
        ))  # fmt: skip

    sparse_ms, best = min(((sparse(a), a) for a in candidates), key=lambda pair: pair[0])
    return Timing(sparse_ms, time_ms(lambda: scaled_mm(x, w.mT, dtype, fast=True)), best)


def time_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of `run` on the device; the host gets ahead of it, as it does in a run's steps."""
    for _ in range(WARM_UP):
        run()
    spans = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end))
    return statistics.median(spans)
