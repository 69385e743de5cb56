"""The example of docs/study.md, as it stands there: killed, gone on with, and not done again."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from launching import start_fork
from PIL import Image
from tiny_study import write_inputs

from mutor_img import load_checkpoint
from mutor_img.common import cli
from mutor_img.common.config import load_config
from mutor_img.evaluation.command import main as evaluate
from mutor_img.study import __main__ as command
from mutor_img.study.comparison import scoring
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.comparison.jobs import all_jobs
from mutor_img.study.comparison.pool import Work
from mutor_img.study.comparison.score import main as score
from mutor_img.study.comparison.scoring import strip_path
from mutor_img.training.runtime import Runtime

ROOT = Path(__file__).parents[2]
RECIPE, STUDY = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "study.md").read_text(), re.DOTALL)
WORDS = re.search(r"```\npython (-m mutor_img\.study .*)\n```", (ROOT / "docs" / "study.md").read_text())[1].split()
CONFIG = WORDS[-1]


def lines(folder: Path) -> list[str]:
    path = folder / "runs" / "tiny_study" / "rows.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the example, what it said when it was run to its end, and the rows that a kill had left."""
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs(Path())  # paths as the example says them
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.yaml").write_text(RECIPE)
    (folder / CONFIG).write_text(STUDY)
    printed = folder / "printed.txt"
    first = start_fork(folder, *WORDS)
    while len(lines(folder)) < 3:  # of six of the first run
        assert first.poll() is None, printed.read_text()
        time.sleep(0.05)
    children = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    psutil.wait_procs(children, timeout=60)
    left = lines(folder)
    printed.unlink()
    start_fork(folder, *WORDS).wait(1000)
    return folder, printed.read_text(), left


@pytest.mark.timeout(1200)
def test_a_killed_study_goes_on_and_scores_nothing_twice(made):
    folder, said, left = made
    rows = [json.loads(line) for line in lines(folder)]
    places = [(row["row"], row["seed"], row["updates"], row["cfg_scale"]) for row in rows]
    assert 3 <= len(left) < 20 and lines(folder)[:len(left)] == left
    assert len(places) == len(set(places)) == 20, said
    order = [(row, seed) for seed in (0, 1) for row in ("next-token", "mutor2d")]
    assert list(dict.fromkeys(place[:2] for place in places)) == order
    assert {place[2] for place in places if place[0] == "mutor2d"} == {2, 4}
    assert {place[2] for place in places if place[0] == "next-token"} == {2, 4, 6}


def test_a_row_s_scores_are_those_of_evaluate_fid(made, monkeypatch):
    folder, _, _ = made
    monkeypatch.chdir(folder)
    row = json.loads(lines(folder)[-1])  # the last seed, at guidance 2
    job = all_jobs(load_config(ComparisonConfig, CONFIG))[-1]
    checkpoint = job.run_dir / "checkpoints" / f"step_{row['updates']:08d}"
    alone = evaluate(["--checkpoint", str(checkpoint), "--reference", "images/train", "--features", "classifier",
                      "--features-weights", "runs/classifier", "--num-samples", "32", "--cfg-scale", "2.0", "--seed",
                      "1", "--device", "cpu"])
    assert (row["row"], row["seed"], row["cfg_scale"]) == ("mutor2d", 1, 2.0)
    assert all(row[name] == alone[name] for name in ("fd", "is", "precision", "recall", "recognised", "num_samples"))
    assert row["val_next_token"] != row["val_next_token_raw"]  # averaged weights, and those that are trained


