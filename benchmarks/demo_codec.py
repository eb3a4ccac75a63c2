"""What DeMo's encoding and decoding cost beside the step that they belong to, on one thread or one GPU.

NOT YET RUN ON A GPU (target there: 3 % of a step at 1.3B parameters).

    python benchmarks/demo_codec.py [--config dense-1b] [--tokens 65536] [--replicas 8] [--rounds 15] [--json]
                                    [key=value ...]

A step is a forward, a backward and the update with DeMo by its defaults, without network. Encode: from what waits to
packets, the cut of what is sent included, the optimizer's own update not. Decode: from the packets of all replicas (of
one: copies of its own stand for the others') to parameters in place. Rounds alternate; medians. On a CPU it is the
thread's own time, which other programs disturb less than the clock.
Without --config the model is that of benchmarks/slow_link.py, 3.4M parameters, 2,048 tokens, on a CPU; on a GPU it is
dense-1b with 65,536 tokens, compiled, in bf16 behind FSDP2 of one rank, by the kernels and by torch alone.
--json: one object after each round, with the medians so far.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from children import emit
from slow_link import TIMED

from stepline.comm.chunks import Chunks
from stepline.comm.demo import DeMo
from stepline.comm.exchange import Flight
from stepline.comm.mesh import World, build_mesh, start_process_group
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import accumulate


def settled(name: str | None, overrides: list[str], cuda: bool) -> Config:
    """The config, with values for what a law would decide: they cost the same time."""
    small = [
        "data.seq_len=256",
        "parallel.micro_batch=8",
        *(f"model.{key}={value}" for key, value in TIMED.items()),
    ]
    values = [
        "data.path=unused", "optimizer.lr=0.001", "optimizer.weight_decay=0.1", "optimizer.name=adamw",
        "budget.law=null", "budget.tokens=null", "budget.steps=1000", "parallel.sync=demo", "parallel.shard=1",
    ]  # fmt: skip
    values += [] if name else [*small, "model.tied_embeddings=false", "model.canon=none"]
    config, _ = load_config(name or "quickstart", [*values, *overrides])
    if config.parallel.micro_batch == "auto":
        config.parallel.micro_batch = 8 if cuda else 1
    if config.precision.compute == "auto":
        config.precision.compute = "bf16" if cuda else "fp32"
    config.run.compile = cuda
    return config


def timed(work: Callable[[], object], cuda: bool) -> tuple[float, object]:
    """Seconds, and what `work` returns."""
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    begun = clock()
    found = work()
    if cuda:
        torch.cuda.synchronize()
    return clock() - begun, found


def one_round(trainee: Trainee, batch: Batch, replicas: int, cuda: bool) -> tuple[float, float, float, float]:
    """Seconds of forward and backward, the optimizer's update, encode, decode."""
    demo, lr, inner = trainee.synchronizer, trainee.config.optimizer.lr, []
    accumulate_updates = demo.waiting.accumulate
    demo.zero_grad()
    passes, _ = timed(lambda: accumulate(trainee.model, batch, trainee.device, 0.0), cuda)
    demo.waiting.accumulate = lambda lr: inner.append(timed(lambda: accumulate_updates(lr), cuda)[0])
    encode, (_, packets) = timed(lambda: demo._encode(lr), cuda)
    demo.waiting.accumulate = accumulate_updates
    flight = Flight(packets[0].expand(replicas, -1).contiguous(), None)
    decode, _ = timed(lambda: demo._land(flight, lr), cuda)
    return passes, inner[0], encode - inner[0], decode


def by_torch_alone(demo: DeMo) -> None:
    """Takes the kernels from an encoder that has some."""
    chunks = Chunks(demo.batches, demo.settings.codec, demo.sample)
    demo.chunks = demo.exchange.chunks = chunks
    demo.form.packing = chunks.packing


def measure(
    trainee: Trainee, batch: Batch, replicas: int, rounds: int, cuda: bool
) -> Iterator[dict[str, float]]:
    """Milliseconds by name, medians so far after each round but two that warm up; `share`: of encode and decode in the
    step."""
    names = ("forward and backward", "update", "encode", "decode")
    seconds = []
    for turn in range(-2, rounds):
        found = one_round(trainee, batch, replicas, cuda)
        print(f"round {turn}: {sum(found):.2f} s", file=sys.stderr, flush=True)
        if turn >= 0:
            seconds.append(found)
            times = zip(names, zip(*seconds, strict=True), strict=True)
            row = {name: statistics.median(column) * 1e3 for name, column in times}
            yield row | {"share": (row["encode"] + row["decode"]) / sum(row.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config")
    parser.add_argument("--tokens", type=int, help="of a step: whole micro-batches of them")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    config = settled(options.config or ("dense-1b" if cuda else None), options.overrides, cuda)
    mesh = None
    if cuda:  # parameters in fp32, products in bf16
        start_process_group(World(0, 1, 0, 1), device, 600)
        mesh = build_mesh(device, 1, 1)
    trainee = Trainee.build(config, device, mesh)
    micro = config.parallel.micro_batch * config.data.seq_len
    wanted = options.tokens or (65_536 if cuda else micro)
    size = (max(1, wanted // micro), config.parallel.micro_batch, config.data.seq_len)
    tokens = torch.randint(config.model.vocab_size, size)
    batch = Batch(inputs=tokens, targets=tokens, doc_ids=None, state=None)

    found = {
        "parameters": parameter_counts(config.model).total,
        "tokens": tokens.numel(),
        "replicas": options.replicas,
        "device": torch.cuda.get_device_name() if cuda else "one CPU thread",
        "torch": torch.__version__,
        "milliseconds": {},
    }

    def by(path: str) -> None:
        for row in measure(trainee, batch, options.replicas, options.rounds, cuda):
            found["milliseconds"][path] = row
            if options.json:
                emit(found)

    if trainee.synchronizer.chunks.kernels is not None:
        by("kernels")
        by_torch_alone(trainee.synchronizer)
    by("torch")
    if cuda:
        torch.distributed.destroy_process_group()
    if not options.json:
        print(table(found))


def table(found: dict) -> str:
    """Markdown."""
    lines = [
        f"{found['parameters']:,} parameters, {found['tokens']:,} tokens, packets of {found['replicas']}, "
        f"{found['device']}, torch {found['torch']}"
    ]
    for path, row in found["milliseconds"].items():
        times = {name: value for name, value in row.items() if name != "share"}
        step = sum(times.values())
        lines += [f"\n| by {path} | ms | of the step |\n|---|---|---|"]
        lines += [f"| {name} | {value:.1f} | {value / step:.1%} |" for name, value in times.items()]
        lines += [
            f"| **encode and decode** | {times['encode'] + times['decode']:.1f} | **{row['share']:.1%}** |"
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
