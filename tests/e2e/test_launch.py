"""torchrun, kills, the wheel and the quickstart's own program, each in processes of its own."""

import json
import math
import re
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
STEPLINE = [sys.executable, "-m", "stepline.trainer"]
NARROW = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.ffn_size=128",
    "data.seq_len=64",
    "budget.batch_tokens=1024",
    "parallel.micro_batch=4",
]


def torchrun(ranks: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "stepline.trainer",
    ]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_help_and_version(sh):
    assert "prepare" in sh(*STEPLINE, "--help").stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", sh(*STEPLINE, "--version").stdout)
    for command in ("prepare", "plan", "train", "eval", "generate", "report"):
        assert "Example" in sh(*STEPLINE, command, "--help").stdout


def test_torchrun_trains_evaluates_and_generates(sh, stepline, data, tmp_path):
    run = tmp_path / "run"
    options = [f"run.folder={run}", f"data.path={data}", *NARROW, "budget.tokens=40960", "logging.every=1"]
    sh(*torchrun(2), "train", "quickstart", *options)
    steps = [r for r in rows(run) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert json.loads((run / "outcome.json").read_text())["status"] == "done"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert json.loads((run / "plan.json").read_text())["steps"] == 40
    last = [r for r in rows(run) if "val_loss" in r][-1]
    values = json.loads(stepline("eval", str(run), "--data", str(data), "--json")[0])
    assert values["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert values["val_bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)
    two = json.loads(sh(*torchrun(2), "eval", run, "--data", data, "--json").stdout)
    assert two["sources"] == {data.name: pytest.approx(values["sources"][data.name], rel=1e-9)}
    generate = ("generate", str(run), "--prompt", "def é(", "--max-tokens", "20", "--seed", "3")
    text = [sh(*STEPLINE, *generate).stdout for _ in range(2)]
    assert text[0] == text[1]
    assert text[0].startswith("def é(")
    assert (run / "run_id").read_text().strip()


def test_profile_writes_a_trace(sh, data, tmp_path):
    run = tmp_path / "run"
    options = [
        f"run.folder={run}",
        f"data.path={data}",
        *NARROW,
        "budget.tokens=10240",
        "run.profile=true",
        "logging.wandb=off",
    ]
    sh(*STEPLINE, "train", "quickstart", *options)
    trace = json.loads((run / "profile" / "rank-0.json").read_text())
    assert any("scaled_dot_product" in str(event.get("name")) for event in trace["traceEvents"])


def test_a_mistake_under_torchrun_is_one_sentence_from_one_rank(sh, tmp_path):
    process = sh(*torchrun(2), "train", "quickstart", f"data.path={tmp_path}", code=None)
    assert process.returncode != 0
    said = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "no meta.json" in said[0]
    process = sh(*STEPLINE, "train", "quickstart", "optimizer.lrr=1", code=2)
    assert process.stderr.count("\n") == 1
    assert "did you mean 'lr'" in process.stderr


def test_dry_run_prints_the_resolved_config_and_makes_nothing(sh, data, tmp_path):
    run = tmp_path / "run"
    out = sh(*STEPLINE, "train", "dense-125m", f"data.path={data}", f"run.folder={run}", "--dry-run").stdout
    assert re.search(r"lr: 0\.00\d+  # law: Step Law", out)
    assert re.search(r"weight_decay: 0\.\d+  # law: Power Lines", out)
    assert not run.exists()


def test_wheel_in_a_fresh_environment(sh, data, tmp_path):
    """configs/ travels inside; the wheel's own files are used, from a folder that is no checkout."""
    sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    sh(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    # The dependencies are those of this environment; its editable install of the checkout is not followed.
    site = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(here) + "\n")
    out = sh(python, "-c", "import stepline.trainer.cli as c; print(c.__file__)", cwd=tmp_path).stdout
    assert str(site) in out
    assert "train" in sh(site.parent.parent.parent / "bin" / "stepline", "--help", cwd=tmp_path).stdout
    options = ["run.folder=run", f"data.path={data}", *NARROW, "budget.tokens=2048", "logging.wandb=off"]
    sh(python, "-m", "stepline.trainer", "train", "quickstart", *options, cwd=tmp_path)
    assert [r["step"] for r in rows(tmp_path / "run") if "loss" in r] == [1, 2]
    sh(python, "-m", "stepline.trainer", "report", "run", cwd=tmp_path)
    assert "const COLORS" in (tmp_path / "run" / "report.html").read_text()  # its scripts travel inside, too


def test_quickstart_program(sh, tmp_path):
    """What `make quickstart` runs, with a smaller budget and model (the last validation is of all that is held out):
    the whole way, then its training again over the finished run."""
    small = ["budget.tokens=32768", "model.hidden_size=64", "model.num_layers=1", "model.ffn_size=128"]
    program = [sys.executable, "-m", "stepline.trainer.quickstart", *small]
    out = sh(*program, cwd=tmp_path)
    for word in ("loss, start", "bits per byte", "tokens/s", "runs/quickstart/curve.png"):
        assert word in out.stdout
    assert (tmp_path / "runs" / "quickstart" / "curve.png").stat().st_size > 10_000
    train = [
        sys.executable,
        "-m",
        "stepline.trainer",
        "train",
        "quickstart",
        "run.folder=runs/quickstart",
        *small,
    ]
    assert "is finished" in sh(*train, cwd=tmp_path).stderr


def test_plumbing_of_the_gpu_benchmark(sh):
    """benchmarks/gpu_step.py at a tiny shape on the CPU: the rows, their arithmetic and a loss near ln(vocabulary)."""
    command = [sys.executable, "benchmarks/gpu_step.py", "--device", "cpu", "--shape", "tiny"]
    out = sh(*command, "--no-compile", "--steps", "2", "--json")
    rows = json.loads(out.stdout.splitlines()[-1])["rows"]  # the lines before it have fewer
    assert [row["recompute"] for row in rows] == ["none", "full"]
    for row in rows:
        assert row["tokens_per_step"] == 512
        assert row["loss"] == pytest.approx(math.log(256), abs=0.3)
        assert row["mfu"] is None  # no known peak
    assert rows[0]["loss"] == rows[1]["loss"]
    if not torch.cuda.is_available():
        assert "no CUDA device" in sh(*command[:2], code=1).stderr
