"""Options: the home folder, and paths that no system takes."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from mutor_img.common.cli import Parser, parse_numbers, run
from mutor_img.common.errors import UserError
from mutor_img.common.files import write_atomic

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parser():
    parser = Parser(description="d", example="e")
    parser.add_argument("--out")
    parser.add_argument("words", nargs="*")
    return parser


def test_a_value_that_begins_with_a_tilde_lies_in_the_home_folder(parser, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for argv in (["--out", "~/x.npz"], ["--out=~/x.npz"]):
        assert parser.parse_args(argv).out == "/home/me/x.npz"
    assert parser.parse_intermixed_args(["run_dir=~/x", "--out", "a~b", "~/c"]).words == ["run_dir=~/x", "/home/me/c"]


@pytest.mark.parametrize("argv, words", [(["--out="], "--out is empty"), (["--out", ""], "--out is empty"),
                                         (["--out", " "], "--out is empty"), ([""], "an argument is empty"),
                                         (["word", ""], "an argument is empty")])
def test_what_an_unset_variable_of_the_shell_leaves_is_refused(parser, argv, words):
    with pytest.raises(UserError, match=words):
        parser.parse_args(argv)


def test_help_shows_a_default_of_0_but_not_an_absent_one(parser):
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--quick", action="store_true", help="less")
    assert "of all draws (default: 0)" in parser.format_help() and parser.format_help().count("default") == 1


def test_a_list_of_numbers_keeps_its_order_and_is_refused_in_one_line():
    assert parse_numbers("4,1,2", "--windows", int) == [4, 1, 2]
    assert parse_numbers("1,1.5", "--scales", float) == [1, 1.5]
    for text, kind, words in (("1,x", float, "give numbers with commas"), ("1,1.0", float, "given twice"),
                              ("1,1.5", int, "give whole numbers with commas"), ("", int, "--windows is ''")):
        with pytest.raises(UserError, match=words):
            parse_numbers(text, "--windows", kind)


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    code = "from mutor_img.common.cli import run; run(lambda argv: [print(i) for i in range(10**6)], [])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as child:
        assert child.stdout.readline() == b"0\n"
        child.stdout.close()
        assert child.stderr.read() == b"" and child.wait() == 128 + signal.SIGPIPE


def test_a_name_that_is_too_long_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda argv: (tmp_path / ("x" * 300)).write_text(""), [])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_folder_in_a_file_s_place_is_named_and_nothing_is_left_beside_it(tmp_path, capsys):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(SystemExit) as stop:
        run(lambda argv: write_atomic(tmp_path / "report.md", lambda path: path.write_text("")), [])
    assert stop.value.code == 2 and f"error: {tmp_path}/report.md: Is a directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_file_in_a_folder_s_place_is_named(tmp_path, capsys):
    (tmp_path / "runs").write_text("notes")
    with pytest.raises(SystemExit) as stop:
        run(lambda argv: (tmp_path / "runs").mkdir(), [])
    assert stop.value.code == 2
    assert f"error: {tmp_path}/runs: a file is where a folder must be; give another path" in capsys.readouterr().err


def test_a_module_s_usage_says_how_it_was_started():
    command = [sys.executable, "-m", "mutor_img.metrics.digits", "--help"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert usage.startswith("usage: python -m mutor_img.metrics.digits [-h]")


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "no space left on the device while writing {}; free some"),
    (errno.EROFS, "{}: Read-only file system"),
    (errno.EIO, "{}: Input/output error; the disk, or the way to it, does not work")])
def test_a_disk_that_fails_in_the_midst_of_a_file_is_one_line_that_names_it(tmp_path, capsys, number, words):
    def fail(aside):
        raise OSError(number, os.strerror(number))  # as a write fails: without a name

    path = tmp_path / "scores.json"
    with pytest.raises(SystemExit) as stopped:
        run(lambda words: write_atomic(path, fail), [])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: " + words.format(path)) and error.count("\n") == 1


def test_a_message_is_one_short_line_whatever_it_quotes(capsys):
    def refuse(words):
        raise UserError("x.yaml: seed is \x1b[2J\r\n" + "9" * 100_000)

    with pytest.raises(SystemExit):
        run(refuse, [])
    error = capsys.readouterr().err
    assert len(error) < 1020 and "\x1b" not in error and error.count("\n") == 1 and error.endswith("999\n")


@pytest.mark.parametrize("rank, local_rank, speaks", [("0", "0", True), ("8", "0", True), ("9", "1", False)])
def test_one_process_of_each_machine_says_what_is_wrong_there(capsys, monkeypatch, rank, local_rank, speaks):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        run(lambda argv: (_ for _ in ()).throw(UserError("no such config")), [])
    assert capsys.readouterr().err == ("error: no such config\n" if speaks else "")


def test_what_was_wrong_is_the_last_line_though_a_progress_bar_is_drawn(capsys):
    def refuse(words):
        for _ in tqdm(range(3), mininterval=0):
            raise UserError("no such file")

    with pytest.raises(SystemExit):
        run(refuse, [])
    drawn = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert "0/3" in "".join(drawn) and drawn[-2:] == ["error: no such file", ""]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_output_cannot_hold_are_printed_as_escapes(encoding, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", output)
    run(lambda argv: print("caf\udce9", "±"), [])
    output.flush()
    assert output.buffer.getvalue() == {"ascii": b"caf\\udce9 \\xb1\n", "utf-8": b"caf\\udce9 \xc2\xb1\n"}[encoding]
