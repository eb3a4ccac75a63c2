"""What DeMo's encoding and decoding cost beside the step that they belong to, on one replica and one thread or GPU.

    python benchmarks/demo_codec.py [--config dense-1b] [--rounds 15] [key=value ...]

A step is a forward, a backward and the update with DeMo by its defaults, without network. Encode: from what waits to
packets, the cut of what is sent included, the optimizer's own update not. Decode: from packets to updates in place.
Rounds alternate; medians. On a CPU it is the thread's own time, which other programs disturb less than the clock.
Without --config the model is that of benchmarks/slow_link.py, 3.4M parameters, 2,048 tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from slow_link import TIMED

from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import accumulate


def settled(name: str | None, overrides: list[str]) -> Config:
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
    values += [] if name else [*small, "model.tied_embeddings=false"]
    config, _ = load_config(name or "quickstart", [*values, *overrides])
    if config.parallel.micro_batch == "auto":
        config.parallel.micro_batch = 1
    if config.precision.compute == "auto":
        config.precision.compute = "bf16" if torch.cuda.is_available() else "fp32"
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


def one_round(trainee: Trainee, batch: Batch, lr: float, cuda: bool) -> tuple[float, float, float, float]:
    """Seconds of forward and backward, the optimizer's update, encode, decode."""
    demo, inner = trainee.synchronizer, []
    accumulate_updates = demo.waiting.accumulate
    demo.zero_grad()
    passes, _ = timed(lambda: accumulate(trainee.model, batch, trainee.device, 0.0), cuda)
    demo.waiting.accumulate = lambda lr: inner.append(timed(lambda: accumulate_updates(lr), cuda)[0])
    encode, packets = timed(lambda: demo._encode(lr), cuda)
    demo.waiting.accumulate = accumulate_updates
    flight = demo.exchange.send(packets)
    decode, _ = timed(lambda: demo._apply(demo._arrived(flight), lr), cuda)
    return passes, inner[0], encode - inner[0], decode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    config = settled(options.config, options.overrides)
    trainee = Trainee.build(config, device, None)
    lr = config.optimizer.lr
    size = (1, config.parallel.micro_batch, config.data.seq_len)
    tokens = torch.randint(config.model.vocab_size, size)
    batch = Batch(inputs=tokens, targets=tokens, doc_ids=None, state=None)

    names = ("forward and backward", "update", "encode", "decode")
    rounds = [one_round(trainee, batch, lr, cuda) for _ in range(options.rounds + 2)][
        2:
    ]  # the first two warm up
    medians = {
        name: statistics.median(times) for name, times in zip(names, zip(*rounds, strict=True), strict=True)
    }
    step = sum(medians.values())
    where = torch.cuda.get_device_name() if cuda else "one CPU thread"
    print(f"{parameter_counts(config.model).total:,} parameters, {tokens.numel():,} tokens, {where}\n")
    print("| | ms | of the step |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value * 1e3:.1f} | {value / step:.1%} |")
    both = medians["encode"] + medians["decode"]
    print(f"| **encode and decode** | {both * 1e3:.1f} | **{both / step:.1%}** |")


if __name__ == "__main__":
    main()
