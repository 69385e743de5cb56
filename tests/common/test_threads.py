"""Every command tells OpenMP how long to spin before torch is loaded; a library import and a user's choice stay."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mutor_img.common import threads
from mutor_img.common.threads import CHOICES, LONG, NEVER

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["train.py", "sample.py", "evaluate_fid.py"]
WITHOUT_TORCH = {"mutor_img.study.fashion"}
MODULES = sorted({
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for room in ("mutor_img", "tokenizer", "benchmarks") for path in (ROOT / room).rglob("*.py")
    if 'if __name__ == "__main__":' in (text := path.read_text()) and "serve(" not in text  # children inherit
} - WITHOUT_TORCH)
INSTALLED = [f"from mutor_img.common.doors import {door}; {door}()" for door in ("train", "sample", "evaluate_fid")]
COMMANDS = [*([script] for script in SCRIPTS), *(["-m", module] for module in MODULES),
            *(["-c", code] for code in INSTALLED)]
LIBRARY = "import mutor_img, tokenizer, mutor_img.common.cli; from tokenizer import load_tokenizer"


@pytest.fixture
def seen_by_torch(tmp_path):
    """Return a function that runs a command with stand-ins for torch and for the load of two processors.

    It returns what torch would find in its environment.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os, psutil\n"
        "psutil.cpu_percent = lambda *a, **k: [float(share) for share in os.environ['LOAD'].split()]\n"
        "os.sched_getaffinity = lambda pid: set(range(int(os.environ.get('PROCESSORS', 2))))\n")
    (tmp_path / "torch.py").write_text(
        f"import os\nprint(*[os.environ.get(name) for name in {CHOICES}], flush=True)\nos._exit(0)\n")

    def run(*words, load="0 0", **environment):
        ours = (*CHOICES, threads.OURS, "OMP_NUM_THREADS")
        clean = {name: value for name, value in os.environ.items() if name not in ours}
        environment["LOAD"] = load
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                              env=clean | {"PYTHONPATH": f"{tmp_path}:{ROOT}"} | environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[-1])
def test_no_thread_of_a_command_spins_on_a_busy_machine(seen_by_torch, command):
    assert seen_by_torch(*command, load="100 0") == ["None", *NEVER.values()]


@pytest.mark.parametrize("load, setting", [
    ("0 0", LONG), ("20 20", LONG), ("30 30", NEVER), ("0 100", NEVER), ("0", LONG),
    ("0 0 100 100", LONG),  # processors that this process may not use
])
def test_how_long_it_spins_depends_on_the_load_of_its_processors(seen_by_torch, load, setting):
    assert seen_by_torch("sample.py", load=load) == ["None", *setting.values()]


@pytest.mark.parametrize("words, environment", [
    (["--help"], {}), (["--out", "s.npz", "-h"], {}), ([], {"OMP_NUM_THREADS": "1"}), ([], {"OMP_NUM_THREADS": "1,2"}),
    ([], {"PROCESSORS": "1"}), (["--help"], {threads.OURS: "1"}),
])
def test_a_command_that_prints_its_help_or_has_one_thread_sets_nothing(seen_by_torch, words, environment):
    assert seen_by_torch("sample.py", *words, load="100 100", **environment) == ["None"] * 3


def test_the_users_number_of_threads_counts_before_the_processors(seen_by_torch):
    seen = seen_by_torch("sample.py", load="100 100", OMP_NUM_THREADS="2", PROCESSORS="1")
    assert seen == ["None", *NEVER.values()]


def test_a_child_looks_anew(seen_by_torch):
    inherited = LONG | {threads.OURS: "1"}
    assert seen_by_torch("sample.py", load="100 100", **inherited) == ["None", *NEVER.values()]


@pytest.mark.parametrize("load, busy", [(0, False), (20, False), (30, True), (100, True)])
def test_more_than_half_a_processor_of_others_is_load(load, busy, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [load, load, 100])
    monkeypatch.setattr(threads, "_processors", lambda: {0, 1})
    assert threads.in_use() is busy


def test_the_load_is_that_of_others():
    assert isinstance(threads.in_use(), bool)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for _ in range(50):  # until they have started
            if threads.in_use():
                break
        else:
            pytest.fail("two busy processes were not seen")
    finally:
        for process in busy:
            process.kill()


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "7"),
                                         ("KMP_BLOCKTIME", "0")])
def test_a_user_s_choice_wins(seen_by_torch, name, value):
    seen = seen_by_torch("sample.py", load="100 100", **{name: value})
    assert seen == [value if n == name else "None" for n in CHOICES]


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_a_command_that_sets_nothing_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_library_import_changes_nothing(seen_by_torch):
    assert seen_by_torch("-c", LIBRARY) == ["None"] * 3
    assert seen_by_torch("-c", "import tokenizer.encode, mutor_img.pretraining.command") == ["None"] * 3


@pytest.mark.skipif(os.environ.get("OMP_NUM_THREADS") == "1", reason="one thread waits for no other")
def test_the_tests_and_their_children_set_spinning():
    assert any(name in os.environ for name in CHOICES)


def test_there_are_commands_of_every_package():
    assert {"tokenizer.encode", "tokenizer.train", "mutor_img.sweep", "mutor_img.metrics.digits",
            "benchmarks.train_step"} <= set(MODULES)
