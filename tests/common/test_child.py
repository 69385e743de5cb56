"""A child answers, or the caller learns why not and goes on; nothing of a child outlives it."""

import os
import subprocess
import sys
import time

import pytest

from mutor_img.common import child as child_module
from mutor_img.common.child import Child, ChildFailed, module_command

ECHO = "import sys, os\nfor line in sys.stdin: print('chatter', flush=True); os.write(int(sys.argv[-1]), line.encode())"
SLEEPER = "import subprocess, sys, time\nchild = subprocess.Popen(['sleep', '600'])\n{}\ntime.sleep(600)"


def python(code):
    return [sys.executable, "-c", code]


def alive(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(number):
    deadline = time.monotonic() + 10
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(number)


def test_questions_are_answered_one_after_the_other_and_prints_are_no_answers():
    with Child(python(ECHO)) as child:
        assert [child.ask(question, 60) for question in ({"a": [1.5, None]}, "two", float("inf"))] == [
            {"a": [1.5, None]}, "two", float("inf")]


ENDS = {  # what the child does -> what the caller is told
    "import os; os._exit(139)": "ended with status 139 and no answer",
    "import os; os.kill(os.getpid(), 9)": r"ended by SIGKILL \(Killed\)",
    "import ctypes; ctypes.string_at(0)": "ended by SIGSEGV .*it printed: Fatal Python error: Segmentation fault",
    "raise ValueError('no such kernel')": "ended with status 1 .*it printed: ValueError: no such kernel",
    "print('nvcc: error 7')": "ended with status 0 .*it printed: nvcc: error 7",
    "import os, sys; os.write(int(sys.argv[-1]), b'garbage\\n')": "answered b'garbage.*which is not JSON",
    "import os, sys; os.write(int(sys.argv[-1]), b'{\"passed\": tr')": "ended with status 0",
    "import os, sys, time; os.close(int(sys.argv[-1])); time.sleep(60)": "closed its pipe without an answer",
}


@pytest.mark.parametrize("code", ENDS)
def test_a_child_without_an_answer_is_a_reason_in_one_line(code, monkeypatch):
    monkeypatch.setattr(child_module, "_DYING", 0.5)
    with Child(python(code)) as child, pytest.raises(ChildFailed, match=ENDS[code]) as failure:
        child.ask(1, 60)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("code", [
    SLEEPER.format("print(child.pid, flush=True)"),
    "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER.format("print(child.pid, flush=True)"),
    SLEEPER.format("import os; print(child.pid, flush=True); os.write(int(sys.argv[-1]), b'{\"half\": ')"),
], ids=["hangs", "ignores SIGTERM", "hangs amid its answer"])
def test_a_child_that_hangs_is_killed_with_what_it_started(code):
    child, begun = Child(python(code)), time.monotonic()
    with pytest.raises(ChildFailed, match=r"gave no answer within 1.5 s and was killed") as failure:
        child.ask(1, 1.5)
    assert time.monotonic() - begun < 30
    assert gone(child._process.pid) and gone(int(failure.value.log))


def test_a_child_ends_with_its_parent():
    module = f"import os, runpy, sys, time; module = runpy.run_path({child_module.__file__!r})\n"  # without torch
    serve = module + "module['serve'](lambda question: os.getpid() if question else time.sleep(600))"
    code = module + (f"child = module['Child']([sys.executable, '-c', {serve!r}])\n"
                     "print(child.ask(1, 60), flush=True)\nchild.ask(0, 600)")
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True) as parent:
        number = int(parent.stdout.readline())
        assert alive(number)
        parent.kill()
    assert gone(number)


def test_a_child_knows_nothing_of_the_launch_and_finds_this_project_first(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (tmp_path / "mutor_img").mkdir()
    (tmp_path / "mutor_img" / "__init__.py").write_text("raise RuntimeError('the folder beside')")
    monkeypatch.chdir(tmp_path)
    code = ("import os, sys, json, importlib.util as u\nsys.stdin.readline()\n"
            "os.write(int(sys.argv[-1]), json.dumps([u.find_spec('mutor_img').origin, *os.environ]).encode() + b'\\n')")
    with Child([*module_command("x")[:2], "-c", code]) as child:
        origin, *names = child.ask(1, 60)
    assert os.path.dirname(os.path.dirname(origin)) == os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    assert "CUDA_VISIBLE_DEVICES" in names and not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR",
                                                    "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"} & set(names)
