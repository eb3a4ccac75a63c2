"""`stepline plan --link-mbit`: which sync a link asks for, as a user calls it."""

import io
import json
import math
import subprocess
import sys

import pytest
from rich.console import Console

from stepline.models.flops import flops_per_token, parameter_counts
from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.plan import sync_choice
from stepline.trainer.plan.command import Request, run_plan
from stepline.trainer.plan.sync_choice import Choice, Link, bytes_text, rate_text, seconds_text

DEMO = [
    "parallel.demo.codec=int8", "parallel.demo.density=0.0078125", "parallel.demo.chunk=64",
    "parallel.demo.owner_reduce_above=8",
]  # fmt: skip
"""82 bytes for each 64 x 64 values: .0200 a parameter."""


def ask(config: str | None, *overrides: str, **options) -> Request:
    return Request(config=config, overrides=list(overrides), **options)


def sync_of(capsys, *arguments: str, **options) -> dict:
    run_plan(ask(*arguments, *DEMO, **options), as_json=True)
    return json.loads(capsys.readouterr().out)


def test_a_link_without_a_known_device(capsys):
    plan = sync_of(capsys, "dense-1b", link_mbit=100.0, replicas=4)
    sync, config = plan["sync"], load_config("dense-1b", [])[0]
    total = parameter_counts(config.model).total
    fp32, bf16, demo, random_k, diloco = sync["methods"]
    assert (sync["mbit"], sync["replicas"], sync["shard"], sync["compute_s"]) == (100, 4, 1, None)
    assert fp32["link_s"] == pytest.approx(4 * total * 2 * 3 / 4 * 8 / 100e6)
    assert [m["of_all_reduce"] for m in (bf16, random_k, diloco)] == pytest.approx(
        [1 / 2, 1 / 64, 1 / 32], rel=0.01
    )
    assert demo["link_s"] == pytest.approx(3 * 0.0202 * total * 8 / 100e6, rel=0.01)
    assert demo["bytes_received"] == demo["link_bytes_received"]
    assert {m["step_s"] for m in sync["methods"]} == {None}
    assert sync["best"] == ["parallel.sync=demo"]
    assert "6.38 s instead of 10.5 min, 99.2 times less than all-reduce fp32" in sync["says"]
    assert "computes for 105 min or more" in sync["says"]
    assert "demo int8, 1/128 had a loss 1.2 % above all-reduce's" in sync["says"]
    assert [m["loss_percent"] for m in sync["methods"]] == [0, 0, 1.2, None, None]
    assert {m["codec_s"] for m in sync["methods"]} == {None}
    assert "not measured on GPUs" in sync["notes"][-1]


def test_a_method_whose_loss_was_not_measured_wins_nothing(capsys):
    """Random-k is faster than DeMo here, and DeMo by owners (above 8 replicas) than a bf16 all-reduce."""
    run_plan(ask("dense-1b", link_mbit=100.0, replicas=6), as_json=True)
    sync = json.loads(capsys.readouterr().out)["sync"]
    assert sync["methods"][3]["link_s"] < sync["methods"][2]["link_s"]
    assert sync["best"] == ["parallel.sync=demo"]
    assert "demo sign, 1/50 had a loss .46 % above all-reduce's" in sync["says"]
    assert "faster, but loss not measured: random-k bf16, 1/32 with 11 s" in sync["says"]

    run_plan(ask("dense-1b", link_mbit=100.0, replicas=16), as_json=True)
    sync = json.loads(capsys.readouterr().out)["sync"]
    assert sync["best"] == ["parallel.sync=all_reduce", "precision.reduce=bf16"]
    assert "faster, but loss not measured: demo sign, 1/50, owners with 5.72 s, random-k" in sync["says"]

    console = Console(width=80, file=io.StringIO())
    Choice(load_config("dense-1b", [])[0], Link(100.0, 6, 1)).show(console)
    marked = [line.split(" *")[0].strip() for line in console.file.getvalue().splitlines() if " * " in line]
    assert marked == ["random-k bf16, 1/32", "diloco fp32, H = 32"]
    assert "*: loss not measured" in console.file.getvalue()


