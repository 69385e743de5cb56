import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_tensor

from mutor_img.common.errors import UserError
from mutor_img.metrics.evaluator import evaluate
from mutor_img.metrics.image_sets import ArrayImages
from mutor_img.metrics.references import as_reference
from mutor_img.metrics.timm_features import load_timm


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "model.pth")
    return folder


@pytest.fixture
def images(model):
    side = timm.data.resolve_model_data_config(model)["input_size"][1]
    return np.random.default_rng(0).integers(0, 256, (12, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_features_are_what_the_classifier_sees(name, model, weights, images):
    network, data = load_timm("timm:test_vit", weights / name), timm.data.resolve_model_data_config(model)
    pixels = torch.stack([to_tensor(image) for image in images])
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    seen = []
    handle = model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model((pixels - mean) / std)
    handle.remove()
    torch.testing.assert_close(network(images)["pool"], seen[0], rtol=1e-4, atol=1e-5)
    assert network.dimensions == {"pool": seen[0].shape[1]} and len(network.weights_hash) == 64


def test_images_are_resized_whole(weights, images):
    network = load_timm("test_vit", weights / "model.pth")
    large = images.repeat(2, 1).repeat(2, 2)
    torch.testing.assert_close(network(large)["pool"], network(images)["pool"], rtol=0.2, atol=0.2)
    changed = large.copy()
    changed[:, 0:4] = 255 - changed[:, 0:4]  # a centre crop would not see the rim
    assert (network(changed)["pool"] - network(large)["pool"]).abs().max() > 1e-3


def test_the_distance_is_named_for_what_it_is(weights, images):
    network = load_timm("test_vit", weights / "model.safetensors")
    reference = as_reference(ArrayImages(images[6:]), role="generation")
    result = evaluate(ArrayImages(images[:6]), reference, network, metrics=["fid", "pr", "kid"])
    assert {"fd", "kd", "precision", "recall"} <= set(result) and not {"fid", "kid", "is"} & set(result)
    assert (result["features"], result["comparable"]) == ("timm:test_vit", False)
    assert set(evaluate(ArrayImages(images), reference, network)) >= {"fd", "precision"}
    with pytest.raises(UserError, match="has no classes"):
        evaluate(ArrayImages(images), reference, network, metrics=["is"])


def test_what_is_no_model_or_no_weights_of_it_is_refused_in_one_line(weights, tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for name, path, words in (("test_vti", weights / "model.pth", "did you mean"), ("q", tmp_path, "no such model"),
                              ("test_vit", tmp_path / "absent.pth", "no such file"),
                              ("test_resnet", weights / "model.pth", "no weights of test_resnet"),
                              ("test_vit", tmp_path / "junk.pth", "no weights of test_vit")):
        with pytest.raises(UserError, match=words) as caught:
            load_timm(name, path)
        assert "\n" not in str(caught.value)
