"""Where registers stand, how far they look, what they predict, and the loss: the laws, by counting and by hand."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from reference import mutor as reference
from scipy import stats

from mutor_img import draw_registers, mutor_loss
from mutor_img.common.errors import UserError
from mutor_img.registers import IGNORE, RegisterLaw, count_targets, register_ids, register_targets

GRIDS = [(4, 5), (3, 7), (5, 4)]


def draw(kind="2d", count=None, d_max=3, grid=(4, 5), seed=0, step=0, samples=20_000, **switches):
    samples = torch.arange(samples) if isinstance(samples, int) else torch.tensor(samples)
    return draw_registers(kind, count, d_max, grid, seed, step, samples, **switches)


def is_uniform(counts):
    """The seeds are fixed, so that the bound can be strict without the tests ever being flaky."""
    return stats.chisquare(list(counts)).pvalue > 1e-3


def places_are_uniform(anchors, eligible):
    """Chi-square of places drawn without replacement, R of n per row: the usual statistic times (n - 1) / (n - R)."""
    rows, registers = anchors.shape
    counts = Counter(anchors.flatten().tolist())
    assert set(counts) <= set(eligible)
    n = len(eligible)
    if n == registers:
        return all(counts[place] == rows for place in eligible)
    expected = rows * registers / n
    statistic = sum((counts[place] - expected) ** 2 / expected for place in eligible) * (n - 1) / (n - registers)
    return stats.chi2.sf(statistic, n - 1) > 1e-3


def offset_of(pair, grid):
    return (pair[0] - 1) * grid[1] + pair[1] - 1


# ---- offsets


@pytest.mark.parametrize("grid, d_max", [((16, 16), 4), ((4, 5), 3), ((4, 5), 4), ((3, 7), 2), ((8, 8), 5)])
@pytest.mark.parametrize("mixed", [False, True])
def test_2d_offsets_are_uniform_over_exactly_the_allowed_pairs(grid, d_max, mixed):
    _, offsets = draw("2d", 1, d_max, grid, mixed=mixed)
    counts = Counter(offsets.flatten().tolist())
    assert set(counts) == {offset_of(pair, grid) for pair in reference.pairs_2d(d_max)}
    assert len(counts) == d_max**2 - 1
    assert is_uniform(counts.values())


@pytest.mark.parametrize("d_max", [2, 4, 7])
@pytest.mark.parametrize("mixed", [False, True])
def test_1d_offsets_are_uniform_over_one_to_d_max(d_max, mixed):
    _, offsets = draw("1d", 1, d_max, mixed=mixed)
    counts = Counter(offsets.flatten().tolist())
    assert set(counts) == set(range(1, d_max + 1))
    assert is_uniform(counts.values())


def test_d_max_4_of_16_columns_gives_15_targets_from_the_next_token_to_three_down_three_right():
    assert RegisterLaw("2d", (16, 16), 4).offsets == (1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51)
    assert RegisterLaw("1d", (16, 16), 4).offsets == (1, 2, 3, 4)


@pytest.mark.parametrize("placement", [{"count": 4}, {}, {"every": 3}])
def test_an_unmixed_sequence_has_one_offset_and_the_sequences_of_a_batch_differ(placement):
    _, offsets = draw(samples=64, **placement)
    assert (offsets == offsets[:, :1]).all()
    assert len(set(offsets[:, 0].tolist())) == 8


@pytest.mark.parametrize("placement", [{"count": 4}, {}, {"every": 3}])
def test_mixed_offsets_are_independent_between_the_registers_of_a_sequence(placement):
    _, offsets = draw(mixed=True, **placement)
    neighbours = Counter(zip(offsets[:, 0].tolist(), offsets[:, 1].tolist(), strict=True))
    assert len(neighbours) == 64
    assert is_uniform(neighbours.values())


# ---- placement


@pytest.mark.parametrize("grid", GRIDS)
def test_dense_has_one_register_for_each_input(grid):
    anchors, offsets = draw(grid=grid, samples=3)
    assert anchors.tolist() == [list(range(grid[0] * grid[1]))] * 3
    assert offsets.shape == anchors.shape and anchors.dtype == offsets.dtype == torch.int64


def test_every_kth_starts_at_the_class_token():
    assert draw(every=2, samples=2)[0].tolist() == [[0, 2, 4, 6, 8, 10, 12, 14, 16, 18]] * 2
    assert draw(every=7, samples=1)[0].tolist() == [[0, 7, 14]]
    assert draw(every=1, samples=1)[0].tolist() == draw(samples=1)[0].tolist()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind, d_max", [("1d", 4), ("2d", 3)])
@pytest.mark.parametrize("mixed", [False, True])
def test_sparse_anchors_differ_and_all_have_a_target(grid, kind, d_max, mixed):
    limit = RegisterLaw(kind, grid, d_max).largest_count
    for count in (1, 3, limit):
        anchors, offsets = draw(kind, count, d_max, grid, samples=2000, mixed=mixed)
        assert anchors.shape == offsets.shape == (2000, count)
        assert anchors.min() >= 0 and all(len(set(row)) == count for row in anchors.tolist())
        assert (anchors + offsets <= grid[0] * grid[1]).all()


@pytest.mark.parametrize("grid, wrap", [((4, 5), True), ((4, 5), False), ((3, 7), True), ((3, 7), False)])
def test_sparse_anchors_are_uniform_over_the_eligible_places_of_each_offset(grid, wrap):
    anchors, offsets = draw("2d", 4, 3, grid, wrap=wrap)
    for pair in reference.pairs_2d(3):
        rows = anchors[offsets[:, 0] == offset_of(pair, grid)]
        assert len(rows) > 2000
        assert places_are_uniform(rows, reference.eligible_anchors(*pair, grid, wrap))


def test_1d_anchors_are_uniform_over_the_eligible_places_of_each_offset():
    anchors, offsets = draw("1d", 5, 4)
    for d in range(1, 5):
        assert places_are_uniform(anchors[offsets[:, 0] == d], range(20 - d + 1))


def test_every_subset_of_places_is_equally_likely():
    anchors, _ = draw("1d", 2, 1, (2, 3))
    counts = Counter(tuple(sorted(row)) for row in anchors.tolist())
    assert set(counts) == set(combinations(range(6), 2))
    assert is_uniform(counts.values())


@pytest.mark.parametrize("wrap", [True, False])
def test_mixed_anchors_are_uniform_over_the_places_that_fit_the_farthest_and_independent_of_offsets(wrap):
    anchors, offsets = draw(count=4, mixed=True, wrap=wrap)
    eligible = reference.eligible_anchors(3, 3, (4, 5), wrap)
    assert eligible == (list(range(9)) if wrap else [0, 1, 2, 3, 6, 7, 8])
    assert places_are_uniform(anchors, eligible)
    pairs = Counter(zip(anchors.flatten().tolist(), offsets.flatten().tolist(), strict=True))
    table = [[pairs[t, d] for d in sorted(set(offsets.flatten().tolist()))] for t in eligible]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_1d_mixed_anchors_fit_the_farthest_offset():
    anchors, _ = draw("1d", 5, 4, mixed=True)
    assert places_are_uniform(anchors, range(17))


LIMITS = [("2d", (16, 16), 4, True, 206), ("2d", (16, 16), 5, True, 189), ("2d", (8, 8), 4, True, 38),
          ("2d", (16, 16), 4, False, 169), ("2d", (8, 8), 4, False, 25), ("2d", (4, 5), 3, True, 9),
          ("2d", (4, 5), 3, False, 6), ("1d", (16, 16), 4, True, 253), ("1d", (4, 5), 1, True, 20)]


@pytest.mark.parametrize("kind, grid, d_max, wrap, limit", LIMITS)
def test_the_largest_count_is_drawn_in_full_and_one_more_is_an_error_that_names_it(kind, grid, d_max, wrap, limit):
    for mixed in (False, True):
        anchors, offsets = draw(kind, limit, d_max, grid, samples=200, wrap=wrap, mixed=mixed)
        assert (anchors + offsets <= grid[0] * grid[1]).all()
        assert all(len(set(row)) == limit for row in anchors.tolist())
    with pytest.raises(UserError, match=rf"\b{limit}\b") as error:
        draw(kind, limit + 1, d_max, grid, wrap=wrap)
    assert str(limit + 1) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mistake", [
    {"kind": "3d"}, {"kind": "none"}, {"d_max": 0}, {"d_max": 1}, {"d_max": 5}, {"count": 0}, {"count": -1},
    {"every": 0}, {"count": 3, "every": 2}, {"kind": "1d", "wrap": False}, {"kind": "1d", "d_max": 21},
    {"grid": (0, 5)}])
def test_a_law_that_cannot_be_drawn_is_one_clear_line(mistake):
    with pytest.raises(UserError) as error:
        draw(**mistake)
    assert "\n" not in str(error.value)


# ---- keys of the draw

SWITCHES = [{"count": 4}, {"count": 4, "mixed": True}, {"count": 4, "wrap": False}, {"kind": "1d", "count": 9},
            {"mixed": True}, {"mixed": True, "every": 2, "wrap": False}]


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_sequence_draw_does_not_depend_on_the_rest_of_the_batch(switches):
    numbers = [1_281_166, 3, 0, 999, 2**40, 17]
    batch = draw(step=5, samples=numbers, **switches)
    shuffled = draw(step=5, samples=[*numbers[::-1], 4, 4], **switches)
    for i, number in enumerate(numbers):
        alone = draw(step=5, samples=[number], **switches)
        for drawn, other, single in zip(batch, shuffled, alone, strict=True):
            assert torch.equal(drawn[i], single[0]) and torch.equal(drawn[i], other[5 - i])


@pytest.mark.parametrize("switches", SWITCHES)
def test_each_anchor_and_offset_can_be_changed_alone(switches):
    for drawn in draw(step=5, samples=3, **switches):
        wanted = drawn.clone()
        wanted[1, 2] = drawn.view(drawn.shape)[1, 2] = 99
        assert torch.equal(drawn, wanted)


@pytest.mark.parametrize("switches", SWITCHES)
def test_steps_seeds_and_samples_give_fresh_draws(switches):
    base = torch.cat(draw(seed=1, step=2, samples=500, **switches), dim=1)
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 2, "step": 1}):
        drawn = torch.cat(draw(samples=500, **other, **switches), dim=1)
        assert (drawn == base).all(dim=1).float().mean() < 0.2  # dense mixed rows: never, one offset of 8: rarely
    assert len(torch.unique(base, dim=0)) > 100


def test_consecutive_steps_of_one_sample_have_independent_offsets():
    steps = [draw(count=1, step=step, samples=8000)[1][:, 0].tolist() for step in (0, 1)]
    assert is_uniform(Counter(zip(*steps, strict=True)).values())


def test_drawing_touches_no_generator_and_no_input():
    samples, before = torch.arange(5), torch.get_rng_state()
    draw_registers("2d", 4, 3, (4, 5), 0, 0, samples)
    assert torch.equal(samples, torch.arange(5)) and torch.equal(before, torch.get_rng_state())


# ---- targets and ids

TARGETS = torch.arange(101, 121)[None]  # x_j is 100 + j

BY_HAND = [  # anchor, (d_h, d_w) -> target x_j (None: past the end), id, on 4 rows of 5
    (0, (1, 2), 1, 0),  # the class token's own next code, id 0
    (0, (2, 3), 7, 6),  # the class token has no cell; the raster formula holds
    (7, (2, 3), 14, 13),  # x_7 is row 1 column 1 -> row 2 column 3
    (7, (1, 2), 8, 7),  # the next token: the id of the anchor itself
    (5, (1, 2), 6, 5),  # end of row 0 wraps to the start of row 1
    (9, (3, 3), None, 19),  # x_9 is row 1 column 3, two down and two right: 9 + 12 = 21
    (8, (3, 3), 20, 19),  # the last anchor of the farthest: x_20
    (19, (1, 2), 20, 19), (19, (1, 3), None, 19), (14, (2, 1), 19, 18), (15, (2, 1), 20, 19), (16, (2, 1), None, 19)]


@pytest.mark.parametrize("anchor, pair, target, position", BY_HAND)
def test_targets_and_ids_by_hand_on_four_rows_of_five(anchor, pair, target, position):
    anchors, offsets = torch.tensor([[anchor]]), torch.tensor([[offset_of(pair, (4, 5))]])
    assert register_ids(anchors, offsets, 20).item() == position
    assert register_targets(TARGETS, anchors, offsets).item() == (IGNORE if target is None else 100 + target)
    assert count_targets(anchors, offsets, 20) == (target is not None)


def test_ids_are_those_of_the_regular_input_with_the_same_target_and_stay_below_n():
    anchors, offsets = (x.flatten() for x in torch.meshgrid(torch.arange(256), torch.arange(1, 60), indexing="ij"))
    ids = register_ids(anchors[None], offsets[None], 256)[0]
    for t, d, position in zip(anchors.tolist(), offsets.tolist(), ids.tolist(), strict=True):
        assert position == (t + d - 1 if t + d <= 256 else 255)


def test_dense_d_max_4_at_16_by_16_has_about_ninety_percent_targets():
    per_offset = [256 - d + 1 if d > 0 else 0 for d in RegisterLaw("2d", (16, 16), 4).offsets]
    exact = sum(per_offset) / (15 * 256)
    anchors, offsets = draw(d_max=4, grid=(16, 16), samples=5000)
    assert exact == pytest.approx(0.9, abs=0.01)
    assert float(count_targets(anchors, offsets, 256)) / anchors.numel() == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("switches", [{}, {"every": 3}, {"mixed": True}])
def test_the_drop_switch_drops_exactly_the_targets_over_the_right_edge(grid, switches):
    kept = draw(grid=grid, samples=300, **switches)
    dropped = draw(grid=grid, samples=300, wrap=False, **switches)
    column_shift = {offset_of(pair, grid): pair[1] for pair in reference.pairs_2d(3)}
    tokens, seen = grid[0] * grid[1], Counter()
    assert torch.equal(kept[0], dropped[0])
    for t, d, other in zip(*(x.flatten().tolist() for x in (*kept, dropped[1])), strict=True):
        over = reference.wraps(t, column_shift[d], grid[1])
        assert (t + other > tokens) if over else (other == d)
        seen[over, t == 0] += 1
    assert seen[True, False] > 50 and seen[False, True] > 50 and seen[True, True] == 0


def test_the_drop_switch_by_hand_on_four_rows_of_five():
    law = RegisterLaw("2d", (4, 5), 3, wrap=False)
    over = {d: {t for t in range(20) if bool(law.runs_over(torch.tensor(t), torch.tensor(d)))} for d in law.offsets}
    assert over[1] == over[6] == over[11] == {5, 10, 15}  # one to the right: the last column (x_20 is no anchor)
    assert over[2] == over[7] == over[12] == {4, 5, 9, 10, 14, 15, 19}  # two to the right: the last two columns
    assert over[5] == over[10] == set()  # straight down never


def test_sparse_draws_with_the_drop_switch_keep_every_target_within_its_row_block():
    anchors, offsets = draw(count=6, wrap=False, samples=3000)
    for t, d in zip(anchors.flatten().tolist(), offsets.flatten().tolist(), strict=True):
        assert t + d <= 20 and not reference.wraps(t, d % 5 + 1, 5)


# ---- loss


def losses(grid=(4, 5), vocabulary=11, weight=0.5, batch=3, **switches):
    """The product's loss and the brute-force one, with the tensors they are of."""
    generator = torch.Generator().manual_seed(7)
    anchors, offsets = draw(grid=grid, samples=list(range(batch)), **switches)
    tokens = grid[0] * grid[1]
    logits = torch.randn(batch, tokens, vocabulary, generator=generator, requires_grad=True)
    register_logits = torch.randn(*anchors.shape, vocabulary, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (batch, tokens), generator=generator)
    arguments = (logits, register_logits, targets, anchors, offsets, weight)
    return mutor_loss(*arguments), reference.loss(*arguments), arguments


