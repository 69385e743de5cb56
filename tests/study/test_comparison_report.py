"""Tables, words and pictures of a comparison."""

import numpy as np
import pytest
from PIL import Image

from mutor_img.study.comparison.config import ComparisonConfig, RowConfig
from mutor_img.study.comparison.jobs import all_jobs
from mutor_img.study.comparison.plots import (
    draw_curves,
    draw_samples,
    draw_targets,
    look,
    mean_and_error,
    target_map,
    wide,
)
from mutor_img.study.comparison.report import Cell, cells, difference, listed, markdown, relative, words
from mutor_img.study.comparison.scoring import strip_path
from mutor_img.study.comparison.statistics import Interval, pooled
from mutor_img.training.log import save_figure

FID = {"base": (10.0, 11.0, 9.0), "better": (8.0, 9.1, 6.9), "alike": (10.5, 9.5, 9.7), "single": (5.0,)}


@pytest.fixture
def study(tmp_path):
    return ComparisonConfig(str(tmp_path), "b", [RowConfig(name) for name in FID], seeds=[0, 1, 2],
                            checkpoints=[100], guidance=[1.0, 2.0], samples=50, reference="r")


@pytest.fixture
def scored():
    """Rows of three seeds, one of a single seed, at guidance 1 alone."""
    return {(row, seed, 100, 1.0): {
        "row": row, "seed": seed, "updates": 100, "fid": value, "flops": 2e15, "seconds": 10.0 * (1 + seed),
        "sampled_parameters": 1000, "trained_parameters": 1000 + 50 * (row == "better"), "recall": 0.5}
        for row, values in FID.items() for seed, value in enumerate(values)}


def test_the_table_has_the_four_equalities_mean_error_and_paired_difference(study, scored):
    page = markdown(study, scored, missing=14)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    assert table[0][:9] == ["row", "updates", "FLOPs", "seconds", "sampled parameters", "trained parameters", "seeds",
                            "FID-50", "against base"]
    assert table[0][9] == "against base, noise pooled"
    rows = {row[0]: row for row in table[2:]}
    assert list(rows) == list(FID)  # in the order of the study
    assert rows["base"][1:9] == ["100", "2e+15", "20", "1,000", "1,000", "3", "10.00 ± 0.58", ""]
    # Differences -2.0, -1.9, -2.1: mean -2, standard deviation 0.1, Student's t of 2 degrees of freedom 4.303.
    assert rows["better"][5:9] == ["1,050", "3", "8.00 ± 0.64", "-2.00 [-2.25, -1.75]"]
    assert rows["single"][7:9] == ["5.00", "-5.00 (one seed)"]
    ours, theirs = (np.log(FID[name]).mean() for name in ("better", "base"))  # three seeds each
    wanted = pooled({name: dict(enumerate(np.log(values).tolist())) for name, values in FID.items()}, "base")
    assert rows["better"][9] == relative(wanted.differences["better"]) == "-20.2 % [-33.8, -3.9]"
    assert rows["base"][9] == "" and rows["better"][9].startswith(f"{100 * np.exp(ours - theirs) - 100:+.1f} % [")
    assert "**14 of 24 scores are still to come.**" in page and "## Guidance 2" not in page


def test_two_rows_have_no_more_noise_than_their_own(study, scored):
    page = markdown(study, {place: line for place, line in scored.items() if place[0] in ("base", "better")}, missing=0)
    assert "noise pooled |" not in page and "-2.00 [-2.25, -1.75]" in page


def test_seconds_are_those_of_one_kind_of_device(study, scored, tmp_path):
    """A mean over a GPU's seconds and a CPU's would say nothing; a row that ran elsewhere alone has none."""
    def devices(row, seed):
        return "CPU" if row == "single" or (row, seed) == ("base", 0) else "NVIDIA H200"

    mixed = {place: {**line, "trained_on": devices(*place[:2])} for place, line in scored.items()}
    page = markdown(study, mixed, missing=0)
    rows = {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")]
                                    for line in page.splitlines() if line[:1] == "|")}
    assert [rows[name][3] for name in ("base", "better", "single")] == ["25", "20", "-"]  # of 10, 20 and 30 s
    assert rows["base"][7] == "10.00 ± 0.58"  # scores are means over all
    assert "seconds are a mean over seeds, of the runs on NVIDIA H200. Sampled" in page
    assert "seconds are a mean over seeds. Sampled" in markdown(study, scored, missing=0)
    older = {place: {**line, "trained_on": devices(*place[:2]) * (place[1] == 2)} for place, line in scored.items()}
    assert "of the runs on devices that their lines do not name" in markdown(study, older, missing=0)
    assert draw_curves(study, mixed, 1.0, tmp_path / "curves.png").is_file()


