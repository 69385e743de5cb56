"""The time that torchrun leaves a run to save, and what the docs say of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig

ROOT = Path(__file__).parents[2]
DOC, SCRIPT = (ROOT / "docs" / "distributed.md").read_text(), (ROOT / "examples" / "train.slurm").read_text()
VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SLOW_TO_SAVE = """
import os, pathlib, signal, sys, time
mark = lambda what: pathlib.Path(sys.argv[1], f"{what}_{os.environ['RANK']}").touch()
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(4), mark("saved"), os._exit(0)))
mark("ready")
time.sleep(300)
"""


def promised() -> int:
    """Return the seconds that the Slurm script gives torchrun."""
    return int(re.search(rf"^export {VARIABLE}=(\d+)", SCRIPT, re.MULTILINE)[1])


def test_the_slurm_script_gives_torchrun_nearly_all_the_time_that_slurm_gives():
    given = int(re.search(r"#SBATCH --signal=TERM@(\d+)", SCRIPT)[1])
    assert given - 30 <= promised() < given


def test_torchrun_gives_30_seconds_where_nothing_else_is_said(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 30 and "that still runs after 30 seconds" in " ".join(DOC.split())


def test_torchrun_lets_two_processes_save_for_as_long_as_the_variable_says(tmp_path):
    (tmp_path / "worker.py").write_text(SLOW_TO_SAVE)
    launches = {}
    for seconds in (1, promised()):
        (tmp_path / str(seconds)).mkdir()
        launches[seconds] = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             tmp_path / "worker.py", tmp_path / str(seconds)], stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: str(seconds)})
    while len(list(tmp_path.glob("*/ready_*"))) < 4:
        assert all(launch.poll() is None for launch in launches.values()) and time.sleep(0.1) is None
    for launch in launches.values():
        launch.send_signal(signal.SIGTERM)
    for launch in launches.values():
        launch.wait(timeout=120)
    saved = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/saved_*")}
    assert saved == {f"{promised()}/saved_0", f"{promised()}/saved_1"}
