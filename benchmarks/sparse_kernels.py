"""The products of an FFN on one GPU, one by one: bf16, dense FP8 with one scale for each operand, summed in fp32 and
("fast") in what the tensor cores keep, dense FP8 with scales of rows, 2:4 sparse FP8 by cuSPARSELt's default algorithm
and by the one that its search finds, whose sums nobody chooses; and what surrounds them: threshold, cast, pack,
compress, estimator.

NOT YET RUN ON A GPU (targets on an H200: the sparse product at least 1.5 times as fast as dense FP8 for at least 8,192
tokens of the 8B shapes with cuSPARSELt 0.8.1, 1.2 times with 0.8.0; threshold and cast at 70 % of a copy's bandwidth).

Times are those of the device, medians of single calls; "host" is what the call itself takes on the host. The sparse
product is given with its weight compressed beforehand, and with compressing it. --json: one object of all rows so far
after each product and each kernel.

    python benchmarks/sparse_kernels.py [--models 1b 8b 70b] [--tokens 4096 8192 16384 32768] [--json]
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from children import emit

from stepline.kernels import ops, sparse_mm
from stepline.kernels.fp8 import E4M3, E5M2, Scaled, cast, has_fp8, scale_for, scaled_mm
from stepline.kernels.sparse_mm import Algorithm
from stepline.trainer.run.products import time_ms

WIDTHS = {"1b": (2048, 5504), "8b": (4096, 14336), "70b": (8192, 28672)}
"""hidden and FFN of configs/dense-1b, dense-8b, and of Llama 3 70B."""
HOST_CALLS = 50


def versions() -> dict:
    """Of what is measured."""
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cusparselt": torch.backends.cusparselt.version(), "cusparselt_loaded": sparse_mm.loaded_version(),
    }  # fmt: skip


def host_us(run: Callable[[], object]) -> float:
    """Microseconds that a call keeps the host."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * spent / HOST_CALLS


def products(rows: int, cols: int, tokens: int) -> dict[str, float]:
    """Milliseconds of Y = X W~^T, `[tokens, cols]` times `[rows, cols]`, made in each way."""
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    x, w = (torch.randn(n, cols, device=device, dtype=dtype) for n in (tokens, rows))
    xq = cast(x, E4M3)
    scale = scale_for(ops.weight_amax(w, dtype, True), E4M3)
    wq = Scaled(ops.weight_cast(w, scale, E4M3, dtype, True), scale)
    xr, wr = (cast(t.float(dtype), E4M3, dim=-1) for t in (xq, wq))
    found = {
        "bf16": time_ms(lambda: x @ w.mT),
        "fp8": time_ms(lambda: scaled_mm(xq, wq.mT, dtype)),
        "fp8_fast": time_ms(lambda: scaled_mm(xq, wq.mT, dtype, fast=True)),
        "fp8_row": time_ms(lambda: scaled_mm(xr, wr.mT, dtype)),
        "fp8_host_us": host_us(lambda: scaled_mm(xq, wq.mT, dtype)),
    }
    try:
        sparse_mm.check_sparse_product(xq.data, wq.data, dtype)
        return found | sparse_products(xq, wq, dtype)
    except (ValueError, RuntimeError) as error:  # of cuSPARSELt, which knows more reasons than are checked
        return found | {"refused": str(error).splitlines()[0]}


def sparse_products(xq: Scaled, wq: Scaled, dtype: torch.dtype) -> dict[str, Any]:
    """Of the same product by cuSPARSELt; raises ValueError or RuntimeError where it takes it not."""
    rows = wq.data.shape[0]
    packed, alpha = torch._cslt_compress(wq.data), (xq.scale * wq.scale).expand(rows).contiguous()
    best = sparse_mm.search(packed, xq.data, alpha, dtype)

    def ready(algorithm: Algorithm) -> torch.Tensor:
        return sparse_mm.compressed_mm(packed, xq.data, alpha, dtype, algorithm)

    def whole() -> torch.Tensor:
        way = best.alg_id, best.split_k, best.split_k_mode
        return sparse_mm.by_cusparselt(xq.data, wq.data, xq.scale * wq.scale, dtype, *way)

    expected = scaled_mm(xq, wq.mT, dtype).float()
    error = (ready(best).float() - expected).norm() / expected.norm()
    return {
        "sparse_default": time_ms(lambda: ready(Algorithm())),
        "sparse": time_ms(lambda: ready(best)),
        "sparse_and_compress": time_ms(whole),
        "sparse_host_us": host_us(lambda: ready(best)),
        "algorithm": [best.alg_id, best.split_k, best.split_k_mode],
        "difference": error.item(),
    }


