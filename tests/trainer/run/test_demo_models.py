"""DeMo and DiLoCo over mixtures and reversible blocks, against plain loops over the replicas in float64."""

import functools
import math
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.comm.mesh import build_mesh
from stepline.models import transformer
from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.revffn import run_reversible
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

STEPS, REPLICAS, LR = 20, 2, 5e-3
MOE = {"ffn": "moe", "moe": {"experts": 4, "shared_size": 8, "bias_rate": 0.05}}
REVFFN = {"hidden_size": 32, "blocks": "revffn"}
MODELS = {"moe": MOE, "revffn": REVFFN, "both": MOE | REVFFN}
MODELS |= {f"sparse {name}": model for name, model in MODELS.items()}
DEMOS = {
    # chunks of the divisors; the lengths are even, whose cosines are never zero: a sign of zero is a sign of rounding
    "faithful": {"faithful": True, "chunk": 8, "kept": 4, "beta": 0.9},
    # 40 rows make chunks of 14, of which the last is padded
    "updates": {"chunk": 16, "density": 0.1, "codec": "fp32", "beta": 0.9},
}


def config_of(model: str, demo: str) -> Config:
    shape = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_size": 40,
        "z_loss": 1e-3,
    }
    config = Config(
        model=ModelConfig(**shape | MODELS[model]),
        parallel={"sync": "demo", "demo": DEMOS[demo], "shard": 1},
        sparse={"mode": "s-ste" if model.startswith("sparse") else "none"},
    )
    config.run.compile, config.optimizer.weight_decay, config.precision.compute = False, 0.1, "fp64"
    return config


def batch(step: int, replica: int) -> Batch:
    """Two micro-batches of 64 tokens, which count upwards by one or two."""
    draw = torch.Generator().manual_seed(100 * step + replica)
    tokens = (
        torch.randint(0, 32, (2, 4, 1), generator=draw)
        + torch.randint(1, 3, (2, 4, 17), generator=draw).cumsum(-1)
    ) % 32
    return Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})


def run(model: str, demo: str) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """By step: loss, then parameters and balance biases of this replica."""
    cpu, config = torch.device("cpu"), config_of(model, demo)
    state, seen = Trainee.build(config, cpu, build_mesh(cpu, REPLICAS, 1)), []
    for step in range(STEPS):
        state.sparsity.begin(step, watched=False)
        loss = train_step(state, batch(step, dist.get_rank()), LR).loss.item()
        values = {n: t for n, t in state.model.state_dict().items() if not n.endswith("beta")}
        seen.append((loss, {n: t.detach().clone() for n, t in values.items()}))
    return seen


