"""The YAML of a comparison: which runs it makes, in which order and under which keys, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mutor_img.common import cli
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.study import __main__ as command
from mutor_img.study.comparison.command import is_comparison
from mutor_img.study.comparison.commands import printed, stages, torchrun
from mutor_img.study.comparison.config import ComparisonConfig, RowConfig
from mutor_img.study.comparison.jobs import all_jobs, find_job

ROOT = Path(__file__).parents[2]
STUDY = """
base: mnist/ntp
rows:
  - {name: a}
  - {name: b, overrides: [registers.kind=2d, registers.count=20]}
  - {name: c, config: mnist/mutor1d, checkpoints: [300]}
seeds: [4, 1]
checkpoints: [200, 100]
reference: r.npz
"""


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "configs" / "study.yaml"
    path.parent.mkdir()
    path.write_text(STUDY)
    return path


def test_the_first_seed_of_every_row_comes_first(study_file):
    jobs = all_jobs(load_config(ComparisonConfig, study_file))
    assert [(job.row, job.seed) for job in jobs] == [("a", 4), ("b", 4), ("c", 4), ("a", 1), ("b", 1), ("c", 1)]
    assert [job.steps for job in jobs[:3]] == [(100, 200), (100, 200), (300,)]
    assert [job.config.registers.kind for job in jobs[:3]] == ["none", "2d", "1d"]
    assert all(job.config.seed == job.seed and job.config.train.milestones == list(job.steps) for job in jobs)


def test_the_words_of_a_run_give_its_config(study_file):
    for job in all_jobs(load_config(ComparisonConfig, study_file)):
        assert load_config(GeneratorConfig, job.words[1], job.words[2:]) == job.config


@pytest.mark.parametrize("stage", ["training", "scoring"])
def test_the_commands_of_a_run_start_in_a_new_python_anywhere(study_file, tmp_path, stage):
    words = ["--config", str(study_file)]
    started = dict(stages(all_jobs(load_config(ComparisonConfig, study_file))[0], words))[stage]
    (tmp_path / "mutor_img").mkdir()  # another package of this name, which is not the one that is meant
    (tmp_path / "mutor_img" / "__init__.py").write_text("raise ImportError('another')")
    done = subprocess.run([*started, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "--config" in done.stdout, done.stderr


def key(*overrides: str, seed: int = 0, config: str = "mnist/ntp") -> str:
    row = RowConfig("a", overrides=list(overrides))
    return all_jobs(ComparisonConfig("s", config, [row], seeds=[seed], checkpoints=[100]))[0].key


def test_a_row_may_have_seeds_of_its_own_and_the_first_of_every_row_still_comes_first():
    rows = [RowConfig("a", seeds=[5, 0, 1]), RowConfig("b"), RowConfig("c", seeds=[2])]
    study = ComparisonConfig("s", "mnist/ntp", rows, seeds=[0, 1], checkpoints=[100])
    order = [(job.row, job.seed) for job in all_jobs(study)]
    assert order == [("a", 5), ("b", 0), ("c", 2), ("a", 0), ("b", 1), ("a", 1)]
    assert find_job(study, "c", 2).seed == 2
    with pytest.raises(UserError, match="--seed 1 is no seed of row 'c'; it has 2"):
        find_job(study, "c", 1)
    study.rows[2].seeds = [2, 2]
    study.reference = "x"
    with pytest.raises(UserError, match=r"seeds of row 'c' is \[2, 2\]: a value is there twice"):
        study.validate()


def test_what_all_rows_change_comes_before_what_one_does(study_file):
    study = load_config(ComparisonConfig, study_file, ["overrides=[optim.lr=3e-5,registers.count=8]"])
    jobs = {job.row: job for job in all_jobs(study)}
    assert [job.config.optim.lr for job in jobs.values()] == [3e-5] * 3
    assert jobs["b"].config.registers.count == 20 and jobs["c"].config.registers.count == 8
    assert all(load_config(GeneratorConfig, job.words[1], job.words[2:]) == job.config for job in jobs.values())


def test_a_run_s_key_is_of_what_decides_its_weights():
    plain = key("train.steps=4000")
    for other in ("optim.lr=1e-4", "registers.kind=1d", "train.ema=0.5", "data.codes=other", "model.dropout=0.2",
                  "train.global_batch=16", "init_from=somewhere"):
        assert key("train.steps=4000", other) != plain, other
    assert key("train.steps=4000", seed=1) != plain
    for same in ("train.log_every=7", "plan.devices=4", "train.micro_batch=2", "pictures.per_class=3",
                 "train.compile=false", "train.keep=5"):
        assert key("train.steps=4000", same) == plain, same


def test_a_longer_run_is_the_same_one_only_where_the_learning_rate_does_not_depend_on_its_length():
    constant = "optim.schedule=constant"
    assert key("train.steps=4000", constant) == key("train.steps=9000", constant)
    assert key("train.steps=4000", "optim.schedule=cosine") != key("train.steps=9000", "optim.schedule=cosine")


def test_a_changed_row_gets_another_folder_and_the_former_stays(study_file):
    study = load_config(ComparisonConfig, study_file)
    before = all_jobs(study)[1].run_dir
    study.rows[1].overrides.append("optim.lr=1e-4")
    assert all_jobs(study)[1].run_dir != before
    assert before.parent == Path(study.run_dir) / "runs" and before.name.startswith("b-4-")


def refusal(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.run(command.main, words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("old, new, message", [
    ("seeds:", "seedz:", "unknown key 'seedz'; did you mean 'seeds'?"),
    ("{name: a}", "{nam: a}", "study.yaml: unknown key 'rows[0].nam'; did you mean 'name'?"),
    ("{name: a}", "{name: a, overrides: x}", "rows[0].overrides is 'x'; give a list"),
    ("{name: a}", "a", "rows[0] is 'a'; give a mapping of keys to values"),
    ("name: b", "name: a", "the name 'a' is there 2 times"),
    ("name: b", "name: b/c", "rows[1].name is 'b/c'"),
    ("registers.kind=2d", "registres.kind=2d", "row 'b': override 'registres.kind=2d': unknown key"),
    ("registers.kind=2d", "registers.kind=3d", "row 'b': registers.kind is '3d'"),
    ("registers.kind=2d", "seed=5", "row 'b': override 'seed=5': the study itself sets seed"),
    ("registers.kind=2d", "run_dir=x", "row 'b': override 'run_dir=x': the study itself sets run_dir"),
    ("reference: r.npz", "overrides: [seed=5]\nreference: r.npz",
     "overrides of all rows: override 'seed=5': the study itself sets seed"),
    ("reference: r.npz", "overrides: [optim.lt=1]\nreference: r.npz",
     "row 'a' with the overrides of all rows: override 'optim.lt=1': unknown key"),
    ("config: mnist/mutor1d", "config: mnist/mutor7d", "row 'c': mnist/mutor7d: no such config file"),
    ("base: mnist/ntp", "base: ''", "row 'a' has no config, and base is empty"),
    ("seeds: [4, 1]", "seeds: []", "seeds is empty; give at least one value, as in [0, 1, 2]"),
    ("seeds: [4, 1]", "seeds: [4, 4]", "seeds is [4, 4]: a value is there twice"),
    ("seeds: [4, 1]", "seeds: 4", "give a list"),
    ("checkpoints: [200, 100]", "checkpoints: []", "checkpoints of row 'a' is empty"),
    ("checkpoints: [200, 100]", "checkpoints: [200, 9000]",
     "row 'a': checkpoint 9000 lies beyond its run of train.steps=7000 updates"),
    ("checkpoints: [300]", "checkpoints: [0]", "checkpoints of row 'c' is 0"),
    ("reference: r.npz", "baseline: d\nreference: r.npz", "baseline is 'd', which is no row"),
    ("reference: r.npz", "", "reference is empty"),
    ("reference: r.npz", "guidance: [0.5]\nreference: r.npz", "guidance is 0.5"),
    ("reference: r.npz", "metrics: [pr]\nreference: r.npz", "fid must be among them"),
    ("reference: r.npz", "features: classifier\nreference: r.npz", "needs --features-weights"),
    ("reference: r.npz", "budget_hours: 0\nreference: r.npz", "budget_hours is 0"),
])
def test_a_mistake_is_one_line_before_anything_begins(study_file, tmp_path, capsys, old, new, message):
    assert old in STUDY
    study_file.write_text(STUDY.replace(old, new, 1))
    assert message in refusal(["--config", str(study_file)], capsys)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["configs", "study.yaml"]


@pytest.mark.parametrize("words, message", [
    (["--jobs", "0"], "--jobs is 0"), (["--print-commands", "qsub"], "--print-commands is 'qsub'"),
    (["sample=5"], "did you mean 'samples'")])
def test_a_mistake_on_the_command_line_is_one_line(study_file, capsys, words, message):
    assert message in refusal(["--config", str(study_file), *words], capsys)


@pytest.mark.parametrize("words", [["--jobs", "2"], ["--print-commands"]])
def test_the_demo_has_no_use_for_the_flags_of_a_comparison(words, capsys):
    assert "is for a study with rows" in refusal(
        ["--config", str(ROOT / "configs" / "mnist" / "study.yaml"), *words], capsys)


def test_a_row_or_seed_that_is_not_there_is_named(study_file):
    study = load_config(ComparisonConfig, study_file)
    assert find_job(study, "c", 1) == all_jobs(study)[5]
    with pytest.raises(UserError, match="--row 'bb' is no row of this study; did you mean 'b'"):
        find_job(study, "bb", 1)
    with pytest.raises(UserError, match="it has 4, 1"):
        find_job(study, "b", 2)


def test_an_override_may_follow_the_flag_that_prints(study_file, capsys):
    command.main(["--config", str(study_file), "samples=9", "--print-commands", "samples=50", "grid_images=2"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(" samples=9 samples=50 grid_images=2")


@pytest.mark.parametrize("words, message", [
    ([], "reference: r.npz: no such reference file or folder"),
    (["reference={digits}", "features=classifier", "features_weights=nowhere"],
     "nowhere: ")])
def test_what_scores_a_run_is_missed_before_it_is_trained(study_file, digit_folders, capsys, words, message):
    words = [word.format(digits=digit_folders["val"]) for word in words]
    assert message in refusal(["--config", str(study_file), *words], capsys)


def test_printed_lines_train_and_score_each_run_that_is_not_done_and_begin_nothing(study_file, tmp_path, capsys):
    command.main(["--config", str(study_file), "samples=50", "--print-commands"])
    lines = capsys.readouterr().out.strip().splitlines()
    jobs = all_jobs(load_config(ComparisonConfig, study_file))
    assert len(lines) == len(jobs) + 1
    assert lines[-1] == f"python -m mutor_img.study --config {study_file} samples=50"
    command.main(["--config", str(study_file), "samples=50", "--print-commands", "sbatch"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"# when all jobs are done: {lines[-1]}"  # a shell passes it over
    for job, line in zip(jobs, lines):
        train, score = line.split(" && ")
        assert train.startswith("torchrun --nproc-per-node 1 train.py --config ") and str(job.run_dir) in train
        assert score.endswith(f"--config {study_file} samples=50 --row {job.row} --seed {job.seed}")
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


def arguments_of(line: str, folder: Path) -> list[list[str]]:
    """Run a printed line in a shell where each program only notes how it was called."""
    for name in ("srun", "torchrun", "scontrol"):
        (folder / name).write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys\n"
                                   "if sys.argv[0].endswith('scontrol'): print('node7')\n"
                                   "elif sys.argv[0].endswith('srun'): subprocess.run(sys.argv[1:], check=True)\n"
                                   "else: open('calls', 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n")
        (folder / name).chmod(0o755)
    (folder / "sbatch").write_text("#!/bin/bash\nwhile [ \"$1\" != --wrap ]; do shift; done\nexec bash -c \"$2\"\n")
    (folder / "sbatch").chmod(0o755)
    subprocess.run(["bash", "-c", line], cwd=folder, check=True, env={
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "node[7-8]", "NODE_RANK": "1", "MASTER_ADDR": "node7"})
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("launcher", ["torchrun", "sbatch"])
def test_a_shell_reads_a_printed_line_as_it_is_meant(study_file, tmp_path, launcher):
    study = load_config(ComparisonConfig, study_file)
    study.rows[1].overrides.append("plan.devices=16")
    job = all_jobs(study)[1]
    words = ["--config", "a b.yaml"]
    train, score = arguments_of(printed([job], words, launcher)[0], tmp_path)
    where = ["--nnodes", "2", "--nproc-per-node", "8", "--node-rank", "1", "--master-addr", "node7", "--master-port",
             "29500"]
    assert train == [*where, "train.py", *job.words]
    assert score == [*where, "-m", "mutor_img.study.comparison.score", *words, "--row", "b", "--seed", "4"]


def test_the_shipped_study_has_the_paper_s_rows():
    study = load_config(ComparisonConfig, ROOT / "configs" / "imagenet256" / "study.yaml")
    jobs = {job.row: job for job in all_jobs(study)}
    assert {"mutor1d", "mutor2d", "mutor2d-80", "mutor2d-80-d3", "mutor2d-80-d5"} < jobs.keys()
    assert (study.baseline_name, study.samples, study.guidance) == ("next-token", 50_000, [1.0, 2.0])
    base = jobs["next-token"].config
    assert base.registers.kind == "none" and jobs["next-token"].steps == (100_000, 200_000, 360_000, 500_000)
    assert all(set(study.checkpoints) <= set(job.steps) for job in jobs.values())
    assert "--nproc-per-node 8 train.py" in torchrun(jobs["mutor2d"], [])


COMPARISONS = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if is_comparison(str(path))]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rows_of_a_shipped_comparison_differ_in_their_objective_alone_but_for_a_rate_that_they_name(path):
    study = load_config(ComparisonConfig, path)
    jobs = all_jobs(study)
    assert len({job.key for job in jobs}) == len(jobs)  # no row is another's copy
    base = next(job.config for job in jobs if job.row == study.baseline_name)
    for job in jobs:
        _, named, rate = job.row.partition("-lr")
        optim = replace(base.optim, lr=float(rate)) if named else base.optim
        assert (job.config.optim, job.config.model, job.config.data) == (optim, base.model, base.data), job.row
        assert job.config.train.global_batch == base.train.global_batch and job.config.train.ema == base.train.ema
        assert job.config.train.steps == max(job.steps)  # none trains longer than it is looked at
