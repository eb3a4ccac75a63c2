"""benchmarks/slow_link.py show, of what a stopped benchmark has left."""

import json
import runpy
from pathlib import Path

import pytest

SHOW = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "slow_link_show.py"))["show"]
METHODS = ("all-reduce fp32", "DeMo 1/50", "DeMo 1/100")


def entry(sent, **seconds):
    return {"sent_by_counter": sent * 1.03, "sent_by_ledger": sent, "seconds": {"unshaped": 0.5} | seconds}


def loss(method, seed, val, split="val"):
    curve = [[100, val + 1], [300, val]]
    return {
        "method": method,
        "seed": seed,
        "val": val,
        "lr": 0.008,
        "bytes": 42_464,
        "split": split,
        "curve": curve,
    }


TIMES = {
    "rates_mbit": [10, 100],
    "methods": {"no network": entry(0, **{"10": 0.5, "100": 0.5}), "DeMo 1/50": entry(1000, **{"10": 0.6})},
}
"""DeMo was stopped after one rate; the others were not begun."""


def shown(folder, capsys, times=None, losses=None):
    for name, content in (("times", times), ("losses", losses)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    SHOW(folder, METHODS)
    return capsys.readouterr().out, sorted(path.name for path in folder.glob("*.png"))


def test_methods_that_were_not_timed_and_seeds_that_are_missing(tmp_path, capsys):
    losses = [
        loss("all-reduce fp32", 0, 4.0),
        loss("all-reduce fp32", 1, 5.0),
        loss("DeMo 1/50", 1, 5.1),
        loss("DeMo 1/50", 2, 9.0),
        loss("DeMo 1/100", 2, 4.2),
        loss("DeMo 1/100", 0, 4.1, split="tune"),
    ]
    out, plots = shown(tmp_path, capsys, TIMES, losses)
    assert "Seconds of a step; without network 0.500" in out
    assert "| DeMo 1/50 | 1,000 | 1.030 | 0.500 | 0.600 | - |" in out
    assert "| all-reduce fp32 | 0.008 | 42,464 | 4.0000, 5.0000 | 4.5000 | +0.00% |" in out
    # of the seeds that both have
    assert "| DeMo 1/50 | 0.008 | 42,464 | 5.1000, 9.0000 | 7.0500 | +2.00% |" in out
    assert "| DeMo 1/100 | 0.008 | 42,464 | 4.2000 | 4.2000 | - |" in out
    assert plots == ["slow_link_loss.png", "slow_link_time.png"]


@pytest.mark.parametrize(
    ("times", "losses", "plots"),
    [
        (TIMES, None, ["slow_link_time.png"]),
        ({"rates_mbit": [10], "methods": {"DeMo 1/50": entry(9, **{"10": 1.0})}}, [], ["slow_link_time.png"]),
        (None, [loss("DeMo 1/50", 0, 4.0)], ["slow_link_loss.png"]),
        (None, [loss("DeMo 1/50", 0, 4.0, split="tune")], []),
        (None, None, []),
    ],
)
def test_half_of_it(tmp_path, capsys, times, losses, plots):
    out, found = shown(tmp_path, capsys, times, losses)
    assert found == plots
    assert ("nothing in" in out) == (not plots)
