"""Every command refuses to write over what it reads, before it opens anything, and leaves all files as they were."""

import hashlib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mutor_img.common import cli

CLASSIFIER = "--features mnist --features-weights classifier"
SAMPLE, SCORE = "mutor_img.sampling", "mutor_img.evaluation.command"
SWEEP, DIGITS, CONVERT = "mutor_img.sweep.__main__", "mutor_img.metrics.digits", "mutor_img.convert"
TRAIN, TOKENIZER, STUDY = "mutor_img.pretraining.command", "tokenizer.train", "mutor_img.study.__main__"
ENCODE, IMPORT = "tokenizer.encode", "tokenizer.import_codes"
RECONSTRUCT, INSPECT = "tokenizer.reconstruct", "tokenizer.inspect"

MISTAKES = [
    (SAMPLE, "--checkpoint c2i.npz --out c2i.npz", "--out"),
    (SAMPLE, "--checkpoint run --out run/", "--out"),
    (SAMPLE, "--checkpoint run --out run/checkpoints/step_00000003/checkpoint.npz", "lies in --checkpoint run"),
    (SAMPLE, "--checkpoint run --tokenizer vq --out vq/checkpoints/x.npz", "--tokenizer"),
    (SAMPLE, "--checkpoint run --out vq/checkpoints/step_00000001/x.npz", "the tokenizer"),
    (SAMPLE, "--checkpoint run --out s.npz --grid g.png --show-steps ./g.png", "are both"),
    (SAMPLE, "--checkpoint run --out digits/ --grid digits/g.png", "--grid digits/g.png lies in digits"),
    (SAMPLE, "--checkpoint s.npz.parts/run --out s.npz", "which --out fills and removes"),
    (SAMPLE, "--checkpoint run --out notes.npz", "notes.json: the manifest of notes.npz would overwrite it"),
    (SCORE, f"--samples x.npz --reference r.npz {CLASSIFIER} --json x.json", "the manifest of --samples"),
    (SCORE, f"--samples x.npz --reference r.npz {CLASSIFIER} --json ./r.npz", "--reference"),
    (SCORE, f"--samples images --reference r.npz {CLASSIFIER} --json images/a/s.json", "--samples"),
    (SCORE, f"--samples x.npz --reference images {CLASSIFIER} --json images/s.json", "--reference"),
    (SCORE, f"--samples r.npz --held-out x.npz --reference images {CLASSIFIER} --json x.json", "of --held-out"),
    (SCORE, f"--samples x.npz --reference r.npz {CLASSIFIER} --json classifier/classifier.json", "--features-weights"),
    (SCORE, f"--checkpoint run --reference r.npz {CLASSIFIER} --json run/config.yaml", "--checkpoint"),
    (SCORE, f"--checkpoint run --reference r.npz {CLASSIFIER} --json vq/checkpoints/step_00000001/checkpoint.json",
     "the tokenizer"),
    (SCORE, "--samples x.npz --reference r.npz --inception-weights i.pth --json i.pth", "--inception-weights"),
    (SCORE, f"--make-reference r.npz --role generation --out link.npz {CLASSIFIER}", "--make-reference r.npz itself"),
    (SCORE, f"--make-reference images --role generation --out images/r.npz {CLASSIFIER}", "--make-reference"),
    (SWEEP, f"--checkpoint run --reference images {CLASSIFIER} --out images", "--reference"),
    (SWEEP, f"--checkpoint run --reference r.npz {CLASSIFIER} --out vq/checkpoints", "the tokenizer"),
    (DIGITS, "--images images --val val --out images", "--images"),
    (DIGITS, "--images images --val val --out val/a", "--val"),
    (DIGITS, "--images images --val ./images --out new", "--val and --images are both"),
    (DIGITS, "--images images --val val --out run", "--out run holds no classifier but checkpoints"),
    (SCORE, f"--samples x.npz --reference images --held-out ./images {CLASSIFIER}", "--held-out and --reference are"),
    (SCORE, f"--samples x.npz --reference images --held-out x.npz {CLASSIFIER}", "--held-out and --samples are"),
    (CONVERT, "--source c2i.npz --out ./c2i.npz", "--source"),
    (CONVERT, "--source run --out run/checkpoints/step_00000009", "--source"),
    (ENCODE, "--tokenizer vq --images images --out images/codes", "--images"),
    (ENCODE, "--tokenizer vq --images images --out images", "--images"),
    (ENCODE, "--tokenizer vq --images codes/parts/images --out codes", "which --out fills and removes"),
    (ENCODE, "--tokenizer vq --images images --classes val --out val/codes", "--classes"),
    (ENCODE, "--tokenizer vq --images images --out vq", "--tokenizer"),
    (IMPORT, "--format randar --source images --tokenizer vq --classes val --out images/codes", "--source"),
    (IMPORT, "--format randar --source codes/parts/a --tokenizer vq --classes val --out codes", "fills and removes"),
    (IMPORT, "--format randar --source images --tokenizer vq --classes val --out val/codes", "--classes"),
    (RECONSTRUCT, "--tokenizer vq --images images --out images/a/0.png", "--images"),
    (RECONSTRUCT, "--tokenizer vq --images images --json images/scores.json", "--images"),
    (RECONSTRUCT, "--tokenizer vq --images images --out o.png --json o.png", "are both"),
    (INSPECT, "--codes codes --tokenizer vq --out vq/checkpoints/codes.png", "the tokenizer"),
    (TOKENIZER, "--config mnist/tokenizer data.images=images run_dir=images", "data.images"),
    (TOKENIZER, "--config mnist/tokenizer data.images=images data.val_images=val run_dir=val/run", "data.val_images"),
    (TRAIN, "--config mnist/ntp data.codes=codes run_dir=codes", "data.codes"),
    (TRAIN, "--config mnist/ntp data.codes=other data.val_codes=codes run_dir=codes", "data.val_codes"),
    (TRAIN, "--config mnist/ntp init_from=run run_dir=run", "init_from"),
    (TRAIN, "--config mnist/ntp init_from=run/checkpoints/step_00000003 run_dir=run", "init_from"),
    (TRAIN, "--config mnist/ntp data.codes=codes run_dir=images", "run_dir images holds no run but"),
    (TOKENIZER, "--config mnist/tokenizer data.images=images run_dir=codes", "run_dir codes holds no run but"),
    (TRAIN, "--config mine/config.yaml run_dir=mine", "run_dir mine/config.yaml is --config itself"),
    (STUDY, "--config mnist/study images=images run_dir=images/study", "images"),
    (STUDY, "--config compared.yaml run_dir=images/study", "lies in reference images"),
    (STUDY, "--config compared.yaml run_dir=classifier", "features_weights"),
    (STUDY, "--config compared.yaml run_dir=compared.yaml", "--config itself"),
]


