"""Loading generators: run folders, released files, and everything that is none of them."""

import argparse
import json

import pytest
import torch

from mutor_img import draw_registers, load_checkpoint
from mutor_img.blocks import ModelConfig
from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.checkpoints.loading import config_from_weights, load_run
from mutor_img.common.errors import UserError
from mutor_img.common.files import file_hash, read_json
from mutor_img.transformer import Transformer

LABELS, CODES = torch.tensor([0, 2]), torch.arange(14).view(2, 7) % 11


def write_run(folder, model, ema=None, step=5, **meta):
    groups = {"model": model.state_dict(), **({"ema": ema.state_dict()} if ema else {})}
    return write_checkpoint(folder, step, groups, {"kind": "generator", "model": model.config.to_json(), **meta}, 2)


def same(model, other):
    with torch.no_grad():
        return torch.equal(model(LABELS, CODES), other(LABELS, CODES))


@pytest.fixture
def released(random_model):
    """A model of 16 x 16 codes whose heads are dim // 64."""
    return random_model((16, 16), heads=2, dim=128, register_offsets=None)


def test_a_run_folder_and_its_checkpoint_folder_give_the_model_back(random_model, tmp_path):
    model = random_model(register_offsets=(1, 4))
    folder = write_run(tmp_path / "run", model)
    for path in (tmp_path / "run", folder, folder / "checkpoint.json", str(folder)):
        loaded = load_checkpoint(path)
        assert same(loaded, model) and loaded.config == model.config and not loaded.training
    run = load_run(tmp_path / "run")
    assert (run.path, run.which, run.meta["step"]) == (folder, "raw", 5)
    assert run.weights_hash == file_hash(folder / "model.safetensors")


def test_averaged_weights_are_the_default_where_there_are_any(random_model, tmp_path):
    raw, average = random_model(seed=0), random_model(seed=1)
    folder = write_run(tmp_path, raw, average)
    assert same(load_checkpoint(tmp_path), average) and same(load_checkpoint(tmp_path, ema=True), average)
    assert same(load_checkpoint(tmp_path, ema=False), raw)
    assert load_run(tmp_path).weights_hash == file_hash(folder / "ema.safetensors")


@pytest.mark.parametrize("wrap", [None, "model", "module", "state_dict"])
def test_a_released_file_is_read_off_its_shapes(released, tmp_path, wrap):
    weights = dict(released.state_dict(), freqs_cis=torch.zeros(3))
    torch.save({wrap: weights, "args": argparse.Namespace(lr=1)} if wrap else weights, tmp_path / "c2i.pt")
    loaded = load_checkpoint(tmp_path / "c2i.pt")
    assert same(loaded, released)
    assert loaded.config == ModelConfig(2, 2, 128, (16, 16), 11, 3)
    assert load_run(tmp_path / "c2i.pt").weights_hash == file_hash(tmp_path / "c2i.pt")


def test_a_released_file_is_raw_unless_its_average_is_asked_for(released, random_model, tmp_path):
    average = random_model((16, 16), heads=2, dim=128, register_offsets=None, seed=1)
    torch.save({"model": released.state_dict(), "ema": average.state_dict()}, tmp_path / "c2i.pt")
    assert same(load_checkpoint(tmp_path / "c2i.pt"), released)
    assert same(load_checkpoint(tmp_path / "c2i.pt", ema=True), average)
    assert load_run(tmp_path / "c2i.pt", ema=True).which == "ema"


def test_grid_and_heads_of_a_bare_file_are_the_callers(random_model, tmp_path):
    model = random_model((4, 5), heads=4, dim=32, register_offsets=None)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    assert same(load_checkpoint(tmp_path / "small.pt", grid=(4, 5), heads=4), model)
    assert not same(load_checkpoint(tmp_path / "small.pt", grid=(4, 4), heads=4), model)
    assert load_checkpoint(tmp_path / "small.pt").config.heads == 1  # dim // 64, at least 1


def test_the_grid_may_be_a_list(random_model, tmp_path):
    folder = write_run(tmp_path / "run", random_model((4, 5)))
    assert load_checkpoint(folder, grid=[4, 5]).config.grid == (4, 5)


def test_the_grid_is_the_files_where_it_says_it_and_else_an_assumption(random_model, tmp_path):
    model = random_model((24, 24), heads=1, dim=32, register_offsets=None)
    says, silent = tmp_path / "says.pt", tmp_path / "silent.pt"
    torch.save({"model": {**model.state_dict(), "freqs_cis": torch.zeros(577, 16, 2)}}, says)
    torch.save({"model": model.state_dict()}, silent)
    for options in ({}, {"grid": (24, 24)}):
        loaded = load_run(says, **options)
        assert same(loaded.model, model) and loaded.model.config.grid == (24, 24) and not loaded.guessed_grid
    assert load_run(silent).guessed_grid and load_run(silent).model.config.grid == (16, 16)
    assert not load_run(silent, grid=(24, 24)).guessed_grid and same(load_checkpoint(silent, grid=(24, 24)), model)
    with pytest.raises(UserError, match=r"says\.pt: its rotary table .* is for 24 x 24 codes, but .* 16 x 16"):
        load_checkpoint(says, grid=(16, 16))


@pytest.mark.parametrize("name", ["mnist", "B"])
def test_heads_of_a_preset_are_recognised(name):
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(name, vocabulary=16, classes=2))
    assert config_from_weights(model.state_dict(), "x.pt", (16, 16)).heads == ModelConfig.preset(name).heads


