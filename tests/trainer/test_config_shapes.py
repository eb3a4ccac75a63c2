"""The values that sentences about shapes suggest: accepted by all checks, and the nearest that are."""

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.trainer.config_io import check
from stepline.trainer.errors import UserError
from stepline.trainer.plan.resolve import check_products

SUGGESTED = re.compile(r"the nearest ?(\w*)[^:]*: (\d+)$")
KEY = re.compile(r"(hidden_size|head_dim|ffn_size|moe\.shared_size|num_kv_heads)")
PRODUCTS = {
    "none": {},
    "2:4": {"sparse": {"mode": "s-ste"}},
    "fp8": {"precision": {"fp8": True}},
    "2:4 fp8": {"precision": {"fp8": True}, "sparse": {"mode": "s-ste", "forward": "sparse"}},
}


def config(products: str = "none", shared_size: int = 0, adapters: bool = False, **model) -> dict:
    """A config's sections, unchecked."""
    shape = {"vocab_size": 100, "num_layers": 2, "num_heads": 4, "hidden_size": 64, "ffn_size": 64}
    parts = {"moe": {"shared_size": shared_size}, "revffn": {"adapters": adapters}}
    return {"model": shape | parts | model} | copy.deepcopy(PRODUCTS[products])


def refusal(tree: dict) -> str | None:
    """The sentence that refuses the config, or None."""
    try:
        check_products(check(copy.deepcopy(tree), "a.yaml"))
    except UserError as error:
        return str(error)
    return None


def put(tree: dict, key: str, value: int) -> dict:
    """The config with another value."""
    tree = copy.deepcopy(tree)
    *section, name = key.split(".")
    (tree["model"]["moe"] if section else tree["model"])[name] = value
    return tree


def suggestion(sentence: str) -> tuple[str, int]:
    """The key that a sentence is about, and the value that it suggests."""
    found = SUGGESTED.search(sentence)
    assert found, sentence
    key = found[1] if found[1] in ("num_kv_heads", "hidden_size", "head_dim") else KEY.search(sentence)[0]
    assert key in sentence.split(";")[0]
    return key, int(found[2])


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            config(blocks="revffn", hidden_size=42),
            "model: hidden_size 42 is not divisible by the streams' heads, 2 x num_heads 4; the nearest width that is, "
            "and suits all layers: 48",
        ),
        (
            config(blocks="revffn", hidden_size=40),
            "model: hidden_size 40 gives heads an odd width of 5, and RoPE rotates pairs; the nearest possible: 32",
        ),
        (
            config(hidden_size=60),
            "model: hidden_size 60 gives heads an odd width of 15, and RoPE rotates pairs; the nearest possible: 64",
        ),
        (
            config(hidden_size=45),
            "model: hidden_size 45 is not divisible by num_heads 4; the nearest width that is, and suits all layers: "
            "48",
        ),
        (
            config(blocks="revffn", hidden_size=33, head_dim=8),
            "model: hidden_size 33 is not divisible by 2 streams; the nearest width that is: 32",
        ),
        (
            config(blocks="revffn", hidden_size=72, head_dim=8, ffn="moe"),
            "model: hidden_size gives experts a width of 36, and grouped products take multiples of 8; the nearest "
            "hidden_size: 64",
        ),
        (
            config("fp8", blocks="revffn", hidden_size=80, num_heads=2),
            "model.hidden_size gives layers a width of 40, and FP8 products take multiples of 16; the nearest "
            "hidden_size: 64",
        ),
        (
            config("2:4", blocks="revffn", hidden_size=68, num_heads=1),
            "model.hidden_size gives layers a width of 34, and 2:4 sparse layers take multiples of 4; the nearest "
            "hidden_size: 64",
        ),
        (
            config("fp8", hidden_size=144, num_heads=6, num_kv_heads=1),
            "model.hidden_size gives attention's keys a width of 24, and FP8 products take multiples of 16; the "
            "nearest hidden_size: 192",
        ),
        (
            config("fp8", head_dim=13, num_kv_heads=1),
            "model: head_dim 13 is odd, and RoPE rotates pairs; the nearest possible: 16",
        ),
        (
            config("fp8", head_dim=22, num_kv_heads=2),
            "model.head_dim gives attention's keys a width of 44, and FP8 products take multiples of 16; the nearest "
            "head_dim: 24",
        ),
        (
            config("2:4 fp8", 32, ffn="moe", ffn_size=60),
            "model: ffn_size gives experts a width of 60, and grouped products take multiples of 8; the nearest: 64",
        ),
        (
            config(num_heads=8, num_kv_heads=3),
            "model: num_heads 8 is not a multiple of num_kv_heads 3; the nearest num_kv_heads: 2",
        ),
    ],
)
def test_a_sentence_suggests_a_value_of_its_key(tree, sentence):
    said = refusal(tree)
    assert said.removeprefix("a.yaml: ") == sentence
    assert refusal(put(tree, *suggestion(said))) is None


def test_sections_that_are_wrong_are_what_is_named():
    tree = config(hidden_size=45)
    for section in ({"fp8": 3}, 3, None):
        assert "hidden_size 45" in refusal(tree | {"precision": section})  # the model is read first
        assert "precision" in refusal(put(tree, "hidden_size", 48) | {"precision": section})


whole = st.integers


@settings(max_examples=150)
@given(
    products=st.sampled_from(sorted(PRODUCTS)),
    shared_size=whole(1, 80),
    adapters=st.booleans(),
    model=st.fixed_dictionaries(
        {
            "blocks": st.sampled_from(["standard", "revffn"]),
            "ffn": st.sampled_from(["dense", "moe"]),
            "hidden_size": whole(1, 600),
            "num_heads": whole(1, 12),
            "num_kv_heads": st.none() | whole(1, 12),
            "head_dim": st.none() | whole(2, 80),
            "ffn_size": whole(1, 200),
        }
    ),
)
def test_a_suggested_value_is_the_nearest_that_is_accepted(products, shared_size, adapters, model):
    tree, mended = config(products, shared_size, adapters, **model), {}
    while (sentence := refusal(tree)) is not None:
        key, value = suggestion(sentence)
        assert key not in mended, sentence  # a value that was suggested is not refused
        mended[key] = value
        tree = put(tree, key, value)
    for key, value in mended.items():
        was = shared_size if key == "moe.shared_size" else model[key]
        closer = abs(value - was)
        for other in range(max(1, was - closer + 1), was + closer):
            assert refusal(put(tree, key, other)) is not None, (key, was, other, value)
