"""`make gpu-check`: its table of targets, from what the benchmarks print, and scripts that fail or take too long."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check(benchmark):
    """benchmarks/gpu_check.py as a module."""
    return benchmark("gpu_check")


def step(shape: str, **values) -> dict:
    return {"shape": shape, "micro_batch": 2, "recompute": "full"} | values


FOUND = {
    "step_1b": {
        "rows": [step("1b", mfu=0.51, tokens_per_second=1), step("1b", mfu=0.56), step("1b", error="out")]
    },
    "step_8b": {"rows": [step("8b", error="CUDA out of memory")]},
    "step_8b_fp8": {"rows": [step("8b", tokens_per_second=12000)]},
    "sparse_kernels": {
        "cusparselt": 801,
        "products": [
            {"model": "8b", "rows": 14336, "cols": 4096, "tokens": 8192, "fp8": 3.0, "sparse": 2.0},
            {"model": "8b", "rows": 14336, "cols": 4096, "tokens": 4096, "fp8": 3.0, "sparse": 9.0},
            {
                "model": "8b",
                "rows": 4096,
                "cols": 14336,
                "tokens": 8192,
                "fp8": 3.0,
                "refused": "no such product",
            },
        ],
        "kernels": [
            {"model": "8b", "copy": {"gb_per_s": 4000.0}, "threshold + amax": {"gb_per_s": 3000.0}}
            | {"threshold + cast": {"gb_per_s": 2000.0}}
        ],
    },
    "sparse_step": {
        "cusparselt": 800,
        "layers": [
            {"model": "8b", "tokens": 8192}
            | {name: {"ffn": {"both": ms}} for name, ms in (("bf16", 8.0), ("fp8", 5.0), ("chosen", 4.0))}
        ],
        "steps": [{"model": "8b", "bf16": {"tokens_per_second": 8}, "fp8": {"tokens_per_second": 10}}],
    },
    "moe_step": {"to_dense": {"dense": 1.0, "mixture": 0.8, "mixture by loop_linear": 0.3}},
    "activation_memory": {
        "cells": [
            {
                "ffn": "dense",
                "variant": "RevFFN",
                "depth": d,
                "activations": a,
                "routing_ids": 0,
                "bit_equal": True,
            }
            for d, a in ((8, 100), (64, 103))
        ],
        "times": [{"ffn": "dense", "pair": "width", "wall_over": {"standard, full recompute": 1.05}}],
    },
    "memory": {"rows": [{"ratio": 1.02}, {"ratio": 0.95}]},
    "demo_codec": {"error": "ended after 60 s"},
}
ODD = {"moe_step": {"to_dense": {}}, "activation_memory": {"cells": [], "times": []}}
WANTED = {
    "1.3B: MFU": (0.56, "met"),
    "8B, full recompute: tokens/s": (None, "not measured: CUDA out of memory"),
    "8B 14336 x 4096, 8192 tokens: 2:4 over dense FP8": (1.5, "met"),
    "8B 4096 x 14336, 8192 tokens: 2:4 over dense FP8": (None, "not measured: no such product"),
    "8b threshold + amax: of a copy": (0.75, "met"),
    "8b threshold + cast: of a copy": (0.5, "MISSED"),
    "8B FFN, 8192 tokens: sparse over dense FP8": (1.25, "met"),
    "8B FFN, 8192 tokens: sparse over bf16": (2.0, "met"),
    "mixture's tokens/s over dense's": (0.8, "met"),
    "RevFFN dense: memory at depth 64 over 8": (1.03, "MISSED"),
    "RevFFN dense: gradients bit-equal": (1.0, "met"),
    "RevFFN dense, pair width: step over full recompute": (1.05, "met"),
    "memory: estimate over measured, farthest off": (pytest.approx(0.05), "met"),
    "demo_codec": (None, "not measured: ended after 60 s"),
}


def test_targets(check):
    rows = check.targets(FOUND)
    said = {row.what: (row.measured, row.met) for row in rows if row.what != check.FP8_STEP}
    assert said == WANTED
    steps = [(row.measured, row.met) for row in rows if row.what == check.FP8_STEP]
    assert steps == [(None, "not measured: CUDA out of memory"), (1.25, "met")]
    lines = check.table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert "| RevFFN dense: memory at depth 64 over 8 | 1.03 | <= 1.02 | MISSED |" in lines
    assert check.targets({}) == []
    assert [row.what for row in check.targets(FOUND | ODD) if "not as expected" in row.met] == ["moe_step"]


def test_scripts(check, tmp_path, monkeypatch, capsys):
    """What one prints is kept, with a failure's last words, and one that takes too long is ended with its children."""
    scripts = {
        "sound.py": "import json, sys; print('[1]'); print(json.dumps({'arguments': sys.argv[1:]})); print('noise')",
        "outside.py": "print('{\"rows\": []}'); raise SystemExit(1)",
        "fails.py": "raise RuntimeError('no such device')",
        "slow.py": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(613.25)'])",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(check, "HERE", tmp_path)
    assert check.run(check.Task("a", "sound.py", ("--rows", "2")), True, tmp_path) == {
        "arguments": ["--rows", "2", "--json"]
    }
    assert check.run(check.Task("b", "outside.py"), False, tmp_path) == {"rows": []}
    assert check.run(check.Task("c", "fails.py"), True, tmp_path) == {"error": "RuntimeError: no such device"}
    assert check.run(check.Task("d", "slow.py", limit=3), True, tmp_path) == {"error": "ended after 3 s"}
    assert "time.sleep(613.25)" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout
    said = capsys.readouterr().out
    assert "slow.py , 3 s at most" in said
    assert "d: 3 s, ended after 3 s" in said


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
    for task in check.TASKS:
        main = benchmark(task.script.removesuffix(".py")).main
        for arguments in {task.quick, task.full} - {None}:
            monkeypatch.setattr(sys, "argv", [task.script, *arguments, "--json"])
            with pytest.raises(Read):
                main()
        monkeypatch.setattr(sys, "argv", [task.script, "--no-such-thing"])
        with pytest.raises(SystemExit, match="2"):
            main()
