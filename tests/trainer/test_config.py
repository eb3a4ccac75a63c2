"""Sections, base, overrides, origins, and the one sentence for each mistake."""

from pathlib import Path

import pytest
import yaml

from stepline.models.flops import parameter_counts
from stepline.trainer import config_docs
from stepline.trainer.config import Config
from stepline.trainer.config_io import (
    flatten,
    format_config,
    load_config,
    read_run_config,
    shipped_configs,
    write_config,
)
from stepline.trainer.config_resume import merge_for_resume
from stepline.trainer.errors import UserError

from .conftest import MODEL


def test_base_file_and_overrides_in_that_order_with_their_origins(tmp_path, file):
    child = tmp_path / "child.yaml"
    child.write_text("base: a.yaml\nmodel: {ffn_size: 256}\noptimizer: {lr: 2e-3}\n")
    config, origins = load_config(
        str(child), ["model.num_layers=3", "optimizer.lr=1e-3", "budget.tokens=1e9"]
    )
    assert (config.model.ffn_size, config.model.num_layers, config.model.hidden_size) == (256, 3, 64)
    assert (config.optimizer.lr, config.optimizer.beta2, config.budget.tokens) == (1e-3, 0.99, 10**9)
    assert origins["model.hidden_size"] == "base a.yaml"
    assert origins["model.ffn_size"] == "file child.yaml"
    assert origins["optimizer.lr"] == "override"
    assert origins["optimizer.beta1"] == "default"
    assert config.run.folder == Path("runs/child")
    assert origins.keys() == flatten(config.model_dump(mode="json")).keys()


def test_a_base_has_no_base(tmp_path, file):
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    sentence = r"c\.yaml has the base b\.yaml, .*; write `base: a\.yaml`, with what .*b\.yaml sets$"
    with pytest.raises(UserError, match=sentence):
        load_config(str(tmp_path / "c.yaml"))


def test_a_base_is_a_file_beside_or_a_shipped_config(tmp_path):
    child = tmp_path / "dense-1b.yaml"  # its base is the shipped one of that name, not itself
    for base in ("dense-1b", "dense-1b.yaml"):
        child.write_text(f"base: {base}\noptimizer: {{beta2: 0.9}}\n")
        config, origins = load_config(str(child))
        assert (config.model.hidden_size, config.optimizer.beta2) == (2048, 0.9)
        assert origins["model.hidden_size"] == "base dense-1b.yaml"
    child.write_text("base: dense-1\n")
    with pytest.raises(UserError, match=r"base 'dense-1' is neither a file .* did you mean 'dense-1b'"):
        load_config(str(child))


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(file):
    for override in ("model.bogus=1", "optimizer.lr=-1", "optimizer=3"):
        with pytest.raises(UserError, match=r"^on the command line: "):
            load_config(str(file), [override])
    with pytest.raises(UserError, match=r"a\.yaml with the command line's values: model: hidden_size 66"):
        load_config(str(file), ["model.hidden_size=66"])
    file.write_text(yaml.safe_dump({"model": MODEL | {"ffn_size": 0}}))
    with pytest.raises(UserError, match=r"a\.yaml: model\.ffn_size is 0"):
        load_config(str(file), ["optimizer.lr=1e-3"])


def test_an_override_beside_what_the_file_sets(file):
    file.write_text(yaml.safe_dump({"model": MODEL, "budget": {"tokens": 10}, "data": {"path": "a"}}))
    with pytest.raises(UserError, match=r"file a\.yaml sets budget\.tokens; add budget\.tokens=null"):
        load_config(str(file), ["budget.steps=100"])
    with pytest.raises(UserError, match=r"file a\.yaml sets data\.path; add data\.path=null"):
        load_config(str(file), ["data.sources=[{path: b}]"])
    config, _ = load_config(str(file), ["budget.steps=100", "budget.tokens=null"])
    assert config.budget.steps == 100


