"""Proofs for analyze.py: probes against closed forms or brute force, recording against the FP4 layer itself,
and commands on tiny trained runs, against the logs of these.

Brute force holds the products (T, J, K) that analyze.py never does. Statistical bounds are three standard
errors, derived where they stand. Every group has a control, on which the same check fails.
"""
import itertools
import json
import math
import re
import shutil
import struct
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import analyze
import nvfp4
import train
from analyze import averaging_gain, db, moments, rho
from assets import figures
from model import ModelConfig, build
from nvfp4 import OPERANDS, RECIPES, quantize
from papers import PaperConfig
from runs import metrics, refusal_of

try:
    import matplotlib  # noqa: F401
    DRAWS = True
except ImportError:
    DRAWS = False

EXACT = 1e-11                                       # float64 sums of at most 10^3 terms: 10^3 * 2^-53 = 1e-13
pytestmark = pytest.mark.usefixtures("eager")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, bound=EXACT):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return bool(((a - b).abs() <= bound * b.abs().max()).all())


def operands(T=40, J=7, K=48, seed=0):
    """x, w, xq, wq with means, unequal columns, and noise that depends on the signal."""
    x = (gaussian(T, K, seed=seed) + 0.5) * torch.linspace(0.2, 2, K, dtype=torch.float64)
    w = gaussian(J, K, seed=seed + 1)
    return x, w, (4 * x).round() / 4, (3 * w).round() / 3


def equicorrelated(T, K, r, mean=0.0, seed=0):
    """(T, K) unit Gaussians plus a mean, each two columns with correlation r."""
    return mean + math.sqrt(r) * gaussian(T, 1, seed=seed) + math.sqrt(1 - r) * gaussian(T, K, seed=seed + 1)


def synthetic(r, T=20000, K=32, mean=0.0, noise=0.1, noise_mean=0.0):
    """Moments of one channel of unit weights whose signals correlate by r and whose noises do not."""
    x = equicorrelated(T, K, r, mean)
    one = torch.ones(1, K, dtype=torch.float64)
    return moments(x, one, x + noise * gaussian(T, K, seed=9) + noise_mean, one)


# ---------------------------------------------------------------- signal, noise, correlation

def test_snr_and_decibels():
    assert close(db(analyze.snr(gaussian(9, 9), 0.9 * gaussian(9, 9))), 20.0)
    assert not close(db(analyze.snr(gaussian(9, 9), 0.89 * gaussian(9, 9))), 20.0)          # control


def brute_force(x, w, xq, wq):
    """The same names as Moments, from the products (T, J, K), and what the probes make of them."""
    s = x[:, None] * w
    n = xq[:, None] * wq - s
    power = s.shape[-1] * s.var(-1).sum(0)          # K sigma_s^2, summed over tokens
    return {"S": s.sum(-1), "N": n.sum(-1), "S2": s.square().sum(-1), "N2": n.square().sum(-1),
            "var_s": s.var(0).sum(-1), "var_n": n.var(0).sum(-1), "mean2_s": s.mean(0).square().sum(-1),
            "mean2_n": n.mean(0).square().sum(-1)}, {
            "products": s.square().sum() / n.square().sum(),
            "dot": s.sum(-1).square().sum() / n.sum(-1).square().sum(),
            "z_s": (s.sum(-1).square().sum(0) / power).sqrt(),
            "z_n": (n.sum(-1).square().sum(0) / power).sqrt(),
            "rho_s": (s.sum(-1).var(0) / s.var(0).sum(-1) - 1) / (s.shape[-1] - 1),
            "rho_n": (n.sum(-1).var(0) / n.var(0).sum(-1) - 1) / (s.shape[-1] - 1)}


def wrong_values(given, expected):
    """Names of the probes that differ from brute force."""
    m, (sums, numbers) = moments(*given), brute_force(*expected)
    found = dict(zip(("products", "dot"), averaging_gain(m), strict=False))
    found |= dict(zip(("z_s", "z_n"), analyze.normalized(m), strict=True))
    found |= {"rho_s": rho(m.S, m.var_s, m.K), "rho_n": rho(m.N, m.var_n, m.K)}
    return {name for name, value in sums.items() if not close(getattr(m, name), value)} | {
            name for name, value in numbers.items() if not close(found[name], value)}


def test_probes_equal_brute_force():
    x, w, xq, wq = operands()
    assert wrong_values((x, w, xq, wq), (x, w, xq, wq)) == set()
    noise = {"N", "N2", "var_n", "mean2_n", "products", "dot", "z_n", "rho_n"}
    assert wrong_values((x, w, xq, w), (x, w, xq, wq)) == noise                 # control: exact weights
    assert wrong_values((x, w, x, wq), (x, w, xq, wq)) == noise                 # control: exact activations
    mixed_up = wrong_values((x.roll(1, 0), w, xq, wq), (x, w, xq, wq))          # control: tokens do not match
    assert mixed_up >= {"S", "S2", "N", "N2", "var_n", "rho_n"}


