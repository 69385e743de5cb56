"""What all tests share: one thread, `gpu` tests skipped without CUDA, small models, code stores, runs and images."""

import gc
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

# `tests/` is on the path and holds a folder `mutor_img` of its own: the package's folder must come first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mutor_img.common.threads import set_spinning

set_spinning()  # before torch is loaded: the tests' own threads, and their child processes'
# What programs leave in the temporary folder, such as caches, sockets and logs, goes with the tests; what a test that
# fails wrote stays where pytest puts it.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="mutor_img_tests_")
multiprocessing.util.Finalize(None, shutil.rmtree, (tempfile.tempdir, True), exitpriority=-101)  # after its own folders

import numpy as np
import pytest
import torch
from launching import small_presets
from PIL import Image
from projection import Projection
from tiny_runs import write_generator, write_tokenizer

from mutor_img.blocks import ModelConfig
from mutor_img.common import cli
from mutor_img.common.config import load_config
from mutor_img.common.files import write_json
from mutor_img.data.store import CodesInfo, block_checksum
from mutor_img.metrics.digits import main as train_digits
from mutor_img.metrics.inception import InceptionGraph
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.log import RunLog
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime
from mutor_img.transformer import Transformer
from tokenizer.network.vq import VQModel

torch.set_num_threads(1)  # the same sums in the same order, and no contention between test workers

# Begun first: the two whose children are forks of this process, which then holds little, and the two whose tests take
# longest, which at the end one process would do while another waits.
FIRST = ("test_comparison.py", "test_study.py", "test_objectives_in_processes.py", "test_parallel.py")

RUN = """
data: {{codes: {codes}, val_codes: {codes}}}
model: {{preset: mnist, grid: [4, 5], vocabulary: 16, classes: 3, dropout: 0.0}}
registers: {{kind: 2d, count: 6, d_max: 3}}
optim: {{lr: 1e-2}}
train: {{steps: 3, global_batch: 4, precision: fp32, compile: false, log_every: 1, checkpoint_every: 1, keep: 9,
         validate_every: 0, picture_every: 0}}
"""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)  # stable: each file's tests stay together
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not item.keywords, which hold the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Have runs in this process draw no loss curve, which takes longer than their updates; ``curves`` draws it."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(RunLog, "draw", lambda self, names: None)


@pytest.fixture
def curves():
    """Have this test's runs draw their loss curve."""


