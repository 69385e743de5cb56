"""Measured updates: what counts as busy, and the table of benchmarks.gpu_step, on a CPU in the GPU's place."""

import random
import re

import pytest
import torch
from bodies import CPU, SMALL

from benchmarks import gpu_step
from mutor_img.common import cli
from mutor_img.pretraining import speed
from mutor_img.pretraining.speed import Speed, covered, measure_speed, watched


def test_time_in_which_kernels_overlap_counts_once():
    draw = random.Random(0)
    starts = [draw.randrange(200) for _ in range(60)]
    spans = [(start, start + draw.randrange(9)) for start in starts]
    assert covered(spans) == len({second for start, end in spans for second in range(start, end)}) < sum(
        end - start for start, end in spans)


def test_the_profiler_counts_the_innermost_operations_of_one_call():
    matrix = torch.ones(64, 64)
    busy, kernels = watched(lambda: [torch.nn.functional.linear(matrix, matrix) for _ in range(5)], 4, CPU.device)
    once = watched(lambda: torch.nn.functional.linear(matrix, matrix), 4, CPU.device)[1]
    assert kernels == 5 * once and 0 < busy < 1


def test_shares_are_those_of_the_time_and_unknown_where_nothing_was_seen():
    known = Speed(8, 0.5, 1e12, 1e13, 0.4, 70, 1.0, 2.0, 0.3, 9.7)
    assert known.mfu == pytest.approx(0.2) and known.idle == pytest.approx(0.2)
    blind = Speed(8, 0.5, 1e12, None, 0.0, 0, None, 2.0, 0.3, 9.7)
    assert blind.mfu is None and blind.idle is None


def test_an_update_that_does_not_fit_is_measured_with_fewer_sequences(monkeypatch):
    def measure(config, *given):
        if config.train.global_batch > 8:
            raise torch.OutOfMemoryError("full")
        return config.train.global_batch

    monkeypatch.setattr(speed, "_measure", measure)
    assert measure_speed(CPU.runtime, SMALL, batch=32) == 8


@pytest.mark.usefixtures("usual_limits")
def test_the_table_has_a_row_of_measured_and_computed_figures_per_model_and_registers(uncompiled, monkeypatch, capsys):
    monkeypatch.setattr(gpu_step, "require_gpu", lambda what: CPU.device)
    monkeypatch.setattr(gpu_step, "GRID", (4, 5))
    found = gpu_step.main(["--presets", "mnist,B", "--registers", "0,20", "--batch", "2", "--rounds", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert [row[:3] for row in rows[2:]] == [[name, count, "2"] for name in ("mnist", "B") for count in ("0", "20")]
    assert all(len(row) == len(gpu_step.HEADER) for row in rows[2:])
    assert all(row.kernels > 100 and 0 <= row.idle < 1 and row.busy < row.seconds * 3 for row in found)
    assert found[1].flops > 1.5 * found[0].flops and found[1].kernels > found[0].kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_is_one_line_and_exit_status_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(gpu_step.main, [])
    found = capsys.readouterr()
    assert exit_.value.code == 2 and not found.out
    assert re.fullmatch(r"error: torch \S+ sees no CUDA device, and these measurements need one; .*\n", found.err)
