"""The commands of a study: as this machine starts them, and as lines for a machine with GPUs or for Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from mutor_img.common.child import door_command, module_command
from mutor_img.study.comparison.jobs import Job

SCORE = "mutor_img.study.comparison.score"
LAUNCHERS = ("torchrun", "sbatch")
PER_NODE = 8  # devices of a node, for runs that plan more of them

# As in docs/distributed.md: one launcher per node, which finds the first node by its name.
_SLURM = ("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170; "
          'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); ')


def stages(job: Job, study: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return what a run takes on this machine: the name of each stage and its command.

    Args:
        job: the run.
        study: ``--config`` and the overrides of the study.
    """
    train = [] if job.trained else [("training", [*door_command("train"), *job.words])]
    return [*train, ("scoring", [*module_command(SCORE), *score_words(job, study)])]


def score_words(job: Job, study: Sequence[str]) -> list[str]:
    """Return the arguments of the command that scores a run."""
    return [*study, "--row", job.row, "--seed", str(job.seed)]


def printed(jobs: Iterable[Job], study: Sequence[str], launcher: str) -> list[str]:
    """Return a line for each run, which trains and then scores it, and one that makes the tables.

    Args:
        jobs: what is not done yet.
        study: ``--config`` and the overrides of the study.
        launcher: one of ``LAUNCHERS``.
    """
    lines = [(sbatch if launcher == "sbatch" else torchrun)(job, study) for job in jobs]
    table = shlex.join(["python", "-m", "mutor_img.study", *study])
    return [*lines, f"# when all jobs are done: {table}" if launcher == "sbatch" else table]  # sbatch does not wait


def torchrun(job: Job, study: Sequence[str]) -> str:
    """Return the line that trains and scores a run on as many devices as its config plans."""
    if job.config.plan.devices > PER_NODE:  # one and the same line on each node
        begin = (f'torchrun --nnodes {nodes(job)} --nproc-per-node {PER_NODE} --node-rank "$NODE_RANK" --master-addr '
                 '"$MASTER_ADDR" --master-port 29500')
    else:
        begin = f"torchrun --nproc-per-node {job.config.plan.devices}"
    return " && ".join(f"{begin} {command}" for command in _both(job, study))


def sbatch(job: Job, study: Sequence[str]) -> str:
    """Return the line that submits a run to Slurm: trained, then scored; submitted again, it goes on."""
    per_node = min(job.config.plan.devices, PER_NODE)
    begin = (f'torchrun --nnodes "$SLURM_NNODES" --nproc-per-node {per_node} --node-rank "$SLURM_NODEID" --master-addr '
             '"$MASTER_ADDR" --master-port 29500')
    steps = [f"srun bash -c {shlex.quote(f'exec {begin} {command}')}" for command in _both(job, study)]
    return shlex.join(["sbatch", "--job-name", f"{job.row}-{job.seed}", "--nodes", str(nodes(job)),
                       "--ntasks-per-node", "1", "--gpus-per-node", str(per_node), "--signal", "TERM@180", "--requeue",
                       "--wrap", _SLURM + " && ".join(steps)])


def nodes(job: Job) -> int:
    """Return how many nodes a run's devices are on."""
    return -(-job.config.plan.devices // PER_NODE)


def _both(job: Job, study: Sequence[str]) -> tuple[str, str]:
    return (shlex.join(["train.py", *job.words]), shlex.join(["-m", SCORE, *score_words(job, study)]))
