"""The reversible architecture against the standard one: validation loss at equal parameters, tokens and data.

Both are trained by the trainer on two ranks, each at its own best learning rate (chosen on the `tune` split with one
seed), and compared on `val` with three seeds. What reversibility does to memory is in activation_memory.py; that its
backward is exact is tested. This is about the two streams themselves, at a scale that CPUs can train.

    python benchmarks/revffn_quality.py DATA [--output DIR]

DATA: a folder written by `stepline prepare` with a `tune` split and at most 2048 tokens in its vocabulary.
"""

import argparse
import json
import statistics
from pathlib import Path

from slow_link import run

from stepline.models.config import ModelConfig
from stepline.models.flops import parameter_counts

SHAPES = {
    "standard": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "ffn_size": 384},
    "reversible": {"hidden_size": 128, "num_layers": 8, "num_heads": 2, "ffn_size": 470, "blocks": "revffn"},
    "reversible, wide": {
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "ffn_size": 384,
        "blocks": "revffn",
    },
}
"""The same non-embedding N: twice as deep with streams of half the width, and as deep with streams of the same width
(and an embedding of twice as many values, which the comparison leaves out)."""
LEARNING_RATES = (4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)
STEPS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/revffn_quality"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "losses.json"
    found = json.loads(path.read_text()) if path.exists() else {}

    def loss(name: str, lr: float, seed: int, split: str) -> float:
        key = f"{name}, lr {lr:g}, seed {seed}, {split}"
        if key not in found:
            options = [
                f"optimizer.lr={lr}", f"run.seed={seed}", f"logging.eval_split={split}", f"budget.steps={STEPS}",
                "optimizer.weight_decay=0.1", "logging.every=50", "logging.eval_windows=64",
            ]  # fmt: skip
            rows = run(args.data.resolve(), args.output / "trained", options, SHAPES[name])
            found[key] = rows[-1]["val_loss"]
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{key}: {found[key]:.4f}", flush=True)
        return found[key]

    print("| | N | with embeddings | best lr | loss on val by seed | mean |\n|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        counts = parameter_counts(ModelConfig(vocab_size=2048, **shape))
        lr = min(LEARNING_RATES, key=lambda lr: loss(name, lr, SEEDS[0], "tune"))
        values = [loss(name, lr, seed, "val") for seed in SEEDS]
        said = ", ".join(f"{value:.4f}" for value in values)
        mean, spread = statistics.mean(values), statistics.stdev(values)
        print(
            f"| {name} | {counts.linear:,} | {counts.total:,} | {lr:g} | {said} | {mean:.4f} ± {spread:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
