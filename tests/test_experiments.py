"""Proofs for assets/experiments.py: which runs an experiment trains, that it trains none again, and its
numbers against the logs of tiny runs."""
import json
import math
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import analyze
import train
from assets import experiments
from assets.experiments import Rung
from data.run import STOPPED, Stop
from runs import REPO, refusal_of
from test_analyze import log_of, results

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def short(tiny):
    """Flags of a tiny run, but for its folder."""
    return [flag for flag in tiny("", n_ffn=64, max_steps=4) if not flag.startswith("--out_dir")]


def run(*argv):
    experiments.main([str(argument) for argument in argv])


def refusal(*argv):
    return refusal_of(experiments.main, argv)


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
    run(*argv, "--rows=gpt/bf16")                   # nothing to compare, and no panel
    assert trained(capsys) == (2, 0) and len(results(tmp_path, "recipes")["results"]) == 1
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


def test_a_panel_of_one_seed_and_of_a_run_without_fp4():
    """One seed has no error, and a run without a layer in FP4 no gap there."""
    rows = [{"recipe": "nvfp4", "gap": (0.1, math.nan), "gap_in_fp4": (0.2, math.nan), "error": math.nan,
             "seeds": 1},
            {"recipe": "all of it a tail", "gap": (0.3, math.nan), "gap_in_fp4": (math.nan, math.nan),
             "error": math.nan, "seeds": 1}]
    assert experiments.steps("gpt", rows)[-1]["xticks"] == [-0.3, -0.1, 0, 0.1, 0.3]    # 0.15 in one digit


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


def test_sums_of_gemms(short, tmp_path, monkeypatch):
    """Blackwell's differ from exact ones, by little; the run is a run, and is not trained again."""
    argv = ["accumulation", f"--out_dir={tmp_path}", *short]
    run(*argv)
    rows = json.loads((tmp_path / "accumulation.json").read_text())["results"]
    assert [row["sums"] for row in rows] == ["exact", "Blackwell", "fp32"] and rows[0]["weights"] == 0
    assert all(0 < row["weights"] < 1e-2 for row in rows[1:])
    assert rows[0]["loss"] == pytest.approx(log_of(tmp_path / "accumulation_exact", "val_loss")[-1], rel=1e-5)
    monkeypatch.setattr(train, "train", None)
    run(*argv)
    assert json.loads((tmp_path / "accumulation.json").read_text())["results"] == rows


# ---------------------------------------------------------------- the claim

START, OTHER = experiments.STARTS[0], experiments.STARTS[2]


@pytest.mark.parametrize("losses, tried", [
    ({1: 3.0, 2: 2.0, 4: 3.0}, [1, 2, 4]),                                      # between two: done
    ({1: 3.0, 2: 2.0, 4: 1.0, 8: 0.5, 16: 0.7}, [1, 2, 4, 8, 16]),
    ({1: 1.0, 2: 2.0, 4: 3.0, 0.5: 1.5}, [1, 2, 4, 0.5]),
    ({1: 1.0, 2: math.nan, 4: math.nan, 0.5: 1.5}, [1, 2, 4, 0.5]),             # two diverge
    ({2.0**i: -i for i in range(20)}, [1, 2, 4, 8, 16, 32, 64])])               # no end: given up
def test_rates_are_tried_until_the_best_lies_between_two(monkeypatch, capsys, losses, tried):
    """Made-up losses; other seeds at the best rate alone."""
    runs, o = [], SimpleNamespace(seed=1, seeds=2)
    monkeypatch.setattr(experiments, "of_claim", lambda width, start, rate, seed, *_: SimpleNamespace(
        out_dir="", max_steps=8, rate=rate, seed=seed))

    def measured(c, step, o):
        if math.isnan(losses[c.rate]):
            runs.append((c.rate, c.seed))
            raise train.Diverged("step 3: loss nan")
        if step == 8:
            runs.append((c.rate, c.seed))
        return [{"step": step, "loss": losses[c.rate]}]
    monkeypatch.setattr(experiments, "at_step", measured)
    rows = experiments.of_start(1, START._replace(rate=2), o, [])
    best = min((losses[rate], rate) for rate in tried)[1]
    assert runs == [*((rate, 1) for rate in tried), (best, 2)]
    assert {row["rate"] for row in rows if row["best"]} == {best}
    assert ("lies at an edge" in capsys.readouterr().out) == (len(tried) == experiments.MOST_RATES)
    assert [row["step"] for row in rows if (row["rate"], row["seed"]) == (best, 2)] == [2, 4, 8]


def test_what_the_claim_trains(tmp_path):
    o = SimpleNamespace(out_dir=str(tmp_path), config="ladder")
    data = ["--dataset=sotu", "--vocab_size=4096"]
    if not (REPO / "data/sotu/val.bin").exists():
        pytest.skip("the default text is not prepared")
    for start, name, value in ((experiments.STARTS[0], "init_std", 0.02),
                               (experiments.STARTS[1], "init_std", 0.0625), (OTHER, "s_z_init", 16.0),
                               (experiments.STARTS[3], "alpha_init", 0.05)):
        c = experiments.of_claim(256, start, 1e-3, 7, o, data)
        assert getattr(c.model, name) == value and (c.model.n_embd, c.learning_rate, c.seed) == (256, 1e-3, 7)
        assert c.recipe == "bf16" and c.warmup_steps == (30 if start.arch == "gpt" else 0)
        n = c.eval_iters * c.batch_size * c.model.block_size
        assert c.weight_decay == 0.1 * (start.arch == "gpt")
        assert 0.95 < n / len(train.load_data("sotu", 256).val) <= 1            # all of it


