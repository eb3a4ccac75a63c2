"""Validation bits per byte after the same seconds of training: the quickstart against a plain `transformers` loop.

Both get the same corpus (this Python's standard library without its tests), the same split and tokenizer, the
same two cores and --seconds of training. The plain loop is a 1.4M-parameter LlamaForCausalLM at sequence 256 in
one process with two threads, AdamW, warm-up and linear decay over the time, with a learning rate tuned by hand on
the `tune` split (docs/LAB.md). The quickstart is configs/quickstart.yaml under torchrun on two processes; its
tokens are set from short calibration runs, and it is trained anew with fewer where they took longer; its seconds of
training, compilation and first step included, are reported. Neither has been tuned on the validation split.

    python benchmarks/quickstart_quality.py [--seconds 150] [--json]
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from stepline.models.flops import parameter_counts
from stepline.trainer.config_io import read_run_config
from stepline.trainer.quickstart import corpus_arguments, launcher
from stepline.trainer.watch.metrics import read_metrics

WORK = Path("runs/quality")
DATA = WORK / "data"
CALIBRATION = 300  # steps: this machine's speed changes from second to second
PLAIN_LR, PLAIN_BATCH, PLAIN_SEQ = 2e-3, 8, 256


def plain_loop(seconds: float, lr: float, split: str) -> dict:
    """transformers, AdamW, linear warm-up over 5 % of the time, then linear to zero."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stepline.trainer.data.dataset import load_meta
    from stepline.trainer.data.held_out import ValidationLoader
    from stepline.trainer.data.loader import TrainLoader

    torch.manual_seed(0)
    torch.set_num_threads(2)
    vocab = load_meta(DATA).vocab_size
    shape = {"vocab_size": vocab, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "max_position_embeddings": PLAIN_SEQ}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="sdpa"))
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    options = {"seq_len": PLAIN_SEQ, "micro_batch": PLAIN_BATCH}
    loader = TrainLoader([(DATA, 1.0)], batch_windows=PLAIN_BATCH, seed=0, **options)
    start, steps = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / seconds) < 1:
        batch = next(loader)
        logits = model(batch.inputs[0]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets[0].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, done / 0.05, (1 - done) / 0.95)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    trained = time.perf_counter() - start
    loader.close()
    held_out, nll = ValidationLoader(DATA, split, **options), 0.0
    with torch.no_grad():
        for batch in held_out:
            for x, y in zip(batch.inputs, batch.targets):
                logits = model(x).logits.flatten(0, 1)
                nll += torch.nn.functional.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": nll / math.log(2) / held_out.num_bytes,
        "seconds": round(trained, 1),
        "tokens": steps * PLAIN_BATCH * PLAIN_SEQ,
    }


def train(folder: Path, *overrides: str) -> dict:
    """The quickstart's launch; returns outcome.json."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [*launcher(), "-m", "stepline.trainer", "train", "quickstart", f"run.folder={folder}"]
    quiet = ["logging.wandb=off", "logging.eval_every=0", "logging.every=20"]
    subprocess.run([*command, f"data.path={DATA}", *quiet, *overrides], check=True, stderr=subprocess.DEVNULL)
    return json.loads((folder / "outcome.json").read_text())


def ask(*command: str) -> dict:
    """The JSON object that a command of the program prints."""
    command = [sys.executable, "-m", "stepline.trainer", *command, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def calibrate(batch_tokens: int, overrides: list[str]) -> tuple[float, float]:
    """Tokens/s at this batch, and the seconds of a run that are not its steps."""
    steps = [f"budget.batch_tokens={batch_tokens}", f"budget.steps={CALIBRATION}", "budget.tokens=null"]
    seconds = train(WORK / "calibration", *overrides, *steps)["train_seconds"]
    rows = [row for row in read_metrics(WORK / "calibration" / "metrics.jsonl") if row["step"] > 60]
    rate = statistics.harmonic_mean(row["tokens_per_second"] for row in rows if "loss" in row)
    return rate, seconds - CALIBRATION * batch_tokens / rate


def stepline_run(seconds: float, split: str, overrides: list[str]) -> dict:
    """The quickstart's config for as many tokens as `seconds` hold; its law picks learning rate and batch from them."""
    budget: list[str] = []
    for _ in range(2):  # the batch follows from the tokens, and the rate from the batch
        planned = ask("plan", "quickstart", f"data.path={DATA}", *overrides, *budget, "--world-size", "2")
        rate, start_up = calibrate(planned["batch_tokens"], overrides)
        tokens = int((0.95 * seconds - start_up) * rate)
        budget = [f"budget.tokens={tokens}"]
    outcome = train(WORK / "run", *overrides, *budget)
    while (took := outcome["train_seconds"]) > seconds:  # fewer tokens, whatever the loss
        tokens = int(0.97 * tokens * seconds / took)
        outcome = train(WORK / "run", *overrides, f"budget.tokens={tokens}")
    config = read_run_config(WORK / "run")
    return {
        "params": parameter_counts(config.model).total,
        "bits_per_byte": ask("eval", str(WORK / "run"), "--data", str(DATA), "--split", split)[
            "val_bits_per_byte"
        ],
        "seconds": outcome["train_seconds"],
        "tokens": config.total_steps() * config.budget.batch_tokens,
        "lr": config.optimizer.lr,
        "batch_tokens": config.budget.batch_tokens,
    }


def main() -> None:
    """Runs both, one after the other, and prints them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument(
        "--split", default="val", choices=["val", "tune"], help="tune: for choosing learning rates"
    )
    parser.add_argument("--plain-lr", type=float, default=PLAIN_LR)
    parser.add_argument("--only", choices=["plain", "stepline"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the quickstart's config, for tuning")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if not (DATA / "meta.json").is_file():
        command = [
            sys.executable,
            "-m",
            "stepline.trainer",
            "prepare",
            *corpus_arguments(),
            "--output",
            str(DATA),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = {}
    if args.only != "stepline":
        results["transformers"] = plain_loop(args.seconds, args.plain_lr, args.split)
    if args.only != "plain":
        results["stepline"] = stepline_run(args.seconds, args.split, args.overrides)
    if len(results) == 2:
        results["lower_by"] = results["transformers"]["bits_per_byte"] - results["stepline"]["bits_per_byte"]
    if args.json:
        print(json.dumps(results | {"python": platform.python_version(), "split": args.split}))
        return
    for name, value in results.items():
        print(f"{name:14} {value}")


if __name__ == "__main__":
    main()
