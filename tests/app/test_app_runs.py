"""The run browser: what runs left is shown, whatever is broken is a line, and a request opens what is listed alone."""

import json
import os
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mutor_img.app import runs
from mutor_img.app.runs import list_runs, overview, panels, read_curves, show_pictures, view
from mutor_img.checkpoints.folder import write_checkpoint
from mutor_img.common.errors import UserError
from mutor_img.common.images import write_png
from mutor_img.common.locks import claim, folder_lock

RESULT = {"fd": 9.2957, "is": 2.5, "num_samples": 100, "features": "mnist", "weights_sha256": "ab" * 32,
          "reference": {"name": "train", "role": "generation", "statistics": "computed"}, "labels": "random",
          "comparable": False}


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, html):
        super().__init__()
        self.names = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.names.append((tag, dict(attributes)))


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Draw an empty picture in place of curves, which takes longer than all the rest; ``curves`` draws them."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(runs, "save_figure", lambda figure, file: Image.new("RGB", (2, 2)).save(file, "PNG"))


def write_run(folder: Path, step: int = 4, steps: int | None = 4, kind: str = "generator") -> Path:
    """Write what the page reads of a run: a checkpoint's JSON, a config, metrics and two pictures."""
    if step:
        write_checkpoint(folder, step, {}, {"kind": kind}, 1)
    folder.mkdir(parents=True, exist_ok=True)
    if steps is not None:
        (folder / "config.yaml").write_text(f"train:\n  steps: {steps}\n")
        rows = [{"step": 1, "loss": 5.5}, {"step": 2, "loss": 3.25, "val_loss": 4.5}, {"step": 3, "val_loss": 4.75}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in (2, 10):
        grid = np.full((4, 6, 3), number, np.uint8)
        write_png(folder / "pictures" / f"samples_{number:08d}.png", Image.fromarray(grid))
    return folder


def whole(root: Path, name: str) -> str:
    """Return all HTML of one run, and that of the list."""
    listing = list_runs(root)
    found = view(listing, name)
    return (overview(listing) + found.head + found.curves + found.scores + found.config
            + show_pictures(listing, name, found.first))


def test_what_training_left_is_shown(run_training, curves, tmp_path):
    run_training()
    listing = list_runs(tmp_path / "runs")
    assert list(listing.folders) == ["run"] and "<td>3 of 3</td><td>done</td>" in overview(listing)
    found = view(listing, "run")
    assert "run · generator · 3 of 3 · done" in found.head and "steps: 3" in found.config
    assert found.curves.count("<img") == 1
    logged = read_curves(tmp_path / "runs" / "run")
    assert {"loss", "next_token", "lr"} < logged.keys() and [step for step, _ in logged["loss"]] == [1, 2, 3]


def test_what_a_tracker_keeps_in_a_run_is_no_run(tmp_path):
    files = write_run(tmp_path / "run") / "wandb" / "run-20260101_000000-1a2b3c4d" / "files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text("_wandb: {}\n")
    assert list(list_runs(tmp_path).folders) == ["run"]


@pytest.mark.parametrize(("step", "steps", "words"), [
    (4, 4, "4 of 4</td><td>done"), (3, 4, "3 of 4</td><td>stopped; the same command goes on"),
    (0, 4, "run</td><td>0 of 4</td><td>no complete checkpoint"), (4, None, "4</td><td>weights alone")])
def test_a_runs_state_is_told(tmp_path, step, steps, words):
    write_run(tmp_path / "run", step, steps)
    assert words in overview(list_runs(tmp_path))


def test_a_run_at_work_is_told_with_its_last_logged_update(tmp_path):
    folder = write_run(tmp_path / "run", step=1)
    with claim(folder_lock(folder)):
        assert f"3 of 4</td><td>at work: process {os.getpid()} on host" in overview(list_runs(tmp_path))
    assert "1 of 4</td><td>stopped" in overview(list_runs(tmp_path))


def test_scores_while_training_are_told_with_their_updates(tmp_path):
    write_run(tmp_path / "run")
    numbers = whole(tmp_path, "run").partition("\nval_loss")[2].partition("</pre>")[0]
    assert numbers.split() == ["4.75", "3", "4.5", "2", "4.75", "3"]  # the last, the lowest, the highest


def test_a_held_out_loss_is_drawn_with_that_of_training():
    point = [(1, 2.0)]
    curves = {"loss": point, "val_loss": point, "lr": point, "val_psnr": point}
    assert [list(panel) for panel in panels(curves)] == [["loss", "val_loss"], ["lr"], ["val_psnr"]]


def test_values_that_are_not_finite_are_left_out(tmp_path, curves):
    (write_run(tmp_path / "run") / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": 1.5}\n')
    assert read_curves(tmp_path / "run") == {"loss": [(3, 1.5)]} and "<img" in view(list_runs(tmp_path), "run").curves


def test_pictures_come_in_the_order_of_their_updates(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("samples.png", "loss.png"):
        write_png(folder / name, Image.new("RGB", (2, 2)))
    found = view(list_runs(tmp_path), "run")
    assert found.pictures == ["samples after update 2", "samples after update 10", "samples.png"]
    assert found.first == ["samples after update 10"]
    html = show_pictures(list_runs(tmp_path), "run", found.pictures[1::-1])
    assert html.index("update 2<") < html.index("update 10<") and html.count("<img") == 2


@pytest.mark.parametrize("files", [
    {"scores.json": json.dumps(RESULT)}, {"scores.json": json.dumps({"generators": {"mutor2d": RESULT}})},
    {"rows.jsonl": json.dumps({"row": "mutor2d", "seed": 0, "updates": 4, "cfg_scale": 1.0, "fd": 9.2957}) + "\n"},
    {"rows.jsonl": "", "table.md": "| mutor2d | 9.2957 |"},
    {"scores.json": json.dumps({"psnr": 9.2957, "sharpness": 0.9, "not_computed": {"rfid": "no weights"}})}], ids=str)
def test_a_study_is_shown_as_far_as_it_has_come(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    write_png(tmp_path / "curves_guidance_1.png", Image.new("RGB", (2, 2)))
    html = whole(tmp_path, ".")
    assert "<td>.</td><td>study</td>" in html and "9.2957" in html and html.count("<img") == 1
    assert "not a readable file" not in html


def test_a_sweep_is_shown_with_its_run(tmp_path):
    folder = write_run(tmp_path / "run") / "sweep"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"points": [{"cfg_scale": 1.5, "fid": 7.125, "seconds": 2.0}]}))
    assert "cfg_scale    fid\n1.5        7.125" in whole(tmp_path, "run")


DEEP = "[" * 10_000
BROKEN = {
    "metrics.jsonl": [b"3\n", b'{"loss": 1.0}\n', b"\xff\xfe\n", DEEP.encode() + b"\n",
                      b'{"step": 1, "loss": "high"}\n', b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n"],
    "config.yaml": [b"train: [", b"3", b"train: {steps: many}", b"[" * 1000],
    "checkpoints/step_00000004/checkpoint.json": [b"", b"[]", b"{}", DEEP.encode()],
    "scores.json": [b"", b"[]", b'{"generators": 3}', b'{"fd": "low"}', DEEP.encode()],
    "sweep/sweep.json": [b"{}", b'{"points": [3]}'],
    "rows.jsonl": [b"3\n"],
    "pictures/samples_00000010.png": [b"", b"\x89PNG\r\n\x1a\n", b"text"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_of in BROKEN.items()
                                               for content in all_of], ids=lambda value: str(value[:20]))
def test_a_broken_file_is_one_line_and_the_rest_is_shown(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    write_run(tmp_path / "sound")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    html = whole(tmp_path, "run")
    assert "<td>sound</td><td>generator</td><td>4 of 4</td><td>done</td>" in html
    told = [part for part in unescape(html).split("<") if str(folder) in part]
    assert told and all("\n" not in part and "Traceback" not in part for part in told)
    # curves, and the picture of samples
    assert sum(tag == "img" for tag, _ in Tags(html).names) == 2 - (Path(name).suffix == ".png" or "metrics" in name)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "scores.json", "pictures/samples_00000010.png"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "lost link", "huge"])
def test_what_is_no_plain_file_of_a_usual_size_is_never_opened(tmp_path, name, kind):
    path = write_run(tmp_path / "run") / name
    path.unlink(missing_ok=True)
    if kind == "pipe":  # reading it would wait for ever
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "lost link":
        path.symlink_to("gone")
    else:
        with open(path, "wb") as file:
            file.truncate(2**40)
    html = whole(tmp_path, "run")
    words = {"lost link": "No such file", "huge": "has 1,099,511,627,776 bytes; the page reads at most"}
    alert = html.partition('role="alert">')[2].partition("</div>")[0]
    assert str(path) in alert and words.get(kind, "not a plain file") in alert and "<td>run</td>" in html


def test_an_empty_run_and_an_empty_folder_are_shown_as_such(tmp_path):
    assert "No run here yet" in overview(list_runs(tmp_path))
    (tmp_path / "run" / "checkpoints" / ".step_00000001.part").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    html = whole(tmp_path, "run")
    assert "<td>0</td><td>no complete checkpoint</td>" in html and "Nothing is logged yet." in html


def test_text_of_files_never_becomes_markup(tmp_path, curves):
    evil = "<img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / evil, kind=evil)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, f"val_{evil} $\\frac$": 1.0}) + "\n")
    (folder / "config.yaml").write_text(f"train: {{steps: 4, note: '{evil}</pre>'}}\n")
    (folder / "table.md").write_text(evil)
    (folder / "scores.json").write_text(json.dumps({"generators": {evil: RESULT | {"labels": evil}}}))
    write_png(folder / f"{evil}.png", Image.new("RGB", (2, 2)))
    html = whole(tmp_path, evil) + show_pictures(list_runs(tmp_path), evil, [f"{evil}.png"])
    images = [attributes for tag, attributes in Tags(html).names if tag == "img"]
    assert len(images) == 3 and all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert not any("onerror" in image for image in images)


def test_a_name_that_is_no_text_is_shown_and_found(tmp_path):
    write_run(tmp_path / os.fsdecode(b"r\xff"))
    html = whole(tmp_path, "r\\udcff")
    assert html.encode() and "r\\udcff · generator" in html


@pytest.mark.parametrize("name", ["../outside", "", "sub/../run", "run/", None, 0, [], "gone", "run/checkpoints"])
def test_a_request_opens_nothing_that_is_not_listed(tmp_path, monkeypatch, name):
    write_run(tmp_path / "outside")
    write_run(tmp_path / "root" / "run")
    listing = list_runs(tmp_path / "root")
    monkeypatch.setattr(runs, "_check_file", lambda path: pytest.fail(f"{path} is opened"))
    for request in (lambda: view(listing, name), lambda: show_pictures(listing, name, []),
                    lambda: show_pictures(listing, "run", [name])):
        with pytest.raises(UserError, match="press Refresh and choose one of the list"):
            request()


def test_a_request_for_too_many_pictures_is_refused(tmp_path):
    write_run(tmp_path / "run")
    with pytest.raises(UserError, match="7 pictures are chosen; choose at most 6"):
        show_pictures(list_runs(tmp_path), "run", ["samples after update 2"] * 7)


def test_links_are_followed_once_and_circles_end(tmp_path):
    write_run(tmp_path / "elsewhere" / "run")
    root = tmp_path / "root"
    write_run(root / "own")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    assert list(list_runs(root).folders) == ["linked/run", "own"]


@pytest.mark.parametrize("limit", ["MOST_RUNS", "MOST_FOLDERS"])
def test_a_list_that_is_cut_short_says_so(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(runs, limit, 3)
    for number in range(5):
        write_run(tmp_path / str(number))
    listing = list_runs(tmp_path)
    assert 2 <= len(listing.folders) <= 3 and "there is more below" in overview(listing)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    with monkeypatch.context() as patch:  # over before pytest removes the folder
        patch.setattr(os, "scandir", scandir)
        listing = list_runs(tmp_path)
    assert "closed: this folder cannot be read (Permission denied)" in overview(listing)
    assert list(listing.folders) == ["run"]
