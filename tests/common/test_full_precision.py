"""full_precision(): inside, every setting says float32, by torch's older and newer names; after, all is as it was."""

import pytest
import torch

from mutor_img.common.full_precision import full_precision

NAMES = [(backend, operation) for backend in ("cuda", "mkldnn") for operation in ("all", "matmul", "conv", "rnn")]
NAMES.insert(0, ("generic", "all"))
BACKENDS = torch.backends


def older(read):
    try:
        return read()
    except RuntimeError:
        return "disagrees"  # what torch says of a program that has mixed both kinds


def settings():
    """All that can be read."""
    return {
        "matmul precision": older(torch.get_float32_matmul_precision),
        "allow_tf32 of products": older(lambda: BACKENDS.cuda.matmul.allow_tf32),
        "allow_tf32 of convolutions": older(lambda: BACKENDS.cudnn.allow_tf32),
        **{".".join(name): torch._C._get_fp32_precision_getter(*name) for name in NAMES},
        "autocast": torch.is_autocast_enabled("cpu"), "gradients": torch.is_grad_enabled()}


CALLERS = {
    "nothing": lambda: None,
    **{f"precision {name}": lambda name=name: torch.set_float32_matmul_precision(name)
       for name in ("highest", "high", "medium")},
    "precision high, then highest": lambda: (torch.set_float32_matmul_precision("high"),
                                             torch.set_float32_matmul_precision("highest")),
    "products may": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "products may not": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", False),
    "convolutions may": lambda: setattr(BACKENDS.cudnn, "allow_tf32", True),
    "convolutions may not": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    **{f"everything {value}": lambda value=value: setattr(BACKENDS, "fp32_precision", value)
       for value in ("tf32", "ieee", "bf16")},
    "cuDNN tf32": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "new products tf32": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "new convolutions tf32": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "tf32"),
    "new convolutions ieee": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
    "oneDNN bf16": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "old, then new": lambda: (torch.set_float32_matmul_precision("high"),
                              setattr(BACKENDS.cuda.matmul, "fp32_precision", "ieee")),
    "new, then old": lambda: (setattr(BACKENDS, "fp32_precision", "tf32"),
                              torch.set_float32_matmul_precision("medium")),
}


@pytest.fixture(params=CALLERS)
def caller(request):
    """A program that has set something; torch's settings are put back after the test, but for an unset default."""
    CALLERS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for name in NAMES:
        torch._C._set_fp32_precision_setter(*name, "tf32" if name in (("cuda", "conv"), ("cuda", "rnn")) else "none")


def check_inside(before):
    found = settings()
    assert {found[".".join(name)] for name in NAMES} == {"ieee"}
    assert found["matmul precision"] == "highest" and found["allow_tf32 of products"] is False
    if before["allow_tf32 of convolutions"] != "disagrees":
        assert found["allow_tf32 of convolutions"] is False
    assert not found["autocast"] and not found["gradients"]


def test_inside_all_is_float32_and_after_all_is_as_it_was(caller):
    before = settings()
    for _ in range(2):
        with full_precision():
            check_inside(before)
            with full_precision():
                check_inside(before)
            check_inside(before)
        assert settings() == before
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == before


def test_a_setting_that_followed_another_one_goes_on_following_it(caller):
    def follow():
        found = []
        for value in ("ieee", "tf32", "none"):
            BACKENDS.fp32_precision = value
            found.append(settings())
        return found

    own = BACKENDS.fp32_precision
    follow()
    BACKENDS.fp32_precision = own
    with full_precision():
        pass
    first = follow()
    BACKENDS.fp32_precision = own
    with full_precision():
        pass
    assert follow() == first


def test_what_the_caller_sets_inside_ends_with_the_context():
    before = settings()
    with full_precision():
        torch.set_float32_matmul_precision("high")
        with full_precision():
            assert BACKENDS.cuda.matmul.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "high"
    assert settings() == before
