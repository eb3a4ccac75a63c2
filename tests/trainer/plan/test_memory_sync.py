"""The memory of the synchronisers: their state, what an average of DiLoCo's takes, and the batches that DeMo encodes
at once."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepline.comm.mesh import build_mesh
from stepline.models.config import ModelConfig
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.plan import demo_memory
from stepline.trainer.plan.sync_memory import SyncMemory
from stepline.trainer.plan.tensors import block_group, root_group
from stepline.trainer.run.synchronize import build_synchronizer

ODD = ModelConfig(
    vocab_size=331, hidden_size=36, num_layers=2, num_heads=3, ffn_size=50, qk_norm=True, tied_embeddings=True
)
EXPERTS = ODD.model_copy(update={"ffn": "moe", "hidden_size": 48, "ffn_size": 56})


def made(model: ModelConfig, sync: str, sections: dict, replicas: int = 2) -> tuple[SyncMemory, object]:
    """What is planned of a synchroniser between replicas of one rank, and the synchroniser."""
    settled = Config(model=model, parallel={"sync": sync} | sections, optimizer={"weight_decay": 0.1})
    settled.run.device, settled.run.compile, settled.precision.compute = "cpu", False, "fp32"
    settled.budget.steps = 9
    named = dict(Transformer(model).named_parameters())
    blocks = type(root_group(model))(block_group(model).shapes * model.num_layers)
    planned = SyncMemory(settled, root_group(model), blocks, 1, replicas, 4)
    return planned, build_synchronizer(settled, named, build_mesh(torch.device("cpu"), replicas, 1))


SYNCS = {
    "demo": {},
    "demo, gradients": {"demo": {"accumulate": "gradients"}},
    "demo, a step late": {"demo": {"delay": 1}},
    "demo, not ahead": {"demo": {"delay": 1, "ahead": False}},
    "demo, owners": {"demo": {"owner_reduce_above": 1, "chunk": 8}},
    "demo, faithful": {"demo": {"faithful": True}},
    "diloco": {},
    "random_k": {},
}


@pytest.mark.parametrize("name", SYNCS)
def test_state_of_the_synchronisers(pool, name):
    """Against the tensors that are there."""
    (found, held) = pool.run(2, synchronizer_bytes, name.split(",")[0], SYNCS[name])[0]
    assert found == pytest.approx(held, rel=0.01)


def synchronizer_bytes(sync: str, sections: dict) -> tuple[int, int]:
    planned, synchronizer = made(ODD, sync, sections)
    parameters = {p.data_ptr() for p in synchronizer.parameters.values()}
    held = sum(
        t.untyped_storage().nbytes()
        for t in synchronizer.state_dict(0).values()
        if t.data_ptr() not in parameters
    )
    shared = synchronizer.shared_parameters().values()
    held += sum(t.untyped_storage().nbytes() for t in shared if t.data_ptr() not in parameters)
    return planned.state(), held


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, and the most of them that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            key = storage.data_ptr()
            if key not in given and key not in self.held:
                self.held[key] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, key)
        self.most = max(self.most, sum(self.held.values()))
        return out


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_an_average_of_diloco_takes_what_is_planned(pool, codec, world):
    planned, most, whole = pool.run(world, averaging_bytes, codec)[0]
    copies = {"fp32": 1, "bf16": 1.5, "int8": 3.5 + world / 4}[codec]
    assert (planned, most) == pytest.approx((copies * whole, copies * whole), rel=0.01)


def averaging_bytes(codec: str) -> tuple[int, int, int]:
    """Of an outer step: as planned, and as they are; and those of the parameters."""
    model = ODD.model_copy(update={"hidden_size": 144, "ffn_size": 512})
    planned, synchronizer = made(
        model, "diloco", {"diloco": {"every": 1, "codec": codec}}, torch.distributed.get_world_size()
    )
    synchronizer.inner = SimpleNamespace(step=lambda *_: None)
    with Peak() as peak:
        assert synchronizer.step(0.1).jumped
    return planned.temporaries(), peak.most, planned.whole


@pytest.mark.parametrize("model", [ODD, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    "demo", [{}, {"kept": 100, "codec": "fp32"}, {"accumulate": "gradients", "chunk": 8}, {"faithful": True}]
)
def test_batches_and_packets_are_those_of_demo(pool, model, demo):
    planned, real = pool.run(2, demo_batches, model, demo)[0]
    assert planned == real


def demo_batches(model: ModelConfig, demo: dict) -> tuple[tuple, tuple]:
    """(Batches, bytes of a packet without the vectors) as planned, and as they are."""
    planned, synchronizer = made(model, "demo", {"demo": demo})

    def sorted_batches(found: list) -> list[tuple]:
        return sorted((b.height, b.width, b.chunks, b.kept, b.transformed, b.published) for b in found)

    form, batches = synchronizer.form, planned.batches()
    dense = form.dense * form.dense_dtype.itemsize
    size = demo_memory.packet(batches, planned.codec())
    return (sorted_batches(batches), size), (sorted_batches(form.batches), form.num_bytes(0) - dense)


@pytest.mark.parametrize("delay", [0, 1])
def test_with_owners_memory_does_not_grow_with_the_replicas(delay):
    """Beyond `owner_reduce_above` a rank holds messages of about a packet, whatever the number of replicas: all that is
    left to differ are shares of whole chunks. Gathered by all, every replica adds a packet."""
    model = ModelConfig(vocab_size=32_000, hidden_size=2048, num_layers=16, num_heads=16, ffn_size=5632)
    blocks = type(root_group(model))(block_group(model).shapes * model.num_layers)

    def needed(replicas: int, above: int) -> int:
        run = Config(
            model=model, parallel={"sync": "demo", "demo": {"owner_reduce_above": above, "delay": delay}}
        )
        planned = SyncMemory(run, root_group(model), blocks, 1, replicas, 4)
        owed = sum(batch.elements for batch in planned.batches()) * 4 // replicas if above < replicas else 0
        return planned.state() - owed + planned.temporaries() + planned.flying()

    assert needed(512, above=8) == pytest.approx(needed(16, above=8), rel=1e-3)
    assert needed(512, above=8) < needed(9, above=9)
    assert needed(512, above=512) > 3 * needed(512, above=8)
