"""The model card of an export: what the model is, how it was trained, on what, and what came out."""

import json
from pathlib import Path
from typing import Any

from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.watch.metrics import iter_metrics


def model_card(
    run: Path, config: Config, state: dict[str, Any], *, kind: str, remote: bool, begin_id: int | None
) -> str:
    """README.md of the exported folder.

    Args:
        run: the run's folder: its plan.json and metrics.jsonl are read where they are there.
        state: state.json of the exported checkpoint.
        kind: the architecture.
        remote: whether the folder holds the modelling code.
        begin_id: the token that begins a text, where the tokenizer is in the folder.
    """
    counts = parameter_counts(config.model)
    step, tokens = state.get("step", 0), state.get("tokens", 0)
    rows = [
        ("architecture", kind),
        ("parameters", f"{counts.total:,} ({counts.linear:,} in linear layers)"),
        ("trained", f"{step:,} steps, {tokens:,} tokens"),
        ("context", f"{config.data.seq_len:,} tokens"),
        *_plan_rows(run / "plan.json"),
        *[("data fingerprint", f"`{fingerprint}`") for fingerprint in state.get("fingerprints", [])],
        *_result_rows(run / "metrics.jsonl", step),
    ]
    if config.model.ffn == "moe" and config.model.moe.capacity is not None:
        rows.append(
            ("capacity", f"{config.model.moe.capacity:g} in training; this folder's model drops no token")
        )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [stepline]",
        "---",
        "",
        f"# {config.run.folder.name if config.run.folder else run.name}",
        "",
        "A base model, pre-trained with Stepline.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Use",
        "",
        *_usage(remote, begin_id, step > 0, config.data.confine_attention),
    ]
    return "\n".join(lines) + "\n"


def _usage(remote: bool, begin_id: int | None, trained: bool, confined: bool) -> list[str]:
    code = ", trust_remote_code=True" if remote else ""
    lines = []
    if remote:
        lines += [
            "No stock architecture of transformers computes this model: its code is in `modeling_stepline.py` and "
            "beside it, for inference.", "",
        ]  # fmt: skip
    lines += [
        "```python",
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{code})',
    ]
    if begin_id is not None:
        first, why = (
            f"{begin_id}, *",
            "a text begins where another ends: this token stood before every document in training",
        )
        if not trained:
            why = "as this model's texts begin"
        elif confined:
            first, why = "*", "nothing stood before a document in training (data.confine_attention)"
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("."{code})',
            f"# {why}",
            f'ids = [{first}tokenizer("Once", add_special_tokens=False).input_ids]',
            "print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=40)[0]))",
        ]
    return [*lines, "```"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _plan_rows(path: Path) -> list[tuple[str, str]]:
    """What plan.json says of the run, in words."""
    plan = _read(path)
    rows = []
    if "params" in plan and "tokens" in plan:
        rows.append(("plan", f"N {plan['params']:.4g}, D {plan['tokens']:.4g}"))
    if "lr" in plan:
        rows.append(
            (
                "hyperparameters",
                f"lr {plan['lr']:.4g}, weight decay {plan['weight_decay']:.4g}, batch "
                f"{plan['batch_tokens']:,} tokens, {plan['steps']:,} steps",
            )
        )
    if expected := plan.get("expected_final_loss"):
        rows.append(("expected validation loss", f"{expected['loss']:.4f}"))
    return rows


def _result_rows(path: Path, step: int) -> list[tuple[str, str]]:
    """The last validation up to `step`."""
    found = [
        row
        for row in (iter_metrics(path) if path.is_file() else [])
        if "val_loss" in row and row["step"] <= step
    ]
    if not found:
        return [("validation", "none")]
    last = found[-1]
    if last["val_loss"] is None:
        return [("validation", f"not finite, at step {last['step']:,}")]
    bits = f", {last['val_bits_per_byte']:.4f} bits per byte" if "val_bits_per_byte" in last else ""
    on = f", on {last['val_tokens']:,} tokens" if "val_tokens" in last else ""
    return [("validation", f"loss {last['val_loss']:.4f} nats per token{bits}{on}, at step {last['step']:,}")]
