"""The picture of a run holds the rows of its metrics file."""

import json

import numpy as np
import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.watch.curve import draw_curve


def pixels(path):
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3]
    blue = (image[..., 2] > 0.8) & (image[..., 0] < 0.4)
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.4)
    return image, blue, red


def test_curve(tmp_path):
    rows = [{"step": s, "tokens": s * 1000, "loss": 9 - s / 20} for s in range(1, 101)]
    rows += [{"step": 50, "tokens": 50_000, "val_loss": 6.5}, {"step": 101, "tokens": 101_000, "loss": None}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = draw_curve(metrics, tmp_path / "pictures" / "curve.png", title="a run")
    image, blue, red = pixels(path)
    assert image.shape == (720, 1280, 3)
    # a falling straight line: its height is linear in x
    columns = [x for x in np.flatnonzero(blue.any(0)) if x < 900]  # left of the legend
    heights = np.array([np.flatnonzero(blue[:, x]).mean() for x in columns])
    assert np.corrcoef(columns, heights)[0, 1] > 0.999
    assert red[:, 200:900].sum() > 50  # the validation point at half of the axis


def test_the_expected_loss_is_a_line_across(tmp_path):
    rows = [{"step": s, "tokens": s * 1000, "loss": 9 - s / 20} for s in range(1, 101)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows.append({"step": 100, "tokens": 100_000, "val_loss": 6.5, "expected_final_loss": 5.0})
    (tmp_path / "expected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows.append({"step": 110, "tokens": 110_000, "val_loss": 6.4})  # with another budget nothing is expected
    (tmp_path / "before.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def grey(name):
        image, _, _ = pixels(draw_curve(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png"))
        dark = (abs(image - np.array([0x57, 0x60, 0x6A]) / 255) < 0.02).all(-1)
        return dark[:, 200:800].sum(1).max()

    assert grey("expected") > 200 > max(grey("plain"), grey("before"))


def test_nothing_to_draw(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": null}\n')
    with pytest.raises(UserError, match="holds no loss yet"):
        draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
