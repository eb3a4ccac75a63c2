"""`make gpu-check`: its table of targets, from what the benchmarks print, and scripts that fail or take too long."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICE = {"device": "a GPU", "gib": 139.8}


@pytest.fixture(scope="module")
def check(benchmark):
    """benchmarks/gpu_check.py as a module, which finds those beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield benchmark("gpu_check")


@pytest.fixture
def report(check, tmp_path):
    return check.Report(tmp_path, DEVICE, True)


def step(**values) -> dict:
    return {
        "shape": "8b",
        "micro_batch": 2,
        "recompute": "full",
        "overrides": ["model.num_layers=16"],
    } | values


def product(rows: int, cols: int, tokens: int, **values) -> dict:
    return {"model": "8b", "rows": rows, "cols": cols, "tokens": tokens, "fp8": 4.0, "fp8_fast": 3.0} | values


FOUND = {
    "step_1b": {"rows": [step(mfu=0.51, tokens_per_second=1), step(mfu=0.56), step(error="out")]},
    "step_8b": {"rows": [step(error="CUDA out of memory")]},
    "step_8b_bf16_cut": {"rows": [step(tokens_per_second=10000)], "ended": "ended after 60 s"},
    "step_8b_fp8": {"rows": [step(tokens_per_second=12000)]},
    "sparse_kernels": {
        "cusparselt": 800,
        "cusparselt_loaded": 801,
        "products": [
            product(14336, 4096, 8192, sparse=2.0),
            product(14336, 4096, 4096, sparse=9.0),
            product(4096, 14336, 8192, refused="no such product"),
        ],
        "kernels": [{"model": "8b", "copy": {"gb_per_s": 4000.0}, "threshold + amax": {"gb_per_s": 3000.0}}],
        "ended": "ended after 70 s",
    },
    "sparse_step": {
        "cusparselt": 800,
        "layers": [
            {"model": "8b", "tokens": 8192}
            | {name: {"ffn": {"both": ms}} for name, ms in (("bf16", 8.0), ("fp8", 5.0), ("chosen", 4.0))}
        ],
    },
    "moe_step": {"layers": 6, "to_dense": {"dense": 1.0, "mixture": 0.8, "mixture by loop_linear": 0.3}},
    "activation_memory": {
        "cells": [
            {"ffn": "dense", "variant": "RevFFN", "depth": d, "activations": a, "routing_ids": 0}
            | {"bit_equal": True}
            for d, a in ((8, 100), (64, 103))
        ],
        "times": [{"ffn": "dense", "pair": "width", "wall_over": {"standard, full recompute": 1.05}}],
        "failures": [{"cell": ["RevFFN", "moe", 8], "error": "RuntimeError: no"}],
        "ended": "error: 1 cells or times failed",
    },
    "memory": {"rows": [{"ratio": 1.02}, {"ratio": 0.95}]},
    "demo_codec": {"ended": "ended after 60 s"},
}
ODD = {"moe_step": {"to_dense": 3}, "activation_memory": {"cells": [], "times": []}}
LATE, FAILED = "not measured: ended after 70 s", "not measured: error: 1 cells or times failed"
WANTED = {
    "1.3B: MFU": (0.56, "met"),
    "8B, full recompute: tokens/s": (None, "not measured: CUDA out of memory"),
    "8B's shape with 16 layers: FP8 step over bf16 step, tokens/s": (1.2, "MISSED"),
    "8B 14336 x 4096, 8192 tokens: 2:4 over the faster dense FP8": (1.5, "met"),
    "8B 14336 x 4096, 16384 tokens: 2:4 over the faster dense FP8": (None, LATE),
    "8B 4096 x 14336, 8192 tokens: 2:4 over the faster dense FP8": (None, "not measured: no such product"),
    "8B 4096 x 14336, 16384 tokens: 2:4 over the faster dense FP8": (None, LATE),
    "8b threshold + amax: of a copy": (0.75, "met"),
    "8b threshold + cast: of a copy": (None, LATE),
    "8B FFN, 8192 tokens: sparse over dense FP8": (1.25, "met"),
    "8B FFN, 8192 tokens: sparse over bf16": (2.0, "met"),
    "mixture's tokens/s over dense's, 6 layers": (0.8, "met"),
    "RevFFN dense: memory at depth 64 over 8": (1.03, "MISSED"),
    "RevFFN dense: gradients bit-equal": (1.0, "met"),
    "RevFFN moe: memory at depth 64 over 8": (None, "not measured: RuntimeError: no"),
    "RevFFN moe: gradients bit-equal": (None, "not measured: RuntimeError: no"),
    "RevFFN dense, pair width: step over full recompute": (1.05, "met"),
    "RevFFN dense, pair layers: step over full recompute": (None, FAILED),
    "RevFFN moe, pair width: step over full recompute": (None, FAILED),
    "RevFFN moe, pair layers: step over full recompute": (None, FAILED),
    "memory: estimate over measured, farthest off of 2 cases": (pytest.approx(0.05), "met"),
    "DeMo: encode and decode of a 1.3B step": (None, "not measured: ended after 60 s"),
}


