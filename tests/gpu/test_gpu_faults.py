"""Each GPU check fails on the faults that it is for, planted here and run on a CPU."""

import itertools
from functools import partial

import pytest
import timm.utils
import torch
from bodies import BODIES, CHECKS, CPU, EVEN, PLAIN, SMALL, wrap

from mutor_img import blocks, chunked_loss
from mutor_img.decoding.cpu import PackedDecoder
from mutor_img.decoding.drafting import Drafts
from mutor_img.gpu_report import attention, decoding, images, runs, training
from mutor_img.gpu_report.place import Place
from mutor_img.pretraining import task as task_module
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import compiling, parallel
from mutor_img.training import trainer as trainer_module
from tokenizer.network.quantizer import Quantizer
from tokenizer.training.adversary import Adversary

pytestmark = pytest.mark.usefixtures("usual_limits", "uncompiled")
FAULTS = []  # (check, a function that plants a fault, what the check says of it)


def fault(check, says, **given):
    """Register what a decorated function plants, by monkeypatch, as a fault that ``check`` must see."""
    return lambda plant: FAULTS.append(pytest.param(partial(check, **given), plant, says, id=plant.__name__)) or plant


def only_first(change):
    """Return an ``around`` that changes the first result only: that of the device, where the others are references."""
    calls = []

    def around(right, *given, **options):
        found = right(*given, **options)
        calls.append(1)
        return change(found) if len(calls) == 1 else found

    return around


def rounded(x):
    return x.bfloat16().to(x.dtype)


# ---- attention


@fault(attention.check_flex, "output differs by", law=SMALL, head_dim=16, precision="fp32")
@fault(attention.check_one_mask, "output differs by", law=SMALL, head_dim=16, draws=2)
def a_mask_one_too_far(monkeypatch):
    class Wrong(attention.FlexAttention):
        def update(self, anchors):
            super().update(anchors + 1)

    monkeypatch.setattr(attention, "FlexAttention", Wrong)


@fault(attention.check_flex, "RuntimeError: no such kernel", law=SMALL, head_dim=16, precision="fp32")
def a_kernel_that_does_not_compile(monkeypatch):
    def raises(*given, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention, "FlexAttention", raises)


@fault(attention.check_sdpa, "output differs by", law=SMALL, head_dim=16, precision="bf16", compiled=True)
def a_mask_of_the_fallback_one_too_far(monkeypatch):
    right = attention.SdpaAttention
    monkeypatch.setattr(attention, "SdpaAttention", lambda length, anchors: right(length, anchors + 1))


# ---- training


@fault(training.check_training_step, r"gradient of layers\.0\.ffn_norm\.weight differs", law=SMALL, head_dim=16,
       precision="fp32")
@fault(training.check_group, r"gradient of layers\.0\.ffn_norm\.weight differs", law=SMALL, wrapper="ddp",
       precision="bf16")
@fault(images.check_tokenizer_step, r"gradient of encoder\.norm_out\.weight differs", precision="fp32")
def a_gradient_of_a_compiled_block_that_is_too_large(monkeypatch):
    def around(right, blocks):
        weight = (blocks[0].ffn_norm if hasattr(blocks[0], "ffn_norm") else blocks[0].norm_out).weight
        weight.register_hook(lambda gradient: 1.2 * gradient)
        right(blocks)

    wrap(monkeypatch, parallel, "compile_blocks", around)


@fault(training.check_training_step, "loss differs", law=SMALL, head_dim=16, precision="bf16", loss_chunk=7)
def a_chunk_that_the_loss_forgets(monkeypatch):
    wrap(monkeypatch, chunked_loss, "chunked_cross_entropy_sum",
         lambda right, hidden, weight, targets, rows: right(hidden[:-1], weight, targets[:-1], rows))


@fault(training.check_training_step, r"gradient of cls_embedding\S+ differs", law=SMALL, head_dim=16, precision="bf16",
       checkpointing=True)
