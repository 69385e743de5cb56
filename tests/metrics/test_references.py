import gzip
import pickle

import numpy as np
import pytest
import torch

from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash
from mutor_img.metrics.frechet import Statistics
from mutor_img.metrics.image_sets import ArrayImages, FolderImages
from mutor_img.metrics.references import as_reference, check_role, open_reference, save_reference
from mutor_img.metrics.samples import open_samples

STATISTICS = {"mu": np.zeros(3, np.float32), "sigma": np.eye(3)}
SPATIAL = {"mu_s": np.zeros(2), "sigma_s": np.eye(2)}


def save(path, role="generation", **changes):
    arguments = {"name": "train", "source_hash": "ab", "network": "projection", "weights_hash": "0" * 64,
                 "pool": Statistics(torch.arange(3).double(), torch.eye(3).double(), 9), "spatial": None,
                 "pool_features": torch.ones(4, 3)}
    return save_reference(path, role=role, **(arguments | changes))


def test_our_file_comes_back_with_all_it_declares(tmp_path):
    path = save(tmp_path / "r.npz", role="reconstruction")
    found = open_reference(path)
    assert (found.kind, found.role, found.name, found.network) == ("mutor_img", "reconstruction", "train", "projection")
    assert (found.weights_hash, found.sha256, found.pool.count) == ("0" * 64, file_hash(path), 9)
    assert found.pool.mu.tolist() == [0, 1, 2]
    assert found.pool_features.shape == (4, 3)


def test_our_file_needs_no_pickle(tmp_path):
    with np.load(save(tmp_path / "r.npz"), allow_pickle=False) as archive:
        assert {name: archive[name].dtype.hasobject for name in archive.files} == dict.fromkeys(archive.files, False)


def test_adms_layout_declares_generation_and_less_declares_nothing(tmp_path, noise):
    np.savez(tmp_path / "adm.npz", arr_0=noise(4), **STATISTICS, **SPATIAL)
    np.savez(tmp_path / "clean.npz", **STATISTICS)
    np.savez(tmp_path / "images.npz", arr_0=noise(4))
    adm, clean, images = (open_reference(tmp_path / f"{name}.npz") for name in ("adm", "clean", "images"))
    assert (adm.kind, adm.role, len(adm.images), adm.pool.mu.dtype) == ("adm", "generation", 4, torch.float64)
    assert (clean.kind, clean.role, clean.images) == ("statistics", None, None)
    assert (images.kind, images.role, images.pool) == ("images", None, None)


def test_a_folder_is_a_reference_with_labels(digit_folders):
    found = open_reference(digit_folders["val"])
    assert (found.kind, found.role, len(found.labels)) == ("folder", None, 18)
    assert found.sha256 == FolderImages(digit_folders["val"]).sha256() == found.digest


def test_roles_must_agree_unless_forced(noise):
    reference = as_reference(ArrayImages(noise(4)), role="reconstruction")
    assert check_role(reference, "reconstruction", force=False) == []
    with pytest.raises(UserError, match="--force-role"):
        check_role(reference, "generation", force=False)
    assert "not comparable" in check_role(reference, "generation", force=True)[0]
    assert "does not declare" in check_role(as_reference(ArrayImages(noise(4))), "generation", force=False)[0]
    with pytest.raises(UserError, match="did you mean 'generation'"):
        check_role(reference, "generations", force=False)


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.zeros(3)}, "sigma belong together"),
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, "covariance"),
    ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "int64"),
    ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "NaN"),
    ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "NaN or infinity"),
    ({"mu": np.array([None]), "sigma": np.eye(1)}, "Python objects"),
    ({"other": np.zeros(3)}, "neither mu and sigma nor images"),
    ({"about": np.zeros(3, np.uint8)}, "description"),
    ({"about": np.frombuffer(b"[]", np.uint8)}, "description"),
])
def test_files_that_are_no_reference_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_reference(tmp_path / "r.npz")


@pytest.mark.parametrize("content", [b"mu sigma\n1 2\n", "Größe ".encode() * 40, "a€".encode() * 67])
def test_a_text_is_called_so_though_a_character_ends_beyond_what_is_looked_at(content, tmp_path):
    (tmp_path / "notes.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"notes.npz: a text file"):
        open_samples(tmp_path / "notes.npz")


@pytest.mark.parametrize("content, kind", [
    (pickle.dumps(STATISTICS), "a pickle, which could run code"), (pickle.dumps([1], protocol=0), "a pickle"),
    (b"\x93NUMPY" + bytes(90), "a single array"), (b"", "an empty file"), (b"<!DOCTYPE html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"), (b"\x89PNG\r\n", "a PNG image"),
    (gzip.compress(b"x"), "a gzip archive"), (b'{"mu": 1}', "a JSON text"),
], ids=["pickle", "old pickle", "npy", "empty", "page", "lfs", "png", "gzip", "json"])
def test_a_file_of_another_kind_is_called_what_it_is(content, kind, tmp_path):
    path = tmp_path / "stats.pkl"
    path.write_bytes(content)
    for read in (open_reference, open_samples):
        with pytest.raises(UserError, match=kind) as caught:
            read(path)
        assert "cut off" not in str(caught.value) and "numpy.savez" in str(caught.value)


def test_a_file_of_torch_save_is_no_npz_and_an_npz_may_have_any_name(tmp_path):
    torch.save(STATISTICS, tmp_path / "torch.npz")
    with pytest.raises(UserError, match=r"a file of torch\.save, not an npz"):
        open_reference(tmp_path / "torch.npz")
    with open(tmp_path / "stats.pkl", "wb") as file:
        np.savez(file, **STATISTICS)
    assert open_reference(tmp_path / "stats.pkl").kind == "statistics"
    (tmp_path / "cut.npz").write_bytes((tmp_path / "stats.pkl").read_bytes()[:-40])
    with pytest.raises(UserError, match="it may be cut off"):
        open_reference(tmp_path / "cut.npz")


def test_features_of_our_file_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(UserError, match="not finite float32"):
        open_reference(save(tmp_path / "r.npz", pool_features=torch.full((4, 3), float("nan"))))


def test_the_size_of_the_images_is_known_where_it_can_be(tmp_path, noise, digit_folders):
    np.savez(tmp_path / "clean.npz", **STATISTICS)
    assert open_reference(tmp_path / "clean.npz").size is None
    assert open_reference(save(tmp_path / "r.npz", size=(7, 9))).size == (7, 9)
    assert open_reference(digit_folders["val"]).size == (32, 32)
    assert as_reference(ArrayImages(noise(4))).size == (8, 8)


def test_an_unknown_role_is_not_written(tmp_path):
    with pytest.raises(UserError, match="role"):
        save(tmp_path / "r.npz", role="both")
    assert not list(tmp_path.iterdir())
