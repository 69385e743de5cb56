"""What an installation leaves: an editable one beside folders of the same names, and a wheel far from the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """{"editable", "wheel": the folder that such an installation would add to site-packages}."""
    root = tmp_path_factory.mktemp("install")
    for name in ("mutor_img", "tokenizer", "configs"):
        shutil.copytree(ROOT / name, root / "clone" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / "clone")
    for kind in ("editable", "wheel"):
        subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", str(root / f"{kind}.built")], check=True,
                       cwd=root / "clone", capture_output=True)
        zipfile.ZipFile(next((root / f"{kind}.built").glob("*.whl"))).extractall(root / kind)
    return {kind: root / kind for kind in ("editable", "wheel")}


def python(site, folder, *words, packages=False):
    """Run Python in a folder as if ``site`` were its site-packages; with the packages of this one, too, if so asked."""
    begin = f"import site, sys; site.addsitedir({str(site)!r}); "
    if packages:  # after the script's own folder, and before an editable install of the project that is tested
        begin = f"import sys; sys.path.insert(1, {str(site)!r}); sys.path += {sys.path[1:]!r}; "
    (folder / "script.py").write_text(begin + "; ".join(words))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *([] if packages else ["-S"]), "script.py"], cwd=folder, capture_output=True,
                          text=True, env=environment)


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_folders_of_the_same_names_beside_a_script_are_passed_over(installed, tmp_path, kind):
    (tmp_path / "mutor_img" / "mutor_img").mkdir(parents=True)  # a clone
    (tmp_path / "tokenizer" / "tokenizer_image").mkdir(parents=True)  # LlamaGen's
    found = python(installed[kind], tmp_path, "from importlib.util import find_spec as f",
                   "print(f('mutor_img').origin, f('tokenizer').origin)")
    assert found.stdout.count("__init__.py") == 2 and str(tmp_path) not in found.stdout, found.stderr


def test_another_package_tokenizer_beside_a_script_is_named(installed, tmp_path):
    (tmp_path / "tokenizer.py").touch()
    failed = python(installed["wheel"], tmp_path, "import mutor_img.sampling", packages=True)
    last = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 1 and last.startswith(f"ImportError: the package tokenizer is found at {tmp_path}/")


def test_another_package_tokenizer_ends_a_command_with_one_line(installed, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "__init__.py").touch()
    failed = python(installed["wheel"], tmp_path, "import runpy; sys.argv = ['-m']",
                    "runpy.run_module('mutor_img.sweep', run_name='__main__', alter_sys=True)", packages=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: the package tokenizer is found at ")
    assert failed.stderr.count("\n") == 1


def test_another_package_tokenizer_ends_an_installed_command_with_one_line(installed, tmp_path):
    (tmp_path / "tokenizer.py").touch()
    failed = python(installed["wheel"], tmp_path, "from mutor_img.common.doors import sample; sample()", packages=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: the package tokenizer is found at ")
    assert failed.stderr.count("\n") == 1


def test_a_wheel_holds_the_configs_and_finds_them_by_name_in_any_folder(installed, tmp_path):
    names = {path.relative_to(ROOT) for path in (ROOT / "configs").glob("*/*.yaml")}
    held = installed["wheel"] / "mutor_img"
    assert {path.relative_to(held) for path in (held / "configs").glob("*/*.yaml")} == names
    assert not any(path.is_symlink() for path in held.rglob("*"))
    done = python(installed["wheel"], tmp_path, "from mutor_img.pretraining.command import main",
                  "main(['--config', 'imagenet256/mutor2d_b_80', '--dry-run'])", packages=True)
    assert done.returncode == 0 and "run_dir: runs/imagenet256/mutor2d_b_80\n" in done.stdout, done.stderr
