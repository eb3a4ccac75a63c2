"""The targets that a GPU has, from what the benchmarks print as JSON: the table of gpu_check.py.

What a benchmark printed may be a part, with `ended`, which says why it went no further: what is there is measured, the
rest is not, for that reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

WHOLE_8B_GIB = 135
"""What the 8B step with all its layers needs: 131 GiB by the estimate, and the CUDA context."""
NEW_CUSPARSELT = 801
"""0.8.1, from which on more is wanted of sparse products."""
LEAST_TOKENS = 8192
SHAPES_8B = ((14336, 4096), (4096, 14336))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: float | None
    """None: not measured."""
    target: float
    least: bool = True
    """Whether the target is the least that is wanted, or the most."""
    why: str = ""
    """Why it was not measured."""

    @property
    def met(self) -> str:
        """In a word."""
        if self.measured is None:
            return f"not measured{self.why and f': {self.why}'}"
        return (
            "met"
            if (self.measured >= self.target) == self.least or self.measured == self.target
            else "MISSED"
        )


def targets(found: dict[str, dict], task: str | None = None) -> list[Row]:
    """Every target of the tasks in `found`, or those that `task` has a part in."""
    rows: list[Row] = []
    for names, read in READERS.items():
        if all(name in found for name in names) and (task is None or task in names):
            try:
                rows += read(*(found[name] for name in names))
            except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
                what = f"its JSON is not as expected ({type(error).__name__}: {error})"
                rows.append(Row(", ".join(names), None, float("nan"), why=what))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown."""
    return "\n".join(["| target | measured | wanted | |", "|---|---|---|---|", *map(line, rows)])


def line(row: Row) -> str:
    """One line of the table."""
    value = "" if row.measured is None else f"{row.measured:.4g}"
    wanted = "" if row.target != row.target else f"{'>=' if row.least else '<='} {row.target:g}"
    return f"| {row.what} | {value} | {wanted} | {row.met} |"


def _why(result: dict) -> str:
    return result.get("ended", "not in its results")


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _best(result: dict, value: str) -> tuple[float | None, str]:
    """The largest value of the rows, or why there is none."""
    rows = result.get("rows", [])
    values = [row[value] for row in rows if row.get(value) is not None]
    errors = [row["error"] for row in rows if "error" in row]
    if not values and rows and not errors:
        return None, "the device's peak is unknown"
    return (max(values), "") if values else (None, errors[0] if errors else _why(result))


def _layers(*results: dict) -> str:
    """How many layers the rows' models have, by what was set."""
    words = [
        word for result in results for row in result.get("rows", []) for word in row.get("overrides", [])
    ]
    found = [word.partition("=")[2] for word in words if word.startswith("model.num_layers=")]
    return found[0] if found else "fewer"


def _step_1b(result: dict) -> Iterator[Row]:
    mfu, why = _best(result, "mfu")
    yield Row("1.3B: MFU", mfu, 0.55, why=why)


def _step_8b(result: dict) -> Iterator[Row]:
    rate, why = _best(result, "tokens_per_second")
    yield Row("8B, full recompute: tokens/s", rate, 9800, why=why)


def _fp8_step(plain: dict, fp8: dict) -> Iterator[Row]:
    (slow, why), (fast, why_fp8) = (_best(result, "tokens_per_second") for result in (plain, fp8))
    what = f"8B's shape with {_layers(plain, fp8)} layers: FP8 step over bf16 step, tokens/s"
    yield Row(what, _ratio(fast, slow), 1.25, why=why or why_fp8)


def _new(result: dict) -> bool:
    """Whether the cuSPARSELt that is loaded is new, or where that is not known the one of torch's headers."""
    return (result.get("cusparselt_loaded") or result.get("cusparselt") or 0) >= NEW_CUSPARSELT


