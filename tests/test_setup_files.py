"""What a user sets the project up with: lock file, licences, images, conda, Slurm, citation. Nothing is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in PINS)}
OTHERS = {"setuptools"}  # comes with a virtual environment
NOT_LOCKED = ("app", "test-app")  # extras


def test_every_direct_dependency_is_pinned_within_its_bounds():
    extras = [text for name, texts in PROJECT["optional-dependencies"].items() if name not in NOT_LOCKED
              for text in texts]
    for text in (*PROJECT["dependencies"], *extras):
        wanted = Requirement(text)
        if wanted.name not in OTHERS:
            assert wanted.specifier.contains(LOCKED[canonicalize_name(wanted.name)]), text


@pytest.mark.parametrize("name", ["torch", "torchvision"])
def test_the_oldest_torch_that_is_promised_is_the_one_that_is_tested(name):
    [floor] = [Requirement(text).specifier for text in PROJECT["dependencies"] if Requirement(text).name == name]
    major, minor, *_ = LOCKED[name].split(".")
    assert str(floor) == f">={major}.{minor}"


def test_the_lock_is_sorted_pinned_and_holds_what_its_packages_need():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in PINS)
    assert len(LOCKED) == len(PINS) and sorted(PINS, key=lambda line: line.partition("==")[0].lower()) == PINS
    for name, version in LOCKED.items():
        try:
            here = distribution(name)
        except PackageNotFoundError:  # of another processor
            continue
        for text in (here.requires or []) if here.version == version else []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in LOCKED.keys() | OTHERS, f"{name} needs {needed.name}"


def test_both_images_install_the_lock_and_that_for_cpus_no_cuda():
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)$(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(stages) == {"base", "cpu", "cuda"} and "COPY requirements.lock" in stages["base"]
    assert "-r requirements.lock" in stages["cuda"] and "whl/cpu -r cpu.lock" in stages["cpu"]
    left_out = re.search(r"grep -Ev '(.*)' requirements.lock", stages["cpu"]).group(1)
    kept = {line.partition("==")[0] for line in PINS if not re.search(left_out, line)}
    assert {"torch", "torchvision", "numpy", "scipy"} <= kept and not any("nvidia" in name for name in kept)


def test_conda_and_the_images_have_a_python_that_the_project_takes():
    found = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [python] = [item.removeprefix("python=") for item in found if str(item).startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert f"FROM python:{python}-slim" in (ROOT / "Dockerfile").read_text()
    assert found[-1] == {"pip": ["-r requirements.lock", "-e ."]}


def test_the_page_of_licences_holds_what_the_packages_say():
    spec = importlib.util.spec_from_file_location("write_licences", ROOT / "docs" / "write_licences.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = script.PAGE.read_text().splitlines()
    for name, extras in script.direct().items():
        [line] = [line for line in lines if line.startswith(f"| {name} | ")]
        assert line.endswith(f" | {', '.join(extras)} |"), "run python docs/write_licences.py"
        with suppress(PackageNotFoundError):  # of the extras for the page
            if distribution(name).version == LOCKED.get(name):
                assert line.split(" | ")[1] == script.licence(name), "run python docs/write_licences.py"
    below = script.PAGE.read_text().partition("requirements.lock`\n")[2]
    assert set(re.findall(r"[\w.-]+", below)) >= set(script.locked()) - set(script.direct())


@pytest.mark.parametrize(("answer", "status", "words"), [
    ("echo No known vulnerabilities found", 0, "audit: no known vulnerabilities in requirements.lock; 0 of its"),
    ("echo 'numpy  Dependency not found on PyPI and could not be audited: numpy (2)'", 0, "1 of its packages could"),
    ("echo 'Found 1 known vulnerability in 1 package' >&2; echo torch 1 CVE; exit 1", 2, "torch 1 CVE"),
    ("echo 'ConnectionError: no route' >&2; exit 1", 0, "audit: skipped, pip-audit had no answer: ConnectionError"),
    (None, 0, "audit: skipped, pip-audit is not installed")])
def test_the_audit_fails_for_known_faults_alone(tmp_path, answer, status, words):
    for name in ("sh", "tail", "cut", "grep", "make"):
        (tmp_path / name).symlink_to(shutil.which(name))
    if answer:
        (tmp_path / "pip-audit").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "pip-audit").chmod(0o755)
    done = subprocess.run(["make", "--no-print-directory", "-C", ROOT, "audit"], env={"PATH": str(tmp_path)}, text=True,
                          capture_output=True)
    assert done.returncode == status and words in done.stdout and (status or done.stdout.count("\n") == 1)


def test_the_slurm_script_starts_torchrun_with_the_arguments_it_was_given(tmp_path):
    for name, body in (("srun", 'exec "$@"'), ("scontrol", "echo node7"), ("torchrun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / "examples" / "train.slurm"), "--config", "a b.yaml", "seed=1"], text=True,
                          capture_output=True, check=True,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[7-9]",
                               "SLURM_NNODES": "3", "SLURM_NODEID": "2"})
    words = done.stdout.splitlines()
    assert words[:8] == ["--nnodes", "3", "--nproc-per-node", "8", "--node-rank", "2", "--master-addr", "node7"]
    assert words[-4:] == ["train.py", "--config", "a b.yaml", "seed=1"]


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", PROJECT["version"], "MIT")
    assert citation["title"] == PROJECT["name"] and f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
