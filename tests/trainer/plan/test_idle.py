"""Keys that are typed and do nothing are named; the shipped configs have none."""

import pytest
import yaml

from stepline.trainer.config_io import load_config, section_of, shipped_configs
from stepline.trainer.plan.idle import IDLE_WITH, NEEDS, idle_keys

MODEL = {"vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}
MOE, REVFFN, DEMO = "model.ffn=moe", "model.blocks=revffn", "parallel.sync=demo"
FAITHFUL, GRADIENTS, STAGE_2 = (
    "parallel.demo.faithful=true",
    "parallel.demo.accumulate=gradients",
    "parallel.zero.stage=2",
)
SPARSE, FP8, COUPLING = "sparse.mode=s-ste", "precision.fp8=true", "model.coupling=revffn"
ZERO = ["parallel.backend=zero", "optimizer.name=adamw"]


@pytest.fixture
def said(tmp_path):
    """What is said of overrides, without `KEY has no effect` where that is the first one's."""
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL}))

    def of(*overrides: str) -> list[str]:
        first = overrides[0].split("=")[0]
        return [
            n.removeprefix(f"{first} has no effect ") for n in idle_keys(*load_config(str(path), overrides))
        ]

    return of


@pytest.mark.parametrize(
    ("key", "on", "off", "why"),
    [
        ("schedule.decay_fraction=.1", ["schedule.name=wsd"], [], "without schedule.name=wsd"),
        ("optimizer.momentum=.9", ["optimizer.name=muon"], [], "without optimizer.name=muon"),
        ("model.moe.bias_rate=.1", [MOE], [], "without model.ffn=moe"),
        (
            "model.moe.bias_rate=.1",
            [MOE],
            [MOE, "model.moe.balance=global"],
            "without model.moe.balance=bias",
        ),
        ("model.moe.bias_rate=.1", [MOE], [MOE, "optimizer.only=adapters"], "without optimizer.only=all"),
        *(
            (
                "model.moe.balance_loss=.1",
                [MOE, f"model.moe.balance={balance}"],
                [MOE],
                "without model.moe.balance=global or switch",
            )
            for balance in ("global", "switch")
        ),
        ("model.revffn.anchor_every=2", [REVFFN], [], "without model.blocks=revffn"),
        ("model.revffn.iterations=2", [REVFFN, COUPLING], [REVFFN], f"without {COUPLING}"),
        (
            "model.revffn.grid_bits=9",
            [REVFFN],
            [REVFFN, "model.revffn.streams=fp32"],
            "without model.revffn.streams=grid",
        ),
        *(
            (
                f"model.rope_scaling.{key}",
                [],
                ["model.rope_scaling.type=linear"],
                "without model.rope_scaling.type=llama3",
            )
            for key in ("low_freq_factor=2", "high_freq_factor=3", "original_context=64")
        ),
        ("parallel.deepspeed.sub_group_size=9", ZERO, [*ZERO, STAGE_2], "without parallel.zero.stage=3"),
        (
            "parallel.deepspeed.allgather_bucket_size=9",
            [*ZERO, STAGE_2],
            ZERO,
            "without parallel.zero.stage=1 or 2",
        ),
        ("parallel.reshard_after_forward=false", ZERO, [*ZERO, STAGE_2], f"with {STAGE_2}"),
        ("parallel.check_replicas_every=7", [], ZERO, "without parallel.backend=fsdp"),
        ("parallel.demo.version=1", [DEMO, GRADIENTS], [DEMO], "with parallel.demo.accumulate=updates"),
        ("parallel.demo.accumulate=updates", [DEMO], [DEMO, FAITHFUL], f"with {FAITHFUL}"),
        ("parallel.demo.density=.1", [DEMO], [DEMO, "parallel.demo.kept=3"], "beside parallel.demo.kept"),
        ("optimizer.beta2=.9", [DEMO], [DEMO, FAITHFUL], f"with {FAITHFUL}"),
        ("optimizer.beta2=.9", ["optimizer.name=muon"], [DEMO, FAITHFUL], f"with {FAITHFUL}"),
        (
            "optimizer.momentum=.9",
            [DEMO, "optimizer.name=muon"],
            [DEMO, "optimizer.name=muon", GRADIENTS],
            f"with {GRADIENTS}",
        ),
        ("precision.fp8_scales=tensor", [FP8], [], f"without {FP8}"),
        ("sparse.forward=dense", [SPARSE, FP8], [SPARSE], f"without {FP8}"),
        ("sparse.dense_fraction=.1", [SPARSE], [], f"without {SPARSE}"),
        (
            "logging.eval_windows=9",
            ["logging.eval_every=5"],
            ["logging.eval_every=0"],
            "with logging.eval_every=0",
        ),
        ("logging.project=mine", [], ["logging.wandb=off"], "with logging.wandb=off"),
    ],
)
def test_a_key_is_named_where_what_it_belongs_to_is_off(said, key, on, off, why):
    assert said(key, *on) == []
    assert said(key, *off) == [why]


def test_what_is_off_itself_puts_nothing_out_of_effect(said):
    """DeMo's settings are those of another synchroniser, ZeRO's stage of another backend: one note each, their own."""
    for off in (FAITHFUL, GRADIENTS):
        key = off.split("=")[0]
        assert said(off, "optimizer.name=muon", "optimizer.momentum=.9") == ["without parallel.sync=demo"], (
            key
        )
    stage = said(STAGE_2, "parallel.reshard_after_forward=false")
    assert stage == ["without parallel.backend=zero"]


@pytest.mark.parametrize("name", sorted(path.stem for path in shipped_configs().glob("*.yaml")))
def test_no_key_of_a_shipped_config_is_idle(name):
    config, origins = load_config(name)
    assert idle_keys(config, {k: "override" for k, origin in origins.items() if origin != "default"}) == []


def test_the_tables_name_keys_that_there_are():
    for start, switch, _ in NEEDS + IDLE_WITH:
        for key in (start.removesuffix("."), switch):
            *sections, last = key.split(".")
            assert last in section_of(sections).model_fields, key
            assert (section_of(key.split(".")) is not None) == (key != start and key != switch), key
