"""What processes see for themselves decides nothing: rank 0 looks, all compare. Two gloo processes try all of it."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import join, launch, small_presets
from PIL import Image
from projection import Projection
from tiny_runs import NAMES, write_generator, write_tokenizer

from mutor_img import blocks
from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common import files
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.common.locks import claim, folder_lock
from mutor_img.data.store import Codes
from mutor_img.decoding.sampler import SamplingSettings
from mutor_img.metrics.extraction import extract
from mutor_img.metrics.image_sets import FolderImages
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.sampling import main as sample
from mutor_img.sampling import options
from mutor_img.sampling.archive import SampleArchive
from mutor_img.sweep import points
from mutor_img.sweep.points import SweepPoint
from mutor_img.training.command import run_task
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime
from tokenizer import load_tokenizer
from tokenizer.encode import encode_images
from tokenizer.images.folder import list_images
from tokenizer.store import StoreWriter
from tokenizer.train import TokenizerTask
from tokenizer.training.config import TokenizerConfig

RUN = """
data: {{codes: {codes}, val_codes: {codes}}}
model: {{preset: mnist, grid: [4, 5], vocabulary: 16, classes: 3, dropout: 0.0}}
registers: {{kind: 2d, count: 6, d_max: 3}}
train: {{steps: 2, global_batch: 4, precision: fp32, compile: false, checkpoint_every: 0, validate_every: 0,
         picture_every: 0, ema: 0.9, check_ranks_every: 1}}
"""


TOKENIZER = """
run_dir: new
data: {images: many, image_size: 16, crop_min: 1.0, workers: 1}
model: {preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}
train: {steps: 1, global_batch: 2, precision: fp32, compile: false}
"""


def run(root: Path, *overrides: str) -> None:
    config = load_config(GeneratorConfig, root / "run.yaml", overrides)
    runtime = Runtime.start(3)
    train(GeneratorTask(config, runtime), config, runtime)


def flip(root: Path) -> None:
    """Train while a bit of rank 1's weights flips in the second update."""
    good = GeneratorTask.after_update

    def after(task, model, step, skipped):
        if os.environ["RANK"] == "1" and step == 1:
            model.output.weight.data.view(torch.int32)[3, 2] ^= 1
        return good(task, model, step, skipped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneratorTask, "after_update", after)
        run(root, f"run_dir={root}/flipped", "train.steps=4")


def encode(root: Path, out: str, images: str | Path = "") -> None:
    encode_images(load_tokenizer(root / "tokenizer"), list_images(images or root / "images"), root / out,
                  runtime=Runtime.start(), views=["plain"])


def draw(root: Path, out: str) -> None:
    sample(["--checkpoint", str(root / "generator"), "--out", str(root / out), "--num-samples", "150"])


