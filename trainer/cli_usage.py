"""A wrongly typed command line as one sentence, instead of the usage text and the box that typer prints."""

from typing import Any

import typer

from stepline.trainer.errors import nearest

UsageError = typer.BadParameter.__base__
"""Of typer's own click, or in its older versions of the click that is installed."""


def usage_sentence(error: Exception, root: Any, words: list[str]) -> str:
    """What is wrong with the arguments `words` of the command `root`, and where its help is."""
    path, command = ["stepline"], root
    while words and words[0] in getattr(command, "commands", ()):
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    sentence = f"{_wrong(error, command, words)} (see `{' '.join(path)} --help`)"
    return " ".join(sentence.split())  # on one line, whatever was typed


def _wrong(error: Any, command: Any, words: list[str]) -> str:
    commands, kind = getattr(command, "commands", None), type(error).__name__
    if commands and words and not words[0].startswith("-"):
        return f"no command '{words[0]}'{nearest(words[0], commands)}"
    if kind == "NoSuchOption":
        typed = error.option_name
        typed = next((w.partition("=")[0] for w in words if w.startswith(typed)), typed)  # all of `-params`
        options = [name for p in command.params for name in (*p.opts, *p.secondary_opts) if name[0] == "-"]
        return f"no option {typed}{nearest(typed, [*options, '--help'])}"
    text = str(error.message).rstrip(".")
    param = getattr(error, "param", None)
    if param is None:
        return text[:1].lower() + text[1:]
    option = param.param_type_name == "option"
    name = max(param.opts, key=len) if option else f"the argument '{param.name}'"
    if kind == "MissingParameter":
        return f"{name} is missing"
    if hasattr(error.__cause__, "errors"):  # pydantic's, which do not say what was given
        must = text.partition(", unable")[0].replace("Input should be", "it must be")
        return f"{name} is {error.__cause__.errors()[0]['input']!r}; {must}"
    return f"{name}: {text}"
