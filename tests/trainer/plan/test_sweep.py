"""The layout of a sweep in numbers: shapes, grids, rounding, weight decay, order and cost."""

import io
import math
import subprocess
import sys
from itertools import product

import pytest
from rich.console import Console

from stepline.models.config import ModelConfig
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.grid import Grid, log2_grid
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.screen import short
from stepline.trainer.plan.shapes import scaled_shape, widened_shape
from stepline.trainer.plan.sweep import lay_out
from stepline.trainer.plan.sweep_cost import (
    START_SECONDS,
    Rate,
    find_gpus,
    find_rate,
    matmul_rate,
    sweep_cost,
)
from stepline.trainer.plan.sweep_show import show

SMALL = ModelConfig(
    vocab_size=2048, hidden_size=128, num_layers=2, num_heads=4, ffn_size=384, tied_embeddings=True
)
GROUPED = ModelConfig(
    vocab_size=100, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336
)


def linear_weights(model: ModelConfig) -> int:
    """N by the shapes of the seven matrices of a block."""
    h, q = model.hidden_size, model.num_heads * model.dim_per_head
    kv = (model.num_kv_heads or model.num_heads) * model.dim_per_head
    matrices = [
        (q, h),
        (kv, h),
        (kv, h),
        (h, q),
        (model.ffn_size, h),
        (model.ffn_size, h),
        (h, model.ffn_size),
    ]
    return model.num_layers * sum(rows * columns for rows, columns in matrices)


def config_of(model: ModelConfig = SMALL, **sections) -> Config:
    base = {"model": model.model_dump(), "data": {"seq_len": 128}, "budget": {"tokens": 3_000_000}}
    return Config.model_validate(base | sections)


@pytest.mark.parametrize("model", [SMALL, GROUPED])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0, 2.0])
def test_scaled_shapes(model, fraction):
    shape = scaled_shape(model, fraction)
    if fraction == 1:
        assert shape == model
    n, wanted = linear_weights(shape), fraction * linear_weights(model)
    # Widths come in steps of a head: with few heads the nearest is farther.
    assert abs(math.log(n / wanted)) < (0.5 if model is SMALL else 0.05)
    assert shape.dim_per_head == model.dim_per_head
    assert shape.hidden_size / shape.num_heads == model.hidden_size / model.num_heads
    assert shape.num_heads / shape.kv_heads == model.num_heads / model.kv_heads
    assert (
        abs(shape.ffn_size / shape.hidden_size - model.ffn_size / model.hidden_size) <= 4 / shape.hidden_size
    )
    assert shape.ffn_size % 8 == 0
    assert shape.num_layers >= 2
    aspect = shape.hidden_size / shape.num_layers / (model.hidden_size / model.num_layers)
    assert 0.25 <= aspect <= 2


