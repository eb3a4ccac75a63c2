"""A wrongly typed command line ends with exit code 2 and one sentence that names the option and its help."""

import json
import os
import subprocess
import sys

import pytest

from stepline.trainer.cli import main
from stepline.trainer.errors import speaks


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["stepline", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan --params abc", "--params is 'abc'; it must be a valid number (see `stepline plan --help`)"),
        ("plan --seq-len 1.5", "--seq-len is '1.5'; it must be a valid integer (see `stepline plan --help`)"),
        ("plan --parms 1e9", "no option --parms; did you mean '--params'? (see `stepline plan --help`)"),
        ("plan -params=1e9", "no option -params; did you mean '--params'? (see `stepline plan --help`)"),
        ("plan --params", "option '--params' requires an argument (see `stepline plan --help`)"),
        ("plan --json=3", "option '--json' does not take a value (see `stepline plan --help`)"),
        ("laws fit", "the argument 'runs' is missing (see `stepline laws fit --help`)"),
        ("laws fit runs.csv", "--output is missing (see `stepline laws fit --help`)"),
        ("laws chek", "no command 'chek'; did you mean 'check'? (see `stepline laws --help`)"),
        (
            "sweep --lr-points x",
            "--lr-points is 'x'; it must be a valid integer (see `stepline sweep --help`)",
        ),
        ("doctor --timeout inf", "--timeout is 'inf'; it must be less than or equal to 31536000 (see"),
        ("doctor --timeout 1e12", "--timeout is '1e12'; it must be less than or equal to 31536000 (see"),
        ("sweep --output", "option '--output' requires an argument (see `stepline sweep --help`)"),
        ("nonsense", "no command 'nonsense' (see `stepline --help`)"),
        ("trian quickstart", "no command 'trian'; did you mean 'train'? (see `stepline --help`)"),
        ("--nonsense", "no option --nonsense"),
        ("-h", "no option -h; did you mean '--help'? (see `stepline --help`)"),
        ("train", "the argument 'config' is missing (see `stepline train --help`)"),
        ("laws check a b c", "got unexpected extra argument(s) (c) (see `stepline laws check --help`)"),
    ],
)
def test_mistakes_of_usage(monkeypatch, capsys, line, said):
    assert run(monkeypatch, *line.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_a_number_out_of_its_range(monkeypatch, capsys):
    assert run(monkeypatch, "prepare", "x", "--output", "o", "--vocab-size", "5") == 2
    error = capsys.readouterr().err
    assert "--vocab-size" in error
    assert "260" in error
    assert error.count("\n") == 1


def test_one_line_whatever_was_typed(monkeypatch, capsys):
    assert run(monkeypatch, "plan", "--a\nb") == 2
    assert capsys.readouterr().err.count("\n") == 1


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("variables", "lines"),
    [
        ({}, 1),
        (TORCHRUN, 0),
        (TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"}, 1),
        (TORCHRUN | {"WORLD_SIZE": "abc"}, 0),  # which all ranks find
        (SRUN, 0),
        (SRUN | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, 1),
        ({"LOCAL_RANK": "1"}, 1),  # left over in a shell: nobody else is there to say it
        ({"LOCAL_RANK": "x"}, 1),
    ],
)
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train quickstart --dry", "no option --dry; did you mean"),
        ("train quickstart no.such=1 --dry-run", "unknown key 'no'"),
        ("eval nothing --no-such", "no option --no-such"),
    ],
)
def test_one_rank_of_a_node_speaks(monkeypatch, capsys, variables, lines, line, said):
    """Whatever the mistake, wherever it is found before the ranks have met."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, *line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == lines
    assert error.startswith("error: ") == bool(lines)
    assert (said in error) == bool(lines)


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN])
def test_tasks_that_are_no_ranks_say_their_own_mistakes(monkeypatch, capsys, variables):
    """`srun -n 4 stepline prepare part-of-mine ...`: nobody else has made this one."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, "plan") == 2
    assert capsys.readouterr().err == "error: give --params and --tokens, or a config\n"


def test_a_rank_of_a_process_group_has_mistakes_of_its_own(monkeypatch):
    import torch.distributed as dist

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert not speaks()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert speaks()


@pytest.mark.parametrize(("rank", "said"), [("0", "error: no config file 'nothing'"), ("1", "")])
def test_a_mistake_in_a_config_is_said_before_torch_is_imported(rank, said):
    code = (
        "import sys; from stepline.trainer.cli import main\n"
        "sys.argv = ['stepline', 'train', 'nothing']\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ranks, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)


def test_exit_codes_stay(monkeypatch, capsys):
    """Help and the version are no mistakes; a group alone shows its help; a user's error is one sentence as before."""
    for words, code in ((["--help"], 0), (["plan", "--help"], 0), (["--version"], 0), ([], 2), (["laws"], 2)):
        assert run(monkeypatch, *words) == code, words
        out, error = capsys.readouterr()
        assert out.strip(), words
        assert error == "", words
    assert run(monkeypatch, "plan") == 2
    assert capsys.readouterr().err == "error: give --params and --tokens, or a config\n"
    assert run(monkeypatch, "plan", "--params", "1e9", "--tokens", "1e10", "--json") == 0
    capsys.readouterr()
    # a script's own values, then what its caller adds
    assert run(monkeypatch, "plan", "tiny", "optimizer.lr=1e-3", "optimizer.lr=2e-3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["lr"] == 2e-3


LONG = "a" * 300


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["eval", f"/tmp/{LONG}"], f"/tmp/{LONG}/COMPLETE"),
        (["generate", f"/tmp/{LONG}", "--prompt", "a"], f"/tmp/{LONG}/COMPLETE"),
        (["plan", f"/tmp/{LONG}.yaml"], f"/tmp/{LONG}.yaml"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(monkeypatch, capsys, words, file):
    """As a folder without rights is: of a name that no file can have, root is told too."""
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert said == f"error: {file}: File name too long; mend that and start the same command again\n"


@pytest.mark.parametrize("met", [False, True])
def test_what_one_rank_alone_meets_is_said(monkeypatch, capsys, met):
    """Once ranks have met: before, its node's first rank says the same."""
    import torch.distributed as dist

    def fails(*_, **__):
        monkeypatch.setattr(dist, "is_initialized", lambda: met)
        raise PermissionError(13, "Permission denied", "/mnt/file")

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("stepline.trainer.cli.app", fails)
    assert run(monkeypatch, "eval", "runs/mine") == 2
    said = "error: /mnt/file: Permission denied; mend that and start the same command again\n" if met else ""
    assert capsys.readouterr().err == said


def test_an_error_of_no_file_is_no_mistake(monkeypatch):
    def fails(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("stepline.trainer.cli.app", fails)
    monkeypatch.setattr(sys, "argv", ["stepline", "plan"])
    with pytest.raises(BrokenPipeError):
        main()