@fault(training.check_group, "differs", law=SMALL, wrapper="fsdp", precision="fp32", checkpointing=True)
def a_checkpoint_through_which_half_the_gradient_flows(monkeypatch):
    def half(right, function, x, *rest, **options):
        return right(function, 0.5 * x + 0.5 * x.detach(), *rest, **options)

    wrap(monkeypatch, parallel, "checkpoint", half)


@fault(training.check_training_step, "recompil", law=SMALL, head_dim=16, precision="fp32")
def a_batch_of_another_size(monkeypatch):
    monkeypatch.setattr(parallel, "compile_blocks", partial(compiling.compile_blocks, backend=CPU.backend))
    wrap(monkeypatch, GeneratorTask, "loss", lambda right, self, model, step, samples, average: right(
        self, model, step, samples[step:], average))


@fault(training.check_dropout, "of the mask is not what the same keys give", precision="fp32")
def a_dropout_of_another_rate(monkeypatch):
    wrap(monkeypatch, training, "Block", lambda right, config, drop_path: right(
        training.replace(config, dropout=0.15), drop_path))


@fault(training.check_dropout, "feed-forward: .* is not what the same keys give", precision="bf16")
def one_mask_for_both_branches(monkeypatch):
    wrap(monkeypatch, Place, "compiled", lambda right, self, block: lambda *given: block(
        *given[:3], *(keys[:1].expand(2, -1, -1, -1) for keys in given[3:])))


@fault(training.check_dropout, "of the mask is not what the same keys give", precision="fp32")
def masks_that_sequences_share(monkeypatch):
    wrap(monkeypatch, blocks, "dropout", lambda right, x, keys, *given: right(
        x, keys if keys is None else keys[:1].expand_as(keys), *given))


@fault(training.check_dropout, "what is kept is scaled by", precision="fp32")
def a_dropout_that_does_not_scale(monkeypatch):
    wrap(monkeypatch, blocks, "dropout", lambda right, x, keys, rate, whole: right(x, keys, rate, whole) * (
        1.0 if keys is None else 1 - rate))


@fault(training.check_dropout_gradient, "not those of the forward pass", law=SMALL, checkpointing=True)
def other_masks_when_a_block_is_computed_again(monkeypatch):
    def other(right, x, keys, *given):
        return right(x, keys + (torch._C._current_graph_task_id() >= 0), *given)  # within a backward pass

    wrap(monkeypatch, blocks, "dropout", other)


@fault(training.check_dropout_gradient, "no function of seed and step", law=SMALL, checkpointing=False)
@fault(runs.check_resume, r"of the resumed run is \d\.\d\d of the way", law=SMALL, precision="bf16")
def masks_that_a_process_counts_on(monkeypatch):
    count = itertools.count()
    wrap(monkeypatch, task_module, "mask_keys", lambda right, seed, step, *given: right(seed, next(count), *given))


@fault(training.check_ema, "the average of .* is off by", law=SMALL)
def an_average_without_its_warm_up(monkeypatch):
    wrap(monkeypatch, timm.utils, "ModelEmaV3", lambda right, model, decay, **warm_up: right(model, decay))


@fault(training.check_ema, "away from their average", law=SMALL)
def weights_that_stay(monkeypatch):
    wrap(monkeypatch, trainer_module, "learning_rate", lambda right, *given: 0.0)


@fault(training.check_group, "an all-reduce over one process changed its values", law=SMALL, wrapper="ddp",
       precision="bf16")
def a_sum_over_one_process_that_doubles(monkeypatch):
    monkeypatch.setattr(training.dist, "all_reduce", lambda x: x.mul_(2))


@fault(training.check_group, "an update moves .* elsewhere", law=SMALL, wrapper="fsdp", precision="fp32")
def an_update_of_sharded_weights_the_wrong_way(monkeypatch):
    def uphill(right, model, config):
        optimizer = right(model, config)
        for group in optimizer.param_groups:
            group["maximize"] = True
        return optimizer

    wrap(monkeypatch, training, "build_optimizer", uphill)


