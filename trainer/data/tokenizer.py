"""Tokenizers: a sentencepiece model or a Hugging Face tokenizer, behind one small interface."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

from stepline.trainer.errors import UserError, first_line

SPACE_MARK = "\u2581"  # sentencepiece's internal space: in a text it would come back as an ordinary space
# Serialised protobuf messages merge when they are concatenated; this one sets normalizer_spec (field 3)
# .add_dummy_prefix (field 3) to false in whatever model it is appended to.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer(Protocol):
    """What the rest of the trainer needs of a tokenizer."""

    vocab_size: int
    """Largest id + 1."""
    eod_id: int
    """Id that ends every document."""
    sha256: str
    """Hash of the tokenizer's file."""
    kind: str
    """`sentencepiece` or `huggingface`."""
    joinable: bool
    """Whether a document may be encoded in pieces that are cut at line ends."""
    unknown_id: int | None
    """Id that stands for what there is no token for; None: there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens; special tokens' names in the text are ordinary text."""
        ...

    def encode_pieces(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        """Ids of each piece of text; `starts` says which of them begin a document."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens give no text."""
        ...

    def unknown(self, text: str) -> list[str]:
        """The stretches of `text` that are encoded as unknown."""
        ...

    def normalized(self, text: str) -> str:
        """What the tokenizer's own normaliser makes of `text`."""
        ...

    def save(self, folder: Path) -> str:
        """Write the tokenizer into a data folder; returns the name of its file or sub-folder."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model (`.model`). U+2581 is emitted as its three byte pieces, so that it survives."""

    kind = "sentencepiece"

    def __init__(self, proto: bytes, name: str) -> None:
        """Load a serialised model; UserError, naming `name`, when it is none or has no `</s>`."""
        import sentencepiece as spm

        try:
            self._decoder = spm.SentencePieceProcessor(model_proto=proto)
            self._encoder = spm.SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{name} is not a tokenizer: give a sentencepiece .model, a tokenizer.json or a folder with one"
            ) from error
        self._proto, self.joinable = proto, True
        self.sha256 = hashlib.sha256(proto).hexdigest()
        self.vocab_size = self._decoder.get_piece_size()
        self.eod_id, self.unknown_id = self._decoder.eos_id(), self._decoder.unk_id()
        if self.eod_id < 0:
            raise UserError(f"{name} has no </s> piece to end documents with; train it with eos_id >= 0")
        dummy = self._decoder.encode("a") != self._encoder.encode("a")
        self._prefix = " " if dummy else ""
        if self._decoder.encode(" a") == self._decoder.encode("a"):
            # it removes white space at both ends of what it is given: only whole documents, and as it is
            self._encoder, self._prefix, self.joinable = self._decoder, "", False
        pieces = [self._decoder.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = pieces if all(self._decoder.is_byte(piece) for piece in pieces) else None

    def encode(self, text: str) -> list[int]:
        return self.encode_pieces([text], [True])[0]

    def encode_pieces(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        if self._prefix:
            texts = [self._prefix + text if start and text else text for text, start in zip(texts, starts)]
        ids = self._encoder.encode(list(texts), out_type=int, num_threads=1)
        if self._mark_ids is not None:
            for i, text in enumerate(texts):
                if SPACE_MARK in text:
                    ids[i] = self._encode_marked(text)
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        parts = self._encoder.encode(text.split(SPACE_MARK), out_type=int, num_threads=1)
        return list(chain(parts[0], *(self._mark_ids + part for part in parts[1:])))

    def decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode([int(i) for i in ids])

    def unknown(self, text: str) -> list[str]:
        # an unknown piece is the text itself
        (pieces,) = self._encoder.encode([text], out_type=str, num_threads=1)
        return [piece for piece in pieces if self._encoder.piece_to_id(piece) == self.unknown_id]

    def normalized(self, text: str) -> str:
        return self.decode(self.encode(text))  # what is not unknown comes back as it was normalised

    def save(self, folder: Path) -> str:
        (folder / "tokenizer.model").write_bytes(self._proto)
        return "tokenizer.model"


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with the end-of-text token of the `tokenizer_config.json` beside it."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        """Load `path` (a tokenizer.json); UserError when it is none or names no end-of-text token."""
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ImportError as error:
            raise UserError(
                f"{path} is a Hugging Face tokenizer: install it with `pip install tokenizers`"
            ) from error
        self._name, content = str(path), path.read_bytes()
        try:
            self._tokenizer = FastTokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"{path} is not a tokenizer: give a sentencepiece .model, a tokenizer.json or a folder with one"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is ordinary text
        self._files = {path.name: content}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        eos = self._end_of_text(path, vocabulary)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = vocabulary[eos]
        self.sha256 = hashlib.sha256(content + eos.encode()).hexdigest()
        probe = ("a b\n", " c\n", "d")
        pieces = self.encode_pieces(probe, [True, False, False])
        self.joinable = self.decode(list(chain(*pieces))) == "".join(probe)

    def _end_of_text(self, path: Path, vocabulary: dict[str, int]) -> str:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = path.parent / name
            if path.name == "tokenizer.json" and file.is_file():
                self._files[name] = file.read_bytes()
                try:
                    content = json.loads(self._files[name])
                except ValueError as error:
                    raise UserError(f"{file} is no JSON ({error}); mend or remove it") from None
                eos = content.get("eos_token") if isinstance(content, dict) else None
                eos = eos.get("content") if isinstance(eos, dict) else eos
                if isinstance(eos, str) and eos in vocabulary:
                    return eos
        for eos in END_OF_TEXT:
            if eos in vocabulary:
                return eos
        raise UserError(
            f"{path} names no end-of-text token; put a tokenizer_config.json with `eos_token` beside it"
        )

    @cached_property
    def unknown_id(self) -> int | None:
        model = json.loads(self._tokenizer.to_str())["model"]
        return model.get("unk_id", self._tokenizer.token_to_id(model.get("unk_token") or ""))

    def encode(self, text: str) -> list[int]:
        return self.encode_pieces([text], [True])[0]

    def encode_pieces(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> list:
        try:
            return self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:
            raise UserError(
                f"{self._name} cannot encode all text ({first_line(error)}); give one with all bytes among its tokens"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.eod_id], skip_special_tokens=False)

    def unknown(self, text: str) -> list[str]:
        (encoding,) = self._encodings([text])
        # each unknown byte of a character has the place of all of it
        places = {place: None for i, place in zip(encoding.ids, encoding.offsets) if i == self.unknown_id}
        return [text[a:b] for a, b in places]

    def normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def save(self, folder: Path) -> str:
        (folder / "tokenizer").mkdir(exist_ok=True)
        for name, content in self._files.items():
            name = name if name in ("tokenizer_config.json", "special_tokens_map.json") else "tokenizer.json"
            (folder / "tokenizer" / name).write_bytes(content)
        return "tokenizer"


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a sentencepiece `.model`, a `tokenizer.json`, or a folder (a prepared data folder, too) with one.

    Of a folder with both it is the tokenizer.json, which may have more tokens, unless that is just the model
    converted, as `stepline export` writes it: then it is the model, so that data and runs keep their tokenizer's hash.
    Raises UserError when the path is missing or is no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
            return _of_both(path)
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer"):
            if (path / name).exists():
                return load_tokenizer(path / name)
        raise UserError(f"{path} has neither a tokenizer.json nor a tokenizer.model; give the right folder")
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a sentencepiece .model or a tokenizer.json")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path.read_bytes(), str(path))


def _of_both(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer.json and a tokenizer.model."""
    from stepline.trainer.data.conversion import is_converted

    shown = HuggingFaceTokenizer(folder / "tokenizer.json")
    proto = (folder / "tokenizer.model").read_bytes()
    if not is_converted(folder / "tokenizer.json", proto):
        return shown
    model = SentencePieceTokenizer(proto, str(folder / "tokenizer.model"))
    # another eos_token in the folder's tokenizer_config.json would end documents with another token
    return model if model.eod_id == shown.eod_id else shown
