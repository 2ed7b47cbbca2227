"""Why normalized networks survive 4 bits: probes of trained runs, compared in tables and drawn.

    python analyze.py out/gpt out/ngpt                   tables, analysis.json, analysis.png (fig. 1-4 and 8)
    python analyze.py losses out/ngpt_bf16 out/ngpt      relative error against the bf16 twin (fig. 5)
    python analyze.py lr --max_steps=150 --n_embd=64     learning rates x {gpt, ngpt} x {bf16, fp4} (fig. 6a)
    python analyze.py onelayer --max_steps=200           one MLP trained alone (fig. 7)
    python analyze.py quant                              errors of the formats on Gaussians
    python analyze.py -h                                 this text and the options

What is measured. A linear layer is a dot product of K terms for each token and output channel. With w^ and x^
the quantized operands, term k is the signal s_k = w_k x_k plus the noise n_k = w^_k x^_k - w_k x_k.
    SNR         ||signal||^2 / ||noise||^2 of the weights, the activations, the products (all s_k against all
                n_k) and the dot products (sum s_k against sum n_k); in dB, 10 log10
    gain        SNR(dot) - SNR(products) in dB: 0 where the terms are independent of each other (eq. 6)
    z_s, z_n    |sum s_k| and |sum n_k| in units of sqrt(K) sigma_s: SNR(dot) = (z_s / z_n)^2 (eq. 2)
    rho         effective correlation of two terms, over tokens: signals that agree add up in amplitude,
                noises that do not only in power; hence the gain (eq. 3, 4)
    sat         share of blocks with a magnitude above the fixed amax of the recipe
    growth      of the held-out loss, in nats, when Gaussian noise is added to the weights (fig. 8)

The high-precision model of the checkpoint is run on held-out batches; hooks record what enters each layer
that convert() makes, quantized by the layer's own choices: what the run's recipe gives fprop.x and fprop.w
(a bf16 run: its architecture's recipe). Tokens and output channels are sampled; sums over the products come
from matrix products, in float64, so the products (T, J, K) themselves never exist. Some experts of a mixture
are measured, each on tokens of its own, and stand as layers, fc1[0] and so on. Means are over the layers
that all runs have; spreads are standard deviations over runs that differ in their seed alone.

Letters: T tokens and J output channels in the sample, K terms of a dot product (the papers' D).
Source of all equations and figures: 2605.06067, sections 3 and 4, appendix B. Its fig. 6b, the speed of a
layer: python tests/bench.py layer
"""
import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import nvfp4
import train
from assets.figures import curves, draw
from data.files import UserError, command, naming, read_json, write_json
from data.tokens import batch_at, load_data, val_starts
from nvfp4 import FORMATS, RECIPES, hadamard, quantize
from train import OWN_RECIPE

ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)          # relative noise of the flatness probe, as in fig. 8
KIND = ("arch", "width", "recipe")                  # what tells runs apart, but for their seeds

# ---------------------------------------------------------------- probes: signal, noise, correlation


def db(ratio):
    """A ratio of powers in decibels."""
    return 10 * torch.log10(torch.as_tensor(ratio, dtype=torch.float64))


def snr(t, q):
    """||t||^2 / ||t - q||^2 of a tensor and its quantized values; () float64."""
    t = t.double()
    return t.square().sum() / (t - q.double()).square().sum()