def test_the_measured_step_of_a_small_model_on_cpus():
    """RESULTS.md, 3.4M parameters: at 1 Gbit/s DeMo .568 s against bf16 .544 (the codec's 44 ms make it equal), at 100
    Mbit/s .545 against 1.048 and 1.642."""
    tight = ["model.canon=none", "model.tied_embeddings=false", "run.device=cpu"]
    shape = ["hidden_size=192", "num_layers=6", "num_heads=6", "ffn_size=512"]
    config = load_config("quickstart", [*tight, *(f"model.{key}" for key in shape)])[0]
    assert parameter_counts(config.model).total == 3_443_520
    near = Choice(config, Link(1000.0, 2, 1, 0.483, 0.3, "here"))
    bf16, demo = near.whole[1:3]
    assert demo.codec_s == pytest.approx(0.0442)
    assert near.seconds(bf16) == pytest.approx(0.544, rel=0.02)
    assert near.seconds(demo) == pytest.approx(0.568, rel=0.08)
    assert near.best is bf16
    assert "are about equal at 1 Gbit/s between 2 replicas: a step takes 538 ms and 528 ms" in near.sentence()
    far = Choice(config, Link(100.0, 2, 1, 0.483, 0.3, "here"))
    assert [far.seconds(e) for e in far.whole[:3]] == pytest.approx([1.642, 1.048, 0.545], rel=0.05)
    assert far.best.options == ("parallel.sync=demo",)
    assert "not counted" not in far.sentence()
    assert any(
        "in it: demo's encoding and decoding, 44.2 ms by one thread of a CPU" in note for note in far.notes()
    )
    assert far.enough(demo) == pytest.approx(demo.slower * 8 / 1e6 / (0.0483 - 0.0442), rel=1e-6)
    faster = Choice(config, Link(100.0, 2, 1, 0.4, 0.3, "here"))
    assert faster.enough(faster.whole[2]) is None  # encoding alone takes more than a tenth of it

    # the same link on what may be a GPU: said that it is not counted, and how much it may take
    config.run.device = "auto"
    gpu = Choice(config, Link(1000.0, 2, 1, 0.373, 0.25, "here"))
    assert gpu.whole[2].codec_s == 0
    assert "while encoding and decoding, not counted, take less than 54.3 ms" in gpu.sentence()
    assert (
        Choice(config, Link(1000.0, 2, 1, 0.373, 0.25, "here", cpu=True)).best.options == gpu.whole[1].options
    )


def test_compute_of_a_step_decides_what_is_enough(capsys):
    """64 GPUs in 8 replicas of eight, which share a link."""
    options = {"replicas": 8, "world_size": 64, "device": "H100 SXM", "mfu": 0.5}
    plan = sync_of(capsys, "dense-1b", link_mbit=1000.0, **options)
    sync, config = plan["sync"], load_config("dense-1b", [])[0]
    compute = plan["batch_tokens"] * flops_per_token(config.model, config.data.seq_len).total
    compute /= 989e12 * 0.5 * 64
    assert (sync["replicas"], sync["shard"]) == (8, 8)
    assert sync["compute_s"] == pytest.approx(compute)
    assert sync["backward_s"] == pytest.approx(compute * 2 / 3 / plan["grad_accumulation"])
    fp32 = sync["methods"][0]
    assert fp32["link_bytes_sent"] == pytest.approx(8 * fp32["bytes_sent"])
    assert fp32["step_s"] == pytest.approx(compute + fp32["link_s"])
    assert sync["best"] == ["parallel.sync=demo"]
    assert plan["memory"]["total"] > 0

    above = sync_of(capsys, "dense-1b", link_mbit=fp32["harmless_mbit"], **options)["sync"]
    assert above["best"] == ["parallel.sync=all_reduce"]
    assert above["methods"][0]["step_s"] == pytest.approx(1.1 * compute)
    half = sync["methods"][1]["harmless_mbit"]
    halved = sync_of(capsys, "dense-1b", link_mbit=half, **options)["sync"]
    assert halved["best"] == ["parallel.sync=all_reduce", "precision.reduce=bf16"]
    assert "is enough" in halved["says"]


