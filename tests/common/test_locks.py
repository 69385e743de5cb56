"""One owner for each output: it is named, it goes, and what a killed one left is in nobody's way."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import SoftFileLease

from mutor_img.common import cli, locks
from mutor_img.common.errors import UserError
from mutor_img.common.locks import claim, file_lock, folder_lock, owner_of


def own(lock, ready, again) -> None:
    """Own an output in another process until it is told to end."""
    with claim(lock):
        ready.send(os.getpid())
        again.recv()


@pytest.fixture
def owner(processes):
    """A function that has another process own an output; returns it."""
    started = []

    def start(lock):
        ready, told = multiprocessing.Pipe()[::-1], multiprocessing.Pipe()
        process = processes.Process(target=own, args=(lock, ready[0], told[0]))
        process.start()
        started.append((process, told))
        assert ready[1].poll(60) and ready[1].recv() == process.pid
        return process

    yield start
    for process, _ in started:
        process.kill()


def refused(lock) -> str:
    with pytest.raises(UserError) as caught, claim(lock):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("make", [folder_lock, file_lock])
def test_the_owner_of_an_output_is_named_with_its_host(owner, tmp_path, make):
    lock = make(tmp_path / "out")
    process = owner(lock)
    assert f"{tmp_path / 'out'}: process {process.pid} on host {socket.gethostname()} " in refused(lock)
    assert {f"pid={process.pid}", f"host={socket.gethostname()}"} <= {
        line.split("?")[0] for line in lock.path.read_text().splitlines()}  # a person can read it


def test_what_a_killed_owner_left_is_taken_over_at_once(owner, tmp_path):
    lock = folder_lock(tmp_path / "out")
    process = owner(lock)
    process.kill()
    process.join()
    with claim(lock):
        assert f"pid={os.getpid()}\n" in lock.path.read_text()


def die_as_it_takes_over(lock) -> None:
    """Be killed when the file is there that a dead owner's lock is to change places with."""
    real = os.open

    def deadly(path, *arguments, **named):
        descriptor = real(path, *arguments, **named)
        if ".break." in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return descriptor

    os.open = deadly
    with claim(lock):
        pass


def test_what_is_left_by_one_that_was_killed_as_it_took_over_goes_with_the_next(owner, processes, tmp_path):
    lock = file_lock(tmp_path / "out[1].json")  # not a pattern
    process = owner(lock)
    process.kill()
    process.join()
    second = processes.Process(target=die_as_it_takes_over, args=(lock,))
    second.start()
    second.join(60)
    assert second.exitcode == -signal.SIGKILL
    [left] = tmp_path.glob("*.break.*")
    alive = left.with_name(left.name.replace(str(second.pid), str(os.getpid())))
    alive.touch()  # of a process that is still at it
    with claim(lock):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [alive]


@pytest.mark.parametrize("days", [-365, 365])
def test_a_clock_that_was_set_meanwhile_makes_no_owner_and_ends_none(owner, tmp_path, days):
    lock = folder_lock(tmp_path / "out")
    process = owner(lock)
    os.utime(lock.path, (time.time() + 86_400 * days,) * 2)  # touched when the clock said something else
    assert f"process {process.pid} on host " in refused(lock)
    process.kill()
    process.join()
    os.utime(lock.path, (time.time() + 86_400 * days,) * 2)
    with claim(lock):
        assert f"pid={os.getpid()}\n" in lock.path.read_text()


def test_a_killed_owner_whose_parent_has_not_taken_note_owns_nothing(tmp_path):
    lock = folder_lock(tmp_path / "out")
    child = os.fork()
    if child == 0:
        with claim(lock):
            os.kill(os.getpid(), signal.SIGKILL)
    while not locks._is_zombie(child):  # as for ever in a container without an init
        time.sleep(0.01)
    with claim(lock):
        assert f"pid={os.getpid()}\n" in lock.path.read_text()
    os.waitpid(child, 0)


def marker(path: Path, **changes) -> str:
    """Return the text of a lock of this process with some lines changed, as another one would have written it."""
    with SoftFileLease(path, lease_duration=locks.SILENCE) as lease:
        lines = dict(line.split("=") for line in Path(lease.lock_file).read_text().splitlines()[1:])
    return "filelock/2\n" + "".join(f"{key}={value}\n" for key, value in {**lines, **changes}.items())


def test_a_process_id_that_another_process_has_by_now_owns_nothing(tmp_path):
    lock = folder_lock(tmp_path)
    # Alive, but it began at another moment. Not the parent's: that may have begun in the same clock tick.
    lock.path.write_text(marker(tmp_path / "some", pid=os.getppid(), start=1))
    with claim(lock):
        assert f"pid={os.getpid()}\n" in lock.path.read_text()


def test_another_machines_owner_counts_as_gone_once_it_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SILENCE", 2.0)
    monkeypatch.setattr(locks, "BEAT", 0.5)
    monkeypatch.setattr(locks, "_POLL", 0.2)
    lock = folder_lock(tmp_path)
    lock.path.write_text(marker(tmp_path / "some", host="elsewhere", pid=4242))
    begun = time.monotonic()
    with claim(lock):
        assert time.monotonic() - begun >= 2
    assert "process 4242 on host elsewhere" in capsys.readouterr().err


