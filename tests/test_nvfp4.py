"""Proofs for nvfp4.py and papers.py: formats bit for bit against oracle.py, their noise, the GEMM, the layer.

Every group has a negative control: the same check fails on something broken. All run the eager definition,
which needs no compiler; the last group holds the compiled code to it.
"""
import copy
import math
import re
import shutil
import warnings
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import nvfp4
import oracle
import papers
from nvfp4 import (E2M1_NUMBERS, FORMATS, GEMMS, OPERANDS, RECIPES, SIGNS, FP4Config, FP4Linear,
                   Quantized, choices, convert, e2m1, hadamard, matmul, quantize, quantize_both)
from papers import PaperConfig, dge_slope, e5m2, split_outliers, tensor_core_sum

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = FORMATS["nvfp4"].block
SEED = 0x1234_5678_9ABC_DEF0                        # both 32-bit words in use
KINDS = ("gaussian", "cauchy", "outlier", "tiny", "subnormal", "outlier, tiny", "zero blocks", "zero", "ties")
THREADS, CAN_COMPILE = torch.get_num_threads(), nvfp4.can_compile
DTYPES = FP32, BF16, FP16
GRIDS = {"nvfp4": oracle.E2M1, "ufp4": np.arange(8.0)}      # what codes 0..7 stand for


pytestmark = pytest.mark.usefixtures("unfused")


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some(chosen, cases):
    """All cases; those that are not chosen are long."""
    return [case if case in chosen else pytest.param(*case, marks=pytest.mark.long) for case in cases]


def sample(kind, shape, dtype=FP32, seed=0):
    """A matrix with one kind of trouble."""
    x = gaussian(*shape, seed=seed)
    if kind == "cauchy":
        x = x / gaussian(*shape, seed=seed + 1)
    elif kind == "outlier":
        x.view(-1)[3::101] = -1e4
    elif kind == "tiny":
        x = 1e-6 * x
    elif kind == "subnormal":
        x = 1e-40 * x                               # s_enc is capped at FLT_MAX
    elif kind == "outlier, tiny":
        x = 1e-4 * x                                # block scales are subnormal or zero
        x[-1, -1] = 1e4
    elif kind == "zero blocks":
        x.view(-1, BLOCK)[::3] = 0
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "ties":                            # multiples of 1/8: many lie halfway between two codes
        x = (8 * x).round() / 8
        x.view(-1, BLOCK)[::2, 5] = 6
        x[-1, -1] = 7                               # 448 / 7 = 64: block scales are ties too
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def same(a, b):
    """Bit for bit, any NaN being like any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == torch.float8_e4m3fn:
        a, b = a.float(), b.float()
    nan, bits = torch.isnan(a), {2: torch.int16, 4: torch.int32}.get(a.element_size(), a.dtype)
    return torch.equal(nan, torch.isnan(b)) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


def tensors_of(q):
    """The tensors of a Quantized or a Decoded."""
    return [field for field in q if torch.is_tensor(field)]


def alike(a, b):
    """Whether two Quantized, or two Decoded, are the same, bit for bit."""
    return all(same(s, t) for s, t in zip(tensors_of(a), tensors_of(b), strict=True))


def broken(q):
    """What a check must not take for q: transposed nibbles, swapped scales, a tensor scale off by 1 %."""
    scales = q.scales.view(torch.uint8).flip(1).view(torch.float8_e4m3fn)
    codes = q.codes >> 4 | q.codes << 4
    return q._replace(codes=codes), q._replace(scales=scales), q._replace(s_dec=1.01 * q.s_dec)


# ---------------------------------------------------------------- E2M1

@pytest.mark.parametrize("name, other", (("nvfp4", "ufp4"), ("ufp4", "nvfp4")))
def test_all_sixteen_codes(name, other):
    """Each code encodes and decodes; number * scale is exact in bf16, for sixteen codes times 127 scales."""
    grid, (rounds, number_of) = GRIDS[name], FORMATS[name].grid
    value, code = rounds(torch.tensor(grid, dtype=FP32))
    assert value.tolist() == number_of(code).tolist() == grid.tolist() and code.tolist() == list(range(8))
    codes = torch.tensor([[c | c + 1 << 4 for c in range(0, 16, 2)]] * 127, dtype=torch.uint8)
    scales = torch.arange(127, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    q = Quantized(codes, scales, torch.tensor(1.0), name)
    exact = np.concatenate([grid, -grid])[None, :] * oracle.E4M3[:, None]
    assert q.decode().dtype == BF16 and np.array_equal(q.decode().double().numpy(), exact)
    assert np.array_equal(q.dequantize().double().numpy(), exact)
    for wrong in (broken(q)[0], q._replace(format=other)):
        assert not np.array_equal(wrong.decode().double().numpy(), exact)


@pytest.mark.parametrize("name", GRIDS)
def test_every_bf16_value_in_8_rounds_to_nearest_even(name):
    """And what is beyond the grid saturates."""
    positive, grid = torch.arange(0x4100 + 1, dtype=torch.int16).view(BF16).float(), GRIDS[name]
    assert positive[-1] == 8
    want, rounds = oracle.nearest(positive.numpy(), grid), FORMATS[name].grid.round
    value, code = rounds(positive)
    assert np.array_equal(code.numpy(), want) and np.array_equal(value.numpy(), grid[want])
    assert rounds(torch.tensor(grid[1:] + grid[:-1]) / 2)[1].tolist() == [0, 2, 2, 4, 4, 6, 6]
    # through quantize: with the grid's end as amax, and in every block, scale * s_dec is 1
    x = torch.cat([-positive, positive])
    x = F.pad(F.pad(x, (0, -len(x) % 15)).view(-1, 15), (0, 1), value=grid[-1])
    want = oracle.nearest(x.abs().numpy(), grid) + 8 * np.signbit(x.numpy())
    for y, right in ((x, True), (x.bfloat16(), True), (x * (1 + 2**-20), False)):      # no ties
        codes = quantize(y, name, amax=grid[-1]).codes
        assert np.array_equal(oracle.unpack(codes.numpy()), want) is right


@pytest.mark.parametrize("name, rounds", (
    ("nvfp4", e2m1), ("ufp4", papers.e1m2), ("ufp4", papers.hif4_round)), ids=("e2m1", "e1m2", "hif4"))
def test_round_up_count_over_all_bytes(name, rounds):
    """A fraction f of the way through its interval, a number goes up for floor(256 f) of the 256 bytes."""
    grid, n = torch.tensor(GRIDS[name], dtype=FP32), torch.arange(256)
    for low, offset in product(range(7), (0.0, 0.5, 0.999)):
        a = (grid[low] + (n + offset) / 256 * (grid[low + 1] - grid[low]))[:, None]
        value, code = rounds(a, n[None, :])
        assert torch.equal((code == low + 1).sum(1), n) and torch.equal((code == low).sum(1), 256 - n)
        assert torch.equal(value, grid[code.long()])
        seven_bits = rounds(a, n[None, ::2])[1]
        assert not torch.equal(2 * (seven_bits == low + 1).sum(1), n)


# ---------------------------------------------------------------- quantize against the oracle

def agrees(q, o):
    """codes (outside NaN blocks), scales, s_dec and values of a Quantized equal the oracle's."""
    valid = oracle.expand(o.scales != oracle.NAN_BYTE, o.block)
    return (np.array_equal(q.scales.view(torch.uint8).numpy(), o.scales)
            and np.array_equal(oracle.unpack(q.codes.numpy())[valid], oracle.unpack(o.codes)[valid])
            and np.array_equal(q.s_dec.numpy(), o.s_dec, equal_nan=True)
            and np.array_equal(q.decode().float().numpy(), oracle.dequantize(o, False), equal_nan=True)
            and np.array_equal(q.dequantize().numpy(), oracle.dequantize(o), equal_nan=True))


ORACLES = {"nvfp4": oracle.quantize, "nvfp4_46": oracle.four_over_six}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORACLES)
def test_oracle_agrees_bit_for_bit(name, kind, monkeypatch):
    """Each combination of options and shapes, with the three dtypes in turn."""
    shapes = (1, 80), (33, 64), (48, 64)
    options = product(shapes, (False, True), (False, True), (None, 1.0, 1e-3, 3e4))
    monkeypatch.setitem(FORMATS, "nvfp4_46_unbiased", replace(FORMATS["nvfp4_46"], target=6 * 16 / 17))
    for n, (shape, stochastic, unbiased, amax) in enumerate(options):
        x, square = sample(kind, shape, DTYPES[n % 3], seed=n), shape == (48, 64)
        o = ORACLES[name](x.float().numpy(), (16 if square else 1, 16), stochastic, SEED + n, amax,
                          6 * 16 / 17 if unbiased else 6)
        q = quantize(x, name + "_unbiased" * unbiased, square, stochastic, SEED + n, amax)
        assert agrees(q, o), (shape, stochastic, unbiased, amax)


def test_oracle_disagrees_with_anything_else():
    x = gaussian(32, 64)
    given = {"x": x, "stochastic": True, "seed": SEED}
    o = oracle.quantize(x.numpy(), stochastic=True, key=SEED)
    assert agrees(quantize(**given), o) and not any(agrees(q, o) for q in broken(quantize(**given)))
    for change in ({"seed": SEED + 1}, {"seed": SEED & nvfp4.MASK32}, {"format": "nvfp4_unbiased"},
                   {"amax": 1.0}, {"stochastic": False}, {"square": True}, {"x": x.bfloat16()},
                   {"format": "nvfp4_46"}):
        assert not agrees(quantize(**(given | change)), o), change
    q = quantize(x, "nvfp4_46")                     # nor by the sum of absolute errors, nor without a choice
    assert agrees(q, oracle.four_over_six(x.numpy()))
    assert not agrees(q, oracle.four_over_six(x.numpy(), power=1))
    assert not agrees(q, oracle.quantize(x.numpy(), top=256.0))


@pytest.mark.parametrize("square", (False, True))
@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("name", ORACLES)
def test_not_finite_becomes_nan(name, stochastic, square):
    """The whole tensor where its maximum is measured; the block alone where the tensor scale is fixed."""
    how, block = {"format": name, "square": square, "stochastic": stochastic}, (16 if square else 1, 16)
    clean, nan = quantize(gaussian(32, 64), amax=1.0, **how), torch.zeros(32, 64, dtype=torch.bool)
    nan[16 if square else 17:32 if square else 18, 16:32] = True
    assert not clean.dequantize().isnan().any()
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = gaussian(32, 64)
        x[17, 20] = bad
        q = quantize(x, **how)
        assert agrees(q, ORACLES[name](x.numpy(), block, stochastic)) and q.dequantize().isnan().all()
        q = quantize(x, amax=1.0, **how)
        assert agrees(q, ORACLES[name](x.numpy(), block, stochastic, amax=1.0))
        assert torch.equal(q.dequantize().isnan(), nan)
        assert torch.equal(q.dequantize()[~nan], clean.dequantize()[~nan])
        assert torch.equal(matmul(q, clean).isnan(), nan.any(1, keepdim=True).expand(32, 32))


@pytest.mark.parametrize("amax", (None, 1.0))
def test_minus_zero_is_worth_zero(amax):
    x = gaussian(16, 32)                            # x * (x > 0) has -0.0 where clamp has 0.0
    a, b, c = (quantize(y, amax=amax).dequantize() for y in (x * (x > 0), x.clamp(min=0), x))
    assert torch.equal(a, b) and not torch.equal(b, c)
    q = quantize(torch.full((16, 32), -0.0), amax=amax)
    assert torch.equal(q.dequantize(), torch.zeros(16, 32)) and (float(q.s_dec) == 1) is (amax is None)


STOCHASTIC = {"stochastic": True, "seed": SEED}
MSE = (                                             # 2601.22813 table 1, or papers.py where it has none
    ("nvfp4", {}, 9.04e-3), ("nvfp4", {"square": True}, 12.39e-3), ("nvfp4", STOCHASTIC, 18.84e-3),
    ("nvfp4_unbiased", STOCHASTIC, 23.50e-3), ("nvfp4_46", {}, 7.56e-3),
    ("nvfp4_46", {"square": True}, 12.37e-3), ("nvfp4_46", STOCHASTIC, 17.47e-3),
    ("ms_eden", STOCHASTIC, 9.4e-3), ("mxfp4", {}, 13.30e-3), ("mxfp4_floor", {}, 13.21e-3),
    ("ufp4", {}, 7.45e-3), ("hif4", {}, 6.87e-3))


@pytest.mark.parametrize("name, options, mse", MSE, ids=str)
def test_gaussian_mse(name, options, mse):
    """Within 3 % of its number; values 3 % too large are noticed."""
    x = gaussian(512, 2048)
    values = quantize(x, name, **options).dequantize()
    right, wrong = (float((factor * values - x).square().mean()) for factor in (1.0, 1.03))
    assert abs(right / mse - 1) < 0.03 < abs(wrong / mse - 1)


# ---------------------------------------------------------------- randomness

