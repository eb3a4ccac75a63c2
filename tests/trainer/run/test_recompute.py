"""Selective recompute repeats no product: their number in a forward and a backward is that without recompute."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepline.comm.mesh import World
from stepline.kernels import grouped
from stepline.trainer.run.start import start_job
from stepline.trainer.run.state import Trainee

MOE = ["model.ffn=moe", "model.ffn_size=32", "model.moe.experts=4", "model.moe.shared_size=16"]
PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm", "_scaled_mm", "_scaled_dot_product_flash_attention_for_cpu")


class Counted(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def products(config: str, options: list[str]) -> Counter:
    job = start_job(config, ["model.hidden_size=48", *options], "never", World(0, 1, 0, 1))
    trainee = Trainee.build(job.config, job.device, None)
    trainee.sparsity.begin(0, watched=False)
    tokens = torch.randint(0, 331, (2, 17), generator=torch.Generator().manual_seed(0))
    with Counted() as counted:
        trainee.model(tokens[:, :-1], tokens[:, 1:], loss_scale=torch.tensor(0.03)).nll.backward()
    return Counter({name: counted.calls[name] for name in PRODUCTS if counted.calls[name]})


@pytest.mark.parametrize("one_product", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize(
    "options",
    [[], MOE, [*MOE, "sparse.mode=s-ste"], ["precision.fp8=true", "model.head_dim=16", "model.ffn_size=64"]],
)
def test_no_product_is_repeated(tiny_config, monkeypatch, options, one_product):
    if one_product:  # as on CUDA
        monkeypatch.setattr(grouped, "_as_one_product", lambda x: True)
    plain = products(str(tiny_config), [*options, "run.recompute=none"])
    assert products(str(tiny_config), [*options, "run.recompute=selective"]) == plain
    assert sum(products(str(tiny_config), [*options, "run.recompute=full"]).values()) > sum(plain.values())
    assert (plain["_grouped_mm"] > 0) == (one_product and MOE[0] in options)
