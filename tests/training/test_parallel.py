"""Several processes, DDP or sharded, in any order: the training of one. Two gloo processes run all scenarios."""

import contextlib
import functools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from launching import counted_graphs, join, launch, train_small
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.utils import _to_kwargs

from mutor_img import load_checkpoint
from mutor_img.checkpoints.folder import find_checkpoint, read_meta, read_tensors, write_checkpoint
from mutor_img.checkpoints.tensor_files import Slice
from mutor_img.common import cli
from mutor_img.common.config import TrainConfig, load_config
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_metrics
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training import parallel, updates
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer

RUN = """
data: {{codes: {codes}, val_codes: {codes}}}
model: {{preset: mnist, grid: [4, 5], vocabulary: 16, classes: 3, dropout: 0.1}}
registers: {{kind: 2d, count: null, d_max: 3}}
optim: {{lr: 1e-2}}
train: {{steps: 6, global_batch: 4, micro_batch: 1, precision: fp32, compile: false, ema: 0.9, log_every: 1,
         checkpoint_every: 0, keep: 9, validate_every: 6, picture_every: 0}}
"""
FSDP = "train.parallel=fsdp"
SCENARIOS = [  # run folder, overrides; one run folder after the other, by both processes
    ("ddp", ()),
    ("fsdp", (FSDP,)),
    ("ddp_parts", ("train.steps=3",)), ("ddp_parts", ()),
    ("fsdp_parts", (FSDP, "train.steps=3")), ("fsdp_parts", (FSDP,)),
    ("mixed", ("train.steps=2",)), ("mixed", (FSDP, "train.steps=4")), ("mixed", ()),
    ("one_two_one", (FSDP, "train.steps=4")),
    ("checkpointing", (FSDP, "train.activation_checkpointing=true")),
    ("ddp_chunked", ("model.loss_chunk=7",)), ("fsdp_chunked", (FSDP, "model.loss_chunk=7")),
    ("chunked_bf16", (FSDP, "model.loss_chunk=7", "train.precision=bf16")),
    ("ddp_frozen", ("freeze=['layers.0.*']",)), ("fsdp_frozen", (FSDP, "freeze=['layers.0.*']")),
    ("ddp_bf16", ("train.precision=bf16",)), ("fsdp_bf16", (FSDP, "train.precision=bf16")),
]


def count_graphs(root: Path, name: str, *overrides: str) -> int:
    """Return the graphs that two compiled blocks become, where DDP's buckets are much smaller than a block."""
    small = functools.partial(parallel.DistributedDataParallel, bucket_cap_mb=0.001)
    with pytest.MonkeyPatch.context() as patch, counted_graphs() as graphs:
        if not overrides:
            patch.setattr(parallel, "distribute", lambda model, *_: small(model))
        train_small(root, name, ("train.compile=true", "train.steps=2", *overrides))
    return len(graphs)


def gathered(trainer: Trainer) -> tuple[torch.nn.Module, bool]:
    """Return the whole model, and whether its weights are what was gathered, not copies of it."""
    places, full_tensor = set(), DTensor.full_tensor

    def noted(tensor):
        whole = full_tensor(tensor)
        places.add(whole.data_ptr())
        return whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", noted)
        model = trainer.whole_model()
    return model, {weight.data_ptr() for weight in model.parameters()} == places


def stop_on_rank_0(root: Path, behind: int) -> int:
    """Send SIGTERM to rank 0 alone in the midst of update 3; returns the step at which this process stopped.

    With ``behind`` 1 an update's numbers are looked at when the next one is under way, as on GPUs.
    """
    good = GeneratorTask.loss

    def interrupted(task, model, step, samples, average):
        if step == 2 and task.runtime.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        return good(task, model, step, samples, average)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneratorTask, "loss", interrupted)
        patch.setattr(updates, "behind", lambda device: behind)
        return train_small(root, f"stopped_{behind}", (FSDP,)).step


def skip_one(root: Path, name: str, *overrides: str) -> None:
    """Train where the last process's loss of the second update is NaN, and one update may be skipped."""
    good = GeneratorTask.loss

    def broken(task, model, step, samples, average):
        loss, values = good(task, model, step, samples, average)
        return loss * (math.nan if step == 1 and task.runtime.rank == task.runtime.world - 1 else 1.0), values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneratorTask, "loss", broken)
        train_small(root, name, ("train.skip_bad_updates=1", "train.check_ranks_every=1", "train.steps=4", *overrides))


