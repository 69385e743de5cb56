"""Drafts: the codes of sequential decoding from fewer passes, whatever is drafted and however often it is wrong."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from reference import sampling as reference
from scipy import stats

from mutor_img import generate
from mutor_img.blocks import ModelConfig
from mutor_img.common.errors import UserError
from mutor_img.common.streams import Stream, uniform
from mutor_img.decoding import sampler as sampler_module
from mutor_img.decoding.cpu import CHUNK, Packed, PackedDecoder, pack
from mutor_img.decoding.drafting import LOSS, SOURCES, TRIES, Draft, Drafts, Trial
from mutor_img.decoding.gpu import StaticWindow
from mutor_img.decoding.sampler import Sampler, SamplingSettings

LABELS = torch.tensor([2, 0, 1, 1, 0])
GUIDANCE = [{"cfg_scale": 1.0}, {"cfg_scale": 2.0}, {"cfg_scale": 4.0, "cfg_schedule": "linear"},
            {"cfg_scale": 4.0, "cfg_schedule": "interval", "cfg_parameter": 3},
            {"cfg_scale": 4.0, "cfg_schedule": "power-cosine", "cfg_parameter": 2.0}]
EDITS = [{"kept": (3, 7, -1, -1, 2, -1, -1, -1, -1, 9, 1, 4, 4, 0, -1, -1, 5, -1, 10, 6)},
         {"cfg_scale": 1.0, "kept": (-1,) * 9 + (8,) * 11}, {"mix_with": 1, "mix_share": 0.3}]
FILTERS = [{"temperature": 0.7, "top_k": 4}, {"top_p": 0.8}, {"temperature": 1.3, "top_k": 6, "top_p": 0.6}]


def sampled(model, settings, window, source="window", labels=LABELS, batch=64):
    """Return the sampler and its codes of samples 40 and on."""
    sampler = Sampler(model, SamplingSettings(seed=5, **settings), batch, draft=Draft(window, source))
    return sampler, sampler.generate(labels, 40 + torch.arange(len(labels)))


def sampled_as_on_a_gpu(model, settings, window, source):
    """The same by the decoder for GPUs, not compiled, four images at a time."""
    sampler = Sampler(model, SamplingSettings(seed=5, **settings), 4, keep=False, draft=Draft(window, source))
    sampler.fixed, sampler.static, sampler.count = False, True, 4
    return sampler, sampler.generate(LABELS, 40 + torch.arange(len(LABELS)))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("settings", GUIDANCE + FILTERS + EDITS, ids=str)
def test_no_draft_changes_a_code(random_model, settings, source):
    model = random_model()
    _, expected = sampled(model, settings, 0)
    for window in (1, 2, 4, 20, *(["auto"] if settings in EDITS else [])):
        assert torch.equal(sampled(model, settings, window, source)[1], expected), window


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_no_window_changes_a_code(random_model, scale):
    model = random_model()
    _, expected = sampled(model, {"cfg_scale": scale}, 0)
    for window, source in zip(range(1, 21), itertools.cycle(SOURCES)):
        assert torch.equal(sampled(model, {"cfg_scale": scale}, window, source)[1], expected), (window, source)


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (192, 512), (768, 300)])
def test_a_row_of_a_product_in_fp32_does_not_depend_on_the_other_rows(inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, inputs, generator=generator) for rows in (outputs, 2 * 20))
    packed = Packed(weight)
    whole = packed(x)
    for rows in range(4, len(x)):  # as few as a window of 4 has without guidance
        assert torch.equal(packed(x[-rows:]), whole[-rows:]), rows


@pytest.mark.parametrize("wrong", [6, 16])  # rows of two images with three each, and of a chunk with guidance
def test_where_rows_are_not_independent_nothing_is_drafted(random_model, monkeypatch, wrong):
    model, real = random_model(), Packed.__call__
    monkeypatch.setattr(Packed, "__call__", lambda self, x: real(self, x) + 0.5 * (len(x) == wrong) * torch.randn(()))
    settings = {"cfg_scale": 2.0 if wrong == 16 else 1.0}
    sampler, codes = sampled(model, settings, 3, labels=LABELS[:2])
    assert not hasattr(sampler.drafter, "passes")
    if wrong == 6:
        assert torch.equal(codes, sampled(model, settings, 0, labels=LABELS[:2])[1])
    assert hasattr(sampled(model, settings, 4, labels=LABELS[:2])[0].drafter, "passes") == (wrong == 6)


@pytest.mark.parametrize(("seed", "source", "window"), [
    (seed, *draft) for seed, draft in enumerate(itertools.product(SOURCES, (2, 4)))])
def test_no_code_of_ten_thousand_images_of_six_random_models_changes(random_model, seed, source, window):
    model = random_model((2, 2), layers=1, dim=16, vocabulary=5 + seed, seed=seed)
    labels, settings = torch.arange(1672) % 3, SamplingSettings(seed=seed)
    codes = [Sampler(model, settings, 64, draft=Draft(width, source)).generate(labels, torch.arange(len(labels)))
             for width in (0, window)]
    assert torch.equal(*codes)


def test_images_of_one_batch_go_on_at_their_own_pace(random_model):
    model = random_model(dtype=torch.float64)  # of any number at a time
    sampler, codes = sampled(model, {}, 4, "registers")
    assert sampler.count == 64 and len(sampler.drafter.passes.unique()) > 1
    assert torch.equal(codes, sampled(model, {}, 0)[1])


@pytest.mark.parametrize("source", SOURCES)
def test_the_gpu_path_gives_the_codes_of_the_cpu_path(random_model, source):
    model = random_model()
    for settings in ({}, {"cfg_scale": 1.0}, GUIDANCE[3], *EDITS):
        sampler, codes = sampled_as_on_a_gpu(model, settings, 3, source)
        assert torch.equal(codes, sampled(model, settings, 0)[1]) and isinstance(sampler.decoder(3), StaticWindow)


def test_a_window_for_gpus_is_one_graph_for_all_places(random_model):
    torch._dynamo.reset()
    model, graphs = random_model(), []
    decoder = StaticWindow(model, 4, 3, 2)
    decoder.compile_step(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for first in (0, 2, 17, 20):
        with torch.no_grad():
            decoder.window(torch.randn(4, 5, 32), torch.tensor([first, 3]), 3)
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="this decoder is for 3 of 5"):
        decoder.window(torch.randn(4, 4, 32), torch.tensor([0, 3]), 4)


def test_drafts_save_passes_and_a_window_of_one_saves_none(random_model):
    model = random_model()
    for source in SOURCES:
        assert sampled(model, {"temperature": 0.3}, 1, source)[0].drafter.passes.tolist() == [20] * 5
        assert sampled(model, {"temperature": 0.3}, 4, source)[0].drafter.passes.max() < 20


@pytest.mark.parametrize("source", SOURCES)
def test_a_kept_code_is_a_draft_that_is_never_wrong(random_model, source):
    drafter = sampled(random_model(), {"kept": (4, 9, 1, 0, 7) * 3 + (4, 9, 1, 0, -1)}, 4, source)[0].drafter
    assert drafter.passes.tolist() == [5] * 5


def replay(truth, guesses, window):
    """Run drafts against known codes (B, N): a row draws the right code if all drafts before it are right."""
    drafts = Drafts(guesses, window, window, False, torch.full((truth.shape[1],), -1))
    padded = torch.nn.functional.pad(truth, (0, window), value=-7)
    for _ in range(truth.shape[1]):
        if drafts.finished:
            break
        places = drafts.places  # (B, W)
        before = torch.arange(padded.shape[1]) < places[..., None]  # (B, W, N + W)
        right = ((drafts.codes == padded)[:, None] | ~before).all(-1)
        drafts.take(places, torch.where(right, padded.gather(1, places), -9))
    assert drafts.finished and torch.equal(drafts.codes[:, : truth.shape[1]], truth)
    return drafts.passes.tolist()


@pytest.mark.parametrize("window", [1, 2, 3, 7, 20])
def test_wrong_drafts_take_a_pass_for_each_code_and_right_ones_a_window(window):
    truth = torch.randint(11, (3, 20), generator=torch.Generator().manual_seed(0))
    wrong, mixed = (truth + 1) % 11, truth.clone()
    mixed[0] = wrong[0]
    mixed[1, 10] = wrong[1, 10]
    assert replay(truth, wrong, window) == [20] * 3
    assert replay(truth, truth, window) == [math.ceil(20 / window)] * 3
    worst, one, best = replay(truth, mixed, window)
    behind = 0 if 10 % window == window - 1 else 9 - math.ceil(9 / window)  # here a wrong draft spoils all after it
    assert worst == 20 and one == 10 // window + 1 + math.ceil(9 / window) + behind and best == math.ceil(20 / window)


def packed_cache(decoder):
    return decoder.cache.store.flatten(0, 1)  # (2 L, Q, H, slots, head dim)


def static_cache(decoder):
    return [each for cache in decoder.caches for each in (cache.keys, cache.values)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("kind", "cache", "sample"), [
    (PackedDecoder, packed_cache, sampled), (StaticWindow, static_cache, sampled_as_on_a_gpu)], ids=["cpu", "gpu"])
def test_rejected_drafts_leave_the_cache_as_if_never_seen(random_model, monkeypatch, source, kind, cache, sample):
    model, window = random_model(), kind.window
    expected = sample(model, {}, 4, source)[1]

    def spoiled(self, x, start, width):
        for image, place in enumerate(start.tolist()):
            for store in cache(self):
                store[image * 2 : image * 2 + 2, :, place:] = 1000.0
        return window(self, x, start, width)

    monkeypatch.setattr(kind, "window", spoiled)
    assert torch.equal(sample(model, {}, 4, source)[1], expected)


@pytest.mark.parametrize("offsets", [(), (2, 3, 5)], ids=["shared", "one each"])
def test_a_window_gives_the_logits_of_a_whole_forward_pass_with_those_registers(random_model, offsets):
    model, start, width = random_model(register_offsets=offsets), torch.tensor([3, 7]), 4
    codes = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(1))
    anchors = (start + width - 1)[:, None].repeat(1, 3)
    inputs = [torch.arange(2, 5).expand(2, 3)]
    decoder = PackedDecoder(pack(model), 2)
    with torch.no_grad():
        regular, registers = model(LABELS[:2], codes[:, :-1], anchors, *inputs)
        decoder.first(model.cls_embedding(LABELS[:2]))
        for place in range(1, 11):
            decoder.next(codes[:, place - 1], place)
        places = start[:, None] + torch.arange(width)
        x = torch.cat([model.tok_embeddings(codes.gather(1, places - 1)),
                       model.register_embedding(torch.tensor([0, 1, 2 if offsets else 0])
                                                if offsets else torch.zeros(3, dtype=torch.int64)).expand(2, 3, -1)], 1)
        logits = decoder.window(x, start, width)
    expected = torch.cat([regular.gather(1, places[..., None].expand(-1, -1, 11)), registers], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def ties(model, labels, plain, drafted, seed):
    """Return how near a tie the first code that differs is, of each row of codes (B, N) with one; up to 1, it is a tie.

    That is the distance of the random number from the edge between both codes' shares, over what rounding explains.
    """
    found, exact = [], copy.deepcopy(model).double()
    for image in (plain != drafted).any(1).nonzero()[:, 0].tolist():
        place = int((plain[image] != drafted[image]).nonzero()[0])
        true, rounded = (reference.next_distribution(each, int(labels[image]), plain[image, :place].tolist(), scale=2.0
                                                     ).cumsum() for each in (exact, model))
        low, high = sorted((int(plain[image, place]), int(drafted[image, place])))
        number = float(uniform(seed, Stream.TOKEN, torch.tensor(image), torch.tensor(place)))
        distance = max(abs(number - true[low]), abs(number - true[high - 1]))
        found.append(distance / (3 * abs(true - rounded).max()))
    return found


@pytest.mark.parametrize(("seed", "source"), enumerate(SOURCES))
def test_in_bf16_few_images_change_and_those_where_two_codes_tie(random_model, monkeypatch, seed, source):
    monkeypatch.setenv("CXX", "none")  # nothing is compiled
    model = random_model(layers=1, dim=16, seed=seed, dtype=torch.bfloat16)
    labels, settings = torch.arange(60) % 3, SamplingSettings(seed=seed)
    plain, drafted = (Sampler(model, settings, 60, draft=Draft(window, source)).generate(labels, torch.arange(60))
                      for window in (0, 4))
    found = ties(model, labels, plain, drafted, seed)
    assert len(found) <= 6 and all(share <= 1 for share in found), found
    other = plain.clone()
    other[:, 3] = (other[:, 3] + 5) % 11
    assert sum(share > 1 for share in ties(model, labels, plain, other, seed)) > 50  # no ties


def test_drafted_codes_follow_the_law_of_all_sequences_of_five_codes(random_model):
    model = random_model((1, 3), layers=1, dim=16, vocabulary=5, dtype=torch.float64)  # all images at a time
    sequences = list(itertools.product(range(5), repeat=3))
    law = [math.prod(reference.next_distribution(model, 1, sequence[:t], scale=2.0)[sequence[t]] for t in range(3))
           for sequence in sequences]
    labels = torch.ones(3000, dtype=torch.int64)
    codes = generate(model, labels, cfg_scale=2.0, seed=11, draft=3, draft_source="registers")
    counts = (codes @ torch.tensor([25, 5, 1])).bincount(minlength=125).double().numpy()
    expected = torch.tensor(law, dtype=torch.float64).numpy() * len(labels)
    rare = expected < 5  # pooled: the law of small counts is no chi-square
    pooled = [(*x[~rare], x[rare].sum()) for x in (counts, expected)]
    assert expected.sum() == pytest.approx(3000) and len(pooled[0]) > 20
    assert stats.chisquare(*pooled).pvalue > 0.01


def test_auto_drafts_only_where_rows_would_be_padding(random_model, monkeypatch):
    model, seen, window = random_model(), [], PackedDecoder.window
    monkeypatch.setattr(PackedDecoder, "window",
                        lambda self, x, start, width: seen.append((len(x) * x.shape[1], width)) or
                        window(self, x, start, width))
    widths = {}
    for source in ("frequency", "registers"):
        for images in (1, 2, 3, 4, 5, 8):
            seen.clear()
            _, codes = sampled(model, {}, "auto", source, torch.arange(images) % 3)
            assert torch.equal(codes, sampled(model, {}, 0, labels=torch.arange(images) % 3)[1])
            assert all(rows <= 2 * CHUNK for rows, _ in seen)
            widths[source, images] = seen[0][1] if seen else 0
    assert [widths["frequency", images] for images in (1, 2, 3, 4, 5, 8)] == [8, 4, 2, 2, 0, 0]
    assert [widths["registers", images] for images in (1, 2, 3, 4, 5, 8)] == [4, 2, 0, 0, 0, 0]
    seen.clear()
    sampled(model.to(torch.float64), {}, "auto")  # no padding there
    assert not seen


@pytest.mark.parametrize(("seconds", "best"), [
    ({8: 1.0, 16: 3.0}, 8), ({8: 3.0, 16: 1.0}, 16), ({8: 20.0, 16: 20.0}, 0)], ids=["8", "16", "none"])
def test_auto_tries_windows_at_little_loss_and_goes_on_with_the_fastest_way(random_model, monkeypatch, seconds, best):
    model, settings, now, seen = random_model(), SamplingSettings(temperature=0.3), [0.0], []
    window, step = PackedDecoder.window, PackedDecoder.step

    def spend(way, cost, result):
        now[0] += cost
        seen.append(way)
        return result

    monkeypatch.setattr(sampler_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(PackedDecoder, "window", lambda self, x, start, width: spend(
        width, seconds[width], window(self, x, start, width)))
    monkeypatch.setattr(PackedDecoder, "step", lambda self, x, place: spend(0, 1.0, step(self, x, place)))
    auto, in_turn, ways = Sampler(model, settings, 1, draft=Draft("auto")), Sampler(model, settings, 1), []
    for number in range(2 * TRIES + 2):
        label, sample, begun = LABELS[:1], torch.tensor([number]), now[0]
        seen.clear()
        codes = auto.generate(label, sample)
        steps_timed = 0 if number else 2
        assert now[0] - begun <= steps_timed + 20 * (1 + LOSS) + max(seconds.values())
        ways.append(seen[steps_timed])
        assert torch.equal(codes, in_turn.generate(label, sample))
    assert ways == [8, 16] * TRIES + [best] * 2


@pytest.mark.parametrize("settings", GUIDANCE, ids=str)
def test_a_try_that_is_given_up_goes_on_one_code_after_the_other(random_model, monkeypatch, settings):
    model, settings = random_model(), SamplingSettings(seed=5, **settings)
    for images, least, source in itertools.product((1, 2, 4), (1, 9), ("frequency", "registers")):
        monkeypatch.setattr(Trial, "loses", lambda self, certain, seconds, least=least: certain >= least)
        samples = 6 + torch.arange(images)  # of two rounds of eight
        auto = Sampler(model, settings, 64, draft=Draft("auto", source))
        assert torch.equal(auto.generate(LABELS[:images], samples),
                           Sampler(model, settings, 4).generate(LABELS[:images], samples))
        assert auto.drafter.certain < 20 or (source, images) == ("registers", 4)  # those four are too many for drafts


def test_earlier_images_are_remembered_up_to_a_number(random_model, monkeypatch):
    monkeypatch.setattr("mutor_img.decoding.drafting.REMEMBERED", 6)
    sampler, codes = sampled(random_model(), {}, 8, "frequency", torch.arange(9) % 3)
    assert torch.equal(sampler.drafter.seen, codes[3:].sort(0).values)
    assert sampled(random_model(), {}, 8, "window")[0].drafter.seen is None


@pytest.mark.parametrize(("draft", "words"), [
    (Draft(-1), "draft is -1"), (Draft(2.5), "draft is 2.5"),
    (Draft(True), "draft is True"), (Draft("many"), "draft is 'many'"),
    (Draft(2, "regsters"), "did you mean 'registers'"),
], ids=str)
def test_a_draft_that_a_model_cannot_have_is_one_clear_line(random_model, draft, words):
    with pytest.raises(UserError) as error:
        Sampler(random_model(register_offsets=None), SamplingSettings(), 4, draft=draft)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("draft, fitted", [
    (Draft(21, "frequency"), Draft(20, "frequency")), (Draft(10**9, "registers"), Draft(20, "window")),
    (Draft("auto", "registers"), Draft("auto", "window")), (Draft(20, "window"), Draft(20, "window"))], ids=str)
def test_what_a_model_cannot_have_becomes_what_it_can_and_changes_no_code(random_model, draft, fitted):
    model, labels = random_model(register_offsets=None), torch.arange(3)
    sampler = Sampler(model, SamplingSettings(seed=2), 3, draft=draft)
    assert sampler.draft == sampler.drafter.draft == fitted
    assert torch.equal(sampler.generate(labels, labels), generate(model, labels, seed=2))


def test_flags_are_read_as_written():
    assert [Draft.parse(word, "frequency").window for word in ("0", "off", "8", "auto")] == [0, 0, 8, "auto"]
    for words in (("eight", "window"), ("8.5", "window"), ("8", "windows"), ("", "window")):
        with pytest.raises(UserError, match="--draft"):
            Draft.parse(*words)
    assert Draft(0, "registers").fit(ModelConfig(1, 1, 4, register_offsets=())).source == "registers"


def test_weights_that_are_not_finite_are_named_with_drafts_too(random_model):
    model = random_model()
    model.output.weight.data[3, 3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        generate(model, LABELS, draft=4)
    assert generate(random_model(), [], draft=4).shape == (0, 20)