@pytest.fixture
def here(run_of, make_codes, classifier, noise, tmp_path, monkeypatch):
    """The current folder, with an input of each kind."""
    monkeypatch.chdir(tmp_path)
    run_of()
    Path("tokenizer").rename("vq")
    meta = next(Path("run").glob("checkpoints/*/checkpoint.json"))
    moved = meta.read_text().replace(str(tmp_path / "tokenizer"), str(tmp_path / "vq"))
    meta.write_text(moved.replace('"seal"', '"before"'))
    make_codes(tmp_path / "codes")
    Path("classifier").symlink_to(classifier)
    np.savez("x.npz", arr_0=noise(4))
    np.savez("r.npz", arr_0=noise(4))
    Path("x.json").write_text('{"labels": "random"}')
    Path("notes.json").write_text('{"mine": 1}')
    Path("link.npz").symlink_to("r.npz")
    for name in ("c2i.npz", "i.pth", "run/config.yaml"):
        Path(name).write_text("an input")
    for name in ("images", "val"):
        (Path(name) / "a").mkdir(parents=True)
        Image.fromarray(noise(1)[0]).save(Path(name) / "a" / "0.png")
    Path("compared.yaml").write_text("base: mnist/ntp\nrows: [{name: a}]\nseeds: [0]\ncheckpoints: [5]\n"
                                     "reference: images\nfeatures: classifier\nfeatures_weights: classifier\n")
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text("extends: mnist/ntp\ntrain: {steps: 3}  # as written by hand\n")
    return tmp_path


def contents(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("module, words, reason", MISTAKES, ids=[f"{m.split('.')[-1]} {w}" for m, w, _ in MISTAKES])
def test_an_output_that_is_an_input_is_one_line_and_nothing_changes(here, capsys, module, words, reason):
    before = contents(here)
    with pytest.raises(SystemExit) as stopped:
        cli.run(import_module(module).main, words.split())
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and errors[-1].startswith("error: ") and reason in errors[-1]
    assert contents(here) == before


def test_a_run_goes_on_from_the_config_that_it_wrote_itself(run_training, run_file, tiny):
    trainer = run_training("train.steps=1")
    record = trainer.run_dir / "config.yaml"
    import_module(TRAIN).main(["--config", str(record), "train.steps=2"])
    assert "steps: 2" in record.read_text()
