"""Proofs for probes.py: probes against closed forms or brute force, recording against the FP4 layer itself.

Brute force holds the products (T, J, K) that probes.py never does. Statistical bounds are three standard
errors, derived where they stand; every group has a control, on which the same check fails.
"""
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import nvfp4  # noqa: E402
import oracle  # noqa: E402
import probes  # noqa: E402
from model import ModelConfig, build  # noqa: E402
from nvfp4 import RECIPES, quantize  # noqa: E402
from papers import PaperConfig  # noqa: E402
from probes import averaging_gain, db, moments, rho  # noqa: E402

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
    assert close(db(probes.snr(gaussian(9, 9), 0.9 * gaussian(9, 9))), 20.0)
    assert not close(db(probes.snr(gaussian(9, 9), 0.89 * gaussian(9, 9))), 20.0)          # control


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
    found |= dict(zip(("z_s", "z_n"), probes.normalized(m), strict=True))
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


def test_squared_z_ratio_is_the_snr():
    m = moments(*operands())
    (z_s, z_n), S2, N2 = probes.normalized(m), m.S.square().sum(0), m.N.square().sum(0)
    assert close((z_s / z_n).square() * N2, S2)     # of each channel, and of all together
    assert not close((z_s / z_n).square() * N2, 1.001 * S2)                     # control
    assert close(((z_s / z_n).square() * N2 / N2.sum()).sum(), averaging_gain(m)[1])


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
    x = equicorrelated(T, K, r)
    found = float(rho(x.sum(1, keepdim=True), x.var(0).sum()[None], K))
    bound = 3 * math.sqrt(2 / T) * (1 + (K - 1) * r) / (K - 1)
    assert abs(found - r) < bound
    biased = float(rho(x.sum(1, keepdim=True), x.var(0).sum()[None] * (K - 1) / K, K))
    assert abs(biased - r) > bound                  # control: variances with the wrong divisor
    assert abs(found - 2 * r) > bound or r < bound  # control: another correlation


# ---------------------------------------------------------------- theory

CASE = {"r": 0.05, "mean": 0.3, "noise": 0.1, "noise_mean": 0.02, "T": 20000, "K": 32}


def test_eq4_predicts_the_measured_snr():
    """error   0.2 dB = 4.7 %: three standard errors sqrt(4 / T) = 4.2 % of the ratio of two sums of T squares
    """
    c, m = CASE, synthetic(**CASE)
    measured = float(db(averaging_gain(m)[1]))
    right = {"sigma_s2": 1.0, "rho_s": c["r"], "mu_s2": (c["K"] * c["mean"])**2, "sigma_n2": c["noise"]**2,
             "mu_n2": (c["K"] * c["noise_mean"])**2}
    assert abs(float(db(probes.eq4(c["K"], **right))) - measured) < 0.2
    for part in ("rho_s", "mu_s2", "mu_n2"):        # controls: without one of its parts
        assert abs(float(db(probes.eq4(c["K"], **right | {part: 0.0}))) - measured) > 0.2
    assert abs(float(db(probes.predict(m, c["K"]))) - measured) < 0.2          # from measured moments


def test_prediction_for_fewer_terms_is_the_mean_over_all_subsets():
    """Numerator and denominator of eq. 4 for k of K = 6 terms, averaged over every subset of size k."""
    given = operands(J=3, K=6)
    for k in (1, 2, 5, 6):
        signal = noise = 0
        for subset in itertools.combinations(range(6), k):
            m = moments(*(t[:, list(subset)] for t in given))
            signal += (m.S.var(0) + m.S.mean(0).square()).sum()
            noise += (m.var_n + m.N.mean(0).square()).sum()
        assert close(probes.predict(moments(*given), k), signal / noise)
        assert not close(probes.predict(moments(*given), k + 1), signal / noise)           # control


