"""Whether a given tokenizer gives text back: what it merely normalises, and what it loses.

Bits per byte are over the bytes of the text as it is, so that what is lost makes them wrong.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from stepline.trainer.data.sources import ReadOptions, compression_of, read_pieces
from stepline.trainer.data.tokenizer import SPACE_MARK, Tokenizer
from stepline.trainer.data.units import Plan
from stepline.trainer.errors import UserError

UNITS, SAMPLE_CHARS = 64, 1 << 18  # units that are looked into at most, and characters of all of them
MOST_UNKNOWN = 0.01  # of the characters
SHOWN = 5  # examples in a sentence
NO_TEXT = (SPACE_MARK, "\ufffd")  # a space to some tokenizers; what is decoded where bytes are lost


@dataclass(frozen=True)
class RoundTrip:
    """What came back of a sample."""

    keeps_text: bool = True
    unknown_share: float = 0.0
    """Of the characters, those that unknown tokens stand for."""


def check_round_trip(
    tokenizer: Tokenizer, name: str, texts: Iterable[tuple[str, str]], *, refuse: bool = True
) -> tuple[RoundTrip, str | None]:
    """Encodes and decodes texts, (file, text); also a sentence where they do not come back as they were.

    refuse: raises UserError, with `name` of the tokenizer, where characters are lost without a trace or more than
    MOST_UNKNOWN of them as unknown tokens. Case, forms of characters and white space may change: a normaliser's work is
    no loss.
    """
    characters, keeps_text, changed = 0, True, None
    unknown: Counter[str] = Counter()  # characters, by file
    examples: dict[str, None] = {}
    given: dict[str, str] = {}  # character to the first file with it
    returned: set[str] = set()
    for file, text in texts:
        characters += len(text)
        ids = tokenizer.encode(text)
        back = tokenizer.decode([i for i in ids if i != tokenizer.unknown_id])
        returned.update(visible(back))
        if back == text:
            continue
        keeps_text = False
        if lost := tokenizer.unknown(text):
            unknown[file] += sum(map(len, lost))
            examples |= dict.fromkeys(lost)
            continue
        for character in visible(tokenizer.normalized(text)):
            given.setdefault(character, file)
        if changed is None:
            changed = f"{_around(text, back)} of {file} comes back as {_around(back, text)}"
    vanished = [character for character in given if character not in returned]
    if vanished and refuse:
        raise UserError(
            f"the tokenizer {name} loses {_listed(vanished)} of {given[vanished[0]]}: they do not come back from its "
            "tokens; give one that has all bytes among its tokens"
        )
    share = unknown.total() / max(characters, 1)
    what = f"{_listed(examples)} of {max(unknown, key=unknown.__getitem__)}" if unknown else ""
    if share > MOST_UNKNOWN and refuse:
        raise UserError(
            f"the tokenizer {name} loses {100 * share:.3g} % of the text as unknown tokens ({what}), more than "
            f"{100 * MOST_UNKNOWN:g} %; give one that has all bytes among its tokens"
        )
    said = [f"loses {100 * share:.2g} % of the text as unknown tokens ({what})"] if unknown else []
    if vanished:
        said.append(f"loses {_listed(vanished)} of {given[vanished[0]]} without a trace")
    elif changed:
        said.append(f"changes text ({changed})")
    note = (
        f"the tokenizer {name} {' and '.join(said)}; bits per byte are over the bytes of the text as it was"
    )
    return RoundTrip(keeps_text, share), note if said else None


def samples(plan: Plan, options: ReadOptions) -> Iterator[tuple[str, str]]:
    """(file, text) from the beginnings of up to UNITS units, evenly spaced: up to SAMPLE_CHARS characters in all.

    What cannot be read is passed over: who needs it says so.
    """
    units = plan.units[:: max(1, -(-len(plan.units) // UNITS))]
    for unit in units:
        left = SAMPLE_CHARS // len(units)
        for span in unit:
            if span.start and compression_of(span.path):  # found by reading all that comes before
                continue
            with suppress(UserError):
                for piece in read_pieces(span, replace(options, whole=False)) if left > 0 else ():
                    text = piece.text[:left]
                    yield span.path, text
                    left -= len(text)
                    if left <= 0:
                        break


def visible(text: str) -> list[str]:
    """The characters of a text but white space and controls, which tokenizers take out and put in; each once."""
    return [c for c in dict.fromkeys(text) if unicodedata.category(c)[0] not in "ZC" and c not in NO_TEXT]


def _around(text: str, other: str) -> str:
    """Where `text` begins to differ from `other`, some characters of it, as Python would write them."""
    alike = next((i for i, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))
    start = max(0, alike - 8)
    return repr(text[start : start + 20])


def _listed(texts: Iterable[str]) -> str:
    examples = list(texts)
    shown = ", ".join(repr(text[:20]) for text in examples[:SHOWN])
    return shown + (f" and {len(examples) - SHOWN} more" if len(examples) > SHOWN else "")