def test_the_words_say_what_is_separated_and_what_is_not(study, scored):
    found = words(study, cells(study, scored, 1.0), "fid")
    assert found == ["- After 100 updates: better has a lower FID than base; no interval separates alike from base; "
                     "the lowest mean is that of better, which no interval separates from alike; single has fewer than "
                     "two seeds in common with base, and so no interval.",
                     "- After 100 updates, with the noise of all rows pooled (a standard deviation of 8.2% with 4 "
                     "degrees of freedom): better and single have a lower FID than base; no interval separates alike "
                     "from base."]


def test_a_row_is_compared_with_the_baseline_after_as_many_updates(study, scored):
    longer = {("base", seed, 900, 1.0): {**scored["base", seed, 100, 1.0], "updates": 900, "fid": 1.0}
              for seed in range(3)}
    assert words(study, cells(study, {**scored, **longer}, 1.0), "fid")[0] == words(
        study, cells(study, scored, 1.0), "fid")[0]
    by_place = {(cell.row, cell.updates): cell for cell in cells(study, {**scored, **longer}, 1.0)}
    assert difference(by_place["better", 100], by_place["base", 900], "fid").mean == 7.0
    assert isinstance(difference(by_place["better", 100], by_place["base", 100], "fid"), Interval)
    assert difference(by_place["better", 100], None, "fid") is None


def test_a_row_is_compared_with_the_baseline_of_equal_flops(study, scored):
    """The baseline after 196 updates has cost as much as "better" after 100, but for half a percent."""
    longer = {("base", seed, 196, 1.0): {**scored["base", seed, 100, 1.0], "updates": 196, "fid": 7.0 + 0.1 * seed,
                                         "flops": 3.92e15} for seed in range(3)}
    costly = {place: {**line, "flops": 3.94e15 + 1e12 * place[1]} if place[0] == "better" else line
              for place, line in scored.items()}  # registers at random places: no seed's FLOPs are another's
    page = markdown(study, costly | longer, missing=0)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    column = table[0].index("against base of equal FLOPs")
    rows = {(row[0], row[1]): row[column] for row in table[2:]}
    # 8.0 - 7.0, 9.1 - 7.1, 6.9 - 7.2: mean 0.9, standard deviation 1.153, t 4.303, three seeds.
    assert rows["better", "100"] == "+0.90 [-1.96, +3.76]"
    assert all(shown == "" for place, shown in rows.items() if place[0] != "better")
    assert "- At equal FLOPs: better after 100 updates has no clearly other FID than base after 196." in page
    worse = {place: {**line, "fid": line["fid"] + 9} for place, line in costly.items() if place[0] == "better"}
    assert "better after 100 updates has a higher FID than base after 196." in markdown(study, worse | longer, 0)
    assert "equal FLOPs" not in markdown(study, scored | longer, 0)  # 1.96 times those of any other row


def test_where_the_baseline_is_not_scored_nothing_is_compared_with_it(study, scored):
    alone = {("better", seed, 900, 1.0): {**scored["better", seed, 100, 1.0], "updates": 900} for seed in range(3)}
    assert words(study, cells(study, alone, 1.0), "fid") == [
        "- After 900 updates: base is not scored, so that no row is compared with it."]


def test_small_distances_keep_three_digits(study, scored):
    small = {place: {**line, "fid": line["fid"] / 1000} for place, line in scored.items()}
    page = markdown(study, small, missing=0)
    assert "| 0.01000 ± 0.00058 |" in page and "| -0.00200 [-0.00225, -0.00175] |" in page


def test_names_are_listed_as_in_english():
    assert [listed(list("abc")[:n]) for n in (0, 1, 2, 3)] == ["", "a", "a and b", "a, b and c"]


def test_a_band_is_one_standard_error_to_both_sides():
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0)) and mean_and_error([4.0]) == (4.0, 0.0)