def test_philox_known_answers():
    """The vectors of Random123 (Salmon et al. 2011), for ints, tensors and the oracle."""
    ones = 0xFFFFFFFF
    answers = {(0,) * 6: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
               (ones,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
               (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0):
               (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)}
    for words, answer in answers.items():
        assert nvfp4.philox(*words) == answer != nvfp4.philox(words[0] ^ 1, *words[1:])
        assert tuple(map(int, nvfp4.philox(*map(torch.tensor, words)))) == answer
        assert tuple(map(int, oracle.philox(words[:4], words[4:]))) == answer


def noise(place, n=4096):
    """The bytes (n, 16) of n blocks of a stream; place: seed, step, micro_batch, layer, operand."""
    return nvfp4.random_bytes(torch.tensor(nvfp4.stream_key(*place)), n // 64, 64 * BLOCK).view(n, BLOCK)


def sigmas(a, b):
    """Correlation of two streams of bytes in units of its standard error."""
    both = torch.stack([a.flatten(), b.flatten()]).double()
    return abs(float(torch.corrcoef(both)[0, 1])) * a.numel() ** 0.5


def test_streams_are_independent():
    """Another seed, step, micro-batch (or rank), layer, operand, block or element: another stream."""
    places = [(SEED, 2, 3, 4, 5), (SEED + 1, 2, 3, 4, 5), (SEED + 2**32, 2, 3, 4, 5), (SEED, 3, 3, 4, 5),
              (SEED, 2, 4, 4, 5), (SEED, 2, 3, 5, 5), (SEED, 2, 3, 4, 4), (SEED, 3, 2, 4, 5)]
    streams = [noise(place) for place in places]
    for place, stream in zip(places, streams, strict=True):
        assert np.array_equal(stream.numpy(), oracle.random_bytes(4096, 16, oracle.stream_key(*place)))
        assert torch.equal(stream, noise(place)) and torch.equal(stream[:128], noise(place, 128))
        turned = nvfp4.random_bytes(torch.tensor(nvfp4.stream_key(*place)), 64, 64 * BLOCK, turned=True)
        assert torch.equal(turned, stream.view(64, 64, BLOCK).permute(1, 2, 0))
        count = torch.bincount(stream.flatten(), minlength=256).double()
        assert abs(float(((count - 256) ** 2 / 256).sum()) - 255) < 4 * (2 * 255) ** 0.5   # chi-square
    assert max(sigmas(a, b) for a, b in combinations(streams, 2)) < 4
    one = streams[0]
    assert max(sigmas(one[:-lag], one[lag:]) for lag in (1, 2, 4, 8, 64, 256)) < 4       # blocks, rows
    assert max(sigmas(one[:, i], one[:, j]) for i, j in combinations(range(16), 2)) < 4
    assert min(sigmas(one, one), sigmas(one, one // 64), sigmas(one, 255 - one)) > 4


@pytest.mark.parametrize("name, low, high", (
    ("nvfp4", 6 * 16 / 17, 6 * 17 / 16), ("nvfp4_unbiased", 6 * (16 / 17) ** 2, 6), ("mxfp4", 3, 6),
    ("mxfp4_floor", 4, 8)))
def test_where_a_block_s_largest_magnitude_lands(name, low, high):
    """Beyond 6 it saturates: by NVFP4's usual target and by OCP's scales, not by the unbiased target."""
    x, form = gaussian(512, 1024).abs() + 1e-3, FORMATS[name]
    q = quantize(x, name, stochastic=True)
    lands = x.unflatten(1, (-1, form.block)).amax(2) / (q.scales.float() * q.s_dec)
    assert low * (1 - 2**-21) <= lands.min() and lands.max() <= high * (1 + 2**-21)
    assert lands.min() < low * 1.02 and lands.max() > 0.98 * high


# ---------------------------------------------------------------- the Hadamard transform

def signs_of(kind, size, gemm_name="wgrad", keys=None):
    """The signs of a rotation by PaperConfig, (size,)."""
    keys = torch.zeros(len(OPERANDS), 2, dtype=torch.int64) if keys is None else keys
    return PaperConfig(hadamard_signs=kind, hadamard_size=size).signs_of(gemm_name, keys)


NONE_128 = (1,) * 128
ROTATIONS = {f"{kind}, {n}": signs_of(kind, n).tolist()
             for kind, n in product(("fixed", "none"), (16, 32, 128))}


def test_fixed_signs():
    """TransformerEngine's 16; drawn ones are the oracle's and balanced; of fresh ones the key is a GEMM's."""
    assert SIGNS == oracle.SIGNS == tuple(ROTATIONS["fixed, 16"])
    assert signs_of("fixed", 16) is FP4Config().signs_of("wgrad", torch.zeros(6, 2, dtype=torch.int64))
    for n in (32, 128):
        assert ROTATIONS[f"fixed, {n}"] == oracle.rotation_signs(n) != [1] * n == ROTATIONS[f"none, {n}"]
        assert abs(sum(oracle.rotation_signs(n))) < 4 * n**0.5
    layer = make_layer(FP4Config())
    for gemm_name, operand, n in product(("fprop.w", "dgrad.w", "wgrad.dy"), OPERANDS, (16, 128)):
        key = oracle.stream_key(*PLACE, layer.index, OPERANDS.index(operand))
        fresh = signs_of("fresh", n, gemm_name.split(".")[0], layer.keys).tolist()
        assert (fresh == oracle.rotation_signs(n, key)) is (gemm_name == operand)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_hadamard(dtype, name):
    """The oracle's bits, the matrix's numbers, and (A H)(B H)^T = A B^T."""
    signs, n = ROTATIONS[name], len(ROTATIONS[name])
    others = [-sign for sign in signs[:n // 2]] + signs[n // 2:]
    for kind in KINDS:
        x = sample(kind, (32, 5 * n), dtype)
        want = torch.tensor(oracle.hadamard(x.float().numpy(), signs, dtype == BF16)).to(dtype)
        assert same(hadamard(x, signs), want) and not (x.any() and same(hadamard(x, others), want))
    # small integers: everything is exact, but for sqrt(32) and sqrt(128)
    matrix = torch.tensor(oracle.hadamard_matrix(n))
    a, b = (gaussian(24, 4 * n, seed=s).mul(4).round().clamp(-8, 8).to(dtype) for s in (0, 1))
    exact, turned = a.double() @ b.double().T, hadamard(a, signs).double()
    rounding = 0 if n == 16 else 2**-8 if dtype == BF16 else 2**-22
    want = (a[:, :n] * torch.tensor(signs)).double() @ matrix / n**0.5
    assert ((turned[:, :n] - want).abs() <= rounding * want.abs()).all()
    if n == 16:
        assert torch.equal(turned @ hadamard(b, signs).double().T, exact)
        assert not torch.equal(turned @ hadamard(b, others).double().T, exact)


# ---------------------------------------------------------------- rows and columns, packed and decoded

@pytest.mark.parametrize("kind, M, dtype", some(
    (("gaussian", 48, FP32), ("cauchy", 43, BF16), ("zero blocks", 43, FP16)),
    product(("gaussian", "cauchy", "zero blocks"), (48, 43), DTYPES)))
def test_columns_are_the_rows_of_the_transpose(kind, M, dtype):
    """quantize_both gives quantize of x and of a contiguous x^T padded with zeros: that x^T lies transposed
    in memory changes no bit. signs rotate first, and decode decodes what is packed otherwise."""
    x = sample(kind, (64, 64), dtype)[:M]
    x_t = F.pad(x.t(), (0, -M % BLOCK)).contiguous()
    key, signs = torch.tensor(nvfp4.stream_key(SEED, 1, 2, 3, 4)), torch.tensor(SIGNS, dtype=FP32)
    for options in product((None, dtype), (False, True), (None, signs), (1.0, None), (False, True),
                           (False, True)):
        decode, stochastic, rotated, amax, square, unbiased = options
        how = choices("nvfp4" + "_unbiased" * unbiased, square, stochastic, key, amax, rotated, decode)
        row_how = how | {"square": square and M % BLOCK == 0}
        both = quantize_both(x, row_how, how)
        for got, contiguous, how_here in ((both.rows, x, row_how), (both.columns, x_t, how)):
            rotate_first = contiguous if rotated is None else hadamard(contiguous, signs)
            want = quantize(rotate_first, **(how_here | {"signs": None, "decode": None}))
            if decode is not None:
                want = nvfp4.Decoded(want.decode().to(dtype), want.s_dec)
            assert alike(got, want), options
    for change in ({}, {"seed": key + 1}, {"signs": -signs.flip(0)}, {"square": False}, {"format": "nvfp4"},
                   {"stochastic": False}):
        changed = quantize_both(x, None, how | change).columns
        assert same(changed.values, both.columns.values) is (not change), change
    assert torch.equal(quantize_both(x, None, how).rows, x)                     # not asked for: as it is
    assert torch.equal(quantize_both(x, how | {"square": False}).columns, x.t())


@pytest.mark.parametrize("decode, amax", ((None, None), (BF16, None), (FP32, 2.0), (None, 2.0)), ids=str)
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.squares])
def test_a_weight_s_codes_may_be_made_by_parts(name, decode, amax):
    """Both of the weight from codes of its parts side by side, at the largest magnitude of all of them."""
    x, how = sample("gaussian", (96, 64), FP32), choices(name, square=True, decode=decode, amax=amax)
    x[40] *= 3.0                                    # in one part alone
    of_all = how | {"amax": x.abs().max() if amax is None else amax, "decode": None}
    parts = [quantize(part, **of_all) for part in x.split(32)]
    q = parts[0]._replace(codes=torch.cat([part.codes for part in parts]),
                          scales=torch.cat([part.scales for part in parts]))
    want, got = quantize_both(x, how, how), nvfp4.both_of(q, **how)
    assert alike(got.rows, want.rows) and alike(got.columns, want.columns)
    own = quantize(x[:32], **how | {"amax": None, "decode": None})              # control: its own largest
    assert FORMATS[name].top is None or not same(own.scales, q.scales[:len(own.scales)])


# ---------------------------------------------------------------- the GEMM

@pytest.fixture(params=(True, False), ids=("bf16 units", "fp32 units"))
def cpu(request, monkeypatch):
    """Both ways through the GEMM on a CPU; either gives right results on any CPU."""
    monkeypatch.setattr(nvfp4, "cpu_has_bf16", lambda: request.param)


@pytest.mark.parametrize("options", ({}, {"square": True}, {"stochastic": True}, {"amax": 4.0}), ids=str)
def test_matmul_is_exact_products(options, cpu):
    """Within 1e-5 of sum |a||b| of float64; in bf16 one more rounding, 2^-8 of the result."""
    a, b = (quantize(gaussian(n, 512, seed=n), **options) for n in (48, 80))
    left, right = (q.decode().double() * q.s_dec.double() for q in (a, b))
    exact, bound = left @ right.T, 1e-5 * (left.abs() @ right.abs().T)

    def close(y, rounding=0.0):
        return bool(((y - exact).abs() <= bound + rounding * exact.abs()).all())
    y = matmul(a, b)
    assert y.dtype == FP32 and close(y) and not close(y.bfloat16()) and close(matmul(a, b, BF16), 2**-8)
    wrong = [0.98 * y, *(matmul(q, b) for q in broken(a)), *(matmul(a, q) for q in broken(b))]
    assert not any(close(z, rounding) for z in wrong for rounding in (0.0, 2**-8))


def test_matmul_of_codes_is_exact(cpu):
    """With scales of 1 all sums are multiples of 1/4 below 2^22: fp32 holds them in any order of addition."""
    codes = noise((SEED, 0, 0, 0, 0), 2048).view(128, 256).to(torch.uint8)
    ones = torch.ones(64, 32).to(torch.float8_e4m3fn)
    a, b = (Quantized(c, ones, torch.tensor(1.0)) for c in codes.split(64))
    exact = a.dequantize().double() @ b.dequantize().double().T
    assert torch.equal(matmul(a, b).double(), exact)
    assert not torch.equal(matmul(a, b._replace(s_dec=b.s_dec * (1 + 2**-20))).double(), exact)


@pytest.mark.parametrize("K", (256, 1024, 4096))
def test_fixed_amax_loses_nothing_on_unit_rows(K):
    """2605.06067: rows of norm 1 need no search for amax; a constant 1e5 times too large costs decibels."""
    x = F.normalize(gaussian(64, K), dim=1)

    def snr(amax, **options):
        values = quantize(x, amax=amax, **options).dequantize()
        return float(-20 * ((values - x).norm() / x.norm()).log10())
    for options in ({}, {"square": True}, STOCHASTIC):
        measured = snr(None, **options)
        assert abs(snr(1.0, **options) - measured) < 0.3 < measured - snr(1e5, **options), options


def by_fractions(a, b, bits, dot=16, k=64):
    """tensor_core_sum() of two rows, in exact arithmetic."""
    total = Fraction(0)
    for start in range(0, len(a), k):
        pairs = zip(a[start:start + k], b[start:start + k], strict=True)
        products = [Fraction(x) * Fraction(y) for x, y in pairs]
        terms = [sum(products[i:i + dot], Fraction(0)) for i in range(0, len(products), dot)] + [total]
        largest = max(map(abs, terms))
        if largest:
            power = 0
            while largest >= 2:
                largest, power = largest / 2, power + 1
            while largest < 1:
                largest, power = largest * 2, power - 1
            unit = Fraction(2) ** (power - bits)
            total = sum(int(term / unit) * unit for term in terms)              # int() cuts off toward zero
            unit = Fraction(2) ** (math.frexp(float(total))[1] - 24)            # of fp32's 24 bits
            total = int(total / unit) * unit
    return float(total)


@pytest.mark.parametrize("bits", [35, 8])
def test_tensor_core_sum_is_its_definition(bits):
    """Bit for bit, against fractions; blocks of very different sizes, and zeros; K no multiple of 64."""
    sizes = torch.logspace(-3, 3, 13).repeat_interleave(16)
    a, b = (quantize(gaussian(3, 208, seed=seed) * sizes, decode=FP32).values for seed in (1, 2))
    a[:, 64:128] = 0
    y = tensor_core_sum(a, b, bits)
    assert y.tolist() == [[by_fractions(m, n, bits) for n in b.tolist()] for m in a.tolist()]
    exact = a.double() @ b.double().T
    error = float(((y - exact).abs() / (a.double().abs() @ b.double().abs().T)).max())
    assert (error < 2**-22) == (bits == 35) and error > 0                       # 8 bits: a control


def test_accumulation_error_is_a_bound():
    """Of sums that keep 13 bits behind the largest's power of two, as few as are known; and no loose one:
    with 4 bits less it does not hold. Blackwell's 35 are far within."""
    K, worst = 2048, {}
    a = quantize(gaussian(64, K, seed=1).abs(), decode=FP32).values
    b = quantize(gaussian(64, K, seed=2).abs(), decode=FP32).values
    size = a.double() @ b.double().T                # nothing cancels, all is cut off the same way
    for bits in (35, 13, 9):
        worst[bits] = float(((tensor_core_sum(a, b, bits) - size).abs() / size).max())
    allowed = K * nvfp4.ACCUMULATION_ERROR
    assert worst[35] < 1e-5 < worst[13] <= allowed < worst[9]


# ---------------------------------------------------------------- the layer's three GEMMs

CONFIGS = {
    "ngpt": RECIPES["ngpt"], "nvfp4": RECIPES["nvfp4"], "only fprop": FP4Config(gemms=("fprop",)),
    "only backward": FP4Config(gemms=("dgrad", "wgrad")), "weights 1x16": FP4Config(square_weights=False),
    "rotated": FP4Config(hadamard=GEMMS),
    "rotated, no signs": PaperConfig(hadamard=GEMMS, hadamard_signs="none"),
    "rotated, fresh signs": PaperConfig(hadamard=GEMMS, hadamard_signs="fresh"),
    "all stochastic": FP4Config(stochastic=OPERANDS), "only fprop.w": FP4Config(stochastic=("fprop.w",)),
    "all fixed": FP4Config(input_amax=1.0, weight_amax=1.0, grad_amax=4.0), "mxfp4": RECIPES["mxfp4"],
    **{name: RECIPES[name] for name in ("mxfp4_h16", "nvfp4_46", "fp4_dge_occ", "tetrajet2",
                                        "fp4_all_the_way", "ufp4", "hif4")},
    "quartet2 by 32": replace(RECIPES["quartet2"], hadamard_size=32),
    "vectors": FP4Config(format="e2m1_vector", square_weights=False),
    "vectors, weights fixed": FP4Config(format="e2m1_vector", square_weights=False, weight_amax=1.0),
    "dge and occ": PaperConfig(dge_k=3.0, occ=0.95),
    "codes again": PaperConfig(reuse_codes=True),
    "codes, high precision": PaperConfig(reuse_codes=True, gemms=("fprop",)),
    "codes of nothing": PaperConfig(reuse_codes=True, gemms=("wgrad",)),
    "rotated by 32": PaperConfig(hadamard=GEMMS, hadamard_size=32),
    "rotated by 32, fresh signs": PaperConfig(hadamard=GEMMS, hadamard_size=32, hadamard_signs="fresh"),
    "rotated by 128": PaperConfig(hadamard=("wgrad",), hadamard_size=128, hadamard_signs="none"),
    "another format backward": PaperConfig(backward_format="mxfp4", square_weights=False)}
CONFIGS |= {"fp8 gradients": replace(RECIPES["fp4_dge_occ"], e5m2=("dgrad", "wgrad")),
            "fp8 in wgrad": PaperConfig(gemms=("fprop", "dgrad"), e5m2=("wgrad",))}
PLACE = SEED, 7, 0                                  # seed, step, micro_batch


def as_paper(cfg):
    """The same recipe with all fields that there are."""
    return PaperConfig(**vars(cfg))


def make_layer(cfg, index=5, N=96, K=64):
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(F.normalize(gaussian(N, K, seed=9), dim=1))
    layer = cfg.layer(linear, cfg, index)
    nvfp4.set_step(layer, *PLACE)
    return layer


def batch(*M):
    """x (M, K) of unit rows, dy (M, N)."""
    return F.normalize(gaussian(*M, 64, seed=1), dim=-1), gaussian(*M, 96, seed=2)


def run(layer, x, dy, *ends, autocast=False):
    """y, dx, dw of one forward and backward; ends: of the rows of experts."""
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = layer(x, *ends)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, layer.weight.grad


def alike_by_gemm(got, want):
    """Whether y, dx and dw are the same, bit for bit."""
    return [same(g, w) for g, w in zip(got, want, strict=True)]


def all_same(got, want):
    return all(alike_by_gemm(got, want))


def quantized(layer, name, t):
    """One of OPERANDS as its recipe has it: t, with rows along the summed axis, rotated and quantized."""
    cfg, (gemm_name, kind) = as_paper(layer.cfg), name.split(".")
    if gemm_name in cfg.hadamard:
        fresh = cfg.hadamard_signs == "fresh"
        t = hadamard(t, signs_of("fresh", cfg.hadamard_size, gemm_name, layer.keys) if fresh
                     else ROTATIONS[f"{cfg.hadamard_signs}, {cfg.hadamard_size}"])
    square = kind == "w" and cfg.square_weights
    forward = gemm_name == "fprop" or square or cfg.backward_format is None
    return quantize(t, cfg.format if forward else cfg.backward_format, square, name in cfg.stochastic,
                    seed=oracle.stream_key(*PLACE, layer.index, OPERANDS.index(name)),
                    amax={"x": cfg.input_amax, "w": cfg.weight_amax, "dy": cfg.grad_amax}[kind])


def by_definition(layer, x, dy, autocast=False):
    """y, dx, dw written out: pad tokens and output channels, rotate, quantize rows along the summed axis,
    multiply."""
    cfg, w, dtype = as_paper(layer.cfg), layer.weight.detach(), BF16 if autocast else FP32
    (N, _), M = w.shape, len(x)
    blocks = FORMATS[cfg.format].block, FORMATS[cfg.backward_format or cfg.format].block
    tokens = -M % max(blocks[1], cfg.hadamard_size if "wgrad" in cfg.hadamard else 1)
    channels = -N % max(*blocks, cfg.hadamard_size if "dgrad" in cfg.hadamard else 1)
    x, dy, w = (F.pad(t, shape) for t, shape in (
        (x.to(dtype), (0, 0, 0, tokens)), (dy.to(dtype), (0, channels, 0, tokens)), (w, (0, 0, 0, channels))))

    operand = partial(quantized, layer)
    outliers, master = torch.zeros_like(x), w
    quantizes = "fprop" in cfg.gemms
    if cfg.occ is not None and quantizes:
        clamped = torch.tensor(oracle.occ_clamp(x.float().numpy(), cfg.occ)).to(dtype)
        x, outliers = clamped, x - clamped
    y = F.linear(x, w.to(dtype))
    if quantizes:
        codes_x, codes_w = operand("fprop.x", x), operand("fprop.w", w)
        y = matmul(codes_x, codes_w, dtype)
        if cfg.reuse_codes:
            x, w = codes_x.dequantize(dtype), codes_w.dequantize()
    if cfg.occ is not None and quantizes:
        y = y + F.linear(outliers, master.to(dtype))
    dy8 = e5m2(dy)                                  # test_fp8_gradients has its definition
    dx = (dy8 if "dgrad" in cfg.e5m2 else dy) @ w.to(dtype)
    dw = ((dy8 if "wgrad" in cfg.e5m2 else dy).t() @ x).float()
    if "dgrad" in cfg.gemms:
        dx = matmul(operand("dgrad.dy", dy), operand("dgrad.w", w.t()), dtype)
    if "wgrad" in cfg.gemms:
        dw = matmul(operand("wgrad.dy", dy.t()), operand("wgrad.x", x.t()), FP32)
    if cfg.dge_k and quantizes:
        dw = dw * dge_slope(master, cfg.operand("fprop.w", layer.keys), cfg.dge_k)
    return y[:M, :N], dx[:M].float(), dw[:N]


def relative_errors(got, x, dy, autocast=False):
    """Of y, dx and dw against high precision."""
    exact = by_definition(make_layer(RECIPES["bf16"]), x, dy, autocast)
    return [float((g.float() - e.float()).norm() / e.float().norm()) for g, e in zip(got, exact, strict=True)]


@pytest.mark.parametrize("shape, autocast", some((((2, 32), False), ((37,), True)),
                                                 product(((2, 32), (37,)), (False, True))))
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_is_its_definition(name, shape, autocast):
    """y, dx and dw bit for bit; 37 tokens count as 48 of which 11 are zero."""
    layer, (x, dy) = make_layer(CONFIGS[name]), batch(*shape)
    got = run(layer, x, dy, autocast=autocast)
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)
    want = by_definition(layer, x, dy, autocast)
    assert all_same([g.view_as(w) for g, w in zip(got, want, strict=True)], want)
    # products still: two operands bring noise of at most sqrt(2 * 23.5e-3) = 0.22, test_gaussian_mse;
    # clamped inputs, values quantized before and DGE have errors of their own
    cfg = as_paper(layer.cfg)
    bent = {"fprop": cfg.occ, "dgrad": cfg.reuse_codes, "wgrad": cfg.dge_k or cfg.occ or cfg.reuse_codes}
    for gemm_name, error in zip(GEMMS, relative_errors(want, x, dy, autocast), strict=True):
        if bent[gemm_name] or "vector" in cfg.format:
            assert error < 0.9, (gemm_name, error)
        elif gemm_name in cfg.e5m2:
            assert 0.02 < error < 0.125             # half a step of two mantissa bits at most
        else:
            assert 0.08 < error < 0.25 if gemm_name in cfg.gemms else error == 0, (gemm_name, error)


@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "autocast"))
def test_quartet2_is_its_definition(autocast):
    """Rotated by 128, of which sizes must be multiples; 200 tokens count as 256. Its gradients are products:
    two operands, quantized twice, bring noise of at most sqrt(2 * (9.0e-3 + 9.4e-3)) = 0.19."""
    layer = make_layer(RECIPES["quartet2"], N=256, K=128)
    x, dy = gaussian(200, 128), gaussian(200, 256, seed=1)
    got = run(layer, x, dy, autocast=autocast)
    assert all_same(got, by_definition(layer, x, dy, autocast))
    plain = by_definition(make_layer(RECIPES["bf16"], N=256, K=128), x, dy, autocast)
    for g, e, most in zip(got, plain, (0.14, 0.19, 0.19), strict=True):
        assert 0.08 < float((g.float() - e.float()).norm() / e.float().norm()) < most
    nvfp4.set_step(layer, SEED, 8)                  # the forward is not random
    assert alike_by_gemm(run(layer, x, dy, autocast=autocast), got) == [True, False, False]


@pytest.mark.parametrize("change, differs", (
    ({"gemms": ("fprop",)}, (0, 1, 1)), ({"gemms": ("dgrad", "wgrad")}, (1, 0, 0)),
    ({"hadamard": ("fprop",)}, (1, 0, 0)), ({"hadamard": ("dgrad",)}, (0, 1, 0)),
    ({"hadamard": ("wgrad",)}, (0, 0, 1)), ({"hadamard_size": 32}, (0, 0, 0)),
    ({"stochastic": ()}, (0, 1, 1)), ({"hadamard_signs": "fresh"}, (0, 0, 0)),
    ({"stochastic": ("dgrad.dy", "wgrad.dy", "fprop.x")}, (1, 0, 0)), ({"square_weights": False}, (1, 1, 0)),
    ({"backward_format": "mxfp4"}, (0, 1, 1)), ({"format": "mxfp4", "backward_format": "nvfp4"}, (1, 1, 0)),
    ({"backward_format": "ms_eden"}, (0, 1, 1)), ({"reuse_codes": True}, (0, 0, 1)),
    ({"reuse_codes": True, "square_weights": False}, (1, 1, 1)),
    ({"dge_k": 5.0}, (0, 0, 1)), ({"occ": 0.95}, (1, 0, 1)),
    ({"gemms": ("fprop", "wgrad"), "e5m2": ("dgrad",)}, (0, 1, 0)),
    ({"input_amax": 1.0}, (1, 0, 1)), ({"weight_amax": 1.0}, (1, 1, 0)), ({"grad_amax": 4.0}, (0, 1, 1))))
def test_each_knob_turns_its_own_gemms(change, differs):
    """Negative control of the definition: with one field changed, that field's GEMMs differ and no others."""
    x, dy = batch(64)
    want, got = by_definition(make_layer(FP4Config()), x, dy), run(make_layer(PaperConfig(**change)), x, dy)
    assert [not equal for equal in alike_by_gemm(got, want)] == list(map(bool, differs))


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_fp8_gradients(dtype):
    """Bit for bit: a power of two that brings the largest magnitude to at most 57344, but beyond half of it;
    the nearest number of E5M2; and the power of two taken away."""
    e5m2_table = oracle.float_table(0x7B, man_bits=2, bias=15)
    assert e5m2_table[-1] == torch.finfo(torch.float8_e5m2).max == 57344
    for kind, size in product(KINDS, (1.0, 0.875, 0.876, 2.0**-100, 3e30)):
        dy = (sample(kind, (48, 64), FP32) * size).to(dtype)
        exact, largest = dy.double().numpy(), float(dy.abs().max())
        scale = 2.0 ** min(np.floor(np.log2(57344 / largest)), 127) if largest else 1
        magnitude = e5m2_table[oracle.nearest(np.abs(exact) * scale, e5m2_table)]
        want = torch.from_numpy(np.copysign(magnitude, exact) / scale).to(dtype)
        assert torch.equal(e5m2(dy), want), (kind, size)
    assert e5m2(torch.tensor([[1.0, float("inf")], [0.0, 0.0]])).isnan().all()
    dy = gaussian(48, 64).to(dtype)
    assert torch.equal(e5m2(dy * 2**20), e5m2(dy) * 2**20)
    assert not torch.equal(e5m2(dy * 1.5), e5m2(dy) * 1.5)                      # control


@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "autocast"))
def test_recipe_off_is_f_linear(autocast):
    """With no GEMM in FP4, in each recipe, and inside high_precision(), bits are F.linear's, forward and
    backward."""
    x, dy = batch(2, 32)
    plain, layer, lines = torch.nn.Linear(64, 96, bias=False), make_layer(RECIPES["nvfp4"]), []
    plain.weight.data.copy_(layer.weight.data)
    want = run(plain, x, dy, autocast=autocast)
    for recipe in RECIPES.values():
        assert all_same(run(make_layer(replace(recipe, gemms=())), x, dy, autocast=autocast), want), recipe
    assert not any(alike_by_gemm(run(layer, x, dy, autocast=autocast), want))
    with pytest.raises(KeyError), nvfp4.high_precision(layer):
        with nvfp4.high_precision(layer, ("fprop",)):                           # entered twice
            assert all_same(run(layer, x, dy, autocast=autocast), want)
        assert all_same(run(layer, x, dy, autocast=autocast), want)
        raise KeyError                              # after an evaluation that fails, FP4 is on again
    before = run(layer, x, dy, autocast=autocast)
    assert layer.cfg is RECIPES["nvfp4"] and not any(alike_by_gemm(before, want))
    assert convert(torch.nn.Sequential(plain), RECIPES["bf16"], lines.append)[0] is plain
    assert lines == ["converted 0/1 linears: no GEMM is set to run in FP4"]
    layer.bias = torch.nn.Parameter(gaussian(96))   # a bias is added to the GEMM's result
    assert same(run(layer, x, dy, autocast=autocast)[0], before[0] + layer.bias.detach().to(before[0].dtype))