@fault(training.check_group, "the checkpoint's .* is not the run's", law=SMALL, wrapper="fsdp", precision="fp32")
def rows_that_are_written_in_place_of_others(monkeypatch):
    def shifted(right, tensor):
        rows = right(tensor)
        return type(rows)(rows.tensor.roll(1, 0), rows.start, rows.total)

    wrap(monkeypatch, parallel, "local_rows", shifted)


@fault(training.check_group, r"cls_embedding\S+, gathered, is not the run's", law=SMALL, wrapper="fsdp",
       precision="fp32")
def a_whole_copy_of_other_rows(monkeypatch):
    wrap(monkeypatch, parallel, "fill_blank", lambda right, model, weights, device: right(
        model, {name: weight.flip(0) for name, weight in weights.items()}, device))


@fault(training.check_group, r"\S+, read back, is not the run's", law=SMALL, wrapper="fsdp", precision="fp32")
def moments_that_are_not_read_back(monkeypatch):
    monkeypatch.setattr(training, "load_optimizer_tensors", lambda *given: None)


@fault(training.measure_update, "the first loss is", law=SMALL, preset="mnist", batch=2, rounds=1, vocabulary=32)
def a_loss_that_counts_twice(monkeypatch):
    wrap(monkeypatch, chunked_loss, "cross_entropy_sum", lambda right, *given: 2 * right(*given))


# ---- decoding


@fault(decoding.check_decoding, "not the likeliest", cfg_scale=1.0, precision="fp32")
@fault(decoding.check_decoding, "not the likeliest", cfg_scale=2.0, precision="bf16")
def codes_of_other_labels(monkeypatch):
    wrap(monkeypatch, decoding, "generate", lambda right, *given, **options: right(*given, **options).roll(1, 0))


@fault(decoding.check_decoding, "not the likeliest", cfg_scale=2.0, precision="fp32")
def a_guidance_of_another_scale(monkeypatch):
    wrap(monkeypatch, decoding, "generate", lambda right, *given, cfg_scale, **options: right(
        *given, cfg_scale=1.2 * cfg_scale, **options))


@fault(decoding.check_decoding, "come out differently the second time", cfg_scale=1.0, precision="fp32")
def a_cache_that_a_replay_spoils(monkeypatch):
    wrap(monkeypatch, decoding, "generate", only_first(lambda codes: codes.roll(1, 0)))


@fault(decoding.check_drafts, "hold codes that were not drawn", source="window", precision="fp32", count=2)
@fault(decoding.check_drafts, "hold codes that were not drawn", source="frequency", precision="bf16", count=2)
def a_draft_that_is_taken_unverified(monkeypatch):
    def around(right, drafts, *drawn):
        right(drafts, *drawn)
        drafts.start = (drafts.start + 1).clamp(max=drafts.length)

    wrap(monkeypatch, Drafts, "take", around)


@fault(decoding.check_drafts, "hold codes that were not drawn", source="registers", precision="fp32", count=2)
def a_window_that_is_a_place_too_late(monkeypatch):
    wrap(monkeypatch, PackedDecoder, "window", lambda right, self, x, start, width: right(
        self, x, (start + 1).clamp(max=self.weights.config.length), width))


@fault(decoding.check_drafts, "hold codes that were not drawn", source="window", precision="fp32", count=2)
def images_of_other_labels(monkeypatch):
    wrap(monkeypatch, decoding.Sampler, "generate", lambda right, self, labels, samples: right(
        self, labels.roll(1), samples))


# ---- images


@fault(images.check_tokenizer_step, "farther from its latent than the nearest", precision="bf16")
@fault(images.check_encode, "farther from its latent than the nearest", count=10)
def codes_of_other_places(monkeypatch):
    wrap(monkeypatch, Quantizer, "nearest", lambda right, self, unit: right(self, unit).roll(1, 1))


@fault(images.check_tokenizer_step, r"gradient of the discriminator's main\S+ differs", precision="fp32")
def a_discriminator_that_learns_too_fast(monkeypatch):
    calls = []

    def around(right, self, *given):
        found = right(self, *given)
        if not calls:  # the compiled run's
            for weight in self.discriminator.parameters():
                weight.grad.mul_(1.2)
        return calls.append(1) or found

    wrap(monkeypatch, Adversary, "learn", around)


