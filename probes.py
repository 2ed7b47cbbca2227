"""Why normalized networks survive 4 bits: the probes of 2605.06067, as functions of tensors.

A linear layer is a dot product of K terms for each token and output channel. With w^ and x^ the quantized
operands, term k is the signal s_k = w_k x_k plus the noise n_k = w^_k x^_k - w_k x_k.
    SNR         ||signal||^2 / ||noise||^2 of the weights, the activations, the products (all s_k against all
                n_k) and the dot products (sum s_k against sum n_k); in dB, 10 log10
    gain        SNR(dot) - SNR(products) in dB: 0 where the terms are independent of each other (eq. 6)
    z_s, z_n    |sum s_k| and |sum n_k| in units of sqrt(K) sigma_s: SNR(dot) = (z_s / z_n)^2 (eq. 2)
    rho         effective correlation of two terms, over tokens: signals that agree add up in amplitude,
                noises that do not only in power; hence the gain (eq. 3, 4)
    sat         share of blocks with a magnitude above the fixed amax of the recipe
    growth      of the held-out loss, in nats, when Gaussian noise is added to the weights (fig. 8)

The high-precision model of a run computes held-out batches; hooks record what enters each layer that
convert() makes, quantized by the layer's own choices. Tokens and output channels are sampled; sums over the
products come from matrix products, in float64, so the products (T, J, K) themselves never exist. Some experts
of a mixture are measured, each on tokens of its own, and stand as layers, fc1[0] and so on.

Letters: T tokens and J output channels in the sample, K terms of a dot product (the papers' D).
Source of all equations and figures: 2605.06067, sections 3 and 4, appendix B.
"""
import copy
import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import nvfp4
from nvfp4 import FORMATS, hadamard, quantize
from papers import split_outliers

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


# ---------------------------------------------------------------- theory

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


# ---------------------------------------------------------------- the rest

ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)          # relative noise of the flatness probe, as in fig. 8


@torch.no_grad()
def flatness(model, loss, alphas=ALPHAS, draws=2, seed=0):
    """Growth of loss(model) under Gaussian noise of std alpha ||W||_F / sqrt(numel) on every matrix W: one
    number for each alpha, means over draws; the same draws serve every alpha. Fig. 8.

    Draws begin at seed 2^31: noise of the small seed that a model began at can be its own initial weights.
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
    scales = q.scale_of_blocks().amax(2)
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


# Case: (quantile, whether outliers are added again, SNR of 2501.17116's 1.3B model at 30k steps).
CLAMPS = {"no clamp": (1.0, False, 8.31), "clamp 0.999": (0.999, False, 14.25),
          "clamp 0.99": (0.99, False, math.nan), "clamp 0.97": (0.97, False, math.nan),
          "clamp 0.999 + rest": (0.999, True, 15.31), "clamp 0.99 + rest": (0.99, True, 18.38),
          "clamp 0.97 + rest": (0.97, True, 20.88)}


def fidelity(x, quantile, compensate):
    """How close to activations x (M, K) they are with each row's outliers clamped and what is left rounded in
    its scale; compensate: and what was cut off added again."""
    clamped, rest = split_outliers(x, quantile)
    seen = quantize(clamped, "e2m1_vector").dequantize() + compensate * rest
    cosine = torch.cosine_similarity(x.double().flatten(), seen.double().flatten(), 0)
    return {"cosine": float(cosine), "mse": float((seen - x).double().square().mean()),
            "snr": float(db(snr(x, seen)))}


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
    how = {layer: layer.cfg.operand("fprop.x", layer.keys) for layer in by_layer}

    def keep(layer, x, ends=None):
        x = x.detach().flatten(0, -2).float()
        pair = as_multiplied(x, how[layer])
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
    how_x, how_w = (layer.cfg.operand(name, layer.keys) for name in ("fprop.x", "fprop.w"))
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
