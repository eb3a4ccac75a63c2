"""A pool of long-lived gloo processes that all distributed tests share.

Starting a process that imports torch costs seconds, a job in a running one costs milliseconds:

    def job(rank_offset):                     # a module-level function of a test file
        return dist.get_rank() + rank_offset

    def test_ranks(pool):
        assert pool.run(4, job, 10) == [10, 11, 12, 13]

Each job finds the environment that torchrun would give it and a fresh default process group. Arguments
and results are pickled: return plain CPU tensors, numbers and strings, no DTensors.
"""

import contextlib
import datetime
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

MAX_WORKERS = 4
GRACE_SECONDS = 5.0  # how long the other ranks may go on after one has failed


class JobError(AssertionError):
    """A job failed, hung or died; the text holds the rank and its traceback or the end of its output."""


class _Worker:
    """One process and the pipe to it; its output goes to a temporary file."""

    def __init__(self) -> None:
        self.pipe, child = Pipe()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(child.fileno())],
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=env,
        )
        child.close()

    def output(self) -> str:
        """The last 4000 characters that the process wrote."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-4000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.log.close()


class Pool:
    """Up to four workers, started when first needed, one torch thread each."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, world_size: int, fn, *args: Any, timeout: float = 120, init: bool = True) -> list:
        """`fn(*args)` on `world_size` ranks; the results by rank.

        With `init` the default process group (gloo) is there when `fn` starts; without it `fn` makes its own
        from the environment. Raises JobError when a rank raises, dies or has not finished after `timeout`
        seconds.
        """
        if not 1 <= world_size <= MAX_WORKERS:
            raise ValueError(f"world_size {world_size} is not in 1..{MAX_WORKERS}")
        while len(self._workers) < world_size:
            self._workers.append(_Worker())
        workers = self._workers[:world_size]
        store, path = _store(), inspect.getfile(fn)
        packed = pickle.dumps(args)
        try:
            for rank, worker in enumerate(workers):
                env = {
                    "RANK": rank,
                    "WORLD_SIZE": world_size,
                    "LOCAL_RANK": rank,
                    "LOCAL_WORLD_SIZE": world_size,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": store.port,
                    "TORCHELASTIC_USE_AGENT_STORE": True,
                }
                env = {key: str(value) for key, value in env.items()}
                job = (path, fn.__module__, fn.__qualname__, packed, env, init, timeout)
                worker.pipe.send_bytes(pickle.dumps(job))
            return self._collect(workers, timeout)
        except JobError:
            raise
        except BaseException:  # interrupted, or a worker died between jobs: no answer may reach the next job
            self.close()
            raise

    def _collect(self, workers: list[_Worker], timeout: float) -> list:
        waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
        results: list = [None] * len(workers)
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                rank = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ok, value = False, f"the process died; its output ends with:\n{workers[rank].output()}"
                    waiting[pipe] = rank  # keeps the pool from being used again
                    deadline = time.monotonic()
                if ok:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {len(workers)}: {value}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if waiting:
            stuck = sorted(waiting.values())
            if not failures:
                outputs = "\n".join(f"rank {r}: {workers[r].output()}" for r in stuck)
                failures.append(f"ranks {stuck} did not finish within {timeout} s\n{outputs}")
            else:
                failures.append(f"ranks {stuck} had not finished and were stopped")
            self.close()
        if failures:
            raise JobError("\n".join(failures))
        return results

    def close(self) -> None:
        """Ends the workers; the next `run` starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()


def _store():
    """The launcher's store, as torchrun keeps one: a rank that came before rank 0's own would wait a second."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _load(path: str, module_name: str, qualname: str):
    """The function, from its file: pytest's importlib mode puts no test folder on sys.path."""
    module = sys.modules.get(module_name)
    if module is None or getattr(module, "__file__", None) != path:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # so that classes of the file unpickle
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    function = module
    for part in qualname.split("."):
        function = getattr(function, part)
    return function


def _run_job(path, module_name, qualname, packed, env, init, timeout):
    import torch.distributed as dist

    environment, folder = dict(os.environ), os.getcwd()
    os.environ.update(env)
    try:
        fn = _load(path, module_name, qualname)
        args = pickle.loads(packed)
        if init:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
        return fn(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_meshes()
        _forget_deepspeed()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        _default_settings()


def _default_settings() -> None:
    """What a job may have set for its process."""
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def _forget_meshes() -> None:
    """DTensor caches the results of sharding propagation, and with them meshes of groups that are gone."""
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()
    with contextlib.suppress(AttributeError):  # the C++ cache came with torch 2.10
        debug._clear_fast_path_sharding_prop_cache()


def _forget_deepspeed() -> None:
    """DeepSpeed keeps its groups for a process, puts a linear function of its own in the place of torch's, and numbers
    parameters and modules, which ranks compare."""
    if "deepspeed.comm" not in sys.modules:
        return
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init, shutdown_init_context
    from deepspeed.utils import groups
    from torch._C._nn import linear
    from torch.nn import functional

    shutdown_init_context()
    comm.cdb = None
    groups._release_process_group_references(None)
    functional.linear = linear
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _serve(pipe: Connection) -> None:
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    _default_settings()
    while True:
        try:
            job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, _run_job(*job)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


if __name__ == "__main__":
    del sys.path[0]  # tests/, whose folders are no packages
    _serve(Connection(int(sys.argv[1])))
