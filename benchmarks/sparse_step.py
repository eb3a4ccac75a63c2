"""bf16, dense FP8 with one scale for each operand and with scales of rows, and 2:4 sparse FP8 on one GPU: forward and
backward of an FFN and of a block, and a whole step.

NOT YET RUN ON A GPU (targets on an H200, 8B shape: FFN at least 1.1 times as fast as dense FP8 with cuSPARSELt 0.8.1,
1.03 with 0.8.0, and 1.6 times as fast as bf16; a dense FP8 step 1.25 times as fast as a bf16 step).

FFN and block: weights of one layer, gathered beforehand, as FSDP2 leaves them; the cast of weights, once a step, is in
the whole step alone, which goes through the trainer's own (`gpu_step.py`). "chosen" makes each product by what is
faster here, "sparse" makes all forward products sparse.

    python benchmarks/sparse_step.py [--models 1b 8b] [--tokens 8192 16384] [--no-step] [--json]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from stepline.comm.mesh import World, start_process_group
from stepline.kernels import sparse_mm
from stepline.models.sparse_linear import SparseLinear, convert
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import find_config, load_config
from stepline.trainer.run.build import recipes
from stepline.trainer.run.products import choose_products, time_ms

NUMBERS = {
    "bf16": [],
    "fp8": ["precision.fp8=true"],
    "fp8 by row": ["precision.fp8=true", "precision.fp8_scales=row"],
    "chosen": ["precision.fp8=true", "sparse.mode=s-ste"],
    "sparse": ["precision.fp8=true", "sparse.mode=s-ste", "sparse.force=true"],
}


def one_block(model: str, tokens: int, options: list[str]) -> tuple[Config, Transformer]:
    """The model's shape with one block, in bf16 on the GPU, its FP8 weights cast."""
    config = load_config(str(find_config(f"dense-{model}")), [*options, "model.num_layers=1"])[0]
    config.precision.compute, config.parallel.micro_batch = "bf16", tokens // config.data.seq_len
    device = torch.device("cuda", 0)
    with device:
        made = Transformer(config.model)
        convert(made, *recipes(config))
    made = made.to(torch.bfloat16)
    choose_products(config, made, device, torch.distributed.group.WORLD)
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, SparseLinear) and layer.recipe.fp8:
                if layer.recipe.sparse:
                    layer.beta.fill_(1.5)
                layer.gathered, layer.gathered_scale = layer.cast_weight()
    return config, made


def passes_ms(module: nn.Module, *inputs: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a forward, and of a forward and a backward."""
    x = inputs[0].requires_grad_()
    compiled = torch.compile(module)
    grad = torch.randn_like(compiled(x, *inputs[1:]))
    return {
        "forward": time_ms(lambda: compiled(x, *inputs[1:])),
        "both": time_ms(lambda: torch.autograd.backward(compiled(x, *inputs[1:]), grad)),
    }


def layers(model: str, tokens: int) -> dict[str, dict]:
    """By numbers: times of the FFN and of the block."""
    found = {}
    for name, options in NUMBERS.items():
        torch._dynamo.reset()
        config, made = one_block(model, tokens, options)
        seq = config.data.seq_len
        x = torch.randn(tokens // seq, seq, config.model.hidden_size, device="cuda", dtype=torch.bfloat16)
        captured: list[tuple] = []
        handle = made.layers[0].register_forward_pre_hook(
            lambda _, inputs, kept=captured: kept.append(inputs)
        )
        with torch.no_grad():
            made(torch.zeros(tokens // seq, seq, device="cuda", dtype=torch.int64))
        handle.remove()
        others = captured[0][1:]  # rotary tables, masks
        found[name] = {
            "ffn": passes_ms(made.layers[0].ffn, x.clone()),
            "block": passes_ms(made.layers[0], x.clone(), *others),
        }
        del made
        torch.cuda.empty_cache()
    return found


def steps(model: str) -> dict[str, dict]:
    """By numbers: a row of gpu_step.py, in a process of its own."""
    found = {}
    for name, options in NUMBERS.items():
        command = [sys.executable, str(Path(__file__).with_name("gpu_step.py")), "--shape", model, "--json"]
        command += ["--set", *options] if options else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = json.loads(done.stdout)["rows"] if done.returncode == 0 else []
        rates = [row["tokens_per_second"] for row in rows if "error" not in row]
        found[name] = (
            {"tokens_per_second": max(rates)} if rates else {"error": done.stderr[-300:] or str(rows)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["1b", "8b"], default=["1b", "8b"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[8192, 16384])
    parser.add_argument("--no-step", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if (reason := sparse_mm.missing(device)) is not None:
        sys.exit(f"error: 2:4 sparse FP8 products need a GPU of Hopper's kind, and {reason}")
    start_process_group(World(0, 1, 0, 1), device, 600)
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cusparselt": torch.backends.cusparselt.version(), "layers": [], "steps": [],
    }  # fmt: skip
    say = (lambda *_: None) if args.json else print
    say(f"{result['device']}, torch {result['torch']}, cuSPARSELt {result['cusparselt']}")
    say("| model | tokens | part | " + " | ".join(f"{name}, ms" for name in NUMBERS) + " | chosen / fp8 |")
    say("|---|---|---|" + "---|" * (len(NUMBERS) + 1))
    for model in args.models:
        for tokens in args.tokens:
            found = layers(model, tokens)
            result["layers"].append({"model": model, "tokens": tokens} | found)
            for part in ("ffn", "block"):
                for what in ("forward", "both"):
                    times = {name: found[name][part][what] for name in NUMBERS}
                    said = " | ".join(f"{ms:.3f}" for ms in times.values())
                    gain = times["fp8"] / times["chosen"]
                    say(f"| {model} | {tokens} | {part}, {what} | {said} | {gain:.2f} |")
    torch.distributed.destroy_process_group()
    for model in [] if args.no_step else args.models:
        found = steps(model)
        result["steps"].append({"model": model} | found)
        say(f"{model}, whole step: " + ", ".join(f"{name} {row}" for name, row in found.items()))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