@pytest.mark.parametrize("switches", [*SWITCHES, {}, {"wrap": False}, {"every": 3}])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_mean_over_the_batch_term_by_term(switches, weight):
    product, brute, (logits, register_logits, *_) = losses(weight=weight, **switches)
    assert product.item() == pytest.approx(brute.item(), rel=1e-6)
    mine = torch.autograd.grad(product, [logits, register_logits], retain_graph=True)
    theirs = torch.autograd.grad(brute, [logits, register_logits], allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-7, rtol=1e-5)


def test_the_register_mean_is_over_the_batch_and_not_a_mean_of_sequence_means():
    logits, targets = torch.zeros(2, 20, 4), torch.zeros(2, 20, dtype=torch.int64)
    anchors, offsets = torch.arange(20).expand(2, 20), torch.tensor([[1], [19]]).expand(2, 20)
    register_logits = torch.zeros(2, 20, 4)
    register_logits[0, :, 0] = 50.0  # sequence 0: 20 targets without loss; sequence 1: 2 targets of ln 4
    loss = mutor_loss(logits, register_logits, targets, anchors, offsets, weight=1.0)
    assert loss.item() == pytest.approx(2 * math.log(4) / 22)


def test_a_register_without_a_target_has_no_loss_and_no_gradient():
    product, _, (logits, register_logits, targets, anchors, offsets, _) = losses(mixed=True)
    product.backward()
    missing = anchors + offsets > 20
    assert 0 < missing.sum() < missing.numel()
    assert (register_logits.grad[missing] == 0).all() and (register_logits.grad[~missing] != 0).all()
    with torch.no_grad():
        register_logits[missing] = 1e4
    assert mutor_loss(logits, register_logits, targets, anchors, offsets).item() == product.item()


