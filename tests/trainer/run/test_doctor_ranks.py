"""The doctor of several ranks: they are made to differ, to stay away and to fail, and all of it is named."""

import contextlib
import io
import json
import os
import platform
import socket
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.comm.probe import Meeting, Rates
from stepline.trainer.errors import UserError
from stepline.trainer.run import doctor_ranks
from stepline.trainer.run.doctor import run_doctor


def named(report: dict, name: str) -> dict:
    (check,) = [check for check in report["checks"] if check["name"] == name]
    return check


def doctor_job(folder: str, changes: dict) -> tuple[int, str]:
    """One rank of a doctor; `changes` make rank 1 another machine."""
    out, rank = io.StringIO(), int(os.environ["RANK"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        if rank == 1 and "torch" in changes:
            stack.enter_context(mock.patch.object(torch, "__version__", changes["torch"]))
        if rank == 1 and "ahead" in changes:
            clock = SimpleNamespace(
                time=lambda: time.time() + changes["ahead"],
                monotonic=time.monotonic,
                perf_counter=time.perf_counter,
            )
            stack.enter_context(mock.patch("stepline.comm.probe.time", clock))
        if rank == 1 and "host" in changes:
            stack.enter_context(mock.patch.object(platform, "node", return_value=changes["host"]))
        if rank == 1:
            folder = changes.get("elsewhere", folder)
            if changes.get("absent"):
                return 0, ""
        code = run_doctor(folder, as_json=True, timeout_s=changes.get("timeout_s", 60))
    return code, out.getvalue()


def test_two_ranks_alike(pool, tmp_path):
    (code, out), (other_code, other_out) = pool.run(2, doctor_job, str(tmp_path), {}, init=False)
    assert (code, other_code, other_out) == (0, 0, "")
    report = json.loads(out)
    assert [r["rank"] for r in report["ranks"]] == [0, 1]
    assert all({"host", "device", "torch", "python", "checks"} <= set(r) for r in report["ranks"])
    rate = named(report, "all-reduce")["value"]
    assert (rate["backend"], rate["ranks"], rate["exact"]) == ("gloo", 2, True)
    assert rate["bus_bytes_per_s"] == pytest.approx(rate["bytes"] / rate["seconds"])  # 2 (n - 1) / n is 1
    assert 0 < rate["latency_s"] < rate["seconds"]
    sync = named(report, "sync")["value"]
    assert sync["mbit"] == pytest.approx(rate["bus_bytes_per_s"] * 8 / 1e6)
    assert sync["replicas"] == 2
    assert named(report, "ranks")["value"] == {
        "size": 2,
        "hosts": {platform.node(): [0, 1]},
        "differ": {},
    }
    assert named(report, "shared folder")["status"] == "ok"
    assert abs(named(report, "clock")["value"]["skew_s"]) < 1
    assert not list(tmp_path.iterdir())


def test_differences_between_ranks_are_named(pool, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "mine").mkdir()
    changes = {"torch": "2.11.0", "ahead": 30, "elsewhere": str(tmp_path / "other")}
    (code, out), _ = pool.run(2, doctor_job, str(tmp_path / "mine"), changes, init=False)
    report = json.loads(out)
    assert code == 1
    ranks = named(report, "ranks")
    assert ranks["status"] == "broken"
    assert ranks["value"]["differ"]["torch"] == {torch.__version__: [0], "2.11.0": [1]}
    assert f"torch is {torch.__version__} on rank 0, 2.11.0 on rank 1" in ranks["says"]
    clock = named(report, "clock")
    assert clock["status"] == "warning"
    assert clock["value"]["skew_s"] == pytest.approx(30, abs=1)
    assert "rank 1's by +30" in clock["says"]
    shared = named(report, "shared folder")
    assert shared["status"] == "broken"
    assert shared["value"]["not_on"] == [1]
    assert "rank 1 does not see" in shared["says"]


def test_machines_are_counted_by_their_names(pool, tmp_path):
    """However many ranks each has: what rank 0 knows of its own node alone says nothing of the others."""
    (code, out), *_ = pool.run(3, doctor_job, str(tmp_path), {"host": "other"}, init=False)
    report = json.loads(out)
    assert code == 0
    assert named(report, "ranks")["value"]["hosts"] == {platform.node(): [0, 2], "other": [1]}
    assert named(report, "sync")["value"]["replicas"] == 2
    assert "between 2 machines" in named(report, "sync")["says"]


def test_a_rank_that_does_not_come_is_named(pool, tmp_path):
    (code, out), _ = pool.run(2, doctor_job, str(tmp_path), {"absent": True, "timeout_s": 1.0}, init=False)
    report = json.loads(out)
    assert code == 1
    assert "rank 1 did not answer" in named(report, "ranks")["says"]
    assert named(report, "disk")["status"] == "ok", "what rank 0 found alone is there"


def test_free_disk_that_differs_is_named():
    reading = dict.fromkeys((*doctor_ranks.MUST_AGREE, *doctor_ranks.MAY_DIFFER, "host"), "x")
    check = doctor_ranks.check_alike([reading | {"free_bytes": n} for n in (80 * 10**9, 79 * 10**9, 10**9)])
    assert check.status == "warning"
    assert "1.0 GB on rank 2 and 80.0 GB on rank 0" in check.says
    device = doctor_ranks.check_alike([reading | {"free_bytes": 1, "device": d} for d in ("H100", "A100")])
    assert (device.status, device.says) == ("warning", "device is H100 on rank 0, A100 on rank 1")


def test_a_port_in_use_is_one_sentence(capsys, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        assert run_doctor(str(tmp_path), as_json=True, timeout_s=2.0) == 1
    report = json.loads(capsys.readouterr().out)
    assert "cannot meet the others" in named(report, "ranks")["says"]
    assert "the port is in use" in named(report, "ranks")["says"]
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK is 2 but there are 2 ranks"):
        run_doctor(str(tmp_path), as_json=True)


def test_a_group_that_does_not_form_or_hangs_is_one_sentence(monkeypatch, tmp_path):
    site = doctor_ranks.Site(
        doctor_ranks.World(0, 1, 0, 1), torch.device("cpu"), tmp_path, thorough=False, timeout_s=0.2
    )
    meeting = Meeting(dist.HashStore(), 0, 1, 60.0)

    def refused(*arguments):
        raise RuntimeError("[/src/gloo/pair.cc:134] timed out connecting: No route to host\nmore")

    monkeypatch.setattr(doctor_ranks, "all_reduce_rates", refused)
    gloo, _, rate = doctor_ranks.measure(meeting, site, 1)
    assert gloo.status == "broken"
    assert "(timed out connecting: No route to host)" in gloo.says
    assert "GLOO_SOCKET_IFNAME" in gloo.says
    assert rate.status == "missing"
    monkeypatch.setattr(doctor_ranks, "all_reduce_rates", lambda *arguments: time.sleep(1))
    gloo, *_ = doctor_ranks.measure(meeting, site, 1)
    assert "no answer in 0 s" in gloo.says
    assert doctor_ranks.hangs()
    deadline = time.monotonic() + 30
    while doctor_ranks.hangs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not doctor_ranks.hangs()


def test_bandwidth_of_the_bus_and_damaged_sums():
    rates = Rates(bytes=64_000_000, seconds=0.1, latency_s=1e-5, exact=True, ranks=4)
    assert rates.bus_bytes_per_s == pytest.approx(1.5 * 640e6)
    assert doctor_ranks.check_all_reduce("nccl", rates).status == "warning"
    wrong = Rates(bytes=64_000_000, seconds=0.001, latency_s=1e-5, exact=False, ranks=4)
    check = doctor_ranks.check_all_reduce("nccl", wrong)
    assert (check.status, "sums over nccl are wrong" in check.says) == ("broken", True)


def test_the_sync_that_a_measured_link_asks_for():
    """dense-1b has 1.317B parameters: all-reduce 4 bytes each for two machines, DeMo by its defaults .02 to .03."""
    rates = Rates(
        bytes=16_000_000, seconds=2 * 15 / 16 * 16e6 * 8 / 94e6, latency_s=1e-3, exact=True, ranks=16
    )
    check = doctor_ranks.check_sync(rates, 2)
    params = 1_317_373_952
    found = check.value["link_s"]
    (demo,) = [label for label in found if label.startswith("demo")]
    assert check.value["mbit"] == pytest.approx(94)
    assert found["all-reduce fp32"] == pytest.approx(4 * params * 8 / 94e6)
    assert found["all-reduce bf16"] == pytest.approx(2 * params * 8 / 94e6)
    assert 0.02 < found[demo] / (params * 8 / 94e6) < 0.03
    assert check.value["best"] == ["parallel.sync=demo"]
    assert check.says == (
        "at 94 Mbit/s between 2 machines a step of 1.3B parameters spends 7.47 min in all-reduce fp32, "
        f"{found[demo]:.3g} s in {demo}, other sizes in proportion: parallel.sync=demo, unless a step computes for "
        "74.7 min or more"
    )
    alone = doctor_ranks.check_sync(Rates(16_000_000, 0.01, 1e-5, exact=True, ranks=4), 1)
    assert alone.value["replicas"] == 4
    assert "between 4 ranks of this machine" in alone.says


def test_on_a_fast_link_between_cpus_the_sync_pays_for_its_encoding():
    """16 s of it for 1.3B parameters, where a bf16 all-reduce takes 2.6 s."""
    rates = Rates(16_000_000, 16e6 / 1e9, 1e-5, exact=True, ranks=2)  # 8 Gbit/s
    check = doctor_ranks.check_sync(rates, 1, cpu=True)
    assert check.value["mbit"] == pytest.approx(8000)
    assert check.value["best"] == ["parallel.sync=all_reduce", "precision.reduce=bf16"]
    assert check.value["codec_s"]["all-reduce bf16"] == 0
    assert max(check.value["codec_s"].values()) == pytest.approx(12.8e-9 * 1_317_373_952, rel=0.2)
    assert doctor_ranks.check_sync(rates, 1).value["best"] == ["parallel.sync=demo"]
    slow = doctor_ranks.check_sync(Rates(16_000_000, 16.0, 1e-5, exact=True, ranks=2), 1, cpu=True)
    assert slow.value["best"] == ["parallel.sync=demo"]
    assert "encoding and decoding counted" in slow.says