@pytest.mark.parametrize(("rows", "grid", "offsets"), [
    (1, (4, 5), ()), (3, (4, 5), (1, 5, 6)), (8, (4, 5), (1, 2, 5, 6, 7, 10, 11, 12)), (4, (4, 5), (1, 2, 3, 4)),
    (24, (4, 6), tuple(range(1, 25))),
])
def test_the_rows_of_a_bare_register_embedding_are_offsets(random_model, tmp_path, rows, grid, offsets):
    model = random_model(grid, register_offsets=offsets)
    assert len(model.register_embedding.weight) == rows
    torch.save(model.state_dict(), tmp_path / "small.pt")
    loaded = load_checkpoint(tmp_path / "small.pt", grid=grid, heads=2)
    assert loaded.config.register_offsets == offsets
    anchors, drawn = draw_registers("1d", None, 1, grid, 0, 0, torch.arange(2))
    targets = torch.zeros(2, grid[0] * grid[1] - 1, dtype=torch.int64)
    for ours, theirs in zip(loaded(LABELS, targets, anchors, drawn), model(LABELS, targets, anchors, drawn)):
        assert torch.equal(ours, theirs)


def test_dtype_casts_the_weights_and_not_the_rotary_table(random_model, tmp_path):
    write_run(tmp_path, random_model())
    loaded = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert loaded.output.weight.dtype == torch.bfloat16 and loaded.rope.table.dtype == torch.float32


def test_a_released_file_keeps_its_dtype(released, tmp_path):
    torch.save(released.bfloat16().state_dict(), tmp_path / "c2i.pt")
    assert load_checkpoint(tmp_path / "c2i.pt").output.weight.dtype == torch.bfloat16


def test_loading_leaves_the_global_random_state_alone(random_model, tmp_path):
    write_run(tmp_path, random_model())
    before = torch.get_rng_state()
    load_checkpoint(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def broken(case, model, folder):
    """Make the path of one kind of mistake; returns it, the options of the call, and words of the message."""
    file, weights = folder / "x.pt", model.state_dict()
    if case == "nothing":
        return folder / "absent", {}, "no such file or folder"
    if case == "empty folder":
        return folder, {}, "no complete checkpoint"
    if case == "tokenizer file":
        torch.save({"model": {"quantize.embedding.weight": torch.zeros(2, 2)}}, file)
        return file, {}, "weights of a tokenizer"
    if case == "foreign file":
        torch.save({"conv.weight": torch.zeros(2, 2)}, file)
        return file, {}, "not a generator in LlamaGen's layout"
    if case == "no weights":
        file.write_bytes(b"hello")
        return file, {}, "not a PyTorch weights file"
    if case in ("missing", "unknown", "shape", "gap"):
        name = "layers.1.attention.wo.weight"
        changed = {"missing": {}, "unknown": {**weights, "extra.weight": torch.zeros(1)},
                   "shape": {**weights, name: torch.zeros(3, 3)},
                   "gap": {**weights, "layers.900.attention.wo.weight": torch.zeros(3, 3)}}[case]
        changed = changed or {k: v for k, v in weights.items() if k != name}
        torch.save(changed, file)
        return file, {"heads": 2}, {"missing": f"{name!r} is missing", "unknown": "'extra.weight'",
                                    "shape": "has shape (3, 3)", "gap": "901 layers"}[case]
    if case == "heads of a file":
        torch.save(weights, file)
        return file, {"heads": 5}, "5 heads"
    if case == "no average in a file":
        torch.save(weights, file)
        return file, {"ema": True}, "no EMA weights"
    saved = write_run(folder, model)
    if case == "tokenizer run":
        write_run(folder, model, step=6, kind="tokenizer")
        return folder, {}, "a checkpoint of a tokenizer, not of a generator"
    if case == "a file of a run":
        return saved / "model.safetensors", {}, "part of a checkpoint; give its folder"
    if case == "damaged":
        path = saved / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        return folder, {}, "damaged"
    if case in ("no model", "strange model"):
        meta = read_json(saved / "checkpoint.json")
        meta["model"] = {**meta["model"], "colour": 1} if case == "strange model" else None
        (saved / "checkpoint.json").write_text(json.dumps(meta))
        return folder, {}, "does not describe a generator"
    return {"no average": (folder, {"ema": True}, "holds no EMA weights; give --weights raw"),
            "grid": (folder, {"grid": (16, 16)}, "the run has (4, 5)"),
            "heads": (folder, {"heads": 7}, "the run has 2")}[case]


@pytest.mark.parametrize("key, change", [
    ("model", {"heads": 3}), ("model", {"dropout": 7}), ("model", {"dim": "x"}), ("codes", 3),
    ("codes", {"tokenizer": 3}), ("codes", {"class_names": ["one"]}), ("codes", {"class_names": [1, 2, 3]}),
])
def test_metadata_that_a_stranger_wrote_is_one_line_that_names_it(key, change, random_model, tmp_path):
    path = write_run(tmp_path / "run", random_model()) / "checkpoint.json"
    meta = read_json(path)
    meta[key] = {**meta.get(key, {}), **change} if isinstance(change, dict) else change
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "run")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", [
    "nothing", "empty folder", "tokenizer file", "foreign file", "no weights", "missing", "unknown", "shape",
    "gap", "heads of a file", "no average in a file", "tokenizer run", "a file of a run", "damaged", "no model",
    "strange model",
    "no average", "grid", "heads",
])
def test_what_does_not_fit_is_one_clear_line(case, random_model, tmp_path):
    path, options, words = broken(case, random_model(), tmp_path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path, **options)
    assert words in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)