def test_targets(check):
    rows = check.targets(FOUND)
    assert {row.what: (row.measured, row.met) for row in rows} == WANTED
    lines = check.table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert "| RevFFN dense: memory at depth 64 over 8 | 1.03 | <= 1.02 | MISSED |" in lines
    assert [row.what for row in check.targets(FOUND, "step_8b_fp8")] == [rows[2].what]
    assert check.targets({}) == []
    assert [row.what for row in check.targets(FOUND | ODD) if "not as expected" in row.met] == ["moe_step"]
    nothing = {name: {"ended": "no time left"} for name in FOUND}
    assert {row.met for row in check.targets(nothing)} == {"not measured: no time left"}


LIMITS = (3, 6, 12, 24, 48)
"""Of something that never ends: the first in which it has begun, on however busy cores."""


SCRIPTS = {
    "sound.py": "import json, sys; print('[1]'); print(json.dumps({'arguments': sys.argv[1:]})); print('noise')",
    "outside.py": "print('{\"rows\": []}'); raise SystemExit(1)",
    "fails.py": "raise RuntimeError('no such device')",
    "slow.py": """
import subprocess, sys
print('{"rows": [1]}', flush=True)
print('{"rows": [1, 2', flush=True)
print("it takes long", file=sys.stderr, flush=True)
subprocess.run([sys.executable, '-c', 'import time; time.sleep(613.25)'])
""",
}


