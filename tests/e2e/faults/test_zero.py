"""A run behind DeepSpeed that is told to stop: the loop is FSDP2's, and so is what happens."""

import json
import signal

import pytest

pytest.importorskip("deepspeed")


def test_a_signal_on_one_rank(start, tmp_path):
    """All ranks save and leave; the run goes on, and its curve is that of an undisturbed rank without DeepSpeed."""
    folder, straight = tmp_path / "run", tmp_path / "straight"
    # at the law's rate for so short a run (.048) AdamW's first steps make 9 % of a norm out of rounding
    adamw = ["optimizer.name=adamw", "optimizer.lr=0.02"]
    assert start(straight, *adamw, ranks=1).end() == [0]
    zero = [*adamw, "parallel.backend=zero"]
    run = start(folder, *zero).reach(15)
    run.send(signal.SIGTERM, 1)
    assert run.end() == [75, 75], run.text()
    assert run.outcome()["status"] == "continue"
    assert "FutureWarning" not in run.text()
    assert start(folder, *zero).end() == [0, 0]
    mine, theirs = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, straight)
    )
    for key in ("step", "tokens", "loss", "lr", "val_loss", "skipped"):
        assert [r.get(key) for r in mine] == [
            pytest.approx(r[key], rel=1e-5) if key in r else None for r in theirs
        ], key
