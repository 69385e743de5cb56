"""Compile FlexAttention's GPU kernels for a GPU that is not there, and print the shared memory that each needs.

    python tests/gpu/compiled_flex.py --capability 9.0 --head-dim 100 --precision fp32 --registers 80

Triton needs no GPU to compile for one. Nothing runs: what the kernels compute is the matter of interpreted_flex.py.
"""

import argparse
import ast
import re
import tempfile
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch._functorch.config
from interpreted_flex import lower_as_on_a_gpu
from torch._inductor.async_compile import AsyncCompile

from mutor_img import attention
from mutor_img.registers import RegisterLaw


def compile_for(source, folder, capability):
    """Return launch options and kernel, compiled without the launcher's decorator, which needs a driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start, end = source.index("@triton_heuristics"), source.index("@triton.jit")
    decorator, name = source[start:end], re.search(r"^def (triton_tem\w+)", source, re.M)[1]
    path = Path(folder) / f"{name}.py"
    path.write_text(source[:start] + source[end:])
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    aligned = [int(i) for i in re.findall(r"\((\d+),\): \[\['tt.divisibility', 16\]\]", decorator)]
    kernel = ASTSource(getattr(module, name), ast.literal_eval(re.search(r"'signature': (\{.*?\})", decorator)[1]), {},
                       {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {key: int(re.search(rf"{key}=(\d+)", decorator)[1]) for key in ("num_warps", "num_stages")}
    target = GPUTarget("cuda", int(10 * capability), 32)
    return options, triton.compile(kernel, target=target, options=options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=float, default=9.0)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--registers", type=int, help="at random anchors; none: dense")
    parser.add_argument("--unpadded", action="store_true", help="give the head dimension to the kernel as it is")
    args = parser.parse_args()

    lower_as_on_a_gpu(args.capability)
    torch._functorch.config.force_non_lazy_backward_lowering = True
    sources = []
    AsyncCompile.triton = lambda self, name, source, *rest, **options: sources.append(source)
    if args.unpadded:
        attention._heads_inside = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    law = RegisterLaw("2d", (16, 16), 4, args.registers)
    anchors = law.draw(0, 0, torch.arange(2))[0]
    flex = attention.FlexAttention(law.length, anchors, fixed_anchors=law.count is None)
    shape, dtype = (2, 1, law.length + law.registers, args.head_dim), {"fp32": torch.float32, "bf16": torch.bfloat16}
    q, k, v = (torch.zeros(shape, dtype=dtype[args.precision], requires_grad=True) for _ in range(3))
    with suppress(AttributeError, TypeError):  # there are no kernels to call: they were only collected
        torch.compile(lambda q, k, v: flex(q, k, v), dynamic=False, fullgraph=True)(q, k, v)
    with tempfile.TemporaryDirectory() as folder:
        for source in (source for source in sources if "def triton_tem" in source):
            options, kernel = compile_for(source, folder, args.capability)
            tiles = dict(re.findall(r"(BLOCK_[MN]\d?) : tl.constexpr = (\d+)", source))
            print("backward" if "BLOCK_M1" in tiles else "forward", tiles, options, f"{kernel.metadata.shared} bytes")


if __name__ == "__main__":
    main()