def moments(x, w, xq, wq):
    """Sums over the terms s_k, n_k of the dot products of activations x, xq (T, K) and weights w, wq (J, K),
    in float64; Var (unbiased) and Mean are over tokens.

    value   with e = xq - x and d = wq - w, n_k = wq_k e_k + d_k x_k; so that every sum over k of products of
            two terms is a sum of matrix products, and small noise is no difference of large numbers
    """
    x, w, xq, wq = (t.double() for t in (x, w, xq, wq))
    e, d = xq - x, wq - w
    mx, me = x.mean(0), e.mean(0)
    cov = ((x - mx) * (e - me)).sum(0) / (len(x) - 1)
    N2 = e.square() @ wq.square().T + 2 * (e * x) @ (wq * d).T + x.square() @ d.square().T
    var_n = wq.square() @ e.var(0) + d.square() @ x.var(0) + 2 * (wq * d) @ cov
    return SimpleNamespace(
        K=x.shape[1],
        S=x @ w.T,                                  # (T, J) sum s_k
        N=e @ wq.T + x @ d.T,                       # (T, J) sum n_k
        S2=x.square() @ w.square().T,               # (T, J) sum s_k^2
        N2=N2.clamp(min=0),                         # (T, J) sum n_k^2
        var_s=w.square() @ x.var(0),                # (J,) sum Var(s_k)
        var_n=var_n.clamp(min=0),                   # (J,) sum Var(n_k)
        mean2_s=(w * mx).square().sum(1),           # (J,) sum Mean(s_k)^2
        mean2_n=(wq * me + d * mx).square().sum(1))  # (J,) sum Mean(n_k)^2


def averaging_gain(m):
    """SNR of the products and of the dot products, and the ratio of the second to the first (eq. 6)."""
    products, dot = m.S2.sum() / m.N2.sum(), m.S.square().sum() / m.N.square().sum()
    return products, dot, dot / products


def normalized(m):
    """z_s and z_n (eq. 2) of each channel, (J,): |S| and |N| over sqrt(K) sigma_s, with sigma_s the sample
    std of s_k over k; each the root of a ratio of sums over tokens.

    value   (z_s / z_n)^2 = SNR of the dot products, exactly
    """
    sigma2 = (m.S2 - m.S.square() / m.K).sum(0) / (m.K - 1)
    return (m.S.square().sum(0) / (m.K * sigma2)).sqrt(), (m.N.square().sum(0) / (m.K * sigma2)).sqrt()


def rho(total, sum_var, K):
    """Effective pairwise correlation of K terms (eq. 3): (Var(sum u_k) / sum Var(u_k) - 1) / (K - 1).

    total (T, J) = sum u_k, sum_var (J,) = sum Var(u_k); returns (J,); NaN where nothing varies
    error   standard error near 0: sqrt(2 / T) / K a channel
    """
    return (total.var(0) / sum_var - 1) / (K - 1)


# ---------------------------------------------------------------- probes: theory

def eq4(D, sigma_s2, rho_s, mu_s2, sigma_n2, mu_n2):
    """SNR of dot products of D terms: [D sigma_s^2 (1 + (D-1) rho_s) + mu_S^2] / [D sigma_n^2 + mu_N^2].

    sigma^2: mean variance of a term over tokens; mu: mean of the sum. All (J,) or numbers; over channels,
    numerator and denominator are summed. The noises of two terms are taken to be uncorrelated.
    """
    signal = torch.as_tensor(D * sigma_s2 * (1 + (D - 1) * rho_s) + mu_s2, dtype=torch.float64)
    noise = torch.as_tensor(D * sigma_n2 + mu_n2, dtype=torch.float64)
    return signal.sum() / noise.sum()


def predict(m, k):
    """eq. 4 for k of the K terms, drawn at random, from the statistics of all K; k > K extrapolates.

    value   rho and the variances stay what they are. The squared mean of the sum is made of squares and of
            products of two different means, each at its average: k a + k (k - 1) b
    """
    def mean2(total, parts):
        whole = total.mean(0).square()
        return k * parts / m.K + k * (k - 1) * (whole - parts) / (m.K * (m.K - 1))
    return eq4(k, m.var_s / m.K, rho(m.S, m.var_s, m.K), mean2(m.S, m.mean2_s), m.var_n / m.K,
               mean2(m.N, m.mean2_n).clamp(min=0))


def eq5(D, rho_ngpt, rho_gpt):
    """SNR of nGPT's dot products over that of GPT's: (1 + D rho_nGPT) / (1 + D rho_GPT)."""
    return (1 + D * rho_ngpt) / (1 + D * rho_gpt)


