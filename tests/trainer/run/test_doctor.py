"""What the doctor says is compared with readings of another kind; what is broken is made so."""

import errno
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from stepline.trainer.run import doctor_machine, doctor_software, limits
from stepline.trainer.run.doctor import run_doctor
from stepline.trainer.run.doctor_report import Check, combine, look

STATUSES = {"ok", "missing", "warning", "broken"}


def examine(capsys, folder, **options) -> tuple[int, dict]:
    """Exit code and the JSON object of a doctor alone."""
    code = run_doctor(str(folder), as_json=True, **options)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


def named(report: dict, name: str) -> dict:
    (check,) = [check for check in report["checks"] if check["name"] == name]
    return check


def test_facts_are_those_of_the_machine(capsys, tmp_path):
    start = time.monotonic()
    code, report = examine(capsys, tmp_path / "runs")
    assert time.monotonic() - start < 10
    assert code == 0
    assert report["ok"] is True
    assert set(report) == {"ok", "checks", "ranks"}
    for check in report["checks"]:
        assert set(check) == {"name", "status", "value", "says"}
        assert check["status"] in STATUSES
        assert check["says"]
        assert "\n" not in check["says"]
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.iterdir()), "the trial files are gone"

    disk = named(report, "disk")["value"]
    assert disk["folder"] == str(tmp_path)
    assert disk["total_bytes"] == shutil.disk_usage(tmp_path).total
    assert disk["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert disk["write_bytes_per_s"] > 0
    assert named(report, "python")["value"] == platform.python_version()
    for name, version in named(report, "packages")["value"].items():
        assert version == importlib.metadata.version(name)
    assert {"torch", "numpy", "pydantic", "sentencepiece"} <= set(named(report, "packages")["value"])
    for name in ("pyarrow", "transformers", "deepspeed"):
        try:
            assert named(report, name)["value"] == importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert named(report, name)["status"] == "missing"
    assert named(report, "open files")["value"]["soft"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert named(report, "threads")["value"]["threads"] == torch.get_num_threads()
    ram = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert named(report, "memory")["value"]["ram_bytes"] == pytest.approx(ram, rel=0.02)
    assert named(report, "gloo")["value"]["works"] is True
    assert len(named(report, "gpus")["value"]) == torch.cuda.device_count()
    (rank,) = report["ranks"]
    assert (rank["host"], rank["torch"]) == (platform.node(), torch.__version__)
    assert not dist.is_initialized()


def test_the_table_fits_80_columns(capsys, tmp_path):
    assert run_doctor(str(tmp_path), as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("training works here")
    assert platform.node() in lines[0]


def no_room(path):
    return SimpleNamespace(total=10**12, used=10**12 - 10**6, free=10**6)


def full_disk(folder, size=0):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("name", "fake", "sentence"),
    [
        ("shutil.disk_usage", no_room, "has 0.00 GB free: a run cannot keep its files, free some space"),
        ("write_speed", full_disk, "cannot be written (No space left on device)"),
    ],
)
def test_a_full_disk_is_broken(capsys, tmp_path, monkeypatch, name, fake, sentence):
    monkeypatch.setattr(f"stepline.trainer.run.doctor_machine.{name}", fake)
    code, report = examine(capsys, tmp_path)
    assert code == 1
    assert report["ok"] is False
    assert named(report, "disk")["status"] == "broken"
    assert sentence in named(report, "disk")["says"]
    assert run_doctor(str(tmp_path), as_json=False) == 1
    assert "training will not work here: disk" in capsys.readouterr().out


def test_disks_that_are_small_or_slow(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    inside = doctor_machine.check_disk(tmp_path / "file" / "runs")
    assert inside.status == "broken"
    assert "Not a directory" in inside.says
    monkeypatch.setattr(doctor_machine, "write_speed", lambda folder: 1e6)
    slow = doctor_machine.check_disk(tmp_path)
    assert (slow.status, "a checkpoint of 1B takes 200 minutes" in slow.says) == ("warning", True)
    monkeypatch.setattr(
        doctor_machine.shutil, "disk_usage", lambda p: SimpleNamespace(total=10**12, free=144 * 10**8)
    )
    small = doctor_machine.check_disk(tmp_path)  # 12 x 12 bytes of 100M parameters
    fits = "a run of up to 100M parameters fits with 10 permanent checkpoints and 2 ephemeral ones"
    assert (small.status, fits in small.says) == ("warning", True)


def test_wandb_missing_without_key_and_by_the_environment(capsys, tmp_path, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    check = doctor_software.check_wandb()
    assert (check.status, check.value["mode"], check.value["key"]) == ("warning", "offline", False)
    assert "WANDB_API_KEY" in check.says
    for mode, key, status, used in (
        ("offline", "", "ok", "offline"),
        ("disabled", "", "ok", "off"),
        ("online", "", "warning", "offline"),
        ("online", "k" * 40, "ok", "online"),
        ("", "k" * 40, "ok", "online"),
        ("sometimes", "k" * 40, "warning", "off"),
    ):
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_API_KEY", key)
        check = doctor_software.check_wandb()
        assert (check.status, check.value["mode"]) == (status, used), mode
    real = doctor_software.installed
    monkeypatch.setattr(doctor_software, "installed", lambda name: None if name == "wandb" else real(name))
    code, report = examine(capsys, tmp_path)
    assert code == 0
    assert named(report, "wandb")["status"] == "missing"
    assert "pip install -U 'stepline[watch]'" in named(report, "wandb")["says"]


def test_packages_that_are_old_or_missing(capsys, tmp_path, monkeypatch):
    fakes = {"torch": "2.3.0", "pyarrow": "3.0", "numpy": None}
    real = doctor_software.installed
    monkeypatch.setattr(
        doctor_software, "installed", lambda name: fakes[name] if name in fakes else real(name)
    )
    code, report = examine(capsys, tmp_path)
    assert code == 1
    assert named(report, "packages")["status"] == "broken"
    assert "torch is 2.3.0 and must be >=2.11" in named(report, "packages")["says"]
    assert "numpy is missing" in named(report, "packages")["says"]
    assert named(report, "pyarrow")["status"] == "warning"
    assert "'stepline[data]'" in named(report, "pyarrow")["says"]


def test_what_is_lost_without_matplotlib(monkeypatch):
    """Training draws nothing."""
    monkeypatch.setattr(doctor_software, "installed", lambda name: None)
    check = doctor_software.check_optional("matplotlib")
    assert (check.status, check.says) == (
        "missing",
        "`report --png` and the quickstart draw no curve: `pip install -U 'stepline[watch]'`",
    )


def test_compile_is_needed_on_gpus_only(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor_software.check_compile(on_gpu=False, thorough=True).status == "missing"
    needed = doctor_software.check_compile(on_gpu=True, thorough=False)
    assert needed.status == "broken"
    assert "run.compile=false" in needed.says


def test_threads_against_cores(monkeypatch):
    monkeypatch.setattr(doctor_machine, "cpu_cores", lambda: 8.0)

    def status(threads, ranks, on_gpu=False):
        check = doctor_machine.check_threads(threads, ranks, on_gpu)
        return check.status, check.says.rpartition("=")[2]

    assert status(8, 1)[0] == status(2, 4)[0] == status(1, 8)[0] == "ok"
    assert status(8, 2) == ("warning", "4")
    assert status(1, 2) == ("warning", "4")
    assert status(1, 2, on_gpu=True)[0] == "ok"
    assert status(1, 9)[0] == "warning"


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_job_inside_nested_groups(tmp_path, monkeypatch, version):
    """As SLURM makes them: the limit is on a group above the process's own."""
    inner, root = "system/job_7/step_0", tmp_path / "cgroup"
    monkeypatch.setattr(limits, "ROOT", root)
    monkeypatch.setattr(limits, "OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    if version == 2:
        (tmp_path / "own").write_text(f"0::/{inner}\n")
        files = {
            f"{inner}/memory.max": "max",
            "system/job_7/memory.max": str(5 << 30),
            "system/memory.max": str(9 << 30),
            f"{inner}/cpu.max": "max 100000",
            "system/job_7/cpu.max": "250000 100000",
        }
    else:
        (tmp_path / "own").write_text(f"4:memory:/{inner}\n3:cpu,cpuacct:/{inner}\n0::/\n")
        files = {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            f"memory/{inner}/memory.limit_in_bytes": str(5 << 30),
            f"cpu/{inner}/cpu.cfs_quota_us": "250000",
            f"cpu/{inner}/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        }
    assert limits.memory_limit() is None
    assert limits.cpu_cores() == 16
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert limits.memory_limit() == 5 << 30
    assert limits.cpu_cores() == 2.5


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_of_a_job_is_without_what_is_in_use(tmp_path, monkeypatch, version):
    """What others of the job have taken counts, but for page cache that makes way."""
    root, group = tmp_path / "cgroup", "job_7/step_0"
    monkeypatch.setattr(limits, "ROOT", root)
    monkeypatch.setattr(limits, "OWN", tmp_path / "own")
    monkeypatch.setattr(doctor_machine, "_available", lambda: 64 << 30)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 << 20}[name])
    if version == 2:
        (tmp_path / "own").write_text(f"0::/{group}\n")
        base, names = root, ("memory.max", "memory.current", "inactive_file")
    else:
        (tmp_path / "own").write_text(f"4:memory:/{group}\n")
        base, names = (
            root / "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        )
    assert (limits.memory_left(), doctor_machine.check_memory(1).value["available_bytes"]) == (None, 64 << 30)
    for inner, limit, used, cache in ((group, 40, 3, 0), ("job_7", 32, 30, 5)):
        (base / inner).mkdir(parents=True, exist_ok=True)
        (base / inner / names[0]).write_text(f"{limit << 30}\n")
        assert limits.memory_limit() == limit << 30
        (base / inner / names[1]).write_text(f"{used << 30}\n")
        stat = f"anon 12\ninactive_file {0 if version == 1 else cache << 30}\n{names[2]} {cache << 30}\n"
        (base / inner / "memory.stat").write_text(stat)
        check = doctor_machine.check_memory(2)
        assert check.value["available_bytes"] == limits.memory_left() == limit - used + cache << 30
    assert "7.5 of 68.7 GB free, a limit of 34.4 GB" in check.says  # 7 GiB
    assert check.status == "ok"
    (base / "job_7" / "memory.stat").write_text("inactive_file 0\n")
    check = doctor_machine.check_memory(4)
    assert (check.value["available_bytes"], check.status) == (2 << 30, "warning")


def test_a_check_that_fails_itself_is_a_warning():
    def fails():
        raise ZeroDivisionError("division by zero")

    check = look("odd", fails)
    assert (check.status, check.says) == (
        "warning",
        "could not be looked at (ZeroDivisionError: division by zero)",
    )


def test_the_worst_of_the_ranks_is_shown_with_its_ranks():
    good, bad = Check("fp8", "ok", 1, "right"), Check("fp8", "warning", None, "wrong")
    disk = Check("disk", "ok", 2, "room")
    joined = combine({0: [good, disk], 1: [bad], 2: [bad], 3: [good]})
    assert joined == [Check("fp8", "warning", None, "on ranks 1-2: wrong"), disk]
    assert combine({0: [bad], 1: [bad]}) == [bad]


def test_the_doctor_imports_nothing_heavy():
    """wandb, transformers and deepspeed are looked up, not imported."""
    program = (
        "import sys; from stepline.trainer.run.doctor import run_doctor; run_doctor('.', True); "
        "print(sorted({'wandb', 'transformers', 'deepspeed', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert out.stdout.splitlines()[-1] == "[]", out.stderr
