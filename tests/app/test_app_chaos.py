"""A short form of the page's part of the failure suite: a small crowd for seconds, and all attacks."""

from importlib.util import find_spec

import pytest

from benchmarks.chaos import page
from benchmarks.chaos.case import Place

pytestmark = [pytest.mark.app, pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed")]


def test_a_crowd_is_served_and_an_attack_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "CLIENTS", 20)
    found = {case.name: case.run().partition(",")[0] for case in page.cases(Place(tmp_path, crowd=6.0))}
    assert len(found) > 90
    assert set(found.values()) <= {"served", "refused", "hung up", "stored among the uploads", "as before",
                                  "free again", "ended"}
