"""Proofs for configs/config.py and what is set through it: wrong input is one line, files are isolated, flags
win, what was saved comes back; and the configs of this repository.
"""
import json
import re
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

import train
from configs import config
from configs.config import read_settings
from data.run import UserError
from model import ModelConfig, build, count_parameters
from nvfp4 import RECIPES
from papers import PaperConfig
from train import OWNERS, Config, flatten, load_config, unflatten

CONFIGS = config.config_files()


# ---------------------------------------------------------------- the mechanism, with owners of its own

@dataclass(frozen=True)
class Oven:
    heat: float = 1.5                               # of the oven
    racks: int = 2                                  # in the oven
    kind: Literal["gas", "coal"] = "gas"            # of fire


@dataclass(frozen=True)
class Bread:
    oven: Oven = Oven()
    racks: int | None = None                        # of the shop
    flours: tuple[str, ...] = ("rye",)              # by name


TOYS = (("", Bread), ("oven_", Oven))


def test_any_owners_will_do(tmp_path):
    (tmp_path / "a.py").write_text("racks = 7\noven_racks = 3\noven_heat = 2\n")
    settings, files = read_settings([str(tmp_path / "a.py"), "--flours=oat,rye", "--oven_heat=1e-1"], TOYS)
    assert files == [str(tmp_path / "a.py")]
    parts = config.by_owner(settings, TOYS)
    assert parts == {Bread: {"racks": 7, "flours": ("oat", "rye")}, Oven: {"racks": 3, "heat": 0.1}}
    oven = Oven(**parts[Oven])
    flat = config.flatten(("", Bread(oven, **parts[Bread])), ("oven_", oven))
    assert flat == {"racks": 7, "flours": ["oat", "rye"], "oven_heat": 0.1, "oven_racks": 3,
                    "oven_kind": "gas"}
    assert config.unflatten(json.loads(json.dumps(flat)), TOYS) == settings | {"oven_kind": "gas"}
    assert re.search(r"^  --oven_racks +2 +in the oven$", config.help_fields(TOYS), re.M)
    with pytest.raises(UserError, match="no field is called oven; did you mean oven_"):
        read_settings(["--oven=1"], TOYS)           # what holds an owner's values cannot be set as one


def test_files_may_set_what_belongs_to_others_but_flags_may_not(tmp_path):
    file, part = str(tmp_path / "a.py"), TOYS[1:]
    Path(file).write_text("racks = 7\noven_racks = 3\n")
    assert read_settings([file, "--oven_heat=3"], part, partial=True)[0] == {
        "oven_racks": 3, "oven_heat": 3.0}
    with pytest.raises(UserError, match="a.py: no field is called racks"):
        read_settings([file], part)
    with pytest.raises(UserError, match="command line: no field is called racks"):
        read_settings([file, "--racks=3"], part, partial=True)
    Path(file).write_text("oven_racks = 'x'\n")
    with pytest.raises(UserError, match="oven_racks='x' must be a whole number"):
        read_settings([file], part, partial=True)


def test_fields_of_another_version_are_named():
    assert config.unknown({"racks": 1, "oven_gas": 2, "shop": "x"}, TOYS) == [
        "made by another version of this code: oven_gas=2 is no field here",
        "made by another version of this code: shop=x is no field here"]
    assert config.unknown({"racks": 1}, TOYS) == []


def test_the_mechanism_is_no_config():
    assert CONFIGS and "configs/config.py" not in CONFIGS
    for name in ("configs/config.py", "configs/confi.py"):
        with pytest.raises(UserError, match="no such config file") as error:
            load_config([name])
        assert "did you mean configs/config.py" not in str(error.value)


# ---------------------------------------------------------------- what train.py sets through it

