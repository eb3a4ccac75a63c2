"""bf16, dense FP8 with one scale for each operand and with scales of rows, and 2:4 sparse FP8 on one GPU: forward and
backward of an FFN and of a block, and a whole step.

NOT YET RUN ON A GPU (targets on an H200, 8B shape: FFN at least 1.1 times as fast as dense FP8 with cuSPARSELt 0.8.1,
1.03 with 0.8.0, and 1.6 times as fast as bf16; a dense FP8 step 1.25 times as fast as a bf16 step).

FFN and block: weights of one layer, gathered beforehand, as FSDP2 leaves them; the cast of weights, once a step, is in
the whole step alone, which goes through the trainer's own (`gpu_step.py`). "chosen" makes each product by what is
faster here, "sparse" makes all forward products sparse.

    python benchmarks/sparse_step.py [--models 1b 8b] [--tokens 8192 16384] [--numbers bf16 fp8 …] [--no-block]
                                     [--no-step] [--layers-8b N] [--json]

--json: one object of all that is measured so far after each model's, tokens' and numbers' times.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from children import call, emit, last_object, reason
from sparse_kernels import versions
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
    """Milliseconds of a forward, and of a forward and a backward, which adds nothing to earlier gradients."""
    x = inputs[0].requires_grad_()
    compiled = torch.compile(module)
    grad = torch.randn_like(compiled(x, *inputs[1:]))
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return {
        "forward": time_ms(lambda: compiled(x, *inputs[1:])),
        "both": time_ms(
            lambda: torch.autograd.grad(compiled(x, *inputs[1:]), wanted, grad, allow_unused=True)
        ),
    }


def layers(model: str, tokens: int, numbers: list[str], block: bool) -> Iterator[tuple[str, dict]]:
    """By numbers: times of the FFN and of the block."""
    for name in numbers:
        torch._dynamo.reset()
        config, made = one_block(model, tokens, NUMBERS[name])
        seq = config.data.seq_len
        x = torch.randn(tokens // seq, seq, config.model.hidden_size, device="cuda", dtype=torch.bfloat16)
        found = {"ffn": passes_ms(made.layers[0].ffn, x.clone())}
        if block:
            found["block"] = passes_ms(made.layers[0], x.clone(), *others(made, tokens // seq, seq))
        del made
        torch.cuda.empty_cache()
        yield name, found


def others(made: Transformer, windows: int, seq: int) -> tuple:
    """What a block takes beside the stream: rotary tables, masks."""
    captured: list[tuple] = []
    handle = made.layers[0].register_forward_pre_hook(lambda _, inputs: captured.append(inputs))
    with torch.no_grad():
        made(torch.zeros(windows, seq, device="cuda", dtype=torch.int64))
    handle.remove()
    return captured[0][1:]


def steps(model: str, numbers: list[str], layers_8b: int | None) -> Iterator[tuple[str, dict]]:
    """By numbers: the best row of gpu_step.py, in a process of its own."""
    cut = [f"model.num_layers={layers_8b}"] if model == "8b" and layers_8b else []
    for name in numbers:
        command = [sys.executable, str(Path(__file__).with_name("gpu_step.py")), "--shape", model, "--json"]
        options = [*NUMBERS[name], *cut]
        command += ["--set", *options] if options else []
        done = call(command)
        rows = last_object(done.stdout).get("rows", [])
        rates = [row["tokens_per_second"] for row in rows if "error" not in row]
        errors = [row["error"] for row in rows if "error" in row]
        why = reason(done.stderr) if done.code or not errors else errors[0]
        yield name, {"tokens_per_second": max(rates)} if rates else {"error": why}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["1b", "8b"], default=["1b", "8b"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[8192, 16384])
    parser.add_argument("--numbers", nargs="+", choices=NUMBERS, default=list(NUMBERS))
    parser.add_argument("--no-block", action="store_true", help="the FFN alone")
    parser.add_argument("--no-step", action="store_true")
    parser.add_argument("--layers-8b", type=int, help="of the 8B model's whole step")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if (missing := sparse_mm.missing(device)) is not None:
        sys.exit(f"error: 2:4 sparse FP8 products need a GPU of Hopper's kind, and {missing}")
    start_process_group(World(0, 1, 0, 1), device, 600)
    result = versions() | {"layers": [], "steps": []}
    say, tell = ((lambda *_: None), emit) if args.json else (print, lambda _: None)
    say(f"{result['device']}, torch {result['torch']}, cuSPARSELt {result['cusparselt']}")
    say("| model | tokens | part | " + " | ".join(f"{name}, ms" for name in args.numbers) + " |")
    say("|---|---|---|" + "---|" * len(args.numbers))
    for model in args.models:
        for tokens in args.tokens:
            found: dict = {"model": model, "tokens": tokens}
            result["layers"].append(found)
            for name, times in layers(model, tokens, args.numbers, not args.no_block):
                found[name] = times
                tell(result)
            for part in ("ffn",) if args.no_block else ("ffn", "block"):
                for what in ("forward", "both"):
                    said = " | ".join(f"{found[name][part][what]:.3f}" for name in args.numbers)
                    say(f"| {model} | {tokens} | {part}, {what} | {said} |")
    torch.distributed.destroy_process_group()
    for model in [] if args.no_step else args.models:
        found = {"model": model}
        result["steps"].append(found)
        for name, row in steps(model, args.numbers, args.layers_8b):
            found[name] = row
            tell(result)
            say(f"{model}, whole step, {name}: {row}")


if __name__ == "__main__":
    main()