def test_another_machines_owner_that_shows_a_sign_of_life_stays_the_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_POLL", 0.1)
    lock, sleep = folder_lock(tmp_path), time.sleep
    lock.path.write_text(marker(tmp_path / "some", host="elsewhere", pid=4242))
    with monkeypatch.context() as patch:
        patch.setattr(locks.time, "sleep", lambda seconds: (sleep(seconds), os.utime(lock.path)))
        assert "process 4242 on host elsewhere is writing there" in refused(lock)


def test_a_look_tells_who_owns_an_output_and_changes_nothing(owner, tmp_path):
    lock = folder_lock(tmp_path)
    assert owner_of(lock) is None and not list(tmp_path.iterdir())
    process = owner(lock)
    assert owner_of(lock).startswith(f"process {process.pid} on host ")
    left = lock.path.read_text()
    process.kill()
    process.join()
    assert owner_of(lock) is None and lock.path.read_text() == left
    lock.path.write_text("something else\n")
    assert owner_of(lock) is None


def test_a_look_at_another_machines_owner_believes_it_until_it_is_silent(tmp_path):
    lock = folder_lock(tmp_path)
    lock.path.write_text(marker(tmp_path / "some", host="elsewhere", pid=4242))
    assert owner_of(lock) == "process 4242 on host elsewhere"
    os.utime(lock.path, (time.time() - locks.SILENCE - 1,) * 2)
    assert owner_of(lock) is None


@pytest.mark.parametrize("text", ["", "filelock/2\npid=", "something else\n"])
def test_a_lock_that_names_nobody_is_in_nobodys_way(tmp_path, text):
    folder_lock(tmp_path).path.write_text(text)
    with claim(folder_lock(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [None, UserError("no"), KeyboardInterrupt(), SystemExit(3), ValueError()])
def test_no_lock_stays_and_no_folder_that_only_held_one(tmp_path, error):
    outputs = folder_lock(tmp_path / "a" / "run"), file_lock(tmp_path / "b" / "x.npz"), file_lock(None)
    with contextlib.suppress(type(error) if error else ()), claim(*outputs):
        assert [lock.path.is_file() for lock in outputs[:2]] == [True, True]
        if error:
            raise error
        (tmp_path / "b" / "x.npz").write_text("done")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ([] if error else ["b", "b/x.npz"])


def test_a_command_that_is_terminated_leaves_no_lock(tmp_path):
    def main(argv):
        with claim(folder_lock(tmp_path)):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, [])
    assert stopped.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_process_owns_it_and_its_commands_may_own_again(tmp_path):
    lock = folder_lock(tmp_path)
    code = ("from mutor_img.common.locks import claim, folder_lock\n"
            f"with claim(folder_lock({str(tmp_path)!r})): print('in')")
    with claim(lock):
        with claim(lock):
            pass
        assert lock.path.is_file()  # the inner one was not its to release
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
        assert done.stdout == "in\n", done.stderr
        assert lock.path.is_file()
    assert not lock.path.exists()


@pytest.fixture
def lockless(monkeypatch):
    def closed(lease, timeout):
        raise PermissionError(13, "Permission denied", lease.lock_file)

    monkeypatch.setattr(SoftFileLease, "acquire", closed)


def test_a_file_system_without_exclusive_files_has_no_owners(tmp_path, lockless):
    with claim(folder_lock(tmp_path), file_lock(tmp_path / "a" / "x.json")):
        pass
    assert not list(tmp_path.iterdir())


def test_what_is_there_and_may_only_be_read_has_no_owner_where_it_may_be_complete(tmp_path, lockless, monkeypatch):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks.tempfile, "NamedTemporaryFile", read_only)
    (tmp_path / "x.npz").touch()
    with claim(folder_lock(tmp_path, keeps=True), file_lock(tmp_path / "x.npz", keeps=True)):
        pass
    for lock in (folder_lock(tmp_path), file_lock(tmp_path / "x.npz"), file_lock(tmp_path / "y.npz", keeps=True),
                 folder_lock(tmp_path / "run", keeps=True)):
        assert refused(lock).startswith(f"{lock.output}: cannot be written") and "Read-only" in refused(lock)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    def full(lease, timeout):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SoftFileLease, "acquire", full)
    with pytest.raises(OSError, match="No space"), claim(folder_lock(tmp_path)):
        pass


def contend(lock, start, results, end) -> None:
    start.wait()
    try:
        with claim(lock):
            results.put("owner")
            end.wait()
    except UserError:
        results.put("refused")


def test_of_many_that_find_a_dead_owner_one_gets_its_place(processes, owner, tmp_path):
    lock = folder_lock(tmp_path)
    process = owner(lock)
    process.kill()
    process.join()
    start, results, end = processes.Event(), processes.Queue(), processes.Event()
    many = [processes.Process(target=contend, args=(lock, start, results, end)) for _ in range(5)]
    for one in many:
        one.start()
    start.set()
    assert sorted(results.get(timeout=200) for _ in many) == ["owner", *["refused"] * 4]
    end.set()
    for one in many:
        one.join(60)