def test_a_device_as_slow_as_a_cpu_is_one(capsys):
    options = {"replicas": 2, "link_mbit": 100.0, "mfu": 1.0}
    for peak, cpu in ((1.1e11, True), (989e12, False)):
        sync = sync_of(capsys, "quickstart", peak_flops=peak, **options)["sync"]
        assert sync["cpu"] is cpu
        assert (sync["methods"][2]["codec_s"] is not None) is cpu


def test_a_step_that_takes_longer_than_one_that_hangs_is_said_so(capsys):
    """An fp32 ring of 4 replicas takes 6 bytes a parameter and step, DiLoCo's as many in one step of 32."""
    total = parameter_counts(load_config("dense-1b", [])[0].model).total
    seconds = math.ceil(total * 6 * 8 / 100e6)
    assert seconds > 600
    late = (
        f"set parallel.timeout_s above {seconds:,} for all-reduce fp32, {seconds:,} for diloco fp32, H = 32: "
    )
    options = {"link_mbit": 100.0, "replicas": 4}
    assert [n for n in sync_of(capsys, "dense-1b", **options)["sync"]["notes"] if n.startswith(late)]
    for limit, said in ((seconds, 0), (seconds / 2 - 1, 1)):
        sync = sync_of(capsys, "dense-1b", f"parallel.timeout_s={limit}", **options)["sync"]
        found = [n for n in sync["notes"] if "timeout_s" in n]
        assert len(found) == said
        assert all(f"{math.ceil(seconds / 2):,} for all-reduce bf16" in n for n in found)

    computed = Choice(load_config("dense-1b", [])[0], Link(1000.0, 4, 1, compute_s=550.0)).patience()
    assert f"above {math.ceil(550 + seconds / 10):,} for all-reduce fp32, " in computed[0]
    assert set(map(len, (sync_choice.rule(m, 2, "them")[1].split("timeout_s") for m in (50.0, 1000.0)))) == {
        1,
        2,
    }


def test_the_ranks_of_a_config_that_says_its_shard(capsys):
    sync = sync_of(capsys, "dense-1b", "parallel.shard=4", link_mbit=10.0, world_size=8)["sync"]
    assert (sync["replicas"], sync["shard"]) == (2, 4)
    sync = sync_of(capsys, "dense-1b", "parallel.shard=4", link_mbit=10.0, replicas=3)["sync"]
    assert (sync["replicas"], sync["shard"]) == (3, 4)
    assert sync_of(capsys, "dense-1b")["sync"] is None


def test_experts_that_ranks_share_make_the_replica(capsys):
    sync = sync_of(capsys, "olmoe-1b-7b", "parallel.experts=8", link_mbit=1000.0, replicas=4)["sync"]
    assert (sync["replicas"], sync["shard"]) == (4, 8)
    with pytest.raises(UserError, match="8 does not divide the 4 ranks of a replica"):
        run_plan(
            ask("olmoe-1b-7b", "parallel.experts=8", link_mbit=9.0, replicas=4, world_size=16), as_json=True
        )


def test_an_exchange_that_overlaps_is_said_so(capsys):
    late = ("dense-1b", "parallel.sync=demo", "parallel.demo.delay=1")
    sync = sync_of(capsys, *late, link_mbit=100.0, replicas=4)["sync"]
    demo = sync["methods"][2]
    assert demo["overlapped_bytes"] == demo["link_bytes_received"]
    assert any("demo's exchange runs beside the next forward and backward" in note for note in sync["notes"])
    sync = sync_of(capsys, *late, link_mbit=100.0, replicas=16)["sync"]
    demo = sync["methods"][2]
    assert demo["overlapped_bytes"] == demo["link_bytes_received"]
    assert any("what owners send on from after the first forward on" in note for note in sync["notes"])


