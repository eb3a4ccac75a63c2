"""Folders that transformers has saved, as runs of Stepline; and folders that are no model."""

import json
import pickle

import pytest
import torch
import yaml
from typer.testing import CliRunner

from stepline.comm.mesh import World
from stepline.models.hf import config_from_hf
from stepline.trainer.cli import app, main
from stepline.trainer.config_io import read_run_config
from stepline.trainer.data.dataset import load_meta
from stepline.trainer.data.prepare import prepare
from stepline.trainer.errors import UserError
from stepline.trainer.hf import importing
from stepline.trainer.hf.export import export_run
from stepline.trainer.hf.importing import import_model
from stepline.trainer.hf.shards import INDEX, read_folder
from stepline.trainer.run.eval_command import find_sources
from stepline.trainer.run.generate import generate_text
from stepline.trainer.run.infer import load_run, run_tokenizer
from stepline.trainer.run.start import start_job


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3Moe", "Mixtral"])
def test_logits_are_those_of_transformers(family, tokens, tmp_path, save):
    theirs = save(family, tmp_path / "hf")
    done = import_model(tmp_path / "hf", tmp_path / "run")
    assert done.architecture == f"{family}ForCausalLM"
    # a stock mixture stays one: it is balanced by its loss
    model, config, _ = load_run(tmp_path / "run")
    assert config.model.ffn == "dense" or config.model.moe.balance == "global"
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_pieces_of_one_tensor_and_half_precision(tokens, tmp_path, monkeypatch, save):
    """Rows are read and written a few at a time; values stay in the type of the files."""
    from transformers import AutoModelForCausalLM

    save("Llama", tmp_path / "hf").bfloat16().save_pretrained(tmp_path / "half")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    monkeypatch.setattr(importing, "PIECE_BYTES", 1000)
    import_model(tmp_path / "half", tmp_path / "run")
    model, _, checkpoint = load_run(tmp_path / "run")
    metadata = torch.distributed.checkpoint.FileSystemReader(checkpoint).read_metadata()
    embedding = metadata.state_dict_metadata["model.embed.weight"]
    assert embedding.properties.dtype == torch.bfloat16
    assert len(embedding.chunks) == -(-331 // (1000 // 128))
    assert torch.equal(model.embed.weight, theirs.model.embed_tokens.weight)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_the_run_has_the_tokenizer_and_says_what_to_type(data, tmp_path, save):
    from stepline.trainer.data.tokenizer import load_tokenizer
    from stepline.trainer.hf.tokenizer import write_tokenizer

    save("Qwen3", tmp_path / "hf")
    write_tokenizer(load_tokenizer(data), tmp_path / "hf")
    result = CliRunner().invoke(app, ["import", str(tmp_path / "hf"), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    prepare, train = (line.strip() for line in result.output.splitlines()[-2:])
    assert prepare.startswith("stepline prepare TEXT")
    assert f"run.init_from={tmp_path / 'run'}" in train
    assert load_tokenizer(tmp_path / "run" / "data").encode("alice") == load_tokenizer(data).encode("alice")
    pieces = list(generate_text(tmp_path / "run", "alice", max_tokens=3, temperature=0))
    assert pieces[0] == "alice"


@pytest.fixture
def hf_data(texts, tmp_path):
    """The documents, prepared with a tokenizer of Hugging Face that names its end of text in a file of its own."""
    from tokenizers import ByteLevelBPETokenizer

    (tmp_path / "theirs").mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(texts / "000.txt")], vocab_size=320, special_tokens=["<|end|>"], show_progress=False)
    bpe.save(str(tmp_path / "theirs" / "tokenizer.json"))
    (tmp_path / "theirs" / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    out, theirs = tmp_path / "hf-data", tmp_path / "theirs"
    prepare([texts], out, tokenizer=theirs, workers=1, val_share=0.02, progress=False)
    return out


@pytest.mark.parametrize("which", ["data", "hf_data"])
def test_out_and_back_the_tokenizer_is_the_same(request, make_run, tmp_path, which):
    """So that training and evaluation on the original data see no other tokenizer, wherever the run is moved."""
    data = request.getfixturevalue(which)
    run, _ = make_run()
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["data"]["path"] = str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    export_run(run, tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "in")
    moved = (tmp_path / "in").rename(tmp_path / "moved")
    config, own = read_run_config(moved), load_meta(data).tokenizer_sha256
    assert run_tokenizer(config).sha256 == load_meta(moved / "data").tokenizer_sha256 == own
    assert [source.path for source in find_sources(config, [data], ["val"])] == [data]
    options = [f"data.path={data}", f"run.init_from={moved}", f"run.folder={tmp_path / 'new'}"]
    options += ["budget.steps=1", "budget.batch_tokens=64", "parallel.micro_batch=1", "optimizer.lr=1e-3"]
    job = start_job(str(moved / "config.yaml"), options, "never", World(0, 1, 0, 1))
    assert not [note for note in job.notes if "tokenizer" in note]


def refused(folder, tmp_path, match):
    with pytest.raises(UserError, match=match) as caught:
        import_model(folder, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.partial").exists()


def test_folders_that_are_no_model(tmp_path, save):
    refused(tmp_path / "nothing", tmp_path, "no config.json")
    folder = tmp_path / "hf"
    save("Llama", folder)
    config = json.loads((folder / "config.json").read_text())
    gpt = config | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(gpt))
    refused(folder, tmp_path, "GPT2LMHeadModel is not supported.*Llama.*Qwen3.*Qwen3Moe.*Mixtral")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path, "cannot be read")
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5, "head_dim": 7}))
    refused(folder, tmp_path, "head_dim 7 is odd")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32, "head_dim": 16}))
    refused(folder, tmp_path, "shape")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(folder, tmp_path, "lacks the weights of layers.2")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused(folder, tmp_path, "does not have")


