"""The quickstart's program where its overrides say; tests/e2e/test_launch.py runs all of it."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from stepline.trainer import quickstart

VALUES = {"val_loss": 2.0, "val_bits_per_byte": 1.25}


@pytest.fixture
def called(monkeypatch, tmp_path):
    """The program's commands, which are noted instead of run, and the folder whose table is shown last."""
    commands = []

    def run(*arguments: str, launch=None, capture=False) -> str:
        commands.append(arguments)
        return json.dumps(VALUES) if arguments[0] == "eval" else ""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "stepline", run)
    monkeypatch.setattr(quickstart, "launcher", list)
    monkeypatch.setattr(
        quickstart, "summary", lambda console, run, values: commands.append(("show", str(run)))
    )
    return commands


@pytest.mark.parametrize(
    ("overrides", "run", "data"),
    [
        ([], "runs/quickstart", "data/stdlib"),
        (["run.folder=runs/mine", "budget.tokens=4096"], "runs/mine", "data/stdlib"),
        (["run.folder=a", "data.path=data/own", "run.folder=b"], "b", "data/own"),
    ],
)
def test_what_is_trained_is_evaluated_and_shown(called, monkeypatch, overrides, run, data):
    monkeypatch.setattr("sys.argv", ["quickstart", *overrides])
    quickstart.main()
    prepare, train, evaluate, generate, show = called
    assert (prepare[0], prepare[-1]) == ("prepare", data)
    assert train == ("train", "quickstart", *overrides)
    assert evaluate == ("eval", run, "--data", data, "--json")
    assert generate[:2] == ("generate", run)
    assert show == ("show", run)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["data.path=null", "data.sources=[{path: one}]"],
            "the quickstart reads one folder; give data.path instead of data.sources",
        ),
        (["run.foldr=x"], "on the command line: unknown key 'run.foldr'; did you mean 'folder'?"),
    ],
)
def test_mistakes_are_one_sentence(called, monkeypatch, capsys, overrides, sentence):
    monkeypatch.setattr("sys.argv", ["quickstart", *overrides])
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    assert (ended.value.code, called) == (2, [])
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_step_that_was_nan_is_no_loss(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        {"step": i, "tokens": 64 * i, "loss": float(6 - i), "tokens_per_second": 100.0} for i in range(1, 5)
    ]
    rows[-1] |= {"loss": None, "loss_is_finite": False}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plan.json").write_text('{"law": {"name": "step-law"}}')
    config = SimpleNamespace(
        optimizer=SimpleNamespace(name="muon", lr=0.1, weight_decay=0.1),
        budget=SimpleNamespace(batch_tokens=64),
        total_steps=lambda: 4,
    )
    monkeypatch.setattr(quickstart, "read_run_config", lambda folder: config)
    quickstart.summary(Console(width=200), tmp_path, VALUES)
    assert "5.000 → 4.000 nats per token" in capsys.readouterr().out