def test_gaps_are_of_best_rates_and_of_equal_shares():
    """Made-up rows: one layer of each of two types."""
    def rows(arch, name, rate, share, dot, best=True, seed=1, step=8):
        return [{"width": 64, "arch": arch, "recipe": name, "rate": rate, "seed": seed, "step": step,
                 "best": best, "layer": f"blocks.{i}.mixer.{layer}", "dot": dot + i, "initial": share}
                for i, layer in enumerate(("qkv", "fc1"))]
    layers = [*rows("gpt", "a", 1e-3, 0.5, 10.0), *rows("gpt", "a", 1e-3, 0.5, 12.0, seed=2),
              *rows("gpt", "a", 2e-3, 0.2, 14.0, best=False), *rows("ngpt", "b", 1e-3, 0.22, 15.0),
              *rows("ngpt", "b", 1e-3, 0.22, 16.0, seed=2), *rows("ngpt", "b", 1e-3, 0.9, 1.0, step=4)]
    keys = ("width", "arch", "recipe", "rate", "seed", "step", "best")
    points = analyze.summary(layers, keys, np.mean)
    best, share = experiments.gaps(layers, points)
    assert {row["layer"]: row["gap_db"][0] for row in best} == {"qkv": 4.5, "fc1": 4.5, "all": 4.5}
    assert best[0]["gap_db"][1] == pytest.approx(0.5**0.5)                      # 5 and 4
    row, = share                                    # a GPT of another rate has forgotten as much
    assert row["pairs"] == 2 and row["gap_db"][0] == 1.5 and row["initial"][0] == pytest.approx(0.22)


def test_only_layers_that_both_have_are_compared(monkeypatch, tmp_path):
    """GPT's tail is in BF16: nGPT's last layer has no partner, and would move nGPT's mean from 2 to 5."""
    def of_start(width, start, o, flags):
        dots = {"gpt": [1.0, 3.0], "ngpt": [1.0, 3.0, 11.0]}[start.arch]
        return [{"width": width, "arch": start.arch, "recipe": start.name, "rate": 1.0, "seed": 0, "step": 1,
                 "best": True, "layer": f"blocks.{i}.mixer.out", "dot": dot} for i, dot in enumerate(dots)]
    seen = []
    monkeypatch.setattr(experiments, "of_start", of_start)
    monkeypatch.setattr(experiments, "report_claim", lambda rows, points, *_: seen.extend(points))
    run("claim", "--processes=1", f"--out_dir={tmp_path}")
    assert [point["dot"] for point in seen] == [2.0] * len(experiments.STARTS)


@pytest.mark.long
def test_the_claim(short, tmp_path, capsys):
    """Two starts, a process each, two seeds. Nothing is trained or measured again."""
    own = "--n_embd", "--n_head", "--n_ffn", "--learning", "--eval"
    flags = [flag for flag in short if not flag.startswith(own)]
    argv = ["claim", f"--out_dir={tmp_path}", "--widths=32", "--tokens=128", "--channels=16", "--seeds=2",
            "--processes=2", "--rows=gpt/std 0.02,ngpt/ours", *flags]
    run(*argv)
    said = capsys.readouterr().out
    assert "TFLOP at least, 2 processes" in said and "by type of layer" in said
    found = results(tmp_path, "claim")
    ends = analyze.find(found["points"], arch="ngpt", step=4, seed=0)
    best = min(ends, key=lambda row: row["loss"])
    assert best["best"] and len(ends) >= 3 and best["rate"] not in (min(r["rate"] for r in ends),
                                                                    max(r["rate"] for r in ends))
    assert len(analyze.find(found["points"], arch="ngpt", step=4, seed=1)) == 1
    times = {path: path.stat().st_mtime for path in tmp_path.glob("*/ckpt.pt")}
    run(*argv)
    assert times == {path: path.stat().st_mtime for path in tmp_path.glob("*/ckpt.pt")}
    assert results(tmp_path, "claim")["points"] == found["points"]


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
    ("layers",): "layers: must be one of recipes, claim, lr, onelayer, accumulation",
    ("lr", "out/gpt"): "lr out/gpt: must be one of",
    ("lr", "--rates=fast"): "learning_rate='fast' must be a number",
    ("lr", "--stop_at=3"): "--stop_at=3: an experiment stops and resumes by itself; leave it out",
    ("recipes", "--seeds=0"): "--seeds, --processes",
    ("recipes", "--rows=no/such"): "--rows=no/such: no such row",
    ("claim", "--widths=wide"): "--widths=wide: must be multiples of 32",
    ("claim", "--n_embd=64"): "--n_embd=64: the experiment sets it",
    ("onelayer", "--widths=64", "--n_embd=64"): "--n_embd=64: follows from the width",
    ("claim", "--rows=gpt"): "--rows=gpt: no such row; the rows are gpt/std 0.02, gpt/std C^-0.5, ngpt/ours",
}


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_wrong_input_is_one_line(tmp_path, wrong):
    assert WRONG[wrong] in refusal(*wrong, f"--out_dir={tmp_path}")
