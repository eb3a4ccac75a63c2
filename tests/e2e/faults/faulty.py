"""`python faulty.py train ...`: the program with faults put in from outside, as the environment's FAULTS (JSON) says.

{"nan": {"7": 1}}                rank 1's loss is NaN in the step with index 7
{"spike": {"30": 1}}             ... or 1000 times as large
{"hang": {"15": 1}}              rank 1 sleeps for ever before step 15, once
{"kill_in_save": {"20": 1}}      rank 1 dies by SIGKILL while it writes the checkpoint of step 20, once
{"sleep": {"step": 0.1, "first_step": 2, "validation": 0.2, "save": 1}}   seconds, added to each of them
{"verify_after": "FILE"}         the data is checked once this file is there
{"awake": "FILE"}                no sleep of a step lasts, and none begins, once this file is there
{"lock_wait": 2}                 seconds that a run waits for another one to leave its folder
{"clock": {"20": 86400}}         the wall clock jumps so many seconds at step 20
{"free_bytes": 1e12}             what the system says of the disk's free space
{"once": "FILE"}                 marks that a fault of the "once" kind has happened
"""

import functools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from stepline.trainer.run.signals import StopSignal

FAULTS = json.loads(os.environ["FAULTS"])
RANK = int(os.environ.get("RANK", 0))
STOP = StopSignal.install()  # as early as the program itself does


def here(kind: str, step: int) -> bool:
    """Whether a fault is asked for at this step on this rank."""
    return FAULTS.get(kind, {}).get(str(step)) == RANK


def first_time() -> bool:
    """Whether the fault has not happened yet; notes that it does."""
    mark = Path(FAULTS["once"])
    if mark.exists():
        return False
    mark.touch()
    return True


def faulty_step(train_step, state, batch, lr):
    step = state.step
    doze(FAULTS.get("sleep", {}).get("step", 0))
    if step == 0:
        doze(FAULTS.get("sleep", {}).get("first_step", 0))
    if here("hang", step) and first_time():
        time.sleep(100_000)
    if str(step) in FAULTS.get("clock", {}):
        jump(FAULTS["clock"][str(step)])
    factor = float("nan") if here("nan", step) else 1000.0 if here("spike", step) else None
    if factor is None:
        return train_step(state, batch, lr)
    hook = state.model.register_forward_hook(lambda _m, _i, out: out._replace(nll=out.nll * factor))
    try:
        return train_step(state, batch, lr)
    finally:
        hook.remove()


def doze(seconds: float) -> None:
    """Sleeps, unless or until the file of "awake" is there."""
    deadline, awake = time.monotonic() + seconds, FAULTS.get("awake")
    while time.monotonic() < deadline and not (awake and Path(awake).exists()):
        time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))


def jump(seconds: float) -> None:
    honest = time.time
    time.time = lambda: honest() + seconds


def slow_evaluate(evaluate, model, loader, device, interrupted):
    def slow() -> int:
        time.sleep(FAULTS["sleep"]["validation"])
        return interrupted()

    return evaluate(model, loader, device, slow)


def late_check(check_file, *arguments, **options):
    deadline = time.monotonic() + 60
    while not Path(FAULTS["verify_after"]).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return check_file(*arguments, **options)


def faulty_save(save, staged, storage_writer, **options):
    time.sleep(FAULTS.get("sleep", {}).get("save", 0))
    step = int(Path(storage_writer.path).name.removeprefix("step-"))
    if here("kill_in_save", step) and first_time():
        write_data = storage_writer.write_data

        def die(plan, planner):
            write_data(plan, planner).wait()
            for file in Path(storage_writer.path).glob(f"__{RANK}_*"):
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        storage_writer.write_data = die
    return save(staged, storage_writer=storage_writer, **options)


def main() -> int:
    from stepline.trainer.data import verify
    from stepline.trainer.run import checkpoint, launch, lock, loop, validation

    loop.train_step = functools.partial(faulty_step, loop.train_step)
    checkpoint.dcp.save = functools.partial(faulty_save, checkpoint.dcp.save)
    if "validation" in FAULTS.get("sleep", {}):
        validation.evaluate = functools.partial(slow_evaluate, validation.evaluate)
    if "verify_after" in FAULTS:
        verify.check_file = functools.partial(late_check, verify.check_file)
    if "free_bytes" in FAULTS:
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(0, 0, int(FAULTS["free_bytes"]))
    lock.WAIT_S = FAULTS.get("lock_wait", lock.WAIT_S)
    config, *overrides = [word for word in sys.argv[2:] if not word.startswith("--resume=")]
    resume = next((word.partition("=")[2] for word in sys.argv if word.startswith("--resume=")), "auto")
    return launch.run_training(config, overrides, resume, STOP)


if __name__ == "__main__":
    try:
        code = main()
    except Exception as error:
        print(repr(error), file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)