def regimes(rho_ngpt, rho_gpt):
    """Where eq. 5 bends: no gap for D far below 1 / rho_nGPT, growth in between, and far above 1 / rho_GPT
    the factor rho_nGPT / rho_GPT. NaN where a correlation is not positive."""
    start, end = (1 / r if r > 0 else math.nan for r in (rho_ngpt, rho_gpt))
    return {"no_gap_below": start, "saturates_above": end, "factor": end / start}


def partial_sums(x, w, xq, wq, ks, seed=0):
    """{k: (SNR of the dot products, mean rho_s)} of the first k terms, for each k.

    The terms are shuffled: channels of the same head lie side by side, and k of them are to stand for all.
    """
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x.device)
    found = {}
    for k in ks:
        m = moments(*(t[:, order[:k]] for t in (x, w, xq, wq)))
        found[k] = averaging_gain(m)[1], rho(m.S, m.var_s, k).nanmean()
    return found


# ---------------------------------------------------------------- probes: the rest

@torch.no_grad()
def flatness(model, loss, alphas=ALPHAS, draws=2, seed=0):
    """Growth of loss(model) under Gaussian noise of std alpha ||W||_F / sqrt(numel) on every matrix W: one
    number for each alpha, means over draws; the same draws serve every alpha. Fig. 8."""
    clean, growth = loss(model), []
    for alpha in progress(alphas, "flatness"):
        total = 0.0
        for n in range(draws):
            noisy, generator = copy.deepcopy(model), None
            for p in noisy.parameters():
                if p.dim() >= 2:
                    generator = generator or torch.Generator(p.device).manual_seed(seed + n)
                    noise = torch.randn(p.shape, generator=generator, device=p.device)
                    p += alpha * p.norm() / math.sqrt(p.numel()) * noise
            total += loss(noisy)
        growth.append(total / draws - clean)
    return growth


def relative_error(quantized, reference, window=1):
    """(loss_q - loss_ref) / loss_ref of two curves (n,), both averaged over a trailing window of steps.

    returns (n - window + 1,): the first value belongs to step window - 1
    """
    q, r = (np.convolve(v, np.ones(window) / window, "valid") for v in (quantized, reference))
    return (q - r) / r


def rounding(x, draws=16, seed=0, **kw):
    """Bias and variance of stochastic rounding of x (M, K) under quantize(**kw), over draws.

    returns slope   <mean, x> / <x, x>: 1 if unbiased, below 1 where large magnitudes saturate
            z       bias against the sign of x in standard errors of its estimate
            variance    mean over elements of the unbiased variance over draws
    """
    total, squares = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    for n in range(1, draws + 1):
        q = quantize(x, stochastic=True, seed=seed + n, **kw).dequantize().double()
        total += q
        squares += q * q
    x, mean = x.double(), total / draws
    variance = (squares - draws * mean.square()).clamp(min=0) / (draws - 1)
    error = (variance / draws * x.square()).sum().sqrt()
    return {"slope": float((mean * x).sum() / x.square().sum()),
            "z": float(((mean - x) * x).sum() / error), "variance": float(variance.mean())}


def histograms(q):
    """Counts of the 16 codes of a Quantized, and {e: its block scales from 2^e up to 2^(e+1)}."""
    codes = torch.bincount(torch.stack([q.codes & 15, q.codes >> 4]).flatten().int(), minlength=16)
    scales = nvfp4.unswizzle(q.scales, *q.shape).float()
    exponents, counts = scales[scales > 0].log2().floor().int().unique(return_counts=True)
    return codes.tolist(), dict(zip(exponents.tolist(), counts.tolist(), strict=True))


def saturated(x, how):
    """Share of blocks of x (M, K) with a magnitude above the fixed amax of how, the arguments of quantize();
    0 where the recipe or the format fixes none."""
    form = FORMATS[how["format"]]
    if how["amax"] is None or form.top is None:
        return 0.0
    height, width = form.shape_of(how["square"])
    blocks = x.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return float((blocks.abs().amax((1, 3)) > how["amax"]).double().mean())