def fail_on_rank_1(root: Path) -> None:
    """A mistake that only rank 1 meets, while rank 0 waits for it."""
    good = GeneratorTask.loss

    def broken(task, model, step, samples, average):
        if task.runtime.rank == 1:
            raise UserError("only rank 1 sees this")
        return good(task, model, step, samples, average)

    GeneratorTask.loss = broken
    with Runtime.start().one_voice():
        train_small(root, "failed", (FSDP,))


def three(rank: int, world: int, port: int, root: Path) -> None:
    """What each of three processes does."""
    join(rank, world, port)
    for name, steps in (("three", 3), ("three_parts", 2), ("three_parts", 3)):
        train_small(root, name, ("train.global_batch=3", f"train.steps={steps}"))


def work(rank: int, world: int, port: int, root: Path) -> None:
    """What each of the two processes does."""
    join(rank, world, port)
    with open(root / f"stderr_{rank}", "w") as file, contextlib.redirect_stderr(file):
        for name, overrides in SCENARIOS:
            trainer = train_small(root, name, overrides)
            if name == "fsdp":
                whole, itself = gathered(trainer)
                save_file(whole.state_dict(), root / f"whole_{rank}.safetensors")
                with CommDebugMode() as communication:
                    trainer.update()
                reduced = communication.get_comm_counts()[torch.ops.c10d.reduce_scatter_tensor_coalesced_] or \
                    sum(n for op, n in communication.get_comm_counts().items() if "reduce_scatter" in str(op))
        result = {"reduce_scatters": reduced, "gathered_itself": itself,
                  "ddp_graphs": count_graphs(root, "ddp_compiled"),
                  "fsdp_graphs": count_graphs(root, "fsdp_compiled", FSDP, "train.activation_checkpointing=true"),
                  "stopped_at": [stop_on_rank_0(root, behind) for behind in (0, 1)]}
        skip_one(root, "ddp_skipped")
        skip_one(root, "fsdp_skipped", FSDP)
        (root / f"result_{rank}.json").write_text(json.dumps(result))
        cli.run(lambda argv: fail_on_rank_1(root), [])


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_codes, processes) -> Path:
    """A folder in which one process, then two, then one again have run everything."""
    root = tmp_path_factory.mktemp("parallel")
    (root / "run.yaml").write_text(RUN.format(codes=make_codes(root / "codes")))
    train_small(root, "one", ())
    train_small(root, "frozen", ("freeze=['layers.0.*']",))
    train_small(root, "one_two_one", ("train.steps=2",))
    skip_one(root, "skipped")
    (root / "status").write_text(json.dumps(launch(processes, 2, work, root)))
    launch(processes, 3, three, root)
    train_small(root, "one_two_one", ())
    return root


def curve(root: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_metrics(root / name) if "loss" in row]


def result(root: Path, rank: int = 0) -> dict:
    return json.loads((root / f"result_{rank}.json").read_text())


def saved(root: Path, name: str, group: str) -> dict[str, torch.Tensor]:
    return read_tensors(find_checkpoint(root / name), group)


@pytest.mark.parametrize("name", [
    "ddp", "fsdp", "mixed", "one_two_one", "checkpointing", "ddp_chunked", "fsdp_chunked", "ddp_frozen", "fsdp_frozen"])
def test_the_curve_is_that_of_one_process(root, name):
    alone = "frozen" if name.endswith("frozen") else "one"
    assert len(curve(root, name)) == 6 and curve(root, name) == pytest.approx(curve(root, alone), abs=2e-5)
    one, other = (saved(root, run_name, "ema") for run_name in (alone, name))
    assert one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_validation_loss_is_that_of_one_process(root, name):
    scores = [[row["val_next_token"] for row in read_metrics(root / n) if "val_next_token" in row]
              for n in ("one", name)]
    assert len(scores[0]) == 1 and scores[1] == pytest.approx(scores[0], abs=2e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "three"])  # sums of three depend on their order
def test_a_resume_on_as_many_processes_is_exact_to_the_byte(root, name):
    whole, parts = (find_checkpoint(root / n) for n in (name, f"{name}_parts"))
    assert read_meta(whole)["files"] == read_meta(parts)["files"] and curve(root, name) == curve(root, f"{name}_parts")


def test_bf16_is_the_same_sharded_but_for_rounding(root):
    for name in ("fsdp_bf16", "chunked_bf16"):
        assert curve(root, name) == pytest.approx(curve(root, "ddp_bf16"), abs=0.02)
    assert curve(root, "fsdp_bf16") != curve(root, "fsdp")
    assert all(t.dtype == torch.float32 for group in ("model", "ema", "optimizer")
               for t in saved(root, "fsdp_bf16", group).values())


