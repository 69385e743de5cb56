"""What all tests share: one thread, `gpu` tests skipped without CUDA, and small models whose weights are all drawn."""

import sys
from pathlib import Path

# `tests/` is on the path and holds a folder `mutor_img` of its own: the package's folder must come first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

torch.set_num_threads(1)  # the same sums in the same order, and no contention between test workers


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not item.keywords, which hold the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def random_model():
    """A factory of small transformers in eval mode with every weight drawn at random.

    At initialisation the head is zero, the norms are one and attention is nearly uniform: comparisons of such a
    model's logits would hold for any code. Here logits, attention weights and norms all vary at scale 1.
    """
    from mutor_img.transformer import ModelConfig, Transformer

    def build(grid=(4, 5), *, layers=2, heads=2, dim=32, vocabulary=11, classes=3, register_offsets=(), seed=0,
              dtype=torch.float32, **config):
        model = Transformer(ModelConfig(layers, heads, dim, tuple(grid), vocabulary, classes,
                                        register_offsets=register_offsets, **config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.dim() == 1:
                    weight.copy_(1 + 0.3 * noise)
                else:
                    weight.copy_(noise if "embedding" in name else noise * weight.shape[1] ** -0.5)
        return model.to(dtype).eval()

    return build


@pytest.fixture
def run_of(random_model, tmp_path):
    """A factory of run folders of tiny generators (4 x 4 codes, 8-pixel grey images) with their tokenizer."""
    from tiny_runs import write_generator, write_tokenizer

    def build(name="run", vq=None, seed=0, **codes):
        vq = vq or write_tokenizer(tmp_path / "tokenizer")
        return write_generator(tmp_path / name, random_model((4, 4), seed=seed), vq, **codes)

    return build


@pytest.fixture
def usual_limits():
    """Compiling blocks sets process-wide limits; with this a test begins and ends with torch's own."""
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256,
                                    fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()
