"""Every GPU check on the GPU, and as much of each as torch can do there on a CPU."""

import pytest
import torch
from bodies import BODIES, CHECKS, CPU, TRACED

from mutor_img.blocks import LLAMAGEN_PRESETS
from mutor_img.gpu_report.checks import LAWS, all_checks
from mutor_img.gpu_report.place import Place

pytestmark = pytest.mark.usefixtures("usual_limits")


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_on_a_gpu(name):
    CHECKS[name](Place(torch.device("cuda")))


# ---- what is covered


def test_every_mask_head_dimension_and_precision_has_a_check():
    for law in LAWS:
        for head_dim in {dim // heads for _, heads, dim in LLAMAGEN_PRESETS.values()}:
            for precision in ("bf16", "fp32"):
                assert f"flex, {law}, head {head_dim}, {precision}" in CHECKS
    assert {law.split()[0] for law in LAWS} == {"1d", "2d"} and any(law.mixed for law in LAWS.values())
    assert any(law.every for law in LAWS.values()) and any(law.count for law in LAWS.values())
    assert set(all_checks(quick=True)) < set(CHECKS)


def test_every_check_of_the_table_is_rehearsed_on_a_cpu():
    assert {check.func for check in CHECKS.values()} == {body.func for body in BODIES.values()}


# ---- the bodies on a CPU: FlexAttention forward only, decoding without graphs, gloo


@pytest.mark.parametrize("body", BODIES)
def test_the_body_of_a_check_runs_on_a_cpu(body, request):
    request.getfixturevalue("eager" if body in TRACED else "uncompiled")
    assert BODIES[body](CPU)