def test_eq5_and_regimes_of_the_paper():
    """The paper's rho, 1.32e-3 and 9.31e-5, give its bounds 755 and 10738 and its limit 14.2.

    error   half a unit of their last digit: 0.005 / 1.32 and 0.005 / 9.31, and the sum of both
    """
    found = probes.regimes(1.32e-3, 9.31e-5)
    for key, value, bound in (("no_gap_below", 755, 0.005 / 1.32), ("saturates_above", 10738, 0.005 / 9.31),
                              ("factor", 14.2, 0.005 / 1.32 + 0.005 / 9.31)):
        assert abs(found[key] / value - 1) < bound
        assert abs(probes.regimes(9.31e-5, 1.32e-3)[key] / value - 1) > bound              # control
    assert math.isnan(probes.regimes(-1e-3, 1e-3)["no_gap_below"])
    assert probes.eq5(0, 0.1, 0.2) == 1 and probes.eq5(10, 0.3, 0.1) == 2
    for D in (16, 10**6):                           # without means it is the ratio of two of eq. 4, to 1 / D
        ratio = probes.eq4(D, 1, 0.03, 0, 1, 0) / probes.eq4(D, 1, 0.001, 0, 1, 0)
        assert abs(float(ratio) / probes.eq5(D, 0.03, 0.001) - 1) < 0.5 / D


def test_partial_sums():
    """rho is constant in k, to 3 standard errors as above, and the SNR grows with k by eq. 4."""
    T, r, one = 20000, 0.1, torch.ones(1, 64, dtype=torch.float64)
    x = equicorrelated(T, 64, r)
    given = x, one, x + 0.1 * gaussian(T, 64, seed=9), one
    found, m = probes.partial_sums(*given, (16, 32, 64)), moments(*given)
    assert close(found[64][0], averaging_gain(m)[1]) and close(found[64][1], rho(m.S, m.var_s, 64).mean())
    for k, (ratio, found_r) in found.items():
        assert abs(found_r - r) < 3 * math.sqrt(2 / T) * (1 + (k - 1) * r) / (k - 1)
        assert abs(float(db(ratio / 100 / (1 + (k - 1) * r)))) < 0.2
        assert abs(float(db(ratio / 100 / (1 + (2 * k - 1) * r)))) > 0.2        # control


# ---------------------------------------------------------------- flatness, error, rounding, counts

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
    for alpha, found in zip(alphas, probes.flatness(model, loss, alphas, draws), strict=True):
        bound = 3 * (2 / alpha + math.sqrt(2)) / math.sqrt(draws * 2 * 256**2)
        assert abs(found / (alpha**2 * loss(model)) - 1) < bound
        assert abs(found / ((1.2 * alpha)**2 * loss(model)) - 1) > bound        # control
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_relative_error():
    reference = [5.0, 4.0, 3.0, 2.0]
    assert close(probes.relative_error([1.02 * v for v in reference], reference), [0.02] * 4)
    found = probes.relative_error([6.0, 4.0, 3.0, 4.0], reference, window=2)
    assert close(found, [1 / 9, 0.0, 2 / 5]) and not close(found, [1 / 5, 0.0, 2 / 2])      # of means


def grid_sample(rows=64):
    """Uniform in (0, 6) with a 6 in each block: with amax = 6 every scale is 1, the grid E2M1 itself."""
    x = 6 * torch.rand(rows, 1024, generator=torch.Generator().manual_seed(0))
    x[:, ::16] = 6
    return x


