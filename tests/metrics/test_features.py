import weakref

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash
from mutor_img.metrics import inception as inception_module
from mutor_img.metrics.features import to_nchw
from mutor_img.metrics.inception import INCEPTION_FILE, InceptionGraph, load_inception, resize_like_tensorflow


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_inception(inception_file)


@pytest.fixture(scope="module")
def outputs(inception, coarse_images):
    return inception(coarse_images)


def test_pool_and_logits_are_torch_fidelitys(inception_file, outputs, coarse_images):
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_file))
    pool, logits = theirs(torch.from_numpy(coarse_images).permute(0, 3, 1, 2))
    torch.testing.assert_close(outputs["pool"], pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs["logits"], logits, rtol=1e-4, atol=1e-4)
    assert pool.std(0).mean() > 1e-3  # the images do differ, so that agreement means something


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (256, 256), (299, 299), (400, 512)], ids=str)
def test_the_resize_is_torch_fidelitys_to_the_bit(shape):
    x = torch.randint(256, (2, 3, *shape), generator=torch.Generator().manual_seed(0)).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert torch.equal(resize_like_tensorflow(x, 299), theirs)


def test_spatial_features_run_over_rows_columns_then_channels(inception, outputs, coarse_images):
    maps = []
    handle = inception.graph.Mixed_6d.branch1x1.bn.register_forward_hook(lambda m, i, o: maps.append(o.clone()))
    inception(coarse_images)
    handle.remove()
    maps = maps[0].clamp(min=0)  # (B, 192, 17, 17) after ReLU
    spatial = outputs["spatial"]
    assert spatial.shape == (6, 2023)
    for row, column, channel in ((0, 0, 6), (0, 5, 2), (16, 3, 0), (9, 16, 4)):
        index = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(spatial[:, index], maps[:, channel, row, column], rtol=1e-4, atol=1e-4)
    wrong = maps[:, :7].flatten(1)  # channels first
    assert (wrong - spatial).abs().max() > 0.1


def test_both_layouts_and_grey_give_the_same_features(inception, coarse_images):
    grey = torch.from_numpy(coarse_images[:2, :, :, :1].copy())
    results = [inception(x)["pool"] for x in (grey, grey.permute(0, 3, 1, 2), grey.expand(-1, -1, -1, 3))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)


def test_autocast_and_reduced_precision_around_change_nothing(inception, outputs, coarse_images):
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16):
            found = inception(coarse_images)["pool"]
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = before
    torch.testing.assert_close(found, outputs["pool"], rtol=0, atol=1e-6)


def test_a_network_that_is_dropped_is_freed_at_once(no_collector):
    with torch.device("meta"):
        graph = InceptionGraph()
    gone = weakref.ref(graph.fc.weight)
    with no_collector:
        del graph
        assert gone() is None


def test_a_named_file_with_another_hash_is_used_with_a_warning(inception):
    assert "not comparable" in inception.warnings[0]


def test_the_default_place_must_hold_the_published_file(inception_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / INCEPTION_FILE
    path.parent.mkdir()
    path.write_bytes(inception_file.read_bytes())
    with pytest.raises(UserError, match=r"sha256 begins .*6726825d"):
        load_inception()


def test_a_download_whose_hash_only_begins_as_the_published_one_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "source.pth"
    source.write_bytes(b"weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception_module, "URL_INCEPTION_V3", source.as_uri())
    monkeypatch.setattr(inception_module, "INCEPTION_HASH", file_hash(source)[:8] + "0" * 56)
    with pytest.raises(UserError, match="invalid hash value"):
        load_inception()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_without_weights_and_network_the_message_names_the_place_and_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception_module, "URL_INCEPTION_V3", (tmp_path / "absent").as_uri())
    with pytest.raises(UserError) as caught:
        load_inception()
    assert str(tmp_path / "checkpoints" / INCEPTION_FILE) in str(caught.value)
    assert "--inception-weights" in str(caught.value)


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, Harmful(), None])
def test_a_file_of_something_else_is_refused_and_runs_no_code(content, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"no weights") if content is None else torch.save(content, path)
    with pytest.raises(UserError, match="no Inception weights") as caught:
        load_inception(path)
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("images", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 5, dtype=torch.uint8),
                                    torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_only_uint8_images_have_features(images):
    with pytest.raises(UserError):
        to_nchw(images)
