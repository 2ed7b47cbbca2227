"""Experiments that train many runs, measure them as analyze.py does, and compare them.

    python assets/experiments.py recipes --rows="gpt/*" --seeds=3   the ladder: what each recipe costs
    python assets/experiments.py widths                             models from 64 to 1024 channels: hours
    python assets/experiments.py lr --max_steps=150 --n_embd=64     learning rates, in bf16 and FP4 (fig. 6a)
    python assets/experiments.py onelayer --max_steps=200           one MLP trained alone (fig. 7)
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
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whatever the current folder

import analyze
import train
from analyze import (COLUMNS, PROBES, against, analyse, find, over_seeds, progress, read_command, read_run,
                     spread, summary, table, write)
from assets.figures import COLOURS, curves
from data.run import (STOPPED, Stop, UserError, catch_signals, command, load_checkpoint, newest_checkpoint,
                      read_json, write_json)
from model import flops_per_token, outline
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
            sizes = outline(replace(c.model, vocab_size=c.model.vocab_size or 1))
            n_tokens = sum(train.tokens_of(c, step) for step in range(c.max_steps))
            costs[c.out_dir] = n_tokens * flops_per_token(sizes)
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


def measure_all(runs, o):
    """The probes of complete runs, {key: a_run()}: {key: rows of their layers, as analyse() has them}. Each
    run's analysis.json lies in its folder, and is made again where o.tokens or o.channels differ."""
    options, commands = {name: getattr(o, name) for name in ("tokens", "channels")}, {}
    rows = {c.out_dir: None for _, c in runs.values()}

    def read(folder):
        path = Path(folder, "analysis.json")
        found = read_json(path) if path.exists() else {"options": {}}
        if options.items() <= found["options"].items():
            rows[folder] = [{k: math.nan if v is None else v for k, v in row.items()}
                            for row in found["measured"]]
            return f"SNR of the dot products {np.mean([row['dot'] for row in rows[folder]]):.2f} dB"
    for folder in rows:
        if not read(folder):
            commands[folder] = [sys.executable, analyze.__file__, folder, f"--out_dir={folder}",
                                *(f"--{name}={value}" for name, value in options.items())]
    print(f"{len(runs) - len(commands)} runs are measured, {len(commands)} to be measured", flush=True)
    do_all(commands, dict.fromkeys(commands, 1), o, read)
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


WIDTHS = {64: 6, 128: 6, 256: 6, 512: 2, 1024: 1}   # and how many seeds at most
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
            with contextlib.redirect_stdout(io.StringIO()):
                train.train(replace(c, stop_at=step, resume=bool(run)))
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
    """The rungs that --rows names."""
    globs = o.rows.split(",")
    found = [rung for rung in table if any(fnmatch(f"{rung.arch}/{rung}", glob) for glob in globs)]
    if not found:
        raise UserError(f"--rows={o.rows}: no such row; the rows are "
                        + ", ".join(f"{rung.arch}/{rung}" for rung in table))
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
    wanted = rows_of(LADDER, o)
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
    write(o, "recipes", {"flags": flags, "results": final, "runs": rows}, [
        steps(arch, [row for row in find(final, arch=arch) if row["recipe"] != "bf16"])
        for arch in dict.fromkeys(rung.arch for rung in chosen)])


FAR = 5                                             # times the median gap: the picture leaves it out


def steps(arch, final):
    """A panel of the ladder: the gaps of an architecture's recipes, with their standard errors."""
    far = FAR * np.median([abs(row["gap"][0]) for row in final])
    final = [row for row in final if abs(row["gap"][0]) <= far]
    widest = max(abs(row["gap_in_fp4"][0]) + row["error"] for row in final)
    places = list(range(len(final), 0, -1))
    marks = [([row[key][0] for row in final], places, look | {
        "xerr": [row[key][1] / math.sqrt(row["seeds"]) for row in final], "linestyle": ""})
        for key, look in (("gap", {"marker": "o", "label": "evaluated in BF16", "color": "black"}),
                          ("gap_in_fp4", {"marker": "x", "label": "in FP4", "color": "gray"}))]
    return (arch.replace("gpt", "GPT"), "validation loss above BF16's, nats", "", marks,
            {"yticks": places, "yticklabels": [row["recipe"] for row in final],
             "xticks": [float(f"{part * widest:.1g}") for part in (-1, -0.5, 0, 0.5, 1)]})


