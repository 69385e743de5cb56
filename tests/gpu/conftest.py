"""What the rehearsals of GPU checks share."""

from functools import partial

import pytest
from bodies import CPU

from mutor_img.decoding import cpu as packed
from mutor_img.training import loop, parallel


@pytest.fixture
def eager(monkeypatch, tiny):
    """Trainers compile as :data:`CPU` says, and bf16 decoding on a CPU not at all."""
    monkeypatch.setattr(parallel, "compile_blocks", partial(parallel.compile_blocks, backend=CPU.backend))
    monkeypatch.setattr(packed.shutil, "which", lambda name: None)
    monkeypatch.setattr(loop, "peak_flops", lambda *given: None)  # half a minute in bf16 on some CPUs
