"""The doctor's checks of what is installed. Nothing heavy is imported and no network is used."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from stepline.trainer.run.doctor_report import Check, reason
from stepline.trainer.watch.loggers import has_key, wandb_mode

WITHOUT = {
    "wandb": "runs are not shown in wandb",
    "matplotlib": "`report --png` and the quickstart draw no curve",
    "pyarrow": "`stepline prepare` reads no .parquet",
    "zstandard": "`stepline prepare` reads no .jsonl.zst",
    "tokenizers": "`stepline prepare` takes no tokenizer.json",
    "safetensors": "no models are exchanged with Hugging Face",
    "transformers": "no models are exchanged with Hugging Face",
    "deepspeed": "no DeepSpeed ZeRO",
}
"""Optional packages, and what does not work without each."""


def check_python() -> Check:
    """This Python against the one that is required."""
    needs = SpecifierSet(importlib.metadata.metadata("stepline")["Requires-Python"] or "")
    version = platform.python_version()
    if not needs.contains(version, prereleases=True):
        return Check("python", "broken", version, f"Python {version} is too old: Stepline needs {needs}")
    return Check("python", "ok", version, f"Python {version}")


def requirements() -> dict[str, tuple[Requirement, str | None]]:
    """Stepline's requirements by name, each with the extra that it belongs to; an extra that only joins others
    counts for none."""
    metadata, found = importlib.metadata.metadata("stepline"), {}
    for text in importlib.metadata.requires("stepline") or []:
        requirement = Requirement(text)
        extras = [
            extra
            for extra in metadata.get_all("Provides-Extra") or []
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        ]
        if requirement.marker is None or extras:
            found.setdefault(requirement.name, (requirement, extras[0] if extras else None))
    return found


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> Check:
    """The packages that every training needs, against the required versions."""
    versions, problems = {}, []
    for name, (requirement, extra) in requirements().items():
        if extra is not None:
            continue
        versions[name] = version = installed(name)
        if version is None:
            problems.append(f"{name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{name} is {version} and must be {requirement.specifier}")
    if problems:
        says = f"{', '.join(problems)}: run `pip install -U stepline`"
        return Check("packages", "broken", versions, says)
    return Check("packages", "ok", versions, ", ".join(f"{n} {v}" for n, v in versions.items()))


def check_optional(name: str) -> Check:
    """A package that only some things need."""
    requirement, extra = requirements().get(name, (None, None))
    version = installed(name)
    install = f"pip install -U 'stepline[{extra}]'" if extra else f"pip install -U {name}"
    if version is None:
        return Check(name, "missing", None, f"{WITHOUT[name]}: `{install}`")
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        says = f"{version} is not {requirement.specifier}, and {WITHOUT[name]}: `{install}`"
        return Check(name, "warning", version, says)
    return Check(name, "ok", version, f"version {version}")


def check_wandb() -> Check:
    """The package, whether there is a key, and the mode that a run would use; wandb is not started."""
    package, key, mode = check_optional("wandb"), has_key(), wandb_mode()
    if package.status != "ok":
        return package
    chosen = bool(os.environ.get("WANDB_MODE"))
    value = {"version": package.value, "key": key, "mode": mode if key or mode == "off" else "offline"}
    if mode not in ("online", "offline", "off", "shared"):
        says = f"WANDB_MODE is {mode!r}, which wandb refuses: set it to online, offline or disabled"
        return Check("wandb", "warning", value | {"mode": "off"}, says)
    if (mode == "online" and not key) or (not chosen and not key):
        says = f"{package.says}, no key: runs stay offline until you set WANDB_API_KEY or run `wandb login`"
        return Check("wandb", "warning", value, says)
    where = "key found" if key else "no key"
    by = " by WANDB_MODE" if chosen else ""
    return Check("wandb", "ok", value, f"{package.says}, {where}, runs are {mode}{by}")


def code_version() -> dict[str, str]:
    """Stepline's version, and a hash of its source, which tells apart what an edited checkout does not."""
    folders = Path(__file__).resolve().parent.parent.parent
    digest = hashlib.sha256()
    for part in ("trainer", "models", "comm", "kernels"):
        for file in sorted((folders / part).rglob("*.py")):
            digest.update(f"{file.relative_to(folders)}\0".encode() + file.read_bytes())
    return {"version": installed("stepline") or "unknown", "source": digest.hexdigest()[:12]}


def check_code(code: dict[str, str]) -> Check:
    """Names the version; differences between ranks are looked at elsewhere."""
    return Check("stepline", "ok", code, f"version {code['version']}, source {code['source']}")


def check_compile(on_gpu: bool, thorough: bool) -> Check:
    """What torch.compile needs: a C++ compiler and Python's headers, and triton on GPUs."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    triton = installed("triton") or installed("pytorch-triton")
    value = {"compiler": compiler, "headers": headers.is_file(), "triton": triton}
    lacks = [
        text
        for missing, text in (
            (compiler is None, "a C++ compiler (install g++, or name one by CXX)"),
            (not headers.is_file(), f"{headers} (install Python's development files)"),
            (on_gpu and triton is None, "triton (it comes with torch's CUDA builds)"),
        )
        if missing
    ]
    if lacks:
        # On GPUs run.compile=auto compiles, and without that the run ends.
        do = "set run.compile=false or install it" if on_gpu else "keep run.compile=false"
        says = f"no torch.compile without {' and '.join(lacks)}: {do}"
        return Check("compile", "broken" if on_gpu else "missing", value, says)
    if not thorough:
        return Check("compile", "ok", value, f"{compiler} and Python.h are there (--thorough tries them)")
    try:
        seconds = _compile_something("cuda" if on_gpu else "cpu")
    except Exception as error:
        says = f"torch.compile fails ({reason(error)}): set run.compile=false"
        return Check("compile", "broken" if on_gpu else "warning", value, says)
    return Check("compile", "ok", value | {"seconds": seconds}, f"a function compiled in {seconds:.0f} s")


def _compile_something(device: str) -> float:
    import time

    import torch

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.square() + 1).sum(-1)

    x, start = torch.randn(64, 64, device=device), time.monotonic()
    torch.testing.assert_close(torch.compile(function)(x), function(x))
    return round(time.monotonic() - start, 1)


def check_triton(on_gpu: bool) -> Check:
    """Kernels of GPUs are compiled by it."""
    version = installed("triton") or installed("pytorch-triton")
    if version is not None:
        return Check("triton", "ok", version, f"version {version}")
    if on_gpu:
        says = "no compiled kernels on this GPU: install torch's CUDA build, triton comes with it"
        return Check("triton", "warning", None, says)
    return Check("triton", "missing", None, "not needed without a GPU")


def run_tool(*command: str, seconds: float = 5) -> str | None:
    """What a command prints; None where it is not there, fails or takes longer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def check_slurm() -> Check:
    """sbatch and srun, and whether this is inside a job."""
    job = os.environ.get("SLURM_JOB_ID")
    tools = {tool: shutil.which(tool) is not None for tool in ("sbatch", "srun")}
    version = run_tool("sbatch" if tools["sbatch"] else "srun", "--version", seconds=3)  # may ask the network
    value = {**tools, "version": version, "job": job}
    inside = f", inside job {job}" if job else ", not inside a job"
    if not tools["sbatch"]:
        says = f"no sbatch{inside}: `stepline submit` and `sweep --slurm` go from where SLURM is"
        return Check("slurm", "missing", value, says)
    if version is None:
        says = "sbatch does not answer: SLURM's controller or its configuration is away, submit later"
        return Check("slurm", "warning", value, says)
    return Check("slurm", "ok", value, f"{version}{inside}")
