"""python -m mutor_img.sweep: the scores of evaluate_fid.py at every point, kept through a kill."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
from mutor_img.evaluation.command import main as score
from mutor_img.sweep import __main__ as command
from mutor_img.sweep import points as module
from mutor_img.sweep.points import SweepPoint
from mutor_img.sweep.report import advice

main = command.main


@pytest.fixture
def flags(run, digit_folders, classifier):
    return ["--checkpoint", str(run), "--reference", str(digit_folders["train"]), "--features", "mnist",
            "--features-weights", str(classifier), "--device", "cpu", "--num-samples", "16"]


def test_a_killed_sweep_goes_on_and_its_rows_are_the_scores_of_evaluate_fid(flags, run, monkeypatch, capsys):
    scored = []

    def evaluate(images, *arguments, **options):
        scored.append((images.settings.cfg_scale, images.settings.temperature))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return real(images, *arguments, **options)

    real = module.evaluate
    monkeypatch.setattr(module, "evaluate", evaluate)
    more = ["--cfg-scales", "1,4", "--temperatures", "1,0.5", "--top-k", "3"]
    with pytest.raises(KeyboardInterrupt):
        main([*flags, *more])
    assert len(json.loads((run / "sweep" / "sweep.json").read_text())["points"]) == 2
    result = main([*flags, *more])
    assert scored == [(1, 1), (4, 1), (1, 0.5), (1, 0.5), (4, 0.5)]
    assert result == read_json(run / "sweep" / "sweep.json")
    assert result["best"] == min(result["points"], key=lambda row: row["fd"])
    single = score([*flags, "--cfg-scale", "4", "--temperature", "0.5", "--top-k", "3", "--seed", "1"])
    row = result["points"][3]
    assert (row["cfg_scale"], row["temperature"]) == (4, 0.5)
    assert all(row[name] == single[name] for name in ("fd", "is", "precision", "recall", "num_samples"))
    assert Image.open(run / "sweep" / "sweep.png").size[0] > 800
    printed = capsys.readouterr().out
    assert "lowest FD-16" in printed and "bias falls as 1/N" in printed and result["command"] in printed


def test_values_that_are_added_are_judged_together_with_the_finished_ones(flags, capsys):
    more = ["--metrics", "fid", "--cfg-scales"]
    first = main([*flags, *more, "1,8"])
    capsys.readouterr()
    result = main([*flags, *more, "4,2"])
    assert [row["cfg_scale"] for row in result["points"]] == [1, 8, 4, 2]
    assert result["points"][:2] == first["points"]
    assert result["best"] == min(result["points"], key=lambda row: row["fd"])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line[:2] in ("1 ", "2 ", "4 ", "8 ")] == list("1248")


def test_schedules_are_points_too(flags, capsys):
    more = ["--cfg-scales", "1,4", "--metrics", "fid"]
    result = main([*flags, *more, "--cfg-schedules", "constant,linear,power-cosine:2"])
    settings = [(p["cfg_scale"], p["cfg_schedule"], p["cfg_parameter"]) for p in result["points"]]
    assert settings == [(1, "constant", None), (4, "constant", None), (4, "linear", None), (4, "power-cosine", 2)]
    single = score([*flags, "--cfg-scale", "4", "--cfg-schedule", "power-cosine", "--cfg-parameter", "2",
                    "--seed", "1"])
    assert result["points"][3]["fd"] == single["fd"] != result["points"][2]["fd"] != result["points"][1]["fd"]
    assert "4, power-cosine:2" in capsys.readouterr().out


def test_the_command_for_50000_is_understood_and_of_another_seed(flags, monkeypatch):
    result = main([*flags, "--cfg-scales", "1.5", "--labels", "balanced", "--metrics", " fid,", "--fallback"])
    words = shlex.split(result["command"])
    assert words[:2] == ["python", "evaluate_fid.py"]
    assert {"balanced", "1.5", "50000"} <= set(words) and words[words.index("--seed") + 1] == "0"
    assert Path(words[words.index("--checkpoint") + 1]).name.startswith("step_")  # though the run may train on
    from mutor_img.evaluation.command import _check, _parser

    parser, _ = _parser()
    _check(parser, parser.parse_args(words[2:]))


def test_points_of_other_settings_are_not_mixed(flags):
    main([*flags, "--cfg-scales", "1", "--metrics", "fid"])
    with pytest.raises(UserError, match="scored with seed 1, now it is 2"):
        main([*flags, "--cfg-scales", "1", "--metrics", "fid", "--seed", "2"])


@pytest.mark.parametrize(("more", "words"), [
    (["--cfg-scales", "1,x"], "numbers with commas"), (["--cfg-scales", "1,1.0"], "given twice"),
    (["--cfg-scales", "0.5"], "cfg_scale is 0.5"), (["--temperatures", "0"], "temperature is 0"),
    (["--metrics", "is"], "with fid among them"), (["--metrics", "fdi"], "did you mean 'fid'"),
    (["--cfg-schedules", "linear,linear"], "given twice"), (["--cfg-schedules", "power-cosine:x"], "is not a number"),
    (["--cfg-schedules", "linear", "--cfg-schedule", "linear"], "exclude each other"),
    (["--num-samples", "1"], "--num-samples is 1"), (["--cfg-scale", "2"], "did you mean '--cfg-scales'"),
])
def test_a_mistake_is_one_line(flags, more, words):
    with pytest.raises(UserError, match=words) as caught:
        main([*flags, *more])
    assert "\n" not in str(caught.value)


def test_a_best_value_at_the_end_of_the_range_is_pointed_out():
    rows = [{**SweepPoint(scale, 1.0)._asdict(), "fid": 9 - scale, "num_samples": 10} for scale in (1.0, 2.0, 3.0)]
    assert any("beyond 3" in line for line in advice(rows, rows[2], "fid"))
    assert not any("beyond" in line for line in advice(rows, rows[1], "fid"))
    linear = [{**row, "cfg_schedule": "linear"} for row in rows[1:]]
    assert not any("beyond" in line for line in advice([rows[0], *linear], linear[0], "fid"))  # 1 is in every schedule
