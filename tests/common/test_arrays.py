"""Arrays in files: numpy's bytes whatever the clock says, and damage that is named."""

import time

import numpy as np
import pytest

from mutor_img.common.arrays import load_npy, write_npz
from mutor_img.common.errors import UserError

ARRAY = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)


@pytest.mark.parametrize("second", [0.0, 1e9, 4e9])
def test_an_npz_has_the_same_bytes_whatever_the_clock_says(tmp_path, monkeypatch, second):
    arrays = {"images": ARRAY, "labels": np.zeros(0, np.int64), "turned": ARRAY.T}
    write_npz(tmp_path / "now", arrays)
    monkeypatch.setattr(time, "time", lambda: second)  # numpy.savez would refuse the first: zip begins in 1980
    write_npz(tmp_path / "then", arrays)
    assert (tmp_path / "now").read_bytes() == (tmp_path / "then").read_bytes()
    with np.load(tmp_path / "then") as found:
        assert found.files == list(arrays) and all(np.array_equal(found[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:40], lambda data: data[:-1], lambda data: data + b"\0",
    lambda data: data.replace(b"(2, 3, 4)", b"\xff\xff, 3, 4)"),  # numpy raises a TokenError
    lambda data: data.replace(b"(2, 3, 4)", b"(99,3, 4)"),
    lambda data: data[:6] + b"\2\0" + (2**31).to_bytes(4, "little") + data[12:],  # a header of 2 GiB
    lambda data: data.replace(b"<u2", b"|O8"),
])
@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_an_array_that_is_damaged_is_one_line(tmp_path, damage, mmap_mode):
    path = tmp_path / "a.npy"
    np.save(path, ARRAY)
    assert np.array_equal(load_npy(path, "make it again", mmap_mode), ARRAY)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.npy: not a readable \.npy array \(.*\); make it again"):
        load_npy(path, "make it again", mmap_mode)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.npy: no such file; make it again"):
        load_npy(path, "make it again", mmap_mode)
