"""The commands in the running text of the README and the guide: existing ones, with existing options and arguments.

Those in fenced blocks are run by tests/e2e/test_readme.py and tests/e2e/test_guide.py.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer

from stepline.trainer.cli import app
from stepline.trainer.cli_usage import UsageError, usage_sentence

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ("README.md", "docs/guide.md")
ROOT_COMMAND = typer.main.get_command(app)
NOT_OURS = {"--master-port", "--nproc-per-node"}
"""Options of torchrun."""


def inline(page: str) -> list[str]:
    """What stands in backticks outside of fenced blocks, each on one line."""
    text = re.sub(
        r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def options_of(command) -> set[str]:
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}


def problem(given: list[str]) -> str | None:
    """What is wrong with the words behind `stepline`: its commands, options, or values of options."""
    command, words = ROOT_COMMAND, given
    while words and words[0] in getattr(command, "commands", ()):
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):
        return f"no command {words[:1]}"
    try:
        command.make_context("stepline", list(words))
    except UsageError as error:  # running text may leave out what must be given
        return (
            None if type(error).__name__ == "MissingParameter" else usage_sentence(error, ROOT_COMMAND, given)
        )
    return None


def verbs(command=ROOT_COMMAND):
    for found in command.commands.values():
        yield found
        if hasattr(found, "commands"):
            yield from verbs(found)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text(page):
    found = [code for code in inline(page) if code.startswith("stepline ")]
    assert len(found) >= 2
    wrong = {code: said for code in found if (said := problem(shlex.split(code)[1:]))}
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_without_the_programs_name(page):
    """As in `prepare --tune-share` and `--resume never`."""
    every = {name for command in verbs() for name in options_of(command)}
    found = [shlex.split(code) for code in inline(page) if code.startswith("--")]
    assert len(found) >= 3
    assert not [words[0] for words in found if words[0].partition("=")[0] not in every | NOT_OURS]
    of_verb = [shlex.split(code) for code in inline(page) if code.partition(" ")[0] in ROOT_COMMAND.commands]
    named = [(words[0], w) for words in of_verb for w in words[1:] if w.startswith("--")]
    assert not [(verb, w) for verb, w in named if w not in options_of(ROOT_COMMAND.commands[verb])]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("swep --output x", "no command ['swep']"),
        ("laws chek", "no command ['chek']"),
        ("sweep --outputs x", "no option --outputs; did you mean '--output'?"),
        ("submit dense-1b --nodes many", "--nodes is 'many'; it must be"),
        ("submit dense-1b --nodes", "requires an argument"),
        ("laws check step-law RUNS.csv", None),
    ],
)
def test_a_wrong_command_would_be_found(line, said):
    found = problem(line.split())
    assert found is None if said is None else said in found
