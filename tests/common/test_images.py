"""Reading image files: pixels of every mode against references of our own, and decoders that fail in their own ways."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from mutor_img.common.errors import UserError
from mutor_img.common.images import read_image

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file


def wide(values, mode="I;16"):
    """Return an image of 16-bit numbers."""
    return Image.frombytes(mode, values.shape[::-1], values.astype(">u2" if mode.endswith("B") else "<u2").tobytes())


SIXTEEN = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize("file", [
    saved(wide(SIXTEEN), "PNG"), saved(wide(SIXTEEN), "TIFF"), saved(wide(SIXTEEN, "I;16B"), "TIFF"),
    saved(Image.fromarray(SIXTEEN.astype(np.int32)), "PPM"),
    io.BytesIO(b"P5 16 16 65535 " + SIXTEEN.astype(">u2").tobytes())])
def test_sixteen_bits_are_scaled_by_their_range(file):
    expected = np.floor(SIXTEEN / 65535 * 255 + 0.5)
    assert np.array_equal(read_image(file, "L", name="x"), expected)
    assert np.array_equal(read_image(file, "RGB", name="x"), expected[..., None].repeat(3, -1))


def test_a_tiff_says_how_many_bits_it_uses_and_what_is_white():
    white_is_zero = saved(wide(SIXTEEN), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(read_image(white_is_zero, "L", name="x"), np.floor((1 - SIXTEEN / 65535) * 255 + 0.5))
    pairs = np.arange(0, 4096, 16, dtype=np.uint16).reshape(-1, 2)  # two numbers of 12 bits in three bytes
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    content = bytearray(saved(Image.fromarray(np.zeros((16, 24), np.uint8)), "TIFF").getvalue())
    content[-384:] = packed.astype(np.uint8).tobytes()
    entries = int.from_bytes(content[4:8], "little") + 2
    for place in range(entries, entries + 12 * int.from_bytes(content[entries - 2: entries], "little"), 12):
        tag = int.from_bytes(content[place: place + 2], "little")
        if tag in (256, 258):  # width, bits
            content[place + 8: place + 10] = (16 if tag == 256 else 12).to_bytes(2, "little")
    found = np.asarray(read_image(io.BytesIO(content), "L", name="x"))
    assert np.array_equal(found, np.floor(pairs.reshape(16, 16) / 4095 * 255 + 0.5))


def test_floats_in_the_unit_interval_are_scaled_and_others_refused():
    share = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(read_image(saved(Image.fromarray(share), "TIFF"), "L", name="x"), GREY)
    for values, words in ((share * 255, "from 0 to 255"), (share - 0.1, "from -0.1"), (share * np.nan, "nan")):
        with pytest.raises(UserError, match=rf"x\.tif: .*{words}.*must lie in \[0, 1\]"):
            read_image(saved(Image.fromarray(values), "TIFF"), name="x.tif")


def test_whole_numbers_of_unknown_range_are_refused():
    signed = saved(wide(SIXTEEN), "TIFF", tiffinfo={339: 2})
    for file in (saved(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"), signed):
        with pytest.raises(UserError, match=r"x\.tif: .*nothing tells their range"):
            read_image(file, name="x.tif")


def palette(image, **options):
    return saved(image.quantize(64), "PNG", **options)


PALETTE = np.asarray(Image.fromarray(COLOURS).quantize(64).convert("RGB"))
LUMA = (COLOURS.astype(np.int64) @ [19595, 38470, 7471] + 0x8000) >> 16  # Pillow's rounding of ITU-R 601-2


def with_alpha(values):
    return np.concatenate([values.reshape(16, 16, -1), GREY[..., None]], -1)


@pytest.mark.parametrize("file, grey, colours, close", [
    (saved(Image.fromarray(GREY), "PNG"), GREY, GREY, 0),
    (saved(Image.fromarray(GREY > 99), "PNG"), (GREY > 99) * 255, (GREY > 99) * 255, 0),
    (saved(Image.fromarray(COLOURS), "PNG"), LUMA, COLOURS, 0),
    (saved(Image.fromarray(with_alpha(GREY)), "PNG"), GREY, GREY, 0),
    (saved(Image.fromarray(with_alpha(COLOURS)), "PNG"), LUMA, COLOURS, 0),
    (saved(Image.fromarray(COLOURS), "PNG", transparency=(1, 2, 3)), LUMA, COLOURS, 0),
    (saved(Image.fromarray(GREY), "PNG", transparency=7), GREY, GREY, 0),
    (palette(Image.fromarray(COLOURS)), None, PALETTE, 0),
    (palette(Image.fromarray(COLOURS), transparency=3), None, PALETTE, 0),
    (palette(Image.fromarray(COLOURS), transparency=bytes(range(64))), None, PALETTE, 0),
    (saved(Image.fromarray(with_alpha(GREY)).convert("PA"), "TIFF"), GREY, GREY, 0),
    (saved(Image.fromarray(COLOURS).convert("CMYK"), "TIFF"), LUMA, COLOURS, 0),
    (saved(Image.fromarray(COLOURS).convert("YCbCr"), "TIFF"), LUMA, COLOURS, 3),
    (saved(Image.fromarray(COLOURS).convert("LAB"), "TIFF"), None, COLOURS, 24),  # out of sRGB's gamut at the ends
])
def test_every_mode_gives_its_colours(file, grey, colours, close):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {mode: np.asarray(read_image(file, mode, name="x")).astype(int) for mode in ("L", "RGB")}
    colours = np.broadcast_to(colours[..., None] if colours.ndim == 2 else colours, (16, 16, 3))
    assert np.abs(found["RGB"] - colours).max() <= close
    if grey is not None:
        assert np.abs(found["L"] - grey).max() <= (1 if close else 0)


ERRORS = [RuntimeError("codec"), NotImplementedError(), TypeError("a tuple"), AttributeError("None"), SyntaxError("no"),
          OverflowError("int"), RecursionError(), MemoryError(), KeyError(3), UserWarning("doubtful"),
          Image.DecompressionBombError("too many pixels"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "start")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", ["open", "load", "convert"])
def test_whatever_a_decoder_raises_names_the_image(error, stage, tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "x.png")
    owner = {"open": Image, "load": ImageFile.ImageFile, "convert": Image.Image}[stage]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(owner, stage, fail)
    with pytest.raises(UserError, match=r"x\.png: not a readable image \(.+\)") as caught:
        read_image(tmp_path / "x.png", "L")
    assert "\n" not in str(caught.value)


def test_a_person_who_stops_the_command_is_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
    Image.fromarray(COLOURS).save(tmp_path / "x.png")
    with pytest.raises(KeyboardInterrupt):
        read_image(tmp_path / "x.png")


def test_a_format_that_is_no_photograph_is_not_opened_under_another_name(tmp_path):
    for format in ("EPS", "SPIDER", "DDS"):
        image = Image.fromarray(COLOURS).convert("F" if format == "SPIDER" else "RGB")
        (tmp_path / "x.jpg").write_bytes(saved(image, format).getvalue())
        with pytest.raises(UserError, match=r"x\.jpg: not a readable image \(cannot identify image file"):
            read_image(tmp_path / "x.jpg")


def test_what_is_gone_or_no_plain_file_is_named(tmp_path):
    (tmp_path / "x.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "y.png")
    (tmp_path / "z.png").mkdir()
    for name, message in (("x", r"no such image file \(a link to gone\.png\)"), ("y", "not a plain file"),
                          ("z", "not a plain file"), ("none", "no such image file")):
        with pytest.raises(UserError, match=rf"{name}\.png: {message}"):
            read_image(tmp_path / f"{name}.png")


def test_a_changed_bit_of_a_png_is_found_or_changes_no_pixel():
    pixels = np.full((8, 8, 3), 7, np.uint8)
    whole, refusals = saved(Image.fromarray(pixels), "PNG").getvalue(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        try:
            assert np.array_equal(read_image(io.BytesIO(damaged), name="x"), pixels), place
        except UserError:
            refusals += 1
    assert refusals > len(whole) / 2
