import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepline.trainer.data.dataset import TokenSplit
from stepline.trainer.data.held_out import ValidationLoader
from stepline.trainer.data.loader import IGNORE, Batch, TrainLoader
from stepline.trainer.errors import UserError

SEQ = 4
any_order = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def numbered(windows: int, first: int = 0) -> list[int]:
    """A shard of unique tokens with exactly `windows` windows of SEQ + 1 tokens, and a rest in none."""
    return list(range(first, first + windows * SEQ + 1 + SEQ // 2))


def rows(batch: Batch) -> list[tuple[int, ...]]:
    """The windows of a batch, [SEQ + 1] tokens each, without padding."""
    found = []
    for x, y in zip(batch.inputs.flatten(0, 1).tolist(), batch.targets.flatten(0, 1).tolist()):
        if y[0] != IGNORE:
            assert x[1:] == y[:-1]
            found.append((*x, y[-1]))
        else:
            assert set(y) == {IGNORE}
    return found


def take(path: Path, world_size: int, steps: int, state: dict | None = None, **options) -> tuple[list, dict]:
    """Windows of `steps` global batches in rank order, and the state after them."""
    loaders = [
        TrainLoader(
            options.get("sources", [(path, 1.0)]),
            rank=rank,
            world_size=world_size,
            **{
                "seq_len": SEQ,
                "micro_batch": 2,
                "prefetch": 0,
                **{k: v for k, v in options.items() if k != "sources"},
            },
        )
        for rank in range(world_size)
    ]
    found = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    for _ in range(steps):
        batches = [next(loader) for loader in loaders]
        assert len({(b.inputs.shape, b.targets.shape, json.dumps(b.state)) for b in batches}) == 1
        assert {b.valid for b in batches} == {sum(int((b.targets != IGNORE).sum()) for b in batches)}
        found += [window for batch in batches for window in rows(batch)]
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    return found, states[0]


@any_order
@given(
    shards=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    world_size=st.integers(1, 5),
    batch=st.integers(1, 9),
    micro=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_each_window_once_per_epoch_for_any_world_size(
    tmp_path_factory, write_data, shards: list[int], world_size: int, batch: int, micro: int, seed: int
) -> None:
    firsts = np.cumsum([0, *[windows * SEQ + 1 + SEQ // 2 for windows in shards]]).tolist()
    data = [numbered(windows, first) for windows, first in zip(shards, firsts)]
    path = write_data(tmp_path_factory.mktemp("d") / "x", {"train": data}, eod_id=(1 << 20) - 1)
    expected = {
        tuple(shard[i * SEQ : i * SEQ + SEQ + 1])
        for shard, windows in zip(data, shards)
        for i in range(windows)
    }
    n = sum(shards)
    steps = -(-3 * n // batch)
    options = {"batch_windows": batch, "micro_batch": micro, "seed": seed}
    found, state = take(path, world_size, steps, **options)
    assert len(found) == steps * batch
    for epoch in range(3):
        assert Counter(found[epoch * n : (epoch + 1) * n]) == Counter(expected)
    alone, alone_state = take(path, 1, steps, **{**options, "micro_batch": 1})
    assert found == alone
    assert state == alone_state


@any_order
@given(
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batches=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    steps=st.integers(0, 9),
    weights=st.sampled_from([[1.0], [1.0, 3.0], [0.2, 0.5, 0.3]]),
)
def test_resume_at_another_world_size_reads_exactly_the_rest(
    tmp_path_factory, write_data, worlds, batches, steps: int, weights: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("d")
    sources = [
        (write_data(folder / str(i), {"train": [numbered(5 + 3 * i, 1000 * i)]}, fingerprint=str(i)), weight)
        for i, weight in enumerate(weights)
    ]
    whole, _ = take(folder, 1, 9, sources=sources, batch_windows=14)
    first, state = take(folder, worlds[0], steps, sources=sources, batch_windows=batches[0])
    second, _ = take(folder, worlds[1], 9, state, sources=sources, batch_windows=batches[1], micro_batch=3)
    assert first + second == whole[: len(first) + len(second)]


def test_mixture_follows_the_weights_and_each_source_keeps_its_epochs(tmp_path, write_data) -> None:
    sizes, weights = (50, 7, 23), (5.0, 2.0, 3.0)
    sources = [
        (write_data(tmp_path / str(i), {"train": [numbered(n, 10_000 * i)]}), w)
        for i, (n, w) in enumerate(zip(sizes, weights))
    ]
    loader = TrainLoader(sources, seq_len=SEQ, batch_windows=100, micro_batch=100, prefetch=0)
    found = [window for _ in range(200) for window in rows(next(loader))]
    for i, (n, weight) in enumerate(zip(sizes, weights)):
        mine = [window for window in found if window[0] // 10_000 == i]
        assert len(mine) / len(found) == pytest.approx(weight / 10, abs=0.012)
        assert loader.epochs[i] == len(mine) / n
        for epoch in range(len(mine) // n):
            assert len(set(mine[epoch * n : (epoch + 1) * n])) == n
    assert loader.num_windows == list(sizes)


def test_order_depends_on_the_seed_and_epoch_and_is_shuffled(tmp_path, write_data) -> None:
    path = write_data(tmp_path / "x", {"train": [numbered(500)]})
    orders = [[w[0] // SEQ for w in take(path, 1, 20, batch_windows=50, seed=seed)[0]] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    epochs = [orders[0][:500], orders[0][500:], orders[2][:500], list(range(500))]
    for a, b in itertools.combinations(epochs, 2):
        assert sum(x == y for x, y in zip(a, b)) < 10


def test_padding_shapes_when_the_batch_does_not_divide(tmp_path, write_data) -> None:
    path = write_data(tmp_path / "x", {"train": [numbered(50)]})
    per_rank = []
    for rank in range(3):
        loader = TrainLoader(
            [(path, 1.0)], seq_len=SEQ, batch_windows=7, micro_batch=2, rank=rank, world_size=3
        )
        batch = next(loader)
        loader.close()
        assert batch.inputs.shape == batch.targets.shape == (2, 2, SEQ)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.doc_ids is None
        assert int(batch.inputs.max()) < 1 << 20
        per_rank.append(len(rows(batch)))
    assert sorted(per_rank) == [2, 2, 3]


def test_documents_within_a_window(tmp_path, write_data) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 401).tolist()
    path = write_data(tmp_path / "x", {"train": [tokens]}, vocab_size=5)
    loader = TrainLoader(
        [(path, 1.0)], seq_len=20, batch_windows=10, micro_batch=5, confine_attention=True, prefetch=0
    )
    batch = next(loader)
    assert batch.doc_ids.dtype == torch.int32
    for x, ids in zip(batch.inputs.flatten(0, 1).tolist(), batch.doc_ids.flatten(0, 1).tolist()):
        assert ids == [sum(token == 2 for token in x[:j]) for j in range(20)]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_state_counts_consumed_batches_only(tmp_path, write_data, prefetch: int) -> None:
    path = write_data(tmp_path / "x", {"train": [numbered(30)]})
    options = {"seq_len": SEQ, "batch_windows": 4, "micro_batch": 4, "prefetch": prefetch}
    loader = TrainLoader([(path, 1.0)], **options)
    assert loader.state_dict()["sample"] == 0
    batches = [next(loader) for _ in range(5)]
    assert [batch.state["sample"] for batch in batches] == [4, 8, 12, 16, 20]
    assert loader.state_dict() == batches[-1].state
    assert loader.epochs == [20 / 30]
    following = [rows(next(loader)) for _ in range(3)]
    for state, between in ((batches[-1].state, 0), (batches[1].state, 3)):
        loader.load_state_dict(state)
        again = [rows(next(loader)) for _ in range(between + 3)]
        assert again[between:] == following
    loader.close()


def test_thread_hands_over_its_exception_and_close_joins_it(tmp_path, write_data, monkeypatch) -> None:
    path = write_data(tmp_path / "x", {"train": [numbered(30)]})
    before = threading.active_count()
    loader = TrainLoader([(path, 1.0)], seq_len=SEQ, batch_windows=4, micro_batch=4)
    next(loader)
    loader.close()
    assert threading.active_count() == before
    assert loader.state_dict()["sample"] == 4

    calls = []
    original = TokenSplit.gather

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk went away")
        return original(self, *args)

    monkeypatch.setattr(TokenSplit, "gather", failing)
    assert next(loader).state["sample"] == 8
    assert next(loader).state["sample"] == 12
    with pytest.raises(OSError, match="the disk went away"):
        next(loader)
    assert threading.active_count() == before
    assert next(loader).state["sample"] == 16
    loader.close()


def test_mistakes_are_one_sentence(tmp_path, write_data) -> None:
    good = write_data(tmp_path / "a", {"train": [numbered(3)]})
    short = write_data(tmp_path / "b", {"train": [[1, 3, 5]]})
    other = write_data(tmp_path / "c", {"train": [numbered(3)]}, tokenizer="u")
    changed = write_data(tmp_path / "d", {"train": [numbered(3)]}, fingerprint="g")

    def load(*sources, **options):
        return TrainLoader(sources, **{"seq_len": SEQ, "batch_windows": 1, "micro_batch": 1, **options})

    for words, sources in (
        ("at least one data folder", ()),
        ("weight 0", ((good, 0),)),
        ("fewer than seq_len 4", ((good, 1), (short, 1))),
        ("different tokenizers", ((good, 1), (other, 1))),
        ("no prepared data folder", ((tmp_path, 1),)),
    ):
        with pytest.raises(UserError, match=words):
            load(*sources)
    state = load((good, 1)).state_dict()
    for words, loader in (
        ("seed", load((good, 1), seed=3)),
        ("seq_len", load((good, 1), seq_len=3)),
        ("sources", load((changed, 1))),
    ):
        with pytest.raises(UserError, match=f"data's {words} changed since the checkpoint"):
            loader.load_state_dict(state)


@any_order
@given(
    shards=st.lists(st.integers(1, 40), min_size=1, max_size=3).filter(lambda s: sum(s) > 1),
    seq=st.integers(1, 9),
    micro=st.integers(1, 4),
    world_size=st.integers(1, 5),
    after_eod=st.booleans(),
)
def test_validation_covers_every_token_once(
    tmp_path_factory, write_data, shards: list[int], seq: int, micro: int, world_size: int, after_eod: bool
) -> None:
    tokens = list(range(10, 10 + sum(shards)))
    cuts = np.cumsum(shards)[:-1].tolist()
    data = [part.tolist() for part in np.split(np.array(tokens), cuts)]
    path = write_data(tmp_path_factory.mktemp("d") / "x", {"val": data}, num_bytes=777)
    targets, inputs, lengths = [], [], set()
    for rank in range(world_size):
        loader = ValidationLoader(
            path, seq_len=seq, micro_batch=micro, rank=rank, world_size=world_size, after_eod=after_eod
        )
        batches = list(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.inputs.shape == (1, micro, seq)
            valid = batch.targets != IGNORE
            targets += batch.targets[valid].tolist()
            inputs += batch.inputs[valid].tolist()
    read = [loader.tokens.eod_id, *tokens] if after_eod else tokens
    assert (inputs, targets) == (read[:-1], read[1:])
    assert len(lengths) == 1
    assert (loader.num_targets, loader.num_bytes) == (len(read) - 1, 777)


def test_validation_of_some_windows_is_evenly_spaced_and_prorated(tmp_path, write_data) -> None:
    path = write_data(tmp_path / "x", {"val": [list(range(1001))]}, num_bytes=5000)
    loader = ValidationLoader(path, seq_len=10, micro_batch=3, max_windows=7)
    firsts = [x[0] for b in loader for x, y in zip(b.inputs[0].tolist(), b.targets[0].tolist()) if y[0] > 0]
    assert firsts == [i * 100 // 7 * 10 for i in range(7)]
    assert loader.num_targets == 70
    assert loader.num_bytes == 5000 * 70 / 1000
    everything = ValidationLoader(path, seq_len=10, micro_batch=3, max_windows=10**9)
    assert (everything.num_targets, everything.num_bytes) == (1000, 5000)


def test_validation_without_tokens(tmp_path, write_data) -> None:
    path = write_data(tmp_path / "x", {"val": []})
    with pytest.raises(UserError, match="no tokens in 'val' to evaluate"):
        ValidationLoader(path, seq_len=4, micro_batch=1)


@any_order
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 7), st.integers(0, 100))
def test_windows_and_reads_against_plain_slices(
    tmp_path_factory, write_data, lengths: list[int], seq: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shards = [rng.integers(0, 60_000, n).tolist() for n in lengths if n]
    path = write_data(tmp_path_factory.mktemp("d") / "x", {"train": shards}, vocab_size=60_000, eod_id=5)
    split = TokenSplit(path)
    plain = [s[i : i + seq + 1] for s in shards for i in range(0, len(s) - seq, seq)]
    assert split.num_windows(seq) == len(plain)
    order = rng.permutation(len(plain))
    assert split.gather(order, seq).tolist() == [plain[i] for i in order]
    flat = [token for shard in shards for token in shard]
    for start, length in ((0, 5), (3, 40), (len(flat) - 2 if len(flat) > 2 else 0, 9), (len(flat), 4)):
        assert split.read(start, length).tolist() == flat[start : start + length]
    assert split.document_ends().tolist() == [i + 1 for i, token in enumerate(flat) if token == 5]
    assert (split.num_tokens, split.num_documents) == (len(flat), flat.count(5))
