"""Reading in processes of its own: no shared memory, and one line where the system ends a process."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from mutor_img.common.errors import UserError
from tokenizer.encode import main as encode
from tokenizer.images.crops import CROPS, CropRule, center_rule
from tokenizer.images.folder import list_images
from tokenizer.images.squares import Squares, readers
from tokenizer.reconstruct import main as reconstruct


def squares(folder, rule=None):
    source = list_images(folder)
    return Squares(source, range(len(source)), 1, 8, rule or center_rule())


def test_processes_give_the_same_batches_and_take_no_shared_memory(image_folder):
    data = squares(image_folder(each=3))
    here, there = ([batch for batch, _ in data.batches(4, workers)] for workers in (0, 2))
    assert [len(batch) for batch in there] == [4, 4, 1] and not any(batch.is_shared() for batch in there)
    assert all(map(torch.equal, here, there))


def ended(image, side, number):
    os.kill(os.getpid(), signal.SIGBUS)  # what the kernel sends where /dev/shm is full


def of_its_own(image, side, number):
    raise RuntimeError("shapes do not match")


def test_a_process_that_the_system_ends_is_a_line_with_the_cure(image_folder, tokenizer_run, tmp_path, monkeypatch,
                                                                refused):
    words = ["--tokenizer", tokenizer_run(), "--images", image_folder(), "--workers", 2]
    rule = CropRule("center", ("",), ended)
    monkeypatch.setitem(CROPS, "center", lambda: rule)
    monkeypatch.setattr("tokenizer.reconstruct.center_rule", lambda: rule)
    for main, out in ((encode, ("--out", tmp_path / "out", "--crop", "center")), (reconstruct, ())):
        line = refused(main, *words, *out)
        assert "the system ended a process that reads images" in line
        assert "--workers 0" in line and "--shm-size" in line


def test_an_error_of_another_kind_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="shapes do not match"), readers():
        of_its_own(None, 8, 0)


def test_processes_that_cannot_be_started_are_a_line_with_the_cure(image_folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing, "Queue", full)
    with pytest.raises(UserError, match=r"cannot be started .*No space left.*--workers 0.*--shm-size"):
        next(squares(image_folder()).batches(4, 2))
    assert len(next(squares(image_folder("again")).batches(4, 0))[0]) == 4


def private_shm(*words):
    """Run a command with a /dev/shm of its own, of 200 KB."""
    script = 'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$@"'
    return subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *map(str, words)], capture_output=True, text=True,
                          timeout=300)


READ = """
import sys
from tokenizer.images.crops import center_rule
from tokenizer.images.folder import list_images
from tokenizer.images.squares import Squares
source = list_images(sys.argv[1])
print([len(batch) for batch, _ in Squares(source, range(len(source)), 3, 256, center_rule()).batches(6, 2)])
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None or private_shm("true").returncode != 0,
                    reason="needs to be allowed mounts of its own")
def test_batches_larger_than_all_shared_memory_are_read(image_folder):
    done = private_shm(sys.executable, "-c", READ, image_folder())  # a batch is 1.2 MB
    assert done.returncode == 0 and done.stdout == "[6, 6]\n", done.stderr


def test_an_image_that_cannot_be_cropped_is_unreadable_and_named(image_folder):
    folder = image_folder(each=1)

    def cut(image, side, number):
        if number == 1:
            raise MemoryError
        return [image]

    (_, errors), = squares(folder, CropRule("odd", ("",), cut)).batches(3, 0)
    assert errors == ["", f"{folder}/b/0000.png: not a readable image (MemoryError); replace or remove the file", ""]