def test_a_sharded_checkpoint_holds_every_row_once_and_loads_as_a_model(root):
    folder = find_checkpoint(root / "fsdp")
    sizes = [(folder / f"model.0000{rank}-of-00002.safetensors").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.2 * min(sizes)
    assert all(path.stat().st_mode & 0o666 == folder.stat().st_mode & 0o666 for path in folder.iterdir())
    model, ema = (load_checkpoint(root / "fsdp", ema=which).state_dict() for which in (False, True))
    assert not any("_orig_mod" in k or "_checkpoint" in k for k in model)
    assert all(torch.equal(saved(root, "fsdp", "model")[k], v) for k, v in model.items())
    kept = [load_file(root / f"whole_{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(ema[k], whole[k]) for whole in kept for k in ema)


def test_a_gathered_model_is_in_memory_once(root):
    assert result(root)["gathered_itself"] and result(root, 1)["gathered_itself"]


def test_gradients_are_reduced_once_an_update(root):
    assert result(root)["reduce_scatters"] == 3  # two blocks and the rest, though there are two micro-batches


def test_blocks_are_compiled_whole_under_both_wrappers(root):
    assert result(root)["ddp_graphs"] == result(root)["fsdp_graphs"] == 1  # one for both blocks


def test_a_signal_to_one_process_stops_all_at_the_same_step(root):
    assert result(root)["stopped_at"] == result(root, 1)["stopped_at"] == [3, 4]
    assert [read_meta(find_checkpoint(root / f"stopped_{behind}"))["step"] for behind in (0, 1)] == [3, 4]


@pytest.mark.parametrize("name", ["ddp_skipped", "fsdp_skipped"])
def test_all_processes_skip_the_update_in_which_one_of_them_has_a_loss_that_is_none(root, name):
    assert [row["step"] for row in read_metrics(root / name) if "skipped" in row] == [2]
    assert curve(root, name) == pytest.approx(curve(root, "skipped"), abs=2e-5) and len(curve(root, name)) == 3
    for group in ("model", "ema"):
        one, two = saved(root, "skipped", group), saved(root, name, group)
        assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_a_mistake_of_one_process_is_said_once_and_ends_both(root):
    assert json.loads((root / "status").read_text()) == [2, 2]
    texts = [(root / f"stderr_{rank}").read_text() for rank in range(2)]
    assert "error" not in texts[0] and "Traceback" not in texts[0]
    assert [x for x in texts[1].splitlines() if x.startswith("error")] == ["error: only rank 1 sees this"]


class Alone:
    """One of two processes, whose peer never writes."""

    rank, world = 0, 2

    def barrier(self):
        pass


def test_a_run_folder_that_is_not_shared_is_refused(tmp_path):
    with pytest.raises(UserError, match="all nodes share"):
        write_checkpoint(tmp_path, 1, {"model": {"w": Slice(torch.ones(1, 2), 0, 2)}}, {}, 1, Alone())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_rows_that_no_file_holds_are_refused(tmp_path):
    class Half(Alone):
        world = 1

    folder = write_checkpoint(tmp_path, 1, {"model": {"w": Slice(torch.ones(1, 2), 0, 2)}}, {}, 1, Half())
    with pytest.raises(UserError, match="row 1 of 'w' is in none"):
        read_tensors(folder, "model")


def test_ddp_on_gpus_is_wrapped_as_on_cpus_and_takes_calls_without_inputs(monkeypatch):
    """Given devices, DDP moves a call's inputs first, and fails where there are none, as when buckets are settled."""
    def wrap(device):
        given = {}

        class Wrapper:
            def __init__(self, module, device_ids=None, **options):
                self.module, self.device_ids = module, device_ids
                given.update(options, device_ids=device_ids)

            def __call__(self, *inputs):
                if self.device_ids:  # what torch's DDP does before forward
                    inputs = _to_kwargs(inputs, {}, torch.device("cpu"), True)[0][0]
                return self.module(*inputs)

        monkeypatch.setattr(parallel, "DistributedDataParallel", Wrapper)
        parallel.distribute(torch.nn.Linear(2, 2), [], TrainConfig(), Runtime(torch.device(device), world=2))
        return given

    assert wrap("cuda:0") == wrap("cpu")


def test_only_what_can_be_sharded_is(root):
    config = load_config(GeneratorConfig, root / "run.yaml", [f"run_dir={root}/refused", FSDP])
    task = GeneratorTask(config, Runtime.start())
    task.shardable = False
    with pytest.raises(UserError, match=r"train\.parallel is 'fsdp', which is for generators"):
        Trainer(task, config, Runtime.start())
