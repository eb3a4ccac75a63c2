"""Blocks of a checkpoint's tensors are the tensors themselves, whatever parts they were stored in."""

from pathlib import Path

import pytest
import torch

from stepline.trainer.errors import Unreadable, UserError
from stepline.trainer.hf.blocks import StoredTensors
from stepline.trainer.hf.export import export_run
from stepline.trainer.hf.importing import import_model
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.stored import load_tensors, stored_names


@pytest.mark.parametrize("most", [0, 1000, 2**30])
@pytest.mark.parametrize("imported", [False, True])  # parameters in one part, experts in one part each
def test_blocks_are_the_tensors(make_run, tmp_path, most, imported):
    run, model = make_run(ffn="moe", moe={"experts": 6})
    if imported:
        export_run(run, tmp_path / "hf")
        run = tmp_path / "back"
        import_model(tmp_path / "hf", run)
    stored = StoredTensors(complete_checkpoints(run)[-1])
    for name, parameter in model.named_parameters():
        seen = torch.full_like(parameter, torch.nan)
        for place, block in stored.blocks(f"model.{name}", tuple(parameter.shape), most):
            assert block.nbytes <= max(most, parameter[0].nbytes)
            assert seen[place].isnan().all()
            seen[place] = block
        assert torch.equal(seen, parameter), name


def test_other_shapes_and_damage(make_run):
    run, model = make_run()
    (checkpoint,) = complete_checkpoints(run)
    stored, shape = StoredTensors(checkpoint), tuple(model.embed.weight.shape)
    with pytest.raises(UserError, match=r"do not fit this model: model.embed.weight is"):
        list(stored.blocks("model.embed.weight", (1, *shape)))
    with pytest.raises(UserError, match="it has no such weight"):
        list(stored.blocks("model.other", shape))
    (file,) = checkpoint.glob("*.distcp")
    values = model.embed.weight.detach().numpy().tobytes()
    raw = file.read_bytes()
    at = raw.index(values) + 1000
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(UserError, match=r"is damaged.*model.embed.weight cannot be read"):
        list(stored.blocks("model.embed.weight", shape))
    (checkpoint / ".metadata").write_bytes(b"none")
    with pytest.raises(UserError, match="its metadata cannot be read"):
        StoredTensors(checkpoint)


@pytest.mark.parametrize("broken", [".metadata", ".distcp"])
def test_files_that_cannot_be_read_now_are_no_damage(make_run, monkeypatch, broken):
    run, model = make_run()
    (checkpoint,), honest = complete_checkpoints(run), Path.open

    def refused(path: Path, *arguments, **more):
        if path.name.endswith(broken):
            raise OSError(116, "Stale file handle", str(path))
        return honest(path, *arguments, **more)

    weights = {"model.embed.weight": torch.empty_like(model.embed.weight)}
    shape = tuple(weights["model.embed.weight"].shape)
    for read in (
        lambda: list(StoredTensors(checkpoint).blocks("model.embed.weight", shape)),
        lambda: load_tensors(checkpoint, weights),
        lambda: stored_names(checkpoint) if broken == ".metadata" else load_tensors(checkpoint, weights),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", refused)
            with pytest.raises(Unreadable) as caught:
                read()
        assert f"{broken} cannot be read (Stale file handle); mend that and start" in str(caught.value)
        assert str(caught.value).startswith(str(checkpoint))
    load_tensors(checkpoint, weights)
    assert torch.equal(weights["model.embed.weight"], model.embed.weight)