FIRST = next(iter(RECIPES))
WHOLE, CHOICE = "must be a whole number", "must be one of"
WRONG_FLAGS = {
    "--lerning_rate=1": "command line: no field is called lerning_rate; did you mean learning_rate?",
    "--lerning_rate": "--lerning_rate must be given as --key=value; did you mean learning_rate?",
    "--max_steps": "--max_steps must be given as --max_steps=VALUE",
    **{f"--max_steps={value}": f"max_steps='{value}' {WHOLE}" for value in ("ten", "1.5", "", "inf")},
    "--max_steps=None": f"max_steps=None {WHOLE}",
    "--max_steps=" + "9" * 5000: f"9' {WHOLE}",
    "--learning_rate=fast": "learning_rate='fast' must be a number",
    "--learning_rate=nan": "learning_rate=nan must be in [0, 3.4e+38]",
    "--compile=maybe": "compile='maybe' must be True or False",
    "--schedule=linear": f"schedule=linear {CHOICE} wsd, cosine",
    "--arch=gtp": f"arch=gtp {CHOICE} gpt, ngpt; did you mean gpt?",
    f"--recipe={FIRST}_": f"recipe={FIRST}_ {CHOICE} {', '.join(RECIPES)}; did you mean {FIRST}?",
    "--fp4_gemms=fprop,dgrd": "fp4_gemms=dgrd must be of fprop, dgrad, wgrad",
    "--stop_at=1001": "stop_at=1001 must be in [1, 1000]",
    **{f"--{name}={value}": f"{name}={float(value)} must be in [" for name, value in (
        ("min_lr", "-1"), ("learning_rate", "inf"), ("weight_decay", "inf"), ("grad_clip", "inf"),
        ("init_std", "nan"), ("rope_base", "nan"), ("init_std", "1e308"), ("init_std", "0"), ("beta1", "2"),
        ("beta2", "1"), ("fp4_input_amax", "1e300"), ("fp4_grad_amax", "inf"), ("fp4_tail", "2"),
        ("s_z_init", "-inf"), ("alpha_init", "0"), ("decay_fraction", "1.5"), ("moe_scale", "-1"))},
    **{f"--{name}={value}": f"{name}={value} must be in [" for value in (-1, 10**10, 10**40) for name in (
        "n_layer", "n_embd", "n_head", "n_ffn", "batch_size", "eval_iters", "gradient_accumulation_steps",
        "sample_tokens", "max_steps", "warmup_steps", "block_size")},
    **{f"--{name}=0": f"{name}=0 must be in [1, " for name in ("batch_size", "block_size", "n_head")},
    **{f"--seed={seed}": f"seed={seed} must be in [0, 18446744073709551615]" for seed in (-1, 2**64)},
    f"--fp4_head_blocks={10**40}": "must be in [-9223372036854775808,",
    "--dataset=" + "A" * 5000: "A' must be text of 4096 letters at most",
    "A" * 300: "File name too long",
    "configs/gpt_tiy.py": "configs/gpt_tiy.py: no such config file; did you mean configs/gpt_tiny.py?",
}
WRONG_FILES = {
    "lerning_rate = 1": "bad.py: no field is called lerning_rate; did you mean learning_rate?",
    "max_steps = 'ten'": f"max_steps='ten' {WHOLE}",
    "max_steps = 1.5": f"max_steps=1.5 {WHOLE}",
    "max_steps = True": f"max_steps=True {WHOLE}",
    "compile = 2": "compile=2 must be True or False",
    "dataset = None": "dataset=None must be text",
    "learning_rate = [1]": "learning_rate=[1] must be a number",
    "fp4_gemms = 3": "fp4_gemms=3 must be names with commas between",
    "n_embd = (": "bad.py: SyntaxError",
    "import sys; sys.exit()": "bad.py: SystemExit",
    "import numpy\nlearning_rate = numpy.ones(3)": "learning_rate=array([1., 1., 1.]) must be a number",
    "import numpy\narch = numpy.ones((99, 99))": "must be gpt or ngpt, and is a ndarray",
    "n_layer = 10**5000": f"n_layer=... {WHOLE}",
    "arch = 10**5000": f"arch=... {CHOICE} gpt, ngpt",
    "fp4_gemms = [10**5000]": "fp4_gemms=... must be names",
    "dataset = 'a\\0b'": "dataset='a\\x00b' must be text",
    "def seed(): pass": "seed=<function seed",
    "raise ValueError('\\n'.join('many lines'))": "bad.py: ValueError: m a n y",
    "n_embd = 1 / 0": "bad.py: ZeroDivisionError",
}


