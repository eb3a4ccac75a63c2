"""Paths of a config that begin with `~`."""

from pathlib import Path

import pytest
import yaml

from stepline.trainer.config_io import load_config, read_run_config, write_config
from stepline.trainer.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def paths(config) -> list[Path | None]:
    sources = [source.path for source in config.data.sources]
    return [config.data.path, *sources, config.budget.law, config.run.folder, config.run.init_from]


def test_home_in_every_path_of_a_file_and_of_the_command_line(home, file, tmp_path):
    law_and_run = ["budget.law=~/law.json", "run.folder=~/t", "run.init_from=~/old"]
    config, origins = load_config(str(file), ["data.path=~/d", *law_and_run])
    assert paths(config) == [home / name for name in ("d", "law.json", "t", "old")]

    content = yaml.safe_load(file.read_text())
    content["data"] = {"sources": [{"path": "~/d"}, {"path": "e/~"}]}
    content |= {"budget": {"law": "quickstart"}, "run": {"folder": "~/t", "init_from": "~/old"}}
    (tmp_path / "in-file.yaml").write_text(yaml.safe_dump(content))
    config, origins = load_config(str(tmp_path / "in-file.yaml"))
    assert paths(config) == [None, home / "d", Path("e/~"), Path("quickstart"), home / "t", home / "old"]

    (home / "t").mkdir(parents=True)
    write_config(config, origins, home / "t" / "config.yaml")
    assert "~/" not in (home / "t" / "config.yaml").read_text()
    assert paths(read_run_config(home / "t")) == paths(config)


def test_a_base_in_the_home_folder(home, file, tmp_path):
    home.mkdir()
    file.rename(home / "mine.yaml")
    (tmp_path / "child.yaml").write_text("base: ~/mine\n")
    assert load_config(str(tmp_path / "child.yaml"))[0].optimizer.beta2 == 0.99
    (tmp_path / "child.yaml").write_text("base: ~nobody-here/mine\n")
    with pytest.raises(UserError, match=r"child.yaml: base: no home folder is known for ~nobody-here; write"):
        load_config(str(tmp_path / "child.yaml"))


def test_a_base_beside_the_config_that_is_called_so(home, file, tmp_path):
    (tmp_path / "sub").mkdir()
    file.rename(tmp_path / "sub" / "~base.yaml")
    (tmp_path / "sub" / "child.yaml").write_text("base: ./~base.yaml\n")
    assert load_config(str(tmp_path / "sub" / "child.yaml"))[0].optimizer.beta2 == 0.99


def test_a_folder_that_is_called_so_is_one_when_it_is_read_again(home, file, tmp_path):
    config, origins = load_config(str(file), ["data.path=./~d", "run.folder=t"])
    assert config.data.path == tmp_path / "~d"
    (tmp_path / "t").mkdir()
    write_config(config, origins, tmp_path / "t" / "config.yaml")
    assert read_run_config(tmp_path / "t").data.path == tmp_path / "~d"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            "run.folder=~nobody-here/x",
            "on the command line: run.folder: no home folder is known for ~nobody-here; write the whole path",
        ),
        (
            "data.sources=[{path: ~nobody-here}]",
            "data.sources.0.path: no home folder is known for ~nobody-here",
        ),
        (
            "data.path=~",
            "'data.path=~' is null in YAML; write data.path=~/ for the home folder, or data.path=null",
        ),
        ("budget.law=~", "'budget.law=~' is null in YAML"),
    ],
)
def test_what_is_no_home(home, file, given, sentence):
    with pytest.raises(UserError) as error:
        load_config(str(file), [given])
    assert sentence in str(error.value)


def test_null_is_still_null_where_a_key_holds_no_path(home, file):
    assert load_config(str(file), ["budget.tokens=~", "data.path=~/"])[0].data.path == home
