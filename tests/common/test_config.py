"""Every shipped config builds; every field is read; wrong keys and values are one clear line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from mutor_img.common.config import OptimConfig, TrainConfig, default_run_dir, field_names, load_config, to_yaml
from mutor_img.common.errors import UserError
from mutor_img.pretraining.config import GeneratorConfig
from mutor_img.study.config import StudyConfig
from tokenizer.network.vq import preset
from tokenizer.training.config import TokenizerConfig
from tokenizer.training.plan import plan_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class Small:
    run_dir: str = ""
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_extends_another_and_overrides_win(tmp_path):
    write(tmp_path, "base.yaml", "optim: {lr: 1e-4, clip: 2}\n")
    config = load_config(Small, write(tmp_path, "a.yaml", "extends: base.yaml\noptim: {clip: 3}\n"), ["train.steps=7"])
    assert (config.optim.lr, config.optim.clip, config.train.steps) == (1e-4, 3.0, 7)


def test_the_run_folder_is_the_configs_path_under_runs():
    assert default_run_dir("configs/mnist/ntp.yaml") == "runs/mnist/ntp"
    assert default_run_dir("/a/configs/b/configs/c.yaml") == "/a/configs/b/runs/c"
    assert default_run_dir("mine.yaml") == "runs/mine"


@pytest.mark.parametrize("override, message", [
    ("optim.lrr=1", "did you mean 'optim.lr'"),
    ("optm.lr=1", "did you mean 'optim.lr'"),
    ("optim.lr=fast", "optim.lr"),
    ("optim.lr=-1", "optim.lr is -1"),
    ("optim.lr=nan", "optim.lr is nan"),
    ("optim.restarts=[5,5]", "optim.restarts is [5, 5]"),
    ("optim.restarts=[0]", "optim.restarts is [0]"),
    ("optim.decay_share=1.5", "optim.decay_share is 1.5"),
    ("optim={decay_steps: 1, decay_share: 0.5}", "set one of them to 0"),
    ("optim.decay_steps=5", "optim.decay_steps is 5, but optim.schedule is constant"),
    ("optim={schedule: cosine, decay_share: 0.2}", "optim.decay_share is 0.2, but optim.schedule is cosine"),
    ("optim.schedule=cosin", "did you mean 'cosine'"),
    ("train.precision=fp16", "train.precision is 'fp16'"),
    ("train.steps=0", "train.steps is 0"),
    ("seed=null", "seed"),
    ("steps", "key=value"),
    ("optim=3", "optim"),
    ("optim=[1]", "give a mapping of keys to values"),
    ("optim=null", "optim is null"),
    ("optim={lr: 1, lr: 2}", "'lr' is there twice"),
    ("optim.betas.0=0.5", "optim.betas is not set by its parts"),
    ("optim.betas[0]=0.5", "optim.betas is not set by its parts"),
    ("optim.lr.x=1", "optim.lr is not set by its parts"),
    ("optim.betas=0.5", "give a list: optim.betas=[0.5]"),
    ("optim.betas=[0.5]", "optim.betas has 1 values; give 2"),
    ("optim.betas={a: {b: 1}}", "give a list"),
    ("optim.betas=[[1],[2]]", "give one value"),
    ("optim.betas=[null,1]", "optim.betas is null"),
    ("optim.lr={a: {b: {c: 1}}}", "optim.lr is {'a'"),
    ("optim.lr={{{", "not valid YAML"),
    ("optim.betas=[0.9,1]", "optim.betas is 1.0; give a value in [0.0, 0.999999]"),
    ("optim.lr=", "optim.lr is empty"),
    ("train.steps=1e3", "train.steps is '1e3'; give a whole number, as in 1000"),
    ("train.steps=2024-01-01", "give a whole number"),
    ("train.milestones=[a]", "train.milestones is 'a'; give a whole number"),
    ("optim.lr=1e-4x", "optim.lr is '1e-4x'; give a number, as in 1e-4"),
    ("train.compile=maybe", "train.compile is 'maybe'; give true or false"),
    ("optim.betas=[x,1]", "optim.betas is 'x'; give a number"),
    ("run_dir=", "run_dir is empty; give a value, or leave the override out, or write run_dir=\"''\" for none"),
    ("run_dir= ", "run_dir is empty"),
    ("run_dir=[a]", "run_dir is ['a']; give one value"),
    ("run_dir={a}", "run_dir is {'a': ''}; give one value"),
    ("run_dir=~", "run_dir is ~; give one value"),
    ("run_dir=${nothing}", "nothing"),
    ("run_dir=???", "run_dir is ???"),
    ("seed=???", "seed is ???"),
    ("a[0]=", "unknown key 'a.0'"),
    ("=5", "key=value"),
    ("optim..lr=5", "unknown key 'optim..lr'"),
])
def test_a_wrong_override_is_one_line_that_says_what(tmp_path, override, message):
    path = write(tmp_path, "a.yaml", "seed: 1\n")
    with pytest.raises(UserError) as caught:
        load_config(Small, path, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("seed: [1\n", "not valid YAML"),
    ("- a\n", "mapping"),
    ("extends: missing.yaml\n", "no such config file"),
    ("extends: a.yaml\n", "extends itself"),
    ("sed: 1\n", "did you mean 'seed'"),
    ("optim: {lr: 1}\nseed: 1\noptim: {clip: 1}\n", "a.yaml: line 3: the key 'optim' is there twice"),
    ("optim.lr: 1\n", "in a file write optim: {lr: …}"),
    ("extends: [a, b]\n", "give the path of one YAML file"),
    ("extends: {a: b}\n", "give the path of one YAML file"),
    ("optim: [1]\n", "give a mapping"),
    ("run_dir: ~\n", "a.yaml: run_dir is ~"),
    ("3\n", "not one value"),
])
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, message):
    path = write(tmp_path, "a.yaml", text)
    with pytest.raises(UserError, match=message):
        load_config(Small, path)


AS_TYPED = ["0010", "2024-01-01", "on", "no", "1e3", "0x1F", "0o17", "1:30", "true", "1_000", ".5", "a#b",
            "x y", "my: run", "@scratch", "%1", "*", "runs/ä"]


@pytest.mark.parametrize("word", AS_TYPED)
def test_a_text_field_holds_what_was_typed(tmp_path, word):
    """A folder's name is no number, date or switch: neither in a file, nor on the command line, nor once resolved."""
    quoted = f"'{word}'" if set(word) & set(":@%*") else word
    path = write(tmp_path, "a.yaml", f"run_dir: {quoted}\ndata: {{codes: {quoted}, val_codes: '{word}'}}\n")
    plain = write(tmp_path, "b.yaml", "seed: 0\n")
    typed = load_config(GeneratorConfig, plain, [f"run_dir={word}", f"data.codes={word}", f"data.val_codes='{word}'"])
    for config in (load_config(GeneratorConfig, path), typed):
        assert (config.run_dir, config.data.codes, config.data.val_codes) == (word,) * 3
        again = load_config(GeneratorConfig, write(tmp_path, "c.yaml", to_yaml(config)))
        assert (again.run_dir, again.data) == (word, config.data)