def test_bias_and_variance_of_stochastic_rounding():
    """On the plain grid, with f the position in a step d and p = floor(256 f) / 256, the mean is d p above
    the step's lower end and the variance d^2 p (1 - p).

    error   slope: three of the standard errors that z counts. Variance: an element's estimate lies between 0
            and d^2 n / (n - 1) / 4, for n = 16 draws, so has a deviation of d^2 / 7 at most
    """
    x, draws = grid_sample(), 16
    grid = torch.tensor(nvfp4.E2M1_VALUES)
    low = grid[(torch.bucketize(x, grid, right=True) - 1).clamp(max=6)]
    d = grid[torch.bucketize(low, grid, right=True)] - low
    p = ((x - low) / d * 256).floor() / 256
    mean, variance = (low + d * p).double(), float((d * d * p * (1 - p)).double().mean())
    slope = float((mean * x).sum() / x.double().square().sum())
    found = probes.rounding(x, draws, seed=5, amax=6.0)
    error = abs((1 - found["slope"]) / found["z"])  # one standard error
    assert abs(found["slope"] - slope) < 3 * error < 1e-3
    deviation = float(d.double().pow(4).mean().sqrt()) / 7 / math.sqrt(x.numel())
    assert abs(found["variance"] - variance) < 3 * deviation
    assert abs(found["slope"] - 0.999 * slope) > 3 * error                      # controls
    assert abs(found["variance"] * (draws - 1) / draws - variance) > 3 * deviation
    nearest = quantize(x, amax=6.0).dequantize().double()
    assert abs(found["slope"] - float((nearest * x).sum() / x.double().square().sum())) > 3 * error
    assert probes.rounding(x, draws, seed=5, amax=3.0)["slope"] < 0.75         # saturates at 3


def test_histograms():
    x = gaussian(32, 256).float()
    x[:, ::16] = torch.where(x[:, ::16] < 0, -6, 6)                             # as in grid_sample: scales 1
    q = quantize(x, amax=6.0)
    codes, exponents = probes.histograms(q)
    for code, value in enumerate(nvfp4.E2M1_VALUES):
        assert codes[code] + codes[code + 8] == ((2 * q.dequantize()).round().abs() == 2 * value).sum() > 0
    assert sum(codes[9:]) == (q.dequantize() < 0).sum() != sum(codes[1:8]) and sum(codes) == 32 * 256
    assert exponents == {8: q.scales.numel()}       # 448 = 1.75 * 2^8


@pytest.mark.parametrize("name", nvfp4.FORMATS)
def test_histograms_count_all_codes_and_scales(name):
    codes, exponents = probes.histograms(quantize(gaussian(32, 256).float(), name))
    assert sum(codes) == 32 * 256 == nvfp4.FORMATS[name].block * sum(exponents.values())


@pytest.mark.parametrize("square", [False, True])
def test_share_of_saturated_blocks(square):
    x = torch.full((32, 64), 0.9)
    x[3, 17] = x[3, 20] = -1.1                      # one block, twice
    x[20, 0] = 1.0                                  # just fits
    blocks = 32 * 64 / (16 * 16 if square else 16)

    def share(amax):
        return probes.saturated(x, nvfp4.choices(square=square, amax=amax))
    assert share(1.0) == 1 / blocks and share(None) == 0
    assert share(0.8) == 1                          # control


def test_fidelity_of_clamped_outliers():
    """An outlier in each token, 30 of its standard deviations: clamped it costs less than the grid that it
    coarsens, added again nothing, and the more is added the finer is the grid. Of Gaussians clamping takes
    more than it gives."""
    x = gaussian(64, 2048).float()

    def snrs(x):
        return {case: probes.fidelity(x, *how)["snr"] for case, (*how, _) in probes.CLAMPS.items()}
    plain = snrs(x)
    x[:, 7] = 30
    found = snrs(x)
    order = ["no clamp", "clamp 0.999", "clamp 0.999 + rest", "clamp 0.99 + rest", "clamp 0.97 + rest"]
    assert sorted(order, key=found.get) == order
    assert plain["clamp 0.97"] < plain["clamp 0.99"] < plain["no clamp"]        # control
    clamped = torch.tensor(oracle.occ_clamp(x.numpy(), 0.99))
    values = (quantize(clamped, "e2m1_vector").dequantize() + (x - clamped)).double()
    got, noise, x = probes.fidelity(x, 0.99, True), (values - x).square(), x.double()
    assert close(got["mse"], noise.mean()) and close(got["snr"], db(x.square().sum() / noise.sum()))
    assert close(got["cosine"], (x * values).sum() / (x.norm() * values.norm()))


# ---------------------------------------------------------------- recording

