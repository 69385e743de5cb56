"""Every command's core on CUDA tensors without a GPU: no tensors of two devices meet, and nothing waits unseen.

Each walk names the functions that may read from the GPU. An update reads nothing, and ``Sent`` what it has made, later.
"""

import itertools

import numpy as np
import pytest
import timm
import torch
from fake_cuda import FakeCuda, HostRead, MixedDevices
from tiny_runs import write_generator, write_tokenizer

from mutor_img.checkpoints.folder import find_checkpoint
from mutor_img.common.config import load_config
from mutor_img.common.files import read_json, write_json
from mutor_img.data.store import Codes
from mutor_img.decoding.drafting import SOURCES, Drafts
from mutor_img.metrics import inception as inception_module
from mutor_img.metrics.digits import DigitFeatures, DigitNet
from mutor_img.metrics.evaluator import evaluate
from mutor_img.metrics.image_sets import ArrayImages
from mutor_img.metrics.inception import Inception, InceptionGraph
from mutor_img.metrics.references import as_reference
from mutor_img.metrics.timm_features import TimmFeatures
from mutor_img.pretraining.command import main as train_generator
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.scores import as_sampled
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.registers import RegisterLaw
from mutor_img.sampling.command import main as sample
from mutor_img.training.numbers import Sent
from mutor_img.training.runtime import Runtime
from mutor_img.training.stopping import StopRequest
from mutor_img.training.trainer import Trainer
from tokenizer import load_tokenizer, scores
from tokenizer.encode import main as encode
from tokenizer.inspect import decoded_grid
from tokenizer.reconstruct import reconstruct_folder
from tokenizer.train import main as train_tokenizer
from tokenizer.training import losses
from tokenizer.training.perceptual import LPIPS

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

GPU = Runtime(torch.device("cuda"))
OPEN, UPDATE = "mutor_img.pretraining.task.open_codes", "mutor_img.training.numbers.Sent.__init__"
SAVE = ("mutor_img.checkpoints.tensor_files._bytes_of", "mutor_img.training.parallel.not_finite")
TO_NHWC = "mutor_img.common.images.to_nhwc"
CHECKS = tuple(f"tokenizer.network.interface.ImageTokenizer.{name}" for name in ("_check_images", "_check_codes"))
PICTURES = ("mutor_img.decoding.sampler.Sampler.generate", CHECKS[1], TO_NHWC)


@pytest.mark.parametrize("mixed", [
    lambda cpu, gpu: cpu + gpu,
    lambda cpu, gpu: cpu[gpu],
    lambda cpu, gpu: gpu[cpu],
    lambda cpu, gpu: gpu.index_put_((cpu,), gpu),
    lambda cpu, gpu: torch.where(gpu > 0, gpu, cpu),
    lambda cpu, gpu: torch.cat([cpu, gpu]),
    lambda cpu, gpu: gpu.index_select(0, cpu),
    lambda cpu, gpu: gpu.gather(0, cpu),
    lambda cpu, gpu: torch.nn.functional.embedding(cpu, gpu[:, None].float()),
])
def test_tensors_of_two_devices_are_refused(mixed):
    with FakeCuda(), pytest.raises(MixedDevices):
        mixed(torch.arange(3), torch.arange(3, device="cuda"))


@pytest.mark.parametrize("read", [
    lambda gpu: gpu[0].item(), lambda gpu: bool((gpu > 0).all()), lambda gpu: gpu.tolist(), lambda gpu: int(gpu.max()),
    lambda gpu: gpu.cpu(), lambda gpu: gpu.to("cpu"), lambda gpu: gpu.nonzero(), lambda gpu: gpu[gpu > 0],
    lambda gpu: torch.zeros(3).copy_(gpu), lambda gpu: torch.bincount(gpu, minlength=3), lambda gpu: gpu.unique(),
    lambda gpu: [1, 2, 3][gpu[0]], lambda gpu: torch.equal(gpu, gpu), lambda gpu: gpu.masked_select(gpu > 0),
])
def test_a_read_from_the_gpu_is_refused(read):
    with FakeCuda(), pytest.raises(HostRead):
        read(torch.arange(3, device="cuda"))