# ---------------------------------------------------------------- recording

SILENCE = 10                                        # seconds without a line where there is no terminal


def progress(items, what):
    """The items, with a bar on the terminal meanwhile; elsewhere a line now and then."""
    items, said = list(items), time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            print(f"\r{what} [{'=' * (30 * done // len(items)):30s}] {done}/{len(items)}", file=sys.stderr,
                  end="\n" if done == len(items) else "", flush=True)
        elif done == len(items) or time.monotonic() - said > SILENCE:
            said = time.monotonic()
            print(f"{what} {done}/{len(items)}", file=sys.stderr, flush=True)


def as_multiplied(x, how):
    """A matrix as its GEMM sees it, rotated where the recipe says so, and its quantized values, fp32.
    how: arguments of quantize(), from the layer's recipe"""
    seen = x if how["signs"] is None else hadamard(x, how["signs"])
    return seen, quantize(x, **how).dequantize()


class Part(NamedTuple):
    """What is measured as a layer: an FP4 layer, or one expert of it."""
    layer: nvfp4.FP4Linear
    expert: int | None = None


N_EXPERTS = 4                                       # of each mixture, from the first to the last


def named_parts(model):
    """{name: Part} of all FP4 layers; of experts N_EXPERTS at most."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nvfp4.FP4Linear) and layer.weight.dim() == 2:
            found[name] = Part(layer)
        elif isinstance(layer, nvfp4.FP4Linear):
            step = -(-len(layer.weight) // N_EXPERTS)
            found |= {f"{name}[{e}]": Part(layer, e) for e in range(0, len(layer.weight), step)}
    return found


@torch.no_grad()
def record(model, batches, n_tokens, seed=0):
    """What enters the FP4 layers of a converted model that runs in high precision: {name: (x, xq)}, (T, K)
    fp32 each, as multiplied and quantized, by the names of named_parts().

    batches: (idx, targets) pairs; n_tokens rows in all, the same tokens for every layer; of an expert at most
    as many, drawn from its own. Whole batches are quantized, as in training, since a measured tensor scale
    depends on all that is in them.
    """
    generator, found, handles = torch.Generator().manual_seed(seed), {}, []
    by_layer = {}
    for name, part in named_parts(model).items():
        by_layer.setdefault(part.layer, []).append((name, part.expert))

    def keep(layer, x, ends=None):
        x = x.detach().flatten(0, -2).float()
        pair = as_multiplied(x, layer.cfg.operand("fprop.x", layer.keys, layer.signs))
        for name, expert in by_layer[layer]:
            mine = rows
            if expert is not None:                  # its rows, but for the zeros that fill them up
                start = ends[expert - 1] if expert else 0
                mine = start + x[start:ends[expert]].any(1).nonzero().flatten()
                mine = mine[torch.randperm(len(mine), generator=generator)[:len(rows)]]
            found.setdefault(name, []).append([t[mine.to(t.device)] for t in pair])
    for layer in by_layer:
        handles.append(layer.register_forward_pre_hook(lambda layer, args: keep(layer, *args)))
    with nvfp4.high_precision(model):
        for idx, _ in batches:
            rows = torch.randperm(idx.numel(), generator=generator)[:-(-n_tokens // len(batches))]
            model(idx)
    for handle in handles:
        handle.remove()
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items()}


# ---------------------------------------------------------------- what is measured of a layer

class Sample(NamedTuple):
    """A layer's operands as they are multiplied, and quantized, fp32."""
    x: torch.Tensor                                 # (T, K)
    xq: torch.Tensor
    w: torch.Tensor                                 # (N, K), all output channels
    wq: torch.Tensor
    m: SimpleNamespace                              # moments() of x and J of the channels
    how_x: dict                                     # what the recipe gave them: arguments of quantize()
    how_w: dict