@fault(images.check_lpips, "gradient differs by", precision="fp32", count=1)
def a_perceptual_loss_of_half_precision(monkeypatch):
    calls = []

    def around(right, self, *given):
        calls.append(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=len(calls) == 3):  # after the two references
            return right(self, *given)

    wrap(monkeypatch, images.LPIPS, "forward", around)


@fault(images.check_encode, "farther from its latent than the nearest", count=10)
def a_mirror_that_does_not_mirror(monkeypatch):
    wrap(monkeypatch, images, "encode_images", lambda right, *given, **options: (
        monkeypatch.setitem(images.VIEWS, "mirror", lambda squares: squares), right(*given, **options),
        monkeypatch.setitem(images.VIEWS, "mirror", lambda squares: squares.flip(-1)))[1])


@fault(images.check_decode, "pixels differs by", count=2)
def pixels_of_half_precision(monkeypatch):
    wrap(monkeypatch, images.VQModel, "decode", only_first(rounded))


@fault(images.check_features, "pool differs by", network="mnist")
@fault(images.check_features, "spatial differs by", network="inception", count=1)
def features_of_half_precision(monkeypatch):
    wrap(monkeypatch, images, "features_of", only_first(lambda found: {k: rounded(v) for k, v in found.items()}))


@fault(images.check_scores, "fd is .* on the CPU")
def a_distance_a_hundredth_too_large(monkeypatch):
    wrap(monkeypatch, images, "evaluate", only_first(lambda scores: {**scores, "fd": 1.01 * scores["fd"]}))


# ---- whole runs


@fault(runs.check_resume, r"of the resumed run is \d\.\d\d of the way", law=PLAIN, precision="bf16")
def moments_that_a_resume_forgets(monkeypatch):
    monkeypatch.setattr(trainer_module, "load_optimizer_tensors", lambda *given: None)


@fault(runs.check_tokenizer_resume, r"discriminator: .* of the resumed run is \d\.\d\d of the way", precision="bf16")
def a_discriminator_that_a_resume_forgets(monkeypatch):
    monkeypatch.setattr(Adversary, "resume", lambda self, folder: None)


@fault(runs.check_run, "eval_fd is absent\n(.*\n)*the run drew no sample grid", law=EVEN)
def scores_and_pictures_that_do_not_come(monkeypatch):
    monkeypatch.setattr(GeneratorTask, "score", lambda self, model, step: {})
    monkeypatch.setattr(GeneratorTask, "draw_pictures", lambda self, model, folder, step: None)


@pytest.mark.parametrize("check, plant, says", FAULTS)
def test_a_planted_fault_fails_its_check(check, plant, says, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(Exception, match=says):
        check(CPU)


def test_every_check_of_the_table_has_a_planted_fault():
    assert {check.func for check in CHECKS.values()} == {parameters.values[0].func for parameters in FAULTS}
    assert {body.func for body in BODIES.values()} == {parameters.values[0].func for parameters in FAULTS}


def test_the_table_covers_every_way_that_a_run_may_take():
    def seen(function, *names):
        return {tuple(check.keywords.get(name, False) for name in names)
                for check in CHECKS.values() if check.func is function}

    both = ("bf16", "fp32")
    assert seen(decoding.check_decoding, "precision", "cfg_scale") == {(p, s) for p in both for s in (1.0, 2.0)}
    steps = seen(training.check_training_step, "precision", "checkpointing", "loss_chunk")
    assert {(p, c, bool(rows)) for p, c, rows in steps} == {(p, c, r) for p in both for c in (0, 1) for r in (0, 1)}
    assert {head for head, in seen(training.check_training_step, "head_dim")} >= {64, 100}
    assert seen(training.check_group, "precision", "wrapper", "checkpointing") >= {
        (p, *way) for p in both for way in (("ddp", False), ("fsdp", False), ("fsdp", True))}
    assert seen(runs.check_resume, "checkpointing") == {(False,), (True,)}
    assert seen(runs.check_tokenizer_resume, "precision") == {(p,) for p in both}
