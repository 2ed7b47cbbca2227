"""Do normalized networks survive 4 bits better, and why? Trained runs, measured, compared and drawn.

    python analyze.py out/gpt out/ngpt                   tables, analysis.json, analysis.png (fig. 1-4 and 8)
    python analyze.py losses out/ngpt_bf16 out/ngpt      relative error against the bf16 twin (fig. 5)
    python analyze.py outliers out/gpt                   what clamping a token's outliers is worth
    python analyze.py quant                              errors of the formats on Gaussians
    python analyze.py -h                                 this text and the options

assets/experiments.py trains many runs and measures them in the same way.

A linear layer is a dot product of K terms for each token and output channel. With w^ and x^ the quantized
operands, term k is the signal s_k = w_k x_k plus the noise n_k = w^_k x^_k - w_k x_k.
    SNR         ||signal||^2 / ||noise||^2 of the weights, the activations, the products (all s_k against all
                n_k) and the dot products (sum s_k against sum n_k); in dB, 10 log10
    gain        SNR(dot) - SNR(products) in dB: 0 where the terms are independent of each other (eq. 6)
    z_s, z_n    |sum s_k| and |sum n_k| in units of sqrt(K) sigma_s: SNR(dot) = (z_s / z_n)^2 (eq. 2)
    rho         effective correlation of two terms, over tokens: signals that agree add up in amplitude,
                noises that do not only in power; hence the gain (eq. 3, 4)
    initial     share of ||w||^2 that is still the weight's initial value: its projection on that
    gain_old    averaging gain of the signal by that part of the weight alone, and by the rest, which was
                learned (gain_new): random weights average no noise
    sat         share of blocks with a magnitude above the fixed amax of the recipe
    dgrad.dy    SNR of the output gradient as dgrad multiplies it, and as wgrad does (wgrad.dy)
    growth      of the held-out loss, in nats, when Gaussian noise is added to the weights (fig. 8)

The high-precision model of a run computes held-out batches, forward and backward. Hooks record what each
layer that convert() makes would multiply, quantized by the layer's own recipe (a bf16 run: by its
architecture's). We sample tokens and output channels. The products (T, J, K) never exist: sums over them are
matrix products, in float64. Some experts of a mixture are measured, each on its own tokens, and stand as
layers, fc1[0] and so on. Means are over the layers that all runs have; spreads are standard deviations over
runs that differ in their seed alone.

Letters: T tokens and J output channels in the sample, K terms of a dot product (the papers' D).
Equations and figures: 2605.06067, sections 3 and 4, appendix B. For fig. 6b run python tests/bench.py layer.
"""
import argparse
import copy
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
from assets.figures import analysis, curves, draw
from data.run import UserError, command, naming, read_json, read_metrics, write_json
from data.tokens import batch_at, load_data, val_starts
from model import build
from nvfp4 import FORMATS, OPERANDS, RECIPES, fill_up, hadamard, quantize, whole
from papers import split_outliers
from train import OWN_RECIPE

# ---------------------------------------------------------------- signal, noise, correlation


def db(ratio):
    """A ratio of powers in decibels."""
    return 10 * torch.log10(torch.as_tensor(ratio, dtype=torch.float64))


def snr(t, q):
    """||t||^2 / ||t - q||^2 of a tensor and its quantized values; () float64."""
    t = t.double()
    return t.square().sum() / (t - q.double()).square().sum()


def moments(x, w, xq, wq):
    """Sums over the terms s_k, n_k of the dot products of activations x, xq (T, K) and weights w, wq (J, K),
    in float64. Var (unbiased) and Mean are over tokens.

    value   with e = xq - x and d = wq - w, n_k = wq_k e_k + d_k x_k. So every sum over k of products of two
            terms is a sum of matrix products, and we never subtract large numbers to find small noise
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


def signal_gain(x, w):
    """averaging_gain() of the signal alone: the square of x w^T, over what it would be if products added up
    at random. x (T, K), w (J, K)"""
    x, w = x.double(), w.double()
    return (x @ w.T).square().sum() / (x.square() @ w.square().T).sum()


def initial_part(w, first):
    """The projection of a weight on its initial value, of the same shape: what training has left of it."""
    return (w * first).sum() / first.square().sum() * first


def normalized(m):
    """z_s and z_n (eq. 2) of each channel, (J,): |S| and |N| over sqrt(K) sigma_s. sigma_s is the sample std
    of s_k over k; each z is the root of a ratio of sums over tokens.

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


