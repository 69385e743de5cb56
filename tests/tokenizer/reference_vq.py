"""The tokenizer's network written a second time, in float64, as functions of a released file's weight names."""

import torch
import torch.nn.functional as F


def conv(w, name, x, stride=1):
    weight = w[f"{name}.weight"].double()
    return F.conv2d(x, weight, w[f"{name}.bias"].double(), stride, padding="same" if stride == 1 else 0)


def normed(w, name, x, groups):
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    scale, shift = (w[f"{name}.{part}"].double()[:, None, None] for part in ("weight", "bias"))
    return parts.reshape(x.shape) * scale + shift


def swish(x):
    return x / (1 + torch.exp(-x))


def block(w, name, x, groups):
    y = conv(w, f"{name}.conv1", swish(normed(w, f"{name}.norm1", x, groups)))
    y = conv(w, f"{name}.conv2", swish(normed(w, f"{name}.norm2", y, groups)))
    return y + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def attention(w, name, x, groups):
    y = normed(w, f"{name}.norm", x, groups)
    q, k, v = (conv(w, f"{name}.{part}", y).flatten(2) for part in "qkv")  # (B, C, positions)
    share = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=2)
    return x + conv(w, f"{name}.proj_out", torch.einsum("bij,bcj->bci", share, v).reshape(x.shape))


def level(w, name, x, groups):
    for j in range(9):
        if f"{name}.res.{j}.conv1.weight" in w:
            x = block(w, f"{name}.res.{j}", x, groups)
        if f"{name}.attn.{j}.q.weight" in w:
            x = attention(w, f"{name}.attn.{j}", x, groups)
    if f"{name}.downsample.conv.weight" in w:
        below = torch.cat([x, torch.zeros_like(x[:, :, :1])], dim=2)
        x = conv(w, f"{name}.downsample.conv", torch.cat([below, torch.zeros_like(below[..., :1])], dim=3), stride=2)
    if f"{name}.upsample.conv.weight" in w:
        x = conv(w, f"{name}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return x


def middle(w, name, x, groups):
    x = block(w, f"{name}.0", x, groups)
    return block(w, f"{name}.2", attention(w, f"{name}.1", x, groups), groups)


def latents(w, images, groups, levels):
    x = conv(w, "encoder.conv_in", images.double())
    for index in range(levels):
        x = level(w, f"encoder.conv_blocks.{index}", x, groups)
    x = swish(normed(w, "encoder.norm_out", middle(w, "encoder.mid", x, groups), groups))
    return conv(w, "quant_conv", conv(w, "encoder.conv_out", x))


def pictures(w, codes, side, groups, levels):
    rows = w["quantize.embedding.weight"].double()[codes]  # (B, N, code_dim)
    rows = rows / rows.square().sum(2, keepdim=True).sqrt()
    x = conv(w, "post_quant_conv", rows.transpose(1, 2).reshape(len(codes), -1, side, side))
    x = middle(w, "decoder.mid", conv(w, "decoder.conv_in", x), groups)
    for index in range(levels):
        x = level(w, f"decoder.conv_blocks.{index}", x, groups)
    return conv(w, "decoder.conv_out", swish(normed(w, "decoder.norm_out", x, groups))).clamp(-1, 1)
