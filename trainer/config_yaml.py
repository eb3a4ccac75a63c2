"""YAML as configs and overrides have it: no key twice in a section."""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from stepline.trainer.errors import UserError


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys in silence, whole sections too; and no key's value is a date."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            first = seen.setdefault((key.tag, str(key.value)), key)
            if first is not key:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' stands in line {first.start_mark.line + 1} too; leave out one of the two",
                    problem_mark=key.start_mark,
                )
        return node


def load_yaml(text: str) -> Any:
    """As yaml.safe_load; raises yaml.YAMLError, also where a section has a key twice."""
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # of a tag: `!!int x`
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a config file, unchecked; raises UserError where there are none to be read."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`")
    return content


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; an empty mapping is a leaf."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`section.key=value` arguments by dotted key; values are YAML (`null`, `true`, `1e-3`, `[a, b]`), and
    `section={key: value}` sets these keys of the section."""
    parsed = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not all(key.split(".")):
            raise UserError(f"'{text}' is not an override; write section.key=value")
        if not value.strip():
            raise UserError(f"'{text}' has no value; write {key}=VALUE, or {key}=null for none")
        try:
            parsed |= flatten({key: load_yaml(value)})
        except yaml.YAMLError:
            raise UserError(f"the value in '{text}' is not valid YAML") from None
    return parsed
