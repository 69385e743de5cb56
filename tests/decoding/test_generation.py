"""Generation: the cache against whole forward passes, filters against numpy, and rows that know no neighbours."""

import gc
import math
from functools import partial

import numpy as np
import pytest
import torch
from reference import sampling as reference

from mutor_img import generate
from mutor_img.common.errors import UserError
from mutor_img.decoding import cpu
from mutor_img.decoding.cpu import CHUNK, CHUNKS, Packed, PackedDecoder, PrefixCache, pack
from mutor_img.decoding.gpu import StaticDecoder, static_decoder
from mutor_img.decoding.guidance import SCHEDULES, guidance_scales
from mutor_img.decoding.sampler import Sampler, SamplingSettings, draw, generate_samples, keep_top_k, keep_top_p

LABELS = torch.tensor([2, 0, 1, 1, 0])


def codes_of(model, labels=LABELS, first=0, **settings):
    samples = first + torch.arange(len(labels))
    return generate_samples(model, labels, samples, SamplingSettings(**settings))


def packed_decoder(model, rows):
    return PackedDecoder(pack(model), rows)


def cached_logits(decoder, model, labels, codes):
    """Logits (B, N, V) of every position, one step at a time."""
    steps = [decoder.first(model.cls_embedding(labels)),
             *(decoder.next(codes[:, t - 1], t).clone() for t in range(1, codes.shape[1]))]
    return torch.stack(steps, 1)


@pytest.mark.parametrize("build", [packed_decoder, partial(StaticDecoder, eager=True)], ids=["packed", "static"])
@pytest.mark.parametrize(("heads", "qk_norm"), [(1, False), (2, False), (4, False), (2, True)])
def test_cached_logits_equal_those_of_whole_forward_passes(random_model, heads, qk_norm, build):
    model = random_model(heads=heads, qk_norm=qk_norm)
    codes = torch.randint(11, (5, 20), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 0])  # 3: the null class
    with torch.no_grad():
        ours = cached_logits(build(model, 5), model, labels, codes)
        torch.testing.assert_close(ours, model(labels, codes[:, :-1]), rtol=0, atol=1e-5)


