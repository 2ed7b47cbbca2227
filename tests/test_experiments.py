"""Proofs for assets/experiments.py: which runs an experiment trains, that it trains none again, and its
numbers against the logs of tiny runs."""
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import analyze  # noqa: E402
import train  # noqa: E402
from assets import experiments  # noqa: E402
from assets.experiments import ON_WIDTHS, OWN_RECIPE, WIDTHS, Rung, at_width, chance  # noqa: E402
from data.run import STOPPED, Stop  # noqa: E402
from runs import refusal_of  # noqa: E402
from test_analyze import log_of, results  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def short(tiny):
    """Flags of a tiny run, but for its folder."""
    return [flag for flag in tiny("", n_ffn=64, max_steps=4) if not flag.startswith("--out_dir")]


def run(*argv):
    experiments.main([str(argument) for argument in argv])


def refusal(*argv):
    return refusal_of(experiments.main, argv)


def sizeless(flags):
    """Flags of a run, but for those that a width decides."""
    return [flag for flag in flags if not flag.startswith(("--n_embd", "--n_head", "--n_ffn", "--learning"))]


def trained(capsys):
    """How many runs an experiment has found complete, and how many it has trained."""
    counts = re.search(r"(\d+) runs are complete, (\d+) to be", capsys.readouterr().out).groups()
    return tuple(map(int, counts))


# ---------------------------------------------------------------- processes

def test_commands_run_side_by_side_until_one_says_stop():
    def python(code):
        return [sys.executable, "-S", "-c", code]
    commands = {"good": python("print('out of sight')"), "bad": python("import sys; sys.exit('a\\nwhy')"),
                "told": python("import os, sys; sys.exit(os.environ['TOLD'])")}
    ends = {key: (status, said) for key, status, said in
            experiments.run_all(commands, 2, Stop(), TOLD="by the environment")}
    assert ends == {"good": (0, ""), "bad": (1, "why"), "told": (1, "by the environment")}
    stop = Stop()
    several = dict.fromkeys("abcd", python("pass")) | {"e": python("import time; time.sleep(60)")}
    for key, _, _ in experiments.run_all({"e": several.pop("e")} | several, 2, stop):
        stop.why = stop.why or "SIGTERM"
        assert key in "ae"                          # one ended; the other was terminated; no third began


def in_this_process(commands, at_once, stop, **environment):
    """run_all(), faster: of train.py alone."""
    for key, (_, script, *argv) in commands.items():
        assert script == train.__file__
        try:
            train.main(argv)
            yield key, 0, ""
        except SystemExit as error:
            yield key, 1, str(error)


# ---------------------------------------------------------------- experiments

def test_learning_rates(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "run_all", in_this_process)
    monkeypatch.setattr(experiments, "OWN_RECIPE", {"gpt": "nvfp4"})
    monkeypatch.setattr(analyze, "draw", lambda *_: None)
    argv = ["lr", f"--out_dir={tmp_path}", "--rates=1e-2,1e30", *short, "--max_steps=2"]
    run(*argv)
    assert trained(capsys) == (0, 4)
    rows = json.loads((tmp_path / "lr.json").read_text())["results"]
    assert [(row["recipe"], row["rate"], row["loss"] is None) for row in rows] == [
        ("bf16", 1e-2, False), ("bf16", 1e30, True), ("nvfp4", 1e-2, False), ("nvfp4", 1e30, True)]
    last = log_of(tmp_path / "lr_1e-2_gpt_nvfp4", "val_loss_fp4")[-1]
    assert rows[2]["loss"] == pytest.approx(last, rel=1e-5)
    for other in ("--seed=1", "--eval_iters=5", "--n_embd=64"):
        name = other[2:].split("=")[0]
        assert f"holds a run with {name}=" in refusal(*argv, other)
    run(*argv, "--rates=1e-2")                      # a complete run is not trained again
    assert trained(capsys) == (2, 0)


