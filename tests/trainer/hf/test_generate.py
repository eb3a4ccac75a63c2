"""Greedy continuations are those of transformers on the exported folder, token by token."""

import pytest
import torch
import yaml

from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.tokenizer import load_tokenizer
from stepline.trainer.hf.export import export_run
from stepline.trainer.run.generate import generate_text, sample
from stepline.trainer.run.infer import load_run

MOE = {"ffn": "moe", "moe": {"experts": 6, "top_k": 2}}
KINDS = {
    "LlamaForCausalLM": {"tied_embeddings": True, "rope_scaling": {"original_context": 24, "factor": 4}},
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 24},
    "Qwen3MoeForCausalLM": {"qk_norm": True, **MOE},
    "MixtralForCausalLM": MOE,
    "SteplineForCausalLM": {"ffn": "moe", "moe": {"experts": 6, "score": "sigmoid", "shared_size": 16}},
    "SteplineForCausalLM, canon": {"canon": "AC"},
    "SteplineForCausalLM, reversible": {"blocks": "revffn", "qk_norm": True},
    "SteplineForCausalLM, reversible, own queries": {"blocks": "revffn", "coupling": "revffn"},
    "SteplineForCausalLM, reversible mixture": {"blocks": "revffn", "revffn": {"adapters": True}, **MOE},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens(make_run, tokens, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    run, _ = make_run(**KINDS[kind])
    assert export_run(run, tmp_path / "hf").architecture == kind.split(",")[0]
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, trust_remote_code=kind.startswith("Stepline")
    ).eval()
    prompt = tokens[:1, :10]
    greedy = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)[0, 10:].tolist()
    assert len(set(expected)) > 8  # no loop over a few tokens, which would hide an error of a position
    options = {"max_tokens": 48, "context": 64, "eod_id": -1, "vocab_size": 331, "temperature": 0}
    assert list(sample(load_run(run)[0], prompt[0].tolist(), **options)) == expected


@torch.no_grad()
def test_greedy_text(make_run, data, tmp_path):
    """From text to text: prompt, tokenizer and end of document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = make_run(qk_norm=True)
    export_run(run, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = "alice sends nine stones"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    pieces = list(generate_text(run, prompt, max_tokens=32, temperature=0))
    assert pieces[0] == prompt
    assert len(pieces) > 10  # piece by piece
    text = load_tokenizer(data).decode(out[0, ids.shape[1] :].tolist())
    assert "".join(pieces) == prompt + text.replace(
        "\ufffd", ""
    )  # the bytes of a random model make no characters


def test_text_goes_on_behind_a_prompt_with_its_space(make_run, texts, tmp_path):
    """By a tokenizer that drops the first space of what it decodes, as Llama's does."""
    import sentencepiece as spm

    spm.SentencePieceTrainer.train(
        input=str(texts / "000.txt"), model_prefix=str(tmp_path / "llama"), model_type="bpe", vocab_size=310,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    data = tmp_path / "data"
    prepare([texts], data, tokenizer=tmp_path / "llama.model", workers=1, val_share=0.02, progress=False)
    run, _ = make_run()
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["data"]["path"] = str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    tokenizer, prompt = load_tokenizer(data), "alice sends"
    asked = [tokenizer.eod_id, *tokenizer.encode(prompt)]
    options = {
        "context": 64,
        "eod_id": tokenizer.eod_id,
        "vocab_size": tokenizer.vocab_size,
        "temperature": 0.8,
    }
    spaced = 0
    for seed in range(8):
        new = list(sample(load_run(run)[0], asked, max_tokens=12, seed=seed, **options))
        whole = tokenizer.decode([*asked, *new]).replace("\ufffd", "")
        text = "".join(generate_text(run, prompt, max_tokens=12, temperature=0.8, seed=seed))
        assert text.replace("\ufffd", "") == whole
        spaced += text.startswith(prompt + " ")
    assert spaced