class Reference:
    """The same from the equations, one process: a model, and by replica what waits and the squares of AdamW."""

    def __init__(self, model: str, demo: str):
        self.config, self.demo, self.steps = config_of(model, demo), DEMOS[demo], 0
        self.model = Transformer(self.config.model).double()
        init_model(self.model, self.config.model, self.config.run.seed)
        self.p = {n: p.data for n, p in self.model.named_parameters()}
        sparse = [n for n in self.p if model.startswith("sparse") and re.search(r"ffn\..*w[123]", n)]
        self.betas = {
            n: float(self.p[n].ravel() @ s / (s @ s)) for n in sparse for s in [soft(self.p[n]).ravel()]
        }
        zeros = [{n: torch.zeros_like(t) for n, t in self.p.items()} for _ in range(REPLICAS)]
        self.delta, self.squares, self.dense = (
            zeros,
            [dict(z) for z in zeros],
            (dict(zeros[0]), dict(zeros[0])),
        )

    def gradients(self, batches: list[Batch]) -> tuple[float, list[dict]]:
        """The loss of all, and of each replica its clipped gradient: the mean over its own tokens."""
        total, found, tokens = 0.0, [], sum(b.targets.numel() for b in batches)
        stored = functools.partial(run_reversible, stored=True)
        dense = {n: self.p[n].clone() for n in self.betas}
        for n, beta in self.betas.items():  # the gradient of what multiplies is taken for the weight's
            self.p[n].copy_(beta * soft(self.p[n]))
        for own in batches:
            self.model.zero_grad()
            scale = torch.tensor(1 / own.targets.numel(), dtype=torch.float64)
            for inputs, targets in zip(own.inputs, own.targets, strict=True):
                with mock.patch.object(transformer, "run_reversible", stored):
                    sums = self.model(inputs, targets, loss_scale=scale)
                ((sums.nll + self.config.model.z_loss * sums.z) * scale).backward()
                total += sums.nll.item() / tokens
            g = {n: p.grad for n, p in self.model.named_parameters()}
            norm = math.sqrt(sum(t.square().sum().item() for t in g.values()))
            shrink = min(1.0, self.config.optimizer.grad_clip / (norm + 1e-6))
            found.append({n: t * shrink for n, t in g.items()})
        for n, w in dense.items():
            self.p[n].copy_(w)
        return total, found

    def step(self, batches: list[Batch]) -> float:
        loss, gradients = self.gradients(batches)
        self.steps += 1
        self.apply(gradients)
        return loss

    @torch.no_grad()
    def apply(self, gradients: list[dict]) -> None:
        for name, p in self.p.items():
            own = [g[name] for g in gradients]
            decay = 1 - LR * 0.1 if p.ndim > 1 and name != "embed.weight" else 1.0
            if self.demo.get("faithful"):  # which decays all that it moves
                p.copy_((1 - LR * 0.1) * p - LR * self.exchanged(name, [LR * g for g in own]).sign())
            elif p.ndim > 1:
                p.copy_(
                    decay * p + self.exchanged(name, [self.update(r, name, g) for r, g in enumerate(own)])
                )
            else:
                p.sub_(LR * self.dense_update(name, sum(own) / REPLICAS))
        for layer in self.model.layers:
            if self.config.model.ffn == "moe":
                error = (layer.ffn.load.double().mean() - layer.ffn.load).sign()
                layer.ffn.router.balance_bias += 0.05 * (error - error.mean())
                layer.ffn.load.zero_()

    def update(self, replica: int, name: str, g: torch.Tensor) -> torch.Tensor:
        """AdamW's without a first moment."""
        v = self.squares[replica][name] = 0.95 * self.squares[replica][name] + 0.05 * g.square()
        return -LR * g / ((v / (1 - 0.95**self.steps)).sqrt() + 1e-8)

    def dense_update(self, name: str, g: torch.Tensor) -> torch.Tensor:
        """AdamW's of a vector, from the mean gradient."""
        first, second = self.dense
        first[name] = 0.9 * first[name] + 0.1 * g
        second[name] = 0.95 * second[name] + 0.05 * g.square()
        root = (second[name] / (1 - 0.95**self.steps)).sqrt()
        return first[name] / (1 - 0.9**self.steps) / (root + 1e-8)

    def exchanged(self, name: str, added: list[torch.Tensor]) -> torch.Tensor:
        """Adds to what waits in each replica, sends the largest out of it, and returns the decoded mean."""
        faithful, shape = self.demo.get("faithful"), added[0].shape
        plain = not faithful and name in ("embed.weight", "head.weight")
        out = torch.zeros(shape, dtype=torch.float64)
        for r, more in enumerate(added):
            self.delta[r][name] = self.demo["beta"] * self.delta[r][name] + more
        matrices = [self.delta[r][name].reshape(views(shape, plain)) for r in range(REPLICAS)]
        for i in range(len(matrices[0])):  # an expert's matrix each
            rows, cols = matrices[0][i].shape
            h, w = (length(n, self.demo["chunk"], faithful) for n in (rows, cols))
            if plain:
                h, w = 1, length(cols, self.demo["chunk"] ** 2, False)
            for top in range(0, rows, h):
                for left in range(0, cols, w):
                    here = i, slice(top, top + h), slice(left, left + w)
                    mean = self.exchanged_chunk([m[here] for m in matrices], h, w, plain)
                    out.view_as(matrices[0])[here] = mean
        return out

    def exchanged_chunk(self, own: list[torch.Tensor], h: int, w: int, plain: bool) -> torch.Tensor:
        """Of one chunk, whose deltas `own` are changed in place."""
        down, across = (torch.eye(n, dtype=torch.float64) if plain else basis(n) for n in (h, w))
        kept = self.demo.get("kept") or round(self.demo["density"] * h * w)
        total, senders = torch.zeros(h * w, dtype=torch.float64), torch.zeros(h * w)
        rows, cols = own[0].shape
        for x in own:
            padded = torch.zeros(h, w, dtype=torch.float64)
            padded[:rows, :cols] = x
            y = (down @ padded @ across.T).flatten()
            values = [abs(v) for v in y.tolist()]
            places = sorted(range(h * w), key=values.__getitem__)[-kept:]
            assert values[places[0]] > 0  # else a choice among zeros
            sent = torch.zeros_like(y)
            sent[places] = y[places]
            x -= (down.T @ sent.view(h, w) @ across)[:rows, :cols]
            total += sent
            senders[places] += 1
        mean = total / (senders.clamp(min=1) if self.demo.get("faithful") else len(own))
        return (down.T @ mean.view(h, w) @ across)[:rows, :cols]