def auxiliary(rows: int, cols: int, tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Name, milliseconds and GB/s (bytes that must be read and written) of each kernel alone, and of a copy."""
    from stepline.kernels import triton_ops

    device = torch.device("cuda", 0)
    w = torch.randn(rows, cols, device=device)
    g = torch.randn(tokens, rows, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(w)
    compute = torch.bfloat16
    scale, seed = scale_for(ops.weight_amax(w, compute, True), E4M3), torch.tensor(1, device=device)
    double = scale_for(2 * g.abs().amax(), E5M2)
    data = ops.weight_cast(w, scale, E4M3, compute, True)
    n, m = w.numel(), g.numel()
    runs = {
        "copy": (lambda: other.copy_(w), 8 * n),
        "threshold + amax": (lambda: ops.weight_amax(w, compute, True), 4 * n),
        "threshold + cast": (lambda: ops.weight_cast(w, scale, E4M3, compute, True), 5 * n),
        "threshold + cast + pack": (
            lambda: triton_ops.cast_packed(w, scale, E4M3, compute),
            4 * n + n * 5 // 8,
        ),
        "estimator + cast": (lambda: ops.estimate_cast(g, seed, double, E5M2), 3 * m),
        "estimator + cast + pack": (
            lambda: triton_ops.estimate_packed(g, seed, double, E5M2),
            2 * m + m * 5 // 8,
        ),
        "cast of a gradient": (lambda: cast(g, E5M2), 3 * m),
        "cast of a gradient by token": (lambda: cast(g, E5M2, dim=-1), 3 * m),
        "cast of a gradient by output": (lambda: cast(g, E5M2, dim=-2), 3 * m),
        # last: what cuSPARSELt refuses would end the others
        "compress (cuSPARSELt)": (lambda: torch._cslt_compress(data), n + n * 5 // 8),
    }
    for name, (run, size) in runs.items():
        ms = time_ms(run)
        yield name, {"ms": ms, "gb_per_s": size / ms / 1e6, "host_us": host_us(run)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if (reason := sparse_mm.missing(device)) is not None:
        sys.exit(f"error: 2:4 sparse FP8 products need a GPU of Hopper's kind, and {reason}")
    assert has_fp8(device)
    result = versions() | {"products": [], "kernels": []}
    say, tell = ((lambda *_: None), emit) if args.json else (print, lambda _: None)
    say(f"{result['device']}, torch {result['torch']}, cuSPARSELt {result['cusparselt']}")
    say(
        "| model | out x in | tokens | bf16 ms | FP8 | FP8 fast | FP8 by row | 2:4 default | 2:4 | with compress | "
        "2:4 / faster FP8 | host us |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        hidden, ffn = WIDTHS[name]
        for rows, cols in ((ffn, hidden), (hidden, ffn)):
            for tokens in args.tokens:
                row = {"model": name, "rows": rows, "cols": cols, "tokens": tokens} | products(
                    rows, cols, tokens
                )
                result["products"].append(row)
                tell(result)
                start = (
                    f"| {name} | {rows} x {cols} | {tokens} | {row['bf16']:.3f} | {row['fp8']:.3f} | "
                    f"{row['fp8_fast']:.3f} | {row['fp8_row']:.3f} |"
                )
                if "refused" in row:
                    say(f"{start} {row['refused']} |")
                    continue
                say(
                    f"{start} {row['sparse_default']:.3f} | {row['sparse']:.3f} | {row['sparse_and_compress']:.3f} | "
                    f"{min(row['fp8'], row['fp8_fast']) / row['sparse']:.2f} | {row['sparse_host_us']:.0f} |"
                )
        result["kernels"].append({"model": name})
        for kernel, row in auxiliary(ffn, hidden, args.tokens[-1]):
            result["kernels"][-1][kernel] = row
            tell(result)
    say("\n| model | kernel | ms | GB/s | of a copy | host us |\n|---|---|---|---|---|---|")
    for kernels in result["kernels"]:
        copy = kernels["copy"]["gb_per_s"]
        for name, row in kernels.items():
            if name != "model":
                share = row["gb_per_s"] / copy
                say(
                    f"| {kernels['model']} | {name} | {row['ms']:.3f} | {row['gb_per_s']:.0f} | {share:.0%} | "
                    f"{row['host_us']:.0f} |"
                )


if __name__ == "__main__":
    main()
