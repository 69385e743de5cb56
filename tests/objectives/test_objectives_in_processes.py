"""Objectives with weights of their own under DDP and FSDP2: two gloo processes give the losses of one."""

import functools
from pathlib import Path

import pytest
import torch
from launching import join, launch

from mutor_img import transformer
from mutor_img.checkpoints.folder import find_checkpoint, read_meta
from mutor_img.common.config import load_config
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import parallel
from mutor_img.training.log import read_metrics
from mutor_img.training.loop import train
from mutor_img.training.runtime import Runtime

RUN = """
data: {{codes: {codes}, val_codes: {codes}}}
model: {{preset: mnist, grid: [4, 5], vocabulary: 16, classes: 3, dropout: 0.0}}
registers: {{kind: none}}
optim: {{lr: 1e-2}}
train: {{steps: 3, global_batch: 4, micro_batch: 1, precision: fp32, compile: false, ema: 0.9, log_every: 1,
         checkpoint_every: 0, validate_every: 3, picture_every: 0}}
"""
OBJECTIVES = {
    "heads": ("objective.kind=parallel-heads", "objective.offsets=[2,5]", "objective.own_output=true"),
    "chain": ("objective.kind=sequential-heads", "objective.depths=2"),
}
FSDP = ("train.parallel=fsdp", "train.activation_checkpointing=true", "model.loss_chunk=7")


def run(root: Path, name: str, *overrides: str) -> None:
    transformer.PRESETS["mnist"] = (2, 2, 16)
    config = load_config(GeneratorConfig, root / "run.yaml", [f"run_dir={root / name}", *overrides])
    runtime = Runtime.start(5)
    train(GeneratorTask(config, runtime), config, runtime)


def graphs_of(root: Path, name: str, *overrides: str) -> int:
    """Return how many graphs the compiled blocks of a sharded run become."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "compile_blocks", functools.partial(parallel.compile_blocks, backend=count))
        torch._dynamo.reset()
        run(root, name, "train.compile=true", "train.steps=1", *FSDP, *overrides)
    return len(graphs)


def work(rank: int, world: int, port: int, root: Path) -> None:
    """What each of the two processes does."""
    join(rank, world, port)
    for name, overrides in OBJECTIVES.items():
        run(root, f"{name}_ddp", *overrides)
        run(root, f"{name}_fsdp", *overrides, *FSDP)
        run(root, f"{name}_parts", *overrides, *FSDP, "train.steps=1")
        run(root, f"{name}_parts", *overrides, *FSDP)
        graphs = graphs_of(root, f"{name}_compiled", *overrides)
        (root / f"{name}_graphs_{rank}").write_text(str(graphs))


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_codes, processes) -> Path:
    """A folder in which one process, then two, have trained each objective."""
    root = tmp_path_factory.mktemp("objectives")
    (root / "run.yaml").write_text(RUN.format(codes=make_codes(root / "codes")))
    preset = transformer.PRESETS["mnist"]
    try:
        for name, overrides in OBJECTIVES.items():
            run(root, name, *overrides)
        assert launch(processes, 2, work, root) == [0, 0]
    finally:
        transformer.PRESETS["mnist"] = preset
    return root


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_log_the_losses_of_one(root, name, wrapper):
    one, two = (read_metrics(root / run_name) for run_name in (name, f"{name}_{wrapper}"))
    losses = [key for key in one[0] if key.startswith(("loss", "next_token", "head_", "depth_"))]
    assert len(losses) == 4
    for key in losses:
        assert [row[key] for row in two if key in row] == pytest.approx([r[key] for r in one if key in r], abs=2e-5)
    assert two[-1]["val_next_token"] == pytest.approx(one[-1]["val_next_token"], abs=2e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sharded_run_goes_on_to_the_same_bytes(root, name):
    whole, parts = (read_meta(find_checkpoint(root / f"{name}_{kind}"))["files"] for kind in ("fsdp", "parts"))
    assert whole == parts


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_blocks_share_the_one_compilation_of_the_models(root, name):
    assert (root / f"{name}_graphs_0").read_text() == "1"