FP8 = PaperConfig(gemms=("fprop",), e5m2=("dgrad",))


@pytest.mark.parametrize("cfg", (RECIPES["nvfp4"], RECIPES["quartet2"], RECIPES["fp4_dge_occ"], FP8),
                         ids=("nvfp4", "quartet2", "fp4_dge_occ", "fp8 gradients"))
@pytest.mark.parametrize("gemms", (GEMMS, ("fprop",), ("dgrad", "wgrad")), ids=",".join)
def test_gemms_that_leave_fp4(gemms, cfg):
    """Inside of high_precision(), and after a late switch, bits are those of a layer without these GEMMs in
    FP4; before and outside they are what they were."""
    cfg = replace(cfg, until=0.75, switched=gemms)
    layer, x, dy = make_layer(cfg, N=256, K=128), gaussian(64, 128), gaussian(64, 256, seed=1)
    left = replace(cfg, gemms=tuple(name for name in cfg.gemms if name not in gemms))
    if isinstance(cfg, PaperConfig):
        left = replace(left, e5m2=tuple(name for name in cfg.e5m2 if name not in gemms))
    before, after = (run(make_layer(c, N=256, K=128), x, dy) for c in (cfg, left))
    news = left != cfg                              # fp4_dge_occ has no FP4 in the backward

    def runs_as(want):
        return all_same(run(layer, x, dy), want)
    with nvfp4.high_precision(layer, gemms):
        assert runs_as(after) and runs_as(before) is not news
    assert not nvfp4.switch_late(layer, 0.74) and runs_as(before)
    assert nvfp4.switch_late(layer, 0.75) is news and runs_as(after)
    assert not nvfp4.switch_late(layer, 0.76) and runs_as(after)
    assert not nvfp4.switch_late(make_layer(replace(cfg, until=None), N=256, K=128), 1.0)


