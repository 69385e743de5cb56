import zipfile

import numpy as np
import pytest
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.metrics.image_sets import ArrayImages, FolderImages, NpzImages, read_all, rebatch
from tokenizer.images.folder import list_images


def write_folder(folder, images, names):
    for image, name in zip(images, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed_whole_and_again(save, tmp_path, noise):
    save(tmp_path / "x.npz", arr_0=noise(150), arr_1=np.arange(150) % 5)
    images = NpzImages(tmp_path / "x.npz")
    assert len(images) == 150
    assert [len(batch) for batch in images] == [64, 64, 22]
    np.testing.assert_array_equal(read_all(images), noise(150))
    np.testing.assert_array_equal(images.labels, np.arange(150) % 5)


def test_npz_never_holds_all_images_at_once(tmp_path, noise, monkeypatch):
    np.savez(tmp_path / "x.npz", arr_0=noise(150))
    monkeypatch.setattr(np, "load", None)  # the whole-array door
    assert sum(len(batch) for batch in NpzImages(tmp_path / "x.npz")) == 150


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
    ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "shape"),
    ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "shape"),
    ({"arr_0": np.array([{}, None], dtype=object)}, "Python objects"),
    ({"arr_0": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))}, "Fortran"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, "arr_1"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(2)}, "arr_1"),
    ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "no array arr_0"),
])
def test_npz_of_the_wrong_kind_is_refused_in_one_line(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        NpzImages(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_cut_off_npz_is_refused(share, tmp_path, noise):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=noise(40))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"cut off|an empty file"):
        NpzImages(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_is_found_while_reading(save, tmp_path, noise):
    path = tmp_path / "x.npz"
    save(path, arr_0=noise(40))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_all(NpzImages(path))


def test_an_array_is_not_missing_because_its_name_is_damaged(tmp_path, noise):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=noise(2), arr_1=np.zeros(2, np.int64))
    head, _, tail = path.read_bytes().rpartition(b"arr_1.npy")  # in the list at the end
    path.write_bytes(head + b"arr_3.npy" + tail)
    with pytest.raises(UserError, match=r"x\.npz: not a whole npz file"):
        NpzImages(path)


def test_an_array_shorter_than_its_header_is_refused(tmp_path, noise):
    np.save(tmp_path / "arr_0.npy", noise(40))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "arr_0.npy").read_bytes()[:-100])
    with pytest.raises(UserError, match="should hold 40 images"):
        NpzImages(tmp_path / "x.npz")


def test_a_tree_has_classes_and_a_flat_folder_has_none(tmp_path, noise):
    write_folder(tmp_path / "tree", noise(4), ["b/0.png", "a/1.png", "a/0.png", "c/0.png"])
    write_folder(tmp_path / "flat", noise(2), ["1.png", "0.png"])
    tree, flat = FolderImages(tmp_path / "tree"), FolderImages(tmp_path / "flat")
    assert (tree.class_names, tree.labels.tolist()) == (["a", "b", "c"], [0, 0, 1, 2])
    np.testing.assert_array_equal(read_all(tree), noise(4)[[2, 1, 0, 3]])
    assert (flat.class_names, flat.labels) == (None, None)


def test_the_hash_of_a_folder_sees_names_and_bytes(tmp_path, noise):
    for name, images, files in (("a", noise(2), ["0.png", "1.png"]), ("b", noise(2), ["0.png", "2.png"]),
                                ("c", noise(2, 1), ["0.png", "1.png"]), ("d", noise(2), ["0.png", "1.png"])):
        write_folder(tmp_path / name, images, files)
    a, b, c, d = (FolderImages(tmp_path / name).sha256() for name in "abcd")
    assert a == d
    assert len({a, b, c}) == 3


