"""Reading, checking and writing configurations."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from stepline.models.config import kinds_in
from stepline.trainer.config import BUDGET, MAY_CHANGE_ON_RESUME, Config
from stepline.trainer.config_multiples import multiples_of
from stepline.trainer.config_types import with_home
from stepline.trainer.config_yaml import flatten, parse_overrides, read_yaml
from stepline.trainer.errors import UserError, nearest
from stepline.trainer.files import write_whole

Origins = dict[str, str]
"""Dotted key to where its value came from: default, base, file, override, law, machine, saved run."""


def shipped_configs() -> Path:
    """Folder of the configs that travel with the package."""
    return Path(__file__).resolve().parent.parent / "configs"


def find_config(name: str) -> Path:
    """A config file by path, or one of the shipped configs by its name with or without `.yaml`."""
    path = Path(name)
    if path.is_file():
        return path
    if (path / "config.yaml").is_file():
        raise UserError(f"{name} is a folder; its config is {path / 'config.yaml'}")
    return _shipped(path, f"no config file '{name}'")


def _shipped(path: Path, otherwise: str) -> Path:
    """The shipped config of that name; raises UserError, which begins with `otherwise`."""
    shipped = shipped_configs()
    if len(path.parts) == 1:  # never for a path: it names another file
        for candidate in (shipped / path.name, shipped / f"{path.name}.yaml"):
            if candidate.is_file():
                return candidate
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise UserError(f"{otherwise}{nearest(path.stem, names)} (shipped: {', '.join(names)})")


def find_base(base: str, path: Path) -> Path:
    """The base that the config at `path` names: a file beside it, or a shipped config."""
    try:
        base = str(with_home(base)) if base.startswith("~") else base
    except ValueError as error:
        raise UserError(f"{path}: base: {error}") from None
    for candidate in (path.parent / base, path.parent / f"{base}.yaml"):
        # A file may have the name of the shipped config that it builds on.
        if candidate.is_file() and not candidate.samefile(path):
            return candidate
    otherwise = f"{path}: base '{base}' is neither a file in {path.parent} nor a shipped config"
    return _shipped(Path(base), otherwise)


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a dotted key in nested sections; raises UserError where a section of it is a value."""
    *sections, last = dotted.split(".")
    for section in sections:
        if tree.get(section) is None:  # `null` too is no value that has no keys
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"'{dotted}' goes through '{section}', which is a value and has no keys")
    tree[last] = value


def load_config(name: str, overrides: list[str] = ()) -> tuple[Config, Origins]:
    """Reads a config file with its base and overrides.

    Returns the checked config and the origin of every value; raises UserError with one sentence.
    """
    path = find_config(name)
    content = read_yaml(path)
    tree: dict[str, Any] = {}
    origins: Origins = {}
    base = content.pop("base", None)
    if base is not None:
        base_path = find_base(str(base), path)
        base_content = read_yaml(base_path)
        if "base" in base_content:
            raise UserError(
                f"{path} has the base {base}, which has one of its own, and only one level is allowed; write "
                f"`base: {base_content['base']}`, with what {base_path} sets"
            )
        _merge(tree, base_content)
        origins |= dict.fromkeys(flatten(base_content), f"base {base_path.name}")
    _merge(tree, content)
    origins |= dict.fromkeys(flatten(content), f"file {path.name}")
    _check_home(overrides)
    given = parse_overrides(list(overrides))
    _check_either(given, origins, tree)
    for key, value in given.items():
        set_key(tree, key, value)
        origins[key] = "override"
    config = check(tree, str(path), given)
    if config.run.folder is None:
        config.run.folder = Path("runs") / path.stem
    return config, {key: origins.get(key, "default") for key in flatten(dump(config))}


def _check_home(overrides: Iterable[str]) -> None:
    """Raises UserError for a path that is `~` alone, which YAML reads as null."""
    for text in overrides:
        key, _, value = text.partition("=")
        *sections, last = key.split(".")
        field = section.model_fields.get(last) if (section := section_of(sections)) else None
        if value.strip() == "~" and field is not None and Path in kinds_in(field.annotation):
            raise UserError(
                f"'{text}' is null in YAML; write {key}=~/ for the home folder, or {key}=null for none"
            )


def _check_either(given: dict[str, Any], origins: Origins, tree: dict[str, Any]) -> None:
    """Raises UserError where the command line sets one of two keys and the file the other."""
    for pair in (("budget.tokens", "budget.steps"), ("data.path", "data.sources")):
        for new, old in (pair, pair[::-1]):
            if given.get(new) is not None and flatten(tree).get(old) is not None and old not in given:
                raise UserError(f"{new} is given but {origins[old]} sets {old}; add {old}=null")