class Probe(NamedTuple):
    of: Callable                                    # function of a Sample: a number
    form: str                                       # how tables print it


# What is measured of every layer, stands in every table and in analysis.json. A new probe is a row here.
PROBES = {
    "weights": Probe(lambda s: db(snr(s.w, s.wq)), ".2f"),
    "activations": Probe(lambda s: db(snr(s.x, s.xq)), ".2f"),
    "products": Probe(lambda s: db(averaging_gain(s.m)[0]), ".2f"),
    "dot": Probe(lambda s: db(averaging_gain(s.m)[1]), ".2f"),
    "gain": Probe(lambda s: db(averaging_gain(s.m)[2]), ".2f"),
    "eq4": Probe(lambda s: db(predict(s.m, s.m.K)), ".2f"),
    "rho_s": Probe(lambda s: rho(s.m.S, s.m.var_s, s.m.K).nanmean(), ".1e"),
    "rho_n": Probe(lambda s: rho(s.m.N, s.m.var_n, s.m.K).nanmean(), ".1e"),
    "z_s": Probe(lambda s: normalized(s.m)[0].square().mean().sqrt(), ".3f"),
    "z_n": Probe(lambda s: normalized(s.m)[1].square().mean().sqrt(), ".3f"),
    "sat_x": Probe(lambda s: saturated(s.x, s.how_x), ".1%"),
    "sat_w": Probe(lambda s: saturated(s.w, s.how_w), ".1%"),
}
STAGES = ("weights", "activations", "products", "dot")


@torch.no_grad()
def measure(part, x, xq, n_channels, seed=0):
    """All that is measured of one FP4 layer or expert, from what record() kept of its input.

    returns {probe: number}
            [{k, dot, rho_s, eq4}] for sums of k terms, the first two NaN for k > K
            [{dot, z_s, z_n, rho_s, rho_n}] of the sampled output channels
    """
    layer, expert = part
    how_x, how_w = (layer.cfg.operand(name, layer.keys, layer.signs) for name in ("fprop.x", "fprop.w"))
    w, wq = as_multiplied(layer.weight.detach().flatten(0, -2).float(), how_w)  # all experts have one scale
    if expert is not None:
        w, wq = (t.view_as(layer.weight)[expert] for t in (w, wq))
    chosen = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))[:n_channels].to(x.device)
    operands = x, w[chosen], xq, wq[chosen]
    sample = Sample(x, xq, w, wq, moments(*operands), how_x, how_w)
    probes = {name: float(probe.of(sample)) for name, probe in PROBES.items()}
    return probes, by_terms(sample.m, operands, seed), by_channel(sample.m)


def by_terms(m, operands, seed):
    ks, rows = [16 * 2**i for i in range(13)], []
    sums = partial_sums(*operands, [k for k in ks if k <= m.K], seed)
    for k in ks:
        ratio, r = sums.get(k, (math.nan, math.nan))
        rows.append({"k": k, "dot": float(db(ratio)), "rho_s": float(r), "eq4": float(db(predict(m, k)))})
    return rows


def by_channel(m):
    z_s, z_n = normalized(m)
    found = {"dot": db((z_s / z_n).square()), "z_s": z_s, "z_n": z_n, "rho_s": rho(m.S, m.var_s, m.K),
             "rho_n": rho(m.N, m.var_n, m.K)}
    return [dict(zip(found, row, strict=True)) for row in torch.stack(list(found.values()), 1).tolist()]


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


NO_MATTER = ("out_dir", "resume", "stop_at", "device", "eval_", "log_", "checkpoint_", "sample_", "seed")