def test_the_gradient_of_a_fake_tensor_is_made_on_its_device():
    with FakeCuda():
        weight = torch.nn.Parameter(torch.ones(2, 3, device="cuda"))
        (torch.ones(4, 2).to("cuda") @ weight).square().mean().backward()
        assert weight.grad.device == weight.device == torch.device("cuda:0")


def test_cpu_tensors_keep_their_numbers_and_a_permission_that_nobody_needs_is_an_error():
    with FakeCuda():
        assert torch.arange(3).tolist() == [0, 1, 2] and torch.ones(2).to("cuda").device.type == "cuda"
    with pytest.raises(AssertionError, match="never read"), FakeCuda([OPEN]):
        pass


def generator(run_file, *overrides):
    settings = ["train.steps=2", "train.precision=bf16", "train.ema=0.9", *overrides]
    return load_config(GeneratorConfig, run_file, settings)


LAWS = [
    ("registers.kind=none",),
    ("registers.kind=none", "model.loss_chunk=7", "model.dropout=0.1", "model.drop_path=0.2"),
    ("registers.kind=2d", "registers.count=6", "train.activation_checkpointing=true"),
    ("registers.kind=2d", "registers.count=null", "registers.wrap=false", "train.micro_batch=2", "model.loss_chunk=7"),
    ("registers.kind=1d", "registers.count=6", "registers.mixed_offsets=true", "train.precision=fp32"),
    ("registers.kind=1d", "registers.count=null", "registers.every=2", "registers.embedding=per_offset",
     "optim.clip=0"),
    ("registers.kind=none", "objective.kind=mirai"),
]


@pytest.mark.parametrize("overrides", LAWS)
def test_an_update_of_a_generator_reads_nothing(run_file, tiny, overrides):
    config = generator(run_file, *overrides)
    with FakeCuda([OPEN]):
        trainer = Trainer(GeneratorTask(config, GPU), config, GPU)
        trainer.apply(trainer.gradients(StopRequest()))
        assert trainer.model.output.weight.device == trainer.best_model.output.weight.device == torch.device("cuda:0")


def test_the_numbers_of_an_update_are_sent_without_waiting_for_them():
    with FakeCuda([UPDATE]) as gpu:
        values = {"loss": torch.ones((), device="cuda"), "lr": 0.1}
        sent = Sent(values)
        assert gpu.waits == 0 and sent.read() == {"loss": 0.0, "lr": 0.1}  # FakeCuda makes numbers up


@pytest.mark.parametrize("most, overrides", [
    (15, ("registers.kind=none",)), (30, ("registers.kind=none", "model.dropout=0.1")), (40, ("registers.count=6",)),
    (40, ("registers.count=null", "registers.wrap=false"))])
def test_what_a_gpu_does_before_the_first_block_is_little(run_file, tiny, most, overrides):
    config, seen = generator(run_file, *overrides), []
    with FakeCuda([OPEN]) as gpu:
        trainer = Trainer(GeneratorTask(config, GPU), config, GPU)
        trainer.apply(trainer.gradients())
        trainer.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(gpu.kernels))
        before = gpu.kernels
        trainer.gradients()
    assert 0 < seen[0] - before <= most


def test_a_generators_run_its_pictures_and_its_resume(run_file, codes_folder, tiny, tmp_path):
    vq = write_tokenizer(tmp_path / "vq", vocabulary=16)
    info = read_json(codes_folder / "codes.json")
    write_json(codes_folder / "codes.json", {**info, "tokenizer": vq.path, "tokenizer_hash": vq.hash,
                                             "image_size": None})
    overrides = ("pictures.per_class=1", "train.validate_every=1", "train.ema=0.9", "train.precision=bf16")
    with FakeCuda([OPEN, UPDATE, *SAVE, "mutor_img.pretraining.held_out.next_token_loss", *PICTURES]):
        train_generator(["--config", str(run_file), *overrides, "train.steps=1", "train.picture_every=1"])
    assert len(list((tmp_path / "runs" / "run" / "pictures").glob("*.png"))) == 1
    with FakeCuda([OPEN, UPDATE, *SAVE, "mutor_img.pretraining.held_out.next_token_loss"]):
        train_generator(["--config", str(run_file), *overrides, "train.steps=2"])
    assert find_checkpoint(tmp_path / "runs" / "run").name == "step_00000002"


