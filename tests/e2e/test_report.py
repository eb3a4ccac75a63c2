"""`stepline report` of real runs, opened in a headless browser: what is drawn, how it fits, what it answers."""

import json
import shutil

import pytest

from ..browser import Browser, find_browser
from .test_launch import NARROW, STEPLINE, rows

COMMON = [*NARROW, "logging.every=1", "logging.wandb=off", "model.vocab_size=512", "logging.eval_windows=8"]
RUNS = {
    "mixture": ["moe-tiny", "budget.tokens=20480", "checkpoint.every=10", "logging.eval_every=5"],
    "both": ["tiny", "budget.steps=12", "model.blocks=revffn", "sparse.mode=s-ste", "optimizer.lr=0.01"],
}
LINES = {
    "loss-tokens": ["loss", "val_loss"],
    "loss-time": ["loss", "val_loss"],
    "val-bits-per-byte": ["val_bits_per_byte"],
    "lr": ["lr"],
    "grad-norm": ["grad_norm"],
    "epoch": ["epoch"],
    "tokens-per-second": ["tokens_per_second"],
    "tflops-per-device": ["tflops_per_device"],
    "memory-gb": ["memory_gb"],
    "expert-load-max": ["expert_load_max"],
    "router-entropy": ["router_entropy"],
    "router-losses": ["router_balance", "router_z"],
    "router-loss": ["router_loss"],
    "router-bias-range": ["router_bias_range"],
    "stream-max": ["stream_max"],
    "flip-rate": ["flip_rate"],
    "beta": ["beta_min", "beta_max"],
}
"""Plots and their metrics; on one CPU rank there are no MFU and no bytes between replicas."""
INK = """[...document.querySelectorAll("figure canvas")].map((canvas) => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let inked = 0;
  for (let i = 3; i < data.length; i += 4) inked += data[i] > 128;
  return inked;
})"""


@pytest.fixture(scope="module")
def runs(sh, data, tmp_path_factory):
    """A mixture that was resumed from its middle, and sparse reversible blocks."""
    place = tmp_path_factory.mktemp("report")
    for name, options in RUNS.items():
        sh(*STEPLINE, "train", *options, f"run.folder={place / name}", f"data.path={data}", *COMMON)
    last = sorted((place / "mixture" / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    config, *options = RUNS["mixture"]
    sh(*STEPLINE, "train", config, *options, f"run.folder={place / 'mixture'}", f"data.path={data}", *COMMON)
    return place


@pytest.fixture
def browser(unavailable):
    program = find_browser()
    if program is None:
        unavailable("no Chromium is installed")
    browser = Browser(program)
    yield browser
    browser.close()


def box(browser: Browser, plot: str) -> tuple[float, float, float, float]:
    """x, y, width and height of a plot's canvas in the window."""
    return browser.value(
        f"""(() => {{ const canvas = document.querySelector('[data-plot="{plot}"] canvas');
        canvas.scrollIntoView({{block: "center"}});
        const r = canvas.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }})()"""
    )


def test_every_plot_is_drawn_at_desktop_and_phone_width(sh, runs, browser, tmp_path):
    html = tmp_path / "compare.html"
    command = [*STEPLINE, "report", runs / "mixture", runs / "both", "--output", html, "--png", "--json"]
    said = json.loads(sh(*command).stdout)
    assert said["report"] == str(html)
    assert said["runs"] == [str(runs / "mixture"), str(runs / "both")]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    every = [row for name in RUNS for row in rows(runs / name)]
    points = {plot: sum(key in row for row in every for key in keys) for plot, keys in LINES.items()}
    for zero in ("experts_dead", "tokens_dropped", "skipped"):
        if any(row.get(zero) for row in every):
            points[zero.replace("_", "-")] = sum(zero in row for row in every)
    heat = sum(len(row["expert_load"]) * len(row["expert_load"][0]) for row in every if "expert_load" in row)
    last = [row for row in every if "expert_load" in row][-1]["expert_load"]
    for width, height, dark in ((1280, 900, False), (390, 844, True)):
        browser.open(html, width, height, dark)
        drawn = browser.value(
            "Object.fromEntries([...document.querySelectorAll('[data-plot]')].map((f) => "
            "[f.dataset.plot, Number(f.dataset.drawn)]))"
        )
        assert drawn == points
        assert browser.value("Number(document.querySelector('[data-heat]').dataset.drawn)") == (
            heat // len(last) + len(last) * len(last[0])  # one layer over all times, all layers at one time
        )
        assert browser.value("Number(document.querySelector('[data-timeline]').dataset.drawn)") >= 6
        assert browser.value(INK + ".every((inked) => inked > 400)"), browser.value(INK)
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("document.documentElement.dataset.error ?? null") is None
        assert float(browser.wait("document.documentElement.dataset.ready")) > 0
        shot = browser.screenshot(tmp_path / f"{width}.png")
        assert shot.stat().st_size > 50_000
        text = browser.value("document.body.textContent")
        for words in ("attempt 2 goes on at step 10", "permanent checkpoint", "model.blocks", "sparse.mode"):
            assert words in text
    assert browser.problems == []


def test_the_page_answers(sh, runs, browser, tmp_path):
    """Values under the pointer, zoom by drag and back, the axis, hidden lines."""
    sh(*STEPLINE, "report", runs / "mixture", "--output", tmp_path / "one.html")
    browser.open(tmp_path / "one.html", 1280, 900)
    steps = [row for row in rows(runs / "mixture") if "loss" in row]
    browser.value(
        "[...document.querySelectorAll('#tools button')].find((b) => b.textContent === 'steps').click()"
    )
    x, y, width, height = box(browser, "lr")
    left, right = x + 52, x + width - 10  # where the first and the last value of the axis stand
    at = steps[12]
    middle = left + (right - left) * at["step"] / steps[-1]["step"]
    browser.mouse("mouseMoved", middle, y + height / 2)
    read = "document.querySelector('[data-plot=lr] .read').innerText"
    assert browser.value(read).split("\n") == [f"step {at['step']}", "learning rate", f"{at['lr']:.5g}"]

    browser.mouse("mousePressed", middle, y + 50, buttons=1)
    browser.mouse("mouseMoved", right, y + 50, buttons=1)
    browser.mouse("mouseReleased", right, y + 50)
    browser.mouse("mouseMoved", left + 1, y + 50)
    assert browser.value(read).startswith(f"step {at['step']}\n")  # now at the left end, in all plots
    browser.value(
        "[...document.querySelectorAll('#tools button')].find((b) => b.textContent === 'Show all').click()"
    )
    browser.mouse("mouseMoved", left + (right - left) / steps[-1]["step"], y + 50)
    assert browser.value(read).startswith("step 1\n")

    hide = "document.querySelector('[data-plot=loss-tokens] button.key').click()"
    browser.value(hide)
    validations = sum("val_loss" in row for row in rows(runs / "mixture"))
    assert browser.value("document.querySelector('[data-plot=loss-tokens]').dataset.drawn") == str(
        validations
    )
    load = "document.querySelector('[data-heat] input[type=range]')"
    browser.value(f"{load}.value = 1; {load}.dispatchEvent(new Event('input'))")
    assert browser.value("document.querySelector('[data-heat] h4').textContent") == "experts × time, layer 1"
    assert browser.problems == []


def test_a_mistake_is_one_sentence(sh, tmp_path):
    said = sh(*STEPLINE, "report", tmp_path, code=2)
    assert (said.stdout, said.stderr) == ("", f"error: {tmp_path} is no run: it has no config.yaml\n")
