"""An optimizer for tests of synchronisers, loaded with `runpy.run_path`."""

import torch
from torch import nn

from stepline.comm.fsdp import local


class SGD:
    """p <- p - lr (g + wd p)."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters

    @torch.no_grad()
    def step(self, lr, weight_decay, skip=None):
        for p in self.parameters.values():
            local(p.data).sub_(lr * (local(p.grad) + weight_decay * local(p.data)))

    def state(self):
        return {}

    def describe(self):
        return dict.fromkeys(self.parameters, "sgd")
