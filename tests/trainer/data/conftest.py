import json
import random
from pathlib import Path

import numpy as np
import pytest

from stepline.trainer.data.tokenizer import SentencePieceTokenizer
from stepline.trainer.data.tokenizer_training import train_tokenizer

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


@pytest.fixture
def write_data():
    """A function that writes a data folder with given tokens, without `prepare`."""

    def write(
        folder: Path,
        splits: dict[str, list[list[int]]],
        *,
        vocab_size: int = 1 << 20,
        eod_id: int = 2,
        num_bytes: int = 1000,
        fingerprint: str = "f",
        tokenizer: str = "t",
    ) -> Path:
        folder.mkdir(parents=True)
        meta = {
            "fingerprint": fingerprint,
            "vocab_size": vocab_size,
            "eod_id": eod_id,
            "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
            "tokenizer": {"file": "tokenizer.model", "sha256": tokenizer},
            "splits": {},
        }
        for split, shards in splits.items():
            rows = []
            for i, shard in enumerate(shards):
                tokens = np.array(shard, meta["dtype"])
                ends = np.flatnonzero(tokens == eod_id) + 1
                tokens.tofile(folder / f"{split}-{i:05d}.bin")
                ends.astype(np.uint64).tofile(folder / f"{split}-{i:05d}.idx")
                rows.append({"file": f"{split}-{i:05d}.bin", "tokens": len(tokens), "documents": len(ends)})
            meta["splits"][split] = {
                "documents": sum(row["documents"] for row in rows),
                "tokens": sum(row["tokens"] for row in rows),
                "bytes": num_bytes,
                "shards": rows,
            }
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder

    return write
