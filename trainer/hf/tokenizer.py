"""A run's tokenizer in a folder of `transformers`."""

import json
from pathlib import Path
from typing import Any

from stepline.trainer.data.conversion import from_sentencepiece
from stepline.trainer.data.tokenizer import Tokenizer

ADD_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post-processors that put special tokens around a text."""
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


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, trained: bool = True, begins: int | None = None
) -> str | None:
    """Writes the files from which `AutoTokenizer` makes the same tokenizer; a sentence where it cannot.

    A sentencepiece model becomes a `tokenizer.json` where that gives the same ids on `SAMPLES` and its own pieces, and
    stays a `tokenizer.model` otherwise; the model is written in any case, and `load_tokenizer` finds it in the folder
    again. Begin and end of text are both the token that ends documents: it is what a model of Stepline has seen before
    each document, and nothing is put before a text unasked. trained: by Stepline; otherwise texts begin as they did,
    with the token `begins` where that is known.
    """
    if tokenizer.kind == "huggingface":
        saved = folder / tokenizer.save(folder)
        for file in list(saved.iterdir()):
            file.replace(folder / file.name)
        saved.rmdir()
        if trained:
            _drop_templates(folder / "tokenizer.json")
        _add_special(folder, tokenizer, trained, begins)
        return None
    tokenizer.save(folder)
    path = folder / "tokenizer.model"
    try:
        converted = from_sentencepiece(path.read_bytes())
    except ImportError:
        return "tokenizer.json is left out: install it with `pip install stepline[hf]`"
    except ValueError as error:
        return f"tokenizer.json is left out ({error}); tokenizer.model is the sentencepiece model"
    for text in SAMPLES:
        if converted.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            return f"tokenizer.json is left out: ids would differ on {text[:20]!r}; use tokenizer.model"
    converted.encode_special_tokens = False
    converted.save(str(folder / "tokenizer.json"))
    _add_special(folder, tokenizer, trained, begins)
    return None


def _drop_templates(path: Path) -> None:
    """Takes out of a tokenizer.json what puts special tokens around a text."""
    content = json.loads(path.read_text(encoding="utf-8"))
    processor = content.get("post_processor") or {}
    every = processor.get("processors", [processor] if processor else [])
    kept = [one for one in every if one["type"] not in ADD_TOKENS]
    if len(kept) < len(every):
        content["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _add_special(folder: Path, tokenizer: Tokenizer, trained: bool, begins: int | None) -> None:
    """tokenizer_config.json, with what was there; trained: by Stepline, which decides how a text begins."""
    from tokenizers import Tokenizer as FastTokenizer

    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    eos = fast.id_to_token(tokenizer.eod_id)
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    own = {"eos_token": eos}
    if trained:  # transformers 4 would put a token before a text where the class is Llama's
        own |= plain | {"bos_token": eos, "add_bos_token": False, "add_eos_token": False}
    elif begins is not None:
        own["bos_token"] = fast.id_to_token(begins)
    config = plain | {"bos_token": eos} | config | own
    config.setdefault("clean_up_tokenization_spaces", False)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
