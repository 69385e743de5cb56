"""The model card of a published checkpoint, written from what its run left."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mutor_img.checkpoints.folder import open_group
from mutor_img.checkpoints.tensor_files import group_hash, sampled_group
from mutor_img.common.errors import UserError
from mutor_img.common.files import read_json, read_metrics
from mutor_img.common.hub import import_hub, is_hub_name
from mutor_img.metrics.report import table

SAMPLING = ("weights", "cfg_scale", "cfg_schedule", "cfg_parameter", "temperature", "top_k", "top_p", "seed", "labels",
            "num_samples", "dtype", "resize")  # of a manifest: what decides the images that were scored
PICTURE = "samples.png"


def write_card(repo: str, folder: Path, meta: dict[str, Any], scores: Sequence[str | Path],
               licence: str | None, packed: bool) -> tuple[str, dict[str, Path]]:
    """Return the text of a README.md for the Hub, and the picture that it shows by its name there, if there is one.

    Args:
        repo: ``org/name``.
        folder: the checkpoint, whose run folder is looked at for scores and pictures.
        meta: its JSON, with the published files alone.
        scores: further JSON files with scores.
        licence: as the Hub calls it, or None.
        packed: the repository holds the generator's tokenizer.

    Raises:
        UserError: a file of ``scores`` is of other weights, or holds no scores.
    """
    run, group = run_of(folder), sampled_group(meta["files"])
    digest = group_hash(meta["files"], group)
    picture = _picture(run, meta["step"])
    head = import_hub(f"hf://{repo}").ModelCardData(
        license=licence, library_name="mutor_img", tags=["image-generation", "autoregressive", meta["kind"]])
    found = [_scores(result) for result in _results(run, digest, scores)] + _while_training(run, meta)
    parts = [
        f"---\n{head.to_yaml()}\n---", f"# {repo.rpartition('/')[2]}", _summary(meta),
        f"![What it draws]({PICTURE})\n\n*{picture[1]}*" if picture else "",
        _how_to_load(repo, meta, packed), "## What it is\n\n" + _rows(_facts(folder, meta, group, digest)),
        "## Scores\n\n" + ("\n\n".join(found) or "None were found in the run folder."),
        f"## Config\n\n```yaml\n{yaml.safe_dump(meta['config'], sort_keys=False)}```" if meta.get("config") else "",
        "## Licence\n\n" + (licence or "**To be filled in by the publisher**, here and as `license:` at the top."),
    ]
    return "\n\n".join(filter(None, parts)) + "\n", {PICTURE: picture[0]} if picture else {}


def run_of(folder: Path) -> Path:
    """Return the run folder of a checkpoint folder, or the folder itself where it lies in none."""
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder


def _summary(meta: dict[str, Any]) -> str:
    kind = {"tokenizer": "A VQ tokenizer: images to a grid of codes and back.",
            "generator": "A class-conditional transformer that generates images as a grid of VQ codes."}[meta["kind"]]
    made = "It was trained" if "config" in meta else "Its weights were converted"
    return f"{kind} {made} with mutor_img {version('mutor_img')}."


def _how_to_load(repo: str, meta: dict[str, Any], packed: bool) -> str:
    name, codes = f"hf://{repo}", meta.get("codes", {})
    if meta["kind"] == "tokenizer":
        commands = [f"python -m tokenizer.encode --tokenizer {name} --images imagenet/train --out codes/imagenet"]
        code = f'from tokenizer import VQModel\n\nvq = VQModel.from_pretrained("{repo}")'
    else:
        named = codes.get("tokenizer") or "TOKENIZER"
        extra = "" if packed or is_hub_name(named) else f" --tokenizer {named}"
        commands = [f"python sample.py --checkpoint {name}{extra} --grid grid.png"]
        code = ("import torch\nfrom mutor_img import Transformer, generate\n\n"
                f'model = Transformer.from_pretrained("{repo}")\n'
                "codes = generate(model, torch.tensor([0, 1, 2]), cfg_scale=2.0, seed=0)")
    lines = "\n".join(["pip install 'mutor_img[hub]'", *commands])
    return f"## How to load it\n\n```bash\n{lines}\n```\n\n```python\n{code}\n```"


def _facts(folder: Path, meta: dict[str, Any], group: str, digest: str) -> dict[str, Any]:
    """Return what there is to say of the model, its data and its training, by name; None where nothing says it."""
    shapes, codes, config = open_group(folder, group).shapes, meta.get("codes", {}), meta.get("config", {})
    count = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("objective."))
    model, registers, stores = meta["model"], config.get("registers"), codes.get("stores", [])
    offered = " x ".join(map(str, model["grid"])) if "grid" in model else None
    size = meta.get("image_size") or codes.get("image_size")
    return {
        "parameters": f"{count:,}", "weights": f"{'averaged (EMA)' if group == 'ema' else 'raw'}, sha256 `{digest}`",
        "updates": f"{meta['step']:,}" if config else None,
        "samples seen": f"{meta['samples']:,}" if meta.get("samples") else None,
        "image size": f"{size} pixels per side" if size else None, "grid of codes": offered,
        "vocabulary": model["vocabulary"],
        "classes": f"{model['classes']:,}" if "classes" in model else None,
        "registers": " ".join(f"{k}={v}" for k, v in registers.items()) if registers else None,
        "data": "; ".join(f"`{s['path']}`, {s['crop']}, views {', '.join(s['views'])}, sha256 `{s['hash']}`"
                          for s in stores) or config.get("data", {}).get("images"),
        "tokenizer": f"`{codes['tokenizer']}`, sha256 `{codes['tokenizer_hash']}`" if codes.get("tokenizer") else None,
    }


def _rows(facts: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items() if v is not None)])


def _results(run: Path, digest: str, given: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return the scores of the weights with this sha256, from the given files and then from the run folder.

    Raises:
        UserError: a given file holds none.
    """
    results = []
    for path in given:
        result = read_json(path)
        if not _is_of(result, digest):
            raise UserError(f"{path}: no scores of these weights (sha256 {digest[:16]}); give what evaluate_fid.py "
                            "--json or tokenizer.reconstruct --json wrote of them")
        results.append(result)
    beside = (read_json(path) for path in sorted(run.glob("*.json")) if path.name != "checkpoint.json")
    return results + [result for result in beside if _is_of(result, digest) and result not in results]