def test_the_table_fits_80_columns_and_is_printed_after_the_plan():
    config = load_config("dense-8b", [*DEMO, "parallel.sync=demo", "parallel.diloco.fragments=3"])[0]
    console = Console(width=80, file=io.StringIO())
    Choice(config, Link(123.4, 64, 8, 2.5, 0.1, "on 512 x H100 SXM at MFU 40% (assumed)")).show(console)
    lines = console.file.getvalue().splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("ratio:"))]
    assert max(map(len, table)) <= 80
    for name in ("all-reduce fp32", "all-reduce bf16", "demo int8, 1/128, owners", "random-k bf16, 1/32"):
        assert any(line.strip().startswith(name) for line in table)
    assert "diloco's is a mean: 3 x" in console.file.getvalue()


def test_command_line():
    command = [
        sys.executable,
        "-m",
        "stepline.trainer",
        "plan",
        "dense-1b",
        "--link-mbit",
        "94",
        "--replicas",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "parallel.sync=demo wins at 94 Mbit/s between 2 replicas" in done.stdout
    assert done.stdout.index("learning rate") < done.stdout.index("How 2 replicas agree over 94 Mbit/s")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dense-1b", "--replicas", "2"], "--replicas needs --link-mbit"),
        (["dense-1b", "--link-mbit", "100"], "--link-mbit needs --replicas"),
        (["dense-1b", "--link-mbit", "100", "--world-size", "8"], "--link-mbit needs --replicas"),
        (["dense-1b", "--link-mbit", "0", "--replicas", "2"], "--link-mbit is 0"),
        (["dense-1b", "--link-mbit", "nan", "--replicas", "2"], "--link-mbit is nan"),
        (["dense-1b", "--link-mbit", "100", "--replicas", "1"], "--replicas is 1; it must be between 2"),
        (
            ["dense-1b", "--link-mbit", "100", "--replicas", "3", "--world-size", "8"],
            "--replicas 3 does not divide the 8 ranks",
        ),
        (
            ["dense-1b", "--link-mbit", "9", "--replicas", "2", "--world-size", "8", "parallel.shard=2"],
            "parallel.shard 2 makes 4 replicas of 8 ranks",
        ),
        (
            ["dense-1b", "--link-mbit", "9", "--world-size", "8", "parallel.shard=3"],
            "parallel.shard 3 does not divide",
        ),
        (["dense-1b", "--link-mbit", "9", "--world-size", "8", "parallel.shard=8"], "two replicas at least"),
        (["--params", "1e9", "--tokens", "1e10", "--link-mbit", "9", "--replicas", "2"], "needs a config"),
    ],
)
def test_mistakes(arguments, sentence, capsys, monkeypatch):
    from stepline.trainer.cli import main

    monkeypatch.setattr(sys, "argv", ["stepline", "plan", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    out, error = capsys.readouterr()
    assert left.value.code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_parameters_that_the_planner_does_not_know_are_refused(monkeypatch):
    known = sync_choice.model_parameters
    monkeypatch.setattr(sync_choice, "model_parameters", lambda model: known(model)[:-1])
    with pytest.raises(UserError, match="does not know all parameters"):
        run_plan(ask("dense-1b", link_mbit=9.0, replicas=2), as_json=True)


def test_numbers_as_text():
    seconds = (0, 0.0141, 2.6, 119, 450, 11520, 1e6)
    assert [seconds_text(s) for s in seconds] == [
        "0 s",
        "14.1 ms",
        "2.6 s",
        "119 s",
        "7.5 min",
        "3.2 h",
        "11.6 days",
    ]
    assert [bytes_text(n) for n in (12, 74_640, 5.27e9)] == ["12 B", "74.6 kB", "5.27 GB"]
    assert [rate_text(n) for n in (94, 1500, 400_000)] == ["94 Mbit/s", "1.5 Gbit/s", "400 Gbit/s"]
