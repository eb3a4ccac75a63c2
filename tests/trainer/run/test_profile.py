"""What a profiled run records on a GPU, with torch's recorders held by the test."""

import json

import pytest
import torch

from stepline.trainer.config import Config
from stepline.trainer.run.profile import profiler


@pytest.fixture
def calls(monkeypatch):
    """Of the recorder of CUDA's memory."""
    made = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda *a, **k: made.append(("record", a, k)))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: made.append(("dump", path)))
    return made


def run(folder, steps: int, device: str = "cuda", fails: bool = False) -> None:
    config = Config(model=SHAPE)
    config.run.profile = True
    with profiler(config, folder, 0, torch.device(device)) as profile:
        for _ in range(steps):
            torch.ones(3).cumsum(0)
            profile.step()
        if fails:
            raise RuntimeError("a step failed")


SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 32}


def test_memory_is_recorded_up_to_the_last_traced_step(tmp_path, calls):
    run(tmp_path, 20)
    begun, dumped, *ended = calls
    assert begun == ("record", (), {"stacks": "python", "max_entries": 200_000})
    assert dumped == ("dump", str(tmp_path / "profile" / "rank-0-memory.pickle"))
    assert set(map(repr, ended)) == {repr(("record", (), {"enabled": None}))}
    events = json.loads((tmp_path / "profile" / "rank-0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::cumsum" for event in events) == 4


def test_a_run_that_fails_before_records_no_more(tmp_path, calls):
    with pytest.raises(RuntimeError, match="a step failed"):
        run(tmp_path, 2, fails=True)
    assert calls[-1] == ("record", (), {"enabled": None})
    assert not any(call[0] == "dump" for call in calls)


def test_a_cpu_has_no_memory_snapshot(tmp_path, calls):
    run(tmp_path, 20, "cpu")
    assert calls == []
    assert (tmp_path / "profile" / "rank-0.json").is_file()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("folder", "File exists"), ("trace", "cannot open it"), ("memory", "Is a directory")],
)
def test_a_profile_that_cannot_be_written_costs_no_training(
    tmp_path, monkeypatch, caplog, calls, broken, reason
):
    target = tmp_path / "profile"

    def dump(path: str) -> None:
        calls.append(("dump", path))
        if broken == "memory":
            raise IsADirectoryError(21, "Is a directory", path)

    def export(_, path: str) -> None:
        if broken == "trace":
            raise RuntimeError("cannot open it\nand more")

    if broken == "folder":
        target.write_text("a file")
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    run(tmp_path, 20)
    said = [record.message for record in caplog.records if record.name == "stepline"]
    assert said == [f"the profile in {target} cannot be written ({reason}); training goes on without it"]
    assert any(call[0] == "dump" for call in calls) == (broken == "memory")
    assert calls[-1:] == ([] if broken == "folder" else [("record", (), {"enabled": None})])
