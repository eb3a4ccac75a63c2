"""Tokens per second, memory and utilisation of a run."""

import contextlib
import resource
import sys
import time

import torch

from stepline.models.flops import flops_per_token
from stepline.trainer.config import Config
from stepline.trainer.watch.peaks import mfu, peak_flops


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: allocated on the GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Speedometer:
    """Tokens per second of training between two logged steps; validation and saving are not counted."""

    def __init__(
        self, config: Config, device: torch.device, world_size: int, start_step: int, trained_s: float = 0.0
    ) -> None:
        """trained_s: what the steps before took."""
        self.batch_tokens = config.budget.batch_tokens
        self.flops = flops_per_token(config.model, config.data.seq_len).total
        self.device, self.world_size = device, world_size
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.step, self.started, self.idle = start_step, time.perf_counter(), 0.0
        self._trained_s, self._pauses = trained_s, False

    @contextlib.contextmanager
    def paused(self):
        """Time inside is not training time; what the GPU still has to train is."""
        if self._pauses:  # the outer one counts
            yield
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._pauses, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._pauses = False
            self.idle += time.perf_counter() - start

    def trained_s(self) -> float:
        """Seconds of training until now, those of `trained_s` included."""
        return self._trained_s + max(time.perf_counter() - self.started - self.idle, 0.0)

    def lap(self, step: int) -> dict[str, float]:
        """Speed since the lap before; the first lap includes warm-up (compilation, first allocations)."""
        now = time.perf_counter()
        seconds = max(now - self.started - self.idle, 1e-9)
        steps = step - self.step
        self._trained_s += seconds
        self.step, self.started, self.idle = step, now, 0.0
        rate = steps * self.batch_tokens / seconds
        row = {"tokens_per_second": round(rate, 1), "memory_gb": round(memory_gb(self.device), 3)}
        row["tflops_per_device"] = round(rate * self.flops / self.world_size / 1e12, 4)
        if self.peak is not None:
            row["mfu"] = mfu(rate, self.flops, self.peak * self.world_size)
        return row