# ---------------------------------------------------------------- theory

def eq4(D, sigma_s2, rho_s, mu_s2, sigma_n2, mu_n2):
    """SNR of dot products of D terms: [D sigma_s^2 (1 + (D-1) rho_s) + mu_S^2] / [D sigma_n^2 + mu_N^2].

    sigma^2: mean variance of a term over tokens; mu: mean of the sum. All are (J,) or numbers; numerator and
    denominator are summed over channels. The equation takes the noises of two terms to be uncorrelated.
    """
    signal = torch.as_tensor(D * sigma_s2 * (1 + (D - 1) * rho_s) + mu_s2, dtype=torch.float64)
    noise = torch.as_tensor(D * sigma_n2 + mu_n2, dtype=torch.float64)
    return signal.sum() / noise.sum()


def predict(m, k):
    """eq. 4 for k of the K terms, drawn at random, from the statistics of all K; k > K extrapolates.

    value   rho and the variances stay as they are. The squared mean of the sum consists of squares and of
            products of two different means, each at its average: k a + k (k - 1) b
    """
    def mean2(total, parts):
        square = total.mean(0).square()
        return k * parts / m.K + k * (k - 1) * (square - parts) / (m.K * (m.K - 1))
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


# ---------------------------------------------------------------- flatness, rounding, saturation, outliers

ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)          # relative noise of the flatness probe, as in fig. 8


@torch.no_grad()
def flatness(model, loss, alphas=ALPHAS, draws=2, seed=0):
    """Growth of loss(model) under Gaussian noise of std alpha ||W||_F / sqrt(numel) on every matrix W: one
    number for each alpha, means over draws. All alphas share the draws. Fig. 8.

    Draws begin at seed 2^31: noise of a small seed can equal the initial weights of a model of that seed.
    """
    clean, growth = loss(model), []
    for alpha in progress(alphas, "flatness"):
        total = 0.0
        for n in range(draws):
            noisy, generator = copy.deepcopy(model), None
            for p in noisy.parameters():
                if p.dim() >= 2:
                    generator = generator or torch.Generator(p.device).manual_seed(2**31 + seed + n)
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


def rounding_slope(x, draws=16, seed=0, **kw):
    """<mean, x> / <x, x> of draws of stochastic rounding by quantize(**kw): 1 if it is unbiased, less where
    large magnitudes saturate."""
    draws = [quantize(x, stochastic=True, seed=seed + n, **kw) for n in range(1, draws + 1)]
    mean = sum(q.dequantize().double() for q in draws) / len(draws)
    return float((mean * x).sum() / x.double().square().sum())


def saturated(t, how):
    """Share of blocks of t (M, K) with a magnitude above the fixed amax of how, the arguments of quantize();
    0 where the recipe or the format fixes none."""
    if how is None or how["amax"] is None or FORMATS[how["format"]].top is None:
        return 0.0
    height, width = FORMATS[how["format"]].shape_of(how["square"])
    t = fill_up(t, rows=-len(t) % height)           # as the weight was, for quantize()
    blocks = t.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return float((blocks.abs().amax((1, 3)) > how["amax"]).double().mean())


# Case: (quantile, whether outliers are added again, SNR of 2501.17116's 1.3B model at 30k steps).
CLAMPS = {"no clamp": (1.0, False, 8.31), "clamp 0.999": (0.999, False, 14.25),
          "clamp 0.99": (0.99, False, math.nan), "clamp 0.97": (0.97, False, math.nan),
          "clamp 0.999 + rest": (0.999, True, 15.31), "clamp 0.99 + rest": (0.99, True, 18.38),
          "clamp 0.97 + rest": (0.97, True, 20.88)}


def fidelity(x, quantile, compensate):
    """SNR in dB of activations x (M, K) when each row's outliers are clamped and the row is rounded in a
    scale of its own. compensate: the parts cut off are added again."""
    clamped, rest = split_outliers(x, quantile)
    return float(db(snr(x, quantize(clamped, "e2m1_vector").dequantize() + compensate * rest)))


# ---------------------------------------------------------------- recording the six operands

def progress(items, what):
    """The items, and a line on stderr when they are done; every ten seconds, too."""
    items, said = list(items), time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if done == len(items) or time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{what} {done}/{len(items)}", file=sys.stderr, flush=True)


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


