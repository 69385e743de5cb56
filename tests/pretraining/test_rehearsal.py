"""A run on random codes has the registers that it was asked for."""

from dataclasses import fields

import pytest

from mutor_img.data.store import Codes
from mutor_img.pretraining.rehearsal import random_run, write_random_codes
from mutor_img.registers import RegisterLaw

PLAIN = RegisterLaw("none", (4, 4))
LAWS = [PLAIN, RegisterLaw("1d", (4, 4), 3, count=5, mixed=True), RegisterLaw("2d", (4, 6), 2, count=4, wrap=False),
        RegisterLaw("2d", (4, 4), 2, every=2), RegisterLaw("set", (4, 4), chosen=(5, 3))]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.kind)
def test_a_run_has_the_registers_of_its_law(tmp_path, law):
    assert random_run(tmp_path, law).law() == law


def test_random_codes_reach_through_a_vocabulary_too_large_for_uint16(tmp_path):
    codes = Codes(write_random_codes(tmp_path / "codes", (4, 4), 2**18, 3))
    codes.verify()
    assert 2**17 < codes.codes.max() < 2**18


def test_the_laws_above_set_every_field_of_a_law():
    for item in fields(RegisterLaw):
        assert any(getattr(law, item.name) != getattr(PLAIN, item.name) for law in LAWS), item.name
