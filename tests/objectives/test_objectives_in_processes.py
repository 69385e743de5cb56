"""Objectives with weights of their own under DDP and FSDP2: two gloo processes give the losses of one."""

from pathlib import Path

import pytest
from launching import counted_graphs, join, launch, train_small
from tiny_runs import write_tokenizer

from mutor_img.checkpoints.folder import find_checkpoint, read_meta
from mutor_img.common.files import read_metrics

RUN = """
data: {{codes: {codes}, val_codes: {codes}}}
model: {{preset: mnist, grid: [4, 4], vocabulary: 16, classes: 3, dropout: 0.1}}
registers: {{kind: none}}
optim: {{lr: 1e-2}}
train: {{steps: 3, global_batch: 4, micro_batch: 1, precision: fp32, compile: false, ema: 0.9, log_every: 1,
         checkpoint_every: 0, validate_every: 3, picture_every: 0}}
"""
OBJECTIVES = {
    "heads": ("objective.kind=parallel-heads", "objective.offsets=[2,5]", "objective.own_output=true"),
    "chain": ("objective.kind=sequential-heads", "objective.depths=2"),
    "mirai": ("objective.kind=mirai", "objective.offsets=[0,4]"),
    "patches": ("objective.kind=npp", "objective.stage_ends=[1]"),
    "rear": ("objective.kind=rear", "objective.noise_until=2", "objective.code_dim=4"),
}
LOSSES = {"heads": ("head_2", "head_5"), "chain": ("depth_1", "depth_2"),
          "mirai": ("align_0", "align_4"), "patches": ("next_patch", "next_token"), "rear": ("encode", "decode")}
FSDP = ("train.parallel=fsdp", "train.activation_checkpointing=true", "model.loss_chunk=7")


def work(rank: int, world: int, port: int, root: Path) -> None:
    """What each of the two processes does."""
    join(rank, world, port)
    for name, overrides in OBJECTIVES.items():
        train_small(root, f"{name}_ddp", overrides)
        train_small(root, f"{name}_fsdp", (*overrides, *FSDP))
        train_small(root, f"{name}_parts", (*overrides, *FSDP, "train.steps=1"))
        train_small(root, f"{name}_parts", (*overrides, *FSDP))
        with counted_graphs() as graphs:
            train_small(root, f"{name}_compiled", ("train.compile=true", "train.steps=1", *FSDP, *overrides))
        (root / f"{name}_graphs_{rank}").write_text(str(len(graphs)))


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_codes, processes) -> Path:
    """A folder in which one process, then two, have trained each objective."""
    root = tmp_path_factory.mktemp("objectives")
    vq = write_tokenizer(root / "vq", vocabulary=16)
    (root / "run.yaml").write_text(RUN.format(codes=make_codes(root / "codes", vq=vq)))
    for name, overrides in OBJECTIVES.items():
        train_small(root, name, overrides)
    assert launch(processes, 2, work, root) == [0, 0]
    return root


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_log_the_losses_of_one(root, name, wrapper):
    one, two = (read_metrics(root / run_name) for run_name in (name, f"{name}_{wrapper}"))
    for key in ("loss", "next_token", *LOSSES[name]):
        assert [row[key] for row in two if key in row] == pytest.approx([r[key] for r in one if key in r], abs=2e-5)
    assert two[-1]["val_next_token"] == pytest.approx(one[-1]["val_next_token"], abs=2e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sharded_run_goes_on_to_the_same_bytes(root, name):
    whole, parts = (read_meta(find_checkpoint(root / f"{name}_{kind}"))["files"] for kind in ("fsdp", "parts"))
    assert whole == parts


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_blocks_share_the_one_compilation_of_the_models(root, name):
    assert (root / f"{name}_graphs_0").read_text() == "1"