def soft(w: torch.Tensor) -> torch.Tensor:
    """Of each four neighbours the two largest, less the third of them in size."""
    fours = w.reshape(-1, 4)
    t = fours.abs().sort(-1).values[:, 1:2]
    return (fours.sign() * (fours.abs() - t).clamp(min=0)).reshape(w.shape)


def views(shape: torch.Size, plain: bool) -> tuple[int, int, int]:
    """(matrices, rows, columns); what is not transformed is one row."""
    if plain or len(shape) == 1:
        return 1, 1, shape.numel()
    return shape[:-2].numel(), *shape[-2:]


def length(size: int, limit: int, divisors: bool) -> int:
    """The largest divisor, or the shortest length that needs as few chunks as `limit` does."""
    if divisors:
        return max(d for d in range(1, limit + 1) if size % d == 0)
    return math.ceil(size / math.ceil(size / limit))


@functools.cache
def basis(size: int) -> torch.Tensor:
    """Row k: sqrt(2 / size) cos(pi (2 n + 1) k / (2 size)), the first one over sqrt(2)."""
    rows = [
        [
            math.sqrt((2 if k else 1) / size) * math.cos(math.pi * (2 * n + 1) * k / (2 * size))
            for n in range(size)
        ]
        for k in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "demo"),
    [
        ("moe", "updates"),
        ("revffn", "updates"),
        *(pytest.param(model, "faithful", marks=pytest.mark.e2e) for model in ("moe", "revffn", "both")),
        *(pytest.param(model, "updates", marks=pytest.mark.e2e) for model in list(MODELS)[2:]),
    ],
)
def test_demo_is_a_plain_loop_over_replicas(pool, model, demo):
    ranks, reference = pool.run(REPLICAS, run, model, demo), Reference(model, demo)
    assert ranks[0][-1][0] < ranks[0][0][0] - 0.05
    assert len(reference.betas) == model.startswith("sparse") * 2 * (
        6 if model.endswith(("moe", "both")) else 3
    )
    for step in range(STEPS):
        loss = reference.step([batch(step, replica) for replica in range(REPLICAS)])
        expected = reference.model.state_dict()
        for seen in ranks:
            assert seen[step][0] == pytest.approx(loss, rel=1e-12)
            assert seen[step][1].keys() == expected.keys()
            for name, mine in seen[step][1].items():
                assert (mine - expected[name]).abs().max() < 1e-12, (step, name)
    if not model.endswith("revffn"):
        biases = [seen[step][1]["layers.1.ffn.router.balance_bias"] for step in range(STEPS)]
        assert torch.stack(biases).abs().max() > 0.05


MIXTURE = ["model.ffn=moe", "model.ffn_size=24", "model.moe.experts=6", "model.moe.bias_rate=0.05"]
REVERSIBLE = ["model.blocks=revffn", "model.hidden_size=48", "model.ffn_size=48"]
RUNS = {
    "moe": [*MIXTURE, "model.hidden_size=40", "model.head_dim=12"],
    "revffn": REVERSIBLE,
    "both": [*REVERSIBLE, *MIXTURE],
    "sparse": ["sparse.mode=s-ste", "model.hidden_size=48", "model.ffn_size=64"],
}
SYNCS = {
    "diloco": ["parallel.sync=diloco", "parallel.diloco.every=3", "parallel.diloco.fragments=2"],
    "demo": ["parallel.sync=demo", "parallel.demo.density=1", "parallel.demo.codec=fp32"],
    "random_k": ["parallel.sync=random_k", "parallel.random_k.density=1", "parallel.random_k.codec=fp32"],
}


@pytest.mark.e2e
@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("model", RUNS)
def test_shards_in_a_replica_change_nothing(train, tiny_config, tmp_path, column, model, sync):
    """Two replicas of one rank and two of two, 20 steps in float64; DeMo and random-k send all, so that it does not
    matter where shards are cut."""
    options = [*RUNS[model], *SYNCS[sync], "precision.compute=fp64", "parallel.check_replicas_every=7"]
    whole = train(2, tiny_config, tmp_path / "whole", "parallel.shard=1", *options)
    shards = train(4, tiny_config, tmp_path / "shards", "parallel.shard=2", *options)
    assert len(column(whole)) == 20
    assert column(whole)[-1] < column(whole)[0] - 0.3
    for key in ("loss", "grad_norm"):
        assert (column(shards, key) / column(whole, key) - 1).abs().max() < 1e-10
    assert [r.get("expert_load") for r in shards] == [r.get("expert_load") for r in whole]
    assert all(("expert_load" in r) == (model in ("moe", "both")) for r in whole if "loss" in r)
