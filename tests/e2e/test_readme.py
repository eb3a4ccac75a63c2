"""Every command of the README runs, in its order, in a folder with a small corpus."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ELSEWHERE = {
    "make quickstart": "test_launch.py::test_quickstart_program runs its program with a smaller budget",
    "make test": "runs this suite",
}
SMALLER = {
    "prepare": ["--vocab-size", "512", "--val-share", "0.1"],
    "train": [
        "model.vocab_size=512", "model.hidden_size=64", "model.num_layers=2", "model.num_heads=4",
        "model.ffn_size=128", "data.seq_len=64", "budget.tokens=20480", "budget.batch_tokens=1024",
        "parallel.micro_batch=4", "run.device=cpu",
    ],
}  # fmt: skip
"""What is added to a command so that it is done in seconds."""


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_readme(sh, corpus, tmp_path):
    (tmp_path / "corpus").symlink_to(corpus)
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = []
    for line in commands():
        if line in ELSEWHERE:
            continue
        words = shlex.split(line)
        verb = next(word for word in words if word in ("prepare", "plan", "train", "eval", "generate"))
        assert words[0] in ("stepline", "torchrun"), line
        out = sh(*words, *SMALLER.get(verb, []), cwd=tmp_path, **environment)
        ran.append((verb, out.stdout, out.stderr))
    assert [verb for verb, _, _ in ran if verb != "plan"] == [
        "prepare",
        "train",
        "train",
        "train",
        "eval",
        "generate",
    ]
    plans, runs = [r for r in ran if r[0] == "plan"], [r for r in ran if r[0] != "plan"]
    assert "GPU-hours" in plans[0][1]
    assert json.loads(plans[1][1])["steps"] > 0
    assert "law: Step Law" in runs[1][1]  # the dry run
    assert "is finished" in runs[3][2]  # the same command again
    assert "bits per byte" in runs[4][1]


def test_the_readme_shows_what_the_quickstart_prints():
    """The block of output is real: every row's name is one that the program prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = (ROOT / "trainer" / "quickstart.py").read_text(encoding="utf-8")
    names = re.findall(r"^│ (\S[^│]*?) +│", text, re.MULTILINE)
    assert len(names) >= 6
    for name in names:
        assert f'"{name}"' in program
    assert (ROOT / "docs" / "quickstart.png").stat().st_size > 10_000
