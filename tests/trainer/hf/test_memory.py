"""Export and import hold one parameter at a time: bytes of live tensors, counted."""

import mmap

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepline.trainer.hf.export import export_run
from stepline.trainer.hf.importing import import_model


class Live(TorchDispatchMode):
    """The most bytes that storages of tensors on the CPU have held at once; mapped files are not counted."""

    def __init__(self):
        super().__init__()
        self.alive: set[StorageWeakRef] = set()
        self.mapped: list[StorageWeakRef] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if (ref := StorageWeakRef(storage)) not in self.mapped:
                    self.alive.add(ref)
                del storage
        self.alive = {ref for ref in self.alive if not ref.expired()}
        storages = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.alive)
        self.peak = max(self.peak, sum(s.nbytes() for s in storages if s is not None))
        return out


@pytest.fixture
def live(monkeypatch):
    counter, map_file = Live(), torch.frombuffer

    def noted(buffer, **options):
        tensor = map_file(buffer, **options)
        if isinstance(buffer, mmap.mmap):
            counter.mapped.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(torch, "frombuffer", noted)
    return counter


@pytest.mark.parametrize("shape", [{}, {"ffn": "moe", "moe": {"experts": 6}}])
def test_peak_is_that_of_a_shard(make_run, tmp_path, live, shape):
    run, model = make_run(num_layers=4, vocab_size=1000, **shape)
    whole = sum(p.nbytes for p in model.parameters())
    del model
    with live:
        done = export_run(run, tmp_path / "hf", shard_bytes=100_000)
    largest = max(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert done.shards > 3
    assert largest < whole / 2
    assert 1000 * 64 * 4 <= live.peak <= 1.3 * largest

    live.peak = 0
    with live:
        import_model(tmp_path / "hf", tmp_path / "back")
    assert 1000 * 64 * 4 <= live.peak <= 1.3 * largest
