"""A picture of a run: loss against tokens."""

from pathlib import Path

from stepline.trainer.errors import UserError
from stepline.trainer.watch.metrics import iter_metrics


def draw_curve(metrics_path: str | Path, output_png: str | Path, title: str | None = None) -> Path:
    """Draws the training loss as a line and the validation losses as points over the tokens seen.

    Where the run knows the validation loss that it should end with, a dashed line stands at it. Losses in nats
    per token. Raises UserError when there is no loss to draw or matplotlib is missing.
    """
    train, val, expected = [], [], None
    for row in iter_metrics(metrics_path):
        if "tokens" in row and row.get("loss") is not None:
            train.append((row["tokens"], row["loss"]))
        if row.get("val_loss") is not None:
            expected = row.get("expected_final_loss")  # of the last one: a resume may have changed the budget
            if "tokens" in row:
                val.append((row["tokens"], row["val_loss"]))
    if not train and not val:
        raise UserError(f"{metrics_path} holds no loss yet; draw the curve after the first logged step")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise UserError("a curve needs matplotlib: pip install 'stepline[watch]'") from None

    figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#1f6feb", linewidth=1.4, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), "o", color="#d1242f", markersize=6, label="validation")
        tokens, loss = val[-1]
        axes.annotate(
            f"{loss:.3f}", (tokens, loss), (0, 9), textcoords="offset points", ha="center", fontsize=12
        )
    if expected is not None:
        axes.axhline(expected, color="#57606a", linestyle="--", linewidth=1.2, label="expected at the end")
    axes.set_xlabel("tokens", fontsize=13)
    axes.set_ylabel("loss (nats per token)", fontsize=13)
    axes.set_title(title or "", fontsize=14)
    axes.tick_params(labelsize=12)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=12)
    output = Path(output_png)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output
