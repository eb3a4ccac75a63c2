"""YAML as configs have it."""

import pytest

from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError


def test_a_date_is_text(file):
    file.write_text(file.read_text() + "logging: {project: 2024-13-45}\n")
    config, _ = load_config(str(file), ["run.folder=2026-10-03"])
    assert (config.logging.project, str(config.run.folder)) == ("2024-13-45", "2026-10-03")
    again, _ = load_config(str(file), [f"run.folder={config.run.folder}"])
    assert again == config


def test_what_is_yes_and_no_stays_so(file):
    config, _ = load_config(str(file), ["run.compile=yes", "model.qk_norm=on", "data.verify=off"])
    assert (config.run.compile, config.model.qk_norm, config.data.verify) == (True, True, "off")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {}\noptimizer: {lr: 1}\nmodel: {}\n", "3 is not valid YAML: 'model' stands in line 1 too"),
        (
            "optimizer:\n  lr: 1e-3\n  beta2: 0.9\n  lr: 2e-3\n",
            "4 is not valid YAML: 'lr' stands in line 2 too",
        ),
        ("base: a\nbase: b\n", "2 is not valid YAML: 'base' stands in line 1 too"),
    ],
)
def test_a_key_twice_in_a_file(tmp_path, text, sentence):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert str(error.value) == f"{path}:{sentence}; leave out one of the two"


def test_a_merge_key_is_none_twice(file):
    """YAML's own way to take over keys, of which some are set anew."""
    file.write_text(
        file.read_text()
        + "data: {sources: [&first {path: a, weight: 2}, &second {<<: *first, path: b}, {<<: *second}]}\n"
    )
    config, _ = load_config(str(file))
    assert [(str(s.path), s.weight) for s in config.data.sources] == [("a", 2), ("b", 2), ("b", 2)]
