"""A run's tokenizer, as AutoTokenizer loads it from an export: the same ids, exactly."""

import io
import json
from pathlib import Path

import pytest

from stepline.trainer.data.tokenizer import load_tokenizer
from stepline.trainer.data.tokenizer_training import train_tokenizer
from stepline.trainer.hf.tokenizer import SAMPLES, write_tokenizer

HERE = Path(__file__).resolve().parent
SOURCES = sorted([*HERE.glob("*.py"), *(HERE.parent / "run").glob("*.py")])


def auto(folder, model_type="llama"):
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral"])
def test_sentencepiece_gives_the_same_ids_and_texts(tmp_path, model_type):
    ours = train_tokenizer((file.read_text() for file in SOURCES), 600)
    assert write_tokenizer(ours, tmp_path) is None
    theirs = auto(tmp_path, model_type)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eod_id
    assert len(theirs) == ours.vocab_size
    texts = [*(file.read_text() for file in SOURCES), *SAMPLES]
    for text in (text for text in texts if not any(name in text for name in ("<s>", "</s>", "<unk>"))):
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.decode([*ours.encode("a b"), ours.eod_id], skip_special_tokens=True) == "a b"
    # for transformers, unlike for Stepline, a special token's name in a text is the token
    assert ours.eod_id not in ours.encode("</s>")
    assert theirs("</s>").input_ids == [ours.eod_id]


@pytest.mark.parametrize("dummy", [True, False])
def test_models_trained_elsewhere(tmp_path, dummy):
    """With a space before the first word, as Llama's tokenizer; unigram models are left as they are, and it is said."""
    import sentencepiece as spm

    def trained(kind):
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(file.read_text() for file in SOURCES).splitlines()),
            model_writer=model, model_type=kind, vocab_size=600, byte_fallback=True, add_dummy_prefix=dummy,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
        (tmp_path / f"{kind}.model").write_bytes(model.getvalue())
        (tmp_path / kind).mkdir()
        return load_tokenizer(tmp_path / f"{kind}.model"), tmp_path / kind

    ours, folder = trained("bpe")
    assert write_tokenizer(ours, folder) is None
    assert auto(folder)("def f(x):\n  return x").input_ids == ours.encode("def f(x):\n  return x")
    ours, folder = trained("unigram")
    assert "tokenizer.model" in write_tokenizer(ours, folder)
    assert [file.name for file in folder.iterdir()] == ["tokenizer.model"]


def test_a_tokenizer_of_hugging_face_is_copied(tmp_path):
    sentencepiece = train_tokenizer((file.read_text() for file in SOURCES), 600)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_tokenizer(sentencepiece, tmp_path / "a")
    ours = load_tokenizer(tmp_path / "a" / "tokenizer.json")
    assert ours.kind == "huggingface"
    assert write_tokenizer(ours, tmp_path / "b") is None
    theirs = auto(tmp_path / "b")
    assert theirs(SAMPLES[2]).input_ids == ours.encode(SAMPLES[2])
    assert theirs.eos_token_id == ours.eod_id


def test_of_two_forms_in_a_folder_the_model_counts_where_the_other_is_its_conversion(tmp_path):
    """A tokenizer.json that says more or ends documents otherwise, as of a folder from elsewhere, is the tokenizer."""
    from tokenizers import Tokenizer

    ours = train_tokenizer((file.read_text() for file in SOURCES), 400)
    assert write_tokenizer(ours, tmp_path) is None
    assert load_tokenizer(tmp_path).sha256 == ours.sha256
    file, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    converted, said = file.read_text(), config.read_text()
    file.write_text(json.dumps(json.loads(converted)))  # written otherwise, the same tokenizer
    assert load_tokenizer(tmp_path).sha256 == ours.sha256
    config.write_text(said.replace("</s>", "<s>"))
    assert (load_tokenizer(tmp_path).kind, load_tokenizer(tmp_path).eod_id) == ("huggingface", 1)
    config.write_text(said)
    more = Tokenizer.from_file(str(file))
    more.add_special_tokens(["<|more|>"])
    more.save(str(file))
    assert (load_tokenizer(tmp_path).kind, load_tokenizer(tmp_path).vocab_size) == ("huggingface", 401)
    file.write_text(converted)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    assert load_tokenizer(tmp_path).kind == "huggingface"


def test_a_unigram_tokenizer_of_hugging_face_keeps_its_end_of_text(tmp_path):
    """Its vocabulary is a list, and the token that ends documents one of its ordinary pieces."""
    from tokenizers import Tokenizer, models

    (tmp_path / "out").mkdir()
    fast = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("<eos>", -3.0)], unk_id=0))
    fast.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert write_tokenizer(ours, tmp_path / "out") is None
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"
    assert load_tokenizer(tmp_path / "out").sha256 == ours.sha256