def test_ladder(short, tmp_path, monkeypatch, capsys):
    """Two rungs, two seeds: gaps against bf16 of the same seed. A run that is lost is made again, alone, and
    one that was begun goes on."""
    monkeypatch.setattr(experiments, "run_all", in_this_process)
    rungs = Rung("gpt", "bf16"), Rung("gpt", "nvfp4", "no tail", "--fp4_tail=0", tokens=1.5)
    monkeypatch.setattr(experiments, "LADDER", (*rungs, Rung("ngpt", "ngpt")))
    argv = ["recipes", f"--out_dir={tmp_path}", "--seeds=2", "--seed=5", "--rows=gpt/*", *short,
            "--max_steps=4"]
    run(*argv)
    assert trained(capsys) == (0, 4)
    found = results(tmp_path, "recipes")
    bf16, fp4 = ([log_of(tmp_path / f"gpt_{name}_{seed}", "val_loss")[-1] for seed in (5, 6)]
                 for name in ("bf16", "nvfp4_no_tail"))
    row, = analyze.find(found["results"], recipe="nvfp4 no tail")
    gaps = [b - a for a, b in zip(bf16, fp4, strict=True)]
    assert row["gap"] == pytest.approx(analyze.spread(gaps), abs=2e-5) and row["seeds"] == 2
    assert row["error"] == pytest.approx(row["gap"][1] / math.sqrt(2), rel=1e-4)
    assert log_of(tmp_path / "gpt_nvfp4_no_tail_5", "step")[-1] == 6
    monkeypatch.setattr(analyze, "draw", lambda *_: None)
    shutil.rmtree(tmp_path / "gpt_bf16_6")
    train.main(["configs/gpt_ladder.py", *short, "--recipe=bf16", "--seed=6", "--max_steps=4", "--stop_at=2",
                f"--out_dir={tmp_path / 'gpt_bf16_6'}"])
    half = (tmp_path / "gpt_bf16_6" / "ckpt.pt").read_bytes()
    for _ in range(2):
        run(*argv)
        assert trained(capsys)[1] == 1
        again = json.loads((tmp_path / "recipes.json").read_text())["results"]
        assert [row["gap"] for row in again] == [row["gap"] for row in found["results"]]
        (tmp_path / "gpt_bf16_6" / "ckpt.pt").write_bytes(half)                 # killed before its last save


def test_one_mlp(short, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "draw", lambda *_: None)
    argv = ["onelayer", f"--out_dir={tmp_path}", *short, "--tokens=64"]
    run(*argv)
    rows = json.loads((tmp_path / "onelayer.json").read_text())["results"]
    (tmp_path / "onelayer_ngpt_bf16" / "probes_4_64_128.json").unlink()         # as killed before its last
    run(*argv)
    assert json.loads((tmp_path / "onelayer.json").read_text())["results"] == rows
    assert [(row["arch"], row["step"]) for row in rows] == [
        ("gpt", 1), ("gpt", 2), ("gpt", 4), ("ngpt", 1), ("ngpt", 2), ("ngpt", 4)]
    assert rows[2]["loss"] < rows[0]["loss"] and all(r["rho_s"] is not None for r in rows)
    assert rows[2]["loss"] == pytest.approx(log_of(tmp_path / "onelayer_gpt_bf16", "val_loss")[-1], rel=1e-5)


# ---------------------------------------------------------------- the claim at width

def test_chance_and_how_many_would_decide():
    """By hand; and as many pairs as are said to be needed, drawn at random, decide four times out of five.

    error   three standard deviations of 200 draws: 0.09
    """
    assert chance([1]) == 1 and chance([1, 2, 3]) == 2 / 8 and chance([1, 2, -3]) == 1
    assert chance([-1, -2, -3, -4, -5, -6]) == 2 / 64 and chance([5, -1, 5]) == 4 / 8
    rng, d = np.random.default_rng(0), [0.0, 1.0, 2.0]
    n = int(experiments.runs_to_decide(d))
    assert analyze.spread(d) == (1, 1) and n == 10
    for pairs, low, high in ((n, 0.71, 0.91), (n - 4, 0.1, 0.6)):               # fewer: a control
        decided = [chance(rng.normal(1, 1, pairs)) < 0.05 for _ in range(200)]
        assert low < np.mean(decided) < high
    assert math.isnan(experiments.runs_to_decide([1])) and experiments.runs_to_decide([1, -1]) == math.inf


def test_relative_errors_in_pairs():
    """Made-up losses: each FP4 run against bf16 of its seed, nGPT against GPT of its seed and width."""
    def rows(bf16, in_fp4=None):
        return [{"val_loss": bf16} | ({"val_loss_fp4": in_fp4} if in_fp4 else {})]
    own = {(arch, high): Rung(arch, "bf16" if high else OWN_RECIPE[arch])
           for arch in OWN_RECIPE for high in (True, False)}
    start = Rung("ngpt", "ngpt", **experiments.PAPERS_START)
    found = {(start, 64, 1): rows(4.0, 4.1)}        # its twin is missing: left out
    for seed, loss in ((1, 4.0), (2, 5.0)):
        for arch, cost in (("gpt", 1.03), ("ngpt", 1.01 * seed)):
            found |= {(own[arch, True], 64, seed): rows(loss), (own[arch, False], 64, seed):
                      rows(loss, cost * loss)}
    del found[own["gpt", False], 64, 2]
    errors = experiments.relative_errors(found)
    assert [(row["arch"], row["seed"], round(row["in_fp4"], 6)) for row in errors] == [
        ("gpt", 1, 0.03), ("ngpt", 1, 0.01), ("ngpt", 2, 1.02)]
    wider = [row | {"width": 128, "in_fp4": 2 * row["in_fp4"]} for row in errors]
    both = experiments.decide(errors + wider, [64, 128])
    assert [(row["width"], row["pairs"]) for row in both] == [(64, 1), (128, 1), ("all", 1)]       # one seed
    assert [row["difference"][0] for row in both] == pytest.approx([0.02, 0.04, 0.03])


