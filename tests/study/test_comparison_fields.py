"""Every field of a comparison changes something that can be seen; a field without a row fails."""

from types import SimpleNamespace

import pytest

from mutor_img.common.config import field_names, load_config
from mutor_img.study.comparison import command, scoring
from mutor_img.study.comparison.config import ComparisonConfig, RowConfig
from mutor_img.study.comparison.jobs import all_jobs
from mutor_img.study.comparison.ledger import scoring_key, wanted

STUDY = """
base: mnist/ntp
rows: [{name: a, overrides: [optim.lr=1e-3], checkpoints: [10]}, {name: b, config: mnist/mutor1d}]
seeds: [0]
checkpoints: [20]
reference: r.npz
"""


def jobs(study, _):
    return [(job.row, job.seed, job.steps, job.words) for job in all_jobs(study)]


def places(study, _):
    return wanted(study, all_jobs(study))


def judged(study, _):
    return scoring_key(study)


def measured(study, monkeypatch):
    """What held-out losses are asked of."""
    asked, job = [], all_jobs(study)[1]
    for name in ("next_token_loss", "target_losses"):
        monkeypatch.setattr(scoring, name, lambda *arguments: asked.append(arguments[2:5]) or [])
    monkeypatch.setattr(scoring, "add", lambda *arguments: None)
    scorer = object.__new__(scoring._Scorer)
    scorer.study, scorer.job, scorer.step, scorer.meta = study, job, 20, {}
    scorer.runtime = SimpleNamespace(is_main=True, from_main=lambda look: look())
    scorer.loaded = SimpleNamespace(model=SimpleNamespace(config=None), which="raw", weights_hash="w")
    scorer._held_out("codes")
    return [[value for value in one if isinstance(value, int)] for one in asked]


def hours(study, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "run_jobs", lambda *arguments: asked.append(arguments[4].hours))
    command._run(study, all_jobs(study), [], 1)
    return asked


FIELDS = {
    "run_dir": ("elsewhere", jobs), "base": ("mnist/mutor2d", jobs), "rows": ("[{name: c}]", jobs),
    "overrides": ("[optim.lr=1e-4]", jobs),
    "baseline": ("b", lambda study, _: study.baseline_name), "seeds": ("[1]", jobs), "checkpoints": ("[30]", jobs),
    "guidance": ("[2.0]", places), "temperature": ("0.9", judged), "samples": ("50", judged),
    "reference": ("q.npz", judged), "metrics": ("[fid]", judged), "features": ("mnist", judged),
    "features_weights": ("w.pth", judged), "batch_size": ("8", measured), "held_out": ("70", measured),
    "grid_images": ("3", lambda study, _: scoring.strip_path(study, all_jobs(study)[0], 10, 1.0)),
    "budget_hours": ("2.5", hours),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changes_what_it_names(field, digit_folders, classifier, tmp_path, monkeypatch):
    value, observe = FIELDS[field]
    (tmp_path / "study.yaml").write_text(STUDY)
    shared = [] if field == "run_dir" else [f"run_dir={tmp_path / 'out'}"]
    if field == "budget_hours":  # the study begins
        shared += [f"reference={digit_folders['val']}", "features=mnist", f"features_weights={classifier}"]
    shared += ["features=timm:x", "features_weights=v.pth"] if field == "features_weights" else []
    seen = [observe(load_config(ComparisonConfig, tmp_path / "study.yaml", [*shared, *words]), monkeypatch)
            for words in ([], [f"{field}={value}"])]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("field, value", [("name", "c"), ("config", "mnist/mutor2d"), ("overrides", ["optim.lr=1e-4"]),
                                          ("checkpoints", [11]), ("seeds", [7])])
def test_a_field_of_a_row_changes_its_runs(field, value, tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    study = load_config(ComparisonConfig, tmp_path / "study.yaml")
    before = jobs(study, None)
    setattr(study.rows[0], field, value)
    assert jobs(study, None)[0] != before[0] and jobs(study, None)[1] == before[1]


def test_no_field_is_without_such_a_test():
    assert set(FIELDS) == set(field_names(ComparisonConfig))
    rows = test_a_field_of_a_row_changes_its_runs.pytestmark[0].args[1]
    assert {field for field, _ in rows} == set(field_names(RowConfig))
