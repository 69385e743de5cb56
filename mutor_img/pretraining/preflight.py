"""Before a run trains with FlexAttention: is it right, on this machine, for this run's own mask and sizes?

Compiled FlexAttention has given silently wrong or NaN gradients on structured masks, and its kernels are chosen by
GPU, dtype and head dimension. So every run that wants it compares it first (see ``examination.py``), and in a process
of its own: a kernel that writes where it must not ends the process that called it, and a compiler may crash or hang.
Whatever happens there, training goes on; unless all was right, with ``scaled_dot_product_attention``, which is slower
and computes the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mutor_img.blocks import ModelConfig
from mutor_img.common.child import Child, ChildFailed, module_command
from mutor_img.common.files import write_json
from mutor_img.pretraining.examination import Findings, Subject
from mutor_img.registers import RegisterLaw
from mutor_img.training.runtime import Runtime

# An examination compiles two graphs, forward and backward: a matter of a minute, or of several where eight processes
# start at once with cold disks and caches. Ten times that is a hang. Ranks that are done wait in a collective for the
# slowest one, so that it is given up well before the others take it for dead (see ``preflight``).
SECONDS = 600.0
COMMAND = module_command("mutor_img.pretraining.examination")


@dataclass
class Preflight:
    """What the comparison found.

    Attributes:
        subject: what was compared, in words.
        findings: what the examining process found, or met.
        seconds: how long it took.
        failed_ranks: how many of all processes saw a failure.
    """

    subject: str
    findings: Findings = field(default_factory=lambda: Findings([]))
    seconds: float = 0.0
    failed_ranks: int = 0

    @property
    def failures(self) -> list[str]:
        """What differed here, a line each, the error last."""
        found = self.findings
        lines = [f"{draw}: {difference}" for draw, difference in found.differences if not difference.passed]
        return [*lines, found.error] if found.error else lines

    @property
    def passed(self) -> bool:
        """Whether FlexAttention may be used: no process saw a failure."""
        return not self.failures and not self.failed_ranks

    def describe(self) -> str:
        """Return the result for the log, a few lines."""
        if self.passed:
            worst = max((d.error / d.allowed for _, d in self.findings.differences if d.allowed), default=0.0)
            return (f"preflight: FlexAttention is right for {self.subject}: {len(self.findings.differences)} tensors "
                    f"compared, the worst at {worst:.2f} of what rounding allows ({self.seconds:.0f} s)")
        lines = self.failures or [f"it failed on {self.failed_ranks} other process(es)"]
        more = [f"  and {len(lines) - 6} more"] if len(lines) > 6 else []
        return "\n".join([f"warning: preflight: FlexAttention FAILED for {self.subject}; registers attend by "
                          "scaled_dot_product_attention instead, which is slower and computes the same",
                          *(f"  {line}" for line in lines[:6]), *more])

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a run's metadata."""
        return {"attention": "flex" if self.passed else "sdpa", "subject": self.subject, "failures": self.failures,
                "failed_ranks": self.failed_ranks, "seconds": round(self.seconds, 1), "torch": torch.__version__,
                **({"log": self.findings.log} if self.findings.log else {}),
                "compared": [{"draw": draw, **difference.to_json()} for draw, difference in self.findings.differences]}

    def record(self, run_dir: str | Path, runtime: Runtime) -> None:
        """Log the result and write ``preflight.json`` into the run's folder; a process of its own failure says so."""
        if runtime.is_main:
            tqdm.write(self.describe())
            write_json(Path(run_dir) / "preflight.json", self.to_json())
        elif self.failures:
            tqdm.write(f"process {runtime.rank}: {self.describe()}")


def examine_apart(subject: Subject, seconds: float, command: Sequence[str] = COMMAND) -> Findings:
    """Have a process of its own examine; whatever becomes of that one is the error of the findings.

    Args:
        subject: what to examine.
        seconds: how long it may take.
        command: starts the process.
    """
    try:
        with Child(command) as child:
            found = Findings.from_json(child.ask(subject.to_json(), seconds))
        return found if found.differences or found.error else Findings([], "the examining process compared nothing")
    except ChildFailed as failure:
        return Findings([], f"the examining process {failure}", failure.log)
    except (KeyError, TypeError, ValueError) as error:  # an answer, but to no question of ours
        return Findings([], f"the examining process gave no findings ({type(error).__name__}: {error})")


def preflight(law: RegisterLaw, config: ModelConfig, precision: str, seed: int, runtime: Runtime, *,
              examined: Callable[[Subject, float], Findings] = examine_apart, gradients: bool = True) -> Preflight:
    """Compare FlexAttention with exact attention on this run's mask; every process gets the same verdict.

    Each process has its own device examined, outside of the launch's process group, and waits for it.

    Args:
        law: the run's registers.
        config: the run's model.
        precision: ``"bf16"`` or ``"fp32"``.
        seed: the run's.
        runtime: this process; the comparison runs on its device.
        examined: examines a subject within so many seconds.
        gradients: False compares outputs alone, as on CPUs, where FlexAttention has no backward.
    """
    begun = time.perf_counter()
    device = runtime.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    subject = Subject(law, config.dim // config.heads, precision, seed, str(device), gradients,
                      torch.backends.cuda.matmul.fp32_precision)
    seconds = SECONDS if runtime.world == 1 else min(SECONDS, runtime.timeout.total_seconds() / 2)
    if runtime.is_main:
        tqdm.write(f"preflight: comparing FlexAttention with exact attention for {subject}; this compiles "
                   f"kernels, and is given up after {seconds:.0f} s")
    result = Preflight(str(subject), examined(subject, seconds))
    failed = torch.tensor([float(bool(result.failures))], device=device)
    result.failed_ranks = int(runtime.sum(failed).item())
    result.seconds = time.perf_counter() - begun
    return result
