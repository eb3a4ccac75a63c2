import random
from pathlib import Path

import pytest

from stepline.trainer.data.tokenizer import SentencePieceTokenizer, train_tokenizer

WORDS = "the a def return import self for in if not value = ( ) : , loss batch token window été 数据 🙂"


def make_text(seed: int, lines: int) -> str:
    """Reproducible text with words, indentation and blank lines."""
    rng = random.Random(seed)
    return "".join(
        " " * rng.choice([0, 0, 4, 8]) + " ".join(rng.choices(WORDS.split(), k=rng.randrange(12))) + "\n"
        for _ in range(lines)
    )


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer([make_text(seed, 200) for seed in range(3)], 400)


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder / tokenizer.save(folder)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer in the form of Hugging Face."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hf")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([make_text(0, 200)], vocab_size=400, special_tokens=["<|end|>"])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    return folder
