"""The Inception network of FID, IS and sFID. It takes seconds to import: do so where it is needed."""

from __future__ import annotations

import io
import os
import urllib.error
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from mutor_img.common.errors import UserError, first_line
from mutor_img.common.files import file_hash
from mutor_img.common.full_precision import full_precision
from mutor_img.metrics.features import to_nchw

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_HASH = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # sha256
SPATIAL_CHANNELS = 7
_TRUNK = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
          "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
          "Mixed_7b", "Mixed_7c", "AvgPool")  # torch-fidelity's names of the layers, in order


class InceptionGraph(FeatureExtractorInceptionV3):
    """torch-fidelity's port of the 2015-12-05 TensorFlow graph, which also yields the spatial features of sFID.

    The weights are whatever the initialisation gives until ``load_state_dict``.
    """

    def __init__(self):
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        # The constructor unpickles the weights file itself. It is handed an empty one; ours are loaded safely after.
        super().__init__("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)
        self.kept: dict[str, Tensor] = {}
        self.Mixed_6d.branch1x1.register_forward_hook(partial(_keep_spatial, self.kept))

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load strictly; the empty dictionary of the constructor is passed over."""
        return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> pool (B, 2048), spatial (B, 2023), logits without bias (B, 1008), float32."""
        x = resize_like_tensorflow(images.float(), self.INPUT_IMAGE_SIZE)  # (B, 3, 299, 299)
        x = x.sub_(128).div_(128)
        for name in _TRUNK:
            x = getattr(self, name)(x)
        pool = x.flatten(1)  # (B, 2048)
        return {"pool": pool, "spatial": self.kept.pop("spatial"), "logits": pool @ self.fc.weight.T}

    def fold_norms(self) -> None:
        """Make each normalisation part of the convolution before it, for evaluation: a tenth of the time."""
        for module in self.modules():
            if isinstance(getattr(module, "bn", None), nn.BatchNorm2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()


def _keep_spatial(kept: dict[str, Tensor], module: nn.Module, inputs: tuple, output: Tensor) -> None:
    """Note the features of sFID; a hook that is no method, so that the graph does not hold itself."""
    maps = output[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17), after ReLU
    # Row, column, channel: the order of the TensorFlow graph. sFID in another order is another number.
    kept["spatial"] = maps.permute(0, 2, 3, 1).flatten(1).contiguous()  # (B, 2023)


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) float32 to ``size`` x ``size`` as TensorFlow 1 does: corners at 0, no antialiasing.

    The bits are those of torch-fidelity's interpolation, which gathers four times what this does: rows first, then
    columns, each from the two neighbours at floor(i * H / size), in the same order of additions.
    """
    x = images.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C): rows are gathered whole
    for dim in (2, 1):
        length = x.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(length / size)
        low = place.long()
        share = (place - low.float()).view([-1 if d == dim else 1 for d in range(4)])
        near, far = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(length - 1))
        x = far.sub_(near).mul_(share).add_(near)
    return x.permute(0, 3, 1, 2)  # (B, C, size, size), channels last in memory


class Inception:
    """The Inception network of ADM's evaluator as a :class:`FeatureNetwork`.

    Args:
        graph: with its weights.
        weights_hash: sha256 of the weights file.
        device: where to run.
        warnings: carried into every result.

    The graph is taken over: its normalisations are folded into its convolutions.
    """

    name = "inception-v3-compat"
    dimensions = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}  # noqa: RUF012

    def __init__(self, graph: InceptionGraph, weights_hash: str, device: torch.device | str = "cpu", warnings=()):
        self.device = torch.device(device)
        graph.eval().requires_grad_(False).fold_norms()
        # channels_last is half as fast again on a CPU, and the numbers are the same to rounding.
        self.graph = graph.to(self.device, memory_format=torch.channels_last)
        self.weights_hash = weights_hash
        self.warnings = list(warnings)

    @full_precision()
    def __call__(self, images: np.ndarray | Tensor) -> dict[str, Tensor]:
        """uint8 images of any size, grey or RGB, in either layout -> pool, spatial and logits, float32."""
        pixels = to_nchw(images).to(self.device)
        return self.graph(pixels.expand(-1, 3, -1, -1))  # (B, 3, H, W)


def default_inception_path() -> Path:
    """Where torch's hub keeps the weights: ``$TORCH_HOME/hub/checkpoints/``, by default under ``~/.cache/torch``."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def load_inception(weights: str | os.PathLike | None = None, device: torch.device | str = "cpu") -> Inception:
    """Load the Inception network.

    Without ``weights`` the file is looked for at :func:`default_inception_path`, then downloaded to there, and
    must be the published one. With ``weights`` another file is accepted with a warning, which makes the scores
    not comparable.

    Raises:
        UserError: no file and no way to download it, a default file with another hash, or no Inception weights.
    """
    path = Path(weights) if weights is not None else default_inception_path()
    if not path.is_file():
        if weights is not None:
            raise UserError(f"--inception-weights {path}: no such file; check the path")
        _download(path)
    digest, warnings = file_hash(path), []
    if digest != INCEPTION_HASH:
        if weights is None:
            raise UserError(f"{path}: sha256 begins {digest[:12]}, not {INCEPTION_HASH[:12]}; the file is damaged or "
                            "another network's: remove it, or name it with --inception-weights to use it anyway")
        warnings.append(f"Inception weights {path} have sha256 {digest[:12]}..., not {INCEPTION_HASH[:12]}...: scores "
                        "are not comparable with published ones")
    graph = InceptionGraph()
    try:
        graph.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a foreign file can fail in any way while it is unpickled
        raise UserError(f"{path}: no Inception weights ({first_line(error)[:160]})") from None
    return Inception(graph, digest, device, warnings)


def _download(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_HASH)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(f"no Inception weights: looked at {path}, and {URL_INCEPTION_V3} cannot be downloaded "
                        f"({error}); put the file there, name it with --inception-weights FILE, or choose other "
                        "features (--features mnist, timm:NAME)") from None

