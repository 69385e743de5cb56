"""Tasks of Slurm without a launcher are refused, a process outlives neither torchrun nor its peers without a word."""

import ctypes
import os
import select
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from mutor_img.common import cli
from mutor_img.common.errors import UserError
from mutor_img.training import runtime
from mutor_img.training.runtime import Runtime

SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "ENVIRONMENT", "RANK",
         "WORLD_SIZE")


@pytest.fixture(params=[Runtime.start, lambda: Runtime.on("cpu")])
def start(request, monkeypatch):
    """A function that starts a runtime, as a command does, among these variables alone."""
    def among(**variables):
        for name in SLURM:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return request.param()

    return among


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"},
    {"SLURM_STEP_NUM_TASKS": "2", "ENVIRONMENT": "BATCH"},  # srun in a batch script, whose environment tasks have, too
])
def test_several_slurm_tasks_without_a_launcher_are_told_which_to_use(start, variables):
    with pytest.raises(UserError, match="srun --ntasks-per-node=1 torchrun") as caught:
        start(**variables)
    assert "SLURM_STEP_NUM_TASKS" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("variables", [
    {}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "2"},
    {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "ENVIRONMENT": "BATCH"},  # the batch script itself
    {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},  # a shell of salloc -n 8
])
def test_one_task_is_one_process(start, variables):
    assert start(**variables).world == 1


def test_a_launcher_within_slurm_tells_each_process_its_rank(start):
    assert start(SLURM_NTASKS="2", SLURM_PROCID="0", RANK="0", WORLD_SIZE="1").rank == 0


@pytest.mark.parametrize("gloo, words", [
    ("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete",
     r"silent for 30 minutes \(train\.timeout_minutes in training\)"),
    ("[pair.cc:547] Connection closed by peer [127.0.0.1]:1234", "another process has gone")])
def test_what_gloo_says_of_another_process_is_one_line_that_a_user_understands(monkeypatch, gloo, words):
    monkeypatch.setattr(runtime, "_store", lambda: SimpleNamespace(add=lambda name, number: 1))
    with pytest.raises(UserError, match=words) as caught, Runtime(torch.device("cpu"), world=2).one_voice():
        raise RuntimeError(gloo)
    assert caught.value.speaks


def test_the_system_tells_a_process_of_torchrun_to_end_when_torchrun_is_gone():
    child, number = os.fork(), ctypes.c_int()
    if child == 0:
        try:
            os.environ["TORCHELASTIC_RUN_ID"] = "none"
            Runtime.start()
            ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        finally:
            os._exit(number.value)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_a_process_that_waits_for_a_torchrun_that_is_gone_ends_with_it():
    store, (ended, alive) = socket.create_server(("127.0.0.1", 0)), os.pipe()  # the store never answers
    launcher = os.fork()
    if launcher == 0:
        if os.fork():
            time.sleep(300)
        os.close(ended)
        os.environ.update(TORCHELASTIC_RUN_ID="none", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.getsockname()[1]))
        PartialState._reset_state()
        cli.run(lambda argv: Runtime.start())
        os._exit(0)
    os.close(alive)
    with store.accept()[0]:  # the rendezvous has begun
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        assert select.select([ended], [], [], 20)[0] and os.read(ended, 1) == b""  # nobody holds the pipe any more


def test_more_processes_than_gpus_are_one_line(start, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert start(LOCAL_RANK="3").world == 1  # another launcher shows each process GPUs of its own
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank, speaks in (("2", True), ("3", False)):
        with pytest.raises(UserError, match=r"has 2 CUDA devices, and 4 processes .* --nproc-per-node 2") as caught:
            start(LOCAL_RANK=rank)
        assert caught.value.speaks == speaks


def test_several_processes_have_a_device_each(monkeypatch):
    launched = Runtime(torch.device("cuda", 1), 1, 2)
    waits = []
    monkeypatch.setattr(Runtime, "start", lambda minutes: waits.append(minutes) or launched)
    with pytest.raises(UserError, match="--device cpu: the 2 processes use cuda, one device each"):
        Runtime.on("cpu")
    assert Runtime.on("auto") is launched
    assert waits == [24 * 60] * 2  # as long as one of them may write what all have made


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cpu:1", "meta", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"--device '?{name}'?.* (is not a device; give auto|no such device here)"):
        Runtime.on(name)
