"""What replicas send each other, by the ledger that the metrics show and by the counters of a node's interface.

    python benchmarks/slow_link_bytes.py DATA [--output DIR] [--methods METHOD ...]

It needs root and iproute2; the nodes are slow_link.py's.

The difference of a long and a short run: without what the start, a checkpoint and the end of a run send.
"""

import argparse
import json
from pathlib import Path

from shaped_link import Link
from slow_link import COUNTED_STEPS, DILOCO, METHODS, TIMED, run

OWNERS = [*METHODS["DeMo 1/50"], "parallel.demo.owner_reduce_above=1"]
TWO_BY_TWO = ["parallel.shard=2", "parallel.micro_batch=4"]
COUNTED = {
    "all-reduce fp32": (1, METHODS["all-reduce fp32"]),
    "all-reduce bf16": (1, METHODS["all-reduce bf16"]),
    "DeMo 1/50": (1, METHODS["DeMo 1/50"]),
    "DeMo 1/50, a step late": (1, METHODS["DeMo 1/50, a step late"]),
    "DeMo 1/50, owners": (1, OWNERS),
    DILOCO: (1, METHODS[DILOCO]),
    "random-k 1/100": (1, METHODS["random-k 1/100"]),
    "all-reduce fp32, 2 x 2": (2, [*METHODS["all-reduce fp32"], *TWO_BY_TWO]),
    "DeMo 1/50, 2 x 2": (2, [*METHODS["DeMo 1/50"], *TWO_BY_TWO]),
    "DeMo 1/50, owners, 2 x 2": (2, [*OWNERS, *TWO_BY_TWO]),
}
"""By method: ranks of a node, which are one replica, and options."""


def count(
    data: Path, folder: Path, link: Link, per_node: int, options: list[str], lengths: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Bytes that a node sends and receives in a step: of its ranks' ledgers (equal shards), and by its interface."""
    seen = []
    for steps in lengths:
        before = link.counters()
        options_now = [*options, f"budget.steps={steps}", "logging.every=1"]
        rows = [
            row
            for row in run(data, folder, options_now, TIMED, link.nodes, per_node=per_node)
            if "loss" in row
        ]
        after = link.counters()
        ledger = [per_node * sum(row[f"bytes_{way}"] for row in rows) for way in ("sent", "received")]
        seen.append([*ledger, *(after[way] - before[way] for way in ("tx", "rx"))])
    names = (("ledger", "sent"), ("ledger", "received"), ("interface", "sent"), ("interface", "received"))
    found: dict[str, dict[str, float]] = {"ledger": {}, "interface": {}}
    for (who, way), short, long in zip(names, *seen, strict=True):
        found[who][way] = (long - short) / (lengths[1] - lengths[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a folder written by `stepline prepare`")
    parser.add_argument("--output", type=Path, default=Path("runs/slow_link"))
    parser.add_argument("--methods", nargs="+", choices=COUNTED, default=list(COUNTED), metavar="METHOD")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print("| | sent a step, ledger | interface / ledger | received a step, ledger | interface / ledger |")
    print("|---|---|---|---|---|")
    found = {}
    with Link() as link:
        for method in options.methods:
            per_node, chosen = COUNTED[method]
            lengths = COUNTED_STEPS.get(method, (6, 26))
            folder = options.output / "timed"
            bytes_of = count(options.data.resolve(), folder, link, per_node, chosen, lengths)
            found[method] = bytes_of
            cells = [
                f"{bytes_of['ledger'][way]:,.0f} | {bytes_of['interface'][way] / bytes_of['ledger'][way]:.3f}"
                for way in ("sent", "received")
            ]
            print(f"| {method} | {' | '.join(cells)} |", flush=True)
            (options.output / "bytes.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