# ---------------------------------------------------------------- the claim at width

PAPERS_START = {"change": "paper start", "flags": "--s_z_init=1 --alpha_init=0.05"}
OF_4096 = {"gap_db": 26.0 - 18.6, "flatness_ratio": 3.5, "rho_s_ngpt": 1.32e-3, "rho_s_gpt": 9.31e-5,
           "gain_ngpt": 9.4, "gain_gpt": 2.2}       # 2605.06067, fig. 1, 3 and 8

# The runs of `widths`: {rung: {width: seeds}}.
ON_WIDTHS = {Rung(arch, recipe): WIDTHS for arch in OWN_RECIPE for recipe in ("bf16", OWN_RECIPE[arch])}
ON_WIDTHS |= {Rung("ngpt", recipe, **PAPERS_START): {64: 3, 128: 3, 256: 3} for recipe in ("bf16", "ngpt")}
ON_WIDTHS |= {Rung("gpt", "ngpt"): {256: 3}}        # the control
for n in (2, 4):
    ON_WIDTHS |= {Rung(arch, "bf16", f"{n}x tokens", tokens=n): {128: 1} for arch in OWN_RECIPE}
    ON_WIDTHS[Rung("ngpt", "bf16", f"paper start {n}x tokens", PAPERS_START["flags"], n)] = {128: 1}


def partner(rung):
    """The GPT with which `widths` compares an nGPT: in its own recipe too, after as many tokens."""
    recipe = "bf16" if rung.recipe == "bf16" else OWN_RECIPE["gpt"]
    return next(gpt for gpt in ON_WIDTHS if gpt[:2] == ("gpt", recipe) and gpt.tokens == rung.tokens)


def chance(differences):
    """p, two-sided, of n paired differences if their signs were chance: the share of all 2^n choices of signs
    with a mean as far from 0. The test is exact, and p is below 0.05 only for n of 6 and more."""
    d = np.array(differences)
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    return float((abs(signs @ d) >= abs(d.sum()) * (1 - 1e-9)).mean())


def runs_to_decide(differences):
    """How many pairs would show a difference of this mean and spread at p < 0.05 four times out of five: the
    number for a normal deviate, and 1.96^2 / 2 more because the spread is unknown too; six at least."""
    mean, sd = spread(differences)
    enough = np.ceil(((1.960 + 0.842) * sd / mean)**2 + 1.960**2 / 2) if mean else math.inf
    return float(np.maximum(enough, 6))


