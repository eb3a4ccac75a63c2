"""What a report holds, against the files of the runs; tests/e2e/test_report.py opens it in a browser."""

import base64
import copy
import hashlib
import json
import math
import random
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from stepline.trainer.config_io import dump, load_config
from stepline.trainer.errors import UserError
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.watch.report import events, picture
from stepline.trainer.watch.report.command import run_names, run_report
from stepline.trainer.watch.report.plots import plots_of
from stepline.trainer.watch.report.read import read_run
from stepline.trainer.watch.report.series import BUCKETS, HEAT_SLICES, Heat, thin
from stepline.trainer.watch.report.tables import differing

NASTY = "<img src=x onerror=alert(1)>&\"'</script><script>alert(2)</script>"


def rows_of(count: int, seed: int = 0, **more) -> list[dict]:
    """A row a step, 64 tokens each; a validation every tenth step."""
    draw, rows = random.Random(seed), []
    for step in range(1, count + 1):
        row = {"step": step, "tokens": 64 * step, "loss": 5 / step**0.3 + draw.gauss(0, 0.1), "skipped": 0}
        row |= {
            "lr": 1e-3 / step,
            "grad_norm": draw.expovariate(1),
            "tokens_per_second": draw.uniform(90, 110),
        }
        rows.append(row | more)
        if step % 10 == 0:
            losses = {"val_loss": 4 / step, "val_loss/code": 3 / step}
            rows.append({"step": step, "tokens": 64 * step, "val_tokens": 640} | losses)
    return rows


@pytest.fixture
def make(tmp_path):
    """The folder of a run with these rows, config and files."""

    def run(name: str, rows: list[dict], config: str = "optimizer:\n  lr: 0.1  # law\n", **files: str):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for path, text in files.items():
            (folder / f"{path}.json").write_text(text)
        return folder

    return run


def page_of(*folders, output=None, **options) -> tuple[str, dict]:
    """The page's text and the data that its scripts draw."""
    path = run_report(folders, output, options.get("png", False), as_json=False)
    text = path.read_text(encoding="utf-8")
    return text, json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )


@pytest.mark.parametrize("count", [1201, 9_999, 30_000])
def test_thinned_series_keep_the_extremes_of_every_stretch(count):
    draw = random.Random(count)
    values = [draw.gauss(0, 1) * (100 if draw.random() < 0.001 else 1) for _ in range(count)]
    steps = [3 * i + 7 for i in range(count)]
    series = thin(np.array(steps), np.array(values))
    kept = dict(zip(series.step, series.value, strict=True))
    assert series.count == count
    assert len(kept) <= 2 * BUCKETS + 2
    assert series.step == sorted(series.step)
    assert {steps[0], steps[-1]} <= kept.keys()
    for step, value in kept.items():
        assert value == pytest.approx(values[(step - 7) // 3], rel=1e-6)
    for b in range(BUCKETS):
        part = range(b * count // BUCKETS, (b + 1) * count // BUCKETS)
        for extreme in (min, max):
            assert steps[extreme(part, key=values.__getitem__)] in kept
        assert series.mean[b] == pytest.approx(math.fsum(values[i] for i in part) / len(part), rel=1e-5)
        assert series.mean_step[b] == pytest.approx(math.fsum(steps[i] for i in part) / len(part), rel=1e-6)


def test_short_series_are_whole():
    values = np.arange(2 * BUCKETS) / 7
    series = thin(np.arange(2 * BUCKETS), values)
    assert series.value == pytest.approx(values.tolist(), rel=1e-6)
    assert series.mean == []


@pytest.mark.parametrize(("layers", "experts", "rows"), [(2, 3, 40), (2, 3, 1000), (30, 128, 333)])
def test_heat_map_holds_the_means_of_its_stretches(layers, experts, rows):
    loads = np.random.default_rng(0).gamma(2, 0.5, (rows, layers, experts))
    heat = Heat()
    for i, load in enumerate(loads):
        heat.add(10 * i, load.tolist())
    found = heat.result()
    assert len(found["load"]) == len(found["spans"]) <= HEAT_SLICES[1]
    assert len(found["load"]) >= min(rows, HEAT_SLICES[0])
    assert found["spans"][0][0] == 0
    assert found["spans"][-1][1] == 10 * (rows - 1)
    for (first, last), mean, after in zip(
        found["spans"], found["load"], [*found["spans"][1:], None], strict=True
    ):
        assert after is None or after[0] == last + 10
        expected = loads[first // 10 : last // 10 + 1].mean(0)
        np.testing.assert_allclose(mean, expected, atol=5.1e-4)  # three decimals


@pytest.mark.parametrize(
    ("plan", "loss"),
    [
        ({"steps": 2}, 3.5),
        ({"steps": 2, "expected_final_loss": None}, None),
    ],  # of a run of before; of a new budget
)
def test_a_forecast_that_only_the_rows_hold(make, plan, loss):
    rows = [{"step": 1, "tokens": 64, "loss": 5.0}, {"step": 1, "val_loss": 4.0, "expected_final_loss": 3.5}]
    _, data = page_of(make("mine", rows, plan=json.dumps(plan)))
    assert (data["runs"][0]["expected"] or {}).get("loss") == loss


def test_the_page_holds_the_values_of_metrics_jsonl(make):
    load = [[0.5, 1.5, 1.0, 1.0], [0.0, 2.0, 1.25, 0.75]]
    rows = rows_of(40, expert_load=load)
    folder = make(
        "mine", rows, plan=json.dumps({"steps": 50, "expected_final_loss": {"loss": 1.5, "source": "a law"}})
    )
    _, data = page_of(folder)
    (run,) = data["runs"]
    for key in ("loss", "lr", "grad_norm", "val_loss", "val_loss/code", "tokens_per_second"):
        expected = [(row["step"], row[key]) for row in rows if key in row]
        assert run["series"][key]["step"] == [step for step, _ in expected]
        assert run["series"][key]["value"] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert run["axis"]["step"] == list(range(41))
    assert run["axis"]["tokens"] == [64 * step for step in range(41)]
    trained = np.cumsum([64 / row["tokens_per_second"] for row in rows if "loss" in row])
    assert run["axis"]["seconds"][1:] == pytest.approx(trained.tolist(), abs=1e-3)
    assert run["heat"] == {"spans": [[step, step] for step in range(1, 41)], "load": [load] * 40}
    assert run["expected"]["loss"] == 1.5
    drawn = {line["key"] for plot in data["plots"] for line in plot["lines"]}
    assert drawn == {"loss", "val_loss", "val_loss/code", "lr", "grad_norm", "tokens_per_second"}


def test_what_is_zero_throughout_is_named_and_not_drawn(make):
    first, second = make("first", rows_of(20)), make("second", rows_of(20, skipped=2))
    assert "0 throughout: updates skipped." in page_of(first)[0]
    text, data = page_of(first, second, output=first / "both.html")
    assert "0 throughout" not in text
    assert "skipped" in {plot["id"] for plot in data["plots"]}


def test_metrics_that_nobody_has_foreseen_are_drawn(make):
    rows = [*rows_of(20, something_new=3.0), {"step": 20, "tokens": 1280, "val_accuracy": 0.5}]
    plots, _ = plots_of([read_run(make("mine", rows), "mine")])
    sections = {line.key: plot.section for plot in plots for line in plot.lines}
    assert (sections["something_new"], sections["val_accuracy"]) == ("Other", "Validation")


def test_nothing_is_loaded_from_anywhere(make):
    text, _ = page_of(make("mine", rows_of(10)))
    said = text.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing is fetched from
    assert not re.findall(r"https?:|\burl\(|@import|\bimport\b\s*\(|fetch\(|XMLHttp|WebSocket|src=", said)
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.attributes, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def test_names_and_values_are_text_wherever_they_stand(make):
    clean, nasty = make("clean", rows_of(10)), NASTY.replace("/", "")
    config = f"data:\n  path: {json.dumps(NASTY)}\n"
    rows = [
        row | {f"val_loss/{NASTY}": 1.5, NASTY: 2.5, "loss": None, "loss_is_finite": False}
        for row in rows_of(10)
    ]
    plan = {
        "params": 1e6, "tokens": 1e7, "steps": 10, "law": {"name": NASTY, "paper": NASTY}, "warnings": [NASTY],
        "expected_final_loss": {"loss": 1.0, "source": NASTY},
        "explain": [
            {"name": NASTY, "used": 1.0, "ideal": None, "interval95": None, "in_range": None, "equation": NASTY,
             "penalty_percent": None}
        ],
    }  # fmt: skip
    files = {"plan": json.dumps(plan), "environment": json.dumps({"host": NASTY, "device": NASTY})}
    files["outcome"] = json.dumps({"status": NASTY, "message": NASTY})
    folder = make(nasty, rows, config, **files)
    log = folder / "logs" / "attempt-1" / "rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"2026-01-01 00:00:00,000 WARNING {NASTY}\n")
    (known := Tags()).feed(page_of(clean, make("other", rows_of(10)), output=clean / "two.html")[0])
    for folders in ([folder], [clean, folder]):
        text, data = page_of(*folders, output=clean / "nasty.html")
        (tags := Tags()).feed(text)
        assert tags.seen <= known.seen | {"ul", "li", "code", "dl", "dt", "dd", "small", "h3"}
        assert not [name for name in tags.attributes if name.startswith("on") or name == "src"]
        assert "".join(tags.text).count(NASTY) >= 5
        assert data["runs"][-1]["name"] == nasty
        assert text.count("</script>") == 2


def test_differences_between_configs(make):
    one = make(
        "one", rows_of(5), "a:\n  same: 1\n  lr: 0.1\nrun:\n  folder: one\n", environment='{"world_size": 2}'
    )
    two = make("two", rows_of(5), "a:\n  same: 1\n  lr: 0.2\n  new: [x]\nrun:\n  folder: two\n")
    runs = [read_run(one, "one"), read_run(two, "two")]
    assert differing(runs) == [
        ("a.lr", ["0.1", "0.2"]), ("a.new", ["–", '["x"]']), ("machine: world_size", ["2", "–"]),
    ]  # fmt: skip
    text, _ = page_of(one, two, output=one / "both.html")
    assert "<tr><td>a.lr</td><td class=n>0.1</td><td class=n>0.2</td></tr>" in text
    assert "<td>a.same</td>" not in text


def test_a_key_younger_than_a_run_is_no_difference_while_it_has_its_default(make):
    """configs/tiny.yaml as this version resolves it, and the same without a key, with another one set."""
    config, _ = load_config("tiny", ["data.path=data"])
    new = dump(config)
    old = copy.deepcopy(new)
    del old["optimizer"]["momentum"], old["model"]["revffn"]
    old["optimizer"]["weight_decay"] = 0.25
    runs = [read_run(make(n, rows_of(5), yaml.safe_dump(c)), n) for n, c in (("new", new), ("old", old))]
    given = str(new["optimizer"]["weight_decay"])
    momentum = [(k, v) for k, v in differing(runs) if k == "optimizer.momentum"]
    assert momentum == [
        ("optimizer.momentum", ["0.9", "0.95"])
    ]  # the file sets another value than the default
    assert [d for d in differing(runs) if d not in momentum] == [("optimizer.weight_decay", [given, "0.25"])]


def test_events_come_from_logs_rows_and_checkpoints(make):
    rows = rows_of(30)
    for row in rows:
        row["skipped"] = 0 if row["step"] < 12 else 2 if row["step"] < 13 else 3
    rows[-2] |= {"grad_norm": None, "grad_norm_is_finite": False}
    folder = make("mine", rows)
    logs = {
        1: ["INFO 5 parameters, lr 1, 2 cpu ranks, micro-batch 4", "WARNING few steps",
            "INFO saving permanent step 10; training waited 0.5 s", "ERROR SIGTERM: step 11 is saved; go on"],
        2: ["INFO continuing x at step 11", "WARNING few steps", "ERROR error: broken"],
    }  # fmt: skip
    for number, lines in logs.items():
        path = folder / "logs" / f"attempt-{number}" / "rank-0.log"
        path.parent.mkdir(parents=True)
        text = "".join(f"2026-01-0{number} 00:00:0{i},123 {line}\n" for i, line in enumerate(lines))
        path.write_text(text + "Traceback\n  that is left out\n")
    kept = folder / "checkpoints" / "step-000020"
    kept.mkdir(parents=True)
    (kept / "COMPLETE").touch()
    (kept / "manifest.json").write_text('{"kind": "permanent", "step": 20, "files": {}}')
    found = [(e.step, e.kind, e.text, e.time) for e in read_run(folder, "mine").events]
    assert [event[:3] for event in found] == [
        (0, "attempt", "attempt 1 starts on 2 cpu ranks"),
        (0, "warning", "few steps"),
        (10, "checkpoint", "permanent checkpoint, no longer kept; training waited 0.5 s"),
        (11, "stop", "SIGTERM: step 11 is saved; go on"),
        (11, "attempt", "attempt 2 goes on at step 11"),
        (11, "error", "error: broken"),
        (12, "skipped", "3 updates skipped by the guard, logged at steps 12 to 13"),
        (20, "checkpoint", "permanent checkpoint"),
        (30, "not finite", "grad_norm is not finite at step 30"),
    ]
    assert found[4][3] == "2026-01-02 00:00:00"


def log_of(folder, lines: list[str], attempt: int = 1) -> None:
    path = folder / "logs" / f"attempt-{attempt}" / "rank-0.log"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"2026-01-01 00:00:00,000 {line}\n" for line in lines))


def checkpoint_at(folder, step: int, kind: str) -> None:
    kept = folder / "checkpoints" / f"step-{step:06d}"
    kept.mkdir(parents=True)
    (kept / "COMPLETE").touch()
    (kept / "manifest.json").write_text(json.dumps({"kind": kind, "step": step, "files": {}}))


def test_checkpoints_that_exist_are_shown_among_many_that_are_gone(make):
    """A run of 300 ephemeral checkpoints, of which the last is kept, and three permanent ones."""
    folder = make("mine", rows_of(3))
    saved = [(step, "permanent" if step % 100 == 0 else "ephemeral") for step in range(1, 304)]
    log_of(folder, [f"INFO saving {kind} step {step}; training waited 0.1 s" for step, kind in saved])
    kept = [(step, kind) for step, kind in saved if kind == "permanent" or step == 303]
    for step, kind in kept:
        checkpoint_at(folder, step, kind)
    found = [e for e in read_run(folder, "mine").events if e.kind == "checkpoint"]
    assert [(e.step, e.text.split(" ")[0], e.count) for e in found[1:]] == [(*one, 1) for one in kept]
    assert (found[0].text, found[0].count) == ("299 checkpoints that are no longer kept are not shown", 299)


@pytest.mark.parametrize("kept", [200, 201])
def test_no_line_stands_for_one_event(make, kept):
    """That would be as long."""
    folder = make("mine", rows_of(3))
    log_of(folder, [f"INFO saving permanent step {step}; training waited 0.1 s" for step in range(1, 202)])
    for step in range(202 - kept, 202):
        checkpoint_at(folder, step, "permanent")
    found = [e for e in read_run(folder, "mine").events if e.kind == "checkpoint"]
    assert [(e.step, e.count) for e in found] == [(step, 1) for step in range(1, 202)]


def test_of_many_warnings_the_first_and_the_last_are_shown(make):
    folder = make("mine", rows_of(3))
    log_of(folder, [f"WARNING slow at step {step}" for step in range(1, 1251)] + ["ERROR error: broken"])
    events = read_run(folder, "mine").events
    found = [(e.step, e.text) for e in events if e.kind == "warning"]
    named = [(step, f"slow at step {step}") for step in range(1, 1251)]
    assert found == [*named[:100], (101, "1,050 more of this kind are not shown"), *named[-100:]]
    assert (events[-1].kind, events[-1].step) == ("error", 1250)
    assert "<summary>1,252 events</summary>" in page_of(folder)[0]


def test_attempts_are_counted_before_some_are_left_out(make):
    folder = make("mine", rows_of(3))
    for attempt in range(1, 251):
        log_of(folder, [f"INFO continuing x at step {attempt}"], attempt)
    run = read_run(folder, "mine")
    assert run.summary["attempts"] == 250
    assert sum(e.kind == "attempt" for e in run.events) == 201


def test_a_checkpoint_that_goes_while_it_is_looked_at(make, monkeypatch):
    folder = make("mine", rows_of(3))
    for step in (2, 3):
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
    found = complete_checkpoints(folder)
    (found[0] / "COMPLETE").unlink()
    monkeypatch.setattr(events, "complete_checkpoints", lambda _: found)
    assert [e.step for e in read_run(folder, "mine").events if e.kind == "checkpoint"] == [3]


def test_loads_that_are_no_numbers_are_left_out(make):
    bad = [[[None, 1.0]], [[float("nan"), 1.0]], [["x", 1.0]], [[1.0], [1.0, 2.0]]]
    rows = [{"step": i + 1, "tokens": 64, "loss": 1.0, "expert_load": load} for i, load in enumerate(bad)]
    _, data = page_of(make("none", rows))
    assert data["runs"][0]["heat"] is None
    rows.append({"step": 5, "tokens": 64, "loss": 1.0, "expert_load": [[0.5, 1.5]]})
    _, data = page_of(make("one", rows))
    assert data["runs"][0]["heat"] == {"spans": [[5, 5]], "load": [[[0.5, 1.5]]]}


def test_a_run_that_was_killed_in_the_middle_of_a_row(make):
    folder = make("mine", rows_of(7), heartbeat='{"status": "training", "steps": 90}')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tok')
    text, data = page_of(folder)
    assert data["runs"][0]["series"]["loss"]["step"] == list(range(1, 8))
    assert "training, or killed" in text
    assert "of 90" in text


def test_the_head_says_which_losses_are_no_longer_finite(make):
    """In a comparison too, where the last finite loss of a run that diverged would look best."""

    def gone(row: dict, *keys: str) -> dict:
        return row | dict.fromkeys(keys) | {f"{key}_is_finite": False for key in keys}

    rows = [row | {"val_bits_per_byte": 1.5} if "val_loss" in row else row for row in rows_of(1020)]
    bad = [gone(row, "loss") if "loss" in row and row["step"] > 1008 else row for row in rows]
    bad[-1] = gone(bad[-1], "val_loss", "val_loss/code")
    healed = [gone(row, "loss") if "loss" in row and row["step"] < 9 else row for row in rows]
    folder, other = make("mine", bad), make("healed", healed)

    def facts(name: str, value: str, small: str) -> str:
        return f"<dt>{name}</dt><dd>{value}<small>{small}</small></dd>"

    text = page_of(folder)[0]
    assert facts("loss", "not finite since step 1,009", "") in text
    assert facts("validation loss", "not finite since step 1,020", "") in text
    assert facts("bits per byte", "1.5000", "") in text
    assert "<td>code</td><td>loss</td><td class=n>not finite since step 1,020</td>" in text
    text = page_of(other)[0]
    assert facts("loss", f"{rows[-2]['loss']:.4f}", "last training step") in text
    assert "since step" not in text
    cells = "<td class=n>not finite since step 1,009</td><td class=n>not finite since step 1,020</td>"
    assert cells in page_of(folder, other, output=folder / "both.html")[0]


def test_where_the_report_goes(make, monkeypatch, tmp_path, capsys):
    one, two = make("one", rows_of(5)), make("two", rows_of(5))
    monkeypatch.chdir(tmp_path)
    run_report([one], None, False, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"report": str(one / "report.html"), "runs": [str(one)]}
    run_report([one, two], None, False, as_json=True)
    assert json.loads(capsys.readouterr().out)["report"] == "report.html"
    assert (tmp_path / "report.html").is_file()


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert run_names(folders) == ["a/run", "b/run", "c"]


def test_mistakes_are_one_sentence(make, tmp_path, monkeypatch):
    good, empty = make("good", rows_of(5)), make("empty", [])
    for folder, says in [
        (tmp_path / "nowhere", "is no folder; give the folder of a run"),
        (tmp_path, "is no run: it has no config.yaml"),
        (empty, "holds no values yet; wait for the run's first step"),
        (good / ".." / "good", "is given twice; give each run once"),
    ]:
        with pytest.raises(UserError, match=says):
            run_report([good, folder], None, False, as_json=False)
    (empty / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no metrics\.jsonl yet"):
        run_report([empty], None, False, as_json=False)
    (tmp_path / "file").touch()
    for output, says in [
        (tmp_path / "x.pdf", r"must end in \.html"),
        (tmp_path / "file" / "x.html", "cannot be written .*file is a file.*choose another --output"),
    ]:
        with pytest.raises(UserError, match=says):
            run_report([good], output, False, as_json=False)
    with monkeypatch.context() as patch:  # permissions do not keep root out
        opened = type(good).open

        def refuse(path, *arguments, **options):
            if path.name == "metrics.jsonl":
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *arguments, **options)

        patch.setattr(type(good), "open", refuse)
        with pytest.raises(
            UserError, match=r"metrics\.jsonl cannot be read \(Permission denied\); a report needs it"
        ):
            run_report([good], None, False, as_json=False)
    (good / "metrics.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(UserError, match="line 1, is not a JSON object"):
        run_report([good], None, False, as_json=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"--png needs matplotlib: pip install 'stepline\[watch\]'"):
        run_report([good], None, True, as_json=False)
    assert not (good / "report.html").exists()


def test_the_picture_has_the_same_plots_and_points(make, monkeypatch):
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    load = [[0.5, 1.5], [1.0, 1.0]]
    runs = [
        read_run(make(name, rows_of(3000 if name == "long" else 30, expert_load=load)), name)
        for name in ("long", "brief")
    ]
    saved = []
    monkeypatch.setattr(figure_of, "savefig", lambda figure, _: saved.append(figure))
    picture.draw(runs, runs[0].folder / "report.png")
    plots, _ = plots_of(runs)
    shown = {axes.get_title(loc="left"): axes for axes in saved[0].axes if axes.get_title(loc="left")}
    assert set(shown) == {plot.title for plot in plots} | {
        "Load of experts, layer 0 long",
        "Load of experts, layer 0 brief",
    }
    faint, strong, brief = shown["Learning rate"].get_lines()
    np.testing.assert_allclose(faint.get_xdata(), 64 * np.array(runs[0].series["lr"].step))
    np.testing.assert_allclose(faint.get_ydata(), 1e-3 / np.array(runs[0].series["lr"].step), rtol=1e-6)
    assert len(strong.get_xdata()) == BUCKETS
    np.testing.assert_allclose(brief.get_ydata(), 1e-3 / np.arange(1, 31), rtol=1e-6)
    image = shown["Load of experts, layer 0 brief"].get_images()[0].get_array()
    np.testing.assert_allclose(image, np.log2(np.array(load[0]))[:, None].repeat(30, 1))


def test_a_picture_of_runs_that_are_0_throughout(make, monkeypatch):
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    rows = [{"step": 1, "tokens": 64, "loss": 0.0, "skipped": 0}]
    runs = [read_run(make(name, rows), name) for name in ("one", "two")]
    titles = []
    monkeypatch.setattr(figure_of, "savefig", lambda figure, _: titles.append(figure.get_suptitle()))
    picture.draw(runs, runs[0].folder / "report.png")
    picture.draw(runs[:1], runs[0].folder / "report.png")
    assert titles == ["one, two: 0 throughout", "one: 0 throughout"]


def test_a_picture_where_one_run_has_no_value_in_the_first_plot(make, monkeypatch):
    """The names stand at their own lines."""
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    runs = [
        read_run(make("short", [{"step": 1, "tokens": 64, "lr": 0.5}]), "short"),
        read_run(make("long", rows_of(5)), "long"),
    ]
    named = []
    monkeypatch.setattr(
        figure_of,
        "savefig",
        lambda figure, _: named.extend(text.get_text() for text in figure.legends[0].get_texts()),
    )
    picture.draw(runs, runs[0].folder / "report.png")
    assert named == ["short", "long"]