def test_null_is_text_where_nothing_is_no_value_and_nothing_where_it_is_one(tmp_path):
    path = write(tmp_path, "a.yaml", "run_dir: null\ndata: {val_codes: null}\ninit_from: 'null'\n")
    for overrides in ((), ("run_dir=null", "data.val_codes=null", "init_from='null'")):
        config = load_config(GeneratorConfig, path, overrides)
        assert (config.run_dir, config.data.val_codes, config.init_from) == ("null", None, "null")


def test_numbers_switches_lists_and_nothing_are_what_they_were(tmp_path):
    path = write(tmp_path, "a.yaml", "optim: {lr: 1e-4, betas: [.9, 9.5e-1]}\ntrain: {compile: off, steps: 0010}\n"
                                     "registers: {count: null}\ndata: {codes: [a, 0010]}\neval: {metrics: [fid]}\n"
                                     "pictures:\n")
    for overrides in ((), ("optim.lr=1e-4", "optim.betas=[.9,9.5e-1]", "train.compile=no", "registers.count=null",
                           "data.codes=[a,0010]", "eval.metrics=[fid]", "registers.count=~", "data.val_codes=null")):
        c = load_config(GeneratorConfig, path, overrides)
        assert (c.optim.lr, tuple(c.optim.betas), c.train.compile, c.train.steps) == (1e-4, (0.9, 0.95), False, 10)
        assert (c.registers.count, c.data.val_codes) == (None, None)
        assert (c.data.codes, c.eval.metrics) == (["a", "0010"], ["fid"])