def test_the_example_leaves_what_its_page_says(made):
    folder, said, _ = made
    out = folder / "runs" / "tiny_study"
    table = (out / "table.md").read_text()
    assert "FD-32" in table and "| mutor2d | 4 |" in table and "still to come" not in table and table in said
    assert sorted(path.name for path in out.glob("*.png")) == [
        "curves_guidance_1.png", "curves_guidance_2.png", "samples_guidance_1.png", "samples_guidance_2.png",
        "targets.png"]
    page = (ROOT / "docs" / "study.md").read_text()
    for name in ("spent.json", "logs/", "runs/", "rows.jsonl", "targets.jsonl", "table.md", "targets.png"):
        assert (out / name).exists() and f"`{name}`" in page
    targets = [json.loads(line) for line in (out / "targets.jsonl").read_text().splitlines()]
    assert [(t["seed"], t["updates"]) for t in targets] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert [place[:2] for place in targets[0]["losses"]] == [[0, 1], [1, 0], [1, 1]]
    assert Image.open(out / "samples_guidance_1.png").size[1] > 2 * 96  # two rows of samples


def test_rows_of_the_grid_share_labels_and_streams(made, monkeypatch):
    folder, _, _ = made
    monkeypatch.chdir(folder)
    study = load_config(ComparisonConfig, CONFIG)
    first = all_jobs(study)[0]
    strips = [np.load(strip_path(study, first, 4, scale)) for scale in study.guidance]
    assert strips[0].shape == (8, 16, 16, 3) and strips[0].dtype == np.uint8
    assert not (all_jobs(study)[2].run_dir / "study").exists()  # of the first seed alone


def test_what_is_done_starts_nothing(made, monkeypatch, capsys):
    folder, _, _ = made
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Work, "start", None)
    before = lines(folder)
    command.main(["--config", CONFIG])
    assert "4 of 4 runs are done already" in capsys.readouterr().out and lines(folder) == before
    command.main(["--config", CONFIG, "--print-commands"])
    assert capsys.readouterr().out == f"python -m mutor_img.study --config {CONFIG}\n"
    command.main(["--config", CONFIG, "seeds=[0,1,2]", "--print-commands"])
    assert len(capsys.readouterr().out.splitlines()) == 3  # two runs, and the table


def test_a_checkpoint_that_a_finished_run_did_not_keep_is_named(made, monkeypatch, capsys):
    folder, _, _ = made
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        cli.run(score, ["--config", CONFIG, "--row", "mutor2d", "--seed", "0", "checkpoints=[3]", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "step_00000003: was not kept when mutor2d, seed 0 was trained" in capsys.readouterr().err


def test_a_study_that_is_told_to_end_ends_its_runs(made, tmp_path):
    folder, _, _ = made
    for name in ("images", "codes", "runs/classifier", "runs/vq"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(RECIPE.replace("steps: 4", "steps: 100000"))
    (tmp_path / CONFIG).write_text(STUDY.replace("train.steps=6", "train.steps=100000"))
    study = start_fork(tmp_path, *WORDS)
    log = tmp_path / "runs" / "tiny_study" / "logs"
    while not log.is_dir() or not any("step 1/" in path.read_text() for path in log.iterdir()):
        assert study.poll() is None and time.sleep(0.05) is None
    children = psutil.Process(study.pid).children(recursive=True)
    study.terminate()
    status = study.wait(120)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert status == 128 + signal.SIGTERM and not alive
    assert "to resume, run the same command again" in next(log.iterdir()).read_text()  # after it has saved


def test_all_checkpoints_of_a_run_are_sampled_from_one_model(made, tmp_path, monkeypatch):
    """A GPU compiles a step for each model; weights that are written into one in place need no other."""
    folder, _, _ = made
    monkeypatch.chdir(folder)
    seen = []

    def watch(source, *others, **named):
        weights = {name: tensor.clone() for name, tensor in source.loaded.model.state_dict().items()}
        seen.append((source.loaded.model, source.loaded.path, weights))
        return iter([])

    monkeypatch.setattr(scoring, "sweep", watch)
    study = load_config(ComparisonConfig, CONFIG, ["temperature=0.9"])  # of which nothing is scored yet
    scoring.score_job(study, all_jobs(study)[0], Runtime(torch.device("cpu")))
    assert len({id(model) for model, _, _ in seen}) == 1 and len({path for _, path, _ in seen}) == 3
    for _, path, weights in seen:
        own = load_checkpoint(path).state_dict()
        assert all(torch.equal(weights[name], own[name]) for name in own)
    assert seen[0][0].origin == seen[-1][1]
