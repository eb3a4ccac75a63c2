"""DeMo's replicas in one process, float64 and plain loops, written from the equations; read by tests with runpy."""

import functools
import math

import torch

from stepline.comm.demo import DeMoSettings

# Rows that four ranks cannot divide, and fewer of them than ranks; `rows` is not transformed.
SHAPES = {
    "square": (8, 12),
    "odd": (7, 10),
    "stack": (2, 6, 5),
    "one": (1, 6),
    "rows": (11, 5),
    "vector": (9,),
}
DECAYED = {"square", "stack", "rows"}
STEPS, DECAY = 4, 0.1


def rate(step: int) -> float:
    """Another in each step: what holds it inside, and what is multiplied by it late, differ."""
    return 0.01 * (1 + step / 4)


def draw(step: int, replica: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * replica + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def start(name: str) -> torch.Tensor:
    return draw(999, 0, name)


def bf16(x: float) -> float:
    """The nearest number of eight significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def as_sent(values: list[float], codec: str) -> list[float]:
    """What receivers read of a chunk's values."""
    if codec == "int8":
        scale = bf16(max(map(abs, values)) / 127)
        return [max(-127, min(127, round(v / scale))) * scale for v in values]
    if codec == "sign":
        scale = bf16(sum(map(abs, values)) / len(values))
        return [-scale if v < 0 else scale for v in values]
    return values


@functools.cache
def cosine(size: int, n: int, k: int) -> float:
    scale = math.sqrt((1 if k == 0 else 2) / size)
    return scale * math.cos(math.pi * (2 * n + 1) * k / (2 * size))


def dct(x: list[list[float]]) -> list[float]:
    h, w = len(x), len(x[0])
    return [
        sum(cosine(h, n, k) * x[n][m] * cosine(w, m, j) for n in range(h) for m in range(w))
        for k in range(h)
        for j in range(w)
    ]


def inverse(y: list[float], h: int, w: int) -> list[list[float]]:
    sent = [(k, v) for k, v in enumerate(y) if v]
    return [
        [sum(cosine(h, n, k // w) * v * cosine(w, m, k % w) for k, v in sent) for m in range(w)]
        for n in range(h)
    ]


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Muon's update of a matrix: five times X <- a X + b X X^T X + c (X X^T)^2 X from G / |G|, .2 sqrt(longer side)."""
    x = g / max(math.sqrt(g.square().sum()), 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return 0.2 * math.sqrt(max(g.shape)) * x


class Reference:
    """All replicas of one shard. rows: its part of a tensor; chunks are cut from it."""

    def __init__(self, replicas: int, settings: dict, rows=lambda t: t):
        self.replicas, self.settings, self.rows = replicas, DeMoSettings(**settings), rows
        self.p = {name: rows(start(name)) for name in SHAPES}
        self.delta = [{n: torch.zeros_like(t) for n, t in self.p.items()} for _ in range(replicas)]
        self.sent: list[dict] = [{} for _ in range(replicas)]
        self.owners, self.owed = replicas > self.settings.owner_reduce_above, {}
        self.late = []
        self.ahead: list[dict] = [{} for _ in range(replicas)]
        """What a replica that looks ahead adds to the parameters until the next step: what it has sent, decoded."""

    def published(self, name: str) -> bool:
        """Whether momentum of gradients waits, not updates."""
        s = self.settings
        return s.faithful or (s.accumulate == "gradients" and name not in ("rows", "vector"))

    def step(self, step: int, landed: dict) -> None:
        """landed: the indices that owners chose, by which ties are broken."""
        s, arrived = self.settings, {}
        for name in SHAPES:
            gradients = [self.rows(draw(step, r, name)) for r in range(self.replicas)]
            if name == "vector" and not s.faithful:
                arrived[name] = self.dense_mean([g.tolist() for g in gradients])
                continue
            gain = -rate(step)
            if self.published(name):
                gain = rate(step) if s.version == 1 else 1 - s.beta
            for delta, g in zip(self.delta, gradients, strict=True):
                delta[name] = s.beta * delta[name] + gain * g
            before = [delta[name].clone() for delta in self.delta]
            arrived[name] = self.exchanged(name, landed.get(name))
            for ahead, delta, whole in zip(self.ahead, self.delta, before, strict=True):
                ahead[name] = whole - delta[name]
        self.late.append(arrived)
        if len(self.late) > s.delay:
            for name, update in self.late.pop(0).items():
                self.move(name, update, rate(step))

    def move(self, name: str, u: torch.Tensor, lr: float) -> None:
        s, p = self.settings, self.p[name]
        if name == "vector" and not s.faithful:
            self.p[name] = p - lr * (u + DECAY * p)
            return
        if self.published(name):
            if s.phi == "muon":
                u = -lr * torch.stack([orthogonal(m) for m in u.view(-1, *u.shape[-2:])]).view_as(u)
            elif s.phi == "sign":
                u = -lr * u.sign()
            else:
                u = -u if s.version == 1 else -lr * u
        self.p[name] = p - (lr * DECAY * p if name in DECAYED else 0) + u

    def dense_mean(self, gradients: list[list[float]]) -> torch.Tensor:
        """As bf16 but for codec fp32; the owners' mean again."""
        rounded = (lambda x: x) if self.settings.codec == "fp32" else bf16
        mean = [sum(map(rounded, of_all)) / self.replicas for of_all in zip(*gradients, strict=True)]
        return torch.tensor([rounded(x) for x in mean] if self.owners else mean, dtype=torch.float64)

    def sides(self, name: str, rows: int, cols: int) -> tuple[int, int]:
        """Of a chunk: the largest divisors, or the shortest length that cuts the side into as few as the limit does."""
        limit = self.settings.chunk
        if self.settings.faithful:
            return tuple(max(d for d in range(1, limit + 1) if max(n, 1) % d == 0) for n in (rows, cols))
        if name == "rows":  # as many whole rows as in the fewest chunks; here a row fits
            row = SHAPES[name][1]
            count = max(cols // row, 1)
            return 1, row * math.ceil(count / math.ceil(count / (limit**2 // row)))
        return tuple(math.ceil(max(n, 1) / math.ceil(max(n, 1) / limit)) for n in (rows, cols))

    def exchanged(self, name: str, landed: list | None) -> torch.Tensor:
        """The decoded mean of what is sent of all deltas, which leaves them."""
        s, shape = self.settings, self.p[name].shape
        flat = len(shape) == 1 or (name == "rows" and not s.faithful)
        view = (1, 1, shape.numel()) if flat else (shape[:-2].numel(), *shape[-2:])
        (h, w), out = self.sides(name, *view[1:]), torch.zeros(view, dtype=torch.float64)
        corners = [
            (m, top, left)
            for m in range(view[0])
            for top in range(0, view[1], h)
            for left in range(0, view[2], w)
        ]
        for replica in self.sent:
            replica[name] = []
        for number, (m, top, left) in enumerate(corners):
            here = m, slice(top, top + h), slice(left, left + w)
            own = [delta[name].view(view)[here] for delta in self.delta]
            mean = self.mean(name, own, h, w)
            if self.owners:
                mean = self.reduced((name, number), mean, landed[number])
            out[here] = self.decoded(name, mean, h, w)[: own[0].shape[0], : own[0].shape[1]]
        return out.view(shape)

    def kept(self, elements: int) -> int:
        return min(elements, self.settings.kept or max(1, round(self.settings.density * elements)))

    def mean(self, name: str, own: list[torch.Tensor], h: int, w: int) -> list[float]:
        """Of what the replicas send of a chunk, over those who sent an index or over all."""
        s, total, senders = self.settings, [0.0] * (h * w), [0] * (h * w)
        alpha = s.alpha if self.published(name) and s.version == 2 else 1.0
        for replica, x in zip(self.sent, own, strict=True):
            rows, cols = x.shape
            padded = [row + [0.0] * (w - cols) for row in x.tolist()] + [[0.0] * w] * (h - rows)
            y = padded[0] if name == "rows" and not s.faithful else dct(padded)
            places = sorted(range(h * w), key=lambda i, y=y: -abs(y[i]))[: self.kept(h * w)]
            sent = dict(zip(places, as_sent([y[i] for i in places], s.codec), strict=True))
            replica[name].append(sent)
            x -= alpha * self.decoded(name, [sent.get(i, 0.0) for i in range(h * w)], h, w)[:rows, :cols]
            for i, v in sent.items():
                total[i] += v
                senders[i] += 1
        if self.published(name):
            return [v / max(1, n) for v, n in zip(total, senders, strict=True)]
        return [v / self.replicas for v in total]

    def reduced(self, chunk: tuple, mean: list[float], places: list[int]) -> list[float]:
        """What its owner sends on; what it cuts off is added to the next mean."""
        owed = self.owed[chunk] = [
            a + b for a, b in zip(self.owed.get(chunk, [0.0] * len(mean)), mean, strict=True)
        ]
        left = [abs(v) for i, v in enumerate(owed) if i not in places]
        assert len(set(places)) == len(places) == self.kept(len(owed))
        assert (
            min(abs(owed[i]) for i in places) > max(left, default=0.0) - 1e-12
        )  # signs of one chunk are all alike
        sent = [0.0] * len(owed)
        for i, v in zip(places, as_sent([owed[i] for i in places], self.settings.codec), strict=True):
            sent[i] = v
            owed[i] -= v
        return sent

    def decoded(self, name: str, y: list[float], h: int, w: int) -> torch.Tensor:
        plain = name == "rows" and not self.settings.faithful
        return torch.tensor([y] if plain else inverse(y, h, w), dtype=torch.float64)
