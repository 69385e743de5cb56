"""Training: it learns, resumes to the same bytes, brings codes back, and leaves a tokenizer that loads."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mutor_img.checkpoints.folder import find_checkpoint
from mutor_img.common.config import field_names, load_config
from mutor_img.training import compiling, parallel
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer
from tokenizer import load_tokenizer
from tokenizer.train import TokenizerConfig, TokenizerTask, channels_last, main

ROOT = Path(__file__).resolve().parents[2]


def weights(run):
    return {path.name: path.read_bytes() for path in find_checkpoint(run).glob("*.safetensors")}


def test_a_resumed_run_ends_in_the_same_bytes_and_loads(command, tmp_path):
    main([*command, f"run_dir={tmp_path / 'whole'}"])
    main([*command, f"run_dir={tmp_path / 'cut'}", "train.steps=3"])
    main([*command, f"run_dir={tmp_path / 'cut'}"])
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[5]["l2"] < rows[0]["l2"] and 0 < rows[5]["codes_used"] <= 1 and "val_psnr" in rows[-1]
    assert (tmp_path / "whole" / "pictures" / "reconstructions_00000006.png").is_file()
    vq = load_tokenizer(tmp_path / "whole")
    assert vq.image_size == 16 and vq.vocabulary == 32 and vq.hash
    assert vq.decode(vq.encode(torch.zeros(1, 1, 16, 16))).shape == (1, 1, 16, 16)


def test_a_run_on_other_images_is_refused_finished_or_not(command, tmp_path, image_folder, refused):
    run = f"run_dir={tmp_path / 'run'}"
    main([*command, run, "train.steps=3"])
    images = Path(load_config(TokenizerConfig, command[1]).data.images)
    copy = shutil.copytree(images, tmp_path / "copy")
    main([*command, run, f"data.images={copy}", "train.steps=4"])  # the same ones elsewhere
    shutil.copy(next(copy.glob("a/*")), copy / "a" / "another.png")
    for steps in (4, 5):
        line = refused(main, *command, run, f"data.images={copy}", f"train.steps={steps}")
        assert f"was trained on other images than data.images={copy}; give the former images" in line


def task_of(command, runtime, **values):
    config = load_config(TokenizerConfig, command[1], [f"{key}={value}" for key, value in values.items()])
    return TokenizerTask(config, runtime)


def test_latents_for_dead_codes_do_not_depend_on_the_number_of_processes(command):
    codes = torch.arange(32)
    task = task_of(command, Runtime(torch.device("cpu")))

    def drawn(*parts):
        task.seen.clear()
        for part in parts:
            task.loss(task.model, 5, part)
        return task._draw_latents(5, codes)

    samples = torch.arange(40, 48)
    whole = drawn(*samples.split(4))
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(drawn(samples[:4]) + drawn(samples[4:]), whole)  # what a sum over two ranks gives


@pytest.mark.parametrize("channels", [1, 3])
def test_activations_of_grey_and_colour_images_have_the_layout_of_fast_convolutions(channels, command):
    task = task_of(command, Runtime(torch.device("cpu")), **{"model.image_channels": channels})
    seen = []
    task.model.encoder.conv_in.register_forward_hook(lambda module, given, out: seen.append(out))
    task.loss(task.model, 0, torch.arange(4))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    images = torch.rand(2, channels, 5, 7)
    assert torch.equal(channels_last(images), images)


def test_fewer_held_out_images_than_processes_are_validated_as_by_one(command, monkeypatch):
    task = task_of(command, Runtime(torch.device("cpu")), **{"data.val_count": 2})
    model, alone, found, sums = task.model.eval(), task.validate(task.model.eval()), {}, []
    monkeypatch.setattr(Runtime, "sum", lambda self, values: sums.append(values) or values)
    for rank in range(3):
        task.runtime = Runtime(torch.device("cpu"), rank, 3)
        task.validate(model)
    for place, rank in enumerate(range(3)):
        found[rank] = sums[2 * place : 2 * place + 2]  # of PSNRs and images, and of codes
    assert not found[2][0].any() and not found[2][1].any()
    total, count = sum(found[rank][0] for rank in range(3))
    assert count == 2 and float(total / count) == pytest.approx(alone["val_psnr"])
    assert sum(found[rank][1] for rank in range(3)).sum() == 2 * 16


def test_unused_codes_are_brought_back(command, tmp_path):
    runtime = Runtime(torch.device("cpu"))
    used = {}
    for after in (0, 2):
        task = task_of(command, runtime, **{"revival.after": after, "run_dir": tmp_path / f"run{after}"})
        with torch.no_grad():  # all codes on one side of the sphere, where almost none is ever the nearest
            task.model.quantize.embedding.weight.mul_(0.01).add_(torch.tensor([1.0, 0, 0, 0]))
        trainer = Trainer(task, task.config, runtime)
        used[after] = [trainer.update()["codes_used"] for _ in range(8)][-1]
    assert used[2] > used[0]


def test_neither_validation_nor_pictures_compile_the_network_anew(command, tmp_path, monkeypatch, usual_limits):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(parallel, "compile_blocks", partial(compiling.compile_blocks, backend=counter))
    for every in (0, 1):
        torch._dynamo.reset()
        counter.frame_count = 0
        main([*command, f"run_dir={tmp_path / str(every)}", "train.compile=true", "train.steps=2", "train.ema=0",
              f"train.validate_every={every}", f"train.picture_every={every}"])
        assert counter.frame_count == 2  # the encoder and the decoder
    assert len(list((tmp_path / "1" / "pictures").iterdir())) == 2


def test_shares_of_micro_batches_sum_to_the_batch(command):
    task = task_of(command, Runtime(torch.device("cpu")))
    samples = torch.arange(8)
    whole, values = task.loss(task.model, 0, samples)
    parts = [task.loss(task.model, 0, part) for part in samples.split(2)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(sum(part["l2"] for _, part in parts), values["l2"])
    task.config.loss.commitment, task.config.loss.codebook = 0.5, 0.0
    expected = values["l2"] + 0.5 * values["commitment"]
    torch.testing.assert_close(task.loss(task.model, 0, samples)[0], expected)


def test_a_dry_run_prints_the_config_and_the_plan_and_needs_no_images(capsys):
    main(["--config", str(ROOT / "configs" / "mnist" / "tokenizer.yaml"), "--dry-run", "data.images=nowhere"])
    out = capsys.readouterr().out
    assert "codes per image" in out and "FLOPs per update" in out and "nowhere" in out


def test_mistakes_are_refused_in_one_line(command, refused, tmp_path):
    assert "'data.image_size'" in refused(main, *command, "data.imagesize=32")
    assert "'mnist'" in refused(main, *command, "model.preset=mnits")
    assert "multiple of 4" in refused(main, *command, "data.image_size=30")
    assert "no such folder" in refused(main, *command, f"data.images={tmp_path / 'no'}")
    assert "'l2'" in refused(main, *command, "loss.terms.l3=1.0")
    assert "groups is 8" in refused(main, *command, "model.channels=20")
    assert "2 to 16777216" in refused(main, *command, "model.vocabulary=20000000")
    assert "crop_min" in refused(main, *command, "data.crop_min=0")


def test_the_shipped_config_names_known_keys_only():
    config = load_config(TokenizerConfig, ROOT / "configs" / "mnist" / "tokenizer.yaml")
    assert config.run_dir.endswith("runs/mnist/tokenizer") and config.model.options()["vocabulary"] == 256
    assert {"run_dir", "seed", "data.images", "loss.terms", "train.steps"} <= set(field_names(TokenizerConfig))
