"""A run keeps its data's tokenizer: what is done with it later needs no data, and notices another tokenizer."""

import shutil

import pytest

from stepline.comm.mesh import World
from stepline.trainer.data.prepare import prepare
from stepline.trainer.errors import UserError
from stepline.trainer.hf.export import export_run
from stepline.trainer.run.eval_command import evaluate_run
from stepline.trainer.run.generate import generate_text
from stepline.trainer.run.start import start_job


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Data of other texts, with a tokenizer of their own."""
    folder = tmp_path_factory.mktemp("other")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(f"other {i * n % 97} text" for n in range(80)))
    prepare([folder], folder / "data", vocab_size=300, workers=1, val_share=0.05, progress=False)
    return folder / "data"


def test_a_run_is_used_where_its_data_is_not(
    train, tiny_config, tiny_data, other_data, tmp_path, monkeypatch
):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_data, moved)
    rows = train(1, tiny_config, tmp_path / "run", "budget.steps=2", f"data.path={moved}")
    text = "".join(generate_text(tmp_path / "run", "one", max_tokens=4, temperature=0))
    shutil.rmtree(moved)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "".join(generate_text(tmp_path / "elsewhere", "one", max_tokens=4, temperature=0)) == text
    export_run(tmp_path / "elsewhere", tmp_path / "exported")
    kept, exported = tmp_path / "elsewhere/tokenizer/tokenizer.model", tmp_path / "exported/tokenizer.model"
    assert kept.read_bytes() == (tiny_data / "tokenizer.model").read_bytes() == exported.read_bytes()
    assert evaluate_run(tmp_path / "elsewhere", tiny_data)["val_loss"] == pytest.approx(
        rows[-1]["val_loss"], 1e-6
    )
    with pytest.raises(UserError, match="another tokenizer than the run's data; prepare it with --tokenizer"):
        evaluate_run(tmp_path / "elsewhere", other_data)


def test_weights_that_know_other_tokens_are_noted(train, tiny_config, other_data, tmp_path):
    train(1, tiny_config, tmp_path / "run", "budget.steps=1")
    start = [f"run.init_from={tmp_path / 'run'}", f"run.folder={tmp_path / 'new'}"]

    def notes(*options: str) -> list[str]:
        job = start_job(str(tiny_config), [*start, *options], "never", World(0, 1, 0, 1))
        return [note for note in job.notes if "another tokenizer than that of run.init_from" in note]

    assert notes() == []
    assert len(notes(f"data.path={other_data}")) == 1


def test_the_folders_of_a_mixture_may_have_moved(train, tiny_config, tiny_data, other_data, tmp_path):
    """But what they hold, and in which order, may not change."""
    copies = [tmp_path / name for name in "abc"]
    for copy in copies:
        shutil.copytree(tiny_data, copy)
    sources = [[{"path": str(one), "weight": 0.75}, {"path": str(two), "weight": 0.25}] for one, two in
               ((tiny_data, copies[0]), copies[1:])]  # fmt: skip
    common = ["data.path=null", "budget.steps=4", "checkpoint.every=2"]
    straight = train(1, tiny_config, tmp_path / "straight", *common, f"data.sources={sources[0]}")
    train(1, tiny_config, tmp_path / "run", *common, f"data.sources={sources[0]}")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    rows = train(1, tiny_config, tmp_path / "run", *common, f"data.sources={sources[1]}", resume="auto")
    assert [r["loss"] for r in rows if "loss" in r][-1] == [r["loss"] for r in straight if "loss" in r][-1]


def test_a_run_that_starts_anew_on_other_data_has_their_tokenizer(
    train, tiny_config, tiny_data, other_data, tmp_path
):
    """Without a checkpoint, as after a kill before the first one, a run on tiny_data has left its tokenizer."""
    train(1, tiny_config, tmp_path / "run", "budget.steps=2")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "outcome.json").unlink()
    kept = tmp_path / "run" / "tokenizer" / "tokenizer.model"
    assert kept.read_bytes() == (tiny_data / "tokenizer.model").read_bytes()
    train(1, tiny_config, tmp_path / "run", "budget.steps=2", f"data.path={other_data}", resume="auto")
    assert kept.read_bytes() == (other_data / "tokenizer.model").read_bytes()