@pytest.mark.parametrize("fixed", [False, True])
def test_flexattentions_mask_and_its_anchors(random_model, fixed):
    law = RegisterLaw("2d", (4, 5), 3, None if fixed else 6)
    with FakeCuda():
        model = random_model().to("cuda")
        anchors, _ = law.draw(0, 0, torch.arange(2, device="cuda"))
        model.use_flex(anchors, fixed)
        model.flex.update(law.draw(0, 1, torch.arange(2, device="cuda"))[0])
        assert model.flex.block_mask.kv_indices.device == model.flex.anchors.device == torch.device("cuda:0")


TOKENIZER = """
data: {{images: {images}, image_size: 32, workers: 1}}
model: {{preset: mnist, channels: 8, vocabulary: 32, code_dim: 4}}
loss: {{discriminator_channels: 4, discriminator_layers: 1, adversarial_start: 0}}
revival: {{after: 1, until: 1.0}}
train: {{steps: 1, global_batch: 4, micro_batch: 2, precision: bf16, compile: false, log_every: 1, checkpoint_every: 1,
        validate_every: 1, picture_every: 1}}
"""


@pytest.mark.parametrize("resumed, overrides", [
    (False, ["data.crop_min=1", "train.precision=fp32"]),
    (True, ["data.mirror=false", "loss.entropy=0.1", "loss.adversarial_weight=0.5", "loss.terms={l2: 1, lpips: 1}",
            "train.ema=0.9"]),
])
def test_a_tokenizers_run_its_pictures_and_its_resume(digit_folders, tmp_path, monkeypatch, resumed, overrides):
    monkeypatch.setattr(losses, "load_lpips", lambda folder, device: LPIPS().to(device))
    path = tmp_path / "tokenizer.yaml"
    path.write_text(TOKENIZER.format(images=digit_folders["train"]))
    command = ["--config", str(path), f"run_dir={tmp_path}/run", *overrides]
    with FakeCuda([UPDATE, *SAVE, TO_NHWC]):
        train_tokenizer(command)
    if resumed:
        with FakeCuda([UPDATE, *SAVE, TO_NHWC]):
            train_tokenizer([*command, "train.steps=2", f"data.val_images={digit_folders['val']}"])
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 1 + resumed


@pytest.mark.parametrize("crop, views", [(["--crop", "ten-crop"], 10), ([], 2), (["--crop", "random"], 10)])
def test_encoding(digit_folders, tmp_path, crop, views):
    write_tokenizer(tmp_path / "vq")
    with FakeCuda(["tokenizer.network.interface.ImageTokenizer._check_images", "tokenizer.encode._encode"]):
        encode(["--tokenizer", str(tmp_path / "vq"), "--images", str(digit_folders["val"]), "--workers", "0",
                "--out", str(tmp_path / "codes"), *crop])
    assert Codes(tmp_path / "codes").codes.shape == (18, views, 16)