def test_a_path_that_begins_with_a_tilde_lies_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "base.yaml", "seed: 5\n")
    path = write(tmp_path, "a.yaml", "extends: ~/base.yaml\nrun_dir: ~/runs/x\n"
                                     "data: {codes: [~/a, b~], val_codes: ~}\n")
    in_file = load_config(GeneratorConfig, "~/a.yaml")
    typed = load_config(GeneratorConfig, path, ["run_dir=~/runs/x", "data.codes=~/a,b~"])
    assert in_file.run_dir == typed.run_dir == f"{tmp_path}/runs/x" and in_file.seed == 5
    assert in_file.data.folders() == typed.data.folders() == [f"{tmp_path}/a", "b~"] and in_file.data.val_codes is None


def test_a_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(GeneratorConfig, CONFIGS / "imagenet256" / "mutor2d_b_80.yaml")
    again = load_config(GeneratorConfig, write(tmp_path, "config.yaml", to_yaml(config)))
    assert again == config


def test_field_names_are_every_leaf():
    leaves = field_names(GeneratorConfig)
    assert "registers.d_max" in leaves and "optim.betas" in leaves and "optim" not in leaves
    assert len(leaves) == len(set(leaves)) > 30


# The paper's rows (section 6 and 7 of the method), spelled out once more.
PAPER = {
    "ntp_b": ("B", "none", None, 4, 360_000), "ntp_b_500k": ("B", "none", None, 4, 500_000),
    "mutor1d_b": ("B", "1d", None, 4, 360_000), "mutor2d_b": ("B", "2d", None, 4, 360_000),
    "mutor2d_b_80": ("B", "2d", 80, 4, 360_000), "mutor2d_b_80_d3": ("B", "2d", 80, 3, 360_000),
    "mutor2d_b_80_d5": ("B", "2d", 80, 5, 360_000), "mutor2d_l_80": ("L", "2d", 80, 4, 360_000),
    "mutor2d_xl_80": ("XL", "2d", 80, 4, 360_000), "mutor2d_xxl_80": ("XXL", "2d", 80, 4, 360_000),
    "mutor2d_3b_80": ("3B", "2d", 80, 4, 360_000), "ntp_l": ("L", "none", None, 4, 360_000),
    "ntp_xl": ("XL", "none", None, 4, 360_000), "ntp_xxl": ("XXL", "none", None, 4, 360_000),
    "ntp_3b": ("3B", "none", None, 4, 360_000),
}


@pytest.mark.parametrize("name", PAPER)
def test_an_imagenet_config_is_the_papers_recipe(name):
    c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / f"{name}.yaml")
    assert (c.model.preset, c.registers.kind, c.registers.count, c.registers.d_max, c.train.steps) == PAPER[name]
    assert (c.optim.lr, tuple(c.optim.betas), c.optim.weight_decay, c.optim.clip) == (4e-4, (0.9, 0.95), 0.05, 1.0)
    assert (c.optim.schedule, c.optim.warmup_steps, c.train.global_batch, c.train.ema) == ("constant", 0, 1024, 0.0)
    assert (c.model.dropout, c.model.class_dropout, c.registers.loss_weight) == (0.1, 0.1, 0.5)
    assert (tuple(c.model.grid), c.model.vocabulary, c.model.classes) == ((16, 16), 16384, 1000)
    assert c.run_dir.endswith(f"runs/imagenet256/{name}")


