"""Every command of docs/guide.md, in its order and on one rank, in this process."""

import re
import shlex
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = [
    "model.vocab_size=512", "model.hidden_size=64", "model.num_layers=2", "model.num_heads=4", "model.ffn_size=128",
    "data.seq_len=64", "run.device=cpu", "budget.tokens=4096", "budget.batch_tokens=1024", "parallel.micro_batch=4",
    "logging.wandb=off", "checkpoint.every=2",
]  # fmt: skip
SMALLER = {"prepare": ["--val-share", "0.1", "--workers", "1"], "train": SHAPE}
VERBS = {"doctor", "prepare", "plan", "train", "report", "submit", "eval", "generate", "export"}


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").replace("step-000500", "step-000002")
    text = text.replace("--vocab-size 32000", "--vocab-size 512")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def arguments(words: list[str]) -> list[str]:
    """The command's own, without how its processes are started."""
    if words[0] == "torchrun":
        assert words[1:5] == ["--nproc-per-node", "2", "-m", "stepline.trainer"]
        return words[5:]
    assert words[0] == "stepline"
    return words[1:]


def test_every_command_of_the_guide(stepline, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").symlink_to(corpus)
    shutil.copytree(corpus / "json", tmp_path / "notes")
    said: dict[str, list[str]] = {verb: [] for verb in VERBS}
    for words in commands():
        verb, *rest = arguments(words)
        said[verb].append("".join(stepline(verb, *rest, *SMALLER.get(verb, []))))
    assert all(said.values())
    assert "training works here" in said["doctor"][0]
    assert "# law: Step Law" in said["train"][0]
    assert "done at step 4" in said["train"][1]
    assert "is finished" in said["train"][2]
    assert "perplexity" in said["eval"][0]
    head, *lines = said["eval"][1].splitlines()
    assert head == "runs/mine/checkpoints/step-000004, split val, split train"
    assert [line.split()[0] for line in lines] == [
        "mine:val", "mine:train", "notes:val", "notes:train", "together",
    ]  # fmt: skip
    assert '"bytes"' in said["eval"][2]
    assert said["generate"][0].startswith("def read(")
    assert "#SBATCH --nodes=4" in said["submit"][0]
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "hf" / "mine" / "config.json").is_file()


def test_links_between_the_pages():
    """Every file that a page of docs/ or the README names as a link is there."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)
