"""`sample` against logits of whole sequences, computed anew for every token in float64."""

import itertools

import pytest
import torch

from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.sparse_linear import Recipe, convert
from stepline.models.transformer import Transformer
from stepline.trainer.errors import UserError
from stepline.trainer.run import generate
from stepline.trainer.run.generate import generate_text, sample, settle

CONFIG = ModelConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, ffn_size=48, init_std=0.3)
EOD = 2


def build() -> Transformer:
    model = Transformer(CONFIG).double()
    init_model(model, CONFIG, seed=0)
    return model.eval()


def ids(count: int) -> list[int]:
    return torch.randint(3, 61, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def likeliest(model: Transformer, tokens: list[int], doc_ids: list[int] | None = None) -> int:
    docs = None if doc_ids is None else torch.tensor([doc_ids])
    with torch.no_grad():
        return int(model(torch.tensor([tokens]), doc_ids=docs)[0, -1].argmax())


def greedy(model: Transformer, prompt: list[int], count: int, context: int, **more) -> list[int]:
    options = {"max_tokens": count, "context": context, "eod_id": -1, "vocab_size": 61, "temperature": 0}
    return list(sample(model, prompt, **options | more))


@pytest.mark.parametrize(("context", "length"), [(16, 5), (16, 16), (16, 40), (3, 2), (2, 5)])
def test_a_full_context_goes_on_from_its_last_half(context, length):
    model, prompt = build(), ids(length)
    window, expected = prompt[-context:], []
    for _ in range(40):
        if len(window) > context:
            window = window[-(context // 2) :]
        expected.append(likeliest(model, window))
        window.append(expected[-1])
    assert greedy(model, prompt, 40, context) == expected


def test_a_long_prompt_is_read_in_parts(monkeypatch):
    model, prompt = build(), ids(50)
    at_once = greedy(model, prompt, 20, 80)
    monkeypatch.setattr(generate, "READ_AT_ONCE", 7)
    assert greedy(model, prompt, 20, 80) == at_once


@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_confined_model_sees_its_document_alone(length):
    """As in training: positions begin again behind end-of-document, which the text does not see."""
    model, prompt = build(), [EOD, *ids(length)]
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(likeliest(model, tokens, [0] + [1] * (len(tokens) - 1)))
    expected = list(itertools.takewhile(lambda token: token != EOD, tokens[len(prompt) :]))
    assert greedy(model, prompt, 12, 64, confined=True, eod_id=EOD) == expected
    assert greedy(model, prompt, 12, 64, eod_id=EOD) != expected


def test_draws_follow_the_probabilities():
    """Of 4,000 first tokens at a temperature, within a mass of .7: their shares, to five standard deviations."""
    model, prompt, temperature, mass = build(), ids(6), 1.3, 0.7
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
    kept, total = [], 0.0
    for token in sorted(range(61), key=lambda t: -p[t]):
        if total < mass:
            kept.append(token)
            total += p[token].item()
    logits = model(torch.tensor([prompt]))[0, -1].detach().float()
    generator = torch.Generator().manual_seed(3)
    drawn = [generate.draw(logits, temperature, mass, generator) for _ in range(4000)]
    assert set(drawn) <= set(kept)
    for token in kept:
        share = p[token].item() / total
        assert abs(drawn.count(token) / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


def test_the_seed_decides():
    model, prompt = build(), ids(6)
    draw = {s: greedy(model, prompt, 20, 64, temperature=1.0, seed=s) for s in (0, 1)}
    assert draw[0] == greedy(model, prompt, 20, 64, temperature=1.0, seed=0)
    assert draw[0] != draw[1]


def test_it_stops_at_the_end_of_a_document_and_keeps_to_the_vocabulary():
    model, prompt = build(), ids(6)
    free = greedy(model, prompt, 20, 64)
    stop = free[7]
    assert greedy(model, prompt, 20, 64, eod_id=stop) == free[: free.index(stop)]
    below = max(free)
    assert max(greedy(model, prompt, 20, 64, vocab_size=below)) < below


@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_settled_weights_give_the_numbers_of_sparse_ones(ffn):
    config = CONFIG.model_copy(update={"ffn": ffn})
    model = Transformer(config)
    convert(model, Recipe(sparse=True), Recipe())
    init_model(model, config, seed=0)
    for name, buffer in model.named_buffers():
        if name.endswith("beta"):
            buffer.fill_(1.25)
    tokens = torch.tensor([ids(20)])
    with torch.no_grad():
        expected = model(tokens)
        settle(model)
        assert torch.equal(model(tokens), expected)
    weights = [p for n, p in model.named_parameters() if ".ffn." in n and "router" not in n]
    assert all((w == 0).double().mean() >= 0.5 for w in weights)


def test_a_prompt_that_is_no_text(tmp_path):
    with pytest.raises(UserError, match="--prompt is not valid UTF-8"):
        next(generate_text(tmp_path, "a\udcff"))


def test_a_tiny_temperature_takes_the_likeliest_and_damaged_weights_are_said():
    model, prompt = build(), ids(5)
    for temperature in (1e-40, 1e-300):
        assert greedy(model, prompt, 10, 32, temperature=temperature) == greedy(model, prompt, 10, 32)
    with torch.no_grad():
        model.embed.weight.fill_(torch.nan)
    for temperature in (0, 0.8):
        with pytest.raises(UserError, match="logits are not finite"):
            greedy(model, prompt, 1, 32, temperature=temperature)