def test_the_tokenizer_config_is_llamagens_recipe():
    c = load_config(TokenizerConfig, CONFIGS / "imagenet256" / "tokenizer.yaml")
    assert c.model.options() == preset("vq16")
    assert (c.data.image_size, c.data.crop_min, c.data.mirror) == (256, 0.8, True)
    assert c.loss.terms == {"l2": 1.0, "lpips": 1.0} and (c.loss.codebook, c.loss.commitment) == (1.0, 0.25)
    assert (c.loss.adversarial_weight, c.loss.adversarial_start, c.loss.entropy) == (0.5, 20_000, 0.0)
    assert (c.loss.discriminator_channels, c.loss.discriminator_layers, c.revival.after) == (64, 3, 0)
    assert (c.optim.lr, tuple(c.optim.betas), c.optim.weight_decay, c.optim.clip) == (1e-4, (0.9, 0.95), 0.0, 1.0)
    assert (c.train.global_batch, c.train.steps) == (128, 1_281_167 // 128 * 40)
    plan = plan_tokenizer(c)  # on shapes: the networks take images of 256 pixels
    assert (plan["parameters"], plan["parameters of the discriminator"]) == (71_883_403, 2_765_633)


def test_llamagen_b_is_llamagens_own_recipe():
    c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / "llamagen_b.yaml")
    assert (c.model.preset, c.registers.kind, c.optim.lr, c.optim.schedule) == ("B", "none", 1e-4, "constant")
    assert (tuple(c.optim.betas), c.optim.weight_decay, c.optim.clip) == ((0.9, 0.95), 0.05, 1.0)
    assert (c.train.global_batch, c.train.precision, c.model.dropout, c.model.class_dropout) == (256, "bf16", 0.1, 0.1)
    images = c.train.steps * c.train.global_batch
    assert 300 * 1_281_167 <= images < 300 * 1_281_167 + c.train.global_batch


LLAMAGEN_384 = {  # preset, images per update, learning rate: those of its authors
    "llamagen_b": ("B", 256, 1e-4), "llamagen_l": ("L", 256, 1e-4), "llamagen_xl": ("XL", 256, 2e-4),
    "llamagen_xxl": ("XXL", 512, 2e-4),
}


def test_every_config_for_384_pixels_is_300_epochs_of_llamagens_recipe():
    assert {path.stem for path in (CONFIGS / "imagenet384").glob("*.yaml")} == set(LLAMAGEN_384)
    for name, recipe in LLAMAGEN_384.items():
        c = load_config(GeneratorConfig, CONFIGS / "imagenet384" / f"{name}.yaml")
        assert (c.model.preset, c.train.global_batch, c.optim.lr) == recipe
        assert (tuple(c.model.grid), c.registers.kind, len(c.data.folders())) == ((24, 24), "none", 2)
        images = c.train.steps * c.train.global_batch
        assert 300 * 1_281_167 <= images < 300 * 1_281_167 + c.train.global_batch


def test_only_3b_is_sharded_and_its_plan_is_for_that_many_devices():
    for name in PAPER:
        c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / f"{name}.yaml")
        assert (c.train.parallel == "fsdp") == (c.model.preset == "3B")
        assert c.plan.devices == (32 if c.model.preset == "3B" else 8)


RIVALS = {  # objective and offsets, as in docs/objectives.md
    "mtar_b": ("parallel-heads", [16]), "mtar_b_17": ("parallel-heads", [17]), "mtar_b_2": ("parallel-heads", [2]),
    "mtar_b_234": ("parallel-heads", [2, 3, 4]), "heads_b_234": ("parallel-heads", [2, 3, 4]),
    "heads_b_23": ("parallel-heads", [2, 3]), "heads_b_2_17": ("parallel-heads", [2, 17]),
    "sequential_b": ("sequential-heads", []), "leaps_b": ("mutor", [3, 5, 7]),
    "leaps2d_b": ("mutor", [2, 4, 32, 34, 64]), "mirai_b": ("mirai", [0, 1, 16]), "mirai_b_0": ("mirai", [0]),
    "mirai_b_control": ("mutor", []), "npp_b": ("npp", []), "npp_b_control": ("mutor", []),
    "rear_b": ("rear", []), "rear_b_noise": ("rear", []),
    "rear_b_mlps": ("rear", []),
}