def test_curves_are_drawn_of_what_there_is(study, scored, tmp_path):
    assert Image.open(draw_curves(study, scored, 1.0, tmp_path / "c.png")).size[0] > 1000


def test_no_two_of_thirty_rows_look_alike():
    assert len({look(number) for number in range(30)}) == 30


def test_a_scale_whose_runs_were_all_timed_elsewhere_is_drawn_without_seconds(study, scored, tmp_path):
    elsewhere = {place: {**line, "trained_on": "NVIDIA H200"} for place, line in scored.items()}
    here = {(row, seed, 100, 2.0): {**line, "trained_on": "CPU"} for (row, seed, _, _), line in scored.items()
            if row == "base"}
    assert draw_curves(study, elsewhere | here, 2.0, tmp_path / "curves.png").is_file()


def test_no_pooled_noise_without_seeds_in_common_or_of_a_distance_of_none(study, scored):
    apart = {place: line for place, line in scored.items() if (place[0] == "base") == (place[1] == 2)}
    nothing = scored | {("base", 0, 100, 1.0): {**scored["base", 0, 100, 1.0], "fid": 0.0}}
    for lines in (apart, nothing):
        assert "noise pooled |" not in markdown(study, lines, missing=0)


def test_numbers_of_a_logarithmic_axis_stay_formulas(study, scored, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("mutor_img.study.comparison.plots.save_figure", lambda figure, aside: (
        figures.append(figure), save_figure(figure, aside)))
    dear = {place: {**line, "flops": 2e18 if place[0] == "better" else 2e15} for place, line in scored.items()}
    draw_curves(study, dear, 1.0, tmp_path / "c.png")
    axes = figures[0].axes[1]  # over FLOPs
    assert axes.get_xscale() == "log" and all(text.get_parse_math() for text in axes.get_xticklabels())
    assert not axes.xaxis.label.get_parse_math()


def test_numbers_far_apart_are_drawn_on_a_logarithmic_scale():
    few, many = (Cell("row", 1, {0: {"flops": flops}}) for flops in (3e12, 6e13))
    assert wide([few, many], "flops", 19) and not wide([few, many], "flops", 20)


def test_the_map_has_rows_down_and_columns_right_and_is_a_mean_over_seeds(study, tmp_path):
    losses = {("better", 0, 100): [[0, 1, 1.0], [1, 0, 2.0], [1, 2, 4.0]],
              ("better", 1, 100): [[0, 1, 3.0], [1, 0, 2.0], [1, 2, 6.0]], ("better", 0, 50): [[0, 1, 9.0]]}
    np.testing.assert_array_equal(target_map(losses, "better", 100), [[np.nan, 2, np.nan], [2, np.nan, 5]])
    assert target_map(losses, "base", 100) is None
    assert Image.open(draw_targets(study, losses, tmp_path / "t.png")).size[0] > 300
    assert draw_targets(study, {}, tmp_path / "none.png") is None


def test_the_grid_has_the_rows_after_as_many_updates(study, tmp_path):
    study.rows, study.base = study.rows[:2], "mnist/ntp"
    study.rows[0].checkpoints, study.rows[1].checkpoints = [100, 200, 300], [100, 200]
    jobs = all_jobs(study)
    for job in jobs[:2]:
        for step in job.steps:
            path = strip_path(study, job, step, 1.0)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.full((8, 4, 4, 3), step % 256, np.uint8))
    picture = np.asarray(Image.open(draw_samples(study, jobs, 1.0, tmp_path / "s.png")))
    assert 0 <= (picture == 200).all(-1).sum() - 2 * 8 * 96 * 96 < 100  # both rows at 200, and some of the letters
    study.rows[1].checkpoints = [400]
    assert draw_samples(study, all_jobs(study)[:1], 1.0, tmp_path / "s.png") is not None


def test_there_is_no_grid_without_samples(study, tmp_path):
    assert draw_samples(study, [], 1.0, tmp_path / "s.png") is None and not list(tmp_path.iterdir())


def test_the_page_names_the_seeds_of_every_row(study):
    assert "over the seeds 0, 1, 2. " in markdown(study, {}, 0)
    study.rows[0].seeds = [7, 1]
    assert "over the seeds 7, 1, 0, 2. " in markdown(study, {}, 0)