def test_a_folder_is_read_as_the_tokenizer_reads_it(tmp_path, noise):
    write_folder(tmp_path / "elsewhere", noise(1, 1), ["deep/7.png"])
    write_folder(tmp_path / "set", noise(5), ["a/0.png", "a-b/1.PNG", "b/deep/2.png", ".cache/x.jpg", "b/._x.png"])
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "1.png").symlink_to(tmp_path / "elsewhere" / "deep" / "7.png")
    ours, theirs = FolderImages(tmp_path / "set"), list_images(tmp_path / "set")
    assert [file.as_posix() for file in ours.files] == theirs.files and len(ours) == 5
    assert ours.labels.tolist() == theirs.labels.tolist() == [0, 0, 1, 2, 3]
    assert ours.class_names == theirs.classes == ["a", "a-b", "b", "c"]


def test_what_is_gone_is_named_before_anything_is_scored(tmp_path, noise):
    write_folder(tmp_path, noise(2), ["a/0.png", "b/0.png"])
    (tmp_path / "c").symlink_to("gone")
    with pytest.raises(UserError, match="c: a link to gone"):
        FolderImages(tmp_path)
    (tmp_path / "c").unlink()
    (tmp_path / "b" / "1.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"b/1\.png: no such image file \(a link to gone\.png\)"):
        FolderImages(tmp_path)
    (tmp_path / "b" / "1.png").unlink()
    images = FolderImages(tmp_path)
    (tmp_path / "b" / "0.png").unlink()
    with pytest.raises(UserError, match=r"b/0\.png"):
        images.sha256()


@pytest.mark.parametrize("error", [NotImplementedError("compression"), RuntimeError("encrypted"), MemoryError()])
def test_whatever_a_reader_of_npz_files_raises_names_the_file(error, tmp_path, noise, monkeypatch):
    np.savez(tmp_path / "x.npz", arr_0=noise(4), arr_1=np.arange(4))
    images = NpzImages(tmp_path / "x.npz")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    for read in (lambda: read_all(images), lambda: NpzImages(tmp_path / "x.npz")):
        with pytest.raises(UserError, match=r"x\.npz: .*(compression|encrypted|MemoryError)"):
            read()


def test_jpegs_are_refused_with_the_reason(tmp_path, noise):
    write_folder(tmp_path, noise(2), ["0.png", "1.jpg"])
    with pytest.raises(UserError, match="lossy compression, as of JPEGs"):
        FolderImages(tmp_path)


@pytest.mark.parametrize("kind, options", [("JPEG", {}), ("WEBP", {}), ("JPEG2000", {}),
                                           ("TIFF", {"compression": "jpeg"})], ids=str)
def test_what_a_png_in_name_lost_is_seen_by_its_content(tmp_path, noise, kind, options):
    write_folder(tmp_path, noise(2), ["0.png", "1.png"])
    Image.fromarray(noise(1)[0]).save(tmp_path / "1.png", format=kind, **options)
    with pytest.raises(UserError, match=f"1.png: {kind} by its content; lossy compression"):
        read_all(FolderImages(tmp_path))


def test_bad_folders_are_refused(tmp_path, noise):
    with pytest.raises(UserError, match="no such folder"):
        FolderImages(tmp_path / "absent")
    with pytest.raises(UserError, match="no PNG"):
        FolderImages(tmp_path)
    write_folder(tmp_path, [noise(1)[0], noise(1)[0][:4]], ["0.png", "1.png"])
    with pytest.raises(UserError, match=r"1\.png is 8 x 4"):
        read_all(FolderImages(tmp_path))
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable image"):
        read_all(FolderImages(tmp_path))


@pytest.mark.parametrize("cuts", [[10], [1] * 10, [3, 7], [4, 4, 2]])
def test_batches_are_the_same_however_the_source_cuts(cuts, noise):
    parts = np.split(noise(10), np.cumsum(cuts)[:-1])
    batches = list(rebatch(parts, 4, 9))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(batches), noise(10)[:9])


def test_arrays_are_checked_like_files(noise):
    assert len(ArrayImages(noise(5), [0, 1, 2, 3, 4])) == 5
    with pytest.raises(UserError, match="float64"):
        ArrayImages(noise(5) / 255)
    with pytest.raises(UserError, match="labels"):
        ArrayImages(noise(5), [0, 1])