@pytest.mark.parametrize("wrong", [*WRONG_FLAGS, *WRONG_FILES], ids=lambda wrong: wrong[:40])
def test_wrong_input_is_one_line(tmp_path, wrong):
    (tmp_path / "bad.py").write_text(wrong + "\n")
    with pytest.raises(UserError) as error:
        load_config([wrong if wrong in WRONG_FLAGS else str(tmp_path / "bad.py")])
    assert (WRONG_FLAGS | WRONG_FILES)[wrong] in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_ends_of_ranges_are_allowed():
    c = load_config(["--min_lr=0", "--learning_rate=0", "--grad_clip=0", "--beta1=0", "--decay_fraction=1",
                     "--rope_base=0", f"--seed={2**64 - 1}", "--sample_tokens=0", "--warmup_steps=0",
                     "--eval_iters=1", "--init_std=1e-3"])
    assert (c.min_lr, c.seed, c.model.rope_base) == (0, 2**64 - 1, 0)


@pytest.mark.parametrize("flag, value", [
    ("--resume", True), ("--resume=false", False), ("--compile=0", False), ("--out_dir=out/a=b", "out/a=b"),
    ("--stop_at=None", None), ("--stop_at=7", 7), ("--max_steps=1e6", 10**6), ("--learning_rate=3", 3.0),
    ("--fp4_gemms=fprop,dgrad", ("fprop", "dgrad")), ("--fp4_gemms=", ()),
    ("--fp4_input_amax=None", None), ("--n_kv_head=2", 2), ("--seed=9007199254740993", 2**53 + 1)])
def test_flag_sets_a_field(flag, value):
    c = load_config([flag])
    owner, field, _ = config.schema(OWNERS)[flag[2:].partition("=")[0]]
    found = getattr({Config: c, ModelConfig: c.model, PaperConfig: c.fp4}[owner], field.name)
    assert found == value and type(found) is type(value)


def test_files_are_isolated_and_flags_win(tmp_path, monkeypatch):
    a, b, c = (str(tmp_path / name) for name in ("a.py", "b.py", "c.py"))
    Path(a).write_text("import math\n_half = 2**5\nn_embd = 2 * _half\nn_layer = 3.0\nstop_at = None\n"
                       "seed = 5\nfp4_gemms = ('fprop', 'wgrad')\n")
    Path(b).write_text("n_embd = 128\n")
    Path(c).write_text("n_head = n_layer\n")
    both = load_config(["--seed=6", a, b])
    assert both == load_config([a, b, "--seed=6"]) and both.fp4.gemms == ("fprop", "wgrad")
    assert (both.model.n_embd, both.model.n_layer, both.seed) == (128, 3, 6)
    assert load_config([b, a]).model.n_embd == 64
    with pytest.raises(UserError, match="c.py: NameError: name 'n_layer' is not defined$"):
        load_config([a, c])
    here = load_config(["configs/gpt_1b.py"])
    monkeypatch.chdir(tmp_path)                     # the repository's are found from everywhere
    assert load_config(["configs/gpt_1b.py"]) == here != load_config([])


def recipe_of_a_run(name, **changes):
    """RECIPES[name] with all fields that there are, as a run has it."""
    return PaperConfig(**vars(RECIPES[name]) | changes)


