"""Configs and metadata with drawn values in drawn places: read, or refused in one line that names the file."""

import json
from contextlib import suppress
from functools import reduce
from operator import getitem

import pytest

from benchmarks.chaos import fuzz
from mutor_img.checkpoints.loading import load_run
from mutor_img.common.config import field_names, load_config, record
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json
from mutor_img.data.store import Codes
from mutor_img.metrics.digits import load_digits
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.study.comparison.config import ComparisonConfig
from mutor_img.study.config import StudyConfig
from tokenizer.loading import load_tokenizer
from tokenizer.training.config import TokenizerConfig

hypothesis = pytest.importorskip("hypothesis", reason="pip install 'mutor_img[dev]'")
st = pytest.importorskip("hypothesis.strategies")

often = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None,
                            suppress_health_check=list(hypothesis.HealthCheck))
numbers = st.integers() | st.integers(-2, 3) | st.sampled_from([2**31, 2**63, 10**30]) | st.floats()
values = st.recursive(st.none() | st.booleans() | numbers | st.text(max_size=8),
                      lambda inner: (st.lists(inner, max_size=4)
                                     | st.dictionaries(st.text(max_size=8), inner, max_size=3)), max_leaves=6)
"""Anything that JSON can say, small."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a file of each kind, without seals."""
    folder = tmp_path_factory.mktemp("files")
    fuzz.write(folder)
    return folder


def read_or_refused(read, folder, *words):
    """Return what ``read`` returns, or None where it refuses in one line that names the folder or one of the words."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error).strip()
        assert any(word in str(error) for word in (str(folder), *words))
        return None


SCHEMAS = [GeneratorConfig, TokenizerConfig, StudyConfig, ComparisonConfig]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
@often
@hypothesis.given(data=st.data())
def test_a_config_with_any_values_is_refused_or_means_what_is_written_down_of_it(schema, data, tmp_path_factory):
    names, folder = field_names(schema), tmp_path_factory.getbasetemp()
    config = {"data": {"codes": "c", "images": "i"}} if "data.codes" in names or "data.images" in names else {}
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        section, _, key = name.rpartition(".")
        (config.setdefault(section, {}) if section else config)[key] = data.draw(values)
    path = folder / "drawn.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    found = read_or_refused(lambda: load_config(schema, path), path, *(name.rpartition(".")[2] for name in names))
    if found is not None:
        path.write_text(record(found))
        assert repr(load_config(schema, path)) == repr(found)  # repr: NaN is not itself


def places(value, above=()):
    """Return the keys on the way to each value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above] * bool(above) + [place for key, item in inner for place in places(item, (*above, key))]


KINDS = {"checkpoint/checkpoints/step_00000002/checkpoint.json": lambda folder: load_run(folder / "checkpoint"),
         "tokenizer/checkpoints/step_00000001/checkpoint.json": lambda folder: load_tokenizer(folder / "tokenizer"),
         "codes/codes.json": lambda folder: Codes(folder / "codes").verify(),
         "classifier/classifier.json": lambda folder: load_digits(folder / "classifier")}


@pytest.mark.parametrize("name", KINDS)
@often
@hypothesis.given(data=st.data())
def test_metadata_with_any_values_is_read_or_refused(name, data, files):
    path = files / name
    kept = path.read_bytes()
    try:
        content = read_json(path)
        for place in data.draw(st.lists(st.sampled_from(places(content)), min_size=1, max_size=2)):
            with suppress(KeyError, IndexError, TypeError):  # an earlier value stands on the way
                reduce(getitem, place[:-1], content)[place[-1]] = data.draw(values)
        path.write_text(json.dumps(content))
        read_or_refused(lambda: KINDS[name](files), files)
    finally:
        path.write_bytes(kept)
