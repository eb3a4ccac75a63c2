"""Every command of the README runs, in its order, in a folder with a small corpus."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ELSEWHERE = {
    "make quickstart": "test_launch.py::test_quickstart_program runs its program with a smaller budget",
    "make test": "runs this suite",
}
SHAPE = [
    "model.vocab_size=512", "model.hidden_size=64", "model.num_layers=2", "model.num_heads=4", "model.ffn_size=128",
    "data.seq_len=64", "run.device=cpu",
]  # fmt: skip
SMALLER = {
    "prepare": ["--vocab-size", "512", "--val-share", "0.1"],
    "train": [*SHAPE, "budget.tokens=20480", "budget.batch_tokens=1024", "parallel.micro_batch=4"],
    "sweep": [
        *SHAPE, "--sizes", "0.5", "--tokens", "20480", "--lr", "0.001,0.002", "--batch-tokens", "1024",
    ],
}  # fmt: skip
"""What is added to a command so that it is done in seconds."""


VERBS = (
    "doctor", "prepare", "plan", "sweep", "laws", "train", "report", "eval", "generate", "export", "import",
)  # fmt: skip


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme(sh, stepline, corpus, tmp_path, monkeypatch):
    """Those of one process in this one, and a first one in its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").symlink_to(corpus)
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = []
    for line in commands():
        if line in ELSEWHERE:
            continue
        words = shlex.split(line, comments=True)
        verb = next(word for word in words if word in VERBS)
        assert words[0] in ("stepline", "torchrun"), line
        words += SMALLER.get(verb, [])
        if words[0] == "torchrun" or not ran:
            done = sh(*words, cwd=tmp_path, **environment)
            ran.append((verb, done.stdout, done.stderr))
        else:
            ran.append((verb, *stepline(*words[1:])))
        if verb == "sweep" and "--dry-run" not in words:
            assert "2 of 2 runs" in ran[-1][1]
            # Two runs make no law: the next commands get the sweep that the quickstart's law was fitted on.
            shutil.copy(
                ROOT / "configs" / "laws" / "quickstart.csv", tmp_path / "sweeps" / "mine" / "runs.csv"
            )
    assert sorted({verb for verb, _, _ in ran}) == sorted(VERBS)
    said = {verb: [(out, err) for v, out, err in ran if v == verb] for verb in VERBS}
    assert "training works here" in said["doctor"][0][0]
    assert "GB/s on the bus" in said["doctor"][1][0]
    assert "GPU-hours" in said["plan"][0][0]
    assert json.loads(said["plan"][1][0])["steps"] > 0
    assert "wins at 94 Mbit/s" in said["plan"][2][0]
    assert (
        "muon" in said["plan"][3][0]
    )  # the quickstart's law does not fit the plan's optimizer, which is said
    assert "regret" in said["laws"][1][0]
    assert "law: Step Law" in said["train"][0][0]  # the dry run
    assert "is finished" in said["train"][2][1]  # the same command again
    assert "bits per byte" in said["eval"][0][0]
    assert (tmp_path / "hf" / "mine" / "config.json").is_file()
    assert "run.init_from=" in said["import"][0][0]


def test_the_readme_shows_what_the_quickstart_prints():
    """The block of output is real: every row's name is one that the program prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = (ROOT / "trainer" / "quickstart.py").read_text(encoding="utf-8")
    names = re.findall(r"^│ (\S[^│]*?) +│", text, re.MULTILINE)
    assert len(names) >= 6
    for name in names:
        assert f'"{name}"' in program
    assert (ROOT / "docs" / "quickstart.png").stat().st_size > 10_000
