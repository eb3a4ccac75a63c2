"""Export and import hold one parameter at a time: bytes of live tensors, counted."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepline.trainer.hf.export import export_run
from stepline.trainer.hf.importing import import_model


class Live(TorchDispatchMode):
    """The most bytes that storages of tensors on the CPU have held at once, places in mapped files too."""

    def __init__(self):
        super().__init__()
        self.alive: set[StorageWeakRef] = set()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((out, args)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.alive.add(StorageWeakRef(tensor.untyped_storage()))
        del tensor
        self.alive = {ref for ref in self.alive if not ref.expired()}
        storages = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.alive)
        self.peak = max(self.peak, sum(s.nbytes() for s in storages if s is not None))
        return out


LARGEST = 1000 * 64
"""Values of the largest parameter, which has a shard of its own."""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "sparse"), [({}, False), ({}, True), ({"ffn": "moe", "moe": {"experts": 6}}, False)]
)
def test_peak_is_that_of_a_shard(make_run, tmp_path, dtype, shape, sparse):
    run, model = make_run(num_layers=4, vocab_size=1000, sparse=sparse, **shape)
    size = {"fp32": 4, "bf16": 2}[dtype]
    whole = sum(p.numel() * size for p in model.parameters())
    del model
    with Live() as live:
        done = export_run(run, tmp_path / "hf", dtype, shard_bytes=25_000 * size)
    largest = max(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert done.shards > 3
    assert largest < whole / 2
    assert LARGEST * size <= live.peak <= 1.3 * largest

    with Live() as live:
        import_model(tmp_path / "hf", tmp_path / "back")
    assert LARGEST * size <= live.peak <= 1.3 * largest
