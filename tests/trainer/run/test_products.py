"""The choice between sparse and dense products by measurement, with a timer that the tests hold."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.comm.mesh import World
from stepline.kernels import sparse_mm
from stepline.kernels.sparse_mm import Algorithm, Cache
from stepline.models.sparse_linear import SparseLinear
from stepline.trainer.errors import UserError
from stepline.trainer.run import products
from stepline.trainer.run.build import build_model
from stepline.trainer.run.products import (
    Timing,
    check_products_of_batch,
    choose_products,
    products_done_instead,
)
from stepline.trainer.run.start import start_job, write_environment

SHAPE = ["model.hidden_size=64", "model.num_heads=2", "model.ffn_size=96", "model.num_layers=2"]
SPARSE = [*SHAPE, "sparse.mode=s-ste", "precision.fp8=true"]
UP, DOWN = (96, 64, 64), (64, 96, 64)
TIMES = {UP: Timing(1.0, 1.5, Algorithm(7, 2, 1)), DOWN: Timing(2.0, 1.5, Algorithm(3))}


def chosen(config: str, options: list[str], cache: str, fails: bool = False) -> dict:
    """What a rank has after the choice; only rank 0 may measure."""
    world = World.from_environment()
    job = start_job(config, [*SPARSE, *options], "never", world)
    model = build_model(job.config, job.device, None)
    asked = []

    def measure(shape, device, dtype):
        if world.rank or fails:
            raise AssertionError("measured")
        asked.append((shape, dtype))
        return TIMES[shape]

    group = dist.new_group(backend="gloo")
    with mock.patch.object(torch.cuda, "get_device_name", return_value="GPU"):
        record, notes = choose_products(
            job.config, model, job.device, group, measure, Cache(Path(cache)) if world.rank == 0 else None
        )
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    ways = {(m.out_features, m.in_features): m.algorithm for m in layers if m.recipe.sparse}
    others = {m.algorithm for m in layers if not m.recipe.sparse}
    out = model(torch.arange(32).view(1, 32))
    return {
        "ways": ways,
        "others": others,
        "record": record,
        "notes": notes,
        "asked": asked,
        "out": out.detach(),
    }


def test_each_shape_is_timed_once_and_all_ranks_do_the_same(pool, tiny_config, tmp_path):
    cache = str(tmp_path / "products.json")
    first, second = pool.run(2, chosen, str(tiny_config), [], cache)
    assert sorted(first["asked"]) == [(DOWN, torch.float32), (UP, torch.float32)]
    assert first["ways"] == second["ways"] == {UP[:2]: Algorithm(7, 2, 1), DOWN[:2]: None}
    assert first["others"] == {None}  # attention is dense
    assert first["record"] == second["record"]
    assert first["record"]["96 x 64, 64 tokens"]["product"] == "sparse"
    assert first["record"]["64 x 96, 64 tokens"] == {
        "product": "dense", "sparse_ms": 2.0, "dense_ms": 1.5,
        "algorithm": {"alg_id": 3, "split_k": 1, "split_k_mode": -1},
    }  # fmt: skip
    (note,) = first["notes"]
    assert "64 x 96, 64 tokens takes 2.000 ms and the dense one 1.500 ms: dense FP8 is used" in note
    again, _ = pool.run(2, chosen, str(tiny_config), [], cache, True)  # nothing is measured any more
    assert again["ways"] == first["ways"]
    assert torch.equal(again["out"], first["out"])


def test_what_forces_a_product(pool, tiny_config, tmp_path):
    cache = str(tmp_path / "products.json")
    with pytest.raises(Exception, match="no sparse tensor cores"):
        pool.run(1, chosen, str(tiny_config), ["sparse.force=true"], cache)
    dense = pool.run(1, chosen, str(tiny_config), ["sparse.forward=dense"], cache, True)[0]
    assert set(dense["ways"].values()) == {None}
    assert dense["record"] == {}
    sparse = pool.run(1, chosen, str(tiny_config), [], cache)[0]
    assert torch.equal(sparse["out"], dense["out"])  # the same numbers


def test_force_keeps_the_slower_product_and_damaged_entries_are_timed_anew(
    tiny_config, tmp_path, monkeypatch
):
    job = start_job(str(tiny_config), SPARSE, "never", World(0, 1, 0, 1))
    job.config.sparse.force = True
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    cache = Cache(tmp_path / "products.json")
    cache.entries[Cache.key(job.device, *DOWN, torch.float32)] = {"sparse_ms": "fast"}
    shapes = [UP, DOWN, (80, 64, 64)]
    ways, record, notes = products.decide(
        shapes, job.config, job.device, lambda shape, *_: TIMES[shape], cache
    )
    assert ways == {UP: Algorithm(7, 2, 1), DOWN: Algorithm(3), (80, 64, 64): None}
    assert record["80 x 64, 64 tokens"]["product"] == "dense"
    assert len(notes) == 2
    assert "sparse.force keeps it sparse" in notes[0]
    assert "multiples of 32, not 80 x 64" in notes[1]
    saved = json.loads((tmp_path / "products.json").read_text())
    assert {entry["sparse_ms"] for entry in saved.values()} == {1.0, 2.0}


def test_a_product_that_fails_is_dense_or_refused(tiny_config, tmp_path, monkeypatch):
    def fails(shape, *_):
        if shape == DOWN:
            raise RuntimeError("CUDA error: not supported\nand more")
        return TIMES[shape]

    job = start_job(str(tiny_config), SPARSE, "never", World(0, 1, 0, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    ways, record, notes = products.decide(
        [UP, DOWN], job.config, job.device, fails, Cache(tmp_path / "products.json")
    )
    assert ways == {UP: Algorithm(7, 2, 1), DOWN: None}
    assert record["64 x 96, 64 tokens"] == {"product": "dense", "reason": "CUDA error: not supported"}
    assert "fails (CUDA error: not supported): dense FP8 is used" in notes[0]
    job.config.sparse.force = True
    with pytest.raises(UserError, match="fails on this machine"):
        products.decide([DOWN], job.config, job.device, fails, Cache(tmp_path / "products.json"))


def test_all_ranks_refuse_what_fails_on_one(pool, tiny_config, tmp_path):
    cache = str(tmp_path / "products.json")
    for said in pool.run(2, refused, str(tiny_config), cache):
        assert "fails on this machine" in said


def refused(config: str, cache: str) -> str:
    world = World.from_environment()
    job = start_job(config, SPARSE, "never", world)
    job.config.sparse.forward = "sparse"

    def fails(*_):
        raise RuntimeError("not supported")

    group = dist.new_group(backend="gloo")
    with mock.patch.object(torch.cuda, "get_device_name", return_value="GPU"):
        try:
            choose_products(
                job.config,
                build_model(job.config, job.device, None),
                job.device,
                group,
                fails,
                Cache(Path(cache)),
            )
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(("searched_ms", "best"), [(1.0, Algorithm(9, 2, 1)), (5.0, Algorithm())])
def test_a_shape_is_timed_by_default_and_by_what_the_search_finds(monkeypatch, searched_ms, best):
    calls = []

    def mm(packed, dense, *, alg_id, out_dtype, **_):
        calls.append(alg_id)
        return torch.zeros(dense.shape[1], len(packed), dtype=out_dtype)

    def time_ms(run):
        before = len(calls)
        assert run().shape == (32, 64)
        return {0: 2.0, 9: searched_ms}[calls[-1]] if len(calls) > before else 3.0

    found = SimpleNamespace(mm_search=lambda *_: (9, 2, 1, 40))
    monkeypatch.setattr(torch, "_cslt_compress", lambda w: w)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", mm)
    monkeypatch.setattr(torch._C, "_cusparselt", found, raising=False)
    monkeypatch.setattr(products, "time_ms", time_ms)
    timing = products.measure_shape((64, 96, 32), torch.device("cpu"), torch.bfloat16)
    assert timing == Timing(min(2.0, searched_ms), 3.0, best)


def test_environment_json_records_the_choice(tiny_config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    job = start_job(str(tiny_config), [*SPARSE, f"run.folder={folder}"], "never", World(0, 1, 0, 1))
    job.products = {"96 x 64, 64 tokens": {"product": "sparse"}}
    write_environment(job, 1)
    assert json.loads((folder / "environment.json").read_text())["products"] == job.products


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sparse.forward=dense"], "sparse.forward needs sparse layers"),
        (["sparse.force=true"], "sparse.force needs sparse layers"),
        (["sparse.mode=s-ste", "sparse.forward=sparse"], "made for FP8; set precision.fp8=true"),
        ([*SPARSE, "sparse.forward=sparse"], "needs sparse tensor cores, and the cpu has no"),
        ([*SPARSE, "sparse.force=true", "sparse.forward=dense"], "contradicts sparse.forward=dense"),
        (
            [*SPARSE, "sparse.forward=sparse", "model.ffn_size=80"],
            "width of 80, and 2:4 sparse FP8 products take multiples of 32; the nearest width: 64",
        ),
        (
            [*SPARSE, "sparse.force=true", "model.ffn=moe", "model.moe.experts=4"],
            "no grouped 2:4 product exists",
        ),
        ([*SPARSE, "precision.compute=fp64"], "which fp64 is not for"),
        (
            [*SPARSE, "data.seq_len=24", "budget.batch_tokens=24", "parallel.micro_batch=1"],
            "of 16 tokens, not 24",
        ),
    ],
)
def test_what_cannot_be_is_refused(tiny_config, tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        start_job(
            str(tiny_config),
            [f"run.folder={tmp_path / 'run'}", *SHAPE, *overrides],
            "never",
            World(0, 1, 0, 1),
        )


def test_what_a_gpu_does_instead_is_said(tiny_config, tmp_path, monkeypatch):
    gpu, folder = torch.device("cuda", 0), f"run.folder={tmp_path / 'run'}"

    def notes(*options):
        job = start_job(str(tiny_config), [folder, *SHAPE, *options], "never", World(0, 1, 0, 1))
        check_products_of_batch(job.config, gpu)
        return products_done_instead(job.config, gpu)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert sparse_mm.missing(gpu) is None
    assert notes(*SPARSE) == []
    assert "sparse.forward=dense" in notes(*SPARSE, "sparse.forward=dense")[0]
    assert "set precision.fp8=true" in notes("sparse.mode=s-ste")[0]
    assert "no grouped 2:4 product" in notes(*SPARSE, "model.ffn=moe", "model.moe.experts=4")[1]


@pytest.mark.parametrize(
    ("version", "capability", "compiled", "compute"),
    [
        ("2.11.0", (7, 5), False, "fp32"),
        ("2.11.0", (8, 6), False, "bf16"),
        ("2.13.0", (8, 6), True, "bf16"),
        ("2.11.0", (9, 0), True, "bf16"),
    ],
)
def test_what_a_gpu_only_emulates(tiny_config, tmp_path, monkeypatch, version, capability, compiled, compute):
    """bf16 is not chosen, and FP8 not compiled by a torch that cannot."""

    class Properties:
        total_memory = 2**34
        major, minor = capability

    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_capability": capability, "current_device": 0,
        "get_device_properties": Properties(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    overrides = [f"run.folder={tmp_path / 'run'}", *SHAPE, "precision.fp8=true", "run.device=cuda"]
    overrides += ["precision.compute=auto", "run.compile=auto"]
    job = start_job(str(tiny_config), overrides, "never", World(0, 1, 0, 1))
    assert (job.config.run.compile, job.config.precision.compute) == (compiled, compute)
    assert ("no FP8" in job.origins["run.compile"]) is not compiled
    assert any("run.compile is off" in note for note in job.notes) is not compiled
    overrides[-1] = "run.compile=true"
    with (
        contextlib.nullcontext() if compiled else pytest.raises(UserError, match="cannot compile FP8 numbers")
    ):
        start_job(str(tiny_config), overrides, "never", World(0, 1, 0, 1))
