"""The networks of taming-transformers and MaskGIT a second time, in float64, as functions of their files' names.

Written from arXiv 2012.09841 and 2202.04200, and from the shapes that the names of the weights tell.
"""

import torch
import torch.nn.functional as F
from reference_vq import attention, block, conv, normed, swish


def there(w, form):
    """The numbers from 0 on for which there is such a weight."""
    number = 0
    while form.format(number) in w:
        yield number
        number += 1


def doubled(x):
    return torch.kron(x.contiguous(), torch.ones(2, 2, dtype=x.dtype))


def taming_level(w, name, x, groups):
    for j in there(w, name + ".block.{}.conv1.weight"):
        x = block(w, f"{name}.block.{j}", x, groups)
        if f"{name}.attn.{j}.q.weight" in w:
            x = attention(w, f"{name}.attn.{j}", x, groups)
    if f"{name}.downsample.conv.weight" in w:
        x = conv(w, f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    if f"{name}.upsample.conv.weight" in w:
        x = conv(w, f"{name}.upsample.conv", doubled(x))
    return x


def taming_middle(w, name, x, groups):
    x = attention(w, f"{name}.attn_1", block(w, f"{name}.block_1", x, groups), groups)
    return block(w, f"{name}.block_2", x, groups)


def taming_latents(w, images, groups=32):
    x = conv(w, "encoder.conv_in", images.double())
    for level in there(w, "encoder.down.{}.block.0.conv1.weight"):
        x = taming_level(w, f"encoder.down.{level}", x, groups)
    x = swish(normed(w, "encoder.norm_out", taming_middle(w, "encoder.mid", x, groups), groups))
    return conv(w, "quant_conv", conv(w, "encoder.conv_out", x))


def taming_pictures(w, latents, groups=32):
    x = conv(w, "decoder.conv_in", conv(w, "post_quant_conv", latents))
    x = taming_middle(w, "decoder.mid", x, groups)
    for level in reversed(list(there(w, "decoder.up.{}.block.0.conv1.weight"))):
        x = taming_level(w, f"decoder.up.{level}", x, groups)
    return conv(w, "decoder.conv_out", swish(normed(w, "decoder.norm_out", x, groups))).clamp(-1, 1)


def plain(w, name, x):
    """A convolution without a bias that keeps the size."""
    return F.conv2d(x, w[f"{name}.weight"].double(), padding="same")


def maskgit_block(w, name, x, groups):
    y = plain(w, f"{name}.conv1", swish(normed(w, f"{name}.norm1", x, groups)))
    y = plain(w, f"{name}.conv2", swish(normed(w, f"{name}.norm2", y, groups)))
    return x + y if y.shape == x.shape else y + plain(w, f"{name}.nin_shortcut", y)


def maskgit_blocks(w, form, x, groups):
    for j in there(w, form + ".conv1.weight"):
        x = maskgit_block(w, form.format(j), x, groups)
    return x


def maskgit_latents(w, images, groups=32):
    x = plain(w, "encoder.conv_in", (images.double() + 1) / 2)
    for level in there(w, "encoder.down.{}.block.0.conv1.weight"):
        if level:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        x = maskgit_blocks(w, f"encoder.down.{level}.block.{{}}", x, groups)
    x = maskgit_blocks(w, "encoder.mid.{}", x, groups)
    return conv(w, "encoder.conv_out", swish(normed(w, "encoder.norm_out", x, groups)))


def maskgit_pictures(w, latents, groups=32):
    x = maskgit_blocks(w, "decoder.mid.{}", conv(w, "decoder.conv_in", latents), groups)
    for level in reversed(list(there(w, "decoder.up.{}.block.0.conv1.weight"))):
        x = maskgit_blocks(w, f"decoder.up.{level}.block.{{}}", x, groups)
        if level:
            x = conv(w, f"decoder.up.{level}.upsample_conv", doubled(x))
    return conv(w, "decoder.conv_out", swish(normed(w, "decoder.norm_out", x, groups))).clamp(0, 1) * 2 - 1


def nearest(w, latents):
    """The codes of latents (B, C, h, w) by Euclidean distance, and these codes laid out in their place."""
    table = w["quantize.embedding.weight"].double()
    rows = latents.permute(0, 2, 3, 1)  # (B, h, w, C)
    codes = torch.cdist(rows.flatten(0, 2), table).argmin(1).view(rows.shape[:3])
    return codes.flatten(1), table[codes].permute(0, 3, 1, 2)
