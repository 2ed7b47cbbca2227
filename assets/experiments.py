"""Experiments that train many runs, measure them as analyze.py does, and compare them.

    python assets/experiments.py recipes --rows="gpt/*" --seeds=3   the ladder: what each recipe costs
    python assets/experiments.py claim --widths=256                 what averages noise: rates, starts, shares
    python assets/experiments.py lr --max_steps=150 --n_embd=64     learning rates, in bf16 and FP4 (fig. 6a)
    python assets/experiments.py onelayer --max_steps=200           one MLP trained alone (fig. 7)
    python assets/experiments.py accumulation --max_steps=200       GEMMs that add up as Blackwell's do
    python assets/experiments.py -h                                 this text and the options

Other flags are train.py's, and hold for every run. Each run has a folder in out_dir. The same command goes on
with an experiment that was stopped: it resumes runs that were begun, and trains none that is complete.

Figures are those of 2605.06067.
"""
import contextlib
import io
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whatever the current folder

import analyze
import nvfp4
import train
from analyze import (COLUMNS, analyse, find, over_seeds, pairs_of, progress, read_command, read_run,
                     shared_layers, summary, table, type_of, write)
from assets.figures import curves
from data.run import (STOPPED, Stop, UserError, catch_signals, command, load_checkpoint, newest_checkpoint,
                      read_json, write_json)
from data.tokens import load_data, prepare_missing
from model import flops_per_token, outline
from papers import tensor_core_sum
from train import OWN_RECIPE

# ---------------------------------------------------------------- processes

def run_all(commands, at_once, stop, **environment):
    """Run commands, {key: argv}, so many at once; yields (key, exit status, last line of stderr) as they end.
    When a Stop says so, no other command begins. Those under way get a SIGTERM, and we wait for them.
    """
    queue, running = list(commands), {}
    while running or queue and not stop.why:
        while queue and not stop.why and len(running) < at_once:
            key, said = queue.pop(0), tempfile.TemporaryFile()
            running[key] = said, subprocess.Popen(commands[key], stdout=subprocess.DEVNULL, stderr=said,
                                                  env=os.environ | environment)
        if stop.why:
            for _, process in running.values():
                process.terminate()                 # once: a terminal sends each process a signal too
            for _, process in running.values():
                process.wait()
        for key, (said, process) in list(running.items()):
            if process.poll() is not None:
                said.seek(0)
                lines = said.read().decode(errors="replace").splitlines()
                del running[key]
                yield key, process.returncode, lines[-1] if lines else ""
        time.sleep(0.1)


