"""The small run of these tests: 4 x 4 codes, which have a middle, of a tokenizer that is there."""

import pytest
from tiny_runs import write_tokenizer


@pytest.fixture
def codes_folder(tmp_path, make_codes):
    return make_codes(tmp_path / "codes", vq=write_tokenizer(tmp_path / "vq", vocabulary=16))


@pytest.fixture
def run_file(run_file):
    run_file.write_text(run_file.read_text().replace("[4, 5]", "[4, 4]"))
    return run_file
