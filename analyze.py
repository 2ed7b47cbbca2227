"""Why normalized networks survive 4 bits: trained runs, measured, compared in tables and drawn.

    python analyze.py out/gpt out/ngpt                   tables, analysis.json, analysis.png (fig. 1-4 and 8)
    python analyze.py losses out/ngpt_bf16 out/ngpt      relative error against the bf16 twin (fig. 5)
    python analyze.py layers out/gpt                     linear layers by the error of their gradient in FP4
    python analyze.py outliers out/gpt                   what clamping a token's outliers is worth
    python analyze.py widths                             what the paper says of 4096, from 64 to 1024: hours
    python analyze.py recipes --rows="gpt/*" --seeds=3   the ladder: what each recipe costs against bf16
    python analyze.py lr --max_steps=150 --n_embd=64     learning rates x {gpt, ngpt} x {bf16, fp4} (fig. 6a)
    python analyze.py onelayer --max_steps=200           one MLP trained alone (fig. 7)
    python analyze.py quant                              errors of the formats on Gaussians
    python analyze.py -h                                 this text and the options

What is measured of a layer, and what that means, stands in probes.py. Here runs are read, measured layer by
layer in what their recipe gives fprop.x and fprop.w (a bf16 run: its architecture's recipe), compared, and
trained. Means are over the layers that all runs have; spreads are standard deviations over runs that differ
in their seed alone.

Figures are those of 2605.06067. Its fig. 6b, the speed of a layer: python tests/bench.py layer
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import nvfp4
import train
from assets.figures import COLOURS, curves, draw
from data.run import Stop, UserError, catch_signals, command, naming, read_json, run_all, write_json
from data.tokens import batch_at, load_data, val_starts
from model import flops_per_token, load_checkpoint, newest_checkpoint, outline
from nvfp4 import FORMATS, RECIPES, quantize
from probes import (ALPHAS, CLAMPS, PROBES, STAGES, db, eq5, fidelity, flatness, histograms, measure,
                    named_parts, progress, record, regimes, relative_error, rounding, snr)
from train import OWN_RECIPE

KIND = ("arch", "width", "recipe")                  # what tells runs apart, but for their seeds

# ---------------------------------------------------------------- runs

def read_run(folder):
    """A run folder: {run, kind: {arch, width, recipe, seed}, config, steps, evaluations: rows of its log}."""
    path = Path(folder) / "config.json"
    config, rows = read_json(path), train.read_metrics(folder)
    try:
        c = train.unflatten(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    kind = {"arch": c.model.arch, "width": c.model.n_embd, "recipe": c.recipe, "seed": c.seed}
    return {"run": str(folder), "kind": kind, "config": config, "steps": [r for r in rows if "loss" in r],
            "evaluations": [r for r in rows if "val_loss" in r]}


NO_MATTER = (*train.WATCHING, "seed")


def read_runs(folders):
    """Runs by kind. Those of one architecture and width are averaged or compared: only their seeds and
    recipes may differ, or what does not matter."""
    runs = sorted(map(read_run, folders), key=lambda r: list(r["kind"].values()))
    for a, b in itertools.combinations(runs, 2):
        if a["kind"] == b["kind"]:
            raise UserError(f"{a['run']} and {b['run']} are of one kind and seed; give one of them")
        recipe = () if a["kind"]["recipe"] == b["kind"]["recipe"] else ("recipe", "fp4_")
        differ = [k for k, v in a["config"].items()
                  if b["config"].get(k) != v and k not in NO_MATTER and not k.startswith(recipe)]
        if differ and all(a["kind"][k] == b["kind"][k] for k in ("arch", "width")):
            raise UserError(f"{a['run']} and {b['run']} differ in {differ[0]}; analyse them one at a "
                            "time, or give the second choice a recipe of its own")
    return runs


def open_run(folder):
    """What probes of a run begin with: its model in high precision, the recipe that quantizes it and its
    FP4Config, and four batches held out."""
    model, _, c = train.load_run(folder)
    device, _ = train.choose_device(replace(c, device="auto"))
    model, val = model.to(device), load_data(c.dataset, c.model.block_size, c.model.vocab_size).val
    recipe = c.recipe if "fprop" in c.fp4.gemms else OWN_RECIPE[c.model.arch]
    cfg = c.fp4 if recipe == c.recipe else RECIPES[recipe]
    starts = val_starts(len(val), c.model.block_size, (4, c.batch_size))
    return model, recipe, cfg, [batch_at(val, s, c.model.block_size, device) for s in starts]


def convert_run(folder, model, recipe, cfg):
    nvfp4.convert(model, cfg, report=lambda line: None)
    if not nvfp4.fp4_layers(model):
        raise UserError(f"{folder}: {recipe} must quantize a layer; give a run that has some in FP4")


def analyse(folder, o):
    """All probes of a run, as rows {arch, width, recipe, seed, ...}: of its layers, which also carry the loss
    and mean growth of the run, of sums of k terms, of channels, and of the noise alpha."""
    model, recipe, cfg, batches = open_run(folder)
    few = [torch.cat([t[::4] for t in both]) for both in zip(*batches, strict=True)]    # it takes many losses

    @torch.no_grad()
    def loss(model, batches):
        return float(sum(model(*batch).double() for batch in batches) / len(batches))
    growth, kind = flatness(model, lambda model: loss(model, [few]), seed=o.seed), read_run(folder)["kind"]
    whole = {"quantized_as": recipe, "loss": loss(model, batches), "growth": sum(growth) / len(growth)}
    convert_run(folder, model, recipe, cfg)
    parts = named_parts(model)
    rows = {"layers": [], "terms": [], "channels": [], "noise": [
        kind | {"alpha": a, "growth": g} for a, g in zip((0, *ALPHAS), (0.0, *growth), strict=True)]}
    found = record(model, batches, o.tokens, o.seed)
    idle = [name for name, (x, _) in found.items() if len(x) < 2]
    if idle:
        print(f"{folder}: {', '.join(idle)} met fewer than two tokens of the sample and are left out")
    for name in progress([name for name in parts if name not in idle], str(folder)):
        here = kind | {"layer": name}
        probes, terms, channels = measure(parts[name], *found.pop(name), o.channels, o.seed)
        rows["layers"].append(here | whole | {"K": parts[name].layer.in_features} | probes)
        rows["terms"] += [here | term for term in terms]
        rows["channels"] += [here | channel for channel in channels]
    return rows


# ---------------------------------------------------------------- rows: means, tables, files

def spread(values):
    """(mean, sample standard deviation)"""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def summary(rows, by, reduce):
    """One row for all rows that agree in the fields named in by: those fields, and of every other float
    reduce(list of its values)."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in by), []).append(row)
    found = []
    for key, mine in groups.items():
        numbers = [k for k, v in mine[0].items() if isinstance(v, float) and k not in by]
        found.append(dict(zip(by, key, strict=True)) | {k: reduce([row[k] for row in mine]) for k in numbers})
    return found


