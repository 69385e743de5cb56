"""The report: what came of each check, whatever became of its process."""

import sys

import pytest
import torch

from mutor_img.common import child
from mutor_img.gpu_report import __main__ as command
from mutor_img.gpu_report.place import CheckFailed, Place
from mutor_img.gpu_report.report import Worker, run_checks, to_markdown
from mutor_img.gpu_report.worker import answering, environment

CPU = Place(torch.device("cpu"))
STAND_IN = f"""
import os, runpy, signal, time
def answer(question):
    name = question["check"]
    if name == "environment": return {{"driver": "1.2"}}
    if name == "bad": return {{"passed": False, "detail": "gradient of k differs by 0.3\\nand more"}}
    if name == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if name == "status": os._exit(139)
    if name == "hang": time.sleep(600)
    if name == "slow": time.sleep(2)
    if name.startswith("wait"): time.sleep(0.2)
    about = f"{{question['batch']}} sequences, {{os.environ.get('OMP_NUM_THREADS')}} threads"
    return {{"passed": True, "detail": f"process {{os.getpid()}}, {{about}}"}}
runpy.run_path({child.__file__!r})["serve"](answer)
"""  # without torch, which takes its time


def stand_in(**given):
    return Worker({"device": "cpu", "backend": "eager", "batch": 7}, [sys.executable, "-c", STAND_IN], 60.0, **given)


@pytest.fixture(scope="module")
def outcomes():
    """The facts, the outcomes, and how many of them there were at each note."""
    noted = []
    with stand_in() as worker:
        facts = worker.environment()
        found = run_checks(["good", "again", "bad", "crash", "status", "again"], [worker],
                           lambda so_far: noted.append(len(so_far)))
        worker.seconds = 1.0
        found += run_checks(["hang"], [worker], lambda so_far: None)
    return facts, found, noted


def test_a_crash_a_hang_and_a_failure_cost_their_own_line_only(outcomes):
    _, found, noted = outcomes
    assert [outcome.passed for outcome in found] == [True, True, False, False, False, True, False]
    assert "7 sequences" in found[0].detail and noted == list(range(1, 7))
    assert "ended by SIGSEGV" in found[3].detail and "ended with status 139" in found[4].detail
    assert "gave no answer within 1 s" in found[6].detail


def test_checks_share_a_process_until_one_fails(outcomes):
    _, found, _ = outcomes
    first, second, last = (found[i].detail.split(",")[0] for i in (0, 1, 5))
    assert first == second != last


def test_checks_side_by_side_have_their_share_of_the_threads_and_stand_in_the_order_of_the_table(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    workers, noted = [stand_in(environment={"OMP_NUM_THREADS": "3"}) for _ in range(3)], []
    names = ["slow", *(f"wait {number}" for number in range(5)), "crash", "last"]
    found = run_checks(names, workers, lambda so_far: noted.append([outcome.name for outcome in so_far]))
    assert [outcome.name for outcome in found] == names and [o.name for o in found if not o.passed] == ["crash"]
    processes = {outcome.detail.split(",")[0] for outcome in found if outcome.passed}
    assert len(processes) > 1 and all("3 threads" in outcome.detail for outcome in found if outcome.passed)
    assert len(noted) == len(names) and noted[-1] == names and all(sorted(n, key=names.index) == n for n in noted)
    assert all(worker.child is None for worker in workers)


def test_what_goes_wrong_beside_the_checks_ends_them_all_at_once():
    workers = [stand_in() for _ in range(2)]

    def full(so_far):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        run_checks(["hang", "slow", "good"], workers, full)
    assert all(worker.child is None for worker in workers)


def test_the_report_names_the_machine_and_every_check_and_shows_failures_in_full(outcomes):
    facts, found, _ = outcomes
    text = to_markdown(facts, found, len(found))
    assert "4 of 7 checks FAILED" in text and "- driver: 1.2" in text
    assert "| good | pass |" in text and "| bad | FAIL |" in text and "differs by 0.3\nand more" in text
    assert "all 1 checks passed" in to_markdown({}, found[:1], 1)
    assert "unfinished, 3 of 9 checks done, 1 FAILED" in to_markdown({}, found[:3], 9)


def test_the_worker_runs_a_check_by_its_name_in_a_process_of_its_own():
    with Worker({"device": "cpu", "backend": "eager", "batch": 2}, seconds=500.0) as worker:
        assert f"{torch.__version__.split('+')[0]}" in worker.environment()["torch"]
        found = worker.check("sdpa, 1d sparse, head 64, fp32, eager")
    assert found.passed and "4 tensors" in found.detail


def test_what_a_check_raises_is_its_answer_with_the_place_where():
    def bad(place):
        raise CheckFailed("gradient of k differs")

    def worse(place):
        raise ValueError("no such kernel")

    answer = answering(lambda batch: {"bad": bad, "worse": worse, "good": lambda place: f"{place.device}, {batch}"})
    found = {name: answer({"check": name, "device": "cpu", "backend": "eager", "batch": 3})
             for name in ("bad", "worse", "good")}
    assert found["good"] == {"passed": True, "detail": "cpu, 3"}
    assert found["bad"] == {"passed": False, "detail": "gradient of k differs"}
    detail = found["worse"]["detail"]
    assert detail.startswith("ValueError: no such kernel\n") and "in worse" in detail


def test_a_worker_that_cannot_start_fails_every_check_and_the_report_says_why():
    for started, says in (([sys.executable, "-c", "raise ImportError('no libcuda')"], "no libcuda"),
                          (["/absent/python"], "cannot be started")):
        with Worker({}, started) as worker:
            assert says in worker.environment()["machine"]
            found = run_checks(["one", "two"], [worker], lambda so_far: None)
        assert [outcome.passed for outcome in found] == [False, False] and says in found[1].detail


def test_the_command_writes_the_report_as_it_goes_and_ends_with_status_1(monkeypatch, tmp_path, capsys):
    out, seen = tmp_path / "report.md", []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "all_checks", lambda quick: dict.fromkeys(["good", "bad"]))

    class Watched(Worker):
        def check(self, name):
            seen.append(out.read_text().splitlines()[0])
            return super().check(name)

    monkeypatch.setattr(command, "Worker", lambda question, environment=None: Watched(
        question, [sys.executable, "-c", STAND_IN], environment=environment))
    with pytest.raises(SystemExit) as exit_:
        command.main(["--out", str(out), "--batch", "5"])
    assert exit_.value.code == 1 and out.read_text() in capsys.readouterr().out
    assert seen == [f"## GPU report: unfinished, {done} of 2 checks done, 0 FAILED" for done in (0, 1)]
    assert "5 sequences" in out.read_text()


def test_the_machine_is_described_without_a_gpu_too():
    assert environment(CPU.device)["device"] == "CPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_is_one_line_and_exit_status_2(capsys):
    from mutor_img.common.cli import run

    with pytest.raises(SystemExit) as exit_:
        run(command.main, [])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "sees no CUDA device" in error and error.count("\n") == 1
