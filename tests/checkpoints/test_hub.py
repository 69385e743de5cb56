"""Checkpoints and tokenizers on the Hugging Face Hub: named, fetched once, verified, published; one line if not."""

import errno
import importlib.metadata
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from fake_hub import serve
from tiny_runs import sample, write_tokenizer

from mutor_img import Transformer, generate, load_checkpoint, push_to_hub, save_pretrained
from mutor_img.checkpoints.folder import find_checkpoint
from mutor_img.checkpoints.loading import load_run
from mutor_img.common import cli
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json, write_json
from mutor_img.common.hub import hub_folder, pinned
from mutor_img.convert import main as convert
from mutor_img.metrics.samples import manifest_of
from tokenizer import VQModel, load_tokenizer

constants = pytest.importorskip("huggingface_hub.constants")
NAME = "hf://org/model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, which is the one that huggingface_hub asks, and an empty cache."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        file = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def offline(monkeypatch):
    """A function after whose call nothing may ask for the network."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_pushed_comes_back_with_the_same_weights_and_draws_the_same_samples(hub, run_of, tmp_path):
    run = run_of()
    name = push_to_hub(run, "org/model")
    assert name == f"{NAME}@{hub.refs['org/model', 'main']}"
    there = Transformer.from_pretrained("org/model")
    assert same(there, load_checkpoint(run)) and generate(there, torch.tensor([1]), seed=3).shape == (1, 16)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")  # the packed one is taken
    first = sample(NAME, tmp_path / "hub.npz", count=9)
    (tmp_path / "elsewhere").rename(tmp_path / "tokenizer")
    second = sample(run, tmp_path / "run.npz", count=9)
    assert first.read_bytes() == second.read_bytes()
    ours, theirs = (read_json(manifest_of(path)) for path in (first, second))
    assert ours["weights_hash"] == theirs["weights_hash"] and ours["tokenizer_hash"] == theirs["tokenizer_hash"]


def test_nothing_but_the_files_of_the_checkpoint_is_published_or_fetched(hub, run_of):
    run = run_of()
    push_to_hub(run, "org/model")
    files = hub.commits["org/model", hub.refs["org/model", "main"]]
    assert set(files) == {"checkpoint.json", "model.safetensors", "README.md", "tokenizer/checkpoint.json",
                          "tokenizer/model.safetensors"}
    hub.add("org/model", {**files, "pytorch_model.bin": b"a pickle", "other.safetensors": b"of something else"})
    hub.asked.clear()
    folder = hub_folder(NAME)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(files) - {"README.md"}
    assert not any("pytorch_model" in path or "other" in path for path in hub.asked)


def test_the_card_tells_the_run_its_scores_and_their_protocol_and_no_other_weights_scores(hub, run_training, make_codes,
                                                                                        tmp_path):
    vq = write_tokenizer(tmp_path / "vq", vocabulary=16)
    make_codes(tmp_path / "square", vq=vq)
    trainer = run_training(f"data.codes={tmp_path}/square", f"data.val_codes={tmp_path}/square", "model.grid=[4,4]",
                           "train.ema=0.9", "train.validate_every=1", "train.picture_every=3", "pictures.per_class=1")
    run = trainer.run_dir
    result = {"fid": 12.345, "num_samples": 50, "features": "inception-v3-compat", "weights_sha256": "f" * 64,
              "reference": {"name": "ref.npz", "role": "generation", "statistics": "of the file", "sha256": "e" * 64},
              "labels": "random", "comparable": False,
              "samples": {"manifest": {"weights_hash": load_run(run).weights_hash, "cfg_scale": 1.75}}}
    write_json(run / "scores.json", result)
    other = {**result, "fid": 99.5, "samples": {"manifest": {"weights_hash": "0" * 64}}}
    write_json(run / "old.json", other)
    push_to_hub(run, "org/model", licence="mit")
    files = hub.commits["org/model", hub.refs["org/model", "main"]]
    card = files["README.md"].decode()
    for word in ("license: mit", "12.3450", "cfg_scale 1.75", "e" * 64, "f" * 8, "val_next_token", vq.hash,
                 load_run(run).weights_hash, "averaged (EMA)", "d_max: 3", "hf://org/model", "after update 3",
                 trainer.task.codes.content_hash()):
        assert word in card, word
    assert "99.5" not in card
    assert files["samples.png"] == (run / "pictures" / "samples_00000003.png").read_bytes()
    assert "ema.safetensors" in files and not {"model.safetensors", "optimizer.safetensors"} & set(files)
    assert load_run(NAME).weights_hash == load_run(run).weights_hash
    with pytest.raises(UserError, match=r"old.json: no scores of these weights"):
        push_to_hub(run, "org/model", scores=[run / "old.json"])


def test_a_card_without_a_licence_has_a_place_for_it(hub, tmp_path):
    folder = save_pretrained(write_tokenizer(tmp_path / "vq").path, tmp_path / "out")
    assert "To be filled in" in (folder / "README.md").read_text()
    assert same(VQModel.from_pretrained(folder), load_tokenizer(tmp_path / "vq"))
    with pytest.raises(UserError, match="out exists already"):
        save_pretrained(tmp_path / "vq", folder)


def test_converted_weights_are_published_with_a_tokenizer_and_claim_no_training(random_model, tmp_path):
    torch.save({"model": random_model((4, 4), dim=128, register_offsets=None).state_dict()}, tmp_path / "c2i.pt")
    write_tokenizer(tmp_path / "tokenizer")
    convert(["--source", str(tmp_path / "c2i.pt"), "--grid", "4x4", "--out", str(tmp_path / "converted")])
    folder = save_pretrained(tmp_path / "converted", tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    card = (folder / "README.md").read_text()
    assert "Its weights were converted with mutor_img" in card
    assert "It was trained" not in card and "| updates |" not in card
    tokenizer_hash = read_json(manifest_of(sample(str(folder), tmp_path / "s.npz", count=3)))["tokenizer_hash"]
    assert read_json(folder / "checkpoint.json")["codes"]["tokenizer_hash"] == tokenizer_hash


def test_a_full_disk_leaves_no_half_of_a_copy(run_of, tmp_path, monkeypatch):
    run = run_of()

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(run, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_changed_number_in_a_published_checkpoint_is_found(run_of, tmp_path):
    described = save_pretrained(run_of(), tmp_path / "out") / "checkpoint.json"
    for file in (described, described.parent / "tokenizer" / "checkpoint.json"):
        assert read_json(file) and '"seal": "' in file.read_text()
    described.write_text(described.read_text().replace('"step": ', '"step": 9'))
    with pytest.raises(UserError, match="its seal does not fit"):
        load_checkpoint(described.parent)


def test_what_was_published_can_be_published_again_from_the_model_that_was_read(hub, run_of, tmp_path):
    name = push_to_hub(run_of(), "hf://org/model")
    assert name.startswith(f"{NAME}@")
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")  # the packed one is taken
    there = Transformer.from_pretrained("org/model")
    assert same(Transformer.from_pretrained(there.save_pretrained(tmp_path / "copy")), there)
    Transformer.from_pretrained(tmp_path / "copy").push_to_hub("org/copy")
    ours, theirs = (hub.commits[repo, hub.refs[repo, "main"]] for repo in ("org/model", "org/copy"))
    assert {**ours, "README.md": b""} == {**theirs, "README.md": b""}


@pytest.mark.parametrize("repo", ["model", "org/model@v1", "org/model/file", "", "./model", "org/a model"])
def test_a_repository_that_cannot_be_published_to_is_one_line_before_anything_is_read(repo):
    with pytest.raises(UserError, match=r"not the name of a model on the Hub|published to the default branch"):
        push_to_hub("absent", repo)


@pytest.mark.parametrize("path", ["/nowhere", "/nowhere/run", "./runs/run", "runs/a/b", "../run", "run.pt"])
def test_a_path_with_nothing_there_is_not_asked_for_on_the_hub(hub, path):
    with pytest.raises(UserError, match=f"^{re.escape(path)}: no such file or folder"):
        Transformer.from_pretrained(path)
    assert not hub.asked


def test_a_damaged_line_of_the_log_is_named_before_anything_is_published(run_of, tmp_path):
    (Path(run_of()) / "metrics.jsonl").write_text('{"loss": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: lacks 'step'; correct or remove that line"):
        save_pretrained(tmp_path / "run", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_tokenizer_keeps_its_hash_and_is_called_by_its_commit(hub, tmp_path):
    own = write_tokenizer(tmp_path / "vq")
    name = own.push_to_hub("org/vq")
    there = load_tokenizer("hf://org/vq@main")
    assert there.hash == own.hash and there.path == name and same(there, own)
    with torch.no_grad():
        own.post_quant_conv.weight.add_(1)
    with pytest.raises(UserError, match=r"weights are not those that .* publishes"):
        own.push_to_hub("org/vq")


def test_a_tokenizer_with_its_own_name_on_the_hub_is_named_and_not_packed(hub, run_of, tmp_path):
    vq = write_tokenizer(tmp_path / "vq")
    name = vq.push_to_hub("org/vq")
    push_to_hub(run_of(vq=vq), "org/model", tokenizer="hf://org/vq")
    assert load_run(NAME).codes["tokenizer"] == name
    (tmp_path / "vq").rename(tmp_path / "away")
    assert sample(NAME, tmp_path / "s.npz", count=3).is_file()


def test_another_tokenizer_than_the_codes_is_neither_published_nor_used(hub, run_of, tmp_path):
    write_tokenizer(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"other: its weights have sha256 .* made by a tokenizer with"):
        push_to_hub(run_of(), "org/model", tokenizer=tmp_path / "other")
    folder = save_pretrained(run_of("second"), tmp_path / "out")
    for name in ("checkpoint.json", "model.safetensors"):
        (folder / "tokenizer" / name).write_bytes((find_checkpoint(tmp_path / "other") / name).read_bytes())
    hub.add_folder("org/model", folder)
    with pytest.raises(UserError, match=r"its weights have sha256"):
        sample(NAME, tmp_path / "s.npz", count=3)


def test_weights_that_differ_from_their_hash_are_refused(hub, run_of, tmp_path):
    push_to_hub(run_of(), "org/model")
    files = dict(hub.commits["org/model", hub.refs["org/model", "main"]])
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"!"
    hub.add("org/model", files)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(NAME)


def test_what_is_cached_needs_no_network_and_a_pinned_commit_asks_for_nothing(hub, run_of, offline):
    push_to_hub(run_of(), "org/model")
    first = load_checkpoint(NAME)
    hub.asked.clear()
    assert same(load_checkpoint(pinned(NAME)), first)
    assert hub.asked == ["GET /api/models/org/model/revision/main"]  # what pinned asked
    offline()
    assert same(load_checkpoint(NAME), first) and same(load_checkpoint(Path(NAME)), first)


def test_a_revision_means_its_own_weights(hub, run_of, tmp_path):
    for seed, branch in ((0, "main"), (1, "v2")):
        hub.add_folder("org/model", save_pretrained(run_of(str(seed), seed=seed), tmp_path / branch), branch)
    assert same(load_checkpoint(f"{NAME}@v2"), load_checkpoint(tmp_path / "v2"))
    assert same(Transformer.from_pretrained("org/model", revision="v2"), load_checkpoint(tmp_path / "v2"))
    assert not same(load_checkpoint(NAME), load_checkpoint(tmp_path / "v2"))


COMMANDS = [
    ("mutor_img.sampling", "--checkpoint {} --out s.npz"),
    ("mutor_img.sampling", "--checkpoint {run} --tokenizer {} --out s.npz"),
    ("mutor_img.evaluation.command", "--checkpoint {} --reference r.npz"),
    ("mutor_img.sweep.__main__", "--checkpoint {} --reference r.npz"),
    ("mutor_img.convert", "--source {} --out new"),
    ("tokenizer.encode", "--tokenizer {} --images {images} --out new"),
    ("tokenizer.reconstruct", "--tokenizer {} --images {images}"),
    ("tokenizer.inspect", "--codes {codes} --tokenizer {} --out c.png"),
    ("mutor_img.pretraining.command", "--config {config} init_from={}"),
]


@pytest.mark.parametrize("module, words", COMMANDS, ids=[f"{module} {words.split()[-1]}" for module, words in COMMANDS])
def test_every_command_takes_a_name_and_says_in_one_line_that_it_is_unknown(
        module, words, hub, run_of, run_file, codes_folder, digit_folders, tiny, monkeypatch, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = import_module(module)
    if hasattr(command, "load_network"):  # which would want weights first
        monkeypatch.setattr(command, "load_network", lambda *arguments: None)
    words = words.format("hf://org/none", run=run_of(), images=digit_folders["val"], codes=codes_folder,
                         config=run_file)
    with pytest.raises(SystemExit) as stopped:
        cli.run(command.main, words.split())
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: hf://org/none: no such repository"), last
    assert [path for path in Path().rglob("*") if path.is_file()] == []


def test_the_page_takes_a_name(hub, run_of):
    from mutor_img.app.command import _parser, open_sides

    push_to_hub(run_of(), "org/model")
    assert open_sides(_parser().parse_args(["--checkpoint", NAME]))[0].path == NAME


def test_codes_made_by_a_tokenizer_on_the_hub_name_its_commit(hub, digit_folders, tmp_path):
    name = write_tokenizer(tmp_path / "vq", multipliers=(1, 1, 2), image_size=32).push_to_hub("org/vq")
    import_module("tokenizer.encode").main(["--tokenizer", "hf://org/vq", "--images", str(digit_folders["val"]),
                                            "--out", str(tmp_path / "codes"), "--workers", "0"])
    assert read_json(tmp_path / "codes" / "codes.json")["tokenizer"] == name


def test_a_sweep_of_a_name_is_written_here_and_not_into_the_cache():
    from mutor_img.sweep.__main__ import _default_folder

    assert _default_folder(f"{NAME}@v1") == Path("sweep_model@v1")


MALFORMED = ["hf://model", "hf:org/model", "hf://org/model/file", "hf://org/model@", "hf://", "hf://org/a..b--c"]


@pytest.mark.parametrize("name, line", [
    *((name, r"not the name of a model on the Hub.*; give hf://org/name") for name in MALFORMED),
    ("hf://org/model@v9", "no such revision"),
    ("hf://org/gated", "gated; ask for access on its page, then log in"),
    ("hf://org/foreign", "has no checkpoint.json"),
    ("hf://org/another", "its format is None, not 'mutor_img checkpoint 1'"),
    ("hf://org/odd", "its format is None, not 'mutor_img checkpoint 1'"),
    ("hf://org/vq", "a checkpoint of a tokenizer, not of a generator"),
])
def test_a_name_that_means_no_generator_of_ours_is_one_line(hub, run_of, tmp_path, name, line):
    hub.add("org/model", {"README.md": b""})
    hub.add("org/gated", {"README.md": b""})
    hub.gated.add("org/gated")
    hub.add("org/foreign", {"model.safetensors": b"x" * 100})
    hub.add("org/another", {"checkpoint.json": b"[1]"})
    hub.add("org/odd", {"checkpoint.json": b'{"files": {"/etc/passwd": 1}}'})
    hub.add_folder("org/vq", find_checkpoint(write_tokenizer(tmp_path / "vq").path))
    with pytest.raises(UserError, match=line) as caught:
        load_checkpoint(name)
    text = str(caught.value)
    assert "\n" not in text and (name in text or "models--org--" in text)
    assert not any("resolve" in path and "org/foreign" in path for path in hub.asked)


def test_no_network_and_nothing_cached_is_one_line(hub, offline, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"not complete in the cache .* be reached"):
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        load_checkpoint(NAME)
    offline()
    with pytest.raises(UserError, match=r"not complete in the cache .* HF_HUB_OFFLINE is set"):
        load_checkpoint(NAME)
    with pytest.raises(UserError, match="no connection to"):
        import_module("mutor_img.common.hub").import_hub("x")
        with import_module("mutor_img.common.hub").hub_errors("x"):
            import_module("huggingface_hub").HfApi().create_repo("org/model")


@pytest.mark.parametrize("found, line", [(None, "needs the package huggingface_hub"), ("1.9.0", "1.9.0 is installed")])
def test_without_the_extra_a_name_says_what_to_install(monkeypatch, found, line):
    def version(package):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr("mutor_img.common.hub.version", version)
    with pytest.raises(UserError, match=rf"^{NAME}: .*{line}.*pip install 'mutor_img\[hub\]'"):
        load_checkpoint(NAME)


def test_who_may_not_write_is_told_to_log_in(hub, tmp_path):
    hub.writable = False
    with pytest.raises(UserError, match=r"^hf://org/vq: .* answered 401 .*; log in with: hf auth login"):
        write_tokenizer(tmp_path / "vq").push_to_hub("org/vq")
    assert not hub.commits


@pytest.mark.parametrize("out", ["--out hf://org/model/", "--grid hf://org/grid.png"])
def test_an_output_is_no_name_on_the_hub(run_of, out):
    with pytest.raises(UserError, match="a name on the Hugging Face Hub, from which commands only read"):
        import_module("mutor_img.sampling").main(["--checkpoint", run_of(), *out.split()])