@pytest.mark.parametrize("fused", (False, True))    # a fused optimizer leaves the version counter as it was
@pytest.mark.parametrize("square, n_weights", ((True, 1), (False, 2)))
def test_weights_are_quantized_once_per_update(square, n_weights, fused, monkeypatch):
    """A step of a fused optimizer is noticed when set_step() begins the next one, other changes at once."""
    quantized, original, outputs = [], nvfp4.quantize, []

    def counting(x, **options):
        quantized.append(set(x.shape))
        return original(x, **options)
    monkeypatch.setattr(nvfp4, "quantize", counting)
    layer, (x, dy) = make_layer(FP4Config(square_weights=square)), batch(32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    for step in range(3):
        for micro_batch in range(3):
            nvfp4.set_step(layer, SEED, step, micro_batch)
            outputs.append(run(layer, x, dy)[0])
        assert quantized.count({96, 64}) == n_weights * (step + 1)              # w; x is 32 x 64, dy 32 x 96
        assert len(quantized) == (n_weights + 3 * 4) * (step + 1)
        optimizer.step()
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[2], outputs[3])
    assert torch.equal(layer(x), outputs[-1]) is fused
    nvfp4.set_step(layer, SEED, step + 1)
    assert not torch.equal(layer(x), outputs[-1])


def test_the_same_weight_is_quantized_anew_in_a_new_step_alone():
    """And where it was let go, or another recipe reads it. Nor by high_precision(), unless it has changed."""
    layer, (x, _) = make_layer(FP4Config()), batch(32)

    def again():
        before = layer.quantized
        layer(x)
        return layer.quantized is not before
    assert again() and not again()
    for place, anew in ((PLACE, False), ((SEED, 7, 5), False), ((SEED, 8, 5), True), ((SEED, 8, 0), False),
                        ((SEED + 1, 8, 0), True)):
        nvfp4.set_step(layer, *place)
        assert again() is anew and not again(), place
    nvfp4.forget_weights(layer)
    assert layer.quantized is None and again() and not again()
    layer.cfg = replace(layer.cfg, weight_amax=1.0)
    assert again() and not again()
    for change, gemms in product((False, True), (GEMMS, ("fprop",), ("dgrad",))):
        with nvfp4.high_precision(layer, gemms), torch.no_grad():
            layer(x)
            if change:
                layer.weight.mul_(2)
        assert again() is change and not again()
    with nvfp4.high_precision(layer), torch.no_grad():
        nvfp4.set_step(layer, SEED, 9)              # a fused optimizer had its step before it
        layer(x)
    assert again() and not again()


def test_a_weight_with_other_contents_is_noticed():
    """A copy of a layer, loaded anew, has the version that the copied weight had; a cast and a change of
    .data leave it as it was."""
    layer, (x, _) = make_layer(FP4Config()), batch(32)
    other = {"weight": gaussian(96, 64, seed=5)}
    layer.eval()
    before = layer(x)
    copy_ = copy.deepcopy(layer)
    assert torch.equal(copy_(x), before)
    copy_.load_state_dict(other)
    assert torch.equal(layer(x), before) and not torch.equal(copy_(x), before)
    layer.weight.data = other["weight"].clone()
    assert torch.equal(layer(x), copy_(x))
    layer.bfloat16()
    y = layer(x)
    nvfp4.forget_weights(layer)
    assert torch.equal(y, layer(x)) and not torch.equal(y, copy_(x))


@pytest.mark.parametrize("opens", (False, True), ids=("evaluates", "opens the step"))
def test_inference_mode_leaves_training_whole(opens):
    """The weight that an evaluation quantized serves the training step that follows."""
    want, layer, (x, dy) = run(make_layer(FP4Config()), *batch(32)), make_layer(FP4Config()), batch(32)
    with torch.inference_mode():
        if opens:
            nvfp4.set_step(layer, *PLACE)
        layer(x)
    assert all_same(run(layer, x, dy), want)


def test_an_evaluation_quantizes_for_no_backward(monkeypatch):
    """Without gradients x is quantized once, for fprop; with them for wgrad too."""
    layer, (x, _), shapes, original = make_layer(FP4Config()), batch(32), [], nvfp4.quantize
    layer(x)                                        # the weight
    monkeypatch.setattr(nvfp4, "quantize",
                        lambda x, **how: shapes.append(tuple(x.shape)) or original(x, **how))
    with torch.no_grad():
        layer(x)
    assert shapes == [(32, 64)]
    layer(x)
    assert shapes == [(32, 64), (32, 64), (64, 32)]


def test_a_replaced_weight_is_noticed():
    """A new Parameter around the same memory, which Python would put where the old one was: the same id,
    address and version."""
    layer, x = FP4Linear(torch.nn.Linear(32, 32, bias=False), FP4Config(weight_amax=8.0)), torch.ones(16, 32)
    values = torch.empty(32, 32)
    layer.eval()
    for value in (1.0, 2.0, 3.0, 4.0, 6.0):
        del layer.weight
        values.data.fill_(value)
        layer.weight = torch.nn.Parameter(values)
        assert torch.allclose(layer(x), torch.tensor(32 * value), rtol=0.1)


def test_set_step_gives_each_operand_its_key():
    """The oracle's. A step repeated repeats its bits; another micro-batch, step, seed or layer has others."""
    model, batch_ = torch.nn.ModuleList(make_layer(FP4Config(), index) for index in (0, 3)), batch(32)
    is_weight, keys, results = torch.tensor([name.endswith(".w") for name in OPERANDS]), {}, {}
    for place in (PLACE, (SEED, 7, 2), (SEED, 8, 0), (1, 7, 0)):
        nvfp4.set_step(model, *place)
        for layer in model:
            micro = [0 if name.endswith(".w") else place[2] for name in OPERANDS]
            want = [oracle.stream_key(*place[:2], m, layer.index, i) for i, m in enumerate(micro)]
            assert [low | high << 32 for low, high in layer.keys.tolist()] == want
            keys[place, layer.index], results[place, layer.index] = layer.keys.clone(), run(layer, *batch_)
    differ = (keys[PLACE, 3] != keys[(SEED, 7, 2), 3]).all(1)
    assert torch.equal(differ, ~is_weight)          # the weights of a step serve all its micro-batches
    for (_, dx, dw), (_, other_dx, other_dw) in combinations(results.values(), 2):
        assert not torch.equal(dx, other_dx) and not torch.equal(dw, other_dw)
    nvfp4.set_step(model, *PLACE)
    assert all_same(run(model[1], *batch_), results[PLACE, 3])


@pytest.mark.parametrize("square", (True, False))
def test_fresh_signs_rotate_both_operands_alike(square):
    """In every micro-batch: the quantized weight is older than it, and its rotation must fit still."""
    layer = make_layer(PaperConfig(hadamard=GEMMS, hadamard_signs="fresh", square_weights=square))
    (x, dy), signs = batch(64), []
    for micro_batch in range(3):
        nvfp4.set_step(layer, SEED, 7, micro_batch)
        errors = relative_errors(run(layer, x, dy), x, dy)
        assert max(errors) < 0.25, f"micro-batch {micro_batch}: y, dx, dw off by {errors}"
        signs.append(layer.cfg.signs_of("wgrad", layer.keys))
        assert signs[-1].abs().tolist() == [1] * BLOCK
    exact = x @ layer.weight.detach().t()
    unlike = hadamard(x, signs[0]) @ hadamard(layer.weight.detach(), signs[1]).t()
    assert not torch.equal(signs[0], signs[1]) and float((unlike - exact).norm() / exact.norm()) > 0.25


@pytest.mark.parametrize("stochastic", ((), ("dgrad.dy",)), ids=str)
def test_noise_without_set_step_is_named(stochastic):
    """And differs between layers and operands all the same. Weights may be old too, whatever is random."""
    layers = [FP4Linear(torch.nn.Linear(32, 32), FP4Config(stochastic=stochastic), i) for i in range(2)]
    keys = torch.cat([layer.keys for layer in layers])
    assert len({tuple(key) for key in keys.tolist()}) == len(keys)
    with pytest.warns(UserWarning, match="call set_step"):
        layers[0](torch.ones(16, 32))
    with warnings.catch_warnings():                 # not in an evaluation, nor once it has been called
        warnings.simplefilter("error")
        with torch.no_grad():
            layers[0](torch.ones(16, 32))
        layers[0].eval()(torch.ones(16, 32))
        nvfp4.set_step(layers[0], SEED, 0)
        layers[0].train()(torch.ones(16, 32))


@pytest.mark.parametrize("name", ("nvfp4", "only fprop", "only backward"))
def test_a_frozen_side_leaves_the_other_its_gradient(name):
    layer, (x, dy) = make_layer(CONFIGS[name]), batch(37)
    _, dx, dw = run(layer, x, dy)
    layer.weight.grad = None
    layer(x).backward(dy)                           # x wants no gradient
    assert same(layer.weight.grad, dw)
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    x.requires_grad_()
    layer(x).backward(dy)
    assert same(x.grad, dx) and layer.weight.grad is None


def test_no_tokens_give_no_rows():
    """As nn.Linear: an expert to which no token was sent."""
    y, dx, _ = run(make_layer(FP4Config()), torch.empty(0, 64), torch.empty(0, 96))
    assert y.shape == (0, 96) and dx.shape == (0, 64)


# ---------------------------------------------------------------- convert, and a user's mistakes

ROUTERS = "; skip: blocks.0.router, blocks.1.router, blocks.2.router, blocks.3.router ... in high precision"


@pytest.mark.parametrize("change, converted, kept", (
    ({}, "01234", ROUTERS), ({"tail": 0.15}, "0123", f"{ROUTERS}; tail: blocks.4.out in high precision"),
    ({"tail": 0.5, "head_blocks": 1}, "12", f"; head blocks: blocks.0.out in high precision{ROUTERS}; "
     "tail: blocks.3.out, blocks.4.out in high precision"),
    ({"skip": ("*.[1-3].*",), "gemms": ("dgrad",)}, "04",
     "; skip: blocks.0.router, blocks.1.out, blocks.1.router, blocks.2.out ... in high precision")), ids=str)
