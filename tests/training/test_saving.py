"""Processes that save together: each writes its rows and reads nothing, and any number of them goes on from there."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from launching import join, launch, train_small
from safetensors import safe_open
from test_parallel import RUN, curve, saved

from mutor_img import convert, load_checkpoint
from mutor_img.checkpoints import tensor_files
from mutor_img.checkpoints.folder import find_checkpoint, read_meta, write_checkpoint
from mutor_img.checkpoints.tensor_files import Slice
from mutor_img.common.errors import UserError
from mutor_img.training.trainer import Trainer

GROUPS = ("model", "optimizer", "ema")


def bytes_read() -> int:
    """Return how many bytes this process has asked the system for in all its life."""
    return int(Path("/proc/self/io").read_text().split()[1])


def first_two(rank: int, world: int, port: int, root: Path) -> None:
    join(rank, world, port)
    good, reads = Trainer.save, []

    def counted(trainer):
        before = bytes_read()
        good(trainer)
        reads.append(bytes_read() - before)

    Trainer.save = counted
    train_small(root, "whole", ("train.steps=4", "train.checkpoint_every=2"))
    train_small(root, "parts", ("train.steps=2",))
    (root / f"reads_{rank}.json").write_text(json.dumps(reads))


def last_two(rank: int, world: int, port: int, root: Path) -> None:
    """Go on where one process was, then lose rank 1 in the midst of a file of the second checkpoint."""
    join(rank, world, port)
    train_small(root, "parts", ("train.steps=4",))
    good, calls = tensor_files.save_file, []

    def deadly(tensors, path, metadata=None):
        calls.append(1)
        written = good(tensors, path, metadata)
        if rank == 1 and len(calls) == len(GROUPS) + 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    tensor_files.save_file = deadly
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # rank 0 loses its peer, loudly
    train_small(root, "killed", ("train.steps=2", "train.checkpoint_every=1"))


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_codes, processes) -> Path:
    """A folder in which two processes, then one, then two again have trained."""
    root = tmp_path_factory.mktemp("saving")
    (root / "run.yaml").write_text(RUN.format(codes=make_codes(root / "codes")))
    assert launch(processes, 2, first_two, root) == [0, 0]
    train_small(root, "parts", ("train.steps=3",))
    status = launch(processes, 2, last_two, root)
    assert status[0] not in (0, None) and status[1] == -signal.SIGKILL
    train_small(root, "killed_whole", ("train.steps=2",))
    return root


def test_each_process_writes_its_rows_of_every_tensor(root):
    folder = find_checkpoint(root / "whole")
    files = {f"{group}.0000{rank}-of-00002.safetensors" for group in GROUPS for rank in range(2)}
    assert set(read_meta(folder)["files"]) == files
    for group in GROUPS:
        parts = [safe_open(folder / f"{group}.0000{rank}-of-00002.safetensors", "pt") for rank in range(2)]
        whole = saved(root, "whole", group)
        shared = {name for name, tensor in whole.items() if tensor.dim() and len(tensor) > 1}
        assert set(parts[0].keys()) == set(whole) and set(parts[1].keys()) == shared
        for name in shared:
            assert torch.equal(torch.cat([part.get_tensor(name) for part in parts]), whole[name])


def test_a_save_reads_nothing_of_what_it_writes(root):
    written = sum(file["bytes"] for file in read_meta(find_checkpoint(root / "whole"))["files"].values())
    for rank in range(2):
        reads = json.loads((root / f"reads_{rank}.json").read_text())
        assert len(reads) == 3 and max(reads) < written / 20  # the JSON of both checkpoints


def test_two_processes_go_on_from_one_that_went_on_from_two(root):
    assert curve(root, "parts") == pytest.approx(curve(root, "whole"), abs=2e-5) and len(curve(root, "parts")) == 4
    for group in GROUPS:
        parts, whole = (saved(root, name, group) for name in ("parts", "whole"))
        assert parts.keys() == whole.keys()
        assert all(torch.allclose(parts[name], whole[name], atol=1e-4) for name in whole)


def test_weights_saved_together_load_and_convert_as_a_model(root, tmp_path):
    convert.main(["--source", str(root / "whole"), "--out", str(tmp_path / "whole.pt")])
    for model in (load_checkpoint(root / "whole"), load_checkpoint(tmp_path / "whole.pt", grid=(4, 5), heads=2)):
        assert all(torch.equal(weight, saved(root, "whole", "ema")[name]) for name, weight in
                   model.state_dict().items())


def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(root, tiny):
    assert find_checkpoint(root / "killed").name == "step_00000001"
    assert read_meta(find_checkpoint(root / "killed"))["step"] == 1 and saved(root, "killed", "optimizer")
    train_small(root, "killed", ("train.steps=2",))
    left = sorted(path.name for path in (root / "killed" / "checkpoints").iterdir())
    assert left == ["latest", "step_00000001", "step_00000002"]
    assert curve(root, "killed") == pytest.approx(curve(root, "killed_whole"), abs=2e-5)


def test_a_process_that_does_not_see_the_folder_of_rank_0_says_so(tmp_path):
    class Alone:
        rank, world = 1, 2

        def barrier(self):
            pass

    with pytest.raises(UserError, match="all nodes share"):
        write_checkpoint(tmp_path, 1, {"model": {"w": Slice(torch.ones(1, 2), 1, 2)}}, {}, 1, Alone())