def _is_of(result: Any, digest: str) -> bool:
    """Tell whether a JSON's content is scores of the weights with this sha256."""
    if not isinstance(result, dict):
        return False
    if "psnr" in result:
        return result.get("tokenizer_hash") == digest
    return "reference" in result and "features" in result and _manifest(result).get("weights_hash") == digest


def _manifest(result: dict[str, Any]) -> dict[str, Any]:
    samples = result.get("samples")
    return (samples.get("manifest") or {}) if isinstance(samples, dict) else {}


def _scores(result: dict[str, Any]) -> str:
    """Return one set of scores with its protocol, as text in a box."""
    if "psnr" in result:
        lines = [f"{name}: {value}" for name, value in result.items() if isinstance(value, (int, float, str))]
    else:
        manifest = _manifest(result)
        used = ", ".join(f"{name} {manifest[name]}" for name in SAMPLING if manifest.get(name) is not None)
        lines = [table(result), f"reference sha256 {result['reference']['sha256']}", f"samples: {used}"]
    return "```text\n" + "\n".join(lines) + "\n```"


def _while_training(run: Path, meta: dict[str, Any]) -> list[str]:
    """Return the last scores that the run itself logged by this step, with what they were computed of."""
    rows = [row for row in read_metrics(run) if row["step"] <= meta["step"]]
    last = {name: (row["step"], row[name]) for row in rows for name in row if name.startswith(("eval_", "val_"))}
    if not last:
        return []
    config = meta.get("config", {}).get("eval", {})
    used = ", ".join(f"{name} {config[name]}" for name in ("samples", "reference", "features", "cfg_scale")
                     if config.get("every") and config.get(name))
    lines = [f"| {name} | {value:.6g} | {step} |" for name, (step, value) in last.items()]
    return ["\n".join(["Logged while it trained" + f" ({used})" * bool(used) + ":", "", "| | | update |",
                       "|---|---|---|", *lines])]


def _picture(run: Path, step: int) -> tuple[Path, str] | None:
    """Return the newest picture that the run drew by ``step``, else ``samples.png`` of its folder, and what it is."""
    drawn = {int(found[1]): path for path in (run / "pictures").glob("*.png")
             if (found := re.fullmatch(r"(?:samples|reconstructions)_(\d+)", path.stem)) and int(found[1]) <= step}
    if drawn:
        newest = max(drawn)
        return drawn[newest], f"Drawn by the run itself after update {newest}, not selected."
    return (run / PICTURE, "From the run folder.") if (run / PICTURE).is_file() else None