def read_runs(folders):
    """Runs by kind. Those of one architecture and width are averaged or compared: only their seeds and
    recipes may differ, or what does not matter."""
    runs = sorted(map(read_run, folders), key=lambda r: list(r["kind"].values()))
    for a, b in itertools.combinations(runs, 2):
        if a["kind"] == b["kind"]:
            raise UserError(f"{a['run']} and {b['run']} are of one kind and seed; give one of them")
        free = NO_MATTER if a["kind"]["recipe"] == b["kind"]["recipe"] else (*NO_MATTER, "recipe", "fp4_")
        differ = [k for k, v in a["config"].items() if b["config"].get(k) != v and not k.startswith(free)]
        if differ and all(a["kind"][k] == b["kind"][k] for k in ("arch", "width")):
            raise UserError(f"{a['run']} and {b['run']} differ in {differ[0]}; analyse them one at a "
                            "time, or give the second choice a recipe of its own")
    return runs


def analyse(folder, o):
    """All probes of a run, as rows {arch, width, recipe, seed, ...}: of its layers, which also carry the loss
    and mean growth of the run, of sums of k terms, of channels, and of the noise alpha."""
    model, _, c = train.load_run(folder)
    device, _ = train.choose_device(replace(c, device="auto"))
    model, val = model.to(device), load_data(c.dataset, c.model.block_size, c.model.vocab_size).val
    recipe = c.recipe if "fprop" in c.fp4.gemms else OWN_RECIPE[c.model.arch]
    cfg = c.fp4 if recipe == c.recipe else RECIPES[recipe]
    starts = val_starts(len(val), c.model.block_size, (4, c.batch_size))
    batches = [batch_at(val, s, c.model.block_size, device) for s in starts]

    few = batch_at(val, starts[:, ::4].flatten(), c.model.block_size, device)   # flatness takes many losses

    @torch.no_grad()
    def loss(model, batches):
        return float(sum(model(*batch).double() for batch in batches) / len(batches))
    growth, kind = flatness(model, lambda model: loss(model, [few]), seed=o.seed), read_run(folder)["kind"]
    whole = {"quantized_as": recipe, "loss": loss(model, batches), "growth": sum(growth) / len(growth)}
    nvfp4.convert(model, cfg, report=lambda line: None)
    parts = named_parts(model)
    if not parts:
        raise UserError(f"{folder}: {recipe} must quantize a layer; give a run that has some in FP4")
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
    write(o, "analysis", found, sheet(**found, channels=channels))


def against(layers):
    """nGPT against GPT of the same width and seed, layer by layer: what was measured, and what eq. 5 makes of
    the correlations."""
    rows = [{"width": n["width"], "ngpt": n["recipe"], "gpt": g["recipe"], "seed": n["seed"],
             "gap_db": n["dot"] - g["dot"], "eq5_db": float(db(eq5(n["K"], n["rho_s"], g["rho_s"]))),
             "flatness_ratio": g["growth"] / n["growth"], "rho_ngpt": n["rho_s"], "rho_gpt": g["rho_s"]}
            for n in find(layers, arch="ngpt")
            for g in find(layers, arch="gpt", layer=n["layer"], width=n["width"], seed=n["seed"])]
    return [p | regimes(p["rho_ngpt"][0], p["rho_gpt"][0]) for p in over_seeds(rows, "width", "ngpt", "gpt")]


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
                y = y or [db(eq5(k, p["rho_ngpt"][0], p["rho_gpt"][0])) for k in x]
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


# ---------------------------------------------------------------- experiments

def training(arch, recipe, name, o, flags, parts=(1,)):
    """Train a run in a folder of its own, silently; yields (folder, last evaluation) whenever one of these
    parts of its steps is done."""
    own = [flag for flag in flags if flag.lstrip("-").partition("=")[0] in ("stop_at", "resume")]
    if own:
        raise UserError(f"{own[0]}: {name.partition('_')[0]} stops and resumes by itself; leave it out")
    c = train.load_config([f"configs/{arch}_{o.config}.py", *flags, f"--recipe={recipe}", f"--seed={o.seed}",
                           "--sample_tokens=0", f"--out_dir={o.out_dir}/{name}_{arch}_{recipe}"])
    for part in progress(parts, f"{name} {arch} {recipe}"):
        with contextlib.redirect_stdout(io.StringIO()):
            result = train.train(replace(c, stop_at=math.ceil(part * c.max_steps), resume=part > parts[0]))
        yield c.out_dir, result


