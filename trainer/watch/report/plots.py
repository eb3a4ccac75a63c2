"""What a report shows: its plots, in their order, for the page and for the picture alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stepline.trainer.watch.report.read import Run


@dataclass(frozen=True)
class Line:
    """One metric in a plot."""

    key: str
    """Of metrics.jsonl."""
    label: str


@dataclass(frozen=True)
class Plot:
    """Metrics that share an axis."""

    id: str
    section: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    x: str | None = None
    """`tokens` or `seconds`; None: whatever the reader has chosen, tokens at first."""
    log: bool = False
    """Whether the vertical axis is logarithmic at first; the reader can change it."""
    percent: bool = False
    """Values are shares of 1."""
    noisy: bool = True
    """Whether smoothing, where the reader asks for it, helps; False for what follows a rule or counts."""
    note: str = ""
    expected: bool = False
    """Whether the loss that the run should end with is a dashed line in it."""
    settled: bool = False
    """Whether the vertical axis fits what comes after the first fiftieth of the run, which begins far above it."""


LOSSES = (Line("loss", "training"), Line("val_loss", "validation"))
TRAINING, VALIDATION, SPEED, LINKS = "Training", "Validation", "Speed and memory", "Traffic"
MIXTURE, REVERSIBLE = "Mixture of experts", "Reversible blocks"
SPARSE, OTHER = "2:4 sparse and FP8 layers", "Other"
SECTIONS = ("Loss", VALIDATION, TRAINING, SPEED, LINKS, MIXTURE, REVERSIBLE, SPARSE, OTHER)


def _one(key: str, section: str, title: str, unit: str, **more) -> Plot:
    return Plot(key.replace("_", "-"), section, title, unit, (Line(key, title.lower()),), **more)


PLOTS = (
    Plot(
        "loss-tokens", "Loss", "Loss against tokens", "nats per token", LOSSES, x="tokens", expected=True,
        settled=True, note="Without log, the first values may lie above the frame.",
    ),
    Plot(
        "loss-time", "Loss", "Loss against time", "nats per token", LOSSES, x="seconds", expected=True, settled=True,
        note="Without validation, saving and the time between attempts.",
    ),
    _one("val_bits_per_byte", "Loss", "Validation", "bits per byte"),
    _one("lr", TRAINING, "Learning rate", "", noisy=False),
    _one("grad_norm", TRAINING, "Gradient norm", "", log=True, note="Before clipping, over all parameters."),
    _one("epoch", TRAINING, "Epoch", "passes over the data", noisy=False),
    _one("skipped", TRAINING, "Updates skipped", "so far", noisy=False, note="NaNs and spikes."),
    _one("tokens_per_second", SPEED, "Throughput", "tokens/s", note="Of all ranks together."),
    _one("mfu", SPEED, "MFU", "of the devices' peak", percent=True),
    _one("tflops_per_device", SPEED, "Model FLOP/s", "TFLOP/s per device"),
    _one("memory_gb", SPEED, "Memory", "GB, peak of rank 0", noisy=False),
    Plot(
        "bytes", LINKS, "Between replicas", "bytes per step",
        (Line("bytes_sent", "sent"), Line("bytes_received", "received")),
        noisy=False, note="What rank 0 sends to other replicas and receives from them.",
    ),
    _one("expert_load_max", MIXTURE, "Largest load", "max / mean", note="Of the worst layer; 1 is an even share."),
    _one("experts_dead", MIXTURE, "Dead experts", "experts of all layers", note="Got no token in the step."),
    _one("router_entropy", MIXTURE, "Router entropy", "nats", note="Mean over tokens and layers."),
    _one("tokens_dropped", MIXTURE, "Dropped", "of all assignments", percent=True),
    Plot(
        "router-losses", MIXTURE, "Balance and z losses", "per token",
        (Line("router_balance", "balance"), Line("router_z", "z")),
        note="Before their weights; uniform routing gives a balance loss of 1.",
    ),
    _one("router_loss", MIXTURE, "Router's loss", "per token, weighted", note="What is added to the loss."),
    _one("router_bias_range", MIXTURE, "Bias range", "max - min", note="Of the layer with the widest range."),
    _one("stream_max", REVERSIBLE, "Largest stream value", "", log=True),
    _one("residual", REVERSIBLE, "Residual of the inverse", "", log=True),
    _one("flip_rate", SPARSE, "Flip rate", "of all mask entries", percent=True),
    Plot("beta", SPARSE, "Scale of weights", "beta", (Line("beta_min", "smallest"), Line("beta_max", "largest"))),
    _one("fp8_flushed", SPARSE, "Lost to FP8", "of the weights that are not zero", percent=True),
)  # fmt: skip

UNPLOTTED = {"skipped_in_a_row", "expected_final_loss", "tokens", "step", "val_tokens"}


def plots_of(runs: Sequence[Run]) -> tuple[list[Plot], list[Plot]]:
    """The plots for which a run has values, by section: validation by source and unknown metrics too; and those among
    them whose values are all 0, which are only named.

    A line that no run has is left out of its plot.
    """
    keys = sorted(
        {key for run in runs for key in run.series}, key=lambda key: (_metric(key) != "val_loss", key)
    )
    known = {line.key for plot in PLOTS for line in plot.lines}
    extra = [_by_source(metric, keys) for metric in dict.fromkeys(_metric(key) for key in keys)]
    sourced = {line.key for plot in extra for line in plot.lines}
    extra += [
        Plot(f"other-{i}", VALIDATION if key.startswith("val_") else OTHER, key, "", (Line(key, key),))
        for i, key in enumerate(sorted(set(keys) - known - sourced - UNPLOTTED))
    ]
    plots = [
        replace(plot, lines=tuple(line for line in plot.lines if line.key in keys))
        for plot in (*PLOTS, *extra)
    ]
    plots = sorted((plot for plot in plots if plot.lines), key=lambda plot: SECTIONS.index(plot.section))
    zero = [plot for plot in plots if not any(any(value) for value in _values(plot, runs))]
    return [plot for plot in plots if plot not in zero], zero


def _values(plot: Plot, runs: Sequence[Run]) -> Iterator[list[float]]:
    return (run.series[line.key].value for run in runs for line in plot.lines if line.key in run.series)


def _metric(key: str) -> str:
    return key.partition("/")[0]


def _by_source(metric: str, keys: list[str]) -> Plot:
    """Of the values `metric/SOURCE`, one line for each source."""
    names = {
        "val_loss": ("Validation loss by source", "nats per token"),
        "val_bits_per_byte": ("Validation by source", "bits per byte"),
    }
    title, unit = names.get(metric, (metric, ""))
    found = tuple(
        Line(key, key.partition("/")[2]) for key in keys if key.startswith("val_") and key.startswith(f"{metric}/")
    )  # fmt: skip
    return Plot(f"source-{metric.replace('_', '-')}", VALIDATION, title, unit, found)
