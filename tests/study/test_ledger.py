"""What is scored: lines that are whole or absent, and which of them count."""

import json
from pathlib import Path

import pytest
import torch

from mutor_img.checkpoints.folder import checkpoint_at, read_meta, write_checkpoint
from mutor_img.common.errors import UserError
from mutor_img.common.files import append_line, read_lines
from mutor_img.study.comparison.config import ComparisonConfig, RowConfig
from mutor_img.study.comparison.jobs import all_jobs, row_jobs
from mutor_img.study.comparison.ledger import (
    ROWS,
    TARGETS,
    add,
    check_same_codes,
    check_same_judge,
    scored,
    scoring_key,
    targets,
    wanted,
    weights_at,
)


@pytest.fixture
def study(tmp_path):
    config = ComparisonConfig(str(tmp_path / "study"), "mnist/ntp", [RowConfig("a"), RowConfig("b")], seeds=[0, 1],
                              checkpoints=[10, 20], guidance=[1.0, 2.0], reference="r.npz")
    config.validate()
    return config


def line(study, job, step, scale, weights="w", **more):
    return {"row": job.row, "seed": job.seed, "updates": step, "cfg_scale": scale, "config_hash": job.key,
            "scoring_hash": scoring_key(study), "weights_hash": weights, "fid": 1.0, **more}


def test_a_line_that_a_kill_cut_short_goes_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    append_line(path, '{"a": 1}')
    with open(path, "a") as file:
        file.write('{"a": 2, "b')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, '{"a": 3}')
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'
    assert read_lines(tmp_path / "none") == []


def write_many(path: str, name: str) -> None:
    for number in range(40):
        append_line(path, json.dumps({"name": name, "number": number, "filler": "x" * 3000}))


def test_processes_that_append_at_once_lose_nothing(processes, tmp_path):
    path = str(tmp_path / "lines.jsonl")
    writers = [processes.Process(target=write_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    found = read_lines(path)
    assert len(found) == 80
    for name in "ab":
        assert [row["number"] for row in found if row["name"] == name] == list(range(40))


def test_a_line_counts_for_its_settings_run_and_weights_only_and_the_last_one_does(study):
    jobs = all_jobs(study)
    job = jobs[0]
    good = (job.row, job.seed, 10, 1.0)
    assert scored(study, jobs) == {} and good in wanted(study, jobs) and len(wanted(study, jobs)) == 16
    for other in ({"config_hash": "x"}, {"scoring_hash": "x"}, {"updates": 11}, {"cfg_scale": 1.5}, {"seed": 7},
                  {"row": "c"}):
        add(study, ROWS, {**line(study, job, 10, 1.0), **other})
    assert scored(study, jobs) == {}
    for value in (2.0, 3.0):
        add(study, ROWS, line(study, job, 10, 1.0, fid=value))
    assert {place: found["fid"] for place, found in scored(study, jobs).items()} == {good: 3.0}


def test_seeds_of_one_row_have_the_same_codes(study):
    jobs = row_jobs(study, "a")
    assert jobs == [job for job in all_jobs(study) if job.row == "a"]
    add(study, ROWS, line(study, jobs[0], 10, 1.0, codes_hashes=["c"], val_codes_hash="v"))
    add(study, ROWS, {**line(study, jobs[1], 10, 1.0, codes_hashes=["x"]), "config_hash": "of other settings"})
    check_same_codes(study, jobs, {"codes_hashes": ["c"], "val_codes_hash": "v"})
    for name, value in (("codes_hashes", ["d"]), ("val_codes_hash", "w")):
        with pytest.raises(UserError, match=f"a, seed 0, had codes with {name} .*one row cannot hold both"):
            check_same_codes(study, jobs, {"codes_hashes": ["c"], "val_codes_hash": "v", name: value})
    check_same_codes(study, row_jobs(study, "b"), {"codes_hashes": ["d"]})  # rows may have codes of their own


def test_targets_of_as_many_held_out_images_count(study):
    job = all_jobs(study)[0]
    for count in (100, 200):
        about = {"row": job.row, "seed": job.seed, "updates": 10, "config_hash": job.key, "weights_hash": "w"}
        add(study, TARGETS, {**about, "held_out": count, "losses": [[0, 1, count]]})
    study.held_out = 100
    assert targets(study, [job]) == {(job.row, job.seed, 10): [[0, 1, 100]]}


def test_a_damaged_checkpoint_is_its_own_runs_trouble(study):
    job = all_jobs(study)[0]
    write_checkpoint(job.run_dir, 10, {"model": {"w": torch.zeros(2)}}, {"kind": "generator"}, 1)
    add(study, ROWS, line(study, job, 10, 1.0, weights_at(job, 10)))
    (checkpoint_at(job.run_dir, 10) / "checkpoint.json").write_text("{")
    assert not job.trained and weights_at(job, 10) is None
    assert list(scored(study, [job])) == [(job.row, job.seed, 10, 1.0)]


def test_rows_of_the_same_settings_have_weights_of_their_own(study):
    study.rows = [RowConfig("a"), RowConfig("twin")]
    jobs = [job for job in all_jobs(study) if job.seed == 0]
    assert jobs[0].key == jobs[1].key
    for number, job in enumerate(jobs):
        write_checkpoint(job.run_dir, 10, {"model": {"w": torch.full((2,), float(number))}}, {}, 1)
        add(study, ROWS, line(study, job, 10, 1.0, weights=weights_at(job, 10)))
    assert {place[0] for place in scored(study, jobs)} == {"a", "twin"}


def test_a_score_of_other_weights_than_the_checkpoint_s_does_not_count(study):
    jobs = all_jobs(study)
    job = jobs[0]
    write_checkpoint(job.run_dir, 10, {"model": {"w": torch.zeros(2)}}, {}, 1)
    digest = read_meta(checkpoint_at(job.run_dir, 10))["files"]["model.safetensors"]["sha256"]
    add(study, ROWS, line(study, job, 10, 1.0))
    assert scored(study, jobs) == {}
    add(study, ROWS, line(study, job, 10, 1.0, weights=digest))
    add(study, ROWS, line(study, job, 20, 1.0))  # its checkpoint is gone: nothing speaks against it
    assert set(scored(study, jobs)) == {(job.row, 0, 10, 1.0), (job.row, 0, 20, 1.0)}


@pytest.mark.parametrize("name, value", [("samples", 500), ("temperature", 0.9), ("reference", "other"),
                                         ("metrics", ["fid"]), ("features", "mnist"), ("features_weights", "x")])
def test_every_setting_of_a_score_is_part_of_its_key(study, name, value):
    before = scoring_key(study)
    setattr(study, name, value)
    assert scoring_key(study) != before


def test_settings_that_decide_no_score_are_not_part_of_its_key(study):
    before = scoring_key(study)
    study.guidance, study.seeds, study.batch_size, study.budget_hours = [3.0], [5], 7, 1.0
    assert scoring_key(study) == before


def test_one_table_holds_no_scores_of_two_references(study):
    judge = {"reference_hash": "one", "features_hash": "net"}
    add(study, ROWS, line(study, all_jobs(study)[0], 10, 1.0, judged_by=judge))
    check_same_judge(study, judge)
    with pytest.raises(UserError, match=r"rows\.jsonl: a, seed 0, was scored with reference_hash one, now it is two"):
        check_same_judge(study, {**judge, "reference_hash": "two"})
    assert len(Path(study.run_dir, ROWS).read_text().splitlines()) == 1
