"""docs/config.md, made of the schema: `python -m stepline.trainer.config_docs` writes it. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stepline.trainer.config import BUDGET, Config
from stepline.trainer.config_io import allowed_values, section_of
from stepline.trainer.config_resume import may_change
from stepline.trainer.files import write_whole

FILE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
HEAD = """# Every key of a config

Made of the schema by `python -m stepline.trainer.config_docs`; a test compares the two.

A config is YAML with these sections. `base: NAME` at its top takes over the values of a file beside it or of a shipped
config that has no base itself, and `section.key=value` on the command line sets single ones. `auto` is decided by a
scaling law or by the machine: `stepline train CONFIG --dry-run` shows every value and where it came from. R marks what
may change when a run is resumed (wsd: with `schedule.name: wsd`, before its decay); for any other difference `train`
names both values and stops. Paths may begin with `~`, the home folder. """


def page() -> str:
    """The whole file."""
    return HEAD + "".join(_table([name]) for name in Config.model_fields)


def _table(keys: list[str]) -> str:
    """A section's heading and table, then those of the sections in it."""
    key, section = ".".join(keys), section_of(keys)
    text = f"\n{'#' * (1 + len(keys))} {key}\n\n{_words(section.__doc__)}\n\n"
    text += "| key | value | default | R | meaning |\n|---|---|---|---|---|\n"
    inner = []
    for name, field in section.model_fields.items():
        nested = section_of([*keys, name]) is not None
        if nested:
            inner.append(name)
        text += f"| {' | '.join(_cells([*keys, name], field, nested))} |\n"
    return text + "".join(_table([*keys, name]) for name in inner)


def _cells(keys: list[str], field: FieldInfo, nested: bool) -> Iterator[str]:
    key, optional = ".".join(keys), type(None) in get_args(field.annotation)
    yield f"`{keys[-1]}`"
    if nested:
        many = "a list of " if field.default_factory is list else ""
        yield f"{many}[{key}](#{key.replace('.', '')})" + (" or null" if optional else "")
    else:
        yield allowed_values(keys) + (" or null" if optional else "")
    yield _default(field)
    yield "R" if may_change(key) or may_change(f"{key}.any") else "wsd" if key in BUDGET else ""
    yield _words(field.description).replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    """As YAML; nothing where a section's own table says it."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    write_whole(FILE, page())
    print(f"written to {FILE}")