def _sparse_kernels(result: dict) -> Iterator[Row]:
    mine = {
        (row["rows"], row["cols"], row["tokens"]): row
        for row in result.get("products", [])
        if row["model"] == "8b" and row["tokens"] >= LEAST_TOKENS
    }
    wanted = [(*shape, tokens) for shape in SHAPES_8B for tokens in (LEAST_TOKENS, 2 * LEAST_TOKENS)]
    for shape in dict.fromkeys([*wanted, *mine]):
        row, why = mine.get(shape, {}), _why(result)
        dense = [row[name] for name in ("fp8", "fp8_fast") if name in row]
        gain = _ratio(min(dense), row.get("sparse")) if dense else None
        what = f"8B {shape[0]} x {shape[1]}, {shape[2]} tokens: 2:4 over the faster dense FP8"
        yield Row(what, gain, 1.5 if _new(result) else 1.2, why=row.get("refused", why))
    for kernels in result.get("kernels") or [{"model": "8b"}]:
        copy = kernels.get("copy", {}).get("gb_per_s")
        for name in ("threshold + amax", "threshold + cast"):
            share = _ratio(kernels.get(name, {}).get("gb_per_s"), copy)
            yield Row(f"{kernels['model']} {name}: of a copy", share, 0.7, why=_why(result))


def _sparse_step(result: dict) -> Iterator[Row]:
    rows = [row for row in result.get("layers", []) if row["model"] == "8b"]
    for row in rows or [{"tokens": LEAST_TOKENS}]:
        bf16, fp8, chosen = (
            row.get(name, {}).get("ffn", {}).get("both") for name in ("bf16", "fp8", "chosen")
        )
        what, why = f"8B FFN, {row['tokens']} tokens: sparse over", _why(result)
        yield Row(f"{what} dense FP8", _ratio(fp8, chosen), 1.1 if _new(result) else 1.03, why=why)
        yield Row(f"{what} bf16", _ratio(bf16, chosen), 1.6, why=why)


def _moe_step(result: dict) -> Iterator[Row]:
    layers = f", {result['layers']} layers" if "layers" in result else ""
    ratio = result.get("to_dense", {}).get("mixture")
    yield Row(f"mixture's tokens/s over dense's{layers}", ratio, 0.75, why=_why(result))


def _activation_memory(result: dict) -> Iterator[Row]:
    failed = {tuple(f["cell"][:2]): f["error"] for f in result.get("failures", [])}
    for ffn in ("dense", "moe"):
        why = failed.get(("RevFFN", ffn), _why(result))
        mine = {
            cell["depth"]: cell
            for cell in result.get("cells", [])
            if (cell["variant"], cell["ffn"]) == ("RevFFN", ffn)
        }
        bare = {depth: cell["activations"] - cell["routing_ids"] for depth, cell in mine.items()}
        least, most = (min(mine), max(mine)) if len(mine) > 1 else (8, 64)
        growth = _ratio(bare.get(most), bare.get(least))
        yield Row(f"RevFFN {ffn}: memory at depth {most} over {least}", growth, 1.02, False, why)
        equal = float(all(cell["bit_equal"] for cell in mine.values())) if mine else None
        yield Row(f"RevFFN {ffn}: gradients bit-equal", equal, 1, why=why)
    for ffn in ("dense", "moe"):
        for pair in ("width", "layers"):
            rows = [row for row in result.get("times", []) if (row["ffn"], row["pair"]) == (ffn, pair)]
            over = rows[0]["wall_over"]["standard, full recompute"] if rows else None
            what = f"RevFFN {ffn}, pair {pair}: step over full recompute"
            yield Row(what, over, 1.05, False, failed.get(("time", ffn), _why(result)))


def _memory(result: dict) -> Iterator[Row]:
    ratios = [abs(row["ratio"] - 1) for row in result.get("rows", [])]
    what = f"memory: estimate over measured, farthest off of {len(ratios)} cases"
    yield Row(what, max(ratios, default=None), 0.1, False, _why(result))


def _demo_codec(result: dict) -> Iterator[Row]:
    rows = result.get("milliseconds", {})
    share = rows.get("kernels", rows.get("torch", {})).get("share")
    yield Row("DeMo: encode and decode of a 1.3B step", share, 0.03, False, _why(result))


READERS: dict[tuple[str, ...], Callable[..., Iterator[Row]]] = {
    ("step_1b",): _step_1b,
    ("step_8b",): _step_8b,
    ("step_8b_bf16_cut", "step_8b_fp8"): _fp8_step,
    ("sparse_kernels",): _sparse_kernels,
    ("sparse_step",): _sparse_step,
    ("moe_step",): _moe_step,
    ("activation_memory",): _activation_memory,
    ("memory",): _memory,
    ("demo_codec",): _demo_codec,
}