def score(root: Path, stale: bool) -> None:
    """Sweep over three points, the first of which rank 0 finds kept; notes what was scored."""
    rows = [SweepPoint(scale, 1.0)._asdict() for scale in (1.0, 2.0, 3.0)]
    scored = []

    def evaluate(images, *arguments, **options):
        scored.append(images.settings.cfg_scale)
        torch.distributed.barrier()
        return {"fd": 1.0} if torch.distributed.get_rank() == 0 else {}

    source = SimpleNamespace(settings=SamplingSettings(), loaded=SimpleNamespace(model=SimpleNamespace(
        config=SimpleNamespace(vocabulary=16))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "_at", lambda source, point: SimpleNamespace(
            settings=dataclasses.replace(source.settings, **point._asdict())))
        for name, value in (("evaluate", evaluate), ("GeneratedImages", lambda source, *_: source),
                            ("resolve", lambda *_: ["fid"]), ("sweep_key", lambda *_: {"seed": 1}),
                            ("_read", lambda *_: rows[1:] if stale else rows[:1])):
            patch.setattr(points, name, value)
        list(points.sweep(source, [SweepPoint(**row) for row in rows], 10, None, None))
    (root / f"scored_{os.environ['RANK']}.json").write_text(json.dumps(scored))


def look(error: Exception | None = None) -> int:
    """Look as rank 0; on any other rank it is a mistake to look."""
    assert os.environ["RANK"] == "0"
    if error:
        raise error
    return 7


def work(rank: int, world: int, port: int, root: Path) -> None:
    """What each of the two processes tries; what it is told is noted."""
    join(rank, world, port)
    blocks.PRESETS["mnist"], files.PATIENCE = (2, 2, 16), 2.0
    os.chdir(root / f"disk{rank}")  # relative paths are on a disk of one's own
    runtime, told, stale = Runtime.start(3), {}, rank == 1
    write = {"checkpoint on rank 0 alone": lambda: run(root, "run_dir=first", "train.steps=4"),
             "checkpoint on rank 1 alone": lambda: run(root, "run_dir=second", "train.steps=4"),
             "another checkpoint": lambda: run(root, "run_dir=third", "train.steps=4"),
             "another setting": lambda: run(root, "run_dir=new", f"optim.lr={0.01 + rank}"),
             "a flipped bit": lambda: flip(root),
             "another run_dir": lambda: run(root, f"run_dir={root}/own{rank}"),
             "other codes": lambda: run(root, "run_dir=new", "data.codes=codes"),
             "other held-out codes": lambda: run(root, "run_dir=new", "data.val_codes=codes"),
             "another init_from": lambda: run(root, "run_dir=new", "init_from=third"),
             "an owned run_dir": lambda: run_task(GeneratorTask, load_config(
                 GeneratorConfig, root / "run.yaml", [f"run_dir={root}/owned"])),
             "a run_dir on a disk of one's own": lambda: run(root, "run_dir=apart"),
             "codes on a disk of one's own": lambda: encode(root, os.path.abspath("new codes")),
             "samples on a disk of one's own": lambda: draw(root, os.path.abspath("new.npz")),
             "another number of samples": lambda: sample([
                 "--checkpoint", str(root / "generator"), "--out", str(root / "s.npz"), "--num-samples",
                 str(10 + rank)]),
             "other images to encode": lambda: encode(root, "refused", "many"),
             "a tokenizer's other images": lambda: TokenizerTask(
                 load_config(TokenizerConfig, root / "tokenizer.yaml", []), runtime),
             "other images": lambda: extract(FolderImages("pngs"), Projection(), statistics={"pool"}, rows=set()),
             "a mistake of rank 0": lambda: runtime.from_main(lambda: look(UserError("no such thing"))),
             "a closed disk of rank 0": lambda: runtime.from_main(lambda: look(PermissionError(13, "denied", "x")))}
    for name, act in write.items():
        try:
            act()
            told[name] = "nothing"
        except (UserError, OSError) as error:
            told[name] = str(error)
    told["what rank 0 sees"] = runtime.from_main(look)
    for name, view in {"sees none": False, "sees all": True}.items():
        with pytest.MonkeyPatch.context() as patch:
            if stale:
                for owner in (StoreWriter, SampleArchive):
                    patch.setattr(owner, "is_done", lambda *_, view=view: view)
                patch.setattr(StoreWriter, "finished", lambda *_, view=view: view)
                patch.setattr(SampleArchive, "is_finished", lambda *_, view=view: view)
                patch.setattr(options, "newest_of", lambda path, fallback: f"{path}/checkpoints/step_00000003")
            encode(root, f"codes {name}")
            draw(root, f"{name}.npz")
    score(root, stale)
    (root / f"told_{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_codes, processes, random_model) -> Path:
    """A folder in which two processes, each with a disk of its own beside the one they share, have tried everything."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "run.yaml").write_text(RUN.format(codes=make_codes(root / "codes")))
    (root / "tokenizer.yaml").write_text(TOKENIZER)
    vq = write_tokenizer(root / "tokenizer")
    write_generator(root / "generator", random_model((4, 4)), vq)  # step 3
    about = {"tokenizer": vq.path, "tokenizer_hash": vq.hash, "class_names": NAMES, "image_size": 8}
    newer = random_model((4, 4), seed=1)
    write_checkpoint(root / "generator", 4, {"model": newer.state_dict()}, {
        "kind": "generator", "model": newer.config.to_json(), "codes": about}, keep=2)
    for label in "ab":
        (root / "images" / label).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{number}.png")
    for rank in range(2):
        disk = root / f"disk{rank}"
        make_codes(disk / "codes", seed=rank)
        (disk / "many" / "a").mkdir(parents=True)
        for number in range(3 + rank):
            Image.fromarray(np.zeros((16, 16), np.uint8)).save(disk / "many" / "a" / f"{number}.png")
        (disk / "pngs").mkdir()
        for number in range(5 + rank):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(disk / "pngs" / f"{number}.png")
    with small_presets():
        for place in ("disk0/first", "disk1/second", "disk0/third", "disk1/third"):
            run(root, f"run_dir={root / place}", f"seed={int(place == 'disk1/third')}")
    encode(root, "codes of one")
    draw(root, "one.npz")
    with claim(folder_lock(root / "owned")), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MUTOR_IMG_LOCKS")  # the two are no commands of this process
        assert launch(processes, 2, work, root) == [0, 0]
    return root


def told(root: Path) -> dict[str, str]:
    both = [json.loads((root / f"told_{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]  # nobody goes on alone
    return both[0]


@pytest.mark.parametrize("what, words", [
    ("checkpoint on rank 0 alone", "the step of the checkpoint to go on from is nothing on rank 1, but 2 on rank 0; "
                                   "run_dir=first must be one folder"),
    ("checkpoint on rank 1 alone", "the step of the checkpoint to go on from is 2 on rank 1, but nothing on rank 0"),
    ("another checkpoint", "the hash of its checkpoint.json is "),
    ("another setting", "optim.lr is 1.01 on rank 1, but 0.01 on rank 0; start every process with the same command"),
    ("a flipped bit", "step 2: model output.weight of rank 1 is not that of rank 0"),
    ("another run_dir", "own1 on rank 1, but "),
    ("other codes", "the content of codes is "),
    ("other held-out codes", "the content of codes is "),
    ("another init_from", "the content of init_from=third is "),
    ("a run_dir on a disk of one's own", "does not see what another one wrote; run_dir must be on a file system that"),
    ("codes on a disk of one's own", "does not see what another one wrote; --out must be on a file system that all"),
    ("samples on a disk of one's own", "does not see what another one wrote; --out must be on a file system that all"),
    ("another number of samples", "num_samples is 11 on rank 1, but 10 on rank 0"),
    ("other images to encode", " on rank 1, but "),
    ("a tokenizer's other images", "the list of images in many is "),
    ("other images", "of the features, the number is 6 on rank 1, but 5 on rank 0"),
    ("a mistake of rank 0", "no such thing"),
    ("a closed disk of rank 0", "[Errno 13] denied: 'x'"),
])
def test_processes_that_differ_are_told_alike_in_what_and_on_which_rank(root, what, words):
    said = told(root)[what]
    assert words in said and "\n" not in said


def test_rank_0_owns_an_output_for_all_and_all_hear_who_owns_it(root):
    assert f"owned: process {os.getpid()} on host " in told(root)["an owned run_dir"]


def test_rank_0_alone_looks(root):
    assert told(root)["what rank 0 sees"] == 7


def test_nothing_is_left_of_what_was_refused(root):
    assert not list(root.rglob("*.lock")) and not (root / "disk0" / "new").exists()


@pytest.mark.parametrize("view", ["sees none", "sees all"])
def test_a_stale_view_of_a_disk_splits_no_work_twice_and_leaves_none(root, view):
    for name in ("codes.npy", "labels.npy", "codes.json"):
        assert (root / f"codes {view}" / name).read_bytes() == (root / "codes of one" / name).read_bytes()
    assert len(Codes(root / f"codes {view}")) == 24
    assert (root / f"{view}.npz").read_bytes() == (root / "one.npz").read_bytes()
    assert json.loads((root / f"{view}.json").read_text())["step"] == 4  # though rank 1 took step 3 for the newest


def test_a_stale_view_of_kept_scores_has_no_process_wait_for_ever(root):
    assert [json.loads((root / f"scored_{rank}.json").read_text()) for rank in range(2)] == [[2.0, 3.0]] * 2