def tiny_model(arch="gpt"):
    torch.manual_seed(0)
    return build(ModelConfig(arch=arch, n_layer=2, n_embd=32, n_head=2, vocab_size=64, block_size=16))


def converted(cfg, arch="gpt"):
    return nvfp4.convert(tiny_model(arch), cfg, report=lambda line: None)


def batch(seed, rows=2):
    return torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(seed)), None


CFGS = {"ngpt": RECIPES["ngpt"], "nvfp4": replace(RECIPES["nvfp4"], tail=0.0),
        "1x16": nvfp4.FP4Config(square_weights=False), "rotated": nvfp4.FP4Config(hadamard=nvfp4.GEMMS),
        "mxfp4": replace(RECIPES["mxfp4"], tail=0.0),
        "uniform grid": RECIPES["ufp4"],
        "all random": PaperConfig(stochastic=nvfp4.OPERANDS, hadamard=nvfp4.GEMMS, hadamard_signs="fresh")}


@pytest.mark.parametrize("cfg", [RECIPES["nvfp4"], replace(RECIPES["ngpt"], skip=("*out",))])
def test_every_fp4_layer_is_recorded_and_left_as_it_was(cfg):
    model = converted(cfg)
    layers = probes.named_parts(model)
    found = probes.record(model, [batch(0), batch(1)], 40)
    assert found.keys() == layers.keys() != probes.named_parts(converted(replace(cfg, tail=1.0))).keys()
    for name, (x, xq) in found.items():
        layer = layers[name].layer
        assert x.shape == xq.shape == (40, layer.in_features)
        assert layer.cfg is cfg and not layer._forward_pre_hooks


@pytest.mark.parametrize("name", CFGS)
def test_measured_snr_is_that_of_the_fp4_layer(name):
    """All tokens, all channels: the signal and the noise of the layer that convert() makes, whatever its
    recipe says of fprop's operands.

    error   the layer accumulates K = 32 products in fp32: 32 * 2^-24 of the output, of which noise is a
            tenth; rotated operands are rounded to fp32, 5 operations each
    """
    model, batches = converted(CFGS[name], "ngpt" if name == "ngpt" else "gpt"), [batch(0), batch(1)]
    part = probes.named_parts(model)["blocks.2.mixer.qkv"]
    layer = part.layer
    x, xq = probes.record(model, batches, 64)["blocks.2.mixer.qkv"]
    assert len(x) == 64
    numbers, terms, channels = probes.measure(part, x, xq, 96)
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), nvfp4.high_precision(model):
        for idx, _ in batches:
            model(idx)
        handle.remove()
        clean = [layer(x) for x in inputs]
    signal = sum(y.double().square().sum() for y in clean)
    with torch.no_grad():
        noise = sum((layer(x).double() - y.double()).square().sum()
                    for x, y in zip(inputs, clean, strict=True))
    assert close(numbers["dot"], db(signal / noise), 1e-4)
    other = probes.measure(part, x.roll(1, 1), xq, 96)[0]
    assert not close(other["dot"], db(signal / noise), 1e-4)                    # control
    assert len(channels) == 96 and close(numbers["gain"], numbers["dot"] - numbers["products"])
    assert [term["k"] for term in terms if not math.isnan(term["dot"])] == [16, 32] and len(terms) == 13
    assert close(terms[1]["dot"], numbers["dot"]) and close(terms[1]["eq4"], numbers["eq4"])


