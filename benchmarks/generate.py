"""Tokens per second of greedy generation on this machine's CPUs, with and without the cache of keys and values.

The same model, prompt and draws; without the cache every token reads the whole text anew, with transformers it is the
exported model's own `generate`. The variants take turns in one process; medians.

    python benchmarks/generate.py [--tokens 256] [--rounds 3] [--threads 2]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepline.models.config import ModelConfig
from stepline.models.hf import hf_config_dict, to_hf_state
from stepline.models.init import init_model
from stepline.models.transformer import Transformer
from stepline.trainer.run.generate import sample

SHAPE = ModelConfig(
    vocab_size=4096, hidden_size=256, num_layers=8, num_heads=8, num_kv_heads=4, ffn_size=768, init_std=0.1
)
MOE = {"ffn": "moe", "moe": SHAPE.moe.model_copy(update={"experts": 8, "top_k": 2}), "ffn_size": 384}
PROMPT = 32


@torch.no_grad()
def anew(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def cached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """As `stepline generate` does."""
    more = {"context": len(prompt) + count, "eod_id": -1, "vocab_size": model.config.vocab_size}
    return list(sample(model, prompt, max_tokens=count, temperature=0, **more))


def theirs(model: Transformer) -> Callable[[Transformer, list[int], int], list[int]]:
    """transformers on the same weights."""
    llama = LlamaForCausalLM(LlamaConfig(**hf_config_dict(model.config, 4096))).eval()
    llama.load_state_dict(to_hf_state(model.state_dict()))

    def run(_: Transformer, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        return llama.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    return run


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    prompt = torch.randint(
        0, SHAPE.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    for name, changed in {"dense": {}, "revffn": {"blocks": "revffn"}, "moe": MOE}.items():
        model = Transformer(config := SHAPE.model_copy(update=changed)).eval()
        init_model(model, config, seed=0)
        variants = {"cached": cached, "without": anew} | (
            {"transformers": theirs(model)} if not changed else {}
        )
        expected = cached(model, prompt, asked.tokens)
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(asked.rounds):
            for variant, run in variants.items():
                begun = time.perf_counter()
                agreed = sum(a == b for a, b in zip(run(model, prompt, asked.tokens), expected, strict=True))
                seconds[variant].append(time.perf_counter() - begun)
                # streams on a grid: a last bit of another order of sums may be a step of 2^-14
                assert agreed == asked.tokens or config.blocks == "revffn", (name, variant, agreed)
        rates = {variant: asked.tokens / statistics.median(times) for variant, times in seconds.items()}
        print(
            name, "  ".join(f"{variant} {rate:,.1f} tokens/s" for variant, rate in rates.items()), flush=True
        )


if __name__ == "__main__":
    main()
