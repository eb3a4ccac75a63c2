"""`stepline eval` against sums in plain loops, and against itself on two ranks."""

import contextlib
import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.distributed.tensor import DTensor

from stepline.trainer.data.dataset import TokenSplit, source_names
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.tokenizer import load_tokenizer
from stepline.trainer.errors import UserError
from stepline.trainer.run.eval_command import run_eval
from stepline.trainer.run.infer import load_run
from stepline.trainer.run.launch import run_training

SEQ = 32


@pytest.fixture(scope="session")
def second(tiny_data, tmp_path_factory) -> Path:
    """Other documents, prepared with the same tokenizer, in a folder of the same name."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "more.jsonl").write_text(
        "".join(json.dumps({"text": f"dave keeps the tree at {i}. " * 9, "id": i}) + "\n" for i in range(60))
    )
    prepare([folder / "more.jsonl"], folder / "data", tokenizer=tiny_data, val_share=0.3, progress=False)
    return folder / "data"


@pytest.fixture
def run(tiny_config, tiny_data, second, tmp_path):
    """A run of four float64 steps on both, with these overrides."""

    def make(*overrides: str) -> Path:
        config = yaml.safe_load(tiny_config.read_text())
        config["data"] = {"sources": [{"path": str(tiny_data)}, {"path": str(second)}], "seq_len": SEQ}
        path = tmp_path / "both.yaml"
        path.write_text(yaml.safe_dump(config))
        options = [f"run.folder={tmp_path / 'run'}", "budget.steps=4", "precision.compute=fp64", *overrides]
        assert run_training(str(path), options, "never") == 0
        return tmp_path / "run"

    return make


def evaluated(run: Path, *data: Path, splits: tuple[str, ...] = (), text_key: str = "text") -> dict:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_eval(run, data, splits, text_key, True)
    return json.loads(out.getvalue()) if out.getvalue() else {}


def on_ranks(run: Path, data: list[Path]) -> dict | int:
    try:
        return evaluated(run, *data)
    except SystemExit as left:
        return left.code


@torch.no_grad()
def plain(run: Path, tokens: list[int]) -> tuple[float, int]:
    """Nats and number of the targets of a sequence, window by window."""
    model, nll = load_run(run)[0], 0.0
    for start in range(0, len(tokens) - 1, SEQ):
        window = torch.tensor([tokens[start : start + SEQ + 1]])
        nll += F.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="sum").item()
    return nll, len(tokens) - 1


def check(said: dict, nll: float, tokens: int, size: int) -> None:
    assert (said["tokens"], said["bytes"]) == (tokens, size)
    assert said["val_loss"] == pytest.approx(nll / tokens, rel=1e-12)
    assert said["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-12)
    assert said["val_bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-12)


def test_prepared_data_and_text_in_one_and_two_processes(run, tiny_data, second, tmp_path, pool):
    """Tokens and bytes are those of the text itself, decoded or read here."""
    folder, tokenizer = run(), load_tokenizer(tiny_data)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("carol sends a letter — für alle at 7.\n" * 30, encoding="utf-8")
    (texts / "b.txt").write_text("bob finds nine stones", encoding="utf-8")
    said = evaluated(folder, tiny_data, second, texts)
    first, other = source_names([tiny_data, second])
    assert first != other
    assert list(said["sources"]) == [first, other, "texts"]
    sums = []
    for name, path in ((first, tiny_data), (other, second)):
        tokens = TokenSplit(path, "val").read(0, 10**9).tolist()
        cuts = [-1, *(i for i, t in enumerate(tokens) if t == tokenizer.eod_id)]
        documents = [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(cuts, cuts[1:])]  # noqa: RUF007
        sums.append((*plain(folder, tokens), sum(len(text.encode()) for text in documents)))
        check(said["sources"][name], *sums[-1])
    files = sorted(texts.iterdir())
    tokens = [t for file in files for t in [*tokenizer.encode(file.read_text()), tokenizer.eod_id]]
    tokens = [tokenizer.eod_id, *tokens]  # before a text, as before every document of the training
    sums.append((*plain(folder, tokens), sum(file.stat().st_size for file in files)))
    check(said["sources"]["texts"], *sums[-1])
    check(said, *(sum(values) for values in zip(*sums)))

    two, nothing = pool.run(2, on_ranks, folder, [tiny_data, second, texts], init=False)
    assert nothing == {}  # rank 0 prints
    for name, values in said["sources"].items():
        assert two["sources"][name] == pytest.approx(values, rel=1e-9)
    assert two["val_bits_per_byte"] == pytest.approx(said["val_bits_per_byte"], rel=1e-9)

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in rows if "val_loss" in row)
    for key in ("val_loss", "val_bits_per_byte"):  # in training each source counts alike
        each = {name: said["sources"][name][key] for name in (first, other)}
        assert {name: last[f"{key}/{name}"] for name in each} == pytest.approx(each, rel=1e-12)
        assert last[key] == pytest.approx(sum(each.values()) / 2, rel=1e-12)


@pytest.mark.e2e
def test_nothing_of_a_text_is_left_after_sigterm(run, tmp_path):
    folder, temporary = run(), tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "long.txt").write_text("carol sends a letter at 7.\n" * 400_000)
    command = [
        sys.executable,
        "-m",
        "stepline.trainer",
        "eval",
        str(folder),
        "--data",
        str(tmp_path / "long.txt"),
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(temporary)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(temporary.glob("stepline-eval-*/*/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 143
    assert list(temporary.glob("stepline-eval-*")) == []


@pytest.mark.e2e
def test_a_resumed_run_validates_every_source_again(run, tmp_path):
    def rows():
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "val_loss" in row]

    options = ["checkpoint.every=2", "logging.eval_every=1"]
    run(*options)
    straight = rows()
    values = [[key for key in row if key.startswith("val_")] for row in straight]
    assert [len(keys) for keys in values] == [
        7
    ] * 4  # loss and bits of both and of each, and on how many tokens
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    again = [f"run.folder={tmp_path / 'run'}", "budget.steps=4", "precision.compute=fp64", *options]
    assert run_training(str(tmp_path / "both.yaml"), again, "auto") == 0
    assert rows() == straight


def shares(run: Path) -> tuple[int, int, float]:
    """Values of the model that this rank holds, values there are, and the loss of a few tokens."""
    from stepline.comm.mesh import World, build_mesh, start_process_group

    world, device = World.from_environment(), torch.device("cpu")
    start_process_group(world, device, 60)
    model, _, _ = load_run(run, device, build_mesh(device, world.size, world.size))
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).nll.item()
    return sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters), loss


MIXTURE = ["model.blocks=revffn", "model.revffn.adapters=true", "model.hidden_size=48", "model.ffn_size=48"]
MIXTURE += ["model.ffn=moe", "model.moe.experts=6", "model.moe.capacity=0.5"]


@pytest.mark.e2e
def test_the_ranks_share_the_model(run, pool):
    """A reversible mixture with a capacity, which is of training."""
    folder = run(*MIXTURE)
    (one, whole, loss), (other, _, again) = pool.run(2, shares, folder, init=False)
    assert one + other == whole
    assert max(one, other) < 0.6 * whole
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        expected = load_run(folder)[0](tokens[:, :-1], tokens[:, 1:]).nll.item()
    assert (loss, again) == pytest.approx((expected, expected), rel=1e-12)


def test_splits_and_the_runs_own_data(run, tuned_data):
    folder = run("data.sources=[]", f"data.path={tuned_data}", "logging.eval_split=tune")
    own = evaluated(folder)
    assert list(own["sources"]) == ["data"]
    several = evaluated(folder, tuned_data, splits=("val", "tune"))
    assert list(several["sources"]) == ["data:val", "data:tune"]
    assert several["sources"]["data:val"] == own["sources"]["data"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = several["sources"]["data:tune"]["val_loss"]
    assert said == pytest.approx(next(row["val_loss"] for row in rows if "val_loss" in row), rel=1e-12)


def test_fp8_runs_are_evaluated_as_they_were_validated(run, tiny_data, second):
    """An activation's scale is that of its micro-batch."""
    shape = ("hidden_size=32", "num_heads=2", "head_dim=16", "num_kv_heads=2", "ffn_size=64", "qk_norm=false")
    folder = run(
        "precision.compute=fp32", "precision.fp8=true", *(f"model.{s}" for s in shape)
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val_loss" in row][-1]
    for name, values in evaluated(folder, tiny_data, second)["sources"].items():
        assert values["val_loss"] == pytest.approx(last[f"val_loss/{name}"], rel=1e-12)


def denied(path, *args):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_mistakes(run, tiny_data, tmp_path, pool, monkeypatch):
    folder = run("budget.steps=1")
    with pytest.raises(UserError, match="neither a run with a complete checkpoint nor a checkpoint"):
        evaluated(tmp_path, tiny_data)
    with pytest.raises(UserError, match="nothing does not exist"):
        evaluated(folder, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no tokens in .tune.*--tune-share"):
        evaluated(folder, tiny_data, splits=("tune",))
    with pytest.raises(UserError, match="no split 'test'; its splits are train, val, tune"):
        evaluated(folder, tiny_data, splits=("test",))

    shutil.copytree(tiny_data, tmp_path / "cut")
    (tmp_path / "cut" / "val-00000.bin").unlink()
    with pytest.raises(UserError, match=r"val-00000.bin is missing; copy it again"):
        evaluated(folder, tmp_path / "cut")

    texts = tmp_path / "texts"
    texts.mkdir()
    with pytest.raises(UserError, match="has no text"):
        evaluated(folder, texts)
    (texts / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="nothing but white space"):
        evaluated(folder, texts)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied)
        with pytest.raises(
            UserError, match=r"blank.txt cannot be read \(Permission denied\); mend that and start"
        ):
            evaluated(folder, texts)

    (texts / "rows.jsonl").write_text('{"text": "alice sees"}\n{"words": "a letter"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2 has no text under 'text'"):
        evaluated(folder, texts / "rows.jsonl")
    (texts / "rows.jsonl").write_text('{"words": "a letter"}\n')
    assert evaluated(folder, texts / "rows.jsonl", text_key="words")["bytes"] == 8
    with pytest.raises(UserError, match="--split foo is of prepared folders, and text is taken whole; leave"):
        evaluated(folder, texts / "rows.jsonl", splits=("foo",))
    with pytest.raises(UserError, match="nothing does not exist"):
        evaluated(folder, tmp_path / "nothing", splits=("val",))
    mixed = evaluated(folder, tiny_data, texts / "rows.jsonl", splits=("val",), text_key="words")["sources"]
    assert set(mixed) == {*source_names([tiny_data]), "rows.jsonl"}

    (texts / "blank.txt").write_text("alice sees the tree at 7. " * 300)
    prepare([texts / "blank.txt"], tmp_path / "other", vocab_size=280, val_share=0.1, progress=False)
    with pytest.raises(UserError, match="prepared with another tokenizer than the run's data"):
        evaluated(folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    (texts / "rows.jsonl").write_text("{")
    with pytest.raises(AssertionError, match=r"rows.jsonl:1 is not JSON"):
        pool.run(2, on_ranks, folder, [texts / "rows.jsonl"], init=False)


def test_names_of_sources():
    paths = [Path("/a/data"), Path("/b/data"), Path("/b/more"), Path("/c/b/data"), Path("/a/data")]
    assert source_names(paths) == ["a/data", "b/data", "more", "c/b/data", "a/data"]
    assert source_names([Path("data")]) == ["data"]
