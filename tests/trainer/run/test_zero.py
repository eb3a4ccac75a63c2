"""DeepSpeed ZeRO behind the same loop: the numbers of FSDP2."""

import pytest

pytest.importorskip("deepspeed")

ZERO = "parallel.backend=zero"
MODELS = {
    "dense": [],
    "moe": [
        "model.ffn=moe", "model.hidden_size=40", "model.head_dim=12", "model.ffn_size=24", "model.moe.experts=5",
        "model.moe.shared_size=10", "model.moe.bias_rate=0.05",
    ],
    "revffn": ["model.blocks=revffn", "model.hidden_size=48", "model.num_layers=3", "model.ffn_size=48"],
}  # fmt: skip
WHOLE = "parallel.deepspeed.stage3_param_persistence_threshold=0"
"""Otherwise weights as small as these stay gathered."""


def stage(number: int) -> list[str]:
    return [ZERO, f"parallel.zero.stage={number}", *([WHOLE] if number == 3 else [])]


@pytest.fixture
def fsdp(train, tiny_config, tmp_path):
    """Rows of a run by FSDP2, once for each set of options."""
    found = {}

    def rows(*options: str) -> list[dict]:
        if options not in found:
            found[options] = train(2, tiny_config, tmp_path / f"fsdp{len(found)}", *options)
        return found[options]

    return rows


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_gives_the_curve_of_fsdp2(train, tiny_config, tmp_path, column, fsdp, name):
    """50 steps with accumulation: the last micro-batches are padded with windows without loss."""
    options = [*MODELS[name], "budget.steps=50", "parallel.micro_batch=1", "budget.batch_tokens=160"]
    for number in (1, 2, 3):
        rows = train(2, tiny_config, tmp_path / f"{number}", *options, *stage(number))
        for key in ("loss", "grad_norm"):
            assert (column(rows, key) / column(fsdp(*options), key) - 1).abs().max() < 1e-5, (number, key)