def test_convert(change, converted, kept):
    """Which layers, the report line, and that parameters stay the same objects under the same names."""
    def block():
        return torch.nn.ModuleDict({"out": torch.nn.Linear(32, 32), "router": torch.nn.Linear(32, 16)})
    blocks, lines = torch.nn.ModuleList(block() for _ in range(5)), []
    model = torch.nn.ModuleDict({"blocks": blocks, "head": torch.nn.Linear(32, 50)})
    parameters, state, cfg = dict(model.named_parameters()), list(model.state_dict()), FP4Config(**change)
    assert convert(model, cfg, lines.append) is model
    names = [f"blocks.{n}.out" for n in converted]
    assert [name for name, m in model.named_modules() if isinstance(m, FP4Linear)] == names
    assert list(model.state_dict()) == state and len(parameters) == len(state)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert len({m.index for m in nvfp4.fp4_layers(model)}) == len(names)
    assert lines == [f"converted {len(names)}/11 linears to nvfp4 ({','.join(cfg.gemms)}){kept}"]


def mlp(first):
    return torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(64, 64))


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


def with_its_own(name, value):
    """A layer that has something beside weight and bias: a forward, a buffer, an adapter."""
    linear = torch.nn.Linear(64, 64)
    setattr(linear, name, value)
    return linear


MORE = {                                            # than x w^T + b
    "weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 64)),
    "orthogonal": lambda: torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(64, 64)),
    "prune": lambda: prune.random_unstructured(torch.nn.Linear(64, 64), "weight", 0.5),
    "subclass": lambda: Scaled(64, 64),
    "module": lambda: with_its_own("adapter", torch.nn.Dropout()),
    "parameter": lambda: with_its_own("scale", torch.nn.Parameter(torch.ones(64))),
    "buffer": lambda: with_its_own("mask", torch.nn.Buffer(torch.ones(64))),
    "forward": lambda: with_its_own("forward", lambda x: 10 * x),
    "encoder": lambda: torch.nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True),
    "attention": lambda: torch.nn.TransformerDecoderLayer(64, 4, 64, dropout=0.0, batch_first=True).self_attn,
}


@pytest.mark.parametrize("kind", MORE)
def test_what_is_more_than_a_linear_layer_is_left_alone(kind):
    """And named. Its class, parameters, buffers and output stay."""
    torch.manual_seed(0)
    first, said = MORE[kind](), []
    call = (lambda x: first(x, x, x)[0]) if kind == "attention" else first
    model, x = mlp(first).eval(), torch.randn(2, 8, 64)
    with torch.no_grad():
        before, want = [*model.state_dict()], call(x)
        convert(model, RECIPES["nvfp4"], said.append)
        assert torch.equal(call(x), want) and [*model.state_dict()] == before
    assert re.search(r"converted 1/\d .*; more than a linear layer: 0.* in high precision", said[0])
    assert isinstance(model[2], FP4Linear) and not any(isinstance(m, FP4Linear) for m in first.modules())


def test_a_converted_layer_stays_the_layer_that_it_was():
    """The object, its parameters, hooks, attributes and mode."""
    first, calls = torch.nn.Linear(64, 64), []
    first.register_forward_hook(lambda *_: calls.append("forward"))
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    first.note = "kept"
    model, weight = mlp(first).eval(), first.weight
    convert(model, RECIPES["nvfp4"], report=lambda line: None)
    nvfp4.set_step(model, 0, 0)
    model(torch.randn(32, 64, requires_grad=True)).sum().backward()
    assert model[0] is first and isinstance(first, FP4Linear) and first.weight is weight
    assert calls == ["forward", "backward"] and first.note == "kept" and weight.grad is not None
    assert not model.training and not first.training


@pytest.mark.parametrize("first, second", [("nvfp4", "ngpt"), ("nvfp4", "mxfp4"), ("quartet2", "nvfp4"),
                                           ("ngpt", "bf16")])
def test_the_second_call_of_convert_holds(first, second):
    """As if there had been no first one; in high precision too, where two wrappers called each other."""
    twice, once = mlp(torch.nn.Linear(64, 64)), mlp(torch.nn.Linear(64, 64))
    once.load_state_dict(twice.state_dict())
    x, said = torch.randn(32, 64), []
    for model, recipes in ((twice, (first, second)), (once, (second,))):
        for recipe in recipes:
            convert(model, RECIPES[recipe], said.append)
        nvfp4.set_step(model, 0, 0)
    assert said[1] == said[2] and torch.equal(twice(x), once(x))
    assert [type(m) for m in twice] == [type(m) for m in once]
    with nvfp4.high_precision(twice):
        assert torch.equal(twice(x), torch.nn.functional.linear(
            twice[0](x).relu(), twice[2].weight, twice[2].bias))
    convert(twice, FP4Config(tail=0.5), said.append)
    assert len(nvfp4.fp4_layers(twice)) == 2 - ("tail: 2" in said[-1]) == 1


def test_a_size_that_does_not_fit_names_its_layer_and_converts_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 20), torch.nn.Linear(20, 64))
    with pytest.raises(ValueError, match=r"^2: K=20 must be a multiple of 16 .*--fp4_skip"):
        convert(model, RECIPES["nvfp4"])
    assert not nvfp4.fp4_layers(model)
    convert(model, FP4Config(skip=("2",)))
    assert len(nvfp4.fp4_layers(model)) == 2


class Wrapped(torch.nn.Module):
    """As torch.compile and DistributedDataParallel wrap a model: under a name of their own."""

    def __init__(self, name, model):
        super().__init__()
        setattr(self, name, model)


@pytest.mark.parametrize("prefix", ["", "_orig_mod", "module"])
def test_heads_and_routers_stay_in_high_precision_by_any_usual_name(prefix):
    """fp4_skip adds to them, and a name that fits nothing is said. gate_proj is no router."""
    parts = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in (
        "head", "lm_head", "router", "gate", "gate_proj", "q")})
    parts["model"] = Wrapped("head", torch.nn.Linear(64, 64))
    model, said = Wrapped(prefix, parts) if prefix else parts, []
    convert(model, FP4Config(skip=("q", "nothing*")), said.append)
    assert [name for name, m in parts.items() if isinstance(m, FP4Linear)] == ["gate_proj"]
    assert not isinstance(parts["model"].head, FP4Linear)
    assert "skip: head, lm_head, router, gate ... in" in said[0] and "fp4_skip=nothing* names no" in said[0]


def test_blocks_are_numbered_by_whole_names():
    """gpt2.h.7 is in block 7."""
    model = torch.nn.ModuleDict({"gpt2": torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(20))})
    convert(model, FP4Config(tail=0.15))
    assert [isinstance(m, FP4Linear) for m in model["gpt2"]] == [True] * 17 + [False] * 3


def test_an_evaluation_looks_at_the_weights_anew():
    """weight.data.copy_(average) moves no version counter."""
    model, average, x = (mlp(torch.nn.Linear(64, 64)) for _ in range(2)), None, torch.randn(32, 64)
    model, average = model
    convert(model, RECIPES["nvfp4"])
    convert(average, RECIPES["nvfp4"])
    for m in (model, average):
        nvfp4.set_step(m, 0, 0)
    with torch.no_grad():
        old = model(x)
        for p, value in zip(model.parameters(), average.parameters(), strict=True):
            p.data.copy_(value)
        assert not torch.equal(model(x), average(x)) or torch.equal(old, average(x))    # control: not seen
        assert torch.equal(model.eval()(x), average.eval()(x))


@pytest.mark.parametrize("change, changed", (
    ({}, False), ({"hadamard_size": 32, "hadamard_signs": "fresh", "backward_format": "ufp4"}, False),
    ({"reuse_codes": True}, True), ({"dge_k": 5.0}, True), ({"occ": 0.99}, True),
    ({"gemms": ("fprop",), "e5m2": ("wgrad",)}, True)), ids=str)
def test_convert_makes_a_layer_of_papers_only_where_gemms_change(change, changed):
    """A recipe in the other class that asks for nothing of it gives the same bits."""
    cfg, (x, dy) = PaperConfig(square_weights=False, **change), batch(32)
    model = convert(torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)), cfg, lambda line: None)
    assert type(model[0]) is (papers.PaperLinear if changed else FP4Linear)
    if not change:
        assert all_same(run(make_layer(cfg), x, dy), run(make_layer(FP4Config(square_weights=False)), x, dy))


def test_a_layer_under_several_names_is_converted_under_all():
    one, other, lines = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32), []
    model = torch.nn.ModuleDict({"a": one, "b": other, "c": one, "d": torch.nn.ModuleDict({"e": one})})
    state = list(model.state_dict())
    convert(model, FP4Config(), lines.append)
    assert lines == ["converted 2/2 linears to nvfp4 (fprop,dgrad,wgrad)"]
    assert list(model.state_dict()) == state
    assert isinstance(model["a"], FP4Linear) and model["a"] is model["c"] is model["d"]["e"] is not model["b"]
    assert model["a"].weight is one.weight and model["b"].weight is other.weight


@pytest.mark.parametrize("cfg", [RECIPES["ngpt"], RECIPES["nvfp4"], RECIPES["mxfp4"],
                                 FP4Config(gemms=("fprop",)), FP4Config(gemms=("dgrad",)),
                                 PaperConfig(hadamard=("dgrad",), hadamard_size=32), RECIPES["fp4_dge_occ"],
                                 replace(RECIPES["quartet2"], hadamard_size=32), RECIPES["hif4"]],
                         ids=["ngpt", "nvfp4", "mxfp4", "fprop", "dgrad", "by 32", "dge", "quartet2", "hif4"])
def test_any_number_of_output_channels(cfg):
    """50 of them: the definition fills them up with rows of zeros to the next block."""
    layer, (x, dy) = make_layer(cfg, N=50), batch(32)
    assert all_same(run(layer, x, dy[:, :50]), by_definition(layer, x, dy[:, :50]))
    assert not same(run(layer, x, dy[:, :50])[1], by_definition(layer, x, dy[:, 1:51])[1])


def experts(K=32):
    """A layer of two experts, (2, 64, K), as far as FP4Linear looks at it."""
    layer = torch.nn.Linear(K, 64, bias=False)
    layer.weight = torch.nn.Parameter(torch.ones(2, 64, K))
    return layer


@pytest.mark.parametrize("words, mistake", (
    ("K=100", lambda: quantize(torch.ones(16, 100))), ("K=0", lambda: quantize(torch.ones(16, 0))),
    ("M=17", lambda: quantize(torch.ones(17, 32), square=True)), ("(16,)", lambda: quantize(torch.ones(16))),
    ("K=43", lambda: quantize_both(torch.ones(43, 43), choices(), choices())),
    ("int64", lambda: quantize(torch.ones(16, 16).long())),
    ("K=100", lambda: FP4Linear(torch.nn.Linear(100, 32), FP4Config())),
    ("K=48", lambda: FP4Linear(torch.nn.Linear(48, 64), PaperConfig(hadamard=("fprop",), hadamard_size=32))),
    ("fp4_hadamard_size",
     lambda: FP4Linear(torch.nn.Linear(48, 64), PaperConfig(hadamard=("fprop",), hadamard_size=32))),
    ("K=96", lambda: FP4Linear(torch.nn.Linear(96, 64), RECIPES["hif4"])),
    ("K=80", lambda: quantize(torch.ones(16, 80), signs=torch.ones(32))),
    ("at most, not 128", lambda: FP4Linear(experts(), PaperConfig(hadamard=("wgrad",), hadamard_size=128))),
    ("at most, not 64", lambda: FP4Linear(experts(64), RECIPES["hif4"])),
    ("square", lambda: PaperConfig(format="hif4")),
    ("this recipe needs a PaperLinear", lambda: FP4Linear(torch.nn.Linear(64, 96), RECIPES["fp4_dge_occ"])),
    ("fp4_dge_k=5.0", lambda: PaperConfig(format="ufp4", dge_k=5.0)),
    *((f"fp4_{name}=", lambda name=name, value=value: PaperConfig(**{name: value})) for name, value in (
        ("gemms", ("fprob",)), ("stochastic", ("x",)), ("hadamard", ("all",)), ("hadamard_signs", "some"),
        ("until", 1.0), ("until", -0.1), ("switched", ("all",)), ("hadamard_size", 64),
        ("dge_k", 0.5), ("dge_k", float("nan")), ("occ", 0.4), ("occ", 1.5), ("e5m2", ("fprop",)),
        ("format", "int4"), ("backward_format", "int4"), ("tail", 1.5), ("head_blocks", -1),
        ("input_amax", 0), ("weight_amax", -1), ("grad_amax", float("nan"))))))
def test_mistakes_get_one_line(words, mistake):
    with pytest.raises(ValueError) as error:
        mistake()
    assert words in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- the tour