def test_scripts(check, report, tmp_path, monkeypatch, capsys):
    """What one prints is kept, with a failure's last words, and one that takes too long is ended with its children."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(check, "HERE", tmp_path)

    def run(*task, quick: bool = True, seconds: float | None = None, **more) -> dict:
        return check.run(check.Task(*task, **more), quick, check.Share(seconds), report, dict(os.environ))

    assert run("a", "sound.py", ("--rows", "2")) == {"arguments": ["--rows", "2", "--json"]}
    assert run("b", "outside.py", quick=False) == {"rows": [], "ended": "exit code 1 without a word"}
    assert run("c", "fails.py") == {"ended": "RuntimeError: no such device"}
    limit, found = next((n, d) for n in LIMITS if "rows" in (d := run("d", "slow.py", limit=n)))
    assert found == {"rows": [1], "ended": f"ended after {limit} s"}
    assert run("e", "slow.py", seconds=14) == {"ended": "no time left"}
    assert "time.sleep(613.25)" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout
    said = capsys.readouterr().out
    assert f"slow.py , {limit} s at most" in said
    assert f"s, ended after {limit} s\n" in said
    log = (tmp_path / "messages.log").read_text()
    assert "=== d: slow.py \nit takes long\n" in log
    assert "RuntimeError: no such device" in log


def test_shares_of_the_seconds(check):
    now = 100.0
    share = check.Share(60, lambda: now)
    assert (share.of(70), share.of(20), share.of(None)) == (60, 20, 60)
    now = 144.0
    assert share.of(70) == 16
    now = 146.0
    assert share.of(70) == 0
    assert (check.Share(None).of(70), check.Share(None).of(None)) == (70, None)


def test_results_are_kept_after_each_task(check, report, tmp_path, capsys):
    report.add("moe_step", FOUND["moe_step"])
    assert "| mixture's tokens/s over dense's, 6 layers | 0.8 | >= 0.75 | met |" in capsys.readouterr().out
    report.add("demo_codec", {"ended": "no time left"})
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == DEVICE | {"quick": True, "tasks": report.tasks}
    assert check.Report(tmp_path, DEVICE, True).tasks == report.tasks
    assert check.Report(tmp_path, DEVICE | {"device": "another"}, True).tasks == {}


TESTS = {
    "test_demo": "def test_sound(): pass\ndef test_unsound(): raise RuntimeError('odd')",
    "test_others": "import time\ndef test_soon(): pass\ndef test_late(): time.sleep(1000)",
    "test_sparse": "import no_such_module",
    "test_zero": "def test_minutes(): pass",
}


def test_files_of_tests(check, report, tmp_path, capsys):
    """Each in a process of its own, which a limit ends; what passed by then counts."""
    for name, text in TESTS.items():
        marked = f"import pytest\npytestmark = pytest.mark.gpu\n{text}\n"
        (tmp_path / f"{name}.py").write_text(marked)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    names = [file.stem for file in check.test_files(tmp_path, False)]
    assert names == ["test_sparse", "test_demo", "test_others", "test_zero"]
    others = tmp_path / "test_others.py"
    limit, late = next(
        (n, d)
        for n in LIMITS
        if (d := check.run_file(others, n, check.Share(None), report, dict(os.environ)))["passed"]
    )
    assert (late["passed"], late["ended"]) == (1, f"ended after {limit} s")
    assert check.described("test_others", late) == f"test_others: 1 passed, ended after {limit} s"
    others.unlink()
    assert not check.run_tests(tmp_path, True, check.Share(None), report, dict(os.environ))
    found = report.tasks["tests"]
    assert list(found) == ["test_sparse", "test_demo"]
    assert found["test_sparse"]["ended"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert (found["test_demo"]["passed"], found["test_demo"]["failed"]) == (1, ["test_unsound"])
    said = capsys.readouterr().out
    assert "test_demo: 1 passed, 1 failed\n    FAILED test_unsound" in said
    assert "test_demo: " in (tmp_path / "messages.log").read_text()


TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate
"""
GROUP = "[rank0]:[W1 01:02:03 ProcessGroupNCCL.cpp:1] Warning: destroy_process_group() was not called\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (TRACEBACK + GROUP, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"),
        (f"[rank0]: {TRACEBACK.splitlines()[-1]}\n{GROUP}", TRACEBACK.splitlines()[-1]),
        ("KeyboardInterrupt\nmore\n", "KeyboardInterrupt"),
        ("an Error of ours\nerror: no such device\n" + GROUP, "error: no such device"),
        ("\n", ""),
    ],
)
def test_reason_of_a_failure(check, text, wanted):
    assert check.reason(text) == wanted


FIND = """
import importlib.metadata, stepline.trainer
print(*stepline.trainer.__path__, importlib.metadata.metadata("stepline")["Requires-Python"])
"""


def test_environment(check, tmp_path, monkeypatch):
    """stepline is found where it is not installed, and what the user has set stands."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    for _ in range(2):
        found = check.environment_of(tmp_path)
    assert found["PYTORCH_ALLOC_CONF"] == found["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    assert found["PYTHONPATH"] == f"{tmp_path}/site:/elsewhere"
    command = [sys.executable, "-S", "-c", FIND]
    done = subprocess.run(command, capture_output=True, text=True, env=found, check=True)
    assert done.stdout.split() == [f"{tmp_path}/site/stepline/trainer", ">=3.11"]


class Read(Exception):
    """The arguments were understood."""


def test_every_script_takes_the_arguments_that_it_is_given(check, benchmark, monkeypatch):
    """Each `main` reads them and is stopped there; one that does not know an argument leaves with exit code 2."""
    parse = argparse.ArgumentParser.parse_args

    def read(self, *arguments):
        parse(self, *arguments)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for task in check.tasks(80) + check.tasks(141):
        main = benchmark(task.script.removesuffix(".py")).main
        for arguments in {task.quick, task.full} - {None}:
            monkeypatch.setattr(sys, "argv", [task.script, *arguments, "--json"])
            with pytest.raises(Read):
                main()
        monkeypatch.setattr(sys, "argv", [task.script, "--no-such-thing"])
        with pytest.raises(SystemExit, match="2"):
            main()