def check(tree: dict[str, Any], where: str, given: Iterable[str] = ()) -> Config:
    """Validates nested sections; the first problem becomes one sentence that says where the value is.

    where: the file; given: keys from the command line, which a problem of theirs names instead.
    """
    try:
        return Config.model_validate(tree, context={"multiples": multiples_of(tree)})
    except ValidationError as error:
        problem = error.errors()[0]
        key = "".join(f"{part}." for part in _key(problem))
        if any(key.startswith(f"{k}.") for k in given):
            where = "on the command line"
        elif any(f"{k}.".startswith(key) for k in given):  # a section that both have a part in
            where = f"{where} with the command line's values"
        raise UserError(f"{where}: {_sentence(problem)}") from None


UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
"""Pydantic's kinds of problem; the second one is of a key that is no text."""


def _key(problem: dict[str, Any]) -> list[str]:
    """The dotted key of a problem: a union (`auto` or a number) adds the branch that failed, which is cut off."""
    parts = [str(part) for part in problem["loc"]]
    written = parts[-1:] if problem["type"] in UNKNOWN_KEY else []  # a user's own, whatever it is
    parts, kinds = parts[: len(parts) - len(written)], {"float", "int", "bool", "literal"}
    return [p for p in parts if p.replace("_", "").isalnum() and p not in kinds] + written


def section_of(keys: list[str]) -> type[BaseModel] | None:
    """The section's class at `keys`, through optional sections and lists of sections."""
    section: type[BaseModel] | None = Config
    for name in keys:
        if name.isdigit():
            continue
        if section is None or name not in section.model_fields:
            return None
        stack, section = [section.model_fields[name].annotation], None
        while stack:
            annotation = stack.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
            stack.extend(get_args(annotation))
    return section


def allowed_values(keys: list[str]) -> str:
    """What a key may hold, in words, from its annotation: `'auto' or a number above 0 and at most 10`."""
    field = section_of(keys[:-1]).model_fields[keys[-1]]
    choices, kinds, bounds = [], [], []
    stack: list[Any] = [field.annotation, *field.metadata]
    while stack:
        item = stack.pop(0)
        if get_origin(item) is Literal:
            choices += [repr(choice) for choice in get_args(item)]
        elif item in (int, float, bool, str, Path):
            kinds.append({int: "a whole number", float: "a number", bool: "true or false"}.get(item, "text"))
        for name, words in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
            bound = getattr(item, name, None)
            if isinstance(bound, int | float):
                bounds.append(f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}")
        stack += [*get_args(item), *getattr(item, "metadata", ())] if get_origin(item) is not Literal else []
    kind = " ".join([*kinds[:1], " and ".join(dict.fromkeys(bounds))]).strip()
    options = [*choices, kind] if kind else choices
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def _sentence(problem: dict[str, Any]) -> str:
    keys, given, kind = _key(problem), problem.get("input"), problem["type"]
    key, section = ".".join(keys), section_of(keys[:-1])
    if kind in UNKNOWN_KEY:
        known = section.model_fields if section else ()
        sections = {name: section_of([name]) for name in known if len(keys) == 1}
        there = [name for name, of in sections.items() if of is not None and key in of.model_fields]
        if len(there) == 1:
            return f"unknown key '{key}'; did you mean '{there[0]}.{key}'?"
        return f"unknown key '{key}'{nearest(keys[-1], known)}"
    if kind == "missing":
        return f"'{key}' is missing"
    if kind == "value_error":
        text = str(problem["ctx"]["error"])
        return text if not key or "." in text.split(" ")[0] else f"{key}: {text}"
    if section is not None and keys[-1] in section.model_fields and section_of(keys) is None:
        words = problem.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key} is {given!r}; it must be {allowed_values(keys)}{nearest(str(given), words)}"
    return f"{key} is {given!r}; it must be a section with keys of its own"


def dump(config: Config) -> dict[str, Any]:
    """The config as nested plain values (paths as text)."""
    return config.model_dump(mode="json")


def format_config(config: Config, origins: Origins) -> str:
    """The config as YAML; each value is followed by its origin."""
    budget = f"; before the decay {' or '.join(BUDGET)}" if config.schedule.name == "wsd" else ""
    lines = [
        "# The resolved configuration of this run; after each value stands where it came from.",
        f"# These may change on resume: {', '.join(MAY_CHANGE_ON_RESUME)}{budget}.",
        "# (data.path and data.sources: the same data may have moved.)",
        "# Any other difference is refused: start a new run (run.init_from takes over the weights).",
    ]

    def section(tree: dict[str, Any], prefix: str, indent: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                lines.append(f"{indent}{key}:")
                section(value, f"{prefix}{key}.", indent + "  ")
            else:
                text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n")
                lines.append(f"{indent}{key}: {text.strip()}  # {origins.get(prefix + key, 'default')}")

    section(dump(config), "", "")
    return "\n".join(lines) + "\n"


def write_config(config: Config, origins: Origins, path: Path) -> None:
    """Writes the resolved config whole or not at all."""
    write_whole(path, format_config(config, origins))


def read_run_config(run: Path) -> Config:
    """The resolved config of an existing run, whose `run.folder` is where it lies now; raises UserError where there is
    none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run: it has no config.yaml")
    config = check(read_yaml(path), str(path))
    config.run.folder = run
    return config