def test_dependent_defaults_follow_the_overrides(tmp_path):
    (tmp_path / "mine.py").write_text("learning_rate = 1.0\narch = 'gpt'\nfp4_tail = 0.5\n")
    mine = str(tmp_path / "mine.py")
    c = load_config([mine, "configs/gpt_tiny.py", "--learning_rate=5", "--recipe=None"])
    assert (c.min_lr, c.recipe, c.out_dir) == (0.1, "nvfp4", "out/mine")
    assert c.fp4 == recipe_of_a_run("nvfp4", tail=0.5)
    c = load_config([mine, "--arch=ngpt", "--min_lr=0", "--out_dir=x"])
    assert (c.min_lr, c.recipe, c.out_dir, c.fp4) == (0.0, "ngpt", "x", recipe_of_a_run("ngpt", tail=0.5))
    assert load_config(["--fp4_tail=0", "--recipe=nvfp4"]).fp4 == recipe_of_a_run("nvfp4", tail=0.0)
    assert load_config(["--min_lr=None", "--out_dir=None"]) == load_config([])
    assert load_config([]).out_dir == "out/run"


def test_each_architecture_has_a_recipe_of_its_own():
    architectures = typing.get_args(typing.get_type_hints(ModelConfig)["arch"])
    assert set(train.OWN_RECIPE) == set(architectures) and set(train.OWN_RECIPE.values()) <= set(RECIPES)
    for arch in architectures:
        assert load_config([f"--arch={arch}"]) == load_config([f"--arch={arch}",
                                                               f"--recipe={train.OWN_RECIPE[arch]}"])
        assert f"recipe {train.OWN_RECIPE[arch]} ({arch}'s own) sets" in train.help_text()
    for recipe in RECIPES:
        assert load_config([f"--recipe={recipe}"]).fp4 == recipe_of_a_run(recipe)


def test_help_lists_every_field(capsys):
    train.main(["-h"])
    text = capsys.readouterr().out
    table = config.schema(OWNERS)
    assert len(table) == sum(len(fields(owner)) for owner in (Config, ModelConfig, PaperConfig)) - 2
    for name, (_, field, _) in table.items():
        line, = re.findall(rf"^  --{name} +(.*)$", text, re.M)
        default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        assert re.match(rf"{re.escape(default or 'none')} +\S.*[a-z]", line), name
    assert all(re.search(rf"^  recipe {recipe}\b.* sets ", text, re.M) for recipe in RECIPES)


@pytest.mark.parametrize("argv", [[], ["--fp4_gemms=", "--stop_at=3"], *([name] for name in CONFIGS)],
                         ids=" ".join)
def test_config_survives_json_and_builds(argv):
    c = load_config(argv)
    flat = json.loads(json.dumps(flatten(c)))
    assert unflatten(flat) == c and set(flat) == set(config.schema(OWNERS))
    assert unflatten(flat | {"n_embd": 48}) == replace(c, model=replace(c.model, n_embd=48)) != c
    if argv and argv[0] in CONFIGS:
        name = Path(argv[0]).stem
        assert c.out_dir == f"out/{name}" and name.startswith("ngpt") == (c.model.arch == "ngpt")
        with torch.device("meta"):
            assert count_parameters(build(c.model))[0] > 0


@pytest.mark.parametrize("arch", ["ngpt", "gpt"])
def test_1b_configs_have_the_papers_size(arch):
    """1.25e9: the dense 1.2B model of 2605.06067 with embedding and head for 131,072 tokens."""
    V, C, layers, H, G, D, hidden = 131072, 2048, 20, 16, 4, 128, 6144
    matrices = 2 * V * C + layers * ((H + 2 * G) * D * C + H * D * C + 2 * hidden * C)
    vectors = {"gpt": 2 * layers * C + C,           # RMSNorm: two in a layer, one at the end
               "ngpt": layers * (H * D + hidden + 2 * C) + V}[arch]             # s_qk, s_u, alpha twice; s_z
    with torch.device("meta"):
        model = build(load_config([f"configs/{arch}_1b.py"]).model)
    assert matrices == 1_249_902_592
    assert count_parameters(model) == (matrices + vectors, matrices + vectors - V * C)
