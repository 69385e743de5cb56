"""FlexAttention's GPU kernels, backward included, interpreted on a CPU; see interpreted_flex.py."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "interpreted_flex.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which torch's CUDA builds bring")
def test_interpreted_gpu_kernels_have_exact_outputs_and_gradients_for_two_draws_with_one_mask():
    done = subprocess.run([sys.executable, str(SCRIPT), "sparse-100"], capture_output=True, text=True, timeout=500,
                          cwd=SCRIPT.parents[2])
    if done.returncode == 77:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    draws = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(draws) == 2
    for draw in draws:
        assert [d["tensor"] for d in draw["differences"]] == [
            "output", "gradient of q", "gradient of k", "gradient of v"]
        assert all(d["passed"] for d in draw["differences"]), draw
