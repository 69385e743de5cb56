"""The notebook in examples/ runs from its first cell to its last, here on small codes and for two updates."""

import ast
import json
from pathlib import Path

from PIL import Image
from tiny_runs import write_tokenizer

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "codes_to_grid.ipynb"


def test_the_notebook_goes_from_codes_to_a_grid(make_codes, run_file, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vq = write_tokenizer(tmp_path / "vq", vocabulary=16)
    values = {"codes_folder": str(make_codes(tmp_path / "small", vq=vq)), "config": str(run_file), "run_dir": "run",
              "overrides": ["model.grid=[4,4]", "train.steps=2", "data.val_codes=null"]}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    first, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert {target.id for line in ast.parse(first).body for target in line.targets} == set(values)
    for text in others:
        exec(compile(text, NOTEBOOK.name, "exec"), values)
    assert isinstance(values["picture"], Image.Image) and values["picture"].height > 3 * 96
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