@pytest.fixture(scope="session")
def random_model():
    """A factory of small transformers in eval mode with every weight drawn at random.

    At initialisation the head is zero, the norms are one and attention is nearly uniform: comparisons of such a
    model's logits would hold for any code. Here logits, attention weights and norms all vary at scale 1.
    """
    def build(grid=(4, 5), *, layers=2, heads=2, dim=32, vocabulary=11, classes=3, register_offsets=(), seed=0,
              dtype=torch.float32, **config):
        model = Transformer(ModelConfig(layers, heads, dim, tuple(grid), vocabulary, classes,
                                        register_offsets=register_offsets, **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.dim() == 1:
                    weight.copy_(1 + 0.3 * noise)
                else:
                    weight.copy_(noise if "embedding" in name else noise * weight.shape[1] ** -0.5)
        return model.to(dtype).eval()

    return build


@pytest.fixture
def run_of(random_model, tmp_path):
    """A factory of run folders of tiny generators (4 x 4 codes, 8-pixel grey images) with their tokenizer."""
    def build(name="run", vq=None, seed=0, **codes):
        vq = vq or write_tokenizer(tmp_path / "tokenizer")
        return write_generator(tmp_path / name, random_model((4, 4), seed=seed), vq, **codes)

    return build


@pytest.fixture
def usual_limits():
    """Compiling blocks sets process-wide limits; with this a test begins and ends with torch's own."""
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256,
                                    fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def refused(capsys):
    """Run a command that must refuse: exit status 2 and, as its last word, one line; returns that line."""

    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run(main, [str(word) for word in argv])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and lines[-1].startswith("error: ")
        return lines[-1]

    return call


class _NoCollector:
    """A context in which only what nobody refers to is freed: Python does not look for circles."""

    def __enter__(self):
        gc.collect()
        gc.disable()

    def __exit__(self, *error):
        gc.enable()


@pytest.fixture
def no_collector():
    return _NoCollector()


def write_codes(folder: Path, seed: int = 0, images: int = 10, views: int = 2, tokenizer_hash: str = "a" * 64,
                block: int = 10**9, vq: VQModel | None = None) -> Path:
    """Write a valid code store of 4 x 5 grids over 16 codes and 3 classes; with a tokenizer, of its 4 x 4 grids."""
    grid = vq.grid_for(vq.image_size) if vq else (4, 5)
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 16, (images, views, grid[0] * grid[1])).astype(np.uint16)
    labels = np.arange(images, dtype=np.int64) % 3
    np.save(folder / "codes.npy", codes)
    np.save(folder / "labels.npy", labels)
    tokenizer = (vq.image_size, vq.path, vq.hash) if vq else (32, "tok", tokenizer_hash)
    info = CodesInfo(grid, 16, ["a", "b", "c"], ["plain", "mirror"][:views], "center", *tokenizer,
                     [block_checksum(codes[i: i + block], labels[i: i + block]) for i in range(0, images, block)])
    write_json(folder / "codes.json", info.to_json())
    return folder


@pytest.fixture(scope="session")
def processes():
    """Return a context of processes that are forked from one that has imported everything, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mutor_img.pretraining.command"])
    return context


@pytest.fixture(scope="session")
def make_codes():
    """Return :func:`write_codes`."""
    return write_codes


@pytest.fixture
def codes_folder(tmp_path) -> Path:
    return write_codes(tmp_path / "codes")


@pytest.fixture
def run_file(tmp_path, codes_folder) -> Path:
    """A config file of a run of three updates; its run folder is tmp_path / "runs" / "run"."""
    path = tmp_path / "configs" / "run.yaml"
    path.parent.mkdir()
    path.write_text(RUN.format(codes=codes_folder))
    return path


@pytest.fixture
def tiny():
    """Shrink the presets, for runs in this process."""
    with small_presets():
        yield


@pytest.fixture
def run_training(run_file, tiny):
    """Return a function that trains the small run with overrides and returns its Trainer."""

    def run(*overrides: str):
        config = load_config(GeneratorConfig, run_file, overrides)
        runtime = Runtime.start(config.train.timeout_minutes)
        return train(GeneratorTask(config, runtime), config, runtime)

    return run


@pytest.fixture
def network():
    return Projection()


@pytest.fixture
def noise():
    """A function (count, seed) -> (count, 8, 8, 3) uint8."""
    return lambda count, seed=0: np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def bar_digits(count, seed):
    """Images (count, 32, 32) of one bright row each, at a height that is the class, and their labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 60, (count, 32, 32), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[6 + 8 * label : 10 + 8 * label, 6:26] = rng.integers(150, 256, (4, 20))
    return images, labels


@pytest.fixture(scope="session")
def digit_folders(tmp_path_factory):
    """{"train": an ImageFolder of 60 bars in 3 classes, "val": one of 18}."""
    root = tmp_path_factory.mktemp("digits")
    for seed, (name, count) in enumerate((("train", 60), ("val", 18))):
        for i, (image, label) in enumerate(zip(*bar_digits(count, seed))):
            path = root / name / str(label) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return {name: root / name for name in ("train", "val")}


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Inception weights drawn by Kaiming's rule: torch's own draw would leave features of 3e-8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = InceptionGraph()
        for module in graph.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(graph.state_dict(), path)
    return path


def coarse_noise(count, seed):
    """(count, 64, 64, 3) uint8 of upsampled low-resolution noise; per-pixel noise would look all alike to Inception."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return small.repeat(16, 1).repeat(16, 2)


@pytest.fixture(scope="session")
def coarse():
    return coarse_noise


@pytest.fixture(scope="session")
def coarse_images():
    return coarse_noise(6, 3)


@pytest.fixture(scope="session")
def classifier(digit_folders, tmp_path_factory):
    """The folder of a digit classifier that has seen the bars twice."""
    out = tmp_path_factory.mktemp("classifier")
    train_digits(["--images", str(digit_folders["train"]), "--val", str(digit_folders["val"]), "--out", str(out),
                  "--epochs", "2"])
    return out


@pytest.fixture
def run(random_model, tmp_path):
    """The run folder of a tiny generator (8 x 8 codes of 11, 3 classes) of grey 32-pixel images, with its tokenizer."""
    vq = write_tokenizer(tmp_path / "vq", multipliers=(1, 1, 2))
    return Path(write_generator(tmp_path / "run", random_model((8, 8)), vq, class_names=["0", "1", "2"], image_size=32))
