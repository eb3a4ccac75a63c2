"""2:4 sparse FP8 products by cuSPARSELt, Y = X W~^T; what it refuses is refused on every device.

cuSPARSELt multiplies a compressed row-major operand by a column-major dense one: Y^T = W~ X^T, written as Y. A weight
is compressed for each product, as only its 8-bit values are there between layers. Scales go into the product as a
vector over the rows of W~: one number would make the host wait. Elsewhere the same numbers are multiplied densely.
"""

import contextlib
import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepline.kernels.fp8 import E4M3, Scaled, has_fp8, scaled_mm
from stepline.kernels.sparse24 import groups

SPARSE_MULTIPLE, DENSE_MULTIPLE = 32, 16
"""What rows and columns of the sparse operand, and rows of the dense one, are multiples of."""
RESULTS = (torch.bfloat16, torch.float16, torch.float32, E4M3)


@dataclass(frozen=True)
class Algorithm:
    """How cuSPARSELt makes a product: torch's arguments of these names."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


def missing(device: torch.device) -> str | None:
    """Why the device has no 2:4 sparse FP8 products, or None where it has."""
    if device.type != "cuda":
        return f"the {device.type} has no sparse tensor cores"
    if not has_fp8(device):
        return "the GPU has no FP8 products"
    if not torch.backends.cusparselt.is_available():
        return "this torch is built without cuSPARSELt"
    return None


def check_widths(rows: int, cols: int, tokens: int | None = None) -> None:
    """Raises ValueError for a sparse `[rows, cols]` or a dense `[tokens, cols]` that cuSPARSELt does not take."""
    if rows % SPARSE_MULTIPLE or cols % SPARSE_MULTIPLE:
        raise ValueError(
            f"2:4 sparse products take weights of multiples of {SPARSE_MULTIPLE}, not {rows} x {cols}"
        )
    if tokens is not None and tokens % DENSE_MULTIPLE:
        raise ValueError(
            f"2:4 sparse products take tokens in multiples of {DENSE_MULTIPLE}, not {tokens}; change the micro-batch"
        )


def check_sparse_product(x: Tensor, w: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError for what cuSPARSELt refuses of X `[tokens, in]`, W~ `[out, in]` and a result of `dtype`."""
    if x.dtype != E4M3 or w.dtype != E4M3:
        raise ValueError(f"2:4 sparse products take E4M3 operands, not {x.dtype} and {w.dtype}")
    if dtype not in RESULTS:
        raise ValueError(f"2:4 sparse products give bf16, fp16, fp32 or E4M3, not {dtype}")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"{tuple(x.shape)} and {tuple(w.shape)} are not [tokens, in] and [out, in]")
    if not x.is_contiguous() or not w.is_contiguous():
        raise ValueError("2:4 sparse products take row-major X and W, of which X.t() is column-major")
    check_widths(*w.shape, len(x))


def compressed_mm(
    packed: Tensor, x: Tensor, alpha: Tensor, dtype: torch.dtype, algorithm: Algorithm
) -> Tensor:
    """`[tokens, out]` of a compressed W~ and contiguous X `[tokens, in]`; alpha: `[out]` fp32."""
    return torch._cslt_sparse_mm(
        packed, x.t(), alpha=alpha, out_dtype=dtype, transpose_result=True, alg_id=algorithm.alg_id,
        split_k=algorithm.split_k, split_k_mode=algorithm.split_k_mode,
    )  # fmt: skip


def search(packed: Tensor, x: Tensor, alpha: Tensor, dtype: torch.dtype) -> Algorithm:
    """cuSPARSELt's own search over its algorithms for one shape; it runs all of them."""
    alg_id, split_k, split_k_mode, _ = torch._C._cusparselt.mm_search(packed, x.t(), None, alpha, dtype, True)
    return Algorithm(alg_id, split_k, split_k_mode)


@torch.library.custom_op("stepline::sparse_mm", mutates_args=())
def sparse_mm(
    x: Tensor, w: Tensor, alpha: Tensor, dtype: torch.dtype, alg_id: int, split_k: int, split_k_mode: int
) -> Tensor:
    """alpha X W~^T, `[tokens, out]` in `dtype`, of E4M3 `x` `[tokens, in]` and 2:4 sparse `w` `[out, in]`.

    alpha: 0-dim fp32. The last three: an Algorithm. Raises ValueError for what cuSPARSELt refuses.
    """
    check_sparse_product(x, w, dtype)
    if (groups(w.float()) != 0).sum(-1).max() > 2:
        raise ValueError("a group of 4 has more than two values that are not zero")
    return scaled_mm(Scaled(x, alpha), Scaled(w, torch.ones_like(alpha)).mT, dtype)


@sparse_mm.register_fake
def _(x, w, alpha, dtype, alg_id, split_k, split_k_mode) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


@sparse_mm.register_kernel("cuda")
def by_cusparselt(
    x: Tensor, w: Tensor, alpha: Tensor, dtype: torch.dtype, alg_id: int, split_k: int, split_k_mode: int
) -> Tensor:
    """The same by cuSPARSELt."""
    check_sparse_product(x, w, dtype)
    vector = alpha.expand(w.shape[0]).contiguous()
    return compressed_mm(torch._cslt_compress(w), x, vector, dtype, Algorithm(alg_id, split_k, split_k_mode))


def loaded_version() -> int | None:
    """Of cuSPARSELt, 801 for 0.8.1, by the package that torch loads; where there is none, that of torch's headers."""
    cuda = (torch.version.cuda or "none").split(".")[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        major, minor, patch = map(
            int, importlib.metadata.version(f"nvidia-cusparselt-cu{cuda}").split(".")[:3]
        )
        return 1000 * major + 100 * minor + patch
    return torch.backends.cusparselt.version()


class Cache:
    """Measurements of this machine on disk: a JSON object by key, written whole; one that cannot be read is named in
    `problem`, and measured anew."""

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, None
        self.entries: dict[str, Any] = {}
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(entries, dict):
                raise ValueError("no object")
            self.entries = entries
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self.problem = f"{path} cannot be read ({error}): products are timed anew and it is written again"

    @staticmethod
    def key(device: torch.device, rows: int, cols: int, tokens: int, dtype: torch.dtype) -> str:
        """GPU, versions, shape and types."""
        versions = f"cuSPARSELt {loaded_version()}, torch {torch.__version__}"
        kind = str(dtype).removeprefix("torch.")
        return f"{torch.cuda.get_device_name(device)}, {versions}: {rows} x {cols} x {tokens}, e4m3 to {kind}"

    def put(self, entries: dict[str, Any]) -> None:
        """Adds entries; those of other processes stay. A folder that takes no files is said in `problem`."""
        if self.problem is None:
            with contextlib.suppress(OSError, ValueError):  # another process may have added some
                self.entries = json.loads(self.path.read_text(encoding="utf-8")) | self.entries
        self.entries |= entries
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.entries, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            self.problem = (
                f"{self.path} cannot be written ({error.strerror}): products are timed anew at the next start"
            )


def cache_path() -> Path:
    """$XDG_CACHE_HOME/stepline/products.json, or that in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepline" / "products.json"
