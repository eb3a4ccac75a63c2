"""A run's tokenizer in a folder of `transformers`."""

import json
from pathlib import Path
from typing import Any

from stepline.trainer.data.tokenizer import SPACE_MARK, Tokenizer

SAMPLES = (
    "def main(argv: list[str]) -> int:\n    return 0\n\n\nclass A:\n\tpass\n",
    "  two  spaces,   three; a tab\tand\r\nline ends\n\n\n",
    "Grüße, naïve café — «voilà» 你好，世界 こんにちは Привет مرحبا 🙂👩‍💻 ½ ﬁ ① \u00a0\u200b.",
    "1234567890 3.14159 0x7F a_b-c/d\\e {}[]()<>!?@#$%^&*~`'\" </s> <s> <unk> <0x41>",
    "",
    " ",
    "a",
)
"""Texts whose ids a converted tokenizer must give exactly: code, white space, scripts, symbols, special names."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> str | None:
    """Writes the files from which `AutoTokenizer` makes the same tokenizer; a sentence where it cannot.

    A sentencepiece model becomes a `tokenizer.json` where that gives the same ids on `SAMPLES` and its own pieces, and
    stays a `tokenizer.model` otherwise. Begin and end of text are both the token that ends documents: it is what a
    model of Stepline has seen before each document.
    """
    if tokenizer.kind == "huggingface":
        saved = folder / tokenizer.save(folder)
        for file in list(saved.iterdir()):
            file.replace(folder / file.name)
        saved.rmdir()
        _add_special(folder, tokenizer)
        return None
    tokenizer.save(folder)
    path = folder / "tokenizer.model"
    try:
        converted = _from_sentencepiece(path.read_bytes())
    except ImportError:
        return "tokenizer.json is left out: install it with `pip install stepline[hf]`"
    except ValueError as error:
        return f"tokenizer.json is left out ({error}); tokenizer.model is the sentencepiece model"
    for text in SAMPLES:
        if converted.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            return f"tokenizer.json is left out: ids would differ on {text[:20]!r}; use tokenizer.model"
    converted.encode_special_tokens = False
    converted.save(str(folder / "tokenizer.json"))
    _add_special(folder, tokenizer)
    return None


def end_of_text(folder: Path, tokenizer: Tokenizer) -> str:
    """The name of the token that ends documents."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token["id"]: token["content"] for token in raw["added_tokens"]}
    vocabulary = raw["model"]["vocab"]
    return names.get(tokenizer.eod_id) or next(n for n, i in vocabulary.items() if i == tokenizer.eod_id)


def _add_special(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer_config.json, with what was there."""
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = end_of_text(folder, tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eos} | config | {"eos_token": eos}
    config.setdefault("clean_up_tokenization_spaces", False)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_sentencepiece(proto: bytes):
    """A `tokenizers.Tokenizer` of a BPE model; ValueError where it has what BPE of `tokenizers` has not."""
    import sentencepiece as spm
    from tokenizers import AddedToken, decoders, normalizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    model = spm.SentencePieceProcessor(model_proto=proto)
    ids = range(model.get_piece_size())
    pieces = [model.id_to_piece(i) for i in ids]
    if any(len(piece) > 1 and model.is_unused(i) for i, piece in enumerate(pieces)):
        raise ValueError("it has pieces that are not used")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    scores = [model.get_score(i) for i in ids]
    plain = [i for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    merges = []
    for i in plain:
        piece = pieces[i]
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                # sentencepiece merges to the piece of the best score first; several ways lead to one
                merges.append((-scores[i], left, right))
    merges.sort()
    fast = FastTokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(pieces[left], pieces[right]) for _, left, right in merges],
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = [normalizers.Replace(" ", SPACE_MARK)]
    if model.encode("a", out_type=str)[0].startswith(SPACE_MARK):  # a text begins as if after a space
        steps.append(decoders.Strip(" ", 1, 0))
        spaces.insert(0, normalizers.Prepend(SPACE_MARK))
    fast.normalizer = normalizers.Sequence(spaces)
    fast.decoder = decoders.Sequence(steps)
    special = [pieces[i] for i in ids if model.is_control(i) or model.is_unknown(i)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    fast.encode_special_tokens = True  # as for Stepline, a special token's name in a text is ordinary text
    return fast