def test_an_expert_is_measured_as_a_layer_of_its_own():
    """What record() and measure() say of an expert is what its rows and weights say by themselves; rows that
    fill up its group are not among them."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 2, "n_ffn": 48, "block_size": 16, "vocab_size": 64}
    model = build(ModelConfig(pattern="E", moe_n_expert=6, moe_n_active=2, **sizes))
    nvfp4.convert(model, nvfp4.FP4Config(weight_amax=1.0, input_amax=8.0), report=lambda line: None)
    parts = probes.named_parts(model)
    experts = [name for name in parts if "experts.fc1" in name]
    assert experts == [f"blocks.0.mixer.experts.fc1[{e}]" for e in (0, 2, 4)]   # 4 at most, evenly
    inputs = []
    fc1 = model.blocks[0].mixer.experts.fc1
    handle = fc1.register_forward_pre_hook(lambda _, args: inputs.append(args))
    found = probes.record(model, [batch(0)], 10**6)
    handle.remove()
    x, ends = inputs[0]
    filled = 0
    for name, e in zip(experts, (0, 2, 4), strict=True):
        rows = x[(int(ends[e - 1]) if e else 0):ends[e]]
        mine = rows[rows.any(1)].detach()
        filled += len(rows) - len(mine)
        seen, seen_q = found[name]
        assert torch.equal(seen.sort(0).values, mine.sort(0).values) and torch.equal(
            seen_q, quantize(seen, amax=8.0).dequantize())
        alone = torch.nn.Linear(32, 48, bias=False)
        alone.weight.data = fc1.weight.detach()[e].clone()
        alone = probes.Part(nvfp4.FP4Linear(alone, fc1.cfg))
        alone, mine, other = (json.dumps(probes.measure(part, seen, seen_q, 48))               # NaN = NaN
                              for part in (alone, parts[name], parts[experts[e // 2 - 1]]))
        assert alone == mine != other
    assert filled > 0


def test_a_row_is_all_that_a_probe_needs(monkeypatch):
    """The fourth moment of the inputs over their second's square: 1.8 of uniform numbers.

    error   of 256,000 numbers: (sqrt(E x^8 / (E x^4)^2 - 1) + 2 sqrt(E x^4 / (E x^2)^2 - 1)) / 506 = 0.6 %
    """
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    layer = nvfp4.convert(model, nvfp4.FP4Config(), report=lambda line: None)[0]
    x = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    monkeypatch.setitem(probes.PROBES, "kurtosis", probes.Probe(
        lambda s: s.x.pow(4).mean() / s.x.square().mean()**2, ".2f"))
    found = probes.measure(probes.Part(layer), x, x, 8)[0]
    assert list(found) == list(probes.PROBES) and abs(found["kurtosis"] / 1.8 - 1) < 0.01


def test_sampled_rows_are_quantized_as_in_their_batch():
    model, name = converted(CFGS["nvfp4"]), "blocks.0.mixer.qkv"
    whole, whole_q = probes.record(model, [batch(0, rows=8)], 10**6)[name]
    some, some_q = probes.record(model, [batch(0, rows=8)], 5, seed=3)[name]
    assert whole.shape == (128, 32) and some.shape == (5, 32)
    where = [next(i for i, row in enumerate(whole) if torch.equal(row, mine)) for mine in some]
    assert len(set(where)) == 5
    assert torch.equal(some_q, whole_q[where]) and torch.equal(whole_q, quantize(whole).dequantize())
    assert not torch.equal(quantize(some).dequantize(), some_q)                 # control


def test_sampling_converges_to_the_full_computation():
    """error   falls as one over the root of the sample: 8 times from 16 to 1024 tokens; 3 times is asked"""
    x, layer = equicorrelated(4096, 64, 0.02).float(), torch.nn.Linear(64, 96, bias=False)
    layer.weight.data = gaussian(96, 64, seed=7).float() + 0.1
    part, xq = probes.Part(nvfp4.FP4Linear(layer, CFGS["nvfp4"])), quantize(x).dequantize()
    full = float(probes.measure(part, x, xq, 96)[0]["dot"])

    def error(tokens, channels):
        found = []
        for seed in range(4):
            rows = torch.randperm(4096, generator=torch.Generator().manual_seed(seed))[:tokens]
            found.append(float(probes.measure(part, x[rows], xq[rows], channels, seed)[0]["dot"]) - full)
        return math.sqrt(sum(e * e for e in found) / 4)
    assert error(4096, 96) < 1e-9 and error(1024, 96) < 0.2 and error(1024, 96) < error(16, 96) / 3
    assert error(4096, 64) < error(4096, 4)