def test_the_written_config_reads_back_and_names_every_origin(tmp_path, file):
    config, origins = load_config(str(file), ["data.path=some/folder", "optimizer.lr=1e-3"])
    write_config(config, origins, tmp_path / "config.yaml")
    read = read_run_config(tmp_path)
    assert read.run.folder == tmp_path
    read.run.folder = config.run.folder
    assert read == config
    assert "  lr: 0.001  # override" in format_config(config, origins)
    assert "  beta2: 0.99  # file a.yaml" in format_config(config, origins)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("steps=5", "unknown key 'steps'; did you mean 'budget.steps'?"),
        ("optimzer.lr=1", "unknown key 'optimzer'; did you mean 'optimizer'?"),
        ("optimizer.guard.sgma=2", "unknown key 'optimizer.guard.sgma'; did you mean 'sigma'?"),
        ("data.sources=[{path: a, wight: 2}]", "unknown key 'data.sources.0.wight'; did you mean 'weight'?"),
        ("optimizer.lr=-1", "optimizer.lr is -1; it must be 'auto' or a number above 0 and at most 10"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; it must be 'auto' or a number above 0 and at most 10"),
        ("optimizer.beta1=1.5", "optimizer.beta1 is 1.5; it must be a number at least 0 and below 1"),
        ("run.seed=-2", "run.seed is -2; it must be a whole number at least 0 and below 2147483648"),
        ("schedule.name=cosin", "it must be 'linear', 'cosine' or 'wsd'; did you mean 'cosine'?"),
        ("budget.tokens=1.5", "budget.tokens is 1.5; it must be a whole number at least 1"),
        (
            "budget.batch_tokens=0",
            "budget.batch_tokens is 0; it must be 'auto' or a whole number at least 1 and at most 1000000000000000",
        ),
        ("model.num_heads=0", "model.num_heads is 0; it must be a whole number at least 1"),
        (
            "model.hidden_size=66",
            "hidden_size 66 is not divisible by num_heads 4; the nearest width that is: 64",
        ),
        ("model.num_kv_heads=3", "num_heads 4 is not a multiple of num_kv_heads 3"),
        ("model.head_dim=3", "head_dim 3 is odd"),
        ("optimizer=3", "optimizer is 3; it must be a section with keys of its own"),
        ("parallel.backend=ddp", "parallel.backend is 'ddp'; it must be 'fsdp'"),
        ("model.moe.capacity=.inf", "model.moe.capacity is inf; it must be a number above 0"),
        ("model.rope_theta=.nan", "model.rope_theta is nan; it must be a number above 0"),
        ("budget.steps=1e308", "it must be a whole number at least 1 and at most 1000000000000000"),
        (
            "budget.batch_tokens=1e308",
            "it must be 'auto' or a whole number at least 1 and at most 1000000000000000",
        ),
        ("model.num_layers=1000000007", "it must be a whole number at least 1 and at most 100000"),
        (
            "model.rope_scaling={low_freq_factor: 8}",
            "high_freq_factor 4 must be above low_freq_factor 8",
        ),
        (
            "model.num_layers=null",
            "model.num_layers is None; it must be a whole number at least 1 and at most 100000",
        ),
        (
            "model.num_layers=yes",
            "model.num_layers is True; it must be a whole number at least 1 and at most 100000",
        ),
        ("optimizer.lr=on", "optimizer.lr is True; it must be 'auto' or a number above 0 and at most 10"),
        ("parallel.demo.delay=true", "parallel.demo.delay is True; it must be 0 or 1"),
        ("checkpoint.ephemeral_minutes=no", "ephemeral_minutes is False; it must be a number above 0"),
        (
            "parallel.timeout_s=.inf",
            "parallel.timeout_s is inf; it must be a number above 0 and at most 31536000",
        ),
        (
            "parallel.timeout_s=1e9",
            "parallel.timeout_s is '1e9'; it must be a number above 0 and at most 31536000",
        ),
        (
            "data.sources=[{path: a, weight: .inf}]",
            "weight is inf; it must be a number above 0 and at most 1e+15",
        ),
        (
            "data.sources=[{path: a, weight: 1.0e+300}]",
            "is 1e+300; it must be a number above 0 and at most 1e+15",
        ),
        (
            "data.sources=[{path: a, path: b}]",
            "the value in 'data.sources=[{path: a, path: b}]' is not valid YAML",
        ),
        (
            "model.num-layers=2",
            "on the command line: unknown key 'model.num-layers'; did you mean 'num_layers'?",
        ),
        ("model={1: 2}", "on the command line: unknown key 'model.1'"),
        (
            "optimizer={lr: -1}",
            "on the command line: optimizer.lr is -1; it must be 'auto' or a number above 0",
        ),
        ("run.seed=!!int x", "the value in 'run.seed=!!int x' is not valid YAML"),
        ("nonsense", "'nonsense' is not an override; write section.key=value"),
        ("model.=5", "'model.=5' is not an override; write section.key=value"),
        (".a=5", "'.a=5' is not an override; write section.key=value"),
        (
            "budget.tokens=",
            "'budget.tokens=' has no value; write budget.tokens=VALUE, or budget.tokens=null for none",
        ),
        ("run.seed= ", "'run.seed= ' has no value; write run.seed=VALUE, or run.seed=null for none"),
        ("run.seed.deep=1", "run.seed is {'deep': 1}; it must be a whole number"),
    ],
)
def test_one_sentence_for_a_mistake(file, override, sentence):
    with pytest.raises(UserError) as error:
        load_config(str(file), [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_section_as_one_override_is_its_keys(file):
    config, origins = load_config(
        str(file), ["optimizer={beta1: 0.5, guard: {sigma: 9}}", "optimizer.beta1=0.6"]
    )
    assert (config.optimizer.beta1, config.optimizer.guard.sigma) == (0.6, 9)
    assert (config.optimizer.beta2, origins["optimizer.beta2"]) == (0.99, "file a.yaml")
    assert origins["optimizer.beta1"] == origins["optimizer.guard.sigma"] == "override"
    saved, _ = load_config(str(file), ["optimizer.beta1=0.7"])
    with pytest.raises(UserError, match=r"optimizer\.beta1 was 0\.7 in runs/a and is now 0\.6"):
        merge_for_resume(saved, config, origins, 0)
    config, origins = load_config("dense-8b", ["model.rope_scaling={factor: 4}"])
    assert (config.model.rope_scaling.factor, origins["model.rope_scaling.factor"]) == (4, "override")
    assert load_config("dense-8b", ["model.rope_scaling.factor=4"])[0] == config


def test_the_page_of_all_keys_is_that_of_the_schema():
    """`python -m stepline.trainer.config_docs` writes it anew."""
    text = config_docs.page()
    assert text == config_docs.FILE.read_text(encoding="utf-8")
    for key, value in (
        ("`lr` | 'auto' or a number above 0 and at most 10 | `auto` |  ", "Peak learning rate"),
        ("`head_dim` | a whole number at least 2 or null | `null` |  ", "Width of one head"),
        ("`keep` | a whole number at least 1 | `2` | R ", "Newest ephemeral checkpoints"),
        ("`ephemeral_minutes` | a number above 0 or null | `5.0` | R ", "Minutes between"),
        ("`sources` | a list of [data.sources](#datasources) | `[]` | R ", "Several folders"),
    ):
        assert f"| {key}| {value}" in text


def test_a_folder_instead_of_the_files_sources(tmp_path, file):
    """What the sentence about the two says to add is taken."""
    both = tmp_path / "both.yaml"
    both.write_text(file.read_text() + "data: {sources: [{path: b}]}\n")
    with pytest.raises(UserError, match=r"add data\.sources=null"):
        load_config(str(both), ["data.path=a"])
    config, _ = load_config(str(both), ["data.path=a", "data.sources=null"])
    assert [str(source.path) for source in config.data.folders()] == ["a"]


def test_contradictions_missing_sections_and_files(tmp_path, file):
    with pytest.raises(UserError, match=r"either budget\.tokens or budget\.steps"):
        load_config(str(file), ["budget.tokens=10", "budget.steps=10"])
    with pytest.raises(UserError, match=r"either data.path or data.sources"):
        load_config(str(file), ["data.path=a", "data.sources=[{path: b}]"])
    (tmp_path / "empty.yaml").write_text("data: {seq_len: 8}\n")
    with pytest.raises(UserError, match="'model' is missing"):
        load_config(str(tmp_path / "empty.yaml"))
    (tmp_path / "broken.yaml").write_text("model: [\n")
    with pytest.raises(UserError, match=r"broken\.yaml:2 is not valid YAML"):
        load_config(str(tmp_path / "broken.yaml"))
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_config("quikstart")


def test_resume_keeps_what_was_planned_and_refuses_other_changes(file):
    saved, _ = load_config(str(file), ["optimizer.lr=1e-3", "budget.tokens=1e6", "parallel.micro_batch=4"])
    again, origins = load_config(str(file), ["parallel.micro_batch=2", "budget.tokens=1e6"])
    merged, where = merge_for_resume(saved, again, origins, 0)
    assert merged.optimizer.lr == 1e-3  # auto in the new command: not planned again
    assert merged.parallel.micro_batch == 2
    assert where["optimizer.lr"] == "saved run"
    other, origins = load_config(str(file), ["model.num_layers=3"])
    with pytest.raises(UserError, match=r"model\.num_layers was 2 in runs/a and is now 3"):
        merge_for_resume(saved, other, origins, 0)


PARAMETERS = {
    "dense-125m": 123_587_328,
    "dense-350m": 355_124_224,
    "dense-1b": 1_317_373_952,
    "dense-8b": 8_030_261_248,
    "revffn-1b": 1_323_665_408,
    "revffn-1b-wide": 1_420_398_592,
    "revffn-1b-paper": 1_518_675_968,
}


@pytest.mark.parametrize("path", sorted(shipped_configs().glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_have_their_exact_size_on_the_meta_device(path):
    import torch

    from stepline.models.transformer import Transformer

    config, _ = load_config(str(path))
    with torch.device("meta"):
        model = Transformer(config.model)
    total = sum(p.numel() for p in model.parameters())
    assert total == parameter_counts(config.model).total
    if path.stem in PARAMETERS:
        assert total == PARAMETERS[path.stem]


def test_linear_weights_of_the_reversible_variants_of_dense_1b():
    names = ("dense-1b", "revffn-1b", "revffn-1b-wide", "revffn-1b-paper")
    dense, deep, wide, paper = (parameter_counts(load_config(name)[0].model).linear for name in names)
    assert dense == wide == 1_214_251_008
    assert deep == 1_220_542_464  # .5 % more
    assert paper == dense + 24 * 4 * 1024 * 2048  # an adapter up and one down for each half of 24 blocks


def test_every_key_has_help():
    """Attribute docstrings become help; none is missing."""
    stack = [Config]
    while stack:
        section = stack.pop()
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                stack.append(field.annotation)
            else:
                assert field.description, f"{section.__name__}.{name}"
