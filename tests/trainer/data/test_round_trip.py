"""What `prepare` says of a tokenizer that does not give text back."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece as spm

from stepline.trainer.data.discover import discover
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.round_trip import SAMPLE_CHARS, RoundTrip, check_round_trip, samples
from stepline.trainer.data.sources import ReadOptions
from stepline.trainer.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from stepline.trainer.data.units import plan_units
from stepline.trainer.errors import UserError

tokenizers = pytest.importorskip("tokenizers")
ENGLISH = "I do not know what the quick brown fox jumps over.\n\tThe  lazy dog; 123 (brackets)!\n"
GERMAN = "Größe und Übermut tun selten gut\n"


def sentencepiece_of(**options) -> SentencePieceTokenizer:
    """A model of both texts, by default normalised by nmt_nfkc and without bytes, as T5's is."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH, GERMAN] * 30), model_writer=model, hard_vocab_limit=False, minloglevel=2,
        **{"model_type": "unigram", "vocab_size": 150} | options,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue(), "a model")


@pytest.fixture
def hugging_face(tmp_path):
    """A function that trains a tokenizer of Hugging Face's on English."""

    def make(model, trainer, vocab_size: int = 200, **parts):
        fast = tokenizers.Tokenizer(model)
        for name, part in parts.items():
            setattr(fast, name, part)
        special = ["[UNK]", "<eos>"]
        trained = trainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
        fast.train_from_iterator([ENGLISH * 3], trained)
        fast.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
        return load_tokenizer(tmp_path)

    return make


@pytest.fixture
def byte_level(hugging_face):
    """A function that trains on the bytes of the text alone, as `tokenizers` does unless told otherwise."""
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = {"pre_tokenizer": pre, "decoder": tokenizers.decoders.ByteLevel()}
    model, trainer = tokenizers.models.BPE(), tokenizers.trainers.BpeTrainer
    return lambda **more: hugging_face(model, trainer, **parts, **more)


def said(tokenizer, *texts: str) -> tuple[RoundTrip, str | None]:
    return check_round_trip(tokenizer, "tok", [(f"{i}.txt", text) for i, text in enumerate(texts)])


def refusal(tokenizer, *texts: str) -> str:
    with pytest.raises(UserError) as caught:
        said(tokenizer, *texts)
    return str(caught.value)


def test_bytes_that_a_byte_level_tokenizer_has_not(byte_level) -> None:
    tokenizer = byte_level()
    assert said(tokenizer, ENGLISH) == (RoundTrip(True, 0.0), None)
    assert refusal(tokenizer, ENGLISH, "gröber müde Ära") == (
        "the tokenizer tok loses 'ö', 'ü', 'Ä' of 1.txt: they do not come back from its tokens; give one that has all "
        "bytes among its tokens"
    )


def test_unknown_words_beyond_one_percent_are_refused_and_below_said(hugging_face) -> None:
    model, words = tokenizers.models.WordLevel(unk_token="[UNK]"), tokenizers.pre_tokenizers.Whitespace()
    tokenizer = hugging_face(model, tokenizers.trainers.WordLevelTrainer, pre_tokenizer=words)
    assert refusal(tokenizer, ENGLISH, GERMAN) == (
        "the tokenizer tok loses 23.3 % of the text as unknown tokens ('Größe', 'und', 'Übermut', 'tun', 'selten' and "
        "1 more of 1.txt), more than 1 %; give one that has all bytes among its tokens"
    )
    kept, note = said(tokenizer, ENGLISH * 30, ENGLISH + "foxes")
    assert kept == RoundTrip(False, 5 / (31 * len(ENGLISH) + 5))
    assert note == (
        "the tokenizer tok loses 0.19 % of the text as unknown tokens ('foxes' of 1.txt) and changes text "
        "('mps over.\\n\\tThe  lazy' of 0.txt comes back as 'mps over . The lazy '); bits per byte are over the bytes "
        "of the text as it was"
    )


def test_a_character_of_several_unknown_bytes_counts_once(hugging_face) -> None:
    model, pre = tokenizers.models.BPE(unk_token="[UNK]"), tokenizers.pre_tokenizers.ByteLevel(False)
    tokenizer = hugging_face(model, tokenizers.trainers.BpeTrainer, pre_tokenizer=pre)
    assert tokenizer.unknown("a数据") == ["数", "据"]
    assert said(tokenizer, ENGLISH * 10, "数")[0].unknown_share == 1 / (10 * len(ENGLISH) + 1)


def test_what_may_be_lost_is_noted(byte_level, tmp_path, capsys) -> None:
    """`eval` has the run's tokenizer and no other."""
    tokenizer = byte_level()
    kept, note = check_round_trip(tokenizer, "tok", [("0.txt", "gröber Ära")], refuse=False)
    assert kept == RoundTrip(False, 0.0)
    assert note == (
        "the tokenizer tok loses 'ö', 'Ä' of 0.txt without a trace; bits per byte are over the bytes of the text as "
        "it was"
    )
    t5 = sentencepiece_of()
    kept, note = check_round_trip(t5, "tok", [("0.txt", "{a}")], refuse=False)
    assert kept == RoundTrip(False, 2 / 3)
    assert note.startswith("the tokenizer tok loses 67 % of the text as unknown tokens ('{', '}' of 0.txt)")
    (tmp_path / "t5.model").write_bytes(t5._proto)
    (tmp_path / "code.c").write_text("{}\n" * 500)
    options = {"tokenizer": tmp_path / "t5.model", "val_share": 0.0, "workers": 1, "progress": False}
    meta = prepare([tmp_path / "code.c"], tmp_path / "out", may_lose=True, **options)
    assert meta["tokenizer"]["unknown_share"] == 2 / 3
    assert "t5.model loses 67 % of the text" in capsys.readouterr().err