def test_the_shape_is_the_best_by_the_stated_objective():
    """Every shape with 2 to 40 layers and 4 to 40 heads, scored again."""
    for fraction in (0.1, 0.3, 0.7):
        wanted = fraction * linear_weights(GROUPED)

        def score(layers, heads, wanted=wanted):
            hidden, ffn = heads * 128, round(heads * 128 * 3.5 / 8) * 8
            n = layers * (2 * hidden * hidden + 2 * hidden * (heads // 4) * 128 + 3 * hidden * ffn)
            return abs(math.log(n / wanted)) + 0.3 * abs(math.log(hidden / layers / (4096 / 32)))

        found = scaled_shape(GROUPED, fraction)
        best = min(score(layers, heads) for layers, heads in product(range(2, 41), range(4, 41, 4)))
        assert score(found.num_layers, found.num_heads) == pytest.approx(best)


def test_a_shared_expert_is_scaled_too():
    """And an expert's width stays what grouped products take, however wide a head is."""
    model = load_config(
        "moe-tiny", ["model.hidden_size=96", "model.num_heads=8", "model.moe.shared_size=64"]
    )[0].model
    for fraction in (0.1, 0.25, 0.5, 2.0):
        shape = scaled_shape(model, fraction)
        assert shape.hidden_size % 8 == 0
        assert shape.moe.shared_size == max(8, round(64 * shape.hidden_size / 96 / 8) * 8)
        assert abs(shape.moe.shared_size / shape.hidden_size - 64 / 96) <= 4 / shape.hidden_size
    config = Config.model_validate(
        {"model": model.model_dump(), "data": {"seq_len": 128}, "budget": {"tokens": 3_000_000}}
    )
    run = lay_out(config, Grid(sizes=(0.25,), lr_points=1, batch_points=1), STEP_LAW, None).runs[0]
    assert "model.moe.shared_size=" in " ".join(run.overrides())
    assert load_config("moe-tiny", ["model.num_heads=8", *run.overrides()])[0].model == scaled_shape(
        model, 0.25
    )


def test_widths():
    shape = widened_shape(SMALL, 192)
    assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.ffn_size) == (192, 2, 6, 576)
    assert linear_weights(shape) == 2 * (4 * 192**2 + 3 * 192 * 576)
    with pytest.raises(UserError, match=r"--widths 100 is no multiple of 32, .* the nearest is 96"):
        widened_shape(SMALL, 100)
    with pytest.raises(UserError, match="no multiple of 512, the width of 4 heads"):
        widened_shape(GROUPED, 640)


def test_log2_grid():
    assert log2_grid(8.0, 5) == [2, 4, 8, 16, 32]
    assert log2_grid(8.0, 2) == [4, 8]
    assert log2_grid(8.0, 1) == [8]


def test_default_layout_in_numbers():
    layout = lay_out(config_of(), Grid(), STEP_LAW, None, eval_tokens=1000)
    assert len(layout.runs) == 3 * 3 * 5 * 3
    assert len({run.name for run in layout.runs}) == 135
    own = 2 * (4 * 128**2 + 3 * 128 * 384)
    sizes = sorted({run.params for run in layout.runs})
    assert sizes == [106_496, 239_616, own]
    for n in sizes:
        of_size = [run for run in layout.runs if run.params == n]
        ratios = sorted({run.tokens for run in of_size})
        assert [d / n / (3e6 / own) for d in ratios] == pytest.approx([0.5, 1, 2], rel=0.02)
        for d in ratios:
            cell = [run for run in of_size if run.tokens == d]
            rates = sorted({run.lr for run in cell})
            batches = sorted({run.batch_tokens for run in cell})
            assert len(cell) == 15
            assert {(run.lr, run.batch_tokens) for run in cell} == set(product(rates, batches))
            law = 1.79 * n**-0.713 * d**0.307
            assert rates == pytest.approx([law * 2**k for k in (-2, -1, 0, 1, 2)], rel=6e-3)
            best = 0.58 * d**0.571
            assert batches == [batches[0], 2 * batches[0], 4 * batches[0]]
            assert batches[0] % 128 == 0
            assert abs(math.log2(batches[0] * 2 / best)) < 0.5
            assert all(d % batch == 0 for batch in batches)
            assert all(run.steps * run.batch_tokens == d for run in cell)
    costs = [run.flops for run in layout.runs]
    assert costs == sorted(costs)  # the cheapest first


def test_what_a_run_overrides_makes_that_run(tmp_path):
    """The config of a run, read back, has the run's N, D, batch, learning rate and weight decay."""
    run = lay_out(config_of(GROUPED), Grid(sizes=(0.1,), tokens=(1e9,), seeds=2), STEP_LAW, None).runs[-1]
    config, _ = load_config("dense-8b", run.overrides())
    assert linear_weights(config.model) == run.params
    assert (config.budget.tokens, config.budget.batch_tokens) == (run.tokens, run.batch_tokens)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (run.lr, run.weight_decay)
    assert (config.run.seed, config.total_steps()) == (1, run.steps)


def test_explicit_lists_and_rounding():
    grid = Grid(widths=(96,), tokens=(50_000.0,), lr=(1e-3, 4e-3), batch_tokens=(1000.0, 2100.0), seeds=2)
    layout = lay_out(config_of(run={"seed": 7}), grid, STEP_LAW, None)
    assert len(layout.runs) == 8
    assert {run.batch_tokens for run in layout.runs} == {1024, 2048}
    assert {run.tokens for run in layout.runs} == {49_152}  # 24 batches of 2048
    assert {run.seed for run in layout.runs} == {7, 8}
    assert {run.lr for run in layout.runs} == {1e-3, 4e-3}
    # Where whole batches would change D by more than 2 %, D stays and the last batch exceeds it.
    grid = Grid(widths=(96,), tokens=(50_000.0,), lr=(1e-3,), batch_tokens=(6_400.0, 8_960.0))
    layout = lay_out(config_of(), grid, STEP_LAW, None)
    assert {(run.tokens, run.batch_tokens, run.steps) for run in layout.runs} == {
        (50_000, 6_400, 8),
        (50_000, 8_960, 6),
    }
    assert any("exceed a budget by up to 8 %" in note for note in layout.notes)
    # A micro-batch and ranks make the multiples larger.
    grid = Grid(widths=(96,), tokens=(50_000.0,), lr=(1e-3,), batch_tokens=(3_500.0,), ranks=2)
    layout = lay_out(config_of(parallel={"micro_batch": 4}), grid, STEP_LAW, None)
    assert {run.batch_tokens for run in layout.runs} == {3 * 2 * 4 * 128}


def test_weight_decay_is_the_configs_or_the_planners():
    grid = Grid(sizes=(1.0,), tokens=(3e6,), lr=(2e-2,), batch_tokens=(2048.0,))
    (run,) = lay_out(config_of(optimizer={"weight_decay": 0.07}), grid, STEP_LAW, None).runs
    assert run.weight_decay == 0.07
    (run,) = lay_out(config_of(), grid, STEP_LAW, None).runs
    tau = 1.084 * (run.tokens / run.params) ** -0.527
    assert run.weight_decay == pytest.approx(2048 / (2e-2 * tau * run.tokens), rel=1e-3)


def test_a_mixture_has_the_weight_decay_that_its_plan_has():
    """.1, as the timescale's law is of dense models; it gave .02 to .3, both ends clamped."""
    config = load_config("moe-tiny", ["optimizer.weight_decay=auto", "budget.tokens=1e7"])[0]
    runs = lay_out(config, Grid(), STEP_LAW, None).runs
    assert len(runs) == 135
    assert {run.weight_decay for run in runs} == {0.1}


def test_cost_by_hand():
    """6 FLOPs for each weight of a product and token, the head's included, and the causal half of attention."""
    grid = Grid(sizes=(1.0,), tokens=(81_920.0,), lr=(1e-3, 2e-3), batch_tokens=(2048.0,))
    layout = lay_out(config_of(), grid, STEP_LAW, None, eval_tokens=9_000)
    per_token = 6 * (2 * (4 * 128**2 + 3 * 128 * 384) + 2048 * 128) + 12 * 2 * 128 * 128 / 2
    cost = sweep_cost(layout.runs, Rate(1e9, "assumed"), jobs=2)
    assert (cost.runs, cost.tokens) == (2, 2 * 81_920)
    assert cost.flops == 2 * (per_token * 81_920 + per_token / 3 * 9_000)
    assert cost.seconds == pytest.approx(START_SECONDS + cost.flops / 2 / 1e9)
    assert sweep_cost(layout.runs, Rate(1e9, ""), jobs=8).seconds == cost.seconds  # no run is split
    assert sweep_cost([], Rate(1e9, ""), jobs=1).seconds == 0


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("", []),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_gpus_are_those_that_cuda_sees(monkeypatch, tmp_path, visible, found):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA H200\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(find_gpus()) == found


def test_rate_names_what_it_rests_on():
    rate = find_rate("H200", None, 0.5, 2, 1, [])
    assert rate.flops_per_second == pytest.approx(989e12 * 0.5 * 2, rel=0.01)
    assert "H200 at MFU 0.5" in rate.assumption
    assert "which is assumed" in find_rate(None, 1e12, None, 1, 1, []).assumption
    assert "H100" in find_rate(None, None, None, 1, 1, ["NVIDIA H100 80GB HBM3"]).assumption
    measured = find_rate(None, None, None, 1, 1, ["Novel 1"])
    assert measured.assumption.endswith("the peak of Novel 1 is not known: give --peak-flops")
    assert "a share of 0.3 is assumed" in measured.assumption
    assert 1e8 < measured.flops_per_second < 1e14
    assert matmul_rate(1) > 1e8
    for arguments, sentence in (
        (("H200", 1e12, None), "give --device or --peak-flops, not both"),
        ((None, 1.0, None), "--peak-flops is 1; it must be between"),
        ((None, None, 0.3), "--mfu needs --device or --peak-flops"),
        (("H200", None, 2.0), "mfu is 2; it is a fraction"),
    ):
        with pytest.raises(UserError, match=sentence):
            find_rate(*arguments, 1, 1, [])


def test_an_optimizer_that_the_law_was_not_fitted_with():
    grid = Grid(sizes=(1.0,), tokens=(3e6,), lr_points=3)
    layout = lay_out(config_of(optimizer={"name": "muon", "lr": 0.02}), grid, STEP_LAW, None)
    assert sorted({run.lr for run in layout.runs}) == [0.01, 0.02, 0.04]
    assert any("not muon: the learning rates are around optimizer.lr 0.02" in n for n in layout.notes)
    layout = lay_out(config_of(optimizer={"name": "muon"}), grid, STEP_LAW, None)
    assert any("give --lr where they are off" in note for note in layout.notes)


def test_settings_that_the_grid_replaces_are_told():
    grid, own = Grid(sizes=(1.0,), tokens=(3e6,)), {"budget": {"tokens": 10**6, "batch_tokens": 1280}}
    notes = lay_out(config_of(optimizer={"lr": 0.01}, **own), grid, STEP_LAW, None).notes
    assert notes[0].startswith(
        "optimizer.lr 0.01 is not used: the learning rates are around those of Step Law"
    )
    assert "budget.batch_tokens 1,280 is not used" in notes[1]
    grid = Grid(sizes=(1.0,), tokens=(3e6,), lr=(0.01,), batch_tokens=(1280.0,))
    assert not lay_out(config_of(optimizer={"lr": 0.01}, **own), grid, STEP_LAW, None).notes


def test_notes():
    grid = Grid(sizes=(1.0,), tokens=(40_960.0,), lr=(1e-3,), batch_tokens=(2048.0,))
    notes = lay_out(config_of(schedule={"warmup_steps": 50}), grid, STEP_LAW, 10_000).notes
    assert any("the shortest runs have 20 steps" in note for note in notes)
    assert any("schedule.warmup_steps is 50" in note for note in notes)
    assert any("repeats the corpus 4.1 times" in note for note in notes)
    notes = lay_out(config_of(), Grid(sizes=(0.1,)), STEP_LAW, None).notes
    assert any("--sizes 0.1 has 0.0625 of N" in note for note in notes)


@pytest.mark.parametrize(
    ("grid", "sections", "sentence"),
    [
        ({"sizes": (0.5,), "widths": (96,)}, {}, "give --sizes or --widths, not both"),
        ({"sizes": (0.5, 0.51)}, {}, "--sizes 0.5 and 0.51 give the same model of 239,616 weights"),
        ({"batch_tokens": (500.0, 520.0)}, {}, "500 and 520 are both 512 once rounded to multiples of 128"),
        ({"tokens": (200.0,)}, {}, "a budget of 200 tokens is below one batch of 512"),
        (
            {"tokens": (49_000.0, 49_200.0), "batch_tokens": (4096.0,)},
            {},
            "two budgets are both 49,152 tokens",
        ),
        ({"lr_points": 0}, {}, "--lr-points is 0; it must be between 1 and 25"),
        ({"seeds": -1}, {}, "--seeds is -1"),
        ({"lr_points": 25, "seeds": 1000}, {}, "the grid has more than 10,000 runs"),
        ({"lr_points": 26}, {}, "--lr-points is 26; it must be between 1 and 25"),
        ({"batch_points": 10**9}, {}, r"--batch-points is 1e\+09; it must be between 1 and 25"),
        ({"sizes": (1e34,)}, {}, r"--sizes is 1e\+34; it must be between 1e-06 and 100"),
        ({"widths": (10**7,)}, {}, r"--widths is 1e\+07; it must be between 1 and 1e\+06"),
        ({}, {"budget": {}}, "give --tokens or --tokens-per-param"),
        ({}, {"budget": {"steps": 10}}, "budget.steps needs budget.batch_tokens"),
        (
            {"sizes": (1,), "lr": (1e-3, 2e-3, 1.00004e-3)},
            {},
            r"--lr 0\.001 and 0\.00100004 are alike in the name of a run, n\d+-d\S+-lr0\.001-b\S+-s0; take values",
        ),
    ],
)
def test_refused(grid, sections, sentence):
    with pytest.raises(UserError, match=sentence):
        lay_out(config_of(**sections), Grid(**grid), STEP_LAW, None)


@pytest.mark.parametrize("every_run", [False, True])
def test_the_table_is_whole_at_80_columns(every_run):
    config = config_of(GROUPED, budget={"tokens": 10**12}, optimizer={"name": "adamw"})
    runs, console = lay_out(config, Grid(), STEP_LAW, None).runs, Console(width=80, file=io.StringIO())
    show("Sweep x", runs, [], "val", sweep_cost(runs, Rate(1e12, "guessed"), 1), 1, console, every_run)
    lines = console.file.getvalue().splitlines()
    table = lines[lines.index("Sweep x") + 1 : next(i for i, line in enumerate(lines) if "Compared" in line)]
    assert "…" not in console.file.getvalue()
    days = sum(START_SECONDS + (run.flops + run.eval_flops) / 1e12 for run in runs) / 86400
    assert f"about {days:,.0f} days with 1 at a time" in console.file.getvalue()
    assert all(len(line) <= 80 for line in table)
    assert any(f"{short(runs[0].params)} " in line and short(runs[0].tokens) in line for line in table)
    rows = [line for line in table if " x " in line]
    assert len(rows) == (len(runs) if every_run else 9) == len([line for line in table if line.strip()]) - 2


def test_large_fractions_are_found_soon():
    shape = scaled_shape(GROUPED, 100.0)
    assert linear_weights(shape) / linear_weights(GROUPED) == pytest.approx(100, rel=0.05)


def test_no_torch():
    code = "import sys, stepline.trainer.run.sweep; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