def widths(o, flags):
    """How the paper's findings at width 4096 grow with width: probes, theory and losses."""
    o.widths = o.widths or ",".join(map(str, WIDTHS))
    chosen, wanted, runs = asked_widths(o, flags), rows_of(ON_WIDTHS, o), {}
    if not {*chosen} <= WIDTHS.keys():
        raise UserError(f"--widths={o.widths}: must be of {', '.join(map(str, WIDTHS))}")
    beside = [partner(rung) for rung in wanted] + [rung._replace(recipe="bf16") for rung in wanted]
    for width, rung in itertools.product(chosen, [rung for rung in ON_WIDTHS if rung in wanted + beside]):
        for seed in range(o.seed, o.seed + min(o.seeds, ON_WIDTHS[rung].get(width, 0))):
            runs[rung, width, seed] = of_rung(rung, seed, f"{width} {rung.arch} {rung} {seed}", o,
                                              [*at_width(rung.arch, width), *flags])
    if not runs:
        raise UserError(f"--rows={o.rows}: at none of these widths")
    found = train_all(runs, o)
    measured, pairs = measure_all({key: runs[key] for key in found}, o), []

    def layers_of(rung, width):
        return [row for (*what, _), rows in measured.items() if what == [rung, width] for row in rows]
    for width, rung in itertools.product(chosen, ON_WIDTHS):
        if rung.arch == "ngpt":
            both = layers_of(rung, width) + layers_of(partner(rung), width)
            pairs += [row | {"change": rung.change, "tokens": rung.tokens, "papers_start": bool(rung.flags)}
                      for row in against(both)]
    print("\nnGPT over GPT, means of the layers that both have in FP4: SNR of the dot products in dB, "
          "measured and by\neq. 5; growth of GPT's loss under noise over nGPT's; SNR of the products in dB; "
          "correlations of signal and\nnoise; averaging gain in dB")
    each = {f"{key}_{arch}": PROBES[key].form for key in ("products", "rho_s", "rho_n", "gain")
            for arch in OWN_RECIPE}
    table(pairs, {"width": "", "ngpt": "", "change": "", "gpt": "", "seeds": "", "gap_db": "+.2f",
                  "eq5_db": "+.2f", "flatness_ratio": ".2f"} | each)
    errors = relative_errors(found)
    print("\nfinal validation loss of bf16 runs, and relative errors of FP4 runs of the same seed, evaluated "
          "in bf16\nand in FP4")
    final = over_seeds(errors, "width", "arch", "recipe", "change")
    table(final, {"width": "", "arch": "", "recipe": "", "change": "", "bf16": ".4f", "error": "+.2%",
                  "in_fp4": "+.2%"})
    decisions = decide(errors, chosen)
    print("\nrelative error in FP4, GPT's less nGPT's of the same seed: mean, p if signs were chance "
          "(exact), and\nhow many pairs would show such a difference, with such a spread, four times out of "
          "five")
    table(decisions, {"width": "", "change": "", "pairs": "", "difference": "+.2%", "p": ".3f",
                      "needed": ".0f"})
    write(o, "widths", {"flags": flags, "pairs": pairs, "final": final, "decisions": decisions,
                        "errors": errors}, over_width(pairs, final))


def relative_errors(found):
    """Rows of the FP4 runs of `widths` that have a bf16 twin."""
    rows = []
    for (rung, width, seed), mine in found.items():
        twin = found.get((rung._replace(recipe="bf16"), width, seed))
        if rung.recipe != "bf16" and twin:
            bf16, last = twin[-1]["val_loss"], mine[-1]
            rows.append({"width": width, "arch": rung.arch, "recipe": rung.recipe, "change": rung.change,
                         "seed": seed, "bf16": bf16, "error": last["val_loss"] / bf16 - 1,
                         "in_fp4": last.get("val_loss_fp4", math.nan) / bf16 - 1})
    return rows


def decide(errors, chosen):
    """Does nGPT lose less than GPT by training in 4 bits, each in its own recipe? At every width, and in the
    mean of all widths. We pair runs of one seed, because they see the same data."""
    rows, gpts = [], find(errors, arch="gpt", recipe=OWN_RECIPE["gpt"])
    for change in dict.fromkeys(row["change"] for row in find(errors, arch="ngpt")):
        ngpts = find(errors, arch="ngpt", change=change)
        by_width = {width: {n["seed"]: g["in_fp4"] - n["in_fp4"] for n in find(ngpts, width=width)
                            for g in find(gpts, width=width, seed=n["seed"])} for width in chosen}
        by_width = {width: found for width, found in by_width.items() if found}
        if len(by_width) > 1:
            seeds = sorted(set().union(*by_width.values()))
            by_width["all"] = {seed: np.mean([found[seed] for found in by_width.values() if seed in found])
                               for seed in seeds}
        rows += [{"width": width, "change": change, "pairs": len(d), "difference": spread([*d.values()]),
                  "p": chance([*d.values()]), "needed": runs_to_decide([*d.values()])}
                 for width, d in by_width.items()]
    return rows


