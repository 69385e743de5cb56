"""FlexAttention's GPU kernels, forward and backward, on a CPU: torch's Triton templates in Triton's interpreter.

    python tests/gpu/interpreted_flex.py                 # every case, minutes
    python tests/gpu/interpreted_flex.py sparse-100       # one

It shows that the templates compute what they should on our masks, over draws with one BlockMask: not that a GPU's
compiler translates them rightly. FlexAttention has no backward on CPUs, so that torch is patched, in this process only,
to lower it as for a GPU (an H100's tile sizes). Prints one line of JSON per draw; exit status 77: not this torch.
"""

import json
import os
import sys

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch

# In fp32: the interpreter misreads bf16. Grid, registers, and their placement; "paper" is the paper's own mask.
CASES = {f"{name}-{head_dim}": (law, head_dim) for name, law in {
    "sparse": {"grid": (10, 10), "count": 60}, "dense": {"grid": (10, 10), "count": None},
    "every": {"grid": (10, 15), "count": None, "every": 3}, "paper": {"grid": (16, 16), "count": 80},
    "paper_dense": {"grid": (16, 16), "count": None}}.items() for head_dim in (64, 100)}


class AbsentDevice:
    """What Triton and Inductor ask of a driver when there is none."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(10 * self.capability), 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def patched(module, old, new):
    """Run a module's source again in its own namespace, with one text replaced."""
    with open(module.__file__) as file:
        source = file.read()
    if source.count(old) != 1:
        print(f"{module.__file__} is of another torch than this patch is for", file=sys.stderr)
        sys.exit(77)
    exec(compile(source.replace(old, new), module.__file__, "exec"), module.__dict__)


def lower_as_on_a_gpu(capability=9.0):
    """Have Inductor lower FlexAttention on CPU tensors as it would on a GPU, with that GPU's tile sizes."""
    import torch._inductor.choices as choices
    import torch._inductor.config
    import torch._inductor.lowering
    import torch.nn.attention.flex_attention as front
    import torch.utils._triton
    import triton
    from torch._inductor.heuristics.template.triton import CUDAConfigHeuristic

    triton.runtime.driver.set_active(AbsentDevice(capability))
    torch.utils._triton.has_triton_cpu_backend = lambda: True
    torch._inductor.config.cpu_backend = "triton"
    torch._inductor.config.force_disable_caches = True  # their keys do not know which GPU is meant here
    torch.cuda.get_device_capability = lambda *device: divmod(int(10 * capability), 10)
    choices.InductorChoices.get_config_heuristics = lambda self, device_type="cuda": CUDAConfigHeuristic()
    patched(front, """any_inputs_on_cpu_device = (
        query.device.type == "cpu"
        or key.device.type == "cpu"
        or value.device.type == "cpu"
    )""", "any_inputs_on_cpu_device = False")
    front._validate_device = lambda *tensors: None
    back = sys.modules["torch._inductor.kernel.flex.flex_attention"]
    patched(back, 'if query.get_device().type == "cpu":', "if False:")


def run(grid, head_dim, count, every=None):
    """Yield the differences of two draws with one BlockMask; one sequence, two heads."""
    from mutor_img.attention import FlexAttention
    from mutor_img.pretraining.parity import compare_attention
    from mutor_img.registers import RegisterLaw

    law = RegisterLaw("2d", grid, 4, count, every)
    draws = [law.draw(0, step, torch.arange(1))[0] for step in range(2)]
    flex = FlexAttention(law.length, draws[0], fixed_anchors=count is None)
    attend = torch.compile(lambda q, k, v: flex(q, k, v), dynamic=False, fullgraph=True)
    for step, anchors in enumerate(draws):
        flex.update(anchors)
        yield compare_attention(attend, anchors, law.length, heads=2, head_dim=head_dim, seed=step,
                                dtype=torch.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lower_as_on_a_gpu()
    for name in sys.argv[1:] or CASES:
        law, head_dim = CASES[name]
        torch._dynamo.reset()
        for draw, differences in enumerate(run(head_dim=head_dim, **law)):
            found = [difference.to_json() for difference in differences]
            print(json.dumps({"case": name, "draw": draw, "differences": found}), flush=True)