def test_a_tokenizer_that_gives_up(tmp_path) -> None:
    """No token for a word, and no unknown one: the library raises a bare Exception."""
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<eos>": 1}))
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        UserError, match=r"^/.*tokenizer\.json cannot encode all text \(.*Missing \[UNK\].*\); give one"
    ):
        load_tokenizer(tmp_path)


def test_a_normaliser_is_said_and_not_refused(hugging_face) -> None:
    """T5's and BERT's: white space, forms, case and accents."""
    end = "; bits per byte are over the bytes of the text as it was"
    kept, note = said(sentencepiece_of(), ENGLISH, GERMAN + "ﬁt")
    assert kept == RoundTrip(False, 0.0)
    assert note == (
        "the tokenizer tok changes text ('ps over.\\n\\tThe  lazy ' of 0.txt comes back as 'ps over. The lazy do')"
        + end
    )
    bert = hugging_face(
        tokenizers.models.WordPiece(unk_token="[UNK]"),
        tokenizers.trainers.WordPieceTrainer,
        normalizer=tokenizers.normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=tokenizers.pre_tokenizers.BertPreTokenizer(),
        decoder=tokenizers.decoders.WordPiece(),
    )
    kept, note = said(bert, "Ï do  not knów")
    assert kept == RoundTrip(False, 0.0)
    assert (
        note
        == f"the tokenizer tok changes text ('Ï do  not knów' of 0.txt comes back as 'i do not know'){end}"
    )


def test_a_normaliser_of_its_own(byte_level) -> None:
    kept, note = said(byte_level(normalizer=tokenizers.normalizers.Replace("#", ".")), "no. # 1")
    assert kept == RoundTrip(False, 0.0)
    assert "('no. # 1' of 0.txt comes back as 'no. . 1')" in note


def test_sentencepiece_without_bytes() -> None:
    tokenizer = sentencepiece_of()
    assert refusal(tokenizer, ENGLISH, "{a} 数据数据") == (
        "the tokenizer tok loses 6.59 % of the text as unknown tokens ('{', '}', '数据数据' of 1.txt), more than "
        "1 %; give one that has all bytes among its tokens"
    )
    assert said(tokenizer, ENGLISH * 20, "数据")[0].unknown_share == 2 / (20 * len(ENGLISH) + 2)


def test_llamas_kind_gives_all_back() -> None:
    """With bytes, not normalised; by nmt_nfkc only forms and white space change."""
    options = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True}
    text = ENGLISH + GERMAN + "数据 🙂 \u2581 <unk> <0x41>"
    keeps = sentencepiece_of(**options, normalization_rule_name="identity", remove_extra_whitespaces=False)
    assert said(keeps, text) == (RoundTrip(True, 0.0), None)
    kept, note = said(sentencepiece_of(**options), text)
    assert kept == RoundTrip(False, 0.0)
    assert "changes text" in note


def test_prepare_refuses_before_it_encodes_or_records_what_came_back(tmp_path, capsys) -> None:
    (tmp_path / "t5.model").write_bytes(sentencepiece_of()._proto)
    (tmp_path / "good.txt").write_text(ENGLISH * 50)
    (tmp_path / "code.c").write_text("{}\n" * 500)
    options = {"tokenizer": tmp_path / "t5.model", "val_share": 0.1, "workers": 1, "progress": False}
    with pytest.raises(
        UserError, match=r"t5\.model loses .* unknown tokens \('\{\}' of .*code\.c\), more than 1 %"
    ):
        prepare([tmp_path / "good.txt", tmp_path / "code.c"], tmp_path / "out", **options)
    assert not (tmp_path / "out.partial").exists()
    meta = prepare([tmp_path / "good.txt"], tmp_path / "out", **options)
    assert (meta["tokenizer"]["keeps_text"], meta["tokenizer"]["unknown_share"]) == (False, 0.0)
    assert (
        capsys.readouterr().err.count(f"prepare: the tokenizer {tmp_path / 't5.model'} changes text (") == 1
    )
    meta = prepare([tmp_path / "code.c"], tmp_path / "own", vocab_size=265, val_share=0.1, progress=False)
    assert (meta["tokenizer"]["keeps_text"], meta["tokenizer"]["unknown_share"]) == (True, 0.0)


def test_the_sample_is_bounded_and_passes_over_what_cannot_be_read(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 999}) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 3000)
    (tmp_path / "b.jsonl").write_text("no json\n")
    found = list(samples(plan_units(discover([tmp_path], [])[0], ReadOptions()), ReadOptions()))
    assert {file for file, _ in found} == {str(tmp_path / "a.jsonl")}
    assert 0.9 * SAMPLE_CHARS < sum(len(text) for _, text in found) <= SAMPLE_CHARS