def over_width(pairs, final):
    """Panels of `widths`. Models are trained in bf16 unless a label says otherwise; stars are the paper's."""
    in_fp4 = find(pairs, ngpt=OWN_RECIPE["ngpt"], change="")
    by_start = [find(pairs, ngpt="bf16", papers_start=start) for start in (False, True)]
    mine, papers = (find(rows, tokens=1) for rows in by_start)
    at = [row["width"] for row in pairs if row["tokens"] > 1]
    longer, papers_longer = ([row for row in rows if row["width"] in at] for rows in by_start)
    ticks = sorted({row["width"] for row in pairs})
    axis = {"xscale": "log", "xticks": [*ticks, 4096]}

    def line(rows, key, label="", x="width", **look):
        look = {"marker": "o", "color": COLOURS["ngpt"], "label": label} | look
        return [row[x] for row in rows], [row[key] for row in rows], look

    def from_papers_start(key, rows=papers, x="width"):
        return line(rows, key, "nGPT from the paper's start", x, color="gray", marker="v")

    def stars(*keys):
        return [([4096], [OF_4096[key]], {"marker": "*", "markersize": 9, "linestyle": "", "color":
                 COLOURS["gpt" if key.endswith("_gpt") else "ngpt"]}) for key in keys]

    def both(rows, x, key):
        return curves([{"arch": arch, "recipe": row[arch], x: row[x], key: row[f"{key}_{arch}"]}
                       for arch in OWN_RECIPE for row in rows], x, key)
    percent = [row | {"percent": tuple(100 * v for v in row["in_fp4"])} for row in find(final, change="")
               if row["recipe"] == OWN_RECIPE[row["arch"]]]
    return [
        ("nGPT over GPT", "width", "ratio of SNR(dot), dB", [
            line(mine, "gap_db", "measured"), line(mine, "eq5_db", "eq. 5", linestyle="--", marker="x"),
            line(in_fp4, "gap_db", "trained in FP4", linestyle=":", marker="s"),
            from_papers_start("gap_db"), *stars("gap_db")], axis),
        ("correlation of the signal", "width", "rho_s", [
            *both(mine, "width", "rho_s"), from_papers_start("rho_s_ngpt"),
            *stars("rho_s_ngpt", "rho_s_gpt")], axis | {"yscale": "log"}),
        ("averaging gain", "width", "SNR(dot) / SNR(products), dB", [
            *both(mine, "width", "gain"), from_papers_start("gain_ngpt"),
            *stars("gain_ngpt", "gain_gpt")], axis),
        ("final loss in FP4", "width", "(FP4 - BF16) / BF16, %", curves(percent, "width", "percent"),
         axis | {"xticks": ticks}),
        ("flatness", "width", "growth of GPT's loss over nGPT's", [
            line(mine, "flatness_ratio"), from_papers_start("flatness_ratio"),
            *stars("flatness_ratio")], axis),
        ("trained longer", "tokens, in units of the others'", "rho_s",
         [*both(longer, "tokens", "rho_s"), from_papers_start("rho_s_ngpt", papers_longer, "tokens")],
         {"xscale": "log", "xticks": (1, 2, 4)})]


# ---------------------------------------------------------------- the command line

COMMANDS = {"recipes": recipes, "widths": widths, "lr": lr, "onelayer": onelayer}
OPTIONS = analyze.OPTIONS | {
    "config": ("", "runs train configs/{gpt,ngpt}_CONFIG.py: ladder for recipes and widths, else tiny"),
    "seeds": (3, "runs of each row of recipes, from --seed on; at most, of widths"),
    "widths": ("", f"of widths: {','.join(map(str, WIDTHS))}; of onelayer: its config's"),
    "rows": ("*", "rows of recipes and widths, as globs: ngpt/*,gpt/nvfp4*"),
    "processes": (1 if torch.cuda.is_available() else os.cpu_count() or 1, "runs at a time"),
    "rates": ("5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2", "peak learning rates of lr")}


@command("experiments.py")
def main(argv):
    words, o, flags = read_command("experiments.py", __doc__, ", ".join(COMMANDS), OPTIONS, argv)
    if len(words) > 1 or words[0] not in COMMANDS:
        raise UserError(f"{' '.join(words)}: must be one of {', '.join(COMMANDS)}")
    if min(o.seeds, o.processes) < 1:
        raise UserError("--seeds, --processes must be 1 or more")
    o.config = o.config or ("ladder" if words[0] in ("recipes", "widths") else "tiny")
    COMMANDS[words[0]](o, flags)


if __name__ == "__main__":
    main(sys.argv[1:])
