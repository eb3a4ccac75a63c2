"""A user's mistake ends before the first step with exit code 2 and one sentence; nothing is left behind."""

import json
import re

import pytest
import torch
import yaml

from stepline.comm.mesh import World
from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.hf.adapters import check_adapters
from stepline.trainer.run import eval_command, generate
from stepline.trainer.run.eval_command import evaluate_run, run_eval
from stepline.trainer.run.folder import check_folder
from stepline.trainer.run.generate import generate_text
from stepline.trainer.run.launch import dry_run, run_training
from stepline.trainer.run.start import start_job
from stepline.trainer.watch.metrics import read_metrics

ONE = World(0, 1, 0, 1)
ADAPTERS = [
    "optimizer.only=adapters",
    "model.blocks=revffn",
    "model.revffn.adapters=true",
    "model.num_heads=2",
]
MIXTURE = ["model.ffn=moe", "model.hidden_size=48", "model.ffn_size=48"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.path={tmp}/nothing"], "no meta.json"),
        (["data.path=null"], "set data.path to a folder written by `stepline prepare`"),
        (["model.vocab_size=300"], "has 330 tokens but model.vocab_size is 300; set it to at least 330"),
        (["parallel.shard=4"], "parallel.shard is 4 but there are 1 ranks"),
        (
            ["run.device=cuda"],
            "run.device=cuda needs a GPU, and this machine has no usable one; use run.device=cpu or auto",
        ),
        (["budget.batch_tokens=100"], "no multiple of data.seq_len 32; the nearest is 96"),
        (["budget.batch_tokens=auto"], "budget.steps needs budget.batch_tokens"),
        (["data.seq_len=1000000"], "seq_len"),
        (
            ["data.seq_len=900000", "budget.batch_tokens=900000"],
            "fewer than seq_len 900000 + 1; prepare more text",
        ),
        (["model.moe.top_k=9"], "top_k 9 is more than the 8 experts there are; the nearest possible: 8"),
        (["model.ffn=moe"], "hidden_size gives experts a width of 36"),
        ([*MIXTURE, "model.ffn_size=50"], "ffn_size gives experts a width of 50"),
        ([*MIXTURE, "model.ffn_size=50"], "the nearest: 48"),
        (["parallel.experts=2"], "set it to 1, or model.ffn to moe"),
        (
            [*MIXTURE, "parallel.experts=2"],
            "does not divide the 1 ranks; the nearest that does: 1",
        ),
        (
            ["model.blocks=revffn", "model.num_heads=4"],
            "not divisible by the streams' heads, 2 x num_heads 4; the nearest width that is: 32",
        ),
        (["optimizer.only=adapters"], "needs model.blocks=revffn and model.revffn.adapters=true"),
        ([*ADAPTERS], "name a checkpoint there"),
        (["run.init_from={tmp}/nothing"], "nothing is neither a run with a complete checkpoint"),
    ],
)
def test_mistakes_in_a_config(tiny_config, tmp_path, capsys, overrides, sentence):
    filled = [o.replace("{tmp}", str(tmp_path)) for o in overrides]
    code = run_training(str(tiny_config), [f"run.folder={tmp_path / 'run'}", *filled], "auto")
    error = capsys.readouterr().err
    assert code == 2
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=re.escape(sentence)):
        dry_run(str(tiny_config), [f"run.folder={tmp_path / 'run'}", *filled], "auto")


def test_folders_that_can_hold_no_run(tiny_config, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("text")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "main.py").write_text("text")
    cases = {
        "/proc/x": "run.folder /proc/x cannot be used",
        tmp_path / "file": "cannot be used (Not a directory)",
        tmp_path / "file" / "run": "file is a file",
        tmp_path / "source": "holds other things than a run (main.py); choose a new or empty run.folder",
    }
    for folder, sentence in cases.items():
        for rank, lines in (("0", 1), ("1", 0)):
            with monkeypatch.context() as patch:
                for name, value in {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": "1",
                }.items():
                    patch.setenv(name, value)
                assert run_training(str(tiny_config), [f"run.folder={folder}"], "auto") == 2
            error = capsys.readouterr().err
            assert error.count("\n") == lines
            assert sentence in error or rank == "1"


