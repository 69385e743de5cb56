"""Checkpoints that follow each other on a disk that will not let the old ones go."""

import shutil
from pathlib import Path

import pytest
import torch

from mutor_img.checkpoints.folder import (
    checkpoint_at,
    find_checkpoint,
    leave_damaged,
    newest_intact,
    newest_of,
    read_meta,
    read_tensors,
    write_checkpoint,
)
from mutor_img.common.errors import UserError


def save(run_dir: Path, step: int) -> None:
    write_checkpoint(run_dir, step, {"model": {"w": torch.full((2,), float(step))}}, {}, keep=1)


def shown(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def test_old_checkpoints_that_cannot_be_removed_stop_no_save_and_go_with_a_later_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints" / ".step_00000002.part" / "of_a_kill").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError(16, "busy", str(path))))
        for step in (1, 2, 3):
            save(tmp_path, step)
            assert find_checkpoint(tmp_path).name == f"step_0000000{step}"
    warnings = capsys.readouterr().err.splitlines()
    assert warnings and len(set(warnings)) == len(warnings) and all("cannot be removed (busy)" in w for w in warnings)
    assert [name for name in shown(tmp_path) if not name.startswith(".")] == ["step_00000003"]
    save(tmp_path, 4)
    assert shown(tmp_path) == ["step_00000004"]


def test_a_damaged_checkpoint_that_cannot_be_removed_gives_up_its_name(tmp_path, monkeypatch):
    save(tmp_path, 1)
    (find_checkpoint(tmp_path) / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError(16, "busy", str(path))))
        save(tmp_path, 1)
    assert read_tensors(find_checkpoint(tmp_path), "model")["w"].tolist() == [1, 1]


def test_milestones_are_never_pruned_and_count_among_the_newest(tmp_path):
    for step in range(1, 8):
        write_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(1)}}, {}, keep=2, milestones=[2, 4, 7])
    assert shown(tmp_path) == [f"step_{step:08d}" for step in (2, 4, 6, 7)]


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.json"])
def test_of_a_damaged_checkpoint_the_newest_intact_one_is_named_and_taken_when_asked_for(tmp_path, capsys, file):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, {"model": {"w": torch.full((2,), float(step))}}, {}, keep=3)
    damaged = find_checkpoint(tmp_path) / file
    content = bytearray(damaged.read_bytes())
    content[-12] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=rf"step_00000003/{file}: damaged.*/step_00000002: .* --fallback"):
        read_tensors(find_checkpoint(tmp_path), "model")
    intact = checkpoint_at(tmp_path, 2)
    assert newest_of(tmp_path, fallback=True) == str(intact) and leave_damaged(tmp_path) == intact
    assert "step_00000003: damaged, now called damaged_step_00000003" in capsys.readouterr().out
    assert read_tensors(find_checkpoint(tmp_path), "model")["w"].tolist() == [2, 2]
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_0000000{step}" / "model.safetensors").unlink()
    assert newest_intact(tmp_path) is None
    with pytest.raises(UserError, match="none of its checkpoints is intact"):
        leave_damaged(tmp_path)


def test_what_leads_outside_of_a_checkpoint_is_no_file_of_it(tmp_path):
    save(tmp_path, 1)
    path = find_checkpoint(tmp_path) / "checkpoint.json"
    path.write_text(path.read_text().replace('"model.saf', '"../model.saf').replace('"seal"', '"was"'))
    with pytest.raises(UserError, match="it lacks the step, or sizes and hashes of files"):
        read_meta(path.parent)