def lr(_, o, flags):
    """Fig. 6a: final loss against the learning rate, in bf16 and in the architecture's FP4 recipe."""
    rows, rates = [], o.rates.split(",")
    for arch, recipe, rate in itertools.product(OWN_RECIPE, ("bf16", "fp4"), rates):
        recipe = OWN_RECIPE[arch] if recipe == "fp4" else recipe
        try:
            (_, found), = training(arch, recipe, f"lr_{rate}", o, [*flags, f"--learning_rate={rate}"])
        except train.Diverged:                      # a rate that is too high is a result too
            found = {}
        loss = found.get("val_loss" if recipe == "bf16" else "val_loss_fp4", math.nan)
        rows.append({"arch": arch, "recipe": recipe, "rate": float(rate), "loss": loss})
    print("final validation loss in nats, of FP4 runs in FP4; -: diverged")
    table(rows, {"arch": "", "recipe": "", "rate": "g", "loss": ".4f"})
    write(o, "lr", {"flags": flags, "results": rows}, [
        ("Fig. 6a  learning rates", "peak learning rate", "final validation loss, nats a token",
         curves(rows, "rate", "loss"), {"xscale": "log", "xticks": [float(rate) for rate in rates]})])


def onelayer(_, o, flags):
    """Fig. 7: loss and rho of embedding, one MLP and head, trained in bf16, with stops for the probes."""
    rows = []
    for arch in OWN_RECIPE:
        parts = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1
        for folder, found in training(arch, "bf16", "onelayer", o, [*flags, "--pattern=-"], parts):
            last = {"step": found["step"], "loss": found["val_loss"]}
            rows += [row | last for row in analyse(folder, o)["layers"]]
    rows = summary(rows, ("arch", "recipe", "step"), np.mean)
    print("embedding, one MLP and head: validation loss in nats; means of the two linear layers")
    table(rows, {"arch": "", "step": "", "loss": ".4f"} | COLUMNS)
    write(o, "onelayer", {"flags": flags, "results": rows}, [
        (f"Fig. 7  one MLP: {key}", "optimizer step", label, curves(rows, "step", key), {})
        for key, label in (("loss", "validation loss, nats a token"), ("rho_s", "rho_s, mean of 2 layers"))])


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

COMMANDS = {"losses": losses, "lr": lr, "onelayer": onelayer, "quant": quant}


@command("analyze.py")
def main(argv):
    parser = argparse.ArgumentParser("analyze.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="[losses] RUN ..., or lr, onelayer, quant")
    for name, default, what in (
            ("out_dir", "out/analysis", "folder for JSON, picture and the runs of lr and onelayer"),
            ("tokens", 2048, "tokens in the sample"),
            ("channels", 128, "output channels of each layer in the sample"),
            ("seed", 0, "of samples, noise and the runs of lr and onelayer"),
            ("config", "tiny", "lr and onelayer train configs/{gpt,ngpt}_CONFIG.py with the other flags"),
            ("rates", "5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2", "peak learning rates of lr")):
        parser.add_argument(f"--{name}", default=default, type=type(default), help=f"{what} ({default})")
    o, flags = parser.parse_known_args(argv)
    words = vars(o).pop("words")
    work = COMMANDS.get(words[0], compare)
    folders = words if work is compare else words[1:]
    if flags and work not in (lr, onelayer):
        raise UserError(f"{flags[0]}: no such option; python analyze.py -h lists them")
    if bool(folders) != (work in (compare, losses)):
        raise UserError(f"{words[0]} takes {'run folders' if work is losses else 'no run folder'}")
    if min(o.tokens - 1, o.channels, o.seed + 1) < 1 or max(o.tokens, o.channels) > 10**9 or o.seed >= 2**63:
        raise UserError("--tokens must be in [2, 10^9], --channels in [1, 10^9] and --seed in [0, 2^63)")
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
