"""Decoding compiles seldom, whatever sizes are asked for, and what it has compiled goes when nobody uses it."""

import weakref

import pytest
import torch

from mutor_img import generate
from mutor_img.decoding import cpu, gpu, sampler
from mutor_img.decoding.drafting import Draft
from mutor_img.decoding.gpu import StaticDecoder, static_decoder
from mutor_img.decoding.sampler import Sampler, SamplingSettings


class Counter:
    """A compiler that runs what it is given, and counts."""

    count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


@pytest.fixture
def as_on_a_gpu(monkeypatch, counter):
    """Decode as on a GPU, with graphs that are counted in place of CUDA's."""
    compile_step = StaticDecoder.compile_step
    monkeypatch.setattr(sampler, "_replays", lambda device: True)
    monkeypatch.setattr(StaticDecoder, "compile_step", lambda self, **_: compile_step(self, backend=counter))
    return counter


def test_numbers_of_images_from_1_to_64_make_at_most_7_graphs_and_the_codes_of_the_cpu(random_model, as_on_a_gpu):
    model, labels = random_model((2, 2), layers=1), torch.arange(64) % 3
    for scale, graphs in ((2.0, 7), (1.0, 8)):  # with guidance 2 to 128 rows, then without 1 to 64
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "_replays", lambda device: False)
            expected = generate(model, labels, cfg_scale=scale)
        for count in (*range(1, 65), 7, 64, 1):
            assert torch.equal(generate(model, labels[:count], cfg_scale=scale), expected[:count])
        assert as_on_a_gpu.count <= graphs


def test_windows_of_drafts_too_make_at_most_7_graphs_for_1_to_64_images(random_model, as_on_a_gpu):
    model, labels = random_model((2, 2), layers=1), torch.arange(64) % 3
    expected = generate(model, labels)
    as_on_a_gpu.count = 0
    for window, graphs in ((2, 7), (3, 14)):
        for count in (*range(1, 65), 7, 64, 1):
            drafting = Sampler(model, SamplingSettings(), count, draft=Draft(window))
            assert torch.equal(drafting.generate(labels[:count], torch.arange(count)), expected[:count])
        assert as_on_a_gpu.count == graphs


def test_many_models_in_one_process_do_not_share_torchs_limit_of_8(random_model, as_on_a_gpu):
    models = [random_model((1, 2), layers=1, seed=seed) for seed in range(9)]
    assert all(generate(model, [0]).shape == (1, 2) for model in models) and as_on_a_gpu.count == 9


def test_a_batch_of_any_size_is_cut_to_the_most_rows(random_model, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(sampler, "MOST_ROWS", 8)
    model = random_model((2, 2), layers=1)
    for scale, count in ((2.0, 4), (1.0, 8)):
        many = Sampler(model, SamplingSettings(cfg_scale=scale), batch=1000)
        assert many.count == count and many.decoder().rows == 8
    assert torch.equal(generate(model, [1] * 21)[:5], generate(model, [1] * 5))


def test_rows_that_stand_idle_need_nothing(random_model):
    decoder = StaticDecoder(random_model((2, 2), vocabulary=50), 4, eager=True)
    with torch.no_grad():
        decoder.first(torch.ones(4, 32))
        decoder.next(torch.tensor([49, 49, 49, 49]), 1)
        for logits in (decoder.first(torch.ones(1, 32)), decoder.next(torch.tensor([49]), 1)):
            assert logits.shape == (1, 50)


@pytest.mark.parametrize("ascending", [True, False])
@torch.inference_mode()  # as samplers run it
def test_the_kernel_of_bf16_on_cpus_is_compiled_for_a_few_kinds_of_shapes(counter, monkeypatch, ascending):
    compiled = torch.compile(cpu._attention, dynamic=True, backend=counter)
    monkeypatch.setattr(cpu, "_compiled_attention", lambda: compiled)
    shapes = [(heads, dim, rows, spare, seen) for heads, dim in ((2, 16), (12, 64), (1, 8), (16, 16))
              for rows in (1, 2, 8, 12, 16, 33) for spare in (0, rows) for seen in (2, 3, 8, 12, 16, 20)]
    for heads, dim, rows, spare, seen in shapes if ascending else reversed(shapes):
        cache = cpu.PrefixCache(1, rows + spare, heads, 20, dim, torch.empty(0, dtype=torch.bfloat16))
        assert cache.attend(0, seen - 1, torch.zeros(rows, 3, heads, dim)).shape == (rows, heads, dim)
    assert counter.count <= 5  # torch goes on uncompiled after 8


@pytest.mark.parametrize("eager", [True, False])
def test_a_decoder_that_is_dropped_frees_its_cache_at_once(random_model, as_on_a_gpu, eager, no_collector):
    decoder = StaticDecoder(random_model((2, 2), layers=1), 2, eager)
    with no_collector:
        with torch.no_grad():
            decoder.next(torch.tensor([1, 2]), 1)
        gone = weakref.ref(decoder), weakref.ref(decoder.caches[0].keys)
        del decoder
        assert [reference() for reference in gone] == [None, None]


def test_a_model_that_is_dropped_takes_decoders_and_weights_with_it(random_model, as_on_a_gpu, no_collector):
    model = random_model((2, 2), layers=1)
    with no_collector:
        used = Sampler(model, SamplingSettings(), 3)
        used.generate(torch.tensor([0, 1, 2]), torch.arange(3))
        gone = [weakref.ref(x) for x in (model, used.decoder().caches[0].keys, model.output.weight)]
        before = len(gpu._DECODERS)
        del model, used
        assert [reference() for reference in gone] == [None] * 3 and len(gpu._DECODERS) == before - 1


def test_weights_that_move_take_the_old_caches_with_them(random_model, no_collector):
    model = random_model((2, 2), layers=1)
    old = static_decoder(model, 4)
    assert static_decoder(model, 3) is old and static_decoder(model, 8) is not old and static_decoder(model, 4) is old
    with no_collector:
        gone = weakref.ref(old)
        del old
        model.output.weight.data = model.output.weight.data.clone()
        static_decoder(model, 16)
        assert gone() is None
