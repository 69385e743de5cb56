"""Runs side by side: order, threads, failures, the budget, and what a signal does; their commands do little."""

import json
import signal
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import SAVING, end_with_its_child

from mutor_img.common import threads
from mutor_img.study.comparison.pool import Budget, Pace, Work, last_error, run_jobs


@pytest.fixture
def pool_of(tmp_path):
    """A function that runs jobs "0", "1", … whose one stage is Python code; returns the outcome and what is done."""
    def run(codes, workers=1, hours=None, **more):
        jobs = [SimpleNamespace(title=str(i), run_dir=Path(str(i)), trained=True, code=code)
                for i, code in enumerate(codes)]
        done, budget = [], Budget(tmp_path / "spent.json", hours)
        outcome = run_jobs(jobs, lambda job: [(f"stage {n}", [sys.executable, "-c", code])
                                              for n, code in enumerate(job.code)], workers, tmp_path / "logs", budget,
                           lambda job: done.append(job.title), **more)
        return outcome, done

    return run


def test_jobs_run_in_order_and_stages_one_after_the_other(pool_of, tmp_path):
    note = f"import pathlib; pathlib.Path({str(tmp_path / 'order')!r}).open('a').write"
    outcome, done = pool_of([[f"{note}('{job}{stage} ')" for stage in "ab"] for job in range(3)])
    assert (tmp_path / "order").read_text() == "0a 0b 1a 1b 2a 2b "
    assert done == ["0", "1", "2"] and not outcome.failed and not outcome.spent


def test_jobs_run_side_by_side_with_the_threads_divided(pool_of, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_processors", lambda: set(range(5)))
    meet = ("import os, pathlib, time\nhere = pathlib.Path({here!r}) / {name!r}\n"
            "here.write_text(os.environ.get('OMP_NUM_THREADS', 'all'))\n"
            "while not all((here.parent / n).exists() for n in {names!r}): time.sleep(0.05)")
    names = ["x", "y"]
    outcome, done = pool_of([[meet.format(here=str(tmp_path), name=n, names=names)] for n in names], workers=2)
    assert sorted(done) == ["0", "1"] and not outcome.failed  # each waited for the other
    assert [(tmp_path / n).read_text() for n in names] == ["2", "2"]
    pool_of([[meet.format(here=str(tmp_path), name="z", names=["z"])]])
    assert (tmp_path / "z").read_text() == "all"


def test_the_eta_is_that_of_the_runs_so_far_by_their_costs(tmp_path):
    def work(cost, begun):
        return Work(SimpleNamespace(cost=cost), deque(), tmp_path, begun=begun)

    def waiting(*costs):
        return [SimpleNamespace(cost=cost) for cost in costs]

    pace = Pace(lambda job: job.cost, workers=2, now=lambda: 1000.0)
    pace.note(work(3, begun=970))
    pace.note(work(1, begun=790))  # 240 s for 4 in all
    assert pace.eta(waiting(2, 3, 4), [work(2, begun=910)]) == "04:45"  # (120 + 180 + 240 + 30) / 2
    assert pace.eta(waiting(2, 3), [work(2, begun=910)]) == "03:00"  # no less than the longest
    assert pace.eta(waiting(300), [work(2, begun=0)]) == "5:00:00"  # one that takes longer than its cost says
    assert pace.eta([], []) == "00:00"


def test_every_run_that_is_done_says_when_all_are(pool_of, capsys):
    pool_of([["pass"], ["pass"], ["import sys; sys.exit(3)"]])
    said = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert [line.rpartition(" ")[0] for line in said] == ["0: done; ETA of all runs", "1: done; ETA of all runs"]


def test_a_failure_is_said_and_stops_no_other_run(pool_of, capsys):
    outcome, done = pool_of([["import sys; print('error: no codes here', file=sys.stderr); sys.exit(2)", "print('no')"],
                             ["print('fine')"], ["import sys; sys.exit(3)"]])
    assert done == ["1"] and outcome.failed.keys() == {"0", "2"}
    assert outcome.failed["0"].startswith("no codes here (log: ") and "ended with status 3" in outcome.failed["2"]
    assert "0: stage 0 failed: no codes here" in capsys.readouterr().out


def test_a_reason_behind_a_progress_bar_is_found(pool_of):
    bar = ("from tqdm import tqdm\nfrom mutor_img.common import cli, errors\nbar = tqdm(total=9)\nbar.update()\n"
           "def fail(argv): raise errors.UserError('loss is nan')\ncli.run(fail, [])")
    assert pool_of([[bar]])[0].failed["0"].startswith("loss is nan")


def test_a_reason_that_an_earlier_sitting_had_is_not_said_again(pool_of):
    assert pool_of([["import sys; sys.exit('error: no space left')"]])[0].failed["0"].startswith("no space left")
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert pool_of([[killed]])[0].failed["0"].startswith("stage 0 ended with status -9")


def test_the_reason_of_a_failure_is_the_last_line_that_says_one(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: an old one\nstep 3\nTraceback (most recent call last):\nRuntimeError: broken\n\nbye\n")
    assert last_error(log) == "RuntimeError: broken"
    log.write_text("step 1\n")
    assert last_error(log) is None


def test_when_the_budget_is_spent_runs_are_told_to_stop_and_nothing_else_begins(pool_of, tmp_path):
    saves = SAVING.format(folder=str(tmp_path))
    outcome, done = pool_of([[saves], ["print()"]], hours=4 / 3600)
    assert outcome.spent and not done and (tmp_path / "saved").exists()
    assert json.loads((tmp_path / "spent.json").read_text())["seconds"] >= 4
    outcome, done = pool_of([["print()"]], hours=4 / 3600)  # the next sitting has nothing left
    assert outcome.spent and not done and not (tmp_path / "logs" / "1.log").exists()
    assert pool_of([["print()"]], hours=1)[1] == ["0"]


def test_hours_add_up_over_sittings_and_a_kill_loses_little(tmp_path):
    clock = [0.0]
    for sitting in range(3):
        budget = Budget(tmp_path / "spent.json", 1.0, lambda: clock[0])
        for _ in range(11):
            clock[0] += 100
            budget.note()
        assert budget.seconds == pytest.approx(1100 * (sitting + 1))
        clock[0] += 5  # and killed: these are lost
    assert not budget.over and Budget(tmp_path / "spent.json", 0.9, lambda: 0.0).over


def study_process(folder: Path) -> None:
    from mutor_img.common import cli

    job = SimpleNamespace(title="one", run_dir=Path("one"), trained=True)
    code = SAVING.format(folder=str(folder))
    cli.run(lambda argv: run_jobs([job], lambda job: [("training", [sys.executable, "-c", code])], 1, folder / "logs",
                                  Budget(folder / "spent.json", None)), [])


@pytest.mark.parametrize("number, saved", [(signal.SIGTERM, True), (signal.SIGKILL, False)])
def test_a_run_ends_with_its_study(processes, tmp_path, number, saved):
    end_with_its_child(processes, study_process, tmp_path, number)
    assert (tmp_path / "saved").is_file() == saved
