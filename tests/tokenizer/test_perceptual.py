"""LPIPS against the package of its authors, on one VGG16 with random weights and the published heads."""

import hashlib
from copy import deepcopy
from types import SimpleNamespace

import lpips
import pytest
import torch
import torchvision

from mutor_img.common.errors import UserError
from tokenizer.training import perceptual
from tokenizer.training.losses import ReconstructionLoss
from tokenizer.training.perceptual import LPIPS, find_files, load_lpips


@pytest.fixture(scope="module")
def features():
    """Torchvision's VGG16 up to its last ReLU, with random weights that keep the scale of what goes through."""
    torch.manual_seed(0)
    layers = LPIPS().features
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.normal_(0, (2 / (9 * layer.in_channels)) ** 0.5)
            layer.bias.normal_(0, 0.1)
    return layers


@pytest.fixture
def folder(tmp_path, features, monkeypatch):
    """A folder of the two files, whose hashes are taken for the published ones."""
    weights = {f"features.{name}": weight for name, weight in features.state_dict().items()}
    torch.save({**weights, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16-397923af.pth")
    (tmp_path / "vgg.pth").write_bytes(find_files()[1].read_bytes())
    digest = hashlib.sha256((tmp_path / "vgg16-397923af.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(perceptual, "VGG_HASH", digest)
    return tmp_path


def test_distances_and_gradients_are_those_of_the_authors_package(folder, features, monkeypatch):
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **_: SimpleNamespace(features=deepcopy(features)))
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    ours = load_lpips(folder)
    images = (torch.rand(2, 3, 24, 32) * 2 - 1).requires_grad_()
    others = torch.rand(2, 3, 24, 32) * 2 - 1
    expected = reference(images, others).flatten()
    found = ours(images, others)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert float(found.min()) > 0.01 and float((found[0] - found[1]).abs()) > 1e-5
    weights = torch.tensor([1.0, 3.0])
    gradients = [torch.autograd.grad((weights * value).sum(), images)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    assert torch.equal(ours(others, others), torch.zeros(2))
    assert not ours.training and not any(weight.requires_grad for weight in ours.parameters())


def test_the_term_is_the_mean_over_images_and_grey_is_repeated(folder):
    distance = load_lpips(folder)
    term = ReconstructionLoss({"lpips": 2.0}, torch.device("cpu"), str(folder))
    a, b = torch.rand(2, 1, 16, 16) * 2 - 1, torch.rand(2, 1, 16, 16) * 2 - 1
    total, values = term(a, b)
    expected = distance(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)).mean()
    torch.testing.assert_close(values["lpips"], expected)
    torch.testing.assert_close(total, 2 * expected)


def test_places_without_any_feature_have_a_finite_gradient():
    network = LPIPS()
    for weight in network.features.parameters():
        weight.zero_()
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    network(images, torch.rand(1, 3, 16, 16)).sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_missing_and_wrong_files_are_one_line_that_says_where_to_get_them(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cache/hub/checkpoints/vgg16-397923af\.pth is missing; download https://.*"
                                        r"--lpips-weights"):
        load_lpips()
    (folder / "vgg.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"vgg\.pth: sha256 begins .*, not a78928a0af1e: the file is damaged.*"
                                        r"pip install lpips"):
        load_lpips(folder)
    (folder / "vgg.pth").unlink()
    with pytest.raises(UserError, match=r"vgg\.pth is missing.*pip install lpips"):
        load_lpips(folder)
    monkeypatch.setattr(perceptual, "VGG_HASH", perceptual.VGG_HASH[:8] + "0" * 56)  # that begins alike is not enough
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth: sha256 begins .*, not [0-9a-f]{8}0000: the file"):
        load_lpips(folder)
