"""Our safetensors files: the library's bytes, hashed on their way."""

import errno
import hashlib

import numpy as np
import pytest
import safetensors.torch
import torch

from mutor_img.checkpoints import tensor_files
from mutor_img.checkpoints.tensor_files import DTYPES, save_file

SOME = {f"{dtype} {shape}".replace("torch.", "é"): torch.arange(6).reshape(shape).to(dtype)
        for dtype in DTYPES for shape in ((6,), (2, 3))}
SOME |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "no labels": torch.from_numpy(np.zeros(0, np.int64)),
         "turned": torch.arange(6.0).reshape(2, 3).T}


@pytest.mark.parametrize("tensors", [SOME, {}, {"scalar": torch.tensor(1)}])
@pytest.mark.parametrize("metadata", [None, {"rows": '{"w": [0, 2]}'}])
def test_a_file_has_the_bytes_of_the_librarys_writer(tmp_path, tensors, metadata):
    known = save_file(tensors, tmp_path / "ours", metadata)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", metadata)
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert known == {"bytes": len(ours), "sha256": hashlib.sha256(ours).hexdigest()}


def test_a_full_disk_names_the_file():
    with pytest.raises(OSError) as caught:
        save_file({"w": torch.ones(10**5)}, tensor_files.Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"