def test_independent_terms_have_no_correlation_and_no_gain():
    """error   Var(S) over T tokens has relative error sqrt(2 / T), so rho has sqrt(2 / T) / (K - 1); the gain
            compares sums over T of S^2 and N^2, sqrt(2 / T) each, and of many more squares: sqrt(4 / T)"""
    T, K = 20000, 32
    rho_error, gain_error = 3 * math.sqrt(2 / T) / (K - 1), 3 * math.sqrt(4 / T)
    assert 10 * math.log10(1 + gain_error) < 0.2    # decibels
    for r, expected in ((0.0, True), (0.01, False)):                            # the second is the control
        m = synthetic(r, T, K)
        assert (rho(m.S, m.var_s, K).abs().max() < rho_error) == expected
        assert (abs(averaging_gain(m)[2] - 1) < gain_error) == expected
        assert rho(m.N, m.var_n, K).abs().max() < rho_error


@pytest.mark.parametrize("r", [0.002, 0.02, 0.3])
def test_rho_is_the_pairwise_correlation(r):
    """error   relative error sqrt(2 / T) of Var(S) = K (1 + (K - 1) r), divided by K (K - 1)"""
    T, K = 40000, 64
    x, bound = equicorrelated(T, K, r), 3 * math.sqrt(2 / T) * (1 + (K - 1) * r) / (K - 1)
    assert abs(float(rho(x.sum(1, keepdim=True), x.var(0).sum()[None], K)) - r) < bound
    biased = float(rho(x.sum(1, keepdim=True), x.var(0).sum()[None] * (K - 1) / K, K))
    assert abs(biased - r) > bound                  # control: variances with the wrong divisor


# ---------------------------------------------------------------- theory

CASE = {"r": 0.05, "mean": 0.3, "noise": 0.1, "noise_mean": 0.02, "T": 20000, "K": 32}


def test_eq4_predicts_the_measured_snr():
    """error   0.2 dB = 4.7 %: three standard errors sqrt(4 / T) = 4.2 % of the ratio of two sums of T squares
    """
    c, m = CASE, synthetic(**CASE)
    measured = float(db(averaging_gain(m)[1]))
    right = {"sigma_s2": 1.0, "rho_s": c["r"], "mu_s2": (c["K"] * c["mean"])**2, "sigma_n2": c["noise"]**2,
             "mu_n2": (c["K"] * c["noise_mean"])**2}
    assert abs(float(db(analyze.eq4(c["K"], **right))) - measured) < 0.2
    for part in ("rho_s", "mu_s2", "mu_n2"):        # controls: without one of its parts
        assert abs(float(db(analyze.eq4(c["K"], **right | {part: 0.0}))) - measured) > 0.2
    assert abs(float(db(analyze.predict(m, c["K"]))) - measured) < 0.2          # from measured moments


def test_prediction_for_fewer_terms_is_the_mean_over_all_subsets():
    """Numerator and denominator of eq. 4 for k of K = 6 terms, averaged over every subset of size k."""
    given = operands(J=3, K=6)
    for k in (1, 2, 5, 6):
        signal = noise = 0
        for subset in itertools.combinations(range(6), k):
            m = moments(*(t[:, list(subset)] for t in given))
            signal += (m.S.var(0) + m.S.mean(0).square()).sum()
            noise += (m.var_n + m.N.mean(0).square()).sum()
        assert close(analyze.predict(moments(*given), k), signal / noise)
        assert not close(analyze.predict(moments(*given), k + 1), signal / noise)           # control


def test_eq5_and_regimes_of_the_paper():
    """The paper's rho, 1.32e-3 and 9.31e-5, give its bounds 755 and 10738 and its limit 14.2.

    error   half a unit of their last digit: 0.005 / 1.32 and 0.005 / 9.31, and the sum of both
    """
    found = analyze.regimes(1.32e-3, 9.31e-5)
    for key, value, bound in (("no_gap_below", 755, 0.005 / 1.32), ("saturates_above", 10738, 0.005 / 9.31),
                              ("factor", 14.2, 0.005 / 1.32 + 0.005 / 9.31)):
        assert abs(found[key] / value - 1) < bound
        assert abs(analyze.regimes(9.31e-5, 1.32e-3)[key] / value - 1) > bound              # control
    assert math.isnan(analyze.regimes(-1e-3, 1e-3)["no_gap_below"])
    assert analyze.eq5(0, 0.1, 0.2) == 1 and analyze.eq5(10, 0.3, 0.1) == 2
    for D in (16, 10**6):                           # without means it is the ratio of two of eq. 4, to 1 / D
        ratio = analyze.eq4(D, 1, 0.03, 0, 1, 0) / analyze.eq4(D, 1, 0.001, 0, 1, 0)
        assert abs(float(ratio) / analyze.eq5(D, 0.03, 0.001) - 1) < 0.5 / D


