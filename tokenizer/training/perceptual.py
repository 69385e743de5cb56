"""LPIPS: how different two images look, by the features of VGG16 (Zhang et al., arXiv 1801.03924, version 0.1).

The network is torchvision's VGG16 and five linear heads fitted to people's judgements. Both weight files are other
people's: they are looked for on disk, must have their published hashes, and are read without trusting pickle.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from mutor_img.checkpoints.folder import load_strict
from mutor_img.checkpoints.llamagen import read_pt
from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash

VGG_FILE = "vgg16-397923af.pth"  # torchvision's IMAGENET1K_V1
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
VGG_HASH = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"  # sha256
HEADS_FILE = "vgg.pth"  # weights/v0.1 of the package lpips
HEADS_HASH = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
SMALLEST = 16  # pixels per side, of which four poolings leave one
_TAPS = (3, 8, 15, 22, 29)  # the last ReLU before each pooling, and before the one that is left out
_WIDTHS = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """The distance, a frozen network in eval mode; its weights are unset until loaded."""

    def __init__(self):
        super().__init__()
        from torchvision.models import vgg16  # seconds to import

        with torch.device("meta"):  # without the classifier, whose 124 million weights nobody needs
            features = vgg16(weights=None, init_weights=False).features[: _TAPS[-1] + 1]
        self.features = features.to_empty(device="cpu")
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in _WIDTHS)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distance of each pair: (B, 3 or 1, H, W) in [-1, 1], twice -> (B,) fp32; grey is repeated."""
        total = torch.zeros(len(images), device=images.device)
        for head, a, b in zip(self.heads, self._directions(images), self._directions(others)):
            squares = (a - b).square()  # (B, C, h, w)
            total = total + torch.einsum("bchw,c->b", squares, head.weight.flatten()) / squares[0, 0].numel()
        return total

    def _directions(self, images: Tensor) -> list[Tensor]:
        """Return the features before each pooling, (B, C, h, w) fp32, of unit length over their channels."""
        x, found = (images.expand(-1, 3, -1, -1) - self.mean) / self.scale, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                # vector_norm has a gradient of 0 where all channels are 0; the root of a sum of squares has none.
                length = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)  # (B, 1, h, w)
                found.append(x.float() / (length + 1e-10))
        return found


def find_files(folder: str | Path | None = None) -> tuple[Path, Path]:
    """Return where the weights of VGG16 and of the heads should be; they need not be there.

    Args:
        folder: holds both, ``vgg16-397923af.pth`` and ``vgg.pth``; None: torch's hub folder
            (``$TORCH_HOME/hub/checkpoints``), and for the heads the installed package lpips where there is one.
    """
    if folder is not None:
        return Path(folder) / VGG_FILE, Path(folder) / HEADS_FILE
    cache, package = Path(torch.hub.get_dir()) / "checkpoints", find_spec("lpips")  # found without importing it
    heads = Path(package.origin).parent / "weights" / "v0.1" if package and package.origin else cache
    return cache / VGG_FILE, heads / HEADS_FILE


def load_lpips(folder: str | Path | None = None, device: torch.device | str = "cpu") -> LPIPS:
    """Return LPIPS with its published weights; ``folder`` as in :func:`find_files`.

    Raises:
        UserError: a file is missing, has another hash than the published one, or cannot be read.
    """
    vgg, heads = find_files(folder)
    _check(vgg, VGG_HASH, f"download {VGG_URL}")
    _check(heads, HEADS_HASH, "it is weights/v0.1/vgg.pth of the package lpips: pip install lpips")
    lpips = LPIPS()
    weights = read_pt(vgg)
    load_strict(lpips.features, {name.removeprefix("features."): weights[name] for name in weights
                                 if name.startswith("features.")}, vgg)
    linear = read_pt(heads)
    load_strict(lpips.heads, {name.removeprefix("lin").replace(".model.1.", "."): linear[name] for name in linear},
                heads)
    return lpips.to(device)


def _check(path: Path, expected: str, source: str) -> None:
    where = "name the folder that holds both files with loss.lpips_weights or --lpips-weights"
    if not path.is_file():
        raise UserError(f"no LPIPS weights: {path} is missing; {source} and put it there, or {where}")
    digest = file_hash(path)
    if digest != expected:
        raise UserError(f"{path}: sha256 begins {digest[:12]}, not {expected[:12]}: the file is damaged, or not that "
                        f"of LPIPS; {source}, or {where}")
