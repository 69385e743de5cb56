"""What the rehearsals of GPU checks share."""

from functools import partial

import pytest
from bodies import CPU

import tokenizer.train
from mutor_img.decoding import cpu as packed
from mutor_img.training import parallel


@pytest.fixture
def brief(monkeypatch, tiny):
    """What takes long on a CPU and no check looks at is left out: compiled kernels, FLOPs."""
    monkeypatch.setattr(packed.shutil, "which", lambda name: None)
    monkeypatch.setattr(tokenizer.train, "forward_flops", lambda config: 1.0)


@pytest.fixture
def eager(monkeypatch, brief):
    """Trainers compile as :data:`CPU` says: torch traces each block, and runs it as it is."""
    monkeypatch.setattr(parallel, "compile_blocks", partial(parallel.compile_blocks, backend=CPU.backend))


@pytest.fixture
def uncompiled(monkeypatch, brief):
    """Trainers compile nothing: a fault that lies elsewhere needs no tracing."""
    monkeypatch.setattr(parallel, "compile_blocks", lambda blocks: None)
