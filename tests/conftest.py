"""Settings and fixtures of the whole suite."""

import ast
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_configure() -> None:
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # a busy machine must not fail a test
    settings.load_profile("untimed")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where STEPLINE_CI is set a skip, of a whole file too, fails the run: it would hide a lack of proof."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("STEPLINE_CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("skipped, and STEPLINE_CI is set: failed", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """The first worker (of `-n 2`) begins with the tests that ask for the pool of processes, the others with the rest.

    A worker that finds nothing of its kind left helps with the other kind. What is dealt as one is a file, and of those
    that use the pool a function, in the order of the files: so that no worker ends long before another.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False

    class ByPool(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, test = nodeid.split("[")[0].split("::")[:2]
            return f"pool {file} {test}" if test in users_of_pool(config.rootpath / file) else file

        def _assign_work_unit(self, node: object) -> None:
            first = node is self.nodes[0]
            mine = [scope for scope in self.workqueue if scope.startswith("pool ") == first]
            if mine:
                self.workqueue.move_to_end(mine[0], last=False)
            super()._assign_work_unit(node)

    return ByPool(config, log)


@functools.cache
def users_of_pool(file: Path) -> set[str]:
    """The functions of `file` that take a fixture that leads to the pool."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    takes = {f.name: {a.arg for a in f.args.args} for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    found = {"pool", "train", "interrupted"}
    while more := {name for name, arguments in takes.items() if arguments & found} - found:
        found |= more
    return found


@pytest.fixture(scope="session")
def unavailable():
    """Skips a test for want of something; where STEPLINE_CI is set it fails, as a skip would hide a lack of proof."""
    return pytest.fail if os.environ.get("STEPLINE_CI") else pytest.skip


@pytest.fixture(scope="session")
def mount(unavailable):
    """Runs `mount` with these arguments; whoever mounts also unmounts."""

    def run(*arguments: object) -> None:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            unavailable(f"this machine does not let the test mount a disk: {done.stderr.strip()}")

    return run


@pytest.fixture(scope="session")
def benchmark():
    """A script of benchmarks/ as a module, by its name."""

    def load(name: str):
        path = ROOT / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"stepline_benchmark_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def sh():
    """Runs a command, returns the finished process; output is text and part of a failed assertion."""

    def run(*command: str, cwd: Path = ROOT, timeout: float = 600, code: int | None = 0, **env: str):
        process = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=os.environ | {"WANDB_MODE": "offline"} | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if code is not None:
            assert process.returncode == code, (
                f"{command}\n{process.stdout[-3000:]}\n{process.stderr[-5000:]}"
            )
        return process

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with some of the Python library's packages: real text, a second to prepare."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    folder.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("json", "email", "asyncio", "logging", "http", "xml"):
        shutil.copytree(library / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def data(sh, corpus, tmp_path_factory) -> Path:
    """That corpus, prepared by the command with a vocabulary of 512; little is held out, as every run ends with it."""
    folder = tmp_path_factory.mktemp("data") / "small"
    options = ["--vocab-size", "512", "--val-share", "0.01"]
    sh(sys.executable, "-m", "stepline.trainer", "prepare", corpus, "--output", folder, *options)
    return folder


@pytest.fixture(scope="session")
def pool():
    """Four long-lived gloo processes; see tests/pool.py."""
    spec = importlib.util.spec_from_file_location("stepline_test_pool", Path(__file__).with_name("pool.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shared = module.Pool()
    yield shared
    shared.close()