def choices_of(layer):
    """{operand: arguments of quantize(), or None where the recipe keeps that GEMM in high precision}."""
    keys = layer.keys.to(layer.weight.device)
    return {operand: layer.cfg.operand(operand, keys) for operand in OPERANDS}


def as_seen(t, how):
    """The matrix that a GEMM sees of t, whose lines lie along the axis that it sums over: filled up to whole
    blocks and rotated where the recipe says so.

    how     arguments of quantize(), from choices_of(layer); None: this GEMM is in high precision
    """
    if how is None:
        return t
    t = fill_up(t, columns=-t.shape[1] % whole(how))
    return t if how["signs"] is None else hadamard(t, how["signs"])


def as_multiplied(t, how, codes=None):
    """(as_seen(), its quantized values), fp32.

    codes   values to quantize in place of t, where the recipe reuses the forward's codes; None: t
    We leave out two things of papers.py: occ does not split fprop.x here, and e5m2 does not round gradients.
    """
    codes = t if codes is None else codes
    if how is not None:
        codes = quantize(fill_up(codes, columns=-codes.shape[1] % whole(how)), **how).dequantize()
    return as_seen(t, how), codes


def both_ways(layer, how, names, t):
    """{operand: as_multiplied()} of a matrix that two GEMMs take, as it is and transposed."""
    rows, columns = names
    found = {rows: as_multiplied(t, how[rows])}
    reuses = getattr(layer.cfg, "reuse_codes", False) and rows.startswith("fprop")
    codes = found[rows][1].t() if reuses else None
    return found | {columns: as_multiplied(t.t(), how[columns], codes)}


TOKEN_AXIS = {"fprop.x": 0, "wgrad.x": 1, "dgrad.dy": 0, "wgrad.dy": 1}


