"""The benchmark of spinning measures under the setting that it says, whatever it was itself started under."""

from types import SimpleNamespace

import pytest

from benchmarks import spinning, turns
from mutor_img.common.threads import CHOICES, OURS


@pytest.mark.parametrize("setting", spinning.SETTINGS.values(), ids=spinning.SETTINGS)
def test_a_process_finds_its_setting_alone_as_if_a_user_had_made_it(setting, monkeypatch):
    for name, value in ((OURS, "1"), ("GOMP_SPINCOUNT", "300000"), ("KMP_BLOCKTIME", "7")):
        monkeypatch.setenv(name, value)
    seen = {}
    monkeypatch.setattr(turns.subprocess, "run",
                        lambda words, *, env, **options: seen.update(env) or SimpleNamespace(stdout="{}"))
    assert spinning.measured(setting, 1.0, "") == {}
    assert {name: value for name, value in seen.items() if name in (*CHOICES, OURS)} == setting
