"""A short form of each part of the failure suite: no case of it finds a fault."""

from importlib import import_module
from types import SimpleNamespace

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos.case import Case, Fault, Place, said_no
from mutor_img.common.files import read_lines

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


def test_a_disk_that_fails_is_one_line_and_nothing_is_lost(place):
    if not place.forks.disks_fail:
        pytest.skip("needs gcc")
    found = tried("disks", place, lambda name: name.endswith("call 7"))
    assert len(found) == 9 and "one line" in found.values()


def test_a_number_that_is_none_is_refused_before_it_is_saved(place):
    found = tried("numbers", place, lambda name: name.startswith("NaN"))
    assert len(found) == 12 and set(found.values()) == {"before the update", "before the checkpoint"}


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
    assert [row["outcome"] for row in read_lines(tmp_path / "c.jsonl")] == ["refused", "FAULT"]
    assert "FAULT in rot: bad: it ran" in capsys.readouterr().out
