"""Removing what is old ends nothing: it is said once, it goes later, and its name is free."""

import ast
import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from mutor_img.common import files
from mutor_img.common.errors import UserError
from mutor_img.common.files import (
    append_line,
    check_stamp,
    clear,
    discard,
    read_json,
    read_lines,
    read_record,
    remove,
    stamp,
    wait_until_seen,
    write_json,
    write_sealed,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stuck(monkeypatch):
    """Nothing can be removed until the context that is returned is undone."""
    def busy(path, *arguments, **options):
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        patch.setattr(Path, "unlink", busy)
        yield patch


def fill(path: Path, folder: bool) -> Path:
    (path / "in").mkdir(parents=True) if folder else path.write_text("x")
    return path


@pytest.mark.parametrize("folder", [True, False])
def test_what_cannot_be_removed_is_said_once_and_goes_later(stuck, tmp_path, capsys, folder):
    path = fill(tmp_path / "old", folder)
    assert [remove(path), remove(path)] == [False, False]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path} cannot be removed (Device or resource busy); it is left there"]
    stuck.undo()
    assert remove(path) and not path.exists() and remove(path)


@pytest.mark.parametrize("folder", [True, False])
def test_a_name_is_free_though_what_bears_it_cannot_be_removed(stuck, tmp_path, folder):
    for _ in range(2):
        path = fill(tmp_path / ".step_1.part", folder)
        clear(path)
        assert not path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step_1.0.part", ".step_1.1.part"]


def test_what_is_discarded_is_whole_or_out_of_sight(monkeypatch, tmp_path, capsys):
    path = fill(tmp_path / "step_1", True)
    monkeypatch.setattr(shutil, "rmtree", lambda gone: seen.append((gone.name, path.exists())))
    seen = []
    discard(path)
    assert seen == [(".step_1.0.part", False)]
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    discard(fill(tmp_path / "step_2", True))
    assert "step_2 cannot be removed (Operation not permitted)" in capsys.readouterr().err


def test_what_a_kill_leaves_of_a_file_goes_when_it_is_written_again(tmp_path):
    child = os.fork()
    if child == 0:
        files.write_atomic(tmp_path / "x", lambda aside: (aside.write_text("ha"), os.kill(os.getpid(), signal.SIGKILL)))
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "x").exists()
    files.write_atomic(tmp_path / "x", lambda aside: aside.write_text("half"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "half")]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    folder = fill(tmp_path / "kept", True)
    (tmp_path / "link").symlink_to(folder)
    assert remove(tmp_path / "link") and (folder / "in").is_dir() and not (tmp_path / "link").is_symlink()


def test_files_that_another_machine_wrote_may_come_late(monkeypatch):
    views = iter([Path("a"), Path("b"), None])
    wait_until_seen(lambda: next(views), "--out")
    assert next(views, "asked to the end") == "asked to the end"
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=r"^c: .* does not see what another one wrote; --out must be on"):
        wait_until_seen(lambda: Path("c"), "--out")


def test_files_are_removed_in_one_place():
    removing = ("rmtree", "unlink", "os.remove", "rmdir", "removedirs")
    found = set()
    for path in [p for package in ("mutor_img", "tokenizer") for p in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(removing):
                found.add(f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}")
    assert found == {"mutor_img/common/files.py: shutil.rmtree", "mutor_img/common/files.py: path.unlink",
                     "mutor_img/common/locks.py: path.rmdir"}


def test_a_changed_byte_of_sealed_json_is_found(tmp_path):
    value = {"step": 12, "nested": {"lr": 1e-4, 3: [None, True]}, "pair": (1, 2), "names": ["ä", "b"]}
    path = tmp_path / "a.json"
    whole, read = write_sealed(path, value).read_bytes(), json.loads(json.dumps(value))
    assert read_json(path) == read and "seal" not in read
    for at in range(len(whole) - 1):  # the last is a line break
        for flipped in (1, 32):  # in the seal's name, too
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flipped]) + whole[at + 1:])
            with pytest.raises(UserError, match=re.escape(str(path))):
                read_json(path)


def test_a_seal_that_a_person_removes_allows_the_change(tmp_path):
    sealed = json.loads(write_sealed(tmp_path / "a.json", {"step": 1}).read_text())
    write_json(tmp_path / "a.json", {**sealed, "step": 2})
    with pytest.raises(UserError, match=r"damaged, or changed by hand .* remove 'seal' from it"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"step": 2})
    assert read_json(tmp_path / "a.json") == {"step": 2}


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 10_000, b"\xff", b"{", b""])
def test_whatever_is_no_json_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_damaged_line_hides_none_of_those_after_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in range(4):
        append_line(path, json.dumps({"row": number}))
    path.write_text(path.read_text().replace('{"row": 1', '["row": 1'))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not valid JSON"):
        read_lines(path)


def test_without_locks_lines_are_added_and_what_a_kill_cut_short_goes(tmp_path, monkeypatch):
    def no_lock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_lock)
    path = tmp_path / "rows.jsonl"
    append_line(path, '{"row": 0}')
    with open(path, "a") as file:
        file.write('{"row"')  # a kill
    append_line(path, '{"row": 1}')
    assert [row["row"] for row in read_lines(path, "row")] == [0, 1]


@pytest.mark.parametrize("value", [3, None, [], "key", {"other": 1}])
def test_json_of_another_kind_than_was_written_is_named(tmp_path, value):
    write_json(tmp_path / "a.json", value)
    with pytest.raises(UserError, match=r"a\.json: (must be a JSON object|lacks 'key')"):
        read_record(tmp_path / "a.json", "key")
    append_line(tmp_path / "a.jsonl", json.dumps({"key": 1}))
    append_line(tmp_path / "a.jsonl", json.dumps(value))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: (must be a JSON object|lacks 'key')"):
        read_lines(tmp_path / "a.jsonl", "key")


@pytest.mark.parametrize("change, message", [
    (Path.unlink, "cannot be read any more"),
    (lambda path: os.truncate(path, 1), "changed or replaced"),
    (lambda path: path.write_text("edcba"), "changed or replaced"),
])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, change, message):
    path = tmp_path / "a.npy"
    path.write_text("abcde")
    os.utime(path, ns=(0, 0))
    check_stamp(path, seen := stamp(path))
    change(path)
    with pytest.raises(UserError, match=rf"a\.npy: .*{message}"):
        check_stamp(path, seen)
