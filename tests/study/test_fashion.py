"""Fashion-MNIST's files become folders of PNGs; what is no such file is named, and nothing is left half-written."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.study.fashion import main


@pytest.fixture
def raw(tmp_path):
    """The four files of 30 training images and 20 others, one of them gzipped."""
    folder, draw = tmp_path / "raw", np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", 30), ("t10k", 20)):
        images, labels = draw.integers(0, 256, (count, 28, 28), np.uint8), (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + struct.pack(">3I", *images.shape) + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + struct.pack(">I", count) + labels.tobytes())
    plain = folder / "t10k-images-idx3-ubyte"
    plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return folder


def test_images_are_padded_and_lie_in_the_folder_of_their_label(raw, tmp_path, capsys):
    out = tmp_path / "data" / "fashion"
    main(["--raw", str(raw), "--out", str(out)])
    assert len(list((out / "train").rglob("*.png"))) == 30 and len(list((out / "val").rglob("*.png"))) == 20
    pixels = np.frombuffer((raw / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28)
    image = np.array(Image.open(out / "train" / "7" / "00017.png"))
    assert image.shape == (32, 32) and (image[2:-2, 2:-2] == pixels[17]).all() and image.sum() == pixels[17].sum()
    main(["--raw", str(raw), "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: is there already"


@pytest.mark.parametrize("name, change, said", [
    ("train-images-idx3-ubyte", lambda data: data[:-1], "fewer than the 23520 bytes that it says"),
    ("train-images-idx3-ubyte", lambda data: data + b"x", "more than the 23520 bytes"),
    ("train-labels-idx1-ubyte", lambda data: data[:3], "not an IDX file of bytes in 1 dimension;"),
    ("train-labels-idx1-ubyte", lambda data: data[:-1] + b"\x0a", "has a label 10, and there are 10 classes"),
    ("train-labels-idx1-ubyte", lambda data: data[:4] + struct.pack(">I", 29) + data[8:-1], "30 images and 29 labels"),
    ("train-images-idx3-ubyte", lambda data: data[:4] + struct.pack(">3I", 2**31, 28, 28) + data[16:],
     "its array is 2147483648 x 28 x 28"),
    ("t10k-images-idx3-ubyte.gz", lambda data: data[:-9], "damaged"),
    ("t10k-images-idx3-ubyte.gz", lambda data: None, "neither t10k-images-idx3-ubyte nor t10k-images-idx3-ubyte.gz")])
def test_what_is_no_such_file_is_one_line_and_nothing_is_written(raw, tmp_path, name, change, said):
    changed = change((raw / name).read_bytes())
    (raw / name).unlink() if changed is None else (raw / name).write_bytes(changed)
    with pytest.raises(UserError, match=said) as caught:
        main(["--raw", str(raw), "--out", str(tmp_path / "out")])
    assert str(raw) in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".png"]
