import io
import random

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.trainer.data.dataset import TokenSplit
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from stepline.trainer.data.tokenizer_training import sentences, train_tokenizer
from stepline.trainer.errors import UserError

AWKWARD = [
    "",
    " ",
    "\0",
    "a\0b\x01\x7f\x85\x9f",
    "  leading and trailing  ",
    "\r\n\r\n\t\t x \n",
    "\u2581",
    "\u2581\u2581 a\u2581b \u2581",
    "\u2585 \ufffd \ufeff \u2028 \u200b \u3000 \u00a0",
    "<s>a</s><unk><0x41><pad>",
    " \u2047 ",
    "e\u0301 é ﬁ Å",
    "\U0010ffff\U0001f642",
    "x" * 50_000,
    " " * 5_000,
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
special_text = st.text(st.sampled_from("a \u2581\u2585\t\r\n\0<s>/0x4\u2047\ufffdé🙂"))


@pytest.mark.parametrize("text", AWKWARD)
def test_sentencepiece_round_trip_of_awkward_texts(tokenizer: SentencePieceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.one_of(unicode_text, special_text), st.integers(0, 40))
def test_sentencepiece_round_trip_of_any_text_in_any_pieces(
    tokenizer: SentencePieceTokenizer, text: str, cut: int
) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = tokenizer.encode_pieces([text[:cut], text[cut:]], [True, False])
    assert tokenizer.decode(pieces[0] + pieces[1]) == text
    assert max([*pieces[0], *pieces[1], 0]) < tokenizer.vocab_size
    assert tokenizer.eod_id not in pieces[0] + pieces[1]


def test_ids_are_sentencepiece_own_where_no_space_mark_occurs(tokenizer: SentencePieceTokenizer) -> None:
    raw = spm.SentencePieceProcessor(model_proto=tokenizer._proto)
    for text in AWKWARD:
        if "\u2581" not in text:
            assert tokenizer.encode(text) == raw.encode(text)
    assert tokenizer.encode("a\u2581b") == [
        *raw.encode("a"),
        *(raw.piece_to_id(f"<0x{byte:02X}>") for byte in b"\xe2\x96\x81"),
        *raw.encode("b"),
    ]


def test_training_is_deterministic_and_indentation_is_cheap() -> None:
    rng = random.Random(1)
    texts = ["    if x:\n        return y" + str(rng.random()) + "\n" for _ in range(300)]
    first, second = train_tokenizer(texts, 300), train_tokenizer(texts, 300)
    assert first.sha256 == second.sha256
    assert len(first.encode("        ")) == 1
    assert first.vocab_size == 300


@pytest.mark.parametrize(
    ("vocab_size", "words"), [(100_000, "too large"), (260, "too small"), (2_000, "give at most")]
)
def test_impossible_vocabulary_is_one_sentence(vocab_size: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        train_tokenizer(["some short text, a bit more of it\n" * 30], vocab_size)
    assert "\n" not in str(caught.value)
    assert str(vocab_size) in str(caught.value)


def test_no_text_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300)


def test_dummy_prefix_model_is_encoded_like_sentencepiece_and_joins_across_pieces() -> None:
    """Llama-2's kind of model adds a space in front of a text; pieces of one document get it once."""
    model = io.BytesIO()
    text = "a few words, and a few more words\nof text " * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", " ")] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    ours = SentencePieceTokenizer(model.getvalue(), "model")
    raw = spm.SentencePieceProcessor(model_proto=model.getvalue())
    for sample in (text, " a", "a", "  two  spaces ", ""):
        assert ours.encode(sample) == raw.encode(sample)
    pieces = ours.encode_pieces(["a few\n", "words ", "\u2581more"], [True, False, False])
    assert ours.decode([i for piece in pieces for i in piece]) == "a few\nwords \u2581more"


@pytest.mark.parametrize("dummy", [True, False])
def test_a_model_that_removes_white_space_is_encoded_like_sentencepiece(tmp_path, dummy) -> None:
    """spm_train's default; its pieces of a document could not be joined, so documents stay whole."""
    model, text = io.BytesIO(), "a few words, and a few more words of text " * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 3), model_writer=model, model_type="bpe", vocab_size=50,
        add_dummy_prefix=dummy, minloglevel=2,
    )  # fmt: skip
    ours = SentencePieceTokenizer(model.getvalue(), "model")
    raw = spm.SentencePieceProcessor(model_proto=model.getvalue())
    for sample in (text, " a", "a ", "a few", "  two  spaces ", "few\u2581words", ""):
        assert ours.encode(sample) == raw.encode(sample)
    (tmp_path / "a.model").write_bytes(model.getvalue())
    (tmp_path / "a.txt").write_text("a few words\n" * 20_000)
    prepare(
        [tmp_path / "a.txt"], tmp_path / "data", tokenizer=tmp_path / "a.model", workers=1, progress=False
    )
    tokens = TokenSplit(tmp_path / "data", "train")
    got = tokens.read(0, tokens.num_tokens - 1).tolist()
    assert got == raw.encode(raw.decode(got))
    assert raw.decode(got).split() == (["a", "few", "words"] * 20_000)[: len(raw.decode(got).split())]


@settings(max_examples=100, deadline=None)
@given(st.one_of(unicode_text, st.text("a \n<|end|>")))
def test_hugging_face_round_trip(hf_folder, text: str) -> None:
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == text
    assert tokenizer.eod_id not in ids


def test_hugging_face_ids_equal_transformers(hf_folder) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(hf_folder / "tokenizer.json"), eos_token="<|end|>"
    )
    ours = load_tokenizer(hf_folder)
    text = "def window(batch):\n    return été 🙂  数据\n"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert (ours.eod_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert ours.joinable


def test_saved_tokenizers_load_the_same(tokenizer, hf_folder, tmp_path) -> None:
    for i, original in enumerate((tokenizer, load_tokenizer(hf_folder))):
        folder = tmp_path / str(i)
        folder.mkdir()
        name = original.save(folder)
        for path in (folder, folder / name):
            assert load_tokenizer(path).sha256 == original.sha256


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.model", b"no model"),
        ("t.model", b""),
        ("t.json", b"{}"),
        ("t.json", b"\xff"),
        ("t.txt", b"hello\n"),
    ],
)
def test_wrong_tokenizer_file(tmp_path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not a tokenizer"):
        load_tokenizer(tmp_path / name)


def test_missing_tokenizer(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "t.model")
    with pytest.raises(UserError, match=r"neither a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_end_of_text(hf_folder, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="names no end-of-text token"):
        load_tokenizer(tmp_path)


@given(st.text(st.sampled_from("ab \n\t\0"), max_size=40))
def test_training_sentences_keep_every_trainable_character(text: str) -> None:
    long = text * 300
    cut = list(sentences([long]))
    assert "".join(cut) == long.replace("\t", "").replace("\0", "")
    assert all(0 < len(sentence) <= 3000 for sentence in cut)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "tokenizer_config.json is no JSON"),
        ("[]", "names no end-of-text"),
        ('{"eos_token": ["</s>"]}', "names no end-of-text"),
    ],
)
def test_a_damaged_tokenizer_config_is_one_sentence(hf_folder, tmp_path, content, sentence) -> None:
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
