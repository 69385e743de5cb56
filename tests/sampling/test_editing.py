"""sample.py --keep and --mix-with: what is kept, what the manifest says of it, and mistakes in one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from reference import sampling as reference
from tiny_runs import edit_flags, sample, write_tokenizer

from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common.errors import UserError
from mutor_img.sampling import main
from mutor_img.sampling.editing import kept_codes
from mutor_img.sampling.pictures import GREY
from tokenizer import load_tokenizer
from tokenizer.network.maskgit import MaskGITModel


def test_cells_without_white_keep_their_codes_and_the_others_follow_the_model(run_of, random_model, tmp_path):
    run, flags = run_of(), edit_flags(tmp_path)  # white: rows 3, 4, 5 of column 5, in cells of 2 x 2 pixels
    made = sample(run, tmp_path / "s.npz", *flags, "--classes", "dog", count=3)
    vq = load_tokenizer(tmp_path / "tokenizer")
    photo = torch.from_numpy(np.array(Image.open(tmp_path / "photo.png"))).float()[None, None] / 127.5 - 1
    kept = vq.encode(photo)[0].tolist()
    for cell in (6, 10):  # (1, 2) and (2, 2) of 4 x 4
        kept[cell] = -1
    codes = [reference.sample(random_model((4, 4)), 1, number, cfg_scale=2.0, kept=kept)[0] for number in range(3)]
    pixels = vq.decode(torch.tensor(codes))  # (3, 1, 8, 8)
    expected = torch.clamp(127.5 * pixels + 128.0, 0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(made)["arr_0"], expected.repeat(3, -1))
    assert len({tuple(code) for code in codes}) > 1
    manifest = json.loads((tmp_path / "s.json").read_text())
    assert manifest["kept"] == kept and ["--keep", manifest["keep"], "--mask", manifest["mask"]] == flags


def test_a_set_made_with_an_edit_is_no_set_without_it(run_of, tmp_path):
    run, flags = run_of(), edit_flags(tmp_path)
    sample(run, tmp_path / "kept.npz", *flags, count=3)
    sample(run, tmp_path / "mixed.npz", "--mix-with", "red fox", "--mix-share", "0.25", count=3)
    sample(run, tmp_path / "small.npz", "--resize", "4", count=3)
    manifest = json.loads((tmp_path / "mixed.json").read_text())
    assert (manifest["mix_with"], manifest["mix_share"], manifest["kept"]) == (2, 0.25, None)
    for name, words in (("kept", "was made with kept"), ("mixed", "made with mix_with 2, now it is None"),
                        ("small", "made with resize 4, now it is None")):
        with pytest.raises(UserError, match=words):
            sample(run, tmp_path / f"{name}.npz", count=3)
    edit_flags(tmp_path, slice(0, 1))  # another mask of the same name
    with pytest.raises(UserError, match="was made with kept"):
        sample(run, tmp_path / "kept.npz", *flags, count=3)


def test_a_strip_shows_what_is_kept_from_the_beginning(run_of, tmp_path):
    main(["--checkpoint", run_of(), "--show-steps", str(tmp_path / "s.png"), *edit_flags(tmp_path)])
    first = np.asarray(Image.open(tmp_path / "s.png"))[2:98, -8 * 98 : -7 * 98 - 2]  # two codes of 16
    grey = [(first[y : y + 24, x : x + 24] == GREY).all() for y in range(0, 96, 24) for x in range(0, 96, 24)]
    assert [cell for cell in range(16) if grey[cell]] == [6, 10]


def maskgit(folder):
    model = MaskGITModel(channels=8, multipliers=(1, 2), blocks=1, code_dim=4, vocabulary=11, groups=4)
    write_checkpoint(folder, 1, {"model": model.state_dict()}, {"kind": "tokenizer", "model": model.options,
                                                                "image_size": 8}, 1)
    return load_tokenizer(folder)


@pytest.mark.parametrize("tokenizer", [lambda folder: write_tokenizer(folder, image_channels=3), maskgit],
                         ids=["vq", "maskgit"])
def test_a_cell_is_made_anew_for_a_single_white_pixel_of_a_colour_image(tmp_path, tokenizer):
    mask = np.zeros((8, 4), np.uint8)
    mask[7, 0], mask[0, 2] = 128, 127  # white enough, and not
    for name, pixels in (("photo", np.zeros((8, 4, 4), np.uint8)), ("mask", mask)):  # one with transparency
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    kept = kept_codes(tokenizer(tmp_path / "vq"), (4, 2), str(tmp_path / "photo.png"), str(tmp_path / "mask.png"))
    assert [cell for cell, code in enumerate(kept) if code < 0] == [6]


@pytest.mark.parametrize(("flags", "words"), [
    (["--keep", "photo.png"], "--keep does nothing without --mask; give both"),
    (["--mask", "mask.png"], "--mask does nothing without --keep"),
    (["--mix-share", "0.3"], "--mix-share does nothing without --mix-with"),
    (["--mix-with", "dgo"], "--mix-with: unknown class 'dgo'; did you mean 'dog'"),
    (["--mix-with", "dog,cat"], "--mix-with is 'dog,cat'; give one class"),
    (["--mix-with", "dog", "--mix-share", "2"], "mix_share is 2.0; give a value in [0.0, 1.0]"),
    (["--keep", "photo.png", "--mask", "small.png"],
     "small.png: is 4 x 2 pixels, but photo.png is of 8 x 8; resize or crop it first"),
    (["--keep", "small.png", "--mask", "mask.png"],
     "small.png: is 4 x 2 pixels, but the model makes images of 8 x 8; resize or crop it first"),
    (["--keep", "photo.png", "--mask", "black.png"], "black.png: has no white pixel"),
    (["--keep", "photo.png", "--mask", "white.png"], "white.png: covers every cell of photo.png"),
    (["--keep", "absent.png", "--mask", "mask.png"], "absent.png: no such image file"),
    (["--keep", "text.png", "--mask", "mask.png"], "text.png: not a readable image"),
    (["--keep", "photo.png", "--mask", "mask.png", "--tokenizer", "absent"], "absent"),
    (["--keep", "photo.png", "--mask", "mask.png", "--grid", "photo.png"], "--grid photo.png is --keep itself"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_clear_line(run_of, tmp_path, monkeypatch, flags, words):
    run = run_of()
    monkeypatch.chdir(tmp_path)
    edit_flags(tmp_path)
    for name, pixels in (("small", np.zeros((2, 4), np.uint8)), ("black", np.zeros((8, 8), np.uint8)),
                         ("white", np.full((8, 8), 255, np.uint8))):
        Image.fromarray(pixels).save(f"{name}.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError) as error:
        main(["--checkpoint", run, "--out", "s.npz", *flags])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("s.*"))