def test_reconstruction_and_its_scores(digit_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(inception_module, "load_inception", lambda weights, device: inception())
    monkeypatch.setattr(scores, "load_lpips", lambda folder, device: LPIPS().to(device))
    write_tokenizer(tmp_path / "vq")
    with FakeCuda([*CHECKS, TO_NHWC, "tokenizer.measures.CodeUse.add", "tokenizer.scores.ReconstructionScores.add",
                   "mutor_img.metrics.frechet.Moments.update"]):
        found = reconstruct_folder(load_tokenizer(tmp_path / "vq", "cuda"), digit_folders["val"], num_images=4,
                                   image_size=32, metrics=["psnr", "rfid", "lpips"], picture=tmp_path / "picture.png")
    assert found["num_images"] == 4 and {"psnr", "rfid", "lpips", "perplexity"} <= set(found)


def test_a_picture_of_a_code_store(codes_folder, tmp_path):
    write_tokenizer(tmp_path / "vq", vocabulary=16)
    with FakeCuda([CHECKS[1], TO_NHWC]):
        decoded_grid(Codes(codes_folder), load_tokenizer(tmp_path / "vq", "cuda"), 4)


SETTINGS = [
    ["--cfg-scale", "1"],
    ["--cfg-schedule", "interval", "--cfg-parameter", "0", "--top-k", "3", "--temperature", "0.5"],
    ["--cfg-schedule", "linear", "--top-p", "0.9", "--weights", "raw"],
    ["--cfg-schedule", "power-cosine", "--cfg-parameter", "1.5", "--dtype", "fp32"],
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampling(random_model, tmp_path, settings):
    run = write_generator(tmp_path / "run", random_model((2, 2), layers=1), write_tokenizer(tmp_path / "vq"),
                          image_size=4)
    with FakeCuda(PICTURES):
        sample(["--checkpoint", run, "--num-samples", "3", "--batch-size", "2", "--out", str(tmp_path / "samples.npz"),
                *settings])
    assert (tmp_path / "samples.npz").is_file()


@pytest.mark.parametrize("source", SOURCES)
def test_sampling_with_drafts(random_model, tmp_path, monkeypatch, source):
    """Two passes per batch, since without numbers nobody can tell when all codes are certain."""
    asked, certain = Drafts.certain, itertools.cycle([0, 2, 4, 4])
    monkeypatch.setattr(Drafts, "certain", property(lambda drafts: (asked.fget(drafts), next(certain))[1]))
    run = write_generator(tmp_path / "run", random_model((2, 2), layers=1), write_tokenizer(tmp_path / "vq"),
                          image_size=4)
    with FakeCuda([*PICTURES, "mutor_img.decoding.drafting.Drafts.certain"]):
        sample(["--checkpoint", run, "--num-samples", "3", "--batch-size", "2", "--out", str(tmp_path / "samples.npz"),
                "--draft", "3", "--draft-source", source])
    assert (tmp_path / "samples.npz").is_file()


def test_pictures_of_samples(random_model, tmp_path):
    run = write_generator(tmp_path / "run", random_model((2, 2), layers=1), write_tokenizer(tmp_path / "vq"),
                          image_size=4)
    with FakeCuda([*PICTURES, "mutor_img.sampling.pictures.steps_strip"]):
        sample(["--checkpoint", run, "--num-samples", "3", "--grid", str(tmp_path / "grid.png"), "--show-steps",
                str(tmp_path / "steps.png")])


def test_what_a_run_scores_is_a_copy_on_its_device(random_model):
    with FakeCuda():
        copied = as_sampled(random_model((2, 2), layers=1).to("cuda"))
        assert copied.output.weight.device == torch.device("cuda:0") and copied.output.weight.dtype == torch.bfloat16


def inception():
    return Inception(InceptionGraph(), "0" * 64, "cuda")


def digits():
    return DigitFeatures(DigitNet(3), ["a", "b", "c"], "0" * 64, "cuda")


def vit():
    return TimmFeatures(timm.create_model("test_vit", pretrained=False), "timm:test_vit", "0" * 64, "cuda")


@pytest.mark.parametrize("build, metrics", [
    (inception, ["fid", "sfid", "is"]), (digits, ["fid", "is", "pr", "kid"]), (vit, ["fid", "pr"])])
def test_scoring(build, metrics):
    draws = np.random.default_rng(0)
    samples, reference = (ArrayImages(draws.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 3)
                          for _ in range(2))
    neighbours = [f"mutor_img.metrics.precision_recall.{name}" for name in ("precision_recall", "_reach", "_inside")]
    with FakeCuda(["mutor_img.metrics.extraction._round", *(neighbours if "pr" in metrics else ())]):
        found = evaluate(samples, as_reference(reference, role="generation"), build(), metrics=metrics, batch_size=8)
    assert found["num_samples"] == 12