def test_a_used_cache_gives_the_next_images_the_same_logits(random_model):
    model = random_model()
    sampler = Sampler(model, SamplingSettings(), batch=5)
    first, _, again = (sampler.generate(LABELS, numbers + torch.arange(5)) for numbers in (0, 5, 0))
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cached_logits_in_other_dtypes_are_within_their_rounding(random_model, dtype):
    model = random_model(dtype=dtype)
    codes = torch.randint(11, (5, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, whole = cached_logits(packed_decoder(model, 5), model, LABELS, codes), model(LABELS, codes[:, :-1])
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, whole, rtol=0, atol=tolerance)


def test_the_compiled_attention_of_bf16_is_the_eager_one_and_that_of_fp32_is_not_compiled(random_model, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(5, 2, n, 16, generator=generator).bfloat16() for n in (20, 20, 1))
    queries = queries[:, :, 0].float()
    for seen in (2, 3, 19):
        prefix = keys[:, :, :seen], values[:, :, :seen]
        expected = torch.nn.functional.scaled_dot_product_attention(queries[:, :, None].double(), *(
            each.double() for each in prefix), scale=1.0)[:, :, 0]
        ours = cpu._compiled_attention()(queries, *prefix)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr(cpu, "_compiled_attention", None)
    codes_of(random_model())


def test_without_a_compiler_bf16_attends_by_products(random_model, monkeypatch):
    model, codes = random_model(dtype=torch.bfloat16), torch.arange(20).remainder(11).repeat(5, 1)
    with torch.inference_mode():
        fused = cached_logits(packed_decoder(model, 5), model, LABELS, codes)
        monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
        monkeypatch.setattr(cpu, "_compiled_attention", None)
        products = cached_logits(packed_decoder(model, 5), model, LABELS, codes)
        torch.testing.assert_close(products, fused, rtol=0, atol=0.1)


@pytest.mark.parametrize("settings", [
    {"cfg_scale": 1.0}, {"cfg_scale": 2.0}, {"cfg_scale": 3.0, "temperature": 0.7, "top_k": 4},
    {"cfg_scale": 1.5, "top_p": 0.8}, {"cfg_scale": 2.0, "temperature": 1.3, "top_k": 6, "top_p": 0.6},
    *({"cfg_scale": 4.0, "cfg_schedule": s, "cfg_parameter": p}
      for s, p in (("interval", 3), ("interval", 0), ("linear", None), ("power-cosine", 2.0))),
    {"cfg_scale": 2.0, "kept": (3, 7, -1, -1, 2, -1, -1, -1, -1, 9, 1, 4, 4, 0, -1, -1, 5, -1, 10, 6)},
], ids=str)
def test_samples_equal_an_uncached_loop_in_numpy(random_model, settings):
    model = random_model()
    ours = codes_of(model, first=40, seed=5, **settings)
    renamed = {{"cfg_schedule": "schedule", "cfg_parameter": "parameter"}.get(k, k): v for k, v in settings.items()}
    for row, label in enumerate(LABELS.tolist()):
        theirs, margin = reference.sample(model, label, 40 + row, seed=5, **renamed)
        assert margin > 1e-6, "a draw too near an edge to compare; take another seed"
        assert ours[row].tolist() == theirs


def test_top_k_1_is_the_argmax_loop(random_model):
    model = random_model()
    codes = torch.empty(5, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(20):
            with_class, without = (model(x, codes)[:, -1] for x in (LABELS, torch.full((5,), 3)))
            codes = torch.cat([codes, (without + 2 * (with_class - without)).argmax(-1, keepdim=True)], 1)
    assert torch.equal(codes_of(model, top_k=1), codes)


def test_registers_in_a_checkpoint_do_not_change_samples(random_model):
    plain = random_model(register_offsets=None)
    for offsets in ((), (1, 2, 3)):
        with_registers = random_model(register_offsets=offsets)
        with_registers.load_state_dict({**with_registers.state_dict(), **plain.state_dict()})
        assert torch.equal(codes_of(with_registers), codes_of(plain))


def test_a_row_is_a_function_of_seed_and_number_alone_to_the_last_bit(random_model):
    model = random_model()
    count = 20 * CHUNK + 3
    labels = torch.arange(count) % 3
    everyone = codes_of(model, labels)
    for part in (slice(0, 1), slice(5, 8), slice(CHUNK - 1, CHUNK + 1), slice(7, count), slice(13, 11 * CHUNK)):
        assert torch.equal(codes_of(model, labels[part], first=part.start), everyone[part])
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate_samples(model, labels[shuffled], shuffled, SamplingSettings()), everyone[shuffled])


@pytest.fixture
def rows_of_steps(monkeypatch):
    """The numbers of rows that steps on a CPU have had."""
    seen, step = set(), PackedDecoder.step
    monkeypatch.setattr(PackedDecoder, "step", lambda self, x, position: seen.add(len(x)) or step(self, x, position))
    return seen


def test_the_network_runs_on_whole_chunks_and_on_many_of_them_at_most(random_model, rows_of_steps, monkeypatch):
    model = random_model()
    for count in (1, 3, CHUNK):
        codes_of(model, torch.zeros(count, dtype=torch.int64))
    assert CHUNK >= 8 and rows_of_steps == {2 * CHUNK}
    few, many = CHUNKS
    for room, chunks in ((cpu.CACHE, many), (0, few)):  # a model whose cache is large runs fewer together
        monkeypatch.setattr(cpu, "CACHE", room)
        rows_of_steps.clear()
        codes_of(model, torch.zeros(many * CHUNK + 1, dtype=torch.int64))
        assert rows_of_steps == {2 * CHUNK, 2 * chunks * CHUNK}
    config = model.config
    monkeypatch.setattr(cpu, "CACHE", 20 * 2 * PrefixCache(config.layers, CHUNK, config.heads, config.length,
                                                           config.dim // config.heads, torch.zeros(1)).store.nbytes)
    assert [pack(model).most_together(halves) for halves in (1, 2)] == [40 * CHUNK, 20 * CHUNK]
    rows_of_steps.clear()
    codes_of(model, cfg_scale=1.0)  # no guidance: no second half of the batch
    assert rows_of_steps == {CHUNK}
    rows_of_steps.clear()
    codes_of(model, torch.zeros(CHUNK + 1, dtype=torch.int64), cfg_schedule="interval", cfg_parameter=2)
    assert rows_of_steps == {4 * CHUNK, 2 * CHUNK}


@pytest.mark.parametrize("method", ["__call__", "silu", "times", "plus"])
def test_chunks_run_alone_on_a_machine_that_rounds_otherwise_with_more_rows(random_model, rows_of_steps, monkeypatch,
                                                                            method):
    labels, real = torch.arange(3 * CHUNK) % 3, getattr(Packed, method)
    expected = codes_of(random_model(), labels)
    monkeypatch.setattr(Packed, method,
                        lambda self, x, *other: real(self, x, *other) * (1 if len(x) <= 2 * CHUNK else 1.5))
    rows_of_steps.clear()
    assert torch.equal(codes_of(random_model(), labels), expected) and rows_of_steps == {2 * CHUNK}


@pytest.mark.parametrize("change", [{"seed": 1}, {"cfg_scale": 5.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5},
                                    {"cfg_schedule": "linear"}, {"first": 1}], ids=str)
def test_every_setting_bites(random_model, change):
    model = random_model()
    assert not torch.equal(codes_of(model, **change), codes_of(model))


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log()
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    codes = draw(logits.expand(10_000, 4), numbers, SamplingSettings())
    assert codes.bincount(minlength=4).tolist() == [5000, 2000, 0, 3000]


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_a_code_of_probability_zero_is_never_drawn_at_either_end(number):
    logits = torch.full((1, 16384), -math.inf)
    logits[0, 5000:9000:7] = torch.randn(572, generator=torch.Generator().manual_seed(0))
    code = int(draw(logits, torch.tensor([number], dtype=torch.float64), SamplingSettings()))
    assert code == (5000 if number == 0 else 8997)


@pytest.mark.parametrize("seed", range(4))
def test_filters_equal_numpy_sorts(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 50, generator=generator).mul(2).round(decimals=1 if seed % 2 else 6)  # odd seeds: many ties
    for k in (1, 2, 7, 50):
        for row, ours in zip(logits, keep_top_k(logits, k).softmax(-1)):
            np.testing.assert_allclose(ours, reference.filtered(row.double().numpy(), top_k=k), atol=1e-6)
    for p in (1e-9, 0.3, 0.5, 0.95, 0.999):
        for row, ours in zip(logits, keep_top_p(logits, p).softmax(-1)):
            np.testing.assert_allclose(ours, reference.filtered(row.double().numpy(), top_p=p), atol=1e-6)


def test_equal_logits_leave_exactly_k_codes():
    assert keep_top_k(torch.zeros(2, 9), 4).isfinite().tolist() == [[True] * 4 + [False] * 5] * 2


@pytest.mark.parametrize(("schedule", "parameter"), [("constant", None), ("interval", 3), ("linear", None),
                                                     ("power-cosine", 0.5), ("power-cosine", 2.75)])
def test_schedules_equal_their_definitions(schedule, parameter):
    ours = guidance_scales(schedule, 3.0, parameter, 16)
    assert ours == pytest.approx([reference.scale_at(schedule, 3.0, parameter, t, 16) for t in range(16)])
    assert min(ours) >= 1 and max(ours) == 3.0 and len(ours) == 16


def test_every_schedule_is_one_token_long_where_the_grid_is():
    for schedule in SCHEDULES:
        parameter = 1 if schedule in ("interval", "power-cosine") else None
        assert len(guidance_scales(schedule, 3.0, parameter, 1)) == 1


@pytest.mark.parametrize(("change", "words"), [
    ({"cfg_scale": 0.5}, "cfg_scale is 0.5"), ({"cfg_scale": math.nan}, "cfg_scale"), ({"cfg_scale": math.inf}, "inf"),
    ({"temperature": 0.0}, "temperature is 0"), ({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 12}, "[0, 11]"), ({"top_p": 0.0}, "top_p is 0"), ({"top_p": 1.1}, "top_p"),
    ({"top_p": math.nan}, "top_p is nan"),
    ({"cfg_schedule": "linaer"}, "did you mean 'linear'"), ({"cfg_schedule": "interval"}, "needs cfg-parameter"),
    ({"cfg_schedule": "linear", "cfg_parameter": 2.0}, "takes no cfg-parameter"),
    ({"cfg_schedule": "interval", "cfg_parameter": 1.5}, "whole number"),
    ({"cfg_schedule": "power-cosine", "cfg_parameter": 0.0}, "power > 0"),
    ({"labels": torch.tensor([0, 3])}, "label 3 is out of range; the model has classes 0 to 2"),
    ({"labels": torch.tensor([-1])}, "label -1"),
], ids=str)
def test_a_value_out_of_range_is_one_clear_line(random_model, change, words):
    with pytest.raises(UserError) as error:
        codes_of(random_model(), **change)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_named(random_model):
    model = random_model()
    model.output.weight.data[3, 3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        codes_of(model)


def test_the_public_signature_gives_int64_codes_and_leaves_the_model_alone(random_model):
    model = random_model().train()
    codes = generate(model, [1, 2], cfg_scale=1.5, temperature=0.9, top_k=5, top_p=0.9, seed=3, first=7)
    assert codes.shape == (2, 20) and codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < 11
    assert model.training and not codes.is_inference()
    assert torch.equal(codes, generate(model.eval(), torch.tensor([1, 2]), 1.5, 0.9, 5, 0.9, 3, 7))
    assert generate(model, []).shape == (0, 20)


@pytest.mark.parametrize("write", [lambda weight: weight.data.mul_(2), lambda weight: weight.detach().mul_(2),
                                   lambda weight: setattr(weight, "data", weight.data * 2)],
                         ids=["data", "in place", "replaced"])
@pytest.mark.parametrize("name", ["output.weight", "layers.1.feed_forward.w3.weight", "norm.weight",
                                  "tok_embeddings.weight"])
def test_weights_that_change_between_calls_count(random_model, name, write):
    model, fresh = random_model(), random_model()
    before = generate(model, LABELS)
    for each in (model, fresh):
        write(each.get_parameter(name))
    after = generate(model, LABELS)
    assert torch.equal(after, generate(fresh, LABELS)) and not torch.equal(after, before)


def test_weights_are_packed_once_and_go_with_their_model(random_model, monkeypatch):
    model, made = random_model(), []
    real = cpu.PackedTransformer
    monkeypatch.setattr(cpu, "PackedTransformer", lambda model: made.append(1) or real(model))
    for settings in ({}, {"cfg_scale": 1.0}, {"temperature": 0.5}):
        for count in (2, 5):
            generate(model, LABELS[:count], **settings)
    assert len(made) == 1
    gc.collect()  # what earlier tests left
    kept = len(cpu._PACKED)
    del model
    gc.collect()
    assert len(cpu._PACKED) == kept - 1


def test_dropout_is_never_applied_and_modes_are_left_alone(random_model):
    model = random_model(dropout=0.5).train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    expected = codes_of(random_model())
    assert torch.equal(codes_of(model), expected) and modes == [module.training for module in model.modules()]


class Graphs:
    """A compiler that runs what it is given and keeps which inputs are static: of fixed address, never copied."""

    def __init__(self):
        self.static = []

    def __call__(self, graph, inputs):
        inputs = [node.meta for node in graph.graph.nodes if node.op == "placeholder"]
        self.static.append([bool(meta.get("tensor_dict", {}).get("_dynamo_static_input_type")) for meta in inputs])
        return graph.forward


def test_the_step_for_gpus_is_one_graph_for_all_positions_over_static_weights_and_cache(random_model):
    torch._dynamo.reset()
    model, graphs = random_model(), Graphs()
    decoder = StaticDecoder(model, 5)
    decoder.compile_step(backend=graphs)
    codes = torch.randint(11, (5, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = cached_logits(decoder, model, LABELS, codes)
        torch.testing.assert_close(ours, model(LABELS, codes[:, :-1]), rtol=0, atol=1e-5)
        cached_logits(decoder, model, LABELS, codes)
    assert len(graphs.static) == 1  # fullgraph: one graph, and no other for any position or batch
    # Everything but the codes and the position: 7 weights per layer and 3 (not the labels' embedding), the rotary
    # table, the places, and two caches per layer.
    assert sorted(graphs.static[0]) == [False] * 2 + [True] * (2 * 7 + 3 + 1 + 1 + 2 * 2)


def test_blocks_that_training_has_compiled_are_decoded_without_that(random_model):
    model, codes = random_model(), torch.randint(11, (5, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(LABELS, codes[:, :-1])
        for block in model.layers:
            block.forward = None  # what compile_blocks replaces
        for decoder in (packed_decoder(model, 5), StaticDecoder(model, 5, eager=True)):
            torch.testing.assert_close(cached_logits(decoder, model, LABELS, codes), expected, rtol=0, atol=1e-5)


def test_the_gpu_path_gives_the_codes_of_the_cpu_path(random_model):
    model = random_model(dropout=0.5).train()
    for settings in ({}, {"cfg_scale": 1.0}, {"cfg_schedule": "interval", "cfg_parameter": 2, "top_k": 5}):
        sampler = Sampler(model, SamplingSettings(**settings), 4)
        sampler.fixed, sampler.static, sampler.count = False, True, 4
        sampler.decoders[0] = StaticDecoder(model, 4 * sampler.halves, eager=True)
        assert torch.equal(sampler.generate(LABELS, torch.arange(5)), codes_of(model, **settings))


def test_a_decoder_for_gpus_serves_until_shapes_or_weights_move(random_model):
    model = random_model()
    decoder = static_decoder(model, 4)
    model.output.weight.data.mul_(2)  # in place: its graph reads the new values
    assert static_decoder(model, 4) is decoder
    assert static_decoder(model, 6) is not decoder
    decoder = static_decoder(model, 4)
    model.output.weight.data = model.output.weight.data.clone()
    assert static_decoder(model, 4) is not decoder


def test_memory_does_not_grow_with_steps(random_model, monkeypatch):
    model, held = random_model((16, 16), vocabulary=64), []
    step = PackedDecoder.step

    def count(self, x, position):
        if position in (50, 100, 250):
            gc.collect()  # what earlier tests left
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.layout == torch.strided]
            held.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
        return step(self, x, position)

    monkeypatch.setattr(PackedDecoder, "step", count)
    codes_of(model, torch.zeros(2, dtype=torch.int64))
    assert len(held) == 3 and max(held) - min(held) < 16 * 64 * 4 * 2  # less than two steps' logits


@pytest.mark.gpu
def test_on_cuda_the_replayed_graph_gives_the_codes_of_the_uncached_argmax_loop(random_model):
    model = random_model()
    expected = codes_of(model, top_k=1)
    assert torch.equal(codes_of(model.cuda(), top_k=1).cpu(), expected)


def test_a_cache_serves_one_decoder_after_the_other_and_never_two_at_once(random_model):
    model = random_model((4, 4))
    weights = pack(model)
    first, second = PackedDecoder(weights, 4), PackedDecoder(weights, 4)
    assert first.cache is not second.cache
    kept = second.cache
    del second
    third = PackedDecoder(weights, 4)
    assert third.cache is kept and PackedDecoder(weights, 6).cache.store.shape[2] == 6
    whole = generate(model, [0, 1, 2], seed=3)
    generate(model, [2, 2, 2], seed=9)  # leaves its own keys and values in the cache
    assert torch.equal(generate(model, [0, 1, 2], seed=3), whole)