def test_folders_that_may_hold_a_run(tmp_path):
    for name in ("config.yaml", "metrics.jsonl", "run_id"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
        (tmp_path / name / "outcome.json").write_text("")
        check_folder(tmp_path / name)
    for name in ("logs", "checkpoints"):
        (tmp_path / "killed" / name).mkdir(parents=True)
        (tmp_path / "killed" / "environment.json").write_text("")
        check_folder(tmp_path / "killed")
    (tmp_path / "queued").mkdir()
    check_folder(tmp_path / "queued")
    for name in (".lock", "output.log", "slurm-1.out"):  # what a sweep and a scheduler put there first
        (tmp_path / "queued" / name).write_text("")
    check_folder(tmp_path / "queued")
    check_folder(tmp_path / "absent" / "run")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.0}, {"top_p": 1.5}, {"seed": 10**22}, {"seed": -1}, {"temperature": float("inf")}],
)
def test_options_of_generate(tmp_path, options):
    (name,) = options
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is .*; it must be"):
        next(generate_text(tmp_path, "a", **options))


def test_data_that_the_system_refuses(tiny_config, tmp_path, capsys):
    """Before ranks have met; as a folder without rights is."""
    data, folder = f"/tmp/{'a' * 300}", tmp_path / "run"
    assert run_training(str(tiny_config), [f"run.folder={folder}", f"data.path={data}"], "never") == 2
    said = capsys.readouterr().err
    assert (
        said == f"error: {data}/meta.json: File name too long; mend that and start the same command again\n"
    )