def test_missing_and_damaged_files(tmp_path, save):
    folder = tmp_path / "hf"
    save("Llama", folder)
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].unlink()
    refused(folder, tmp_path, f"{shards[1].name}.*download")
    shards[1].write_bytes(whole[:-4])
    refused(folder, tmp_path, "cut off")
    shards[1].write_bytes(b"\xff" * 64)
    refused(folder, tmp_path, "no readable safetensors")
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../" + shards[1].name
    (folder / INDEX).write_text(json.dumps(index))
    shards[1].write_bytes(whole)
    refused(folder, tmp_path, "lacks")


def test_nothing_in_a_folder_is_run(tmp_path, save):
    """Pickled weights are refused by name, remote code is not looked at."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    folder = tmp_path / "hf"
    save("Llama", folder)
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, "no safetensors.*pickled")
    assert not (tmp_path / "exploded").exists()


def test_headers_with_places_outside_of_the_file(tmp_path):
    def file(entry):
        text = json.dumps({"a": entry}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))

    file({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]})
    assert read_folder(tmp_path)["a"].read(0, 2).tolist() == [[0, 0], [0, 0]]
    for entry in (
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "aa", "data_offsets": [0, 16]},
        [],
    ):
        file(entry)
        with pytest.raises(UserError):
            read_folder(tmp_path)


def test_a_users_mistake_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    for arguments, sentence in (
        (["import", tmp_path], f"{tmp_path} is no model's folder: it has no config.json"),
        (["export", tmp_path], f"{tmp_path} is neither a run with a complete checkpoint nor a checkpoint"),
        (["export", tmp_path, "--dtype", "fp8"], "--dtype is 'fp8'; it must be 'fp32' or 'bf16'"),
        (
            ["export", tmp_path, "--shard-size", "5"],
            "--shard-size is '5'; write a number with KB, MB or GB, such",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["stepline", *map(str, arguments), "--output", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {sentence}")
        assert said.count("\n") == 1


def test_the_config_holds_what_the_folder_says(tmp_path, save):
    save("Mixtral", tmp_path / "hf", router_aux_loss_coef=0.02, num_hidden_layers=3)
    import_model(tmp_path / "hf", tmp_path / "run")
    sections = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert sections["model"]["moe"] == {
        "experts": 6, "balance": "global", "balance_loss": float(f"{0.02 * 2 / 3:.12g}")
    }  # fmt: skip
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["router_aux_loss_coef"] == 0.02
    assert sections["data"]["seq_len"] == 256


@pytest.mark.parametrize("trained", [True, False])
def test_whose_begin_of_text_an_export_has(make_run, texts, hf_data, tmp_path, save, trained):
    """A trained model has seen the end of a document before each text; an import what its tokenizer puts there."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    theirs = tmp_path / "theirs"
    made = Tokenizer.from_file(str(theirs / "tokenizer.json"))
    made.add_special_tokens(["<s>"])
    begin, end = made.token_to_id("<s>"), made.token_to_id("<|end|>")
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    made.save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<|end|>"}')
    if trained:
        prepare([texts], tmp_path / "d", tokenizer=theirs, workers=1, val_share=0.02, progress=False)
        run, _ = make_run()
        raw = yaml.safe_load((run / "config.yaml").read_text())
        raw["data"]["path"] = str(tmp_path / "d")
        (run / "config.yaml").write_text(yaml.safe_dump(raw))
    else:
        save("Llama", tmp_path / "hf", bos_token_id=begin)
        for file in theirs.iterdir():
            (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
        import_model(tmp_path / "hf", tmp_path / "run")
        run = tmp_path / "run"
    export_run(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    named = [
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    ]
    first = end if trained else begin
    assert [raw["bos_token_id"] for raw in named] == [first, first] == [tokenizer.bos_token_id] * 2
    assert [raw["eos_token_id"] for raw in named] == [end, end] == [tokenizer.eos_token_id] * 2
    ids = tokenizer("alice").input_ids
    assert (ids[0] == begin) is not trained


def test_a_plan_of_an_import_says_that_it_has_no_budget(data, tmp_path, save, monkeypatch, capsys):
    from stepline.trainer.data.tokenizer import load_tokenizer
    from stepline.trainer.hf.tokenizer import write_tokenizer

    save("Qwen3", tmp_path / "hf")
    write_tokenizer(load_tokenizer(data), tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    for command, sentence in (
        (["plan", f"{tmp_path}/run/config.yaml"], "the config has no budget"),
        (["eval", f"{tmp_path}/run"], "has no split 'val'; it holds a tokenizer and no text"),
    ):
        monkeypatch.setattr("sys.argv", ["stepline", *command])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen3Moe"])
def test_key_heads_that_a_config_leaves_out_are_those_of_transformers(tmp_path, save, kind):
    import transformers

    raw = {
        "model_type": {"Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe"}[kind],
        "vocab_size": 331,
        "hidden_size": 64,
    }
    raw |= {"num_attention_heads": 64, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 32}
    raw |= {"moe_intermediate_size": 16} if kind == "Qwen3Moe" else {}
    theirs = getattr(transformers, f"{kind}Config")(**{k: v for k, v in raw.items() if k != "model_type"})
    assert config_from_hf(raw)[0].kv_heads == theirs.num_key_value_heads != 64


def test_a_balance_loss_of_transformers_is_ours_times_top_k_over_layers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = load_balancing_loss_func((logits,) * 3, 6, 2)
    shares = torch.nn.functional.one_hot(logits.topk(2).indices, 6).double().mean(dim=(0, 1))
    ours = (
        3 * 6 * (shares * logits.softmax(-1).mean(0)).sum()
    )  # as tests/models/test_moe.py has it, of three layers
    config, _ = config_from_hf(
        {
            "model_type": "mixtral",
            "vocab_size": 64,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
        }
        | {
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "num_local_experts": 6,
            "router_aux_loss_coef": 0.5,
        }
    )
    assert config.moe.balance_loss * ours.item() == pytest.approx(0.5 * theirs.item(), rel=1e-6)


@pytest.mark.parametrize("begins", [1, 2, None])
def test_an_untrained_import_begins_texts_as_before(data, tmp_path, save, begins):
    """A sentencepiece model alone does not tell: Llama's models begin with <s>, those of Stepline with </s>."""
    from stepline.trainer.data.tokenizer import load_tokenizer

    save("Llama", tmp_path / "hf", bos_token_id=begins)
    load_tokenizer(data).save(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    named = [
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    ]
    assert [raw["bos_token_id"] for raw in named] == [begins or 2] * 2
    shown = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (shown["bos_token"], shown["eos_token"]) == ("<s>" if begins == 1 else "</s>", "</s>")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'ids = [{begins or 2}, *tokenizer("Once"' in card
    assert "in training" not in card
