"""Tokens per second of one training step on this machine's CPUs, against `transformers`.

Both sides have the same weights, batch and dtype (fp32) and do the same: forward, loss, backward, clipping of
the global norm to 1, AdamW. Theirs is LlamaForCausalLM (sdpa) with `torch.optim.AdamW` as it comes; ours is
Stepline's model and step. The variants take turns, a few steps each, in one process, and the medians are
compared; every median is of the same number of steps.

    python benchmarks/cpu_step.py [--shape small] [--rounds 15] [--threads 2] [--no-compile] [--json]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

from stepline.models.config import ModelConfig
from stepline.models.flops import parameter_counts
from stepline.models.hf import hf_config_dict, to_hf_state
from stepline.models.init import init_model
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

# name: (shape, sequence, sequences in a batch)
SHAPES = {
    "small": (
        ModelConfig(
            vocab_size=4096, hidden_size=192, num_layers=6, num_heads=6, ffn_size=512, tied_embeddings=True
        ),
        256,
        8,
    ),
    "medium": (
        ModelConfig(
            vocab_size=8192, hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, ffn_size=1280
        ),
        512,
        4,
    ),
}
LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1
Step = Callable[[torch.Tensor], torch.Tensor]


def ours(config: ModelConfig, compiled: bool) -> Step:
    """The trainer's own step: accumulation, clipping, guard and fused AdamW, blocks compiled where asked."""
    run = Config(model=config)
    run.precision.compute, run.run.compile = "fp32", compiled
    run.optimizer.beta1, run.optimizer.beta2 = BETAS
    run.optimizer.weight_decay = WEIGHT_DECAY
    state = Trainee.build(run, torch.device("cpu"), mesh=None)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[None, :, :-1].contiguous(), tokens[None, :, 1:].contiguous()
        return train_step(state, Batch(inputs, targets, None, {}), LR).loss

    return step


def theirs(config: ModelConfig, seq_len: int, compiled: bool) -> Step:
    """The same weights in LlamaForCausalLM, with torch's defaults."""
    import transformers

    source = Transformer(config)
    init_model(source, config, seed=0)
    shape = transformers.LlamaConfig(**hf_config_dict(config, seq_len), attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(shape).train()
    model.load_state_dict(to_hf_state(source.state_dict()), strict=False)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        loss = forward(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(name: str, rounds: int, steps: int, compile_too: bool) -> dict:
    """Medians of each variant's step, in seconds; one row of the table."""
    config, seq_len, batch = SHAPES[name]
    variants = {"theirs": theirs(config, seq_len, False), "ours": ours(config, False)}
    if compile_too:
        variants |= {
            "theirs compiled": theirs(config, seq_len, True),
            "ours compiled": ours(config, True),
        }
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, config.vocab_size, (rounds * steps, batch, seq_len + 1), generator=generator)
    warm = {key: [step(batches[0]).item() for _ in range(3)] for key, step in variants.items()}
    seconds = {key: [] for key in variants}
    for turn in range(rounds):
        for key, step in variants.items():
            for tokens in batches[turn * steps : (turn + 1) * steps]:
                start = time.perf_counter()
                step(tokens)
                seconds[key].append(time.perf_counter() - start)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    tokens = batch * seq_len
    row = {
        "shape": name,
        "params": parameter_counts(config).total,
        "seq_len": seq_len,
        "batch": batch,
        "tokens_per_second": {key: round(tokens / value) for key, value in median.items()},
        "ratio": round(median["theirs"] / median["ours"], 3),
        # the same weights, batch and step: the losses agree
        "loss_difference": max(abs(a - b) for a, b in zip(warm["ours"], warm["theirs"], strict=True)),
    }
    if compile_too:
        row["ratio_compiled"] = round(median["theirs"] / median["ours compiled"], 3)
        row["ratio_both_compiled"] = round(median["theirs compiled"] / median["ours compiled"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import transformers

    rows = [measure(s, args.rounds, args.steps, not args.no_compile) for s in args.shape or SHAPES]
    result = {
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    if args.json:
        json.dump(result, sys.stdout)
        return
    print(f"torch {result['torch']}, transformers {result['transformers']}, {args.threads} threads")
    for row in rows:
        print(f"{row['shape']}: {row['params'] / 1e6:.2f}M parameters, sequence {row['seq_len']}")
        for key, value in row["tokens_per_second"].items():
            print(f"  {key:16} {value:8,} tokens/s")
        for key in ("ratio", "ratio_compiled", "ratio_both_compiled", "loss_difference"):
            if key in row:
                print(f"  {key:20} {row[key]:.3g}")


if __name__ == "__main__":
    main()