def test_devices_of_eval_and_generate(tiny_config, tiny_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert run_training(str(tiny_config), [f"run.folder={folder}"], "never") == 0
    for asked, sentence in (
        ("tpu", "--device is tpu; it must be auto, cpu or cuda"),
        ("cuda", "--device cuda needs a GPU, and this machine has no usable one; use --device cpu or auto"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_eval(folder, [], ["val"], "text", True, asked)
        with pytest.raises(UserError, match=sentence):
            next(generate_text(folder, "a", asked))

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for module, call in (
        (eval_command, lambda: run_eval(folder, [], ["val"], "text", True)),
        (generate, lambda: next(generate_text(folder, "a", "cpu"))),
    ):
        monkeypatch.setattr(module, "load_run", too_large)
        with pytest.raises(
            UserError, match=r"^cpu has not enough free memory for this model; use --device cpu"
        ):
            call()


def test_a_damaged_checkpoint(tiny_config, tiny_data, tmp_path, capsys):
    first = tmp_path / "first"
    options = ["budget.steps=4", "checkpoint.every=2"]
    assert run_training(str(tiny_config), [f"run.folder={first}", *options], "never") == 0
    newest = first / "checkpoints" / "step-000004"
    sentence = "step-000004 is damaged; use an earlier one (step-000002)"
    for shard in newest.glob("*.distcp"):
        content = shard.read_bytes()
        shard.write_bytes(content[:200] + bytes(len(content) - 200))
    with pytest.raises(UserError, match=re.escape(sentence)):
        evaluate_run(first, tiny_data)
    with pytest.raises(UserError, match=re.escape(sentence)):
        next(generate_text(newest, "alice"))
    capsys.readouterr()
    again = [f"run.folder={tmp_path / 'again'}", f"run.init_from={first}", *options]
    assert run_training(str(tiny_config), again, "never") == 2
    error = capsys.readouterr().err
    assert f"error: the checkpoint {first}" in error
    assert sentence in error
    assert "Traceback" not in error
    (newest / "state.json").write_text("{")
    longer = [f"run.folder={first}", "budget.steps=4", "checkpoint.every=2"]
    assert run_training(str(tiny_config), longer, str(newest)) == 2
    assert sentence in capsys.readouterr().err
    earlier = first / "checkpoints" / "step-000002"
    assert evaluate_run(earlier, tiny_data)["val_loss"] > 0
    # The model has hardly learned: most of its bytes are no characters, which are left out.
    text = "".join(generate_text(earlier, "", max_tokens=60, temperature=2.0))
    assert text
    assert "\ufffd" not in text


def test_a_folder_that_holds_a_run(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_training(str(tiny_config), [f"run.folder={folder}"], "never") == 0
    assert json.loads((folder / "outcome.json").read_text())["status"] == "done"
    assert run_training(str(tiny_config), [f"run.folder={folder}"], "never") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_training(str(tiny_config), [f"run.folder={folder}"], "auto") == 0
    assert "is finished" in capsys.readouterr().err
    assert run_training(str(tiny_config), [f"run.folder={folder}", "model.num_layers=3"], "auto") == 2
    assert "model.num_layers was 2" in capsys.readouterr().err
    assert run_training(str(tiny_config), [f"run.folder={folder}"], str(tmp_path / "step-000001")) == 2
    assert "is no complete checkpoint" in capsys.readouterr().err


def test_weights_that_do_not_fit(tiny_config, tmp_path, capsys):
    first = [f"run.folder={tmp_path / 'first'}", "budget.steps=2"]
    assert run_training(str(tiny_config), first, "never") == 0
    fits = [f"run.folder={tmp_path / 'fits'}", "budget.steps=2", f"run.init_from={tmp_path / 'first'}"]
    assert run_training(str(tiny_config), fits, "never") == 0
    wider = [f"run.folder={tmp_path / 'wider'}", "model.ffn_size=51", f"run.init_from={tmp_path / 'first'}"]
    capsys.readouterr()
    assert run_training(str(tiny_config), wider, "never") == 2
    assert "do not fit this model: layers.0.ffn.w1.weight is (" in capsys.readouterr().err
    assert not (tmp_path / "wider").exists()
    more = [f"run.folder={tmp_path / 'more'}", "budget.steps=2", "model.canon=AC"]
    assert run_training(str(tiny_config), [*more, f"run.init_from={tmp_path / 'first'}"], "never") == 0
    less = [f"run.folder={tmp_path / 'less'}", "model.canon=C", f"run.init_from={tmp_path / 'more'}"]
    assert run_training(str(tiny_config), less, "never") == 2
    assert "it has layers.0.attn_canon.weight, which model.canon here leaves out" in capsys.readouterr().err
    firsts = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("fits", "more")]
    assert firsts[0] == firsts[1]  # Canon layers that a checkpoint has not begin as ones that do nothing
    nothing = [f"run.folder={tmp_path / 'no'}", f"run.init_from={tmp_path / 'nothing'}"]
    assert run_training(str(tiny_config), nothing, "never") == 2
    assert not (tmp_path / "no").exists()


def test_frozen_weights_that_are_gone(tiny_config, tmp_path):
    """As `eval` of a run of adapters finds it."""
    config, _ = load_config(str(tiny_config), [*ADAPTERS, f"run.init_from={tmp_path / 'gone'}"])
    with pytest.raises(UserError, match=r"gone \(its run.init_from\), which is not there; put it back"):
        check_adapters(config)


def test_saved_config_is_complete(tiny_config, tmp_path):
    folder = tmp_path / "run"
    assert run_training(str(tiny_config), [f"run.folder={folder}", "budget.steps=2"], "never") == 0
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert "auto" not in [
        v for s in saved.values() for k, v in s.items() if k not in ("wandb", "verify", "forward")
    ]
    for name in ("metrics.jsonl", "environment.json", "outcome.json", "logs/attempt-1/rank-0.log"):
        assert (folder / name).is_file(), name


def test_what_a_start_says_of_the_batch_and_of_earlier_rows(tiny_config, tmp_path):
    """A batch of 6 windows: of a micro-batch of 16 ten are filled up; rows whose checkpoints are gone make way."""
    options = [f"run.folder={tmp_path / 'run'}", "budget.batch_tokens=192", "data.seq_len=32"]

    def said(*more: str) -> str:
        return "\n".join(start_job(str(tiny_config), [*options, *more], "auto", World(0, 1, 0, 1)).notes)

    assert (
        "parallel.micro_batch=16 is more than the 6 windows that a rank has of each batch: 10 are computed for "
        "nothing; lower it, or raise budget.batch_tokens"
    ) in said("parallel.micro_batch=16")
    assert "computed for nothing" not in said("parallel.micro_batch=6")
    assert "computed for nothing" not in said("parallel.micro_batch=auto")
    assert "starts anew" not in said()
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "loss": 4.0}\n')
    assert f"{tmp_path / 'run'} has rows of earlier attempts and no checkpoint: the run starts anew" in said()


def test_adapters_alone_with_muon_and_standard_blocks(tiny_config, tmp_path):
    options = [f"run.folder={tmp_path / 'run'}", "optimizer.only=adapters", "optimizer.name=muon"]
    with pytest.raises(UserError, match=r"^optimizer.only=adapters needs model.blocks=revffn"):
        start_job(str(tiny_config), options, "auto", World(0, 1, 0, 1))
