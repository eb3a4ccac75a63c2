"""Training a tokenizer that every text survives unchanged."""

import io
import re
from collections.abc import Iterable, Iterator

from stepline.trainer.data.tokenizer import SentencePieceTokenizer
from stepline.trainer.errors import UserError

SENTENCE_CHARS = 3000
UNTRAINABLE = "[\0\t\u2585]"  # sentencepiece drops training sentences with these; their bytes stand for them


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into training sentences of whole lines, at most SENTENCE_CHARS characters each."""
    for text in texts:
        for part in re.split(UNTRAINABLE, text):
            start = 0
            while start < len(part):
                end = start + SENTENCE_CHARS
                if end < len(part):
                    end = part.rfind("\n", start, end) + 1 or end
                yield part[start:end]
                start = end


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Train a byte-pair-encoding sentencepiece model that every text survives unchanged.

    Bytes stand in for rare characters (byte fallback), nothing is normalised, all white space is kept;
    merges may span line ends and runs of spaces, so that indentation is cheap. The result depends on the
    texts and `vocab_size` alone. Raises UserError when the texts are too few for `vocab_size`.
    """
    import sentencepiece as spm

    model = io.BytesIO()
    raised: list[Exception] = []

    def noted() -> Iterator[str]:
        """The sentences; sentencepiece would turn what reading them raises into an error of its own."""
        try:
            yield from sentences(texts)
        except Exception as error:
            raised.append(error)
            raise

    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=noted(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SENTENCE_CHARS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=4,  # a constant, because the model records it
            minloglevel=2,
        )
    except Exception as error:
        if raised:
            raise raised[0] from None
        if not isinstance(error, RuntimeError):
            raise
        raise UserError(vocabulary_error(str(error), vocab_size)) from error
    return SentencePieceTokenizer(model.getvalue(), "the new tokenizer")


def vocabulary_error(message: str, vocab_size: int) -> str:
    """One sentence for what sentencepiece's trainer said about `vocab_size`."""
    if most := re.search(r"too high \(\d+\).*<= (\d+)", message):
        return f"--vocab-size {vocab_size} is too large for this text; give at most {most[1]} or more text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small for this text's characters; give at least {least[1]}"
    if "sentences_.empty()" in message:
        return "the input has no text to train a tokenizer on; give more text or a --tokenizer"
    return f"no tokenizer could be trained (--vocab-size {vocab_size}); sentencepiece says: {message}"
