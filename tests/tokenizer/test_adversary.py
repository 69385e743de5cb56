"""The discriminator beside the tokenizer: whose gradient goes where, on several processes, and after a resume."""

import pytest
import torch
from launching import launch_command

from mutor_img.checkpoints.folder import find_checkpoint, read_tensors
from mutor_img.common.config import OptimConfig
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_metrics
from mutor_img.training.runtime import Runtime
from tokenizer import load_tokenizer
from tokenizer.train import main
from tokenizer.training import adversary
from tokenizer.training.adversary import Adversary
from tokenizer.training.discriminator import PatchDiscriminator

ALONE = Runtime(torch.device("cpu"))
TERM = ("loss.adversarial_weight=0.5", "loss.adversarial_start=2", "loss.discriminator_channels=4",
        "loss.discriminator_layers=1")


def build(weight=0.5, clip=0.0):
    torch.manual_seed(0)
    return Adversary(PatchDiscriminator(1, 4, 1), OptimConfig(lr=1e-2, clip=clip, weight_decay=0.0), weight, ALONE)


def pairs(count=2):
    torch.manual_seed(1)
    return [(torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8, requires_grad=True)) for _ in range(count)]


def test_the_tokenizers_loss_leaves_the_discriminator_alone():
    rival, ((images, reconstruction),) = build(), pairs(1)
    rival.judge(images, reconstruction).backward()
    assert all(weight.grad is None for weight in rival.discriminator.parameters())
    expected, = torch.autograd.grad(-rival.discriminator(reconstruction).mean(), reconstruction)
    assert torch.equal(reconstruction.grad, expected) and float(expected.abs().sum()) > 0


def test_the_discriminators_gradient_is_that_of_the_mean_over_micro_batches():
    rival, batches = build(), pairs(2)
    for images, reconstruction in batches:
        rival.judge(images, reconstruction)
    logged = rival.learn(4, "fp32")
    made = [weight.grad.clone() for weight in rival.discriminator.parameters()]
    total = 0
    for images, reconstruction in batches:
        real, fake = rival.discriminator(images), rival.discriminator(reconstruction.detach())
        total = total + ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 4  # half, of two batches
    expected = torch.autograd.grad(0.5 * total, list(rival.discriminator.parameters()))
    for a, b in zip(made, expected):
        torch.testing.assert_close(a, b)
    assert logged["discriminator"] == pytest.approx(total.item())
    norm = torch.cat([g.flatten() for g in expected]).norm()
    assert logged["discriminator_gradient_norm"] == pytest.approx(float(norm))
    assert all(reconstruction.grad is None for _, reconstruction in batches)


def test_a_learning_discriminator_tells_images_from_reconstructions():
    rival, ((images, reconstruction),) = build(), pairs(1)
    for _ in range(15):
        rival.judge(images, reconstruction)
        logged = rival.learn(2, "fp32")
        rival.step(1e-2, torch.tensor(False))
    assert logged["discriminator"] < 0.7 and logged["logits_real"] > logged["logits_fake"] + 0.5


def test_the_norm_of_its_gradient_is_clipped():
    rival, ((images, reconstruction),) = build(clip=1e-3), pairs(1)
    rival.judge(images, reconstruction)
    assert rival.learn(2, "fp32")["discriminator_gradient_norm"] > 1e-2
    clipped = torch.cat([weight.grad.flatten() for weight in rival.discriminator.parameters()]).norm()
    assert float(clipped) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("cut", [1, 3])  # before and after the discriminator's first update
def test_a_resumed_run_ends_in_the_same_bytes(command, tmp_path, cut):
    command = [*command, *TERM, "train.validate_every=0", "train.picture_every=0"]
    main([*command, f"run_dir={tmp_path / 'whole'}", "train.steps=4"])
    main([*command, f"run_dir={tmp_path / 'cut'}", f"train.steps={cut}"])
    main([*command, f"run_dir={tmp_path / 'cut'}", "train.steps=4"])
    whole, again = ({path.name: path.read_bytes() for path in find_checkpoint(tmp_path / run).glob("*.safetensors")}
                    for run in ("whole", "cut"))
    assert whole == again and {"discriminator.safetensors", "discriminator_optimizer.safetensors"} <= set(whole)
    rows = read_metrics(tmp_path / "whole")
    assert ["adversarial" in row for row in rows] == [False, False, True, True]
    row = rows[2]
    parts = row["l2"] + row["codebook"] + 0.25 * row["commitment"] + 0.5 * row["adversarial"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_discriminator_that_is_not_finite_moves_no_weight(command, tmp_path, monkeypatch):
    command = [*command, *TERM, f"run_dir={tmp_path / 'run'}", "train.checkpoint_every=1", "train.keep=9"]
    main([*command, "train.steps=2"])
    monkeypatch.setattr(adversary, "discriminator_loss", lambda real, fake: real.mean() * float("nan"))
    with pytest.raises(UserError, match=r"step 2: discriminator is nan.*step_00000002"):
        main(command)
    assert find_checkpoint(tmp_path / "run").name == "step_00000002"


def test_a_run_without_a_discriminator_is_not_gone_on_with_as_if_it_had_one(command, tmp_path, refused):
    command = [*command, f"run_dir={tmp_path / 'run'}", "train.validate_every=0", "train.picture_every=0"]
    main([*command, "train.steps=1"])
    assert "without a discriminator" in refused(main, *command, *TERM)
    assert "too many for images of 16 pixels" in refused(main, *command, *TERM, "loss.discriminator_layers=3")
    assert "give train.parallel=ddp" in refused(main, *command, "train.parallel=fsdp")


def test_two_processes_give_the_curve_and_the_weights_of_one(command, processes, tmp_path):
    words = [*command, *TERM, "loss.adversarial_start=1", "train.steps=3", "train.micro_batch=4", "optim.lr=1e-3",
             "revival.after=0", "train.validate_every=0", "train.picture_every=0"]
    main([*words, f"run_dir={tmp_path / 'one'}"])
    launch_command(processes, 2, main, [*words, f"run_dir={tmp_path / 'two'}"])
    one, two = ([{k: v for k, v in row.items() if "second" not in k and k != "mfu"} for row in
                 read_metrics(tmp_path / run)] for run in ("one", "two"))
    assert len(one) == 3 and {"l2", "adversarial", "discriminator", "perplexity"} <= set(one[2])
    for a, b in zip(one, two):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    first, second = (read_tensors(find_checkpoint(tmp_path / run), "discriminator") for run in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    main([*words, f"run_dir={tmp_path / 'two'}", "train.steps=4"])  # one process goes on with what two have saved
    assert len(read_metrics(tmp_path / "two")) == 4 and load_tokenizer(tmp_path / "two").vocabulary == 32
