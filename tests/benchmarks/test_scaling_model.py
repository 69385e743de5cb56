"""The scaling model: bytes that gloo's sockets carry in an update, and what more devices must do to its times."""

import json
import os
import socket
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from launching import join, launch

from benchmarks import scaling_model
from benchmarks.scaling_model import Cluster, main, point, recipe, wire_bytes
from mutor_img import blocks
from mutor_img.common.config import load_config
from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.pretraining.cost import LAUNCH
from mutor_img.pretraining.plan import planned_cost, shapes
from mutor_img.pretraining.task import GeneratorTask
from mutor_img.training.runtime import Runtime
from mutor_img.training.trainer import Trainer

RUN = """
data: {{codes: {codes}}}
model: {{preset: mnist, grid: [4, 5], vocabulary: 16, classes: 3, dropout: 0.0}}
registers: {{kind: 2d, count: 6, d_max: 3}}
train: {{steps: 9, global_batch: 8, compile: false, ema: 0.9}}
"""
RUNS = {"ddp": (), "fsdp": ("train.parallel=fsdp",), "fsdp_passes": ("train.parallel=fsdp", "train.micro_batch=1")}
WORLDS = (2, 4)
PRESET = (2, 2, 128)  # layers, heads, dim: enough weights to outweigh everything else that is sent


def sent() -> int:
    """Return the bytes that this process has sent over TCP and that have arrived, as Linux counts them per socket."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                    total += struct.unpack_from("Q", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128),
                                                120)[0]  # tcpi_bytes_acked
        except OSError:  # no socket, or one that listens
            continue
    return total


def work(rank: int, world: int, port: int, root: Path) -> None:
    """Count the bytes of one update of each run, the second one: the first one also opens connections."""
    join(rank, world, port)
    blocks.PRESETS["mnist"], counted = PRESET, {}
    for name, overrides in RUNS.items():
        config = load_config(GeneratorConfig, root / "run.yaml", [f"run_dir={root / name}", *overrides])
        runtime = Runtime.start(5)
        trainer = Trainer(GeneratorTask(config, runtime), config, runtime)
        trainer.update()
        runtime.barrier()
        before = sent()
        trainer.update()
        runtime.barrier()
        counted[name] = sent() - before
    (root / f"{world}_{rank}.json").write_text(json.dumps(counted))


def sizes(config: GeneratorConfig, passes: int, shards: int) -> tuple[float, float, float]:
    model = shapes(config)[0]
    return wire_bytes(config, model.config, model.parameter_count(), passes, shards)


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_codes, processes) -> Path:
    root = tmp_path_factory.mktemp("wire")
    (root / "run.yaml").write_text(RUN.format(codes=make_codes(root / "codes")))
    for world in WORLDS:
        assert launch(processes, world, work, root) == [0] * world
    return root


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", RUNS)
def test_the_bytes_of_an_update_are_those_that_gloo_sends(root, name, world, monkeypatch):
    """NCCL's ring scatters in one round. Gloo's reduce-scatter sends what its all-reduce does, twice as much."""
    monkeypatch.setitem(blocks.PRESETS, "mnist", PRESET)
    config = load_config(GeneratorConfig, root / "run.yaml", [*RUNS[name], f"plan.devices={world}"])
    passes = 8 // world if name == "fsdp_passes" else 1
    gathered, scattered, reduced = sizes(config, passes, 1 if name == "ddp" else world)
    found = [json.loads((root / f"{world}_{rank}.json").read_text())[name] for rank in range(world)]
    assert sum(found) / world == pytest.approx(gathered + 2 * scattered + reduced, rel=0.02)


def test_one_device_takes_what_the_cost_model_says_and_sends_nothing():
    for way in scaling_model.WAYS:
        found, config = point("B", 256, 1, way, Cluster()), recipe("B", 256, 1, way)
        config.train.micro_batch = 1024 // found.passes
        assert found.shown == 0 and found.seconds == planned_cost(config, *shapes(config)).seconds


def test_more_devices_are_faster_but_by_less_and_less_and_what_shows_grows():
    found = [point("3B", 80, 4**n, "ddp", Cluster()) for n in range(5)]
    gains = [one.seconds / four.seconds for one, four in pairwise(found)]
    assert gains == sorted(gains, reverse=True) and 1 < gains[-1] < gains[0] < 4.1
    assert [at.sequences for at in found] == [1024 // 4**n for n in range(5)]
    assert found[0].shown == found[1].shown == 0 < found[-1].shown < found[-1].seconds
    assert point("3B", 80, 256, "fsdp", Cluster()).shown > found[-1].shown  # a ring through 256 has 255 steps


def test_while_a_device_waits_for_the_cpu_to_launch_blocks_it_communicates():
    found = point("B", 0, 128, "ddp", Cluster())
    assert found.shown == 0 and found.seconds == pytest.approx(12 * LAUNCH)
    assert point("B", 0, 128, "fsdp", Cluster()).shown > 0  # takes longer than that


def test_a_slower_network_shows_earlier_and_only_between_nodes():
    slow = Cluster(network=10e9)
    assert point("3B", 0, 8, "fsdp", slow) == point("3B", 0, 8, "fsdp", Cluster())
    assert point("3B", 0, 16, "fsdp", slow).shown > point("3B", 0, 16, "fsdp", Cluster()).shown


def test_sharding_within_a_node_sends_as_much_between_nodes_as_sharding_over_all():
    """FSDP2 in one pass gathers twice 2 bytes per weight and scatters 4; hybrid all-reduces 4 twice, in eight parts."""
    config = recipe("3B", 0, 32, "fsdp")
    whole, (*_, between) = sum(sizes(config, 1, 32)) / (31 / 32), sizes(config, 1, 8)
    assert 8 * between / (3 / 4) == pytest.approx(whole, rel=0.02)
    assert point("3B", 0, 8, "hybrid", Cluster()) == point("3B", 0, 8, "fsdp", Cluster())
    assert point("3B", 0, 32, "hybrid", Cluster()).gib > point("3B", 0, 32, "fsdp", Cluster()).gib


def test_each_model_has_a_table_that_says_where_communication_shows(capsys):
    main(["--presets", "B,3B", "--gpus", "8,16"])
    printed = capsys.readouterr().out
    assert printed.count("computed for H100s, not measured") == 2 and printed.count("communication takes more") == 6


@pytest.mark.parametrize("argv, words", [
    (["--gpus", "3"], "3 is no power of two"), (["--gpus", "2048"], "--gpus is 2048"),
    (["--network", "0"], "--network is 0"), (["--presets", "Q"], "--presets is 'Q'")])
def test_what_cannot_be_is_one_clear_line(argv, words):
    with pytest.raises(UserError, match=words) as error:
        main(argv)
    assert "\n" not in str(error.value)