def test_sums_of_some_terms():
    """rho is constant in k, to 3 standard errors as above, and the SNR grows with k by eq. 4."""
    T, r, one = 20000, 0.1, torch.ones(1, 64, dtype=torch.float64)
    x = equicorrelated(T, 64, r)
    given = x, one, x + 0.1 * gaussian(T, 64, seed=9), one
    m = moments(*given)
    rows = {row["k"]: row for row in analyze.by_terms(m, *given, seed=0)}
    assert [k for k in rows if math.isfinite(rows[k]["dot"])] == [16, 32, 64] and len(rows) == 13
    assert close(rows[64]["dot"], db(averaging_gain(m)[1]))
    for k in (16, 32, 64):
        assert abs(rows[k]["rho_s"] - r) < 3 * math.sqrt(2 / T) * (1 + (k - 1) * r) / (k - 1)
        assert abs(rows[k]["dot"] - float(db(100 * (1 + (k - 1) * r)))) < 0.2
        assert abs(rows[k]["dot"] - float(db(100 * (1 + (2 * k - 1) * r)))) > 0.2           # control


# ---------------------------------------------------------------- flatness, rounding, saturation, outliers

def test_flatness_of_a_quadratic_loss():
    """L = ||W||^2 / 2 grows by alpha^2 ||W||^2 / 2 on average.

    error   alpha <W, noise> ||W|| / sqrt(numel): of the growth, 2 / (alpha sqrt(numel)) for one draw; the
            square of the noise adds sqrt(2 / numel)

    Weights of seed 0, which is the noise's seed too: they may not be the same random numbers.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    before = [p.clone() for p in model.parameters()]

    def loss(model):
        return float(sum(p.detach().square().sum() for p in model.parameters() if p.dim() == 2)) / 2
    alphas, draws = (0.05, 0.3), 4
    for alpha, found in zip(alphas, analyze.flatness(model, loss, alphas, draws), strict=True):
        bound = 3 * (2 / alpha + math.sqrt(2)) / math.sqrt(draws * 2 * 256**2)
        assert abs(found / (alpha**2 * loss(model)) - 1) < bound
        assert abs(found / ((1.2 * alpha)**2 * loss(model)) - 1) > bound        # control
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_relative_error():
    reference = [5.0, 4.0, 3.0, 2.0]
    assert close(analyze.relative_error([1.02 * v for v in reference], reference), [0.02] * 4)
    found = analyze.relative_error([6.0, 4.0, 3.0, 4.0], reference, window=2)
    assert close(found, [1 / 9, 0.0, 2 / 5]) and not close(found, [1 / 5, 0.0, 2 / 2])      # of means


def test_slope_of_stochastic_rounding():
    """Uniform in (0, 6) with a 6 in each block: with amax = 6 every scale is 1, the grid E2M1 itself. With f
    the position in a step d and p = floor(256 f) / 256, the mean is d p above the step's lower end.

    error   the variance is d^2 p (1 - p) < 1 = d^2 / 4 of the longest step: 1 / (sqrt(16 * 65536) |x|) = 3e-4
    """
    x = 6 * torch.rand(64, 1024, generator=torch.Generator().manual_seed(0))
    x[:, ::16] = 6
    grid = torch.tensor(nvfp4.E2M1_NUMBERS)
    low = grid[(torch.bucketize(x, grid, right=True) - 1).clamp(max=6)]
    d = grid[torch.bucketize(low, grid, right=True)] - low
    mean = (low + d * ((x - low) / d * 256).floor() / 256).double()
    slope = float((mean * x).sum() / x.double().square().sum())
    found = analyze.rounding_slope(x, amax=6.0, seed=5)
    assert abs(found - slope) < 3 * 3e-4 < abs(found - 0.998 * slope)           # control
    assert analyze.rounding_slope(x, amax=3.0, seed=5) < 0.75                   # saturates at 3


@pytest.mark.parametrize("square", [False, True])
def test_share_of_saturated_blocks(square):
    x, blocks = torch.full((32, 64), 0.9), 32 * 64 / (16 * 16 if square else 16)
    x[3, 17] = x[3, 20] = -1.1                      # one block, twice
    x[20, 0] = 1.0                                  # just fits
    shares = [analyze.saturated(x, nvfp4.choices(square=square, amax=amax)) for amax in (1.0, None, 0.8)]
    assert shares == [1 / blocks, 0, 1]
    assert analyze.saturated(x[:20], nvfp4.choices(square=square, amax=0.8)) == 1           # N is filled up


def test_fidelity_of_clamped_outliers():
    """An outlier in each token, 30 of its standard deviations. Clamped it costs less than the grid that it
    coarsens, added again it costs nothing. Clamping Gaussians only costs."""
    plain, x = gaussian(64, 2048).float(), gaussian(64, 2048).float()
    x[:, 7] = 30
    snrs, of_plain = ({case: analyze.fidelity(t, *how) for case, (*how, _) in analyze.CLAMPS.items()}
                      for t in (x, plain))
    assert (snrs["no clamp"] < snrs["clamp 0.999"] < snrs["clamp 0.999 + rest"] < snrs["clamp 0.99 + rest"]
            < snrs["clamp 0.97 + rest"])
    assert of_plain["clamp 0.97"] < of_plain["clamp 0.99"] < of_plain["no clamp"]           # control


# ---------------------------------------------------------------- recording

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "block_size": 16}


def converted(cfg, arch="gpt", **sizes):
    torch.manual_seed(0)
    model = build(ModelConfig(arch=arch, **SIZES | sizes))
    return nvfp4.convert(model, cfg, report=lambda line: None)


def batch(seed, rows=2):
    return torch.randint(64, (2, rows, 16), generator=torch.Generator().manual_seed(seed)).unbind()


CFGS = {"ngpt": RECIPES["ngpt"], "nvfp4": replace(RECIPES["nvfp4"], tail=0.0),
        "1x16": nvfp4.FP4Config(square_weights=False), "rotated": nvfp4.FP4Config(hadamard=nvfp4.GEMMS),
        "mxfp4": replace(RECIPES["mxfp4"], tail=0.0), "uniform grid": RECIPES["ufp4"],
        "reuses codes": RECIPES["tetrajet2"], "four over six": replace(RECIPES["nvfp4_46"], tail=0.0),
        "all random": PaperConfig(stochastic=OPERANDS, hadamard=nvfp4.GEMMS, hadamard_signs="fresh")}


@pytest.mark.parametrize("cfg", [RECIPES["nvfp4"], replace(RECIPES["ngpt"], skip=("*out",))])
def test_every_fp4_layer_is_recorded_and_left_as_it_was(cfg):
    model = converted(cfg)
    parts, found = analyze.named_parts(model), analyze.record(model, [batch(0), batch(1)], 40)
    assert found.keys() == parts.keys() != analyze.named_parts(converted(replace(cfg, tail=1.0))).keys()
    for name, operands in found.items():
        layer = parts[name].layer
        shapes = {"fprop.x": (40, layer.in_features), "wgrad.x": (layer.in_features, 64),   # 2 blocks a batch
                  "dgrad.dy": (40, layer.out_features), "wgrad.dy": (layer.out_features, 64)}
        assert {operand: pair[0].shape for operand, pair in operands.items()} == shapes
        assert layer.cfg is cfg and not layer._forward_hooks and layer.weight.grad is None
    model.activation_checkpointing = True           # x comes by twice, dy once
    again = analyze.record(model, [batch(0), batch(1)], 40)
    assert all(torch.equal(a, b) for name in found for operand in found[name]
               for a, b in zip(found[name][operand], again[name][operand], strict=True))


def of_layer(model, name, idx, targets):
    """x of a layer when the model runs in high precision; y, dx and dw that it makes of x and dy in FP4."""
    layer, seen = model.get_submodule(name), {}
    with nvfp4.high_precision(model):
        handle = layer.register_forward_hook(
            lambda _, args, y: seen.update(args=args, y=y) or y.retain_grad())
        model(idx, targets).backward()
        handle.remove()
    x, *ends = (t.detach() for t in seen["args"])
    layer.weight.grad = None
    y = layer(x.requires_grad_(), *ends)
    y.backward(seen["y"].grad)
    return *(t.detach().flatten(0, -2) for t in (x, y, x.grad)), layer.weight.grad


@pytest.mark.filterwarnings("ignore:random bits repeat")
@pytest.mark.parametrize("name", CFGS)
def test_recorded_operands_are_those_of_the_fp4_layer(name):
    """All tokens of a batch, all channels: products of the six recorded operands are y, dx and dw of the
    layer that convert() makes, whatever its recipe says. So its SNR is the measured one.

    error   fp32 sums of at most 96 products: 96 * 2^-24 of sum |a||b|, at most 2 times the largest result
    """
    model, layer = converted(CFGS[name], "ngpt" if name == "ngpt" else "gpt"), "blocks.2.mixer.qkv"
    part, data = analyze.named_parts(model)[layer], batch(0, rows=4)
    recorded = analyze.record(model, [data], 64)[layer]
    operands = recorded | analyze.weights_of(part, analyze.choices_of(part.layer))
    q = {operand: pair[1].double() for operand, pair in operands.items()}
    x, y, dx, dw = of_layer(model, layer, *data)
    tokens = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = {"y": q["fprop.x"] @ q["fprop.w"].T, "dx": q["dgrad.dy"] @ q["dgrad.w"].T,
             "dw": q["wgrad.dy"] @ q["wgrad.x"].T}
    wanted = {"y": y[tokens], "dx": dx[tokens], "dw": dw}
    assert all(close(found[key], wanted[key], 1e-5) for key in found)
    assert not any(close(found[key], wanted[key].roll(1, 0), 1e-5) for key in found)       # control
    exact = x.double() @ part.layer.weight.detach().double().T
    numbers, _, channels = analyze.measure(part, recorded, 96)
    assert all(math.isnan(numbers[name]) for name in ("initial", "gain_old", "gain_new"))       # not given
    assert close(numbers["dot"], db(analyze.snr(exact, y)), 1e-4) and len(channels) == 96
    assert close(numbers["gain"], numbers["dot"] - numbers["products"])
    assert all(10 < numbers[f"{gemm}.dy"] < 30 for gemm in ("dgrad", "wgrad"))


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_of_a_weight_the_initial_part_and_what_it_gains(share, N=48, K=256, T=4096):
    """Inputs are 1 plus unit Gaussians. A row of equal weights adds K means up, K^2 + K in power where the
    terms alone have 2K: a gain of (K + 1) / 2. Random rows gain nothing: 0 dB.

    error   of T Gaussians: sqrt(2 / T) of the terms' power, 0.1 dB. Half the power of N random rows is their
            answer to the mean, N squares of a Gaussian: sqrt(2 / N) / 2, 0.4 dB
    """
    generator = torch.Generator().manual_seed(0)
    x, first = 1 + torch.randn(T, K, generator=generator), torch.randn(N, K, generator=generator)
    new = torch.ones(N, K)
    new -= analyze.initial_part(new, first)         # so that the share is known
    w = share**0.5 * first / first.norm() + (1 - share)**0.5 * new / new.norm()
    layer = nvfp4.FP4Linear(torch.nn.Linear(K, N, bias=False), RECIPES["nvfp4"])
    layer.weight.data.copy_(w)
    recorded = dict.fromkeys(("fprop.x", "wgrad.x", "dgrad.dy", "wgrad.dy"), (x, x + 0.1))
    numbers, _, _ = analyze.measure(analyze.Part(layer), recorded, N, first=3 * first)
    assert numbers["initial"] == pytest.approx(share, rel=1e-5)
    assert abs(numbers["gain_old"]) < 1 and abs(numbers["gain_new"] - float(db((K + 1) / 2))) < 0.3
    whole = float(db(analyze.signal_gain(x, w)))
    assert numbers["gain_old"] + 3 < whole < numbers["gain_new"]
    order = torch.randperm(N * K, generator=generator)
    numbers, _, _ = analyze.measure(analyze.Part(layer), recorded, N, first=first.flatten()[order].view(N, K))
    assert numbers["initial"] < 20 / (N * K)        # a start of another order: nothing is left of it


def test_a_run_s_start_is_made_again(tiny, tmp_path):
    """With learning rate 0 all of a weight is initial; by another seed, or after steps, less of it."""
    found = {}
    for name, settings in (("still", {"learning_rate": 0}), ("moved", {"learning_rate": 0.1})):
        train.main(tiny(tmp_path / name, arch="gpt", recipe="nvfp4", max_steps=4, **settings))
    shutil.copytree(tmp_path / "still", tmp_path / "another")
    config = json.loads((tmp_path / "another/config.json").read_text())
    (tmp_path / "another/config.json").write_text(json.dumps(config | {"seed": config["seed"] + 1}))
    for name in ("still", "moved", "another"):
        run(tmp_path / name, *SMALL, f"--out_dir={tmp_path / name}")
        rows = json.loads((tmp_path / name / "analysis.json").read_text())["measured"]
        found[name] = [row["initial"] for row in rows]
    assert min(found["still"]) > 1 - 1e-5 > max(found["moved"]) and max(found["another"]) < 0.05


@pytest.mark.filterwarnings("ignore:random bits repeat")
def test_a_gemm_in_high_precision_has_no_noise(capsys):
    model = converted(nvfp4.FP4Config(gemms=("fprop",)))
    part = analyze.named_parts(model)["blocks.0.mixer.qkv"]
    numbers, _, _ = analyze.measure(part, analyze.record(model, [batch(0)], 32)["blocks.0.mixer.qkv"], 8)
    assert [math.isnan(numbers[key]) for key in ("dot", "dgrad.dy", "wgrad.dy")] == [False, True, True]
    analyze.table([numbers], {"wgrad.dy": ".2f"})
    assert capsys.readouterr().out == "wgrad.dy\n       -\n"


@pytest.mark.filterwarnings("ignore:random bits repeat")
def test_an_expert_is_measured_as_a_layer_of_its_own():
    """Record and measure say of an expert what its rows and weights say by themselves. Rows that fill up its
    group are not among its tokens."""
    model = converted(nvfp4.FP4Config(weight_amax=1.0, input_amax=8.0), pattern="E", n_ffn=48, moe_n_expert=6)
    parts = analyze.named_parts(model)
    experts = [name for name in parts if "experts.fc1" in name]
    assert experts == [f"blocks.0.mixer.experts.fc1[{e}]" for e in (0, 2, 4)]   # 4 at most, evenly
    inputs, fc1 = [], model.blocks[0].mixer.experts.fc1
    handle = fc1.register_forward_pre_hook(lambda _, args: inputs.append(args))
    found = analyze.record(model, [batch(0)], 10**6)
    handle.remove()
    (x, ends), filled, dw = inputs[0], 0, of_layer(model, "blocks.0.mixer.experts.fc1", *batch(0))[3]
    for name, e in zip(experts, (0, 2, 4), strict=True):
        rows = x[(int(ends[e - 1]) if e else 0):ends[e]].detach()
        mine = rows[rows.any(1)]
        filled += len(rows) - len(mine)
        seen, seen_q = found[name]["fprop.x"]
        assert torch.equal(seen.sort(0).values, mine.sort(0).values) and torch.equal(
            seen_q, quantize(seen, amax=8.0).dequantize())
        dyq, xq = (found[name][operand][1] for operand in ("wgrad.dy", "wgrad.x"))
        assert close(dyq @ xq.T, dw[e], 1e-5) and not close(dyq @ xq.T, dw[e - 1], 1e-5)
        alone = torch.nn.Linear(32, 48, bias=False)
        alone.weight.data = fc1.weight.detach()[e].clone()
        alone = analyze.Part(nvfp4.FP4Linear(alone, fc1.cfg))
        alone, mine, other = (json.dumps(analyze.measure(part, found[name], 48))               # NaN = NaN
                              for part in (alone, parts[name], parts[experts[e // 2 - 1]]))
        assert alone == mine != other
    assert filled > 0


def test_a_row_is_all_that_a_probe_needs(monkeypatch):
    """The fourth moment of each of the six operands over the square of its second."""
    def kurtosis(t):
        return t.pow(4).mean() / t.square().mean()**2
    for operand in OPERANDS:
        monkeypatch.setitem(analyze.PROBES, operand, analyze.Probe(
            lambda s, operand=operand: kurtosis(s.operands[operand][0]), ".2f"))
    model, name = converted(CFGS["rotated"]), "blocks.1.mixer.fc2"
    part, recorded = analyze.named_parts(model)[name], analyze.record(model, [batch(0)], 32)[name]
    numbers, _, _ = analyze.measure(part, recorded, 8)
    assert list(numbers) == list(analyze.PROBES) and len({numbers[operand] for operand in OPERANDS}) == 6
    assert numbers["fprop.w"] == float(kurtosis(nvfp4.hadamard(part.layer.weight.detach())))
    assert numbers["wgrad.dy"] == float(kurtosis(recorded["wgrad.dy"][0]))


def test_samples_are_quantized_as_in_their_batch():
    """Rows and, for wgrad, columns in whole blocks: values and scales are those of the whole batch."""
    model, name, data = converted(CFGS["1x16"]), "blocks.2.mixer.qkv", [batch(0, rows=8)]
    whole = analyze.record(model, data, 10**6)[name]
    some = analyze.record(model, data, 40, seed=3)[name]
    for operand, n in (("fprop.x", 40), ("wgrad.x", 48), ("dgrad.dy", 40), ("wgrad.dy", 48)):
        (all_seen, all_q), (seen, q) = ([t.T if operand.startswith("wgrad") else t for t in both[operand]]
                                        for both in (whole, some))
        where = [next(i for i, row in enumerate(all_seen) if torch.equal(row, mine)) for mine in seen]
        assert len(all_seen) == 128 and len(set(where)) == len(seen) == n
        assert torch.equal(q, all_q[where])
    x, xq = whole["fprop.x"]
    assert torch.equal(xq, quantize(x).dequantize())
    x, xq = some["fprop.x"]
    assert not torch.equal(xq, quantize(x).dequantize())                        # control


# ---------------------------------------------------------------- rows

def test_means_over_layers_then_spread_over_seeds(capsys):
    rows = [{"arch": "gpt", "seed": seed, "layer": layer, "x": x} for seed, layer, x in (
        (1, "a", 1.0), (1, "b", 3.0), (2, "a", 4.0), (2, "b", 8.0))]
    found, = analyze.over_seeds(rows, "arch")
    assert found == {"arch": "gpt", "x": (4.0, pytest.approx(math.sqrt(8)))}    # of 2 and 6, not of all four
    one, _ = analyze.over_seeds(rows[:2], "arch", "layer")
    assert one["x"][0] == 1 and math.isnan(one["x"][1])
    analyze.table([found, found | {"x": math.nan}], {"arch": "", "x": ".2f"})
    assert capsys.readouterr().out == "arch     x\n gpt  4.00\n      2.83\n gpt     -\n"


# ---------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def out(tiny, tmp_path_factory):
    """A folder of runs on random letters: <arch>_<recipe>_<seed>; ngpt has two seeds."""
    folder = tmp_path_factory.mktemp("out")
    for name in ("gpt_bf16_1", "gpt_nvfp4_1", "ngpt_bf16_1", "ngpt_bf16_2", "ngpt_ngpt_1", "ngpt_ngpt_2"):
        arch, recipe, seed = name.split("_")
        train.main(tiny(folder / name, arch=arch, recipe=recipe, seed=seed, n_layer=2, n_ffn=64, max_steps=4,
                        eval_iters=4))
    return folder


SMALL = ["--tokens=64", "--channels=16"]


def run(*argv):
    analyze.main([str(argument) for argument in argv])


def refusal(*argv):
    return refusal_of(analyze.main, argv)


def results(folder, name):
    """The JSON of a command, once its picture is seen to be 900 pixels wide, or absent without matplotlib."""
    picture = folder / f"{name}.png"
    assert picture.exists() == DRAWS
    if DRAWS:
        head = picture.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", head[16:20]) == (900,)
    return json.loads((folder / f"{name}.json").read_text())


def log_of(folder, key):
    return [row[key] for row in metrics(folder, key)]


def test_analysis_of_runs(out, tmp_path, capsys):
    run(out / "gpt_nvfp4_1", *out.glob("ngpt_ngpt_*"), f"--out_dir={tmp_path}", *SMALL)
    said, data = capsys.readouterr().out, results(tmp_path, "analysis")
    gpt, ngpt = data["overall"]
    layers = {arch: analyze.find(data["layers"], arch=arch) for arch in ("gpt", "ngpt")}
    assert len(layers["gpt"]) == 6 and len(layers["ngpt"]) == 8        # GPT's last block is in bf16
    assert "means of 6 layers" in said and all(row["weights"][0] > 15 for row in data["layers"])
    assert gpt["dot"][1] is None and ngpt["dot"][1] > 0 and gpt["quantized_as"] == "nvfp4"
    shared = {row["layer"] for row in layers["gpt"]}
    dots = [row["dot"][0] for row in layers["ngpt"] if row["layer"] in shared]
    assert ngpt["dot"][0] == pytest.approx(sum(dots) / 6, rel=1e-5)
    pair, = data["pairs"]                           # of the seed that both have
    one = analyze.analyse(out / "ngpt_ngpt_1", SimpleNamespace(**data["options"]))["layers"]
    dot = sum(row["dot"] for row in one if row["layer"] in shared) / 6
    assert pair["gap_db"][0] == pytest.approx(dot - gpt["dot"][0], abs=1e-4)
    assert gpt["loss"][0] == pytest.approx(log_of(out / "gpt_nvfp4_1", "val_loss")[-1], abs=0.01)
    assert [row["alpha"] for row in analyze.find(data["noise"], arch="gpt")] == [0, *analyze.ALPHAS]
    assert all(10 < row[key][0] < 30 for row in data["layers"] for key in ("dgrad.dy", "wgrad.dy"))


def test_analysis_is_repeatable_and_its_options_count(out):
    def analysis(name, seed=0):
        return analyze.analyse(out / name, SimpleNamespace(tokens=64, channels=16, seed=seed))["layers"][0]
    once, seed = analysis("gpt_bf16_1"), analysis("gpt_bf16_1", seed=1)
    assert once == analysis("gpt_bf16_1") and once["quantized_as"] == "nvfp4"
    assert analysis("ngpt_bf16_1")["quantized_as"] == "ngpt"        # by each architecture's recipe
    assert seed["weights"] == once["weights"] and seed["dot"] != once["dot"]
    assert seed["growth"] != once["growth"]


def test_losses(out, tmp_path, capsys):
    run("losses", *out.iterdir(), f"--out_dir={tmp_path}")
    data = results(tmp_path, "losses")
    gpt, ngpt = (analyze.find(data["final"], arch=arch)[0] for arch in ("gpt", "ngpt"))
    fp4, bf16 = out / "gpt_nvfp4_1", out / "gpt_bf16_1"
    assert gpt["bf16"][0] == pytest.approx(log_of(bf16, "val_loss")[-1], rel=1e-5)
    for key, name in (("error", "val_loss"), ("error_in_fp4", "val_loss_fp4")):
        assert gpt[key][0] == pytest.approx(log_of(fp4, name)[-1] / gpt["bf16"][0] - 1, abs=1e-5)
    assert gpt["error"] != gpt["error_in_fp4"] and gpt["error"][1] is None and ngpt["error"][1] > 0
    curve = analyze.find(data["curves"], arch="gpt")
    assert len(curve) == 4 and curve[-1]["percent"][0] == pytest.approx(
        100 * (log_of(fp4, "loss")[-1] / log_of(bf16, "loss")[-1] - 1), abs=1e-4)
    assert "give its bf16 twin" in refusal("losses", out / "ngpt_ngpt_1", out / "ngpt_bf16_2")  # another seed
    assert "all are bf16 runs" in refusal("losses", out / "ngpt_bf16_2")


def test_outliers_of_a_run(out, tmp_path, capsys):
    run("outliers", out / "gpt_nvfp4_1", f"--out_dir={tmp_path}", *SMALL)
    data = json.loads((tmp_path / "outliers.json").read_text())
    rows = {(row["of"], row["case"]): row for row in data["results"]}
    assert len(rows) == 2 * len(analyze.CLAMPS) and len(data["layers"]) == 6 * len(rows)
    model, _, batches = analyze.open_run(out / "gpt_nvfp4_1")
    x = [operands["fprop.x"][0] for operands in analyze.record(model, batches, 64).values()]
    for of, matrices in (("token", x), ("tensor", [t.reshape(1, -1) for t in x])):
        mean = sum(analyze.fidelity(t, 0.97, True) for t in matrices) / 6
        assert rows[of, "clamp 0.97 + rest"]["snr"][0] == pytest.approx(mean, rel=1e-5)
    assert rows["token", "no clamp"]["paper"] == 8.31
    assert rows["token", "clamp 0.97 + rest"]["snr"][0] > rows["token", "no clamp"]["snr"][0]


@pytest.mark.long                                   # test_gaussian_mse has its numbers in the meantime
def test_format_table(tmp_path, capsys):
    """error   mean squares within 3 % of the literature (test_gaussian_mse); slopes: 1/512 of a step below 1
            by the 8-bit grid, 0.9967 by saturation"""
    run("quant", f"--out_dir={tmp_path}")
    data = json.loads((tmp_path / "quant.json").read_text())
    found, said = {(row["format"], row["case"]): row for row in data["results"]}, capsys.readouterr().out
    for case, literature in analyze.LITERATURE.items():
        assert abs(found[case]["mse"] / literature - 1) < 0.03 and f"{found[case]['mse']:.3e}" in said
    saturates, unbiased = (found[name, "stochastic, 1x16"]["slope"] for name in ("nvfp4", "nvfp4_unbiased"))
    assert saturates < 0.9975 < unbiased < 1.001


WRONG = {
    ("no_such_run",): "no_such_run/config.json",
    ("RUN", "--token=3"): "--token=3: no such option",
    ("RUN", "--tokens=1"): "--tokens must be in [2, 10^9]",
    ("losses",): "losses takes run folders",
    ("quant", "out/gpt"): "quant takes no run folder",
    ("quant", "--out_dir=FILE"): "File exists",
    ("quant", f"--seed={2**64}"): "--seed in [0, 2^63)",
}


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_wrong_input_is_one_line(out, tmp_path, wrong):
    (tmp_path / "file").write_text("")
    words = {"RUN": out / "gpt_bf16_1", "--out_dir=FILE": f"--out_dir={tmp_path / 'file'}"}
    assert WRONG[wrong] in refusal(*(words.get(word, word) for word in wrong))


def test_a_run_without_an_fp4_forward_is_measured_by_the_own_recipe(tiny, tmp_path):
    train.main(tiny(tmp_path, arch="gpt", n_ffn=64, max_steps=1, fp4_gemms="dgrad,wgrad", fp4_tail=0))
    model, recipe, _ = analyze.open_run(tmp_path)
    assert recipe == "nvfp4" and {m.cfg for m in nvfp4.fp4_layers(model)} == {RECIPES["nvfp4"]}


def test_unfit_runs_are_one_line(tiny, out, tmp_path):
    train.main(tiny(tmp_path / "tail", arch="gpt", n_layer=2, n_ffn=64, max_steps=1, fp4_tail=1))
    assert "nvfp4 must quantize a layer" in refusal(tmp_path / "tail")
    small = {"arch": "gpt", "n_layer": 2, "n_ffn": 64, "max_steps": 1}
    train.main(tiny(tmp_path / "seed", **small, fp4_tail=1, seed=2, activation_checkpointing=True))
    assert len(analyze.read_runs([tmp_path / "tail", tmp_path / "seed"])) == 2   # no other numbers by that
    train.main(tiny(tmp_path / "bf16", **small, recipe="bf16"))
    run("losses", tmp_path / "bf16", tmp_path / "tail", f"--out_dir={tmp_path}")
    assert results(tmp_path, "losses")["final"][0]["error_in_fp4"][0] is None
    assert "differ in max_steps" in refusal(out / "gpt_nvfp4_1", tmp_path / "tail")
    (tmp_path / "tail" / "ckpt.pt").unlink()
    assert "no checkpoint there" in refusal(tmp_path / "tail")
    twin = shutil.copytree(out / "gpt_bf16_1", tmp_path / "twin")
    assert re.search("gpt_bf16_1 and .*twin are of one kind and seed", refusal(out / "gpt_bf16_1", twin))


@pytest.mark.parametrize("name, text, said", [
    ("config.json", '{"n_embd": "many"}', "n_embd='many' must be"),
    ("metrics.jsonl", '{"step": 0, "loss": NaN}\n', ", line 1: damaged"),
    ("metrics.jsonl", "", "give its bf16 twin too")], ids=["config", "metrics", "nothing"])
def test_a_damaged_run_is_one_line(out, tmp_path, name, text, said):
    damaged = shutil.copytree(out / "gpt_nvfp4_1", tmp_path / "run")
    (damaged / name).write_text(text)
    line = refusal("losses", damaged, out / "gpt_bf16_1", f"--out_dir={tmp_path}")
    assert said in line and str(damaged) in line


def test_without_matplotlib_tables_and_json_remain(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)                        # importing it fails
    run(out / "gpt_nvfp4_1", f"--out_dir={tmp_path}", *SMALL)
    said = capsys.readouterr()
    assert "means of 6 layers" in said.out and [path.name for path in tmp_path.iterdir()] == ["analysis.json"]
    progress, last = said.err.splitlines()[:-1], said.err.splitlines()[-1]
    assert progress == ["flatness 6/6", f"{out / 'gpt_nvfp4_1'} 6/6"] and last.startswith("no picture: ")


def test_colours_survive_greyscale():
    """GPT and nGPT differ in luminance (ITU-R 601), recipes in their lines and markers."""
    colours = pytest.importorskip("matplotlib.colors", reason="matplotlib is not installed: no pictures")
    grey = {arch: sum(a * b for a, b in zip(colours.to_rgb(colour), (0.299, 0.587, 0.114), strict=True))
            for arch, colour in figures.COLOURS.items()}
    assert abs(grey["gpt"] - grey["ngpt"]) > 0.3
    looks = [figures.line_of(recipe) for recipe in RECIPES]
    assert all(len(set(part)) == len(RECIPES) for part in zip(*looks, strict=True))