def test_a_batch_whose_registers_all_lack_a_target_has_a_finite_loss():
    logits, targets = torch.zeros(1, 20, 4), torch.zeros(1, 20, dtype=torch.int64)
    anchors, offsets = torch.full((1, 3), 19), torch.full((1, 3), 2)
    loss = mutor_loss(logits, torch.randn(1, 3, 4), targets, anchors, offsets, weight=0.5)
    assert loss.item() == pytest.approx(0.5 * math.log(4))


def test_without_registers_the_loss_is_plain_next_token_cross_entropy():
    _, _, (logits, _, targets, *_) = losses()
    expected = sum(reference.cross_entropy(logits[b, t], targets[b, t]) for b in range(3) for t in range(20)) / 60
    assert mutor_loss(logits, None, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_computed_in_fp32_whatever_the_logits_are():
    _, _, (logits, register_logits, *others) = losses()
    rounded = [x.detach().bfloat16() for x in (logits, register_logits)]
    loss = mutor_loss(*rounded, *others)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mutor_loss(*[x.float() for x in rounded], *others).item(), abs=0)


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_comparison_of_losses_notices_targets_off_by_one(monkeypatch, shift):
    def shifted(targets, anchors, offsets):
        return register_targets(targets, anchors, (offsets + shift).clamp(min=1))

    monkeypatch.setattr("mutor_img.registers.register_targets", shifted)
    product, brute, _ = losses(count=4)
    assert abs(product.item() - brute.item()) > 1e-2