def do_all(commands, costs, o, result):
    """Run commands, {folder: argv}, o.processes at a time, each with its part of the cores. Prints a line for
    each that ends, with result(folder), and how long the others will take by their costs.

    returns the error of the first that failed, or ""
    raises  SystemExit(75) where a signal stopped it
    """
    stop, start, error, left = Stop(), time.monotonic(), "", dict(costs)
    threads = str(max(1, (os.cpu_count() or 1) // o.processes))
    with catch_signals(stop):
        ended = run_all(commands, o.processes, stop, OMP_NUM_THREADS=threads)
        for n, (folder, status, said) in enumerate(ended, 1):
            found = result(folder) if status == 0 else f"exit status {status}: {said}"
            error = error or found * (status != 0)
            del left[folder]
            more = sum(left.values()) / (sum(costs.values()) - sum(left.values()))
            print(f"{n}/{len(commands)} {folder}: {found}, eta "
                  f"{train.clock((time.monotonic() - start) * more)}", flush=True)
    if stop.why:
        print(f"{stop.why}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    return error


# ---------------------------------------------------------------- the runs of an experiment

def refuse(flags, names, why):
    """UserError for a flag of train.py that the experiment sets itself."""
    for flag in flags:
        if flag.lstrip("-").partition("=")[0] in names:
            raise UserError(f"{flag}: {why}; leave it out")


def a_run(name, arch, o, flags):
    """(flags of train.py for a run of an experiment, in a folder of its own; its Config)"""
    refuse(flags, ("stop_at", "resume", "out_dir"), "an experiment stops and resumes by itself")
    folder = f"{o.out_dir}/{name.replace(' ', '_')}"
    argv = [f"configs/{arch}_{o.config}.py", *flags, "--sample_tokens=0", f"--out_dir={folder}"]
    return argv, train.load_config(argv)


def begun(c):
    """The run of a Config as read_run() has it, or None. UserError if its folder holds another run, or one
    evaluated on other batches."""
    if not newest_checkpoint(c.out_dir).exists():
        return None
    run, wanted = read_run(c.out_dir), train.flatten(c)
    wanted["warmup_steps"] = min(c.warmup_steps, c.max_steps)
    for name, there in run["config"].items():
        if wanted.get(name) not in (None, there) and (name not in train.WATCHING or name == "eval_iters"):
            raise UserError(f"{c.out_dir} holds a run with {name}={there}, not {wanted[name]}; give another "
                            "--out_dir")
    return run


def finished(c):
    """The rows of metrics.jsonl of a Config's run, if it is complete and so is its checkpoint, or None."""
    run = begun(c)
    rows = run["steps"] + run["evaluations"][-1:] if run else []
    if not rows or rows[-1]["step"] != c.max_steps:
        return None
    return rows if load_checkpoint(newest_checkpoint(c.out_dir))["step"] == c.max_steps else None


def flops_of(c):
    """FLOPs of a run, by its Config."""
    sizes = outline(replace(c.model, vocab_size=c.model.vocab_size or 1))
    return sum(train.tokens_of(c, step) for step in range(c.max_steps)) * flops_per_token(sizes)


def train_all(runs, o):
    """Train runs, {key: a_run()}, but for those that are complete.

    returns {key: rows of its metrics.jsonl, the last its last evaluation}, without the runs that failed;
            their errors are printed
    raises  UserError if no run succeeded
    """
    by_folder, commands, costs = {c.out_dir: c for _, c in runs.values()}, {}, {}
    rows = {folder: finished(c) for folder, c in by_folder.items()}
    for argv, c in runs.values():
        if not rows[c.out_dir]:
            resume = ["--resume"] * newest_checkpoint(c.out_dir).exists()
            commands[c.out_dir] = [sys.executable, train.__file__, *argv, *resume]
            costs[c.out_dir] = flops_of(c)
    print(f"{len(runs) - len(commands)} runs are complete, {len(commands)} to be trained, {o.processes} at a "
          f"time: {sum(costs.values()) / 1e12:,.0f} TFLOP", flush=True)

    def result(folder):
        rows[folder] = finished(by_folder[folder])
        last = rows[folder][-1]
        return ", ".join(f"{name} {last[name]:.4f}" for name in last if name.startswith("val_loss"))
    error = do_all(commands, costs, o, result)
    if not any(rows.values()):
        raise UserError(f"no run succeeded; the first ended with {error}")
    return {key: rows[c.out_dir] for key, (_, c) in runs.items() if rows[c.out_dir]}


# ---------------------------------------------------------------- learning rates, and one MLP

def lr(o, flags):
    """Fig. 6a: final loss against the learning rate, in bf16 and in the architecture's FP4 recipe."""
    rates, rows, runs = o.rates.split(","), [], {}
    for arch, high, rate in itertools.product(OWN_RECIPE, (True, False), rates):
        recipe = "bf16" if high else OWN_RECIPE[arch]
        runs[arch, recipe, rate] = a_run(f"lr_{rate}_{arch}_{recipe}", arch, o, [
            *flags, f"--recipe={recipe}", f"--seed={o.seed}", f"--learning_rate={rate}"])
    found = train_all(runs, o)
    for arch, recipe, rate in runs:                 # a failure is a result too: the rate is too high
        last = found.get((arch, recipe, rate), [{}])[-1]
        loss = last.get("val_loss" if recipe == "bf16" else "val_loss_fp4", math.nan)
        rows.append({"arch": arch, "recipe": recipe, "rate": float(rate), "loss": loss})
    print("final validation loss in nats, of FP4 runs in FP4; -: failed, its line says why")
    table(rows, {"arch": "", "recipe": "", "rate": "g", "loss": ".4f"})
    write(o, "lr", {"flags": flags, "results": rows}, [
        ("Fig. 6a  learning rates", "peak learning rate", "final validation loss, nats a token",
         curves(rows, "rate", "loss"), {"xscale": "log", "xticks": [float(rate) for rate in rates]})])


AT_WIDTH = ("--max_steps=300", "--eval_interval=300", "--eval_iters=32")
RATES = {"gpt": 0.512, "ngpt": 1.024}               # peak rate times width: the best at 64 and 256 (LOG.md)


def at_width(arch, width):
    """Flags of train.py for a model of this width, four layers and heads of 32."""
    flags = [*AT_WIDTH, f"--n_embd={width}", f"--n_head={width // 32}", f"--n_ffn={3 * width}",
             f"--learning_rate={RATES[arch] / width:.3g}"]
    return flags + {"gpt": ["--warmup_steps=30"], "ngpt": [f"--s_z_init={math.sqrt(width):.3g}"]}[arch]


def asked_widths(o, flags):
    """The widths that --widths asks for, or none."""
    found = o.widths.split(",") if o.widths else []
    if len({*found}) < len(found) or not all(width.isdecimal() and int(width) % 32 == 0 < int(width)
                                             for width in found):
        raise UserError(f"--widths={o.widths}: must be multiples of 32 with commas between them, as 64,128")
    if found:
        refuse(flags, ("n_embd", "n_head", "n_ffn"), "follows from the width")
    return [int(width) for width in found]


def at_step(c, step, o):
    """Rows of the layers of a run at this step. We train it so far, and keep the rows in its folder."""
    run, path = begun(c), Path(c.out_dir, f"probes_{step}_{o.tokens}_{o.channels}.json")
    if not path.exists():
        if not run or load_checkpoint(newest_checkpoint(c.out_dir))["step"] < step:
            stop = Stop()
            with contextlib.redirect_stdout(io.StringIO()), catch_signals(stop):
                train.train(replace(c, stop_at=step, resume=bool(run)), stop)
            if stop.at is not None:
                print(f"{stop.why}: stopped; the same command goes on", file=sys.stderr)
                sys.exit(STOPPED)
        last = read_run(c.out_dir)["evaluations"][-1]
        if last["step"] != step:
            raise UserError(f"{c.out_dir}: is at step {last['step']}, not measured at {step}; remove it")
        last = {"step": step, "loss": last["val_loss"]}
        write_json(path, {"layers": [row | last for row in analyse(c.out_dir, o)["layers"]]})
    return read_json(path)["layers"]


def onelayer(o, flags):
    """Fig. 7: loss and rho of embedding, one MLP and head, trained in bf16. It stops for the probes."""
    rows, parts = [], (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    for width, arch in itertools.product(asked_widths(o, flags) or [None], OWN_RECIPE):
        name, size = (f" {width}", at_width(arch, width)) if width else ("", [])
        _, c = a_run(f"onelayer {arch} bf16{name}", arch, o, [
            *size, *flags, "--pattern=-", "--recipe=bf16", f"--seed={o.seed}"])
        for part in progress(parts, f"onelayer {arch}{name}"):
            rows += at_step(c, math.ceil(part * c.max_steps), o)
    rows = summary(rows, ("arch", "recipe", "width", "step"), np.mean)
    print("embedding, one MLP and head: validation loss in nats; means of the two linear layers")
    table(rows, {"arch": "", "width": "", "step": "", "loss": ".4f"} | COLUMNS)
    widest, last = (find(rows, **{key: max(row[key] for row in rows)}) for key in ("width", "step"))
    panels = [(f"Fig. 7  one MLP: {key}", "optimizer step", label, curves(widest, "step", key), {})
              for key, label in (("loss", "validation loss, nats a token"),
                                 ("rho_s", "rho_s, mean of 2 layers"))]
    sizes = sorted({row["width"] for row in last})
    if len(sizes) > 1:
        panels.append(("one MLP: averaging gain", "width", "SNR(dot) / SNR(products), dB",
                       curves(last, "width", "gain"), {"xscale": "log", "xticks": sizes}))
    write(o, "onelayer", {"flags": flags, "results": rows}, panels)


# ---------------------------------------------------------------- the ladder of recipes

class Rung(NamedTuple):
    """A row of the ladder: an architecture, a recipe, and a change of it."""
    arch: str
    recipe: str
    change: str = ""                                # in words
    flags: str = ""                                 # the change as flags of train.py
    tokens: float = 1.0                             # in units of the tokens that other rungs see

    def __str__(self):
        return f"{self.recipe} {self.change}".strip()


def of_rung(rung, seed, name, o, flags):
    """a_run() of a rung"""
    more = [*flags, *rung.flags.split(), f"--recipe={rung.recipe}", f"--seed={seed}"]
    argv, c = a_run(name, rung.arch, o, more)
    if rung.tokens == 1:
        return argv, c
    return a_run(name, rung.arch, o, [*more, f"--max_steps={round(rung.tokens * c.max_steps)}"])


def rows_of(table, o):
    """Those of {name: row} that --rows names."""
    found = [row for name, row in table.items() if any(fnmatch(name, glob) for glob in o.rows.split(","))]
    if not found:
        raise UserError(f"--rows={o.rows}: no such row; the rows are {', '.join(table)}")
    return found


# The rungs of `recipes`. Each is compared with the bf16 run of its architecture and seed.
LADDER = (
    Rung("gpt", "bf16"), Rung("gpt", "nvfp4"), Rung("gpt", "nvfp4_46"), Rung("gpt", "quartet2"),
    Rung("gpt", "fp4_all_the_way"), Rung("gpt", "fp4_dge_occ"), Rung("gpt", "mxfp4"),
    Rung("gpt", "mxfp4_h16"), Rung("gpt", "ngpt"), Rung("gpt", "mxfp4", "1.36x tokens", tokens=1.36),
    Rung("gpt", "nvfp4", "all nearest", "--fp4_stochastic="),
    Rung("gpt", "nvfp4", "no rotation", "--fp4_hadamard="),
    Rung("gpt", "nvfp4", "no squares", "--fp4_square_weights=False"),
    Rung("gpt", "nvfp4", "no tail", "--fp4_tail=0"),
    Rung("ngpt", "bf16"), Rung("ngpt", "ngpt"), Rung("ngpt", "nvfp4"), Rung("ngpt", "mxfp4"),
    Rung("ngpt", "quartet2"), Rung("ngpt", "fp4_dge_occ"),
    Rung("ngpt", "ngpt", "all nearest", "--fp4_stochastic="),
    Rung("ngpt", "ngpt", "rotated", "--fp4_hadamard=wgrad"),
    Rung("ngpt", "ngpt", "measured scales", "--fp4_input_amax=None --fp4_weight_amax=None"),
    Rung("ngpt", "ngpt", "with a tail", "--fp4_tail=0.15"),
)


def recipes(o, flags):
    """The ladder: the cost of each recipe, and of each ingredient of two of them. Runs of one seed have the
    same start and the same data in the same order, so we compare each with bf16 of its seed."""
    wanted = rows_of({f"{rung.arch}/{rung}": rung for rung in LADDER}, o)
    chosen = [rung for rung in LADDER if rung in wanted or rung.recipe == "bf16"
              and rung.arch in {other.arch for other in wanted}]
    runs, rows = {}, []
    for seed, rung in itertools.product(range(o.seed, o.seed + o.seeds), chosen):
        runs[rung, seed] = of_rung(rung, seed, f"{rung.arch} {rung} {seed}", o, flags)
    found = train_all(runs, o)
    for (rung, seed), mine in found.items():
        bf16 = found.get((Rung(rung.arch, "bf16"), seed))
        if bf16:
            last, twin = mine[-1], bf16[-1]["val_loss"]
            ms, ms_twin = (np.percentile([row["ms"] for row in run[:-1]], 10) for run in (mine, bf16))
            rows.append({"arch": rung.arch, "recipe": str(rung), "seed": seed, "loss": last["val_loss"],
                         "gap": last["val_loss"] - twin, "cost": float(ms / ms_twin),
                         "gap_in_fp4": last.get("val_loss_fp4", math.nan) - twin})
    final = over_seeds(rows, "arch", "recipe")
    for row in final:
        row["seeds"] = len(find(rows, arch=row["arch"], recipe=row["recipe"]))
        row["error"] = row["gap"][1] / math.sqrt(row["seeds"])
    print("final validation loss in nats, evaluated in bf16; its gap to bf16 of the same seed, the standard "
          "error of\nthe mean gap; the gap evaluated in FP4; time of a step, of bf16's; below: standard "
          "deviations over seeds")
    table(final, {"arch": "", "recipe": "", "seeds": "", "loss": ".4f", "gap": "+.4f", "error": ".4f",
                  "gap_in_fp4": "+.4f", "cost": ".2f"})
    panels = {arch: [row for row in find(final, arch=arch) if row["recipe"] != "bf16"]
              for arch in dict.fromkeys(rung.arch for rung in chosen)}
    write(o, "recipes", {"flags": flags, "results": final, "runs": rows}, [
        steps(arch, mine) for arch, mine in panels.items() if mine])


FAR = 5                                             # times the median gap: the picture leaves it out


def steps(arch, final):
    """A panel of the ladder: the gaps of an architecture's recipes, with their standard errors."""
    far = FAR * np.median([abs(row["gap"][0]) for row in final])
    final = [row for row in final if abs(row["gap"][0]) <= far]
    # NaN: the error of one seed, the gap in FP4 of a run without a layer in FP4
    widest = np.nanmax([abs(row[key][0]) + np.nan_to_num(row["error"])
                        for row in final for key in ("gap", "gap_in_fp4")])
    places = list(range(len(final), 0, -1))
    marks = [([row[key][0] for row in final], places, look | {
        "xerr": [row[key][1] / math.sqrt(row["seeds"]) for row in final], "linestyle": ""})
        for key, look in (("gap", {"marker": "o", "label": "evaluated in BF16", "color": "black"}),
                          ("gap_in_fp4", {"marker": "x", "label": "in FP4", "color": "gray"}))]
    return (arch.replace("gpt", "GPT"), "validation loss above BF16's, nats", "", marks,
            {"yticks": places, "yticklabels": [row["recipe"] for row in final],
             "xticks": [float(f"{part * widest:.1g}") for part in (-1, -0.5, 0, 0.5, 1)]})


# ---------------------------------------------------------------- the claim, asked so that it can fail

class Start(NamedTuple):
    """How a model begins, and the middle of its peak learning rates, times width."""
    arch: str
    name: str
    flags: Callable                                 # width -> flags of train.py
    rate: float

    def __str__(self):
        return f"{self.arch}/{self.name}"


# GPT with the usual standard deviation of weights, and with one that makes rows as long as nGPT's
STARTS = (
    Start("gpt", "std 0.02", lambda C: ["--init_std=0.02"], 0.256),
    Start("gpt", "std C^-0.5", lambda C: [f"--init_std={C**-0.5:.4g}"], 0.256),
    Start("ngpt", "ours", lambda C: [f"--s_z_init={C**0.5:.3g}", "--alpha_init=0.4"], 1.024),
    Start("ngpt", "paper", lambda C: ["--s_z_init=1", "--alpha_init=0.05"], 1.024),
)
STOPS = 1 / 4, 1 / 2, 1                             # parts of a run after which it is measured
MOST_RATES = 7


def claim(o, flags):
    """Does nGPT average more noise away than GPT, each at its own best rate? And at an equal share of the
    initial weight? Each start is trained in bf16 at three rates and more, until the best lies between two; at
    the best from more seeds. Loss is that of all of the validation text."""
    refuse(flags, ("n_embd", "n_head", "n_ffn", "learning_rate", "warmup_steps", "eval_interval",
                   "eval_iters", "recipe", "init_std", "s_z_init", "alpha_init"), "the experiment sets it")
    chosen = rows_of({str(start): start for start in STARTS}, o)
    places = list(itertools.product(asked_widths(o, flags) or [256], chosen))
    if len(places) > 1 and o.processes > 1:         # a process each; here we read then what they found
        commands = {f"{o.out_dir}/{width} {start}": [
            sys.executable, __file__, "claim", f"--rows={start}", f"--widths={width}", "--processes=1",
            *(f"--{name}={getattr(o, name)}" for name in ("out_dir", "config", "tokens", "channels", "seed",
                                                          "seeds")), *flags] for width, start in places}
        # of three rates, and of the other seeds at the best of them
        costs = {place: (2 + o.seeds) * flops_of(of_claim(width, start, start.rate / width, o.seed, o, flags))
                 for place, (width, start) in zip(commands, places, strict=True)}
        print(f"{sum(costs.values()) / 1e12:,.0f} TFLOP at least, {o.processes} processes", flush=True)
        error = do_all(commands, costs, o, lambda place: "measured")
        if error:
            raise UserError(error)
    rows = [row for width, start in places for row in of_start(width, start, o, flags)]
    shared = shared_layers(find(rows, arch=arch) for arch in {row["arch"] for row in rows})
    rows = [row for row in rows if row["layer"] in shared]                      # without GPT's tail in BF16
    points = summary(rows, ("width", "arch", "recipe", "rate", "seed", "step", "best"), np.mean)
    report_claim(rows, points, o, flags)


def of_claim(width, start, rate, seed, o, flags):
    """The Config of a run of the claim."""
    more = [*at_width(start.arch, width), *start.flags(width), "--recipe=bf16", f"--seed={seed}",
            *flags, f"--learning_rate={rate:.4g}"]
    _, c = a_run(f"claim {width} {start.arch} {start.name} {rate:.4g} {seed}", start.arch, o, more)
    prepare_missing(c.dataset)
    val = load_data(c.dataset, c.model.block_size, c.model.vocab_size).val
    n_val = max(1, len(val) // (c.batch_size * c.model.block_size))
    return replace(c, eval_iters=n_val, eval_interval=c.max_steps,
                   warmup_steps=c.max_steps // 10 if start.arch == "gpt" else 0)


def of_start(width, start, o, flags):
    """Rows of the layers of all runs of a start at a width, at each of STOPS; best: of the best rate."""
    rows, losses = {}, {}

    def measure_run(rate, seed):
        c = of_claim(width, start, rate, seed, o, flags)
        mine = {"recipe": start.name, "rate": rate, "seed": seed}
        try:
            rows[rate, seed] = [row | mine for part in STOPS
                                for row in at_step(c, math.ceil(part * c.max_steps), o)]
        except train.Diverged as error:             # a result too: the rate is too high
            print(error, flush=True)
            return math.inf
        print(f"{c.out_dir}: loss {rows[rate, seed][-1]['loss']:.4f}", flush=True)
        return rows[rate, seed][-1]["loss"]
    middle = start.rate / width
    wanted = [middle / 2, middle, 2 * middle]
    while wanted and len(losses) < MOST_RATES:
        losses |= {rate: measure_run(rate, o.seed) for rate in wanted}
        best = min(losses, key=losses.get)
        wanted = [best / 2] if best == min(losses) else [2 * best] if best == max(losses) else []
    if not min(losses) < best < max(losses):
        print(f"{start} at width {width}: the best of {len(losses)} rates, {best:.4g}, lies at an edge",
              flush=True)
    for seed in range(o.seed + 1, o.seed + o.seeds):
        measure_run(best, seed)
    return [row | {"best": rate == best} for (rate, _), some in rows.items() for row in some]


def report_claim(rows, points, o, flags):
    """Tables and a picture: all rates; the best over time; gaps at the best rates and at equal shares."""
    last = [row for row in points if row["step"] == max(other["step"] for other in points)]
    columns = {name: COLUMNS[name] for name in ("dot", "gain", "gain_old", "gain_new", "rho_s")}
    columns = {"loss": ".4f", "initial": ".0%", **columns, "growth": ".4f"}
    head = {"width": "", "arch": "", "recipe": "", "rate": ".2e"}
    print("all rates, at the end, of the first seed: loss on all of the validation text; means of the layers")
    table(find(last, seed=o.seed), head | {"best": ""} | columns)
    print("\nat the best rates, as training goes on; below: deviations over seeds")
    table(over_seeds(find(points, best=True), "step", *head), {"step": ""} | head | columns)
    at_best, at_share = gaps(rows, points)
    print("\nnGPT over GPT, SNR of the dot products in dB, each at its best rate: by type of layer")
    table(at_best, {"width": "", "ngpt": "", "gpt": "", "layer": "", "gap_db": "+.2f"})
    print(f"\nthe same of all pairs of runs whose shares of the initial weight differ by {NEAR:.0%} at most")
    table(at_share, {"width": "", "ngpt": "", "gpt": "", "pairs": "", "initial": ".0%", "gap_db": "+.2f"})
    width = max(row["width"] for row in points)
    ends, ways = find(last, width=width, seed=o.seed), find(points, width=width)
    write(o, "claim", {"flags": flags, "points": points, "best": at_best, "equal_share": at_share}, [
        (f"width {width}", "peak learning rate", "validation loss, nats", curves(ends, "rate", "loss"),
         {"xscale": "log"}),
        ("rates, and times of training", "share of the initial weight", "averaging gain, dB",
         curves(ways, "initial", "gain", linestyle=""), {}),
        ("of what was learned alone", "share of the initial weight", "averaging gain, dB",
         curves(ways, "initial", "gain_new", linestyle=""), {})])


NEAR = 0.05                                         # shares of the initial weight that count as equal


def gaps(rows, points):
    """(rows of the gap at the best rates, by type of layer; of the mean gap at equal shares)"""
    best, share = [], []
    typed = [row | {"layer": type_of(row["layer"])} for row in find(rows, best=True)]
    typed += [row | {"layer": "all"} for row in typed]
    typed = [row for row in typed if row["step"] == max(other["step"] for other in typed)]
    typed = summary(typed, ("width", "arch", "recipe", "seed", "layer"), np.mean)
    for mine, n, g in pairs_of(typed, "layer", "seed"):
        best.append(mine | {"layer": n["layer"], "seed": n["seed"], "gap_db": n["dot"] - g["dot"]})
    for mine, n, g in pairs_of(points):
        if abs(n["initial"] - g["initial"]) <= NEAR:
            share.append(mine | {"seed": (n["rate"], n["step"], g["rate"], g["step"], n["seed"], g["seed"]),
                                 "initial": n["initial"], "gap_db": n["dot"] - g["dot"]})
    best = over_seeds(best, "width", "ngpt", "gpt", "layer")
    found = over_seeds(share, "width", "ngpt", "gpt")
    for row in found:
        row["pairs"] = len(find(share, width=row["width"], ngpt=row["ngpt"], gpt=row["gpt"]))
    return best, found


# ---------------------------------------------------------------- how a GEMM adds up

WAYS = {"exact": lambda a, b: a.double() @ b.double().t(), "Blackwell": tensor_core_sum,
        "fp32": lambda a, b: a.float() @ b.float().t()}


def accumulation(o, flags):
    """By how much a run differs whose FP4 GEMMs add up as Blackwell's do, or in fp32 in this machine's order,
    from one with exact sums. Each is then scaled and rounded once."""
    rows, weights = [], {}
    for name, way in WAYS.items():
        def gemm(a, b, alpha, dtype, way=way):
            y = way(a, b).double()
            return (y if alpha is None else y * alpha.double()).to(dtype)
        _, c = a_run(f"accumulation {name}", "ngpt", o, [
            *flags, f"--seed={o.seed}", "--device=cpu"])        # where gemm() multiplies
        if not c.fp4.gemms:
            raise UserError(f"--recipe={c.recipe}: has no GEMM in FP4")
        if not finished(c):
            with nvfp4.setting(nvfp4, "gemm", gemm):
                train.train(replace(c, resume=newest_checkpoint(c.out_dir).exists()))
        model, run = train.load_run(c.out_dir)[0], read_run(c.out_dir)
        weights[name] = torch.cat([p.detach().flatten() for p in model.matrices()])
        exact, last = weights["exact"], run["evaluations"][-1]
        rows.append({"sums": name, "loss": last["val_loss"], "in_fp4": last.get("val_loss_fp4", math.nan),
                     "weights": float((weights[name] - exact).norm() / exact.norm())})
    print("final validation loss, in high precision and in FP4; relative difference of the weights from "
          "those of exact sums")
    table(rows, {"sums": "", "loss": ".6f", "in_fp4": ".6f", "weights": ".2e"})
    write(o, "accumulation", {"flags": flags, "results": rows})


# ---------------------------------------------------------------- the command line

COMMANDS = {"recipes": recipes, "claim": claim, "lr": lr, "onelayer": onelayer,
            "accumulation": accumulation}
OPTIONS = analyze.OPTIONS | {
    "config": ("", "runs train configs/{gpt,ngpt}_CONFIG.py: ladder for recipes and claim, else tiny"),
    "seeds": (3, "runs of each row of recipes, from --seed on; of claim: at the best rates"),
    "widths": ("", "of claim: 256; of onelayer: its config's"),
    "rows": ("*", "rows of recipes and claim, as globs: ngpt/*,gpt/nvfp4*"),
    "processes": (1 if torch.cuda.is_available() else os.cpu_count() or 1, "runs at a time"),
    "rates": ("5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2", "peak learning rates of lr")}


@command("experiments.py")
def main(argv):
    words, o, flags = read_command("experiments.py", __doc__, ", ".join(COMMANDS), OPTIONS, argv)
    if len(words) > 1 or words[0] not in COMMANDS:
        raise UserError(f"{' '.join(words)}: must be one of {', '.join(COMMANDS)}")
    if min(o.seeds, o.processes) < 1:
        raise UserError("--seeds, --processes must be 1 or more")
    o.config = o.config or ("ladder" if words[0] in ("recipes", "claim") else "tiny")
    COMMANDS[words[0]](o, flags)


if __name__ == "__main__":
    main(sys.argv[1:])
