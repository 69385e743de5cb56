"""A short form of each part of the failure suite: no case of it finds a fault."""

from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import fuzz, network
from benchmarks.chaos.case import Case, Fault, Place, said_no
from benchmarks.chaos.watcher import Watcher
from mutor_img.common.files import read_lines

CHANGED = ("codes, file cut off", "tar, file replaced", "folder, file cut off", "out has mode", "stands at 1970")
KILLED = ("mirai 1", "tokenizer 6", "encode 7", "reference 10")
SLOW = ("compressed", "all black", "10 MB")  # whose files take a second to make


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where all parts are tried, with one process for all."""
    place = Place(tmp_path_factory.mktemp("chaos"), count=30)
    yield place
    place.close()


def tried(part, place, wanted):
    """Run the cases of a part that are wanted; returns their outcomes."""
    folder = place.folder / part
    folder.mkdir()
    here = Place(folder, place.count, seed=1)
    here.__dict__["forks"] = place.forks
    return {case.name: case.run() for case in import_module(f"benchmarks.chaos.{part}").cases(here)
            if wanted(case.name)}


def test_what_a_stranger_made_is_refused_in_one_line_and_runs_nothing(place):
    found = tried("hostile", place, lambda name: not any(word in name for word in SLOW))
    assert len(found) > 90
    assert {outcome.partition(",")[0] for outcome in found.values()} == {"refused", "without effect"}


def test_what_rots_is_found_or_without_effect(place):
    found = tried("rot", place, lambda name: True)
    assert len(found) == 30 and "refused" in found.values()


def test_what_is_changed_at_random_is_read_or_refused(place):
    found = tried("fuzz", place, lambda name: True)
    assert len(found) == len(fuzz.TARGETS) and all(outcome.startswith("held") for outcome in found.values())


def test_data_that_change_on_the_way_are_named_and_nothing_is_lost(place):
    if not place.forks.disks_fail:
        pytest.skip("needs gcc")
    found = tried("changes", place, lambda name: any(word in name for word in CHANGED))
    assert len(found) == 9 and set(found.values()) == {"one line", "not disturbed"}


def test_a_disk_that_fails_is_one_line_and_nothing_is_lost(place):
    if not place.forks.disks_fail:
        pytest.skip("needs gcc")
    found = tried("disks", place, lambda name: name.endswith(("call 7", "slow", "2 free pages")))
    assert len(found) == 15 and "one line" in found.values()


def test_a_number_that_is_none_is_refused_before_it_is_saved(place):
    found = tried("numbers", place, lambda name: name.startswith("NaN"))
    assert len(found) == 12 and set(found.values()) == {"before the update", "before the checkpoint"}


def test_no_command_asks_for_a_network_and_what_is_to_be_fetched_is_missing_in_one_line(place):
    found = tried("network", place, lambda name: True)
    outcomes = [outcome.partition(",")[0] for outcome in found.values()]
    assert outcomes == ["nothing tried", "missing in one line", "missing in one line"]


@pytest.mark.parametrize(("event", "details", "told"), [
    ("socket.connect", (None, ("192.0.2.1", 80)), "('192.0.2.1', 80)"),
    ("socket.sendto", (None, ("2001:db8::1", 53, 0, 0)), "('2001:db8::1', 53, 0, 0)"),
    ("socket.getaddrinfo", ("example.com", 443, 0, 0, 0), "('example.com',)"),
    ("socket.connect", (None, ("127.0.0.1", 80)), None), ("socket.connect", (None, "/tmp/socket"), None),
    ("socket.getaddrinfo", ("localhost", 80), None), ("open", ("/etc/passwd", "r", 0), None)])
def test_what_goes_beyond_this_machine_is_noted_and_refused(event, details, told):
    seen = []
    with pytest.raises(OSError, match="unreachable") if told else nullcontext():
        network._refuse(seen, event, details)
    assert seen == [told] * bool(told)


def test_a_command_that_is_killed_goes_on_to_the_same_bytes(place):
    found = tried("kills", place, lambda name: name in KILLED)
    assert len(found) == 4 and any(outcome.endswith(": SIGKILL") for outcome in found.values())


def test_a_process_that_is_killed_ends_the_other_which_says_so_last(place):
    found = tried("processes", place, lambda name: name == "process 1 is killed in an update")
    assert list(found.values()) == ["is killed: all end"]


def test_a_file_that_is_not_whole_is_seen_by_the_watcher(tmp_path):
    with pytest.raises(Fault, match=r"x\.json was there and not whole"), Watcher(tmp_path):
        (tmp_path / ".hidden.json").write_text("{")
        (tmp_path / "x.json").write_text("{")


def test_a_trial_that_does_something_or_takes_memory_is_seen(place):
    acts = place.forks.run("os:system", "true")
    assert acts["outcome"] == "returned" and "os.system" in acts["acts"]
    greedy = place.forks.run("builtins:bytearray", 2**30, memory=2**26)
    assert greedy["outcome"] == "raised" and "MemoryError" in greedy["message"]
    with pytest.raises(Fault, match="raised"):
        said_no(greedy, "x")


def test_a_fault_is_printed_and_written_down(monkeypatch, tmp_path, capsys):
    def wrong():
        raise Fault("it ran")

    part = SimpleNamespace(cases=lambda place: [Case("good", lambda: "refused, 3 MiB"), Case("bad", wrong)])
    monkeypatch.setattr(chaos, "import_module", lambda name: part)
    assert chaos.main(["--only", "rot", "--out", str(tmp_path / "c.jsonl")]) == 1
    rows = read_lines(tmp_path / "c.jsonl")
    assert [row["outcome"] for row in rows] == ["refused", "FAULT"] and rows[0]["figures"] == "3 MiB"
    assert "FAULT in rot: bad: it ran" in capsys.readouterr().out