def test_walk_shows_what_quantize_does(capsys):
    """Every number of the page a teacher projects: quantize()'s codes and decoded values, e2m1()'s odds."""
    numbers = [0.1, -2.5, 3.0, 0.7, 0.0, -0.0, 1e-8, 700.0, *range(12)]
    nvfp4.main(list(map(str, numbers)))
    said = capsys.readouterr().out.splitlines()
    q = quantize(F.pad(torch.tensor([numbers]), (0, 12)))
    rows = [line.split() for line in said if line[:1] == " " and "code" not in line]
    assert len(rows) == len(numbers) and sum(line.startswith("block") for line in said) == 2
    for i, row in enumerate(rows):
        code = int(q.codes[0, i // 2] >> 4 * (i % 2)) & 15
        assert int("".join(row[2:5]), 2) == code and float(row[0]) == numbers[i]
        assert float(row[5]) == E2M1_NUMBERS[code & 7] * (-1 if code & 8 else 1)
        assert float(row[6]) == pytest.approx(float(q.dequantize()[0, i]), rel=1e-6)    # 7 digits are printed
    nvfp4.main(["0.1", "-2.5", "0.7"])              # 0.24 and 1.68 in units of the scale
    odds = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()[4:7]]
    assert odds == ["0, or 0.5 in 122 of 256", "4, or 6 in 255 of 256", "1.5, or 2 in 92 of 256"]
    for number, snr in (("1e-38", "SNR 5.9 dB"), ("3e38", "SNR 143.4 dB"), ("0", "error 0")):
        nvfp4.main([number])                        # whose squares no fp32 holds
        assert capsys.readouterr().out.splitlines()[-1] == snr
    for wrong in (["abc"], ["1", "--json"], ["--jsn"]):
        with pytest.raises(SystemExit, match=wrong[-1]):
            nvfp4.main(wrong)


def test_the_tour_says_what_papers_add():
    """Operands made of fprop's codes and gradients in FP8, which are no arguments of quantize()."""
    occ, fp8 = RECIPES["fp4_dge_occ"], PaperConfig(gemms=("fprop",), e5m2=("wgrad",))
    assert nvfp4.describe_operand(occ, "dgrad.w") == "high precision, of fprop's codes"
    assert nvfp4.describe_operand(RECIPES["tetrajet2"], "wgrad.x") == (
        "of fprop's codes, stochastic, 1x16, rotated")
    assert nvfp4.describe_operand(fp8, "wgrad.dy") == "FP8 E5M2"
    assert nvfp4.describe_operand(fp8, "dgrad.dy") is nvfp4.describe_operand(occ, "wgrad.dy") is None


def test_the_four_numbers_of_the_lesson():
    """Every number of the walk on nvfp4.py's first page is what quantize() makes of its first row."""
    page = nvfp4.__doc__
    rows = re.findall(r"^ {4}(x|x / .*\)|number|value) {2,}((?:-?[\d.]+ +){3}-?[\d.]+)", page, re.M)
    x = torch.tensor([float(number) for number in dict(rows)["x"].split()])
    q, amax = quantize(F.pad(x, (0, 12))[None]), x.abs().max()
    s_enc, s_dec = nvfp4.tensor_scales(amax)
    scale = q.scales.float()[0, 0]
    codes = np.concatenate([oracle.E2M1, -oracle.E2M1])[oracle.unpack(q.codes.numpy())[0, :4]]
    found = [("x", x), ("x / (scale * s_dec)", x / (scale * s_dec)), ("number", codes),
             ("value", q.dequantize()[0, :4])]
    assert [(name, numbers.split()) for name, numbers in rows] == [
        (name, [f"{float(number):g}" for number in numbers]) for name, numbers in found]
    scales = re.search(r"^ {4}s_enc = .*$", page, re.M).group()
    assert re.findall(r"(?<!\w)\d+(?:\.\d+)?", scales) == [f"{float(number):g}" for number in (
        nvfp4.E4M3_MAX, 6, amax, s_enc, amax, s_enc, 6, amax * s_enc / 6, scale, scale * s_dec)]


# ---------------------------------------------------------------- a format is data

def scratch_format(monkeypatch, name, **fields):
    """NVFP4 with some fields changed, in the table of formats for the length of a test."""
    monkeypatch.setitem(FORMATS, name, replace(FORMATS["nvfp4"], name=name, kernels=False, **fields))
    return name


def test_one_place_decides_whether_kernels_run(monkeypatch):
    """A format without kernels is quantized by its definition, on a device that has kernels too."""
    def kernels(x, rows, columns):
        raise NotImplementedError("kernels")
    x, how, longer = gaussian(64, 64), choices("mxfp4", decode=BF16), choices(signs=torch.ones(32))
    want, rotated = quantize_both(x, how, how), quantize(x, **longer)
    monkeypatch.setattr(nvfp4, "has_kernels", lambda device: True)
    monkeypatch.setattr(nvfp4, "quantize_both_triton", kernels)
    both = quantize_both(x, how, how)
    for got, q in ((quantize(x, **how), want.rows), (both.rows, want.rows), (both.columns, want.columns),
                   (quantize(x, **longer), rotated), (quantize_both(x, longer).rows, rotated)):
        assert alike(got, q)                        # nor do kernels rotate by 32
    for reaches in (lambda: quantize(x), lambda: quantize(x, signs=FIXED), lambda: quantize(x.t()),
                    lambda: quantize_both(x, None, choices()), lambda: quantize_both(x, choices())):
        with pytest.raises(NotImplementedError):
            reaches()


@pytest.mark.parametrize("stochastic", (False, True), ids=("nearest", "stochastic"))
@pytest.mark.parametrize("name", [*FORMATS, "int4"])
def test_kept_codes_are_what_would_have_been_multiplied(name, stochastic, monkeypatch):
    """dw from columns that were kept packed is, bit for bit, dw from the same columns decoded as they were
    quantized, and so are the values of either; int4 is a scratch format with a grid of its own. Codes read on
    another grid are noticed."""
    if name == "int4":
        scratch_format(monkeypatch, name, grid=nvfp4.Grid(papers.e1m2, papers.e1m2_number), target=7.0)

    def columns(kind, decode):
        x, dy = sample(kind, (100, 64), seed=1), sample("gaussian", (100, 96), seed=2)
        how = choices(name, stochastic=stochastic, seed=SEED, decode=decode)
        return [quantize_both(t, None, how) for t in (dy, x)]
    for kind in KINDS:
        packed, decoded = columns(kind, None), columns(kind, FP32)
        assert same(nvfp4.wgrad(*packed, FP32), nvfp4.wgrad(*decoded, FP32)), kind
        for codes, values in zip(packed, decoded, strict=True):
            assert same(codes.columns.decode(FP32), values.columns.values), kind
    packed, decoded = columns("gaussian", None), columns("gaussian", FP32)
    other = FORMATS["ufp4" if FORMATS[name].grid is nvfp4.E2M1 else "nvfp4"].grid
    monkeypatch.setitem(FORMATS, name, replace(FORMATS[name], grid=other))
    assert not same(nvfp4.wgrad(*packed, FP32), nvfp4.wgrad(*decoded, FP32))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_whose_codes_stand_for_something_else_is_refused(name):
    """A grid that rounds to the values of one and decodes to those of another, or numbers codes otherwise."""
    form, (rounds, number_of) = FORMATS[name], FORMATS[name].grid
    replace(form, grid=nvfp4.Grid(rounds, number_of))
    another = nvfp4.e2m1_number if number_of is papers.e1m2_number else papers.e1m2_number
    for wrong in (another, lambda code: number_of(7 - code)):
        with pytest.raises(ValueError, match=f"{name}: .*codes that number_of.. decodes") as error:
            replace(form, grid=nvfp4.Grid(rounds, wrong))
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- MXFP4

ORACLES_OF_VALUES = {"mxfp4": oracle.mxfp4, "mxfp4_floor": lambda x: oracle.mxfp4(x, floor=True),
                     "hif4": lambda x: oracle.hif4(x).values()}


@pytest.mark.parametrize("kind", (*KINDS, "large", "nan"))
@pytest.mark.parametrize("name", ORACLES_OF_VALUES)
def test_values_are_the_oracle_s(name, kind):
    """Bit for bit, on bf16 numbers, packed and decoded, along rows and along columns; blocks with NaN or Inf
    are NaN. Another format's are others."""
    x, block = sample(kind if kind in KINDS else "gaussian", (48, 256), BF16), FORMATS[name].block
    if kind == "large":                             # beyond the largest scale of HiF4
        x = x * torch.logspace(-20, 7, 48)[:, None].bfloat16()
    if kind == "nan":
        x[5, 7], x[9, 70], x[9, 200] = float("nan"), float("inf"), -float("inf")
    want = torch.tensor(ORACLES_OF_VALUES[name](x.float().numpy()).astype(np.float32))
    packed, turned = quantize(x, name), quantize(x.t().contiguous().t(), name)
    for q in (packed, turned, quantize(x, name, decode=BF16), quantize(x, name, decode=FP32)):
        assert same(q.dequantize(), want) and float(q.s_dec) == 1
    assert torch.equal(turned.scales.view(torch.uint8), packed.scales.view(torch.uint8))
    assert int(want.isnan().sum()) == (3 * block if kind == "nan" else 0)
    if kind == "gaussian":                          # controls
        flipped = packed.scales.view(torch.uint8).flip(0).view(packed.scales.dtype)
        others = [quantize(x, other) for other in ORACLES_OF_VALUES if other != name]
        for wrong in (packed._replace(codes=packed.codes >> 4 | packed.codes << 4),
                      packed._replace(scales=flipped), *others):
            assert not same(wrong.dequantize(), want)


MXFP4 = {"mxfp4": "RCEIL", "mxfp4_floor": "FLOOR"}  # what torchao calls its way to a scale


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
@pytest.mark.parametrize("name", MXFP4)
def test_mxfp4_is_torchao_s(name, dtype):
    """Codes, scales and values bit for bit, along rows and columns. Blocks with NaN are NaN in both."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor",
                             reason="torchao is not there: pip install -r tests/requirements.txt")
    for turned, kind in product((False, True), (*KINDS, "nan")):
        x = sample(kind if kind in KINDS else "gaussian", (96, 128), dtype)
        if kind == "nan":
            x[5, ::50] = float("nan")
        x = x.t() if turned else x
        scales, codes = mx.to_mx(x.contiguous(), torch.float4_e2m1fn_x2, 32,
                                 mx.ScaleCalculationMode[MXFP4[name]])
        values, codes = mx.to_dtype(codes, scales, torch.float4_e2m1fn_x2, 32, FP32), codes.view(torch.uint8)
        q, whole = quantize(x, name), ~values.isnan()
        assert torch.equal(q.scales.view(torch.uint8), scales.view(torch.uint8))
        assert torch.equal(q.codes[whole[:, ::2]], codes[whole[:, ::2]])        # NaN or not: both of a byte
        assert same(q.dequantize()[whole], values[whole]) and q.dequantize()[~whole].isnan().all()
        assert bool(whole.all()) is (kind != "nan")
        if kind == "gaussian":                      # controls
            assert not torch.equal(q.codes >> 4 | q.codes << 4, codes)
            assert not torch.equal(quantize(x.roll(1, 1), name).scales.view(torch.uint8),
                                   scales.view(torch.uint8))


# ---------------------------------------------------------------- four over six

def fouroversix_s():
    """Its PyTorch reference and its rules, of which ours is mse."""
    why = "fouroversix (and transformers, which it imports) is not there: .ci/run installs both"
    made = pytest.importorskip("fouroversix.quantize.pytorch.reference", reason=why)
    rules = pytest.importorskip("fouroversix.utils", reason=why).ScaleRule
    return made.quantize_to_fp4, {"mse": rules.mse, "mae": rules.mae, "max": rules.abs_max}


def by_fouroversix(x, rule, square):
    """(codes, scales, values in units of the tensor scale, s_dec)"""
    theirs, rules = fouroversix_s()
    how = {"scale_rule": rules[rule], "block_scale_2d": square, "use_blackwell_scale_layout": False}
    codes, scales, amax = theirs(x, **how)
    grid, _, _ = theirs(x, **how, pack_values=False)
    lines = scales.view(len(x), -1).float()
    values = grid.float() * lines.repeat_interleave(BLOCK, 1)
    return codes, lines[::BLOCK if square else 1], values, 1 / (6 * 256 / amax)


def older_scales(blocks, s_enc, target):
    """e4m3_scales() in an older order of rounding; target 6 or 4."""
    scale = nvfp4.block_amax(blocks) / torch.tensor(6.0) * s_enc
    return (scale * (6 / target)).to(torch.float8_e4m3fn).float()


def near_ties(x, square):
    """Where rounding may decide between 4 and 6. In either program two roundings, of s_dec or products with
    amax, move a value, which is at most 17/16 of the block's amax, and one the difference. With u = 2^-24

    value   d = 4u amax for each error, so 2d (their sum) for a sum of squares; and (n + 1) u of both sums for
            adding up n squares in fp32
    """
    height, u = BLOCK if square else 1, 2**-24
    blocks = x.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))
    s_enc, s_dec = nvfp4.tensor_scales(x.abs().max().float(), 256.0)
    n, d, found = BLOCK * height, 4 * u * nvfp4.block_amax(blocks).double()[:, 0, :, 0], []
    for target in (6, 4):
        scale = older_scales(blocks, s_enc, target)
        value = e2m1(blocks.abs() * nvfp4.encode_scale(scale, s_dec))[0].double() * scale
        error = (value * (x.abs().max().double() / (6 * 256)) - blocks.abs()).abs()
        found.append([error.sum((1, 3)), error.square().sum((1, 3))])
    (sum6, squares6), (sum4, squares4) = found
    return (squares6 - squares4).abs() <= 2 * d * (sum6 + sum4) + (n + 1) * u * (squares6 + squares4)


@pytest.mark.parametrize("square", (False, True), ids=("1x16", "16x16"))
def test_four_over_six_is_fouroversix_s(square, monkeypatch):
    """Codes, scales and values bit for bit, on bf16 numbers, with scales in its older order of rounding. In
    ours all blocks are the same but those where the orders differ: at ties of E4M3, which the kind "scale
    ties" is full of. Where 4 and 6 leave the same error, a rounding of s_dec may decide: near_ties() counts.

    Not compared: block scales below E4M3's normal numbers, where its codes can overflow, and the sign of 0.
    """
    height, undecided = BLOCK if square else 1, 0
    for kind in ("gaussian", "cauchy", "outlier", "tiny", "zero blocks", "zero", "ties", "scale ties"):
        x = sample(kind if kind in KINDS else "gaussian", (96, 128), BF16) + 0  # -0 + 0 = 0
        if kind == "scale ties":                    # of amax 17/32 and so on, which is 136 = (128 + 144) / 2
            x = (8 * x).round() + 0
            x[::BLOCK, ::BLOCK] = 7 * (17 + 2 * torch.arange(48).view(6, 8) % 16)
            x[-1, -1] = 7 * 32
        codes, scales, values, s_dec = by_fouroversix(x, "mse", square)
        ours = quantize(x, "nvfp4_46", square)
        with monkeypatch.context() as patch:
            patch.setattr(papers, "e4m3_scales", older_scales)
            older = quantize(x, "nvfp4_46", square)

        def differs(q, codes=codes, scales=scales, values=values):              # block by block
            wrong = (q.decode(FP32) != values) | (q.codes != codes).repeat_interleave(2, 1)
            wrong = wrong.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height)).any(3).any(1)
            return wrong | (q.scales.float() != scales)
        assert same(older.s_dec, s_dec) or kind == "zero"
        wrong = differs(older)
        assert near_ties(x, square)[wrong].all(), kind
        undecided += int(wrong.sum())
        orders = (older.scales.float() != ours.scales.float()) & ~wrong
        assert torch.equal(differs(ours) & ~wrong, orders), kind
        assert bool(orders.any()) is (kind == "scale ties"), kind
        if kind == "gaussian":                      # controls
            by_rows = quantize(x, "nvfp4_46").scales.float()
            assert [rule for rule in ("mse", "mae", "max")
                    if torch.equal(by_fouroversix(x, rule, False)[1], by_rows)] == ["mse"]
            assert differs(ours._replace(codes=ours.codes >> 4 | ours.codes << 4)).any()
    assert undecided < 20                           # of 8 * 768 blocks


def test_four_over_six_by_hand():
    """The paper's example, with a tensor scale of 1: on 6 the scale is 6.5, on 4 it is 10 and all is exact. A
    block that both leave without an error keeps 6."""
    x = torch.zeros(3, 16)
    x[0, :4] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    x[1, :2] = torch.tensor([12.0, -6.0])
    usual, q = (quantize(x, name, amax=6 * top) for name, top in (("nvfp4", 448.0), ("nvfp4_46", 256.0)))
    assert usual.dequantize()[0, :4].tolist() == [9.75, 19.5, 26, 39] and float(usual.s_dec) == 1
    assert q.scales.float().flatten().tolist() == [10, 2, 0] and torch.equal(q.dequantize(), x)


def test_how_many_blocks_choose_four():
    """45 % of the row blocks of unit Gaussians, 3 % of square ones."""
    x = gaussian(512, 2048)
    for height, want in ((1, 0.45), (16, 0.03)):
        q = quantize(x, "nvfp4_46", square=height == 16)
        largest = x.unflatten(1, (-1, 16)).unflatten(0, (-1, height)).abs().amax((1, 3))
        share = (largest / (q.scales.float() * q.s_dec) < 5).double().mean()
        assert float(share) == pytest.approx(want, abs=0.01)


def is_unbiased(draws, x, step):
    """Whether the mean over draws (n, K) is x (K): each element within 4 standard errors, or below it in
    magnitude by 1/256 of the grid's step, for bytes are coarse; and so on average."""
    draws, x = draws.double(), x.double()
    toward = x.sign() * (draws - x)
    low, high = -step / 256, 4 * toward.std(0) / len(draws) ** 0.5
    mean, whole = toward.mean(0), toward.mean(1)
    spread = 4 * float(whole.std()) / len(draws) ** 0.5
    return bool(((mean > low - high) & (mean < high)).all()) and (
        -float(step.mean()) / 256 - spread < float(whole.mean()) < spread)


def test_where_stochastic_rounding_is_biased(monkeypatch):
    """Unbiased: the target 6 * 16/17, and 4/6 with it, for it chooses to nearest. Biased: a block beyond 6,
    which saturates; and 4/6 if it chooses by the errors of rounding at random, as its paper has it."""
    for lands in (4, 6):
        scratch_format(monkeypatch, f"on {lands}", top=256.0, target=papers.UNBIASED, scales=(
            lambda blocks, s_enc, target, lands=lands: nvfp4.e4m3_scales(blocks, s_enc, target * lands / 6)))
    x = gaussian(512, seed=3)
    rows, x_blocks = x.expand(4096, -1), x.view(-1, 16)
    step = (x_blocks.abs().amax(1) * 2 / 3.7).repeat_interleave(16)             # 4 * 16/17 at the least

    def draw(name):
        return quantize(rows, name, stochastic=True, seed=SEED).dequantize()
    monkeypatch.setitem(FORMATS, "nvfp4_46_unbiased", replace(FORMATS["nvfp4_46"], target=papers.UNBIASED))
    for name in ("nvfp4", "nvfp4_46"):
        assert is_unbiased(draw(f"{name}_unbiased"), x, step) and not is_unbiased(draw(name), x, step)
    six, four = (draw(f"on {lands}").unflatten(1, (-1, 16)) for lands in (6, 4))
    errors = [(q - x_blocks).square().sum(2, keepdim=True) for q in (six, four)]
    assert is_unbiased(six.flatten(1), x, step) and is_unbiased(four.flatten(1), x, step)
    assert not is_unbiased(torch.where(errors[1] < errors[0], four, six).flatten(1), x, step)


# ---------------------------------------------------------------- MS-EDEN

def fresh_signs(step, size=128):
    return signs_of("fresh", size, keys=nvfp4.layer_keys(SEED, step, 0, 0))


@pytest.mark.parametrize("kind, dtype", some(
    (("gaussian", FP32), ("cauchy", BF16)), product(("gaussian", "cauchy", "outlier", "tiny"), (FP32, BF16))))
def test_eden_is_the_oracle_s(kind, dtype):
    """Rotated codes as float64 has them, but for ties that fp32 breaks otherwise (and, in bf16, for the
    rounding of the rotation); each scale one of E4M3's two neighbours of the corrected one, on average that
    one. A tensor scale for 448, another target or a correction by whole runs are other formats."""
    x, signs = sample(kind, (64, 512), dtype), fresh_signs(0)
    seen = x.float().numpy()
    if dtype == BF16:                               # rotated and rounded first; what is left is no rotation
        seen = hadamard(x, signs).float().numpy()
    o, other = (oracle.ms_eden(seen, signs.tolist() if dtype == FP32 else [1], **how)
                for how in ({}, {"group": 128} if dtype == FP32 else {"target": 6.0}))
    draws = [quantize(x, "ms_eden", stochastic=True, seed=SEED + n, signs=signs) for n in range(64)]
    codes = np.concatenate([oracle.E2M1, -oracle.E2M1])[oracle.unpack(draws[0].codes.numpy())]
    assert (codes == o.values).mean() > 0.999 and all(torch.equal(q.codes, draws[0].codes) for q in draws)
    assert float(draws[0].s_dec) == pytest.approx(o.g, rel=1e-5)
    scales = np.stack([q.scales.float().numpy() for q in draws]).astype(np.float64)
    settled = ((codes == o.values).reshape(64, -1, 16).all(2)) & (o.wanted > 2**-6)
    low, high = (oracle.E4M3[code] for code in oracle.neighbours(o.wanted, oracle.E4M3))
    inside = (o.wanted - low > 1e-4 * low) & (high - o.wanted > 1e-4 * low) & settled
    assert ((scales == low) | (scales == high))[:, inside].all() and inside.mean() > 0.9

    def z(o):                                       # of the mean over draws and blocks, in standard errors
        share = (o.wanted - low) / (high - low)
        spread = np.sqrt(np.sum((share * (1 - share))[inside]) / 64)
        return abs(np.sum(((scales.mean(0) - low) / (high - low) - share)[inside]) / spread)
    assert z(o) < 4
    if dtype == FP32:
        assert z(other) > 4 or kind != "gaussian"
    else:
        assert (other.values != o.values).mean() > 1e-3 or kind == "outlier"    # there all are 6 or 0


def test_eden_scales_round_up_as_often_as_they_should():
    """Over all pairs of random bytes a scale goes up exactly floor(65536 f) times, f its place between two
    E4M3 numbers; NaN and 0 stay. Without random bytes it goes to the nearest. Blocks that lie transposed in
    memory are no others."""
    n = torch.arange(65536)
    random = torch.stack([n // 256, n % 256], 1).repeat(1, 8).view(65536, 1, 1, 16)
    for seed, scale in enumerate((448.0, 256.0, 1.0, 0.0234375, 2.0**-9)):
        a = gaussian(1, 1, 1, 16, seed=seed).abs() * 3
        value, _ = e2m1(a)
        scale = torch.full((1, 1, 1, 1), scale)
        exact = float(scale) * float(a.double().square().sum() / (a.double() * value).sum())
        wanted = float(torch.tensor(exact))         # fp32
        blocks = [t.expand(65536, -1, -1, -1) for t in (a, value, scale)] + [random]
        found = papers.eden_scales(*blocks)
        turned = papers.eden_scales(*(t.permute(2, 3, 0, 1) for t in blocks))
        assert found.shape == (65536, 1, 1, 1) and same(turned.permute(2, 3, 0, 1), found)
        low, high = (float(oracle.E4M3[code]) for code in oracle.neighbours(wanted, oracle.E4M3))
        ups = int(65536 * (wanted - low) / (high - low)) if wanted < 448 else 65536
        assert int((found == high).sum()) == ups and int((found == low).sum()) == 65536 - ups, exact
        nearest = float(oracle.E4M3[oracle.nearest(min(wanted, 448), oracle.E4M3)])
        assert float(papers.eden_scales(a, value, scale, None)) == nearest
    for scale in (0.0, float("nan")):
        got = papers.eden_scales(a, value, torch.full((1, 1, 1, 1), scale), random[7:8])
        assert same(got, torch.full((1, 1, 1, 1), scale))


@pytest.mark.parametrize("kind", (*KINDS, "nan"))
def test_eden_on_every_kind(kind):
    """Finite where x is, NaN where it is not; zeros are zeros."""
    x = sample("gaussian" if kind == "nan" else kind, (48, 128))
    x[5, 7] = float("nan") if kind == "nan" else x[5, 7]
    for stochastic in (False, True):
        y = quantize(x, "ms_eden", stochastic=stochastic, seed=SEED).dequantize()
        assert y.isnan().all() if kind == "nan" else y.isfinite().all()
        assert kind != "zero" or not y.any()
    assert quantize(x, "ms_eden", amax=1.0).dequantize().isnan().sum() == 16 * (kind == "nan")


@pytest.mark.long
def test_eden_is_unbiased(monkeypatch):
    """Over fresh rotations, turned back, each element's mean is x within 4 standard errors, as is their sum;
    not so without the correction, though rounding to nearest has no side either."""
    plain = scratch_format(monkeypatch, "plain", top=256.0, target=FORMATS["ms_eden"].target)
    x, draws = gaussian(1, 1024, seed=3), {"ms_eden": [], plain: []}
    for step in range(2048):
        signs = fresh_signs(step)
        for name, found in draws.items():
            stochastic = name == "ms_eden"
            q = quantize(x, name, stochastic=stochastic, seed=SEED + step, signs=signs).dequantize()
            found.append(hadamard(q, NONE_128).unflatten(1, (-1, 128)).mul(signs).flatten())
    eden, nearest = (torch.stack(found) for found in draws.values())
    none = torch.zeros(1024)
    assert is_unbiased(eden, x[0], none) and not is_unbiased(nearest, x[0], none)
    assert not is_unbiased(0.99 * eden, x[0], none)


# ---------------------------------------------------------------- vectors, DGE, OCC: 2501.17116

VECTOR = choices("e2m1_vector")


def test_vector_wise_scales():
    """gamma = 6 / max|row| in fp32; each value the code nearest to x gamma, over gamma, to fp32's rounding. A
    token is quantized as if alone, and NaN alone; rows of zeros are zeros."""
    x = sample("cauchy", (48, 64)) * torch.logspace(-20, 20, 48)[:, None]
    x[7] = 0
    q = quantize(x, "e2m1_vector")
    gamma = 6 / x.abs().amax(1, keepdim=True)
    gamma[7] = 1
    value = torch.tensor(oracle.E2M1[oracle.nearest((x * gamma).abs().numpy(), oracle.E2M1)]) * x.sign()
    want = value.double() / gamma.double()
    assert torch.equal(q.decode().double(), value) and q.s_dec.shape == (48, 1)
    assert ((q.dequantize().double() - want).abs() <= 2**-22 * want.abs()).all()
    assert not ((quantize(x).dequantize().double() - want).abs() <= 2**-22 * want.abs()).all()    # control
    assert all(torch.equal(quantize(x[i:i + 1], "e2m1_vector").dequantize()[0], q.dequantize()[i])
               for i in range(48))
    x[5, 3] = float("inf")
    hurt = quantize(x, "e2m1_vector").dequantize()
    assert hurt[5].isnan().all() and torch.equal(hurt[:5], q.dequantize()[:5])


@pytest.mark.parametrize("fixed", (None, 2.0))
def test_vector_wise_experts(fixed):
    """A grouped GEMM with scales of tokens and of each expert's output channels: that expert's GEMM."""
    cfg = FP4Config(format="e2m1_vector", square_weights=False, input_amax=fixed)
    weights, ends = gaussian(3, 96, 64) * torch.tensor([1.0, 5.0, 0.2])[:, None, None], [16, 48, 64]
    layer = make_layer(cfg)
    layer.weight = torch.nn.Parameter(weights.clone())
    (x, dy), ends_ = batch(64), torch.tensor(ends, dtype=torch.int32)
    both = layer.quantize_weight()
    q_x, q_dy = (quantize_both(t, *(cfg.operand(f"{gemm_name}.{kind}", layer.keys) for gemm_name in names))
                 for t, kind, names in ((x, "x", ("fprop", "wgrad")), (dy, "dy", ("dgrad", "wgrad"))))
    y, dx = nvfp4.fprop(q_x, both, FP32, ends_), nvfp4.dgrad(q_dy, both, FP32, ends_)
    dw = nvfp4.wgrad(q_dy, q_x, FP32, ends_)
    rows, columns = q_dy.columns.dequantize(), q_x.columns.dequantize()
    for e, (i, j) in enumerate(zip([0, *ends], ends, strict=False)):
        w = quantize(weights[e], **cfg.operand("fprop.w", layer.keys)).dequantize().double()
        w_t = quantize(weights.flatten(0, 1).t(), **cfg.operand("dgrad.w", layer.keys)).dequantize()
        w_t = w_t.unflatten(1, (3, -1))[:, e].double()
        for got, a, b in ((y[i:j], q_x.rows.dequantize()[i:j], w.t()), (dx[i:j], q_dy.rows.dequantize()[i:j],
                          w_t.t()), (dw[e], rows[:, i:j], columns[:, i:j].t().double())):
            error = (got - a.double() @ b).abs()
            assert (error <= 1e-5 * (a.double().abs() @ b.abs())).all()
            assert not ((0.98 * got - a.double() @ b).abs() <= 1e-5 * (a.double().abs() @ b.abs())).all()


def test_dge_slope():
    """The formula on each of the 14 intervals, in float64 from the paper alone: 1/k next to a code, clipped
    in the middle, and the slope of the curve that goes through the codes."""
    for low, high in zip(E2M1_NUMBERS, E2M1_NUMBERS[1:], strict=False):
        a = low + (torch.arange(512) / 512) * (high - low)
        w = torch.cat([a, -a, torch.full((16,), 6.0)])[None]                    # gamma = 1
        for k, clip in ((5.0, 3.0), (3.0, 3.0), (5.0, 1.5)):
            slope = dge_slope(w, VECTOR, k, clip)[0]
            want, wrong = (torch.tensor(oracle.dge_derivative(w[0].numpy(), n, clip)) for n in (k, k + 0.1))
            assert ((slope.double() - want).abs() <= 1e-5 * want).all()
            assert float(slope[256]) == float(slope.max()) == clip
            assert float(slope[0]) == float(slope.min()) == float(slope[-1]) == pytest.approx(1 / k)
            assert not ((slope.double() - wrong).abs() <= 1e-5 * wrong).all()
        inside = np.linspace(low, high, 1001)[1:-1]
        steep = np.abs(inside - (low + high) / 2) > 0.02 * (high - low)         # where a difference will do
        rise = (oracle.dge_value(inside + 1e-7) - oracle.dge_value(inside - 1e-7)) / 2e-7
        assert np.allclose(rise[steep], oracle.dge_derivative(inside, clip=np.inf)[steep], rtol=1e-3)
        assert oracle.dge_value(np.array([low]))[0] == low
    # of a matrix: in units of each row's scale, whatever its size
    w = gaussian(96, 64) * torch.logspace(-3, 3, 96)[:, None]
    scaled = (w * 6 / w.abs().amax(1, keepdim=True)).double().numpy()
    got, want = dge_slope(w, VECTOR, 5.0, 3.0).double(), torch.tensor(oracle.dge_derivative(scaled))
    assert float(((got - want).abs() > 1e-3 * want).double().mean()) < 1e-3     # but on the very edges


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_occ_splits_exactly(dtype):
    """x = clamped + outliers to one rounding; 2 (1 - quantile) of the outliers are not zero; the clamp is the
    oracle's; a token's does not depend on another's; 1 clamps nothing."""
    x = sample("cauchy", (64, 800), dtype)
    for quantile in (0.999, 0.99, 0.97):
        clamped, outliers = split_outliers(x, quantile)
        assert same(clamped, torch.tensor(oracle.occ_clamp(x.float().numpy(), quantile)).to(dtype))
        share = float((outliers != 0).double().mean())
        assert 0 < share < 2 * (1 - quantile) + 2 / 800
        assert not outliers[clamped == x].any() and (outliers != 0)[clamped != x].all()
        rest = x.double() - clamped.double()
        bound = (2**-24 if dtype == FP32 else 2**-8) * rest.abs()
        assert ((outliers.double() - rest).abs() <= bound).all()
        assert not ((0.98 * outliers.double() - rest).abs() <= bound).all()
        assert same(split_outliers(x[3:4], quantile)[0], clamped[3:4])
    clamped, outliers = split_outliers(x, 1.0)
    assert same(clamped, x) and not outliers.any()


def test_occ_restores_the_outliers_product():
    """On heavy tails (Student's t, 4 degrees of freedom) fidelity is in the order of 2501.17116 table 1, no
    clamp < clamp < clamp + compensation, and more of it is better; but a clamp of more without compensation
    loses. That the layer compensates so is in its definition."""
    x = gaussian(64, 2048) / gaussian(4, 64, 2048, seed=1).square().mean(0).sqrt()

    def snr(occ, compensates):
        clamped, outliers = split_outliers(x, occ)
        values = quantize(clamped, "e2m1_vector").dequantize() + compensates * outliers
        return float(20 * (x.norm() / (values - x).norm()).log10())
    none, clamp, far = (snr(occ, False) for occ in (1.0, 0.999, 0.97))
    both = [snr(occ, True) for occ in (0.999, 0.99, 0.97)]
    assert far < none < clamp < both[0] < both[1] < both[2], (none, clamp, far, both)


# ---------------------------------------------------------------- three levels of scales: HiF4

@pytest.mark.parametrize("kind", ("gaussian", "cauchy", "outlier, tiny"))
def test_hif4_s_scales_are_the_oracle_s(kind):
    """Three levels of scales in a word of 32 bits, 4.5 bits a value; test_values_are_the_oracle_s has the
    values. A bit of any level is noticed."""
    for seed in range(8):
        x = sample(kind, (48, 256), BF16, seed)
        o, q = oracle.hif4(x.float().numpy()), quantize(x, "hif4")
        want = torch.tensor(o.values().astype(np.float32))
        assert same(q.dequantize(), want) and q.scales.dtype == torch.int32
        assert np.array_equal(q.scale_of_lines().repeat_interleave(2, 2).flatten(1).numpy(), o.scales())
        for first, n, exponents in ((0, 8, o.e2), (8, 16, o.e3)):
            bits = q.scales[..., None] >> first + torch.arange(n, dtype=torch.int32) & 1
            assert np.array_equal(bits.flatten(1).numpy(), exponents)
        assert 8 * (q.codes.nbytes + q.scales.nbytes) == 4.5 * x.numel() == FORMATS["hif4"].bits * x.numel()
        for bit in (3, 8 + 5, 24):                  # of the scale of 8 values, of 4, of 64
            assert not same(q._replace(scales=q.scales ^ 1 << bit).dequantize(), want)


def test_hif4_s_word():
    """Bytes 0 to 254 of E6M2 with any of the 24 exponents, read by hand, and written again with the same
    scales: twice 8 values, or twice either 4 of them, is one. 255 is NaN."""
    byte = torch.arange(255)[:, None]
    draws = torch.randint(1 << 24, (255, 64), generator=torch.Generator().manual_seed(0))
    bits = draws | 1 | 1 << 8                       # the largest of 64 is always twice and twice more
    word = (byte << 24 | bits).to(torch.int32)
    scale = papers.hif4_unpack(word).repeat_interleave(2, 2)                    # it says one for two values
    first = (1 + byte % 4 / 4) * 2.0 ** (byte // 4 - 48)
    for value in (0, 3, 4, 7, 8, 31, 63):
        exponents = (bits >> value // 8 & 1) + (bits >> 8 + value // 4 & 1)
        assert torch.equal(scale[..., value].double(), first.double() * 2.0 ** exponents / 4), value
    again = papers.hif4_word(scale)
    assert torch.equal(papers.hif4_unpack(again), papers.hif4_unpack(word))
    assert 0 < float((again == word).double().mean()) < 1
    assert papers.hif4_unpack(torch.tensor([[-1 << 24 | 5]], dtype=torch.int32)).isnan().all()
    # the smallest byte stands for what is not doubled too: 2^-48 is the least that there is
    low = torch.tensor([1.0, 2.0]).repeat_interleave(32)[None, None] * 2.0**-50
    assert torch.equal(papers.hif4_unpack(papers.hif4_word(low)), low[..., ::2])


# ---------------------------------------------------------------- the compiled code is the definition

FIXED, KEY = torch.tensor(SIGNS, dtype=FP32), torch.tensor(nvfp4.stream_key(SEED, 1, 2, 3, 4))
BY_CHANCE, ANOTHER = {"stochastic": True, "seed": KEY}, {"seed": KEY + 1}
COMPILED = {                                        # dtype, whether turned, options, others: a control
    "codes": (FP32, False, {}, {"square": True}),
    "wgrad.dy, rotated": (BF16, True, BY_CHANCE | {"signs": FIXED, "decode": FP32}, ANOTHER),
    "weight": (FP32, False, {"square": True, "decode": BF16}, {"square": False}),
    "codes, 16x16": (BF16, False, BY_CHANCE | {"square": True}, ANOTHER),
    "dgrad.dy": (BF16, False, BY_CHANCE | {"format": "nvfp4_unbiased", "decode": BF16},
                 {"format": "nvfp4"}),
    "wgrad.x, rotated": (FP32, True, {"signs": FIXED}, {"signs": FIXED.flip(0)}),
    "rotated by 32": (BF16, False, BY_CHANCE | {"format": "mxfp4", "signs": signs_of("fixed", 32)}, ANOTHER),
    "4/6, nearest": (BF16, False, {"format": "nvfp4_46"}, {"format": "nvfp4"}),
    "ms_eden, turned": (BF16, True, BY_CHANCE | {"format": "ms_eden", "decode": FP32}, ANOTHER),
    **{name: (BF16, False, BY_CHANCE | {"format": name}, ANOTHER) for name in FORMATS
       if name not in ("nvfp4", "nvfp4_unbiased")}}
@pytest.mark.parametrize("case", [case if case == "codes" else pytest.param(case, marks=pytest.mark.long)
                                  for case in COMPILED])
def test_compiled_is_eager(case, monkeypatch):
    """Bit for bit on every kind of input; turned: x^T as it lies in memory is a contiguous x^T. Each case
    takes a quarter of a minute to compile."""
    if not CAN_COMPILE("cpu"):
        assert not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))), "a compiler, yet nothing compiles"
        pytest.skip("no C++ compiler here: nothing is fused, the eager definition runs")
    torch.set_num_threads(THREADS)
    dtype, turned, options, other = COMPILED[case]
    width = FORMATS[options.get("format", "nvfp4")].block

    def results(x, options, compiled):
        monkeypatch.setattr(nvfp4, "can_compile", lambda kind: compiled)
        q = quantize((x.t() if compiled else x.t().contiguous()) if turned else x, **options)
        return tensors_of(q) if "decode" in options else [*tensors_of(q), q.decode(dtype)]
    for shape, kind, amax in product(((48, 5 * width), (176, 7 * width)), (*KINDS, "nan"), (None, 1.0)):
        x = sample(kind, shape, dtype)
        if kind == "nan":
            x[7, 21], x[30, 60] = float("nan"), float("inf")
        want, got = (results(x, options | {"amax": amax}, compiled) for compiled in (False, True))
        assert all(map(same, got, want)), (shape, kind, amax)
    x = gaussian(48, 5 * width).to(dtype)
    assert not all(map(same, results(x, options, True), results(x, options | other, False)))


def as_if_never_asked(monkeypatch, compile):
    """compile in place of torch.compile, and none of its answers known."""
    monkeypatch.setattr(torch, "compile", compile)
    for name, original in (("can_compile", CAN_COMPILE), ("compiled", nvfp4.compiled)):
        monkeypatch.setattr(nvfp4, name, cache(original.__wrapped__))


def test_a_compiler_switched_off_compiles_nothing(monkeypatch):
    """use_compiler(False): the bits of a layer and of quantize() without a call of torch.compile."""
    calls, (x, dy) = [], batch(37)
    as_if_never_asked(monkeypatch, lambda f, **options: calls.append(f) or f)

    def bits():
        q = quantize(x[:32], stochastic=True, seed=SEED, signs=FIXED)
        return [*tensors_of(q), q.dequantize(), *run(make_layer(RECIPES["nvfp4"]), x, dy)]
    with nvfp4.use_compiler(False):
        off, n_calls, said = bits(), len(calls), nvfp4.capability("cpu")
    assert n_calls == 0 and "switched off" in said
    assert all(map(same, bits(), off)) and len(calls) > 3                       # control


def test_a_compiler_that_cannot_cast_to_e4m3_is_not_used(monkeypatch, capsys):
    """As on GPUs older than sm_80 (T4, V100), where Triton refuses the type: said once, and all runs eagerly.
    Where kernels quantize (sm_80), no compiled function casts to it, and the compiler serves."""
    class Refusal(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if torch.float8_e4m3fn in args:
                raise ValueError("type fp8e4nv not supported in this architecture")
            return function(*args, **(kwargs or {}))

    def compile(f, **options):
        def run(*args):
            with Refusal():
                return f(*args)
        return run
    want = quantize(gaussian(32, 64))
    as_if_never_asked(monkeypatch, compile)
    assert all(alike(quantize(gaussian(32, 64)), want) for _ in range(2))
    assert capsys.readouterr().err.count("torch.compile does not work here") == 1
    assert "not fused" in nvfp4.capability("cpu")
    monkeypatch.setattr(nvfp4, "has_kernels", lambda device: True)
    assert CAN_COMPILE.__wrapped__("cpu")