def test_what_widths_trains():
    """Every rung has its partner and its twin, with at least as many seeds."""
    for rung, seeds in ON_WIDTHS.items():
        twin = rung._replace(recipe="bf16")
        for other in (experiments.partner(rung), twin) if rung.arch == "ngpt" else (twin,):
            assert all(ON_WIDTHS[other].get(width, 0) >= n for width, n in seeds.items()), other
    gpt, ngpt = (train.load_config([f"configs/{arch}_ladder.py", *at_width(arch, 512)])
                 for arch in ("gpt", "ngpt"))
    assert (gpt.model.n_embd, gpt.model.n_head, gpt.model.n_ffn) == (512, 16, 1536) and set(WIDTHS) >= {512}
    assert (gpt.learning_rate, ngpt.learning_rate) == (1e-3, 2e-3) and ngpt.model.s_z_init == 22.6
    assert [c.max_steps * train.tokens_of(c, 0) for c in (gpt, ngpt)] == [614_400] * 2


@pytest.mark.long
def test_widths(short, tmp_path, monkeypatch, capsys):
    """Two widths, one seed, in processes of their own: gaps are those of analyse(), errors those of the logs.
    Nothing is trained or measured again."""
    four = [rung for rung in ON_WIDTHS if not rung.change and rung.recipe in ("bf16", OWN_RECIPE[rung.arch])]
    monkeypatch.setattr(experiments, "WIDTHS", {32: 1, 64: 1})
    monkeypatch.setattr(experiments, "ON_WIDTHS", dict.fromkeys(four, experiments.WIDTHS))
    argv = ["widths", f"--out_dir={tmp_path}", "--widths=32,64", "--tokens=128", "--channels=16",
            *sizeless(short)]
    run(*argv)
    said = capsys.readouterr().out
    assert "8 to be trained" in said and "8 to be measured" in said
    found = results(tmp_path, "widths")
    o = SimpleNamespace(tokens=128, channels=16, seed=0)
    layers = [row for arch, recipe in (("gpt", "nvfp4"), ("ngpt", "ngpt"))
              for row in analyze.analyse(tmp_path / f"64_{arch}_{recipe}_0", o)["layers"]]
    pair, = analyze.find(found["pairs"], width=64, ngpt="ngpt")
    by_hand, = analyze.against(layers)
    for key in ("gap_db", "eq5_db", "flatness_ratio", "rho_s_gpt", "gain_ngpt"):
        assert pair[key][0] == pytest.approx(by_hand[key][0], rel=1e-3, abs=1e-4), key  # six digits in a file
    bf16, fp4 = (log_of(tmp_path / f"32_gpt_{name}_0", key)[-1]
                 for name, key in (("bf16", "val_loss"), ("nvfp4", "val_loss_fp4")))
    row, = analyze.find(found["errors"], width=32, arch="gpt")
    assert row["in_fp4"] == pytest.approx(fp4 / bf16 - 1, rel=1e-3, abs=1e-6)
    shutil.rmtree(tmp_path / "64_ngpt_bf16_0")
    (tmp_path / "32_gpt_bf16_0" / "analysis.json").unlink()
    run(*argv)
    said = capsys.readouterr().out
    assert "7 runs are complete, 1 to be" in said and "6 runs are measured, 2 to be" in said
    assert results(tmp_path, "widths")["pairs"] == found["pairs"]


@pytest.mark.long
def test_a_ladder_that_is_stopped_goes_on(short, tmp_path):
    """SIGTERM to it alone: the runs under way save and end, no other begins, and none is left behind."""
    argv = [sys.executable, REPO / "assets" / "experiments.py", "recipes", f"--out_dir={tmp_path}",
            "--seeds=1", "--rows=gpt/nvfp4", "--processes=2", *short, "--max_steps=100000",
            "--checkpoint_interval=100000"]
    process = subprocess.Popen(argv, cwd=tmp_path.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    folders = [tmp_path / f"gpt_{name}_0" for name in ("bf16", "nvfp4")]
    while not all((folder / "metrics.jsonl").exists() and log_of(folder, "loss") for folder in folders):
        time.sleep(0.2)
        assert process.poll() is None
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "the same command goes on" in said
    assert all((folder / "ckpt.pt").exists() for folder in folders) and len(list(tmp_path.iterdir())) == 2


WRONG = {
    ("layers",): "layers: must be one of recipes, widths, lr, onelayer",
    ("lr", "out/gpt"): "lr out/gpt: must be one of",
    ("lr", "--rates=fast"): "learning_rate='fast' must be a number",
    ("lr", "--stop_at=3"): "--stop_at=3: an experiment stops and resumes by itself; leave it out",
    ("recipes", "--seeds=0"): "--seeds, --processes",
    ("recipes", "--rows=no/such"): "--rows=no/such: no such row",
    ("widths", "--widths=wide"): "--widths=wide: must be multiples of 32",
    ("widths", "--widths=96"): "--widths=96: must be of 64, 128, 256, 512, 1024",
    ("widths", "--n_embd=64"): "--n_embd=64: follows from the width",
}


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_wrong_input_is_one_line(tmp_path, wrong):
    assert WRONG[wrong] in refusal(*wrong, f"--out_dir={tmp_path}")