def over_seeds(rows, *by):
    """(mean, spread) over seeds, of means over layers."""
    return summary(summary(rows, (*by, "seed"), np.mean), by, spread)


def find(rows, **fields):
    return [row for row in rows if all(row[k] == v for k, v in fields.items())]


def table(rows, columns):
    """Print rows; columns: {field: format}. Of (mean, spread), the spread stands below the mean."""
    cells = [list(columns)]
    for row in rows:
        pairs = [row[k] if isinstance(row[k], tuple) else (row[k], math.nan) for k in columns]
        for values, unknown in zip(zip(*pairs, strict=True), ("-", ""), strict=True):
            cells.append([unknown if v != v else format(v, form)                # v != v: NaN
                          for v, form in zip(values, columns.values(), strict=True)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in filter(any, cells):                  # no line for spreads where there are none
        print("  ".join(c.rjust(n) for c, n in zip(row, widths, strict=True)).rstrip())


def write(o, name, results, panels=()):
    """<out_dir>/<name>.json, numbers to 6 digits and null for NaN, and <out_dir>/<name>.png of panels."""
    path = Path(o.out_dir) / f"{name}.json"
    results = json.loads(json.dumps({"options": vars(o), **results}), parse_constant=lambda _: None,
                         parse_float=lambda digits: float(f"{float(digits):.6g}"))
    write_json(path, results)
    print(f"\nwrote {path}")
    if panels:
        draw(path.with_suffix(".png"), panels)


# ---------------------------------------------------------------- comparing runs

HEAD = dict.fromkeys(KIND, "")                      # columns of a table: field, format
COLUMNS = {name: probe.form for name, probe in PROBES.items()}


def compare(folders, o, _):
    """Figures 1, 2, 3, 4 and 8."""
    runs = [analyse(r["run"], o) for r in read_runs(folders)]
    shared = set.intersection(*({row["layer"] for row in run["layers"]} for run in runs))
    if not shared:
        raise UserError("these runs have no quantized layer in common; analyse them one at a time")
    rows = {part: [row for run in runs for row in run[part]] for part in runs[0]}
    layers, terms, channels = ([row for row in rows[part] if row["layer"] in shared]
                               for part in ("layers", "terms", "channels"))
    longest = sorted(runs, key=lambda run: -len(run["layers"]))
    names = list(dict.fromkeys(row["layer"] for run in longest for row in run["layers"]))
    by_layer = sorted(over_seeds(rows["layers"], "layer", *KIND), key=lambda row: names.index(row["layer"]))
    overall = over_seeds(layers, *KIND, "quantized_as")
    found = {"layers": by_layer, "overall": overall, "pairs": against(layers),
             "terms": over_seeds(terms, *KIND, "k"), "noise": over_seeds(rows["noise"], *KIND, "alpha")}
    print("by layer: SNRs, gain and eq. 4 in dB; below each row the standard deviation over seeds")
    table(by_layer, {"layer": ""} | HEAD | COLUMNS)
    print(f"\nmeans of {len(shared)} layers; loss of the high-precision model and its mean growth in nats")
    table(overall, HEAD | {"quantized_as": ""} | COLUMNS | {"loss": ".3f", "growth": ".4f"})
    print("\nnGPT over GPT: SNR(dot) in dB, measured and by eq. 5; growth of GPT's loss over nGPT's; by eq. "
          "5\nno gap far below so many terms, and a factor far above so many")
    table(found["pairs"], {"width": "", "ngpt": "", "gpt": "", "gap_db": "+.2f", "eq5_db": "+.2f",
                           "flatness_ratio": ".2f", "no_gap_below": ".0f", "factor": ".1f",
                           "saturates_above": ".0f"})
    write(o, "analysis", found | {"measured": rows["layers"]}, sheet(**found, channels=channels))


def against(layers):
    """nGPT against GPT of the same width and seed, layer by layer: what was measured, and what eq. 5 makes of
    the correlations."""
    rows = [{"width": n["width"], "ngpt": n["recipe"], "gpt": g["recipe"], "seed": n["seed"],
             "gap_db": n["dot"] - g["dot"], "eq5_db": float(db(eq5(n["K"], n["rho_s"], g["rho_s"]))),
             "flatness_ratio": g["growth"] / n["growth"]}
            | {f"{key}_{run['arch']}": run[key] for run in (n, g)
               for key in ("products", "rho_s", "rho_n", "gain")}
            for n in find(layers, arch="ngpt")
            for g in find(layers, arch="gpt", layer=n["layer"], width=n["width"], seed=n["seed"])]
    pairs = over_seeds(rows, "width", "ngpt", "gpt")
    for p in pairs:
        mine = find(rows, width=p["width"], ngpt=p["ngpt"], gpt=p["gpt"])
        p |= {"seeds": len({row["seed"] for row in mine})} | regimes(p["rho_s_ngpt"][0], p["rho_s_gpt"][0])
    return pairs


def sheet(layers, overall, pairs, terms, noise, channels):
    """Panels of figures 1 and 8 for the widest models; of 2, 3 and 4 for one of each architecture, that in
    its own recipe where there is one."""
    width = max(row["width"] for row in overall)
    widest = sorted(find(overall, width=width), key=lambda row: row["recipe"] == OWN_RECIPE[row["arch"]])
    main = {row["arch"]: row["recipe"] for row in widest}
    terms, channels = ([row for row in find(rows, width=width) if row["recipe"] == main[row["arch"]]]
                       for rows in (terms, channels))
    stages = [row | {"stage": stage, "snr": row[stage]} for row in widest for stage in STAGES]
    names = list(dict.fromkeys(row["layer"] for row in layers))
    gains = [row | {"number": names.index(row["layer"]) + 1} for row in find(layers, width=width)]
    sums = [*curves(terms, "k", "dot", linestyle="", label="sums of k terms"),
            *curves([row | {"eq4": row["eq4"][0]} for row in terms], "k", "eq4", marker="", label="eq. 4")]
    log_terms, ratio = {"xscale": "log", "xticks": [16 * 8**i for i in range(5)]}, []
    for p in pairs:
        if p["width"] == width and (p["ngpt"], p["gpt"]) == (main["ngpt"], main["gpt"]):
            both = list(zip(find(terms, arch="ngpt"), find(terms, arch="gpt"), strict=True))
            gap = [n["dot"][0] - g["dot"][0] for n, g in both]
            for x, y, style in (
                    ([n["k"] for n, _ in both], gap, {"marker": "o", "linestyle": "", "label": "measured"}),
                    ([n["k"] for n, _ in both], None, {"label": "eq. 5"}),
                    ([p["no_gap_below"]], None, {"marker": "^", "label": "k = 1 / rho_s of nGPT"}),
                    ([p["saturates_above"]], None, {"marker": "s", "label": "k = 1 / rho_s of GPT"})):
                y = y or [db(eq5(k, p["rho_s_ngpt"][0], p["rho_s_gpt"][0])) for k in x]
                ratio.append((x, y, {"color": "black", "markersize": 5} | style))
    return [
        ("Fig. 1  SNR by stage", "stage (mean over layers)", "SNR, dB", curves(stages, "stage", "snr"), {}),
        ("Fig. 1  averaging gain by layer", "linear layer, first to last", "SNR(dot) / SNR(products), dB",
         curves(gains, "number", "gain"), {"xticks": range(1, len(names) + 1, len(names) // 8 + 1)}),
        ("Fig. 8  flatness", "relative weight noise", "growth of held-out loss, nats",
         curves(find(noise, width=width), "alpha", "growth"), {}),
        scatter(channels, "z_s", "signal", 1), scatter(channels, "z_n", "noise", -1),
        ("Fig. 4  SNR against width", "terms k of the dot product", "SNR(dot), dB", sums, log_terms),
        histogram(channels, "rho_s", "signal"), histogram(channels, "rho_n", "noise"),
        ("Fig. 4  nGPT over GPT", "terms k of the dot product", "ratio of SNR(dot), dB", ratio, log_terms)]


def scatter(channels, key, what, slope):
    """Fig. 2: SNR of each channel of the MLPs against its z; the line is eq. 2 with the other z fixed."""
    mlps = [row for row in channels if ".fc" in row["layer"]] or channels
    points = [row | {"db": 20 * math.log10(row[key])} for row in mlps if math.isfinite(row["dot"])]
    x, y = np.array([(row["db"], row["dot"]) for row in points]).T
    ends = np.percentile(x, (0.5, 99.5))
    line = ends, y.mean() + slope * (ends - x.mean()), {
        "color": "black", "zorder": 3, "label": f"eq. 2;  $R^2$ = {np.corrcoef(x, y)[0, 1]**2:.2f}"}
    cloud = curves(points[::len(points) // 1000 + 1], "db", "dot", linestyle="", markersize=2.5, alpha=0.5,
                   markeredgewidth=0.3)             # enough of them to see it
    return (f"Fig. 2  {what}, channels of MLPs", f"normalized {what} {key}, dB", "SNR of the channel, dB",
            [*cloud, line], {})


def histogram(channels, key, what):
    """Fig. 3: density of rho over the channels of all layers."""
    lines = curves([row | {key: 1e3 * row[key]} for row in channels if math.isfinite(row[key])], key, key)
    edges = np.linspace(*np.percentile(np.concatenate([y for _, y, _ in lines]), (1, 97)), 36)
    steps = [((edges[1:] + edges[:-1]) / 2, np.histogram(y, edges)[0] / len(y) / np.diff(edges),
              style | {"marker": "", "drawstyle": "steps-mid"}) for _, y, style in lines]
    return (f"Fig. 3  correlation of the {what}", f"{key} of a channel, 1e-3", "share of channels per 1e-3",
            steps, {})


def losses(folders, o, _):
    """Fig. 5: FP4 runs against their bf16 twin, which differs in nothing but the recipe."""
    runs, finals, points = read_runs(folders), [], []
    for r in runs:
        twin = next((t for t in runs if t["kind"] == r["kind"] | {"recipe": "bf16"}), None)
        if twin is r:
            continue
        for run in (r, twin or r):
            if not run["steps"] or not run["evaluations"]:
                raise UserError(f"{run['run']}: metrics.jsonl must hold steps and evaluations; let it run on")
        if not twin or len(twin["steps"]) != len(r["steps"]):
            raise UserError(f"{r['run']}: give its bf16 twin too, the same but for --recipe=bf16, as long")
        bf16, last = twin["evaluations"][-1]["val_loss"], r["evaluations"][-1]
        window = len(r["steps"]) // 15 or 1
        error = relative_error(*([row["loss"] for row in run["steps"]] for run in (r, twin)), window)
        finals.append(r["kind"] | {
            "bf16": bf16, "fp4": last["val_loss"], "in_fp4": last["val_loss_fp4"],
            "error": last["val_loss"] / bf16 - 1, "error_in_fp4": last["val_loss_fp4"] / bf16 - 1})
        points += [r["kind"] | {"tokens": row["tokens"] / 1e6, "percent": 100 * e}
                   for row, e in zip(r["steps"][window - 1:], error.tolist(), strict=True)]
    if not finals:
        raise UserError("all are bf16 runs; give FP4 runs beside them")
    final, points = over_seeds(finals, *KIND), over_seeds(points, *KIND, "tokens")
    print("final validation loss in nats of the bf16 twin, and of the FP4 run in high precision and in FP4; "
          "relative\nerrors against the twin; below each row the standard deviation over seeds")
    table(final, HEAD | {"bf16": ".4f", "fp4": ".4f", "in_fp4": ".4f", "error": ".2%", "error_in_fp4": ".2%"})
    some = len(runs[0]["steps"]) // 8 or 1
    write(o, "losses", {"final": final, "curves": points}, [
        (f"Fig. 5  width {width}", "tokens, millions", "(FP4 - BF16) / BF16 of training loss, %",
         curves(find(points, width=width), "tokens", "percent", markevery=some, errorevery=some),
         {"yscale": "symlog", "yticks": (-1, 0, 1, 10)})
        for width in sorted({row["width"] for row in final})])


def layer_errors(folder, o):
    """Rows of a run's linear layers, those too that the recipe's tail would keep in high precision: the
    relative error of dw where wgrad alone runs in FP4, and where all of the backward does; share: of all
    their parameters. A row for each batch."""
    model, recipe, cfg, batches = open_run(folder)
    if "wgrad" not in cfg.gemms:
        raise UserError(f"{folder}: {recipe} must have wgrad in FP4; give a run with another recipe")
    convert_run(folder, model, recipe, replace(cfg, tail=0.0, head_blocks=0))
    n_weights = sum(m.weight.numel() for m in nvfp4.fp4_layers(model))
    rows, kind = [], read_run(folder)["kind"] | {"quantized_as": recipe}
    for n, batch in enumerate(progress(batches, str(folder))):
        nvfp4.set_step(model, o.seed, 0, n)
        exact, wgrad, backward = (train.weight_gradients(model, partial(model, *batch), high)
                                  for high in (("dgrad", "wgrad"), ("dgrad",), ()))
        rows += [kind | {"layer": name, "wgrad": float(snr(dw, wgrad[name]) ** -0.5),
                         "backward": float(snr(dw, backward[name]) ** -0.5),
                         "share": dw.numel() / n_weights} for name, dw in exact.items()]
    return rows


def layers(folders, o, _):
    """What 2509.25149 section 4.1 suggests for choosing layers to keep in BF16."""
    rows = [row for run in read_runs(folders) for row in layer_errors(run["run"], o)]
    found = over_seeds(rows, *KIND, "quantized_as", "layer")
    found = [row | {"share": row["share"][0]} for row in found]
    found.sort(key=lambda row: (*(row[k] for k in KIND), -row["wgrad"][0]))
    print("relative error of dw, worst first: wgrad alone in FP4, and all of the backward; share of these "
          "layers'\nparameters; below each row the standard deviation over seeds")
    table(found, HEAD | {"quantized_as": "", "layer": "", "wgrad": ".2%", "backward": ".2%", "share": ".1%"})
    write(o, "layers", {"results": found})


def outliers(folders, o, _):
    """OCC's fidelity, as 2501.17116 section 3.3 has it."""
    rows = []
    for run in read_runs(folders):
        model, recipe, cfg, batches = open_run(run["run"])
        convert_run(run["run"], model, recipe, cfg)
        for name, (x, _) in record(model, batches, o.tokens, o.seed).items():
            for of, matrix in (("token", x), ("tensor", x.reshape(1, -1))):     # all of it as one row
                rows += [run["kind"] | {"layer": name, "of": of, "case": case, "paper": paper}
                         | fidelity(matrix, *how) for case, (*how, paper) in CLAMPS.items() if len(x)]
    found = [row | {"paper": row["paper"][0]} for row in over_seeds(rows, *KIND, "of", "case")]
    print("activations as they enter FP4 layers, in 4 bits with scale and quantiles of a token, or of the "
          "tensor:\ncosine similarity, mean square error, SNR in dB, and the paper's, which does not say of "
          "what; means\nover layers, below: deviations over seeds")
    table(found, HEAD | {"of": "", "case": "", "cosine": ".2%", "mse": ".2e", "snr": ".2f", "paper": ".2f"})
    write(o, "outliers", {"results": found, "layers": rows})


# ---------------------------------------------------------------- experiments

def refuse(flags, names, why):
    """UserError where a flag of train.py is given that the experiment sets itself."""
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
    """The run that a Config describes, as read_run() has it, or None; UserError where its folder holds
    another one, or one evaluated on other batches."""
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
    """The rows of metrics.jsonl of the run that a Config describes, if it is complete, its checkpoint too, or
    None. raises as begun()"""
    run = begun(c)
    rows = run["steps"] + run["evaluations"][-1:] if run else []
    if not rows or rows[-1]["step"] != c.max_steps:
        return None
    return rows if load_checkpoint(newest_checkpoint(c.out_dir))["step"] == c.max_steps else None


def do_all(commands, costs, o, result):
    """Run commands, {folder: argv}, o.processes at a time, each with its part of the cores; a line for each
    that ends, with what result(folder) says of it, and how long the others will take by their costs.

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
        sys.exit(train.STOPPED)
    return error


def train_all(runs, o):
    """Train runs, {key: a_run()}. What is done is not done again, and what was begun goes on.

    returns {key: rows of its metrics.jsonl, the last its last evaluation}; a run that failed, whose error is
            printed, is left out
    raises  UserError where no run succeeded
    """
    by_folder, commands, costs = {c.out_dir: c for _, c in runs.values()}, {}, {}
    rows = {folder: finished(c) for folder, c in by_folder.items()}
    for argv, c in runs.values():
        if not rows[c.out_dir]:
            resume = ["--resume"] * newest_checkpoint(c.out_dir).exists()
            commands[c.out_dir] = [sys.executable, train.__file__, *argv, *resume]
            sizes = outline(replace(c.model, vocab_size=c.model.vocab_size or 1))
            costs[c.out_dir] = c.max_steps * c.tokens_per_step * flops_per_token(sizes)
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
    """The probes of runs, {key: a_run()}, which are complete: {key: rows of their layers, as analyse() has
    them}. Each run's analysis.json lies in its folder; those measured with other options are done again."""
    options, commands = [f"--{name}={getattr(o, name)}" for name in ("tokens", "channels")], {}

    def known(folder):
        path = Path(folder, "analysis.json")
        found = read_json(path) if path.exists() else {"options": {}}
        if any(found["options"].get(name) != getattr(o, name) for name in ("tokens", "channels")):
            return None
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in found["measured"]]
    rows = {c.out_dir: known(c.out_dir) for _, c in runs.values()}
    for folder in rows:
        if not rows[folder]:
            commands[folder] = [sys.executable, __file__, folder, f"--out_dir={folder}", *options]
    print(f"{len(runs) - len(commands)} runs are measured, {len(commands)} to be measured", flush=True)

    def result(folder):
        rows[folder] = known(folder)
        return f"SNR of the dot products {np.mean([row['dot'] for row in rows[folder]]):.2f} dB"
    do_all(commands, dict.fromkeys(commands, 1), o, result)
    return {key: rows[c.out_dir] for key, (_, c) in runs.items() if rows[c.out_dir]}


def lr(_, o, flags):
    """Fig. 6a: final loss against the learning rate, in bf16 and in the architecture's FP4 recipe."""
    rates, rows, runs = o.rates.split(","), [], {}
    for arch, high, rate in itertools.product(OWN_RECIPE, (True, False), rates):
        recipe = "bf16" if high else OWN_RECIPE[arch]
        runs[arch, recipe, rate] = a_run(f"lr_{rate}_{arch}_{recipe}", arch, o, [
            *flags, f"--recipe={recipe}", f"--seed={o.seed}", f"--learning_rate={rate}"])
    found = train_all(runs, o)
    for arch, recipe, rate in runs:                 # a rate that is too high is a result too
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
    """Those of --widths, or none."""
    found = o.widths.split(",") if o.widths else []
    if len({*found}) < len(found) or not all(width.isdecimal() and int(width) % 32 == 0 < int(width)
                                             for width in found):
        raise UserError(f"--widths={o.widths}: must be multiples of 32 with commas between them, as 64,128")
    if found:
        refuse(flags, ("n_embd", "n_head", "n_ffn"), "follows from the width")
    return [int(width) for width in found]


def at_step(c, step, o):
    """Rows of the layers of a run at this step, to which it is trained; what was measured is kept there."""
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


def onelayer(_, o, flags):
    """Fig. 7: loss and rho of embedding, one MLP and head, trained in bf16, with stops for the probes."""
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


class Rung(NamedTuple):
    """A row of the ladder: an architecture, a recipe, and what is changed in it."""
    arch: str
    recipe: str
    change: str = ""                                # in words
    flags: str = ""                                 # and for train.py
    tokens: float = 1.0                             # of the number that the others see

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


# What `recipes` compares; each against the bf16 run of its architecture and seed.
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


def recipes(_, o, flags):
    """The ladder: what each recipe, and each ingredient of two of them, costs against bf16 with the same
    seeds, so with the same start and the same data in the same order."""
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


FAR = 5                                             # times the median gap: left to the table


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

# What `widths` trains: {rung: {width: seeds}}.
ON_WIDTHS = {Rung(arch, recipe): WIDTHS for arch in OWN_RECIPE for recipe in ("bf16", OWN_RECIPE[arch])}
ON_WIDTHS |= {Rung("ngpt", recipe, **PAPERS_START): {64: 3, 128: 3, 256: 3} for recipe in ("bf16", "ngpt")}
ON_WIDTHS |= {Rung("gpt", "ngpt"): {256: 3}}        # the control
for n in (2, 4):
    ON_WIDTHS |= {Rung(arch, "bf16", f"{n}x tokens", tokens=n): {128: 1} for arch in OWN_RECIPE}
    ON_WIDTHS[Rung("ngpt", "bf16", f"paper start {n}x tokens", PAPERS_START["flags"], n)] = {128: 1}


def partner(rung):
    """The GPT with which an nGPT of `widths` is compared: in its own recipe too, of as many tokens."""
    recipe = "bf16" if rung.recipe == "bf16" else OWN_RECIPE["gpt"]
    return next(gpt for gpt in ON_WIDTHS if gpt[:2] == ("gpt", recipe) and gpt.tokens == rung.tokens)


def chance(differences):
    """p, two-sided, of n paired differences whose signs were chance: the share of all 2^n choices of signs
    with a mean as far from 0. An exact test; below 0.05 only for n of 6 and more."""
    d = np.array(differences)
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    return float((abs(signs @ d) >= abs(d.sum()) * (1 - 1e-9)).mean())


def runs_to_decide(differences):
    """How many pairs would show a difference of this mean and spread at p < 0.05 four times out of five: the
    number for a normal deviate, and 1.96^2 / 2 more, for the spread has to be found too; six at least."""
    mean, sd = spread(differences)
    enough = np.ceil(((1.960 + 0.842) * sd / mean)**2 + 1.960**2 / 2) if mean else math.inf
    return float(np.maximum(enough, 6))


def widths(_, o, flags):
    """How what the paper says of 4096 grows with width: probes, theory and losses."""
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
    """Rows of the FP4 runs of `widths` whose bf16 twin is there too."""
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
    """Whether nGPT loses less than GPT by training in 4 bits, each in its own recipe: at every width, and in
    the mean of all, by seeds, for runs of one seed see the same data."""
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
    """Panels of `widths`, of models trained in bf16 but for what is said; stars are the paper's."""
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


LITERATURE = {("nvfp4", "nearest, 1x16"): 9.0e-3, ("nvfp4", "nearest, 16x16"): 12.4e-3,
              ("nvfp4", "stochastic, 1x16, unbiased"): 23.5e-3}


def quant(_, o, flags):
    """Errors of the formats on unit Gaussians, beside table 1 of 2601.22813; bias and variance of stochastic
    rounding; histograms, in the JSON, of codes and scales rounded to nearest."""
    x, rows = torch.randn(512, 4096, generator=torch.Generator().manual_seed(o.seed)), []
    for (name, case), mse in nvfp4.error_table().items():
        bias = dict.fromkeys(("slope", "z", "variance"), math.nan)
        if "stochastic" in case:
            bias = rounding(x, seed=o.seed, format=name, unbiased="unbiased" in case)
        rows.append({"format": name, "case": case, "mse": mse, "snr_db": -float(db(mse)),
                     "literature": LITERATURE.get((name, case), math.nan), **bias})
    print("unit Gaussians: mean square error; of 16 draws of stochastic rounding, with 8 random bits (up to\n"
          "1/256 of a step short), slope <E q, x> / <x, x>, z (slope - 1 in standard errors) and variance")
    table(rows, {"format": "", "case": "", "mse": ".3e", "literature": ".3e", "snr_db": ".2f", "slope": ".5f",
                 "z": "+.1f", "variance": ".3e"})
    counts = {name: dict(zip(("codes", "scale_exponents"), histograms(quantize(x, name)), strict=True))
              for name in FORMATS}
    write(o, "quant", {"results": rows, "histograms": counts})


# ---------------------------------------------------------------- the command line

COMMANDS = {"losses": losses, "layers": layers, "outliers": outliers, "lr": lr, "onelayer": onelayer,
            "quant": quant, "recipes": recipes, "widths": widths}
OF_RUNS = (compare, losses, layers, outliers)


@command("analyze.py")
def main(argv):
    parser = argparse.ArgumentParser("analyze.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="[losses, layers, outliers] RUN ..., or lr, onelayer, "
                        "quant, recipes, widths")
    for name, default, what in (
            ("out_dir", "out/analysis", "folder for JSON, picture and the runs of experiments"),
            ("tokens", 2048, "tokens in the sample"),
            ("channels", 128, "output channels of each layer in the sample"),
            ("seed", 0, "of samples, noise and the runs of experiments"),
            ("config", "", "experiments train configs/{gpt,ngpt}_CONFIG.py with the other flags: ladder for "
             "recipes, else tiny"),
            ("seeds", 3, "runs of each row of recipes, from --seed on; at most, of widths"),
            ("widths", "", f"of widths: {','.join(map(str, WIDTHS))}; of onelayer: its config's"),
            ("rows", "*", "rows of recipes and widths, as globs: ngpt/*,gpt/nvfp4*"),
            ("processes", 1 if torch.cuda.is_available() else os.cpu_count() or 1, "runs at a time"),
            ("rates", "5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2", "peak learning rates of lr")):
        shown = f"{what} ({default})" if default != "" else what
        parser.add_argument(f"--{name}", default=default, type=type(default), help=shown)
    o, flags = parser.parse_known_args(argv)
    words = vars(o).pop("words")
    work = COMMANDS.get(words[0], compare)
    folders = words if work is compare else words[1:]
    o.config = o.config or ("ladder" if work in (recipes, widths) else "tiny")
    if flags and work not in (lr, onelayer, recipes, widths):
        raise UserError(f"{flags[0]}: no such option; python analyze.py -h lists them")
    if bool(folders) != (work in OF_RUNS):
        raise UserError(f"{words[0]} takes {'run folders' if work in OF_RUNS else 'no run folder'}")
    if min(o.tokens - 1, o.channels, o.seed + 1) < 1 or max(o.tokens, o.channels) > 10**9 or o.seed >= 2**63:
        raise UserError("--tokens must be in [2, 10^9], --channels in [1, 10^9] and --seed in [0, 2^63)")
    if min(o.seeds, o.processes) < 1:
        raise UserError("--seeds, --processes must be 1 or more")
    with naming(o.out_dir):                         # what cannot be written is said before minutes are spent
        Path(o.out_dir).mkdir(parents=True, exist_ok=True)
    try:
        work(folders, o, flags)
    except ModuleNotFoundError as error:            # drawing comes last: all else is written
        if error.name != "matplotlib":
            raise
        print(f"no picture: {error} (pip install matplotlib); tables and JSON are complete", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