@pytest.mark.parametrize("name, expected", RIVALS.items())
def test_rival_objectives_are_those_of_the_page(name, expected):
    c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / f"{name}.yaml")
    assert (c.objective.kind, c.objective.offsets + c.registers.offsets) == expected
    assert c.objective.kind == "mutor" or c.registers.kind == "none"
    assert c.model.preset == "B"


OWN_SCHEDULES = ("llamagen_b", "rear_b", "npp_b")


def test_npp_b_is_its_papers_schedule_and_its_control_has_the_same_rates():
    c, control = (load_config(GeneratorConfig, CONFIGS / "imagenet256" / f"{name}.yaml")
                  for name in ("npp_b", "npp_b_control"))
    assert c.objective.patches == [2, 1] and c.objective.stage_ends == c.optim.restarts == [c.train.steps // 2]
    assert (c.optim.lr, c.optim.final_lr, c.optim.schedule, c.optim.decay_share) == (1e-4, 1e-5, "wsd", 0.2)
    assert c.optim.warmup_steps == round(5 * 1_281_167 / 256)
    assert (control.optim, control.train, control.data) == (c.optim, c.train, c.data) and not control.objective.given()


def test_rear_b_is_its_papers_schedule():
    c = load_config(GeneratorConfig, CONFIGS / "imagenet256" / "rear_b.yaml")
    assert (c.optim.lr, c.optim.schedule, c.optim.final_lr, c.train.global_batch) == (4e-4, "cosine", 1e-5, 2048)
    assert c.train.steps == -(-400 * 1_281_167 // 2048) and c.optim.warmup_steps == round(100 * 1_281_167 / 2048)
    assert c.objective.noise_until == 0.75 * c.train.steps


def test_mirai_b_counts_its_epochs_in_updates_and_is_compared_with_an_averaged_baseline():
    c, control = (load_config(GeneratorConfig, CONFIGS / "imagenet256" / f"{name}.yaml")
                  for name in ("mirai_b", "mirai_b_control"))
    assert (c.objective.weight, c.objective.late_weight, c.objective.late_from) == (2.0, 1.0, c.train.steps // 2)
    assert c.objective.starts_at == round(15 * 1_281_167 / 256) and c.train.ema == 0.9999
    assert (control.optim, control.train, control.data) == (c.optim, c.train, c.data) and not control.objective.given()


def test_every_imagenet_file_is_in_a_table():
    files = {p.stem for p in (CONFIGS / "imagenet256").glob("*.yaml")}
    assert files == {*PAPER, *RIVALS, "llamagen_b", "tokenizer", "study"}


def test_shared_values_stand_once():
    for path in (CONFIGS / "imagenet256").glob("*.yaml"):
        if path.stem in ("ntp_b", "tokenizer", "study"):
            continue
        layer = yaml.safe_load(path.read_text())
        assert "extends" in layer and not {"grid", "vocabulary", "classes"} & layer.get("model", {}).keys()
        assert not {"optim", "data"} & layer.keys() or path.stem in OWN_SCHEDULES


@pytest.mark.parametrize("schema, config, program", [
    (GeneratorConfig, "mnist/tokenizer", "python -m tokenizer.train"), (TokenizerConfig, "mnist/ntp", "train.py"),
    (StudyConfig, "mnist/ntp", "train.py or python -m tokenizer.train"),
    (GeneratorConfig, "mnist/study", "python -m mutor_img.study"),
    (GeneratorConfig, "imagenet256/study", "python -m mutor_img.study")])
def test_a_config_of_another_program_is_told_whose_it_is(schema, config, program):
    with pytest.raises(UserError, match=f"unknown key .*; {program} has it: give that this config"):
        load_config(schema, config)