def of_tokens(t, operand, how, tokens):
    """The part of an operand that belongs to some tokens. Tokens are rows, but in wgrad columns. Columns of a
    block share a scale, so there we take whole blocks that hold these tokens, about as many."""
    if TOKEN_AXIS[operand] == 1 and how:
        b = FORMATS[how["format"]].block
        blocks = list(dict.fromkeys((tokens // b).tolist()))[:-(-len(tokens) // b)]
        tokens = (b * torch.tensor(blocks, dtype=torch.long)[:, None] + torch.arange(b)).flatten()
    return t.index_select(TOKEN_AXIS[operand], tokens.to(t.device))


def record(model, batches, n_tokens, seed=0):
    """Run a converted model in high precision, forward and backward, and record four operands of every part:
    {name of part: {operand: (as multiplied, quantized)}}, fp32, for fprop.x, wgrad.x, dgrad.dy, wgrad.dy.

    batches: (idx, targets) pairs. We sample n_tokens tokens in all, the same ones for every layer; an expert
    gives at most as many of its own. We quantize whole batches, as in training: a measured tensor scale
    depends on all of a batch, and a block of wgrad holds many tokens. We keep the sample alone. No weight
    gets a gradient.
    """
    generator, by_layer, chosen = torch.Generator().manual_seed(seed), {}, {}
    parts = named_parts(model)
    for name, part in parts.items():
        by_layer.setdefault(part.layer, []).append((name, part.expert))
    how = {layer: choices_of(layer) for layer in by_layer}      # before the layers leave FP4
    found = {name: {} for name in parts}

    def keep(layer, names, t):
        for operand, pair in both_ways(layer, how[layer], names, t.detach().flatten(0, -2).float()).items():
            for (name, _), tokens in zip(by_layer[layer], chosen[layer], strict=True):
                sample = [of_tokens(m, operand, how[layer][operand], tokens) for m in pair]
                found[name].setdefault(operand, []).append(sample)

    def draw_tokens(x, expert, ends=None):
        if expert is None:
            return rows
        start = ends[expert - 1] if expert else 0   # its rows, but for the zeros that fill them up
        mine = start + x[start:ends[expert]].any(1).nonzero().flatten()
        return mine[torch.randperm(len(mine), generator=generator)[:len(rows)]].cpu()

    def hook(layer, args, y):
        if layer in chosen:                         # a checkpointed block computes again in the backward
            return
        chosen[layer] = [draw_tokens(args[0], expert, *args[1:]) for _, expert in by_layer[layer]]
        keep(layer, ("fprop.x", "wgrad.x"), args[0])
        y.register_hook(lambda dy: keep(layer, ("dgrad.dy", "wgrad.dy"), dy))
    handles = [layer.register_forward_hook(hook) for layer in by_layer]
    with nvfp4.high_precision(model):
        for idx, targets in batches:
            rows = torch.randperm(idx.numel(), generator=generator)[:-(-n_tokens // len(batches))]
            torch.autograd.grad(model(idx, targets), model.embed.weight)        # passes every layer
            chosen.clear()
    for handle in handles:
        handle.remove()
    return {name: {operand: [torch.cat(parts, TOKEN_AXIS[operand]) for parts in zip(*samples, strict=True)]
                   for operand, samples in operands.items()} for name, operands in found.items()}


def weights_of(part, how):
    """{operand: (as multiplied, quantized)} of fprop.w (N, K) and dgrad.w (K, N). Experts share one scale."""
    layer, expert = part
    found = both_ways(layer, how, ("fprop.w", "dgrad.w"), layer.filled_weight().float())
    if expert is not None:
        E = len(layer.weight)
        found = {"fprop.w": [t.unflatten(0, (E, -1))[expert] for t in found["fprop.w"]],
                 "dgrad.w": [t.unflatten(1, (E, -1))[:, expert] for t in found["dgrad.w"]]}
    return found | {"fprop.w": [t[:layer.out_features] for t in found["fprop.w"]]}


# ---------------------------------------------------------------- what is measured of a layer

class Sample(NamedTuple):
    """What a probe sees of a layer."""
    operands: dict                                  # {one of OPERANDS: (as multiplied, quantized)}, fp32
    how: dict                                       # {one of OPERANDS: arguments of quantize(), or None}
    old: torch.Tensor                               # initial_part() of fprop.w, (N, K)
    new: torch.Tensor                               # the rest of it: what was learned
    channels: torch.Tensor                          # J of the N output channels
    m: SimpleNamespace                              # moments() of fprop's operands, J of the channels


class Probe(NamedTuple):
    of: Callable                                    # function of a Sample: a number
    form: str                                       # how tables print it


# A probe is a number of a layer, shown in every table and in analysis.json. A new one is a row here.
PROBES = {
    "weights": Probe(lambda s: db(snr(*s.operands["fprop.w"])), ".2f"),
    "activations": Probe(lambda s: db(snr(*s.operands["fprop.x"])), ".2f"),
    "products": Probe(lambda s: db(averaging_gain(s.m)[0]), ".2f"),
    "dot": Probe(lambda s: db(averaging_gain(s.m)[1]), ".2f"),
    "gain": Probe(lambda s: db(averaging_gain(s.m)[2]), ".2f"),
    "eq4": Probe(lambda s: db(predict(s.m, s.m.K)), ".2f"),
    "initial": Probe(lambda s: s.old.square().sum() / (s.old + s.new).square().sum(), ".0%"),
    "gain_old": Probe(lambda s: db(signal_gain(s.operands["fprop.x"][0], s.old[s.channels])), ".2f"),
    "gain_new": Probe(lambda s: db(signal_gain(s.operands["fprop.x"][0], s.new[s.channels])), ".2f"),
    "rho_s": Probe(lambda s: rho(s.m.S, s.m.var_s, s.m.K).nanmean(), ".1e"),
    "rho_n": Probe(lambda s: rho(s.m.N, s.m.var_n, s.m.K).nanmean(), ".1e"),
    "z_s": Probe(lambda s: normalized(s.m)[0].square().mean().sqrt(), ".3f"),
    "z_n": Probe(lambda s: normalized(s.m)[1].square().mean().sqrt(), ".3f"),
    "sat_x": Probe(lambda s: saturated(s.operands["fprop.x"][0], s.how["fprop.x"]), ".1%"),
    "sat_w": Probe(lambda s: saturated(s.operands["fprop.w"][0], s.how["fprop.w"]), ".1%"),
    "dgrad.dy": Probe(lambda s: db(snr(*s.operands["dgrad.dy"])), ".2f"),
    "wgrad.dy": Probe(lambda s: db(snr(*s.operands["wgrad.dy"])), ".2f"),
}


@torch.no_grad()
def measure(part, recorded, n_channels, seed=0, first=None):
    """All that is measured of one FP4 layer or expert, from what record() kept of it, and from its initial
    weight (N, K), without which some probes are NaN.

    returns {probe: number, NaN for the infinite SNR of an operand in high precision}
            [{k, dot, rho_s, eq4}] for sums of k terms, the first two NaN for k > K
            [{dot, z_s, z_n, rho_s, rho_n}] of the sampled output channels
    """
    how = choices_of(part.layer)
    operands = recorded | weights_of(part, how)
    (x, xq), (w, wq) = operands["fprop.x"], operands["fprop.w"]
    chosen = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))[:n_channels].to(x.device)
    fprop = x, w[chosen], xq, wq[chosen]
    old = w * math.nan if first is None else initial_part(w, as_seen(first.to(w), how["fprop.w"]))
    sample = Sample(operands, how, old, w - old, chosen, moments(*fprop))
    numbers = {name: float(probe.of(sample)) for name, probe in PROBES.items()}
    numbers = {name: number if math.isfinite(number) else math.nan for name, number in numbers.items()}
    return numbers, by_terms(sample.m, *fprop, seed), by_channel(sample.m)


def by_terms(m, x, w, xq, wq, seed):
    """Sums of the first k terms, for each k. We shuffle the terms, because channels of one head lie side by
    side and k of them must stand for all."""
    order, rows = torch.randperm(m.K, generator=torch.Generator().manual_seed(seed)).to(x.device), []
    for k in [16 * 2**i for i in range(13)]:        # 16 to 65,536; beyond K eq. 4 alone
        dot = rho_s = math.nan
        if k <= m.K:
            part = moments(*(t[:, order[:k]] for t in (x, w, xq, wq)))
            dot, rho_s = averaging_gain(part)[1], rho(part.S, part.var_s, k).nanmean()
        rows.append({"k": k, "dot": float(db(dot)), "rho_s": float(rho_s), "eq4": float(db(predict(m, k)))})
    return rows


def by_channel(m):
    z_s, z_n = normalized(m)
    found = {"dot": db((z_s / z_n).square()), "z_s": z_s, "z_n": z_n, "rho_s": rho(m.S, m.var_s, m.K),
             "rho_n": rho(m.N, m.var_n, m.K)}
    return [dict(zip(found, row, strict=True)) for row in torch.stack(list(found.values()), 1).tolist()]


# ---------------------------------------------------------------- runs

KIND = ("arch", "width", "recipe")                  # what tells runs apart, but for their seeds


def read_run(folder):
    """A run folder: {run, kind: {arch, width, recipe, seed}, config, steps, evaluations: rows of its log}."""
    path = Path(folder) / "config.json"
    config, rows = read_json(path), read_metrics(folder)
    try:
        c = train.unflatten(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    kind = {"arch": c.model.arch, "width": c.model.n_embd, "recipe": c.recipe, "seed": c.seed}
    return {"run": str(folder), "kind": kind, "config": config, "steps": [r for r in rows if "loss" in r],
            "evaluations": [r for r in rows if "val_loss" in r]}


def read_runs(folders):
    """Runs by kind. We average or compare runs of one architecture and width, so only their seeds and recipes
    may differ, and fields that place a run or look at it."""
    runs = sorted(map(read_run, folders), key=lambda r: list(r["kind"].values()))
    for a, b in itertools.combinations(runs, 2):
        if a["kind"] == b["kind"]:
            raise UserError(f"{a['run']} and {b['run']} are of one kind and seed; give one of them")
        recipe = () if a["kind"]["recipe"] == b["kind"]["recipe"] else ("recipe", "fp4_")
        differ = [k for k, v in a["config"].items() if b["config"].get(k) != v
                  and k not in (*train.WATCHING, *train.MACHINE, "seed") and not k.startswith(recipe)]
        if differ and all(a["kind"][k] == b["kind"][k] for k in ("arch", "width")):
            raise UserError(f"{a['run']} and {b['run']} differ in {differ[0]}; analyse them one at a "
                            "time, or give the second choice a recipe of its own")
    return runs


def open_run(folder):
    """A run's model, converted by its recipe; the name of the recipe; four batches held out."""
    model, _, c = train.load_run(folder)
    device, _ = train.choose_device(replace(c, device="auto"))
    model.activation_checkpointing = c.activation_checkpointing
    recipe, cfg = c.recipe, c.fp4
    if "fprop" not in cfg.gemms:                    # also where the run has the own recipe, with a change
        recipe = OWN_RECIPE[c.model.arch]
        cfg = RECIPES[recipe]
    nvfp4.convert(model.to(device), cfg, report=lambda line: None)
    if not nvfp4.fp4_layers(model):
        raise UserError(f"{folder}: {recipe} must quantize a layer; give a run that has some in FP4")
    val = load_data(c.dataset, c.model.block_size, c.model.vocab_size).val
    starts = val_starts(len(val), c.model.block_size, (4, c.batch_size))
    return model, recipe, [batch_at(val, s, c.model.block_size, device) for s in starts]


def initial_weights(config):
    """{name: parameter} with which a run of this config began. Its seed makes them again; not those of
    --init_from, of a run that may have changed: None."""
    c = train.unflatten(config)
    torch.manual_seed(c.seed)
    return None if c.init_from else {name: p.detach() for name, p in build(c.model).named_parameters()}


@nvfp4.use_compiler(False)                          # four batches do not pay for kernels of every shape
def analyse(folder, o):
    """All probes of a run, as rows {arch, width, recipe, seed, ...}: of its layers, which also carry the loss
    and mean growth of the run, of sums of k terms, of channels, and of the noise alpha."""
    run, (model, recipe, batches) = read_run(folder), open_run(folder)
    kind = run["kind"]
    quarter = [torch.cat([t[::4] for t in both]) for both in zip(*batches, strict=True)]    # for flatness()

    @torch.no_grad()
    def loss(model, some):
        return float(sum(model(*batch).double() for batch in some) / len(some))
    with nvfp4.high_precision(model):
        growth = flatness(model, lambda model: loss(model, [quarter]), seed=o.seed)
        of_run = {"quantized_as": recipe, "loss": loss(model, batches), "growth": sum(growth) / len(growth)}
    parts, rows = named_parts(model), {"layers": [], "terms": [], "channels": [], "noise": [
        kind | {"alpha": a, "growth": g} for a, g in zip((0, *ALPHAS), (0.0, *growth), strict=True)]}
    found, first = record(model, batches, o.tokens, o.seed), initial_weights(run["config"])
    idle = [name for name, operands in found.items() if len(operands["fprop.x"][0]) < 2]
    if idle:
        print(f"{folder}: {', '.join(idle)} met fewer than two tokens of the sample and are left out")
    for name in progress([name for name in parts if name not in idle], str(folder)):
        here = kind | {"layer": name}
        w0 = first and first[f"{name.partition('[')[0]}.weight"]
        w0 = w0[parts[name].expert] if first and parts[name].expert is not None else w0
        probes, terms, channels = measure(parts[name], found.pop(name), o.channels, o.seed, w0)
        rows["layers"].append(here | of_run | {"K": parts[name].layer.in_features} | probes)
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
    try:
        if panels:
            draw(path.with_suffix(".png"), panels)
    except ModuleNotFoundError as error:
        print(f"no picture: {error} (pip install matplotlib); tables and JSON are complete", file=sys.stderr)


# ---------------------------------------------------------------- comparing runs

def shared_layers(tables):
    """Names of the layers that are in each of these tables of rows: only over them do means compare."""
    return set.intersection(*({row["layer"] for row in rows} for rows in tables))


def type_of(layer):
    """qkv of blocks.0.mixer.qkv, fc1 of blocks.1.mixer.experts.fc1[3]."""
    return layer.rpartition(".")[2].partition("[")[0]


HEAD = dict.fromkeys(KIND, "")                      # columns of a table: field, format
COLUMNS = {name: probe.form for name, probe in PROBES.items()}


def compare(folders, o):
    """Figures 1, 2, 3, 4 and 8."""
    runs = [analyse(r["run"], o) for r in read_runs(folders)]
    shared = shared_layers(run["layers"] for run in runs)
    if not shared:
        raise UserError("these runs have no quantized layer in common; analyse them one at a time")
    rows = {part: [row for run in runs for row in run[part]] for part in runs[0]}
    layers, terms, channels = ([row for row in rows[part] if row["layer"] in shared]
                               for part in ("layers", "terms", "channels"))
    names = list(dict.fromkeys(row["layer"] for row in rows["layers"]))
    by_layer = sorted(over_seeds(rows["layers"], "layer", *KIND), key=lambda row: names.index(row["layer"]))
    overall = over_seeds(layers, *KIND, "quantized_as")
    found = {"layers": by_layer, "overall": overall, "pairs": against(layers),
             "terms": over_seeds(terms, *KIND, "k"), "noise": over_seeds(rows["noise"], *KIND, "alpha")}
    gaps = over_terms(found["pairs"], found["terms"])
    print("by layer: SNRs, gain and eq. 4 in dB; below each row the standard deviation over seeds")
    table(by_layer, {"layer": ""} | HEAD | COLUMNS)
    print("\nby type of layer")
    typed = [row | {"layer": type_of(row["layer"])} for row in rows["layers"]]
    table(over_seeds(typed, "layer", *KIND), {"layer": ""} | HEAD | COLUMNS)
    print(f"\nmeans of {len(shared)} layers; loss of the high-precision model and its mean growth in nats")
    table(overall, HEAD | {"quantized_as": ""} | COLUMNS | {"loss": ".3f", "growth": ".4f"})
    print("\nnGPT over GPT: SNR(dot) in dB, measured and by eq. 5; growth of GPT's loss over nGPT's; by eq. "
          "5\nno gap far below so many terms, and a factor far above so many")
    table(found["pairs"], {"width": "", "ngpt": "", "gpt": "", "gap_db": "+.2f", "eq5_db": "+.2f",
                           "flatness_ratio": ".2f", "no_gap_below": ".0f", "factor": ".1f",
                           "saturates_above": ".0f"})
    write(o, "analysis", found | {"measured": rows["layers"]},
          analysis(by_layer, overall, found["terms"], found["noise"], channels, gaps, OWN_RECIPE))


def pairs_of(rows, *alike):
    """({width, ngpt, gpt: names of recipes}, row of nGPT, row of GPT) of rows that agree in these fields."""
    for n, g in itertools.product(find(rows, arch="ngpt"), find(rows, arch="gpt")):
        if all(n[key] == g[key] for key in ("width", *alike)):
            yield {"width": n["width"], "ngpt": n["recipe"], "gpt": g["recipe"]}, n, g


def against(layers):
    """nGPT against GPT of the same width and seed, layer by layer: the measured gap, and the one that eq. 5
    makes of the correlations."""
    rows = [mine | {"seed": n["seed"], "gap_db": n["dot"] - g["dot"],
                    "eq5_db": float(db(eq5(n["K"], n["rho_s"], g["rho_s"]))),
                    "flatness_ratio": g["growth"] / n["growth"]}
            | {f"{key}_{run['arch']}": run[key] for run in (n, g)
               for key in ("products", "rho_s", "rho_n", "gain")}
            for mine, n, g in pairs_of(layers, "layer", "seed")]
    pairs = over_seeds(rows, "width", "ngpt", "gpt")
    for p in pairs:
        of_pair = find(rows, width=p["width"], ngpt=p["ngpt"], gpt=p["gpt"])
        p |= {"seeds": len({row["seed"] for row in of_pair})} | regimes(p["rho_s_ngpt"][0], p["rho_s_gpt"][0])
    return pairs


def over_terms(pairs, terms):
    """The gap of sums of k terms, measured and by eq. 5 (fig. 4)."""
    return [mine | {"k": n["k"], "gap_db": n["dot"][0] - g["dot"][0],
                    "eq5_db": float(db(eq5(n["k"], p["rho_s_ngpt"][0], p["rho_s_gpt"][0])))}
            for mine, n, g in pairs_of(terms, "k") for p in find(pairs, **mine)]


# ---------------------------------------------------------------- losses, outliers, formats

def losses(folders, o):
    """Fig. 5: FP4 runs against their bf16 twin, which differs in nothing but the recipe."""
    runs, finals, points = read_runs(folders), [], []
    for r in [r for r in runs if r["kind"]["recipe"] != "bf16"]:
        twin = next((t for t in runs if t["kind"] == r["kind"] | {"recipe": "bf16"}), None)
        if not twin or len(twin["steps"]) != len(r["steps"]):
            raise UserError(f"{r['run']}: give its bf16 twin too, the same but for --recipe=bf16, as long")
        if not all(run["steps"] and run["evaluations"] for run in (r, twin)):
            raise UserError(f"{r['run']}: its metrics.jsonl and its twin's must hold steps and evaluations")
        bf16, last = twin["evaluations"][-1]["val_loss"], r["evaluations"][-1]
        in_fp4 = last.get("val_loss_fp4", math.nan)             # of a run without a layer in FP4
        window = len(r["steps"]) // 15 or 1
        error = relative_error(*([row["loss"] for row in run["steps"]] for run in (r, twin)), window)
        finals.append(r["kind"] | {
            "bf16": bf16, "fp4": last["val_loss"], "in_fp4": in_fp4,
            "error": last["val_loss"] / bf16 - 1, "error_in_fp4": in_fp4 / bf16 - 1})
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


def outliers(folders, o):
    """How faithful activations stay when outliers are clamped, as 2501.17116 section 3.3 has it."""
    rows = []
    for run in read_runs(folders):
        model, _, batches = open_run(run["run"])
        for name, operands in record(model, batches, o.tokens, o.seed).items():
            x, _ = operands["fprop.x"]
            for of, matrix in (("token", x), ("tensor", x.reshape(1, -1))):     # all of it as one row
                rows += [run["kind"] | {"layer": name, "of": of, "case": case, "paper": paper,
                                        "snr": fidelity(matrix, *how)}
                         for case, (*how, paper) in CLAMPS.items() if len(x)]
    found = [row | {"paper": row["paper"][0]} for row in over_seeds(rows, *KIND, "of", "case")]
    print("activations as they enter FP4 layers, in 4 bits with scale and quantiles of a token, or of the "
          "tensor:\nSNR in dB, and the paper's, which does not say of which; means over layers, below: "
          "deviations over seeds")
    table(found, HEAD | {"of": "", "case": "", "snr": ".2f", "paper": ".2f"})
    write(o, "outliers", {"results": found, "layers": rows})


LITERATURE = {("nvfp4", "nearest, 1x16"): 9.0e-3, ("nvfp4", "nearest, 16x16"): 12.4e-3,
              ("nvfp4_unbiased", "stochastic, 1x16"): 23.5e-3}


def quant(_, o):
    """Errors of the formats on unit Gaussians, beside table 1 of 2601.22813; bias of stochastic rounding."""
    x, rows = torch.randn(512, 4096, generator=torch.Generator().manual_seed(o.seed)), []
    for (name, case), mse in nvfp4.error_table().items():
        slope = math.nan
        if "stochastic" in case:
            slope = rounding_slope(x, seed=o.seed, format=name)
        rows.append({"format": name, "case": case, "mse": mse, "snr_db": -float(db(mse)), "slope": slope,
                     "literature": LITERATURE.get((name, case), math.nan)})
    print("unit Gaussians: mean square error, and slope <E q, x> / <x, x> of 16 draws of stochastic "
          "rounding, with\n8 random bits (up to 1/256 of a step short)")
    table(rows, {"format": "", "case": "", "mse": ".3e", "literature": ".3e", "snr_db": ".2f",
                 "slope": ".5f"})
    write(o, "quant", {"results": rows})


# ---------------------------------------------------------------- the command line

COMMANDS = {"losses": losses, "outliers": outliers, "quant": quant}
OPTIONS = {"out_dir": ("out/analysis", "folder for JSON, picture and the runs of experiments"),
           "tokens": (2048, "tokens in the sample"),
           "channels": (128, "output channels of each layer in the sample"),
           "seed": (0, "of samples, noise and the runs of experiments")}


def read_command(name, doc, usage, options, argv):
    """(words, options {name: (default, help)} as a namespace, other flags) of a command line, once its folder
    for results is there: minutes later would be too late."""
    parser = argparse.ArgumentParser(name, description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help=usage)
    for option, (default, what) in options.items():
        shown = f"{what} ({default})" if default != "" else what
        parser.add_argument(f"--{option}", default=default, type=type(default), help=shown)
    o, flags = parser.parse_known_args(argv)
    words = vars(o).pop("words")
    if min(o.tokens - 1, o.channels, o.seed + 1) < 1 or max(o.tokens, o.channels) > 10**9 or o.seed >= 2**63:
        raise UserError("--tokens must be in [2, 10^9], --channels in [1, 10^9] and --seed in [0, 2^63)")
    with naming(o.out_dir):
        Path(o.out_dir).mkdir(parents=True, exist_ok=True)
    return words, o, flags


@command("analyze.py")
def main(argv):
    words, o, flags = read_command("analyze.py", __doc__, "[losses, outliers] RUN ..., or quant",
                                   OPTIONS, argv)
    work = COMMANDS.get(words[0], compare)
    folders = words if work is compare else words[1:]
    if flags:
        raise UserError(f"{flags[0]}: no such option; python analyze.py -h lists them")
    if bool(folders) != (work is not quant):
        raise UserError(f"{words[0]} takes {'no run folder' if work is quant else 'run folders'}")
    with nvfp4.use_compiler(False):
        work(folders, o)


if __name__ == "__main__":
    main(sys.argv[1:])
