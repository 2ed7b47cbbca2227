"""Reference NVFP4 in plain numpy, written from the numerics contract alone, as an oracle for the tests.

Rounding is a nearest-neighbour search in a table of every representable value, in float64. Arithmetic is in
float32 wherever the contract rounds to fp32. No code is shared with the implementation under test.
"""

from typing import NamedTuple

import numpy as np

F32 = np.float32
FLT_MAX = np.finfo(F32).max
GROUP = 16  # elements of a row that share a scale column, a Philox call and a Hadamard transform
NAN_BYTE = 0x7F
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def float_table(last_code, man_bits, bias):
    """Values of the codes 0..last_code of a small unsigned float with subnormals, in float64."""
    code = np.arange(last_code + 1)
    exponent, fraction = code >> man_bits, code & (2**man_bits - 1)
    significand = np.where(exponent == 0, fraction, fraction + 2**man_bits).astype(np.float64)
    return np.ldexp(significand, np.maximum(exponent, 1) - bias - man_bits)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = float_table(0x7E, man_bits=3, bias=7)  # ends at 448
BF16 = float_table(0x7F80, man_bits=7, bias=127)  # ends at 2**128, which stands for infinity


def neighbours(a, table):
    """Code lo with table[lo] <= a < table[lo + 1], and code lo + 1; the last interval for larger a."""
    lo = np.clip(np.searchsorted(table, a, side="right") - 1, 0, len(table) - 2)
    return lo, lo + 1


def nearest(a, table):
    """Code of the table value nearest to a >= 0 (saturating), ties to the even code; any code for NaN."""
    a = np.asarray(a, np.float64)
    lo, hi = neighbours(a, table)
    below, above = a - table[lo], table[hi] - a
    return np.where((above < below) | ((above == below) & (hi % 2 == 0)), hi, lo)


def to_bf16(x):
    """Float32 array rounded to bf16 (nearest even), returned as float32."""
    x = np.asarray(x, F32)
    with np.errstate(over="ignore", invalid="ignore"):
        magnitude = BF16[nearest(np.abs(x), BF16)].astype(F32)
    return np.where(np.isnan(x), x, np.copysign(magnitude, x))


def e4m3_bytes(v):
    """Float8 e4m3fn bytes of v >= 0, saturating at 448; NaN gives 0x7F."""
    return np.where(np.isnan(v), NAN_BYTE, nearest(v, E4M3)).astype(np.uint8)


def decode_e4m3(scale_bytes):
    """Float32 values of non-negative e4m3fn bytes."""
    return np.append(E4M3, np.nan).astype(F32)[scale_bytes]


def philox(counter, key):
    """Philox4x32-10: four counter words (ints or arrays) and two key words to four uint64 arrays < 2**32."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    mask, half = np.uint64(MASK32), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> half) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def split64(n):
    """Low and high 32-bit words of an integer mod 2**64."""
    n = int(n) & MASK64
    return n & MASK32, n >> 32


def random_bytes(rows, cols, key):
    """The (rows, cols) uint8 of stochastic rounding: one Philox call for each 16 elements of a row."""
    b = np.arange(rows * cols // GROUP, dtype=np.uint64)
    words = np.stack(philox((b & np.uint64(MASK32), b >> np.uint64(32), 0, 0), split64(key)), axis=-1)
    j = np.arange(GROUP)
    chosen = words[:, j // 4] >> (8 * (j % 4)).astype(np.uint64)
    return (chosen & np.uint64(255)).astype(np.uint8).reshape(rows, cols)


def stream_key(seed, step, micro_batch, layer, operand):
    """64-bit key of one operand's noise."""
    counter = [int(n) & MASK32 for n in (step, micro_batch, layer, operand)]
    w0, w1, _, _ = philox(counter, split64(seed))
    return int(w0) | (int(w1) << 32)


def pack(codes):
    """(M, K) codes 0..15 to (M, K/2) bytes, the even column in the low nibble."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)


def unpack(packed):
    """(M, K/2) bytes to (M, K) codes 0..15."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


class Quantized(NamedTuple):
    codes: np.ndarray  # (M, K/2) uint8
    scales: np.ndarray  # (M/block[0], K/16) uint8, e4m3fn bytes
    s_dec: np.float32
    block: tuple


def expand(per_block, block):
    """Repeat each block's number over the block's elements."""
    return np.repeat(np.repeat(per_block, block[0], axis=0), block[1], axis=1)


def tensor_scales(amax, target=6.0, top=448.0):
    """(s_enc, s_dec) in fp32; both NaN for an amax that is not finite."""
    amax = F32(amax)
    if not np.isfinite(amax):
        return F32(np.nan), F32(np.nan)
    with np.errstate(divide="ignore", over="ignore"):
        s_enc = np.minimum(F32(top * target) / amax, FLT_MAX)
    if amax == 0 or s_enc == 0:
        s_enc = F32(1)
    return s_enc, F32(1) / s_enc


def round_stochastic(a, byte):
    """E2M1 code of 0 <= a <= 6: up iff floor(256 * position in the interval) + byte >= 256."""
    lo, hi = neighbours(a, E2M1)
    position = np.floor(256 * (a - E2M1[lo]) / (E2M1[hi] - E2M1[lo]))  # exact; 256 at a = 6, always up
    return np.where(position + byte >= 256, hi, lo)


def quantize(x, block=(1, 16), stochastic=False, key=0, amax=None, target=6.0, top=448.0, lands=None):
    """Quantize a float32 (M, K) array; amax=None takes the maximum of |x|. The tensor's largest block is to
    have scale top; a block's largest magnitude lands on target, or where lands says."""
    x = np.asarray(x)
    assert x.dtype == F32 and x.ndim == 2 and block in ((1, 16), (16, 16))
    rows, cols = x.shape
    assert rows % block[0] == 0 and cols % block[1] == 0
    magnitude = np.abs(x)
    if amax is None:
        amax = magnitude.max() if np.isfinite(x).all() else np.nan
    amax = F32(amax)
    s_enc, s_dec = tensor_scales(amax, target, top)

    tiles = magnitude.reshape(rows // block[0], block[0], cols // block[1], block[1])
    amax_block = tiles.max(axis=(1, 3))
    finite = np.isfinite(amax_block)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        wanted = amax_block * (s_enc * F32(1 / (lands or target)))
        scales = np.where(finite, e4m3_bytes(np.minimum(wanted, F32(448))), NAN_BYTE).astype(np.uint8)
        inverse = np.minimum(F32(1) / (decode_e4m3(scales) * s_dec), FLT_MAX)
        a = np.minimum(magnitude * expand(inverse, block), F32(6))
    assert wanted.dtype == inverse.dtype == a.dtype == F32

    a = np.where(np.isnan(a), 0, a).astype(np.float64)  # codes of NaN blocks are unspecified
    code = round_stochastic(a, random_bytes(rows, cols, key)) if stochastic else nearest(a, E2M1)
    code = (code + 8 * np.signbit(x)).astype(np.uint8)
    return Quantized(pack(code), scales, s_dec, block)


def dequantize(q, tensor_scale=True):
    """Float32 (M, K) values; tensor_scale=False leaves s_dec out, and then the product is exact."""
    codes = unpack(q.codes)
    signed = np.concatenate([E2M1, -E2M1]).astype(F32)
    value = signed[codes] * expand(decode_e4m3(q.scales), q.block)
    return value * q.s_dec if tensor_scale else value


def four_over_six(x, block=(1, 16), stochastic=False, key=0, amax=None, target=6.0, power=2):
    """Quantized by 4/6 (PAPERS 3): tensor scale for 256; each block with its largest magnitude on 6 or on 4,
    whichever, to nearest, has the smaller sum of squares of its errors (or of another power), 6 in a tie."""
    how = {"block": block, "amax": amax, "target": target, "top": 256.0}
    six, four = quantize(x, **how), quantize(x, **how, lands=target * 4 / 6)

    def left(q):
        value = dequantize(q, False).astype(np.float64) * np.float64(q.s_dec)
        d = np.abs(value - np.asarray(x, np.float64)) ** power
        tiles = d.reshape(d.shape[0] // block[0], block[0], d.shape[1] // block[1], block[1])
        return tiles.sum(axis=(1, 3))

    with np.errstate(invalid="ignore"):
        chosen = left(four) < left(six)
    if stochastic:
        six = quantize(x, **how, stochastic=True, key=key)
        four = quantize(x, **how, stochastic=True, key=key, lands=target * 4 / 6)
    codes = np.where(expand(chosen, block), unpack(four.codes), unpack(six.codes)).astype(np.uint8)
    return six._replace(codes=pack(codes), scales=np.where(chosen, four.scales, six.scales))


def grid_interval(a):
    """(left end, width) of the E2M1 interval that holds 0 <= a <= 6; a grid point begins its interval."""
    lo, hi = neighbours(a, E2M1)
    return E2M1[lo], E2M1[hi] - E2M1[lo]


def dge_derivative(a, k=5.0, clip=3.0):
    """f'(a) of the differentiable gradient estimator at scaled weights a in [-6, 6] (PAPERS 2.2), float64."""
    left, width = grid_interval(np.abs(np.asarray(a, np.float64)))
    u = np.abs(2 * (np.abs(a) - left) / width - 1)
    with np.errstate(divide="ignore"):
        return np.minimum(u ** (1 / k - 1) / k, clip)


def dge_value(a, k=5.0):
    """f(a), the curve through the grid points of which that is the derivative; 0 <= a <= 6."""
    left, width = grid_interval(np.asarray(a, np.float64))
    u = 2 * (a - left) / width - 1
    return left + width / 2 * (1 + np.sign(u) * np.abs(u) ** (1 / k))


def mxfp4(x, floor=False):
    """Values of MXFP4 in float64: for 32 of a row the smallest power of two that brings them to 6 or below;
    by OCP (floor) one that brings the largest into [4, 8), from where it saturates. From 2^-127 to 2^127."""
    blocks = np.asarray(x, np.float64).reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.floor(np.log2(amax)) - 2 if floor else np.ceil(np.log2(amax / 6))
        scale = np.where(np.isfinite(amax), 2.0 ** np.clip(exponent, -127, 127), np.nan)
        return (np.copysign(E2M1[nearest(np.abs(blocks / scale), E2M1)], blocks) * scale).reshape(x.shape)


def occ_clamp(x, quantile):
    """Each row clamped to two of its own elements, those at the ranks of 1 - quantile and of quantile."""
    x, K = np.asarray(x), x.shape[1]
    rank = int(np.rint(quantile * (K - 1)))
    ordered = np.sort(x, axis=1)
    return np.minimum(np.maximum(x, ordered[:, K - 1 - rank, None]), ordered[:, rank, None])


class HiF4(NamedTuple):
    sf: np.ndarray  # (M, K/64) float64, NaN where a value of the 64 is not finite
    e2: np.ndarray  # (M, K/8) 0 or 1
    e3: np.ndarray  # (M, K/4) 0 or 1
    q: np.ndarray  # (M, K) float64, signed multiples of 1/4 up to 1.75

    def scales(self):
        """(M, K) float64: what each q is multiplied by, in units of a code, 4 q."""
        e2, e3 = np.repeat(self.e2, 8, axis=1), np.repeat(self.e3, 4, axis=1)
        return np.repeat(self.sf, 64, axis=1) * 2.0**e2 * 2.0**e3 / 4

    def values(self):
        return 4 * self.q * self.scales()


def as_bf16(x):
    """Float64 array, not negative, rounded once to bf16."""
    return BF16[nearest(x, BF16)]


def hif4(x):
    """HiF4's encoding (PAPERS 4.6) of bf16 numbers x (M, K), in float64 and, where that says so, bf16."""
    magnitude = np.abs(np.asarray(x, np.float64))
    finite = np.isfinite(magnitude.reshape(len(x), -1, 64)).all(axis=2)
    magnitude = np.where(np.repeat(finite, 64, axis=1), magnitude, 0)
    m3, m2, m1 = (magnitude.reshape(len(x), -1, n).max(axis=2) for n in (4, 8, 64))
    sf = np.clip(as_bf16(m1 * as_bf16(1 / 7)), 2.0**-48, 49152)
    e = np.floor(np.log2(sf))
    sf = np.rint(sf * 2.0 ** (2 - e)) * 2.0 ** (e - 2)
    r = as_bf16(1 / sf)
    e2 = np.floor(np.clip(m2 * np.repeat(r, 8, axis=1), 0, 4) / 4)
    e3 = np.floor(np.clip(m3 * np.repeat(r, 16, axis=1) / 2.0 ** np.repeat(e2, 2, axis=1), 0, 2) / 2)
    scaled = magnitude * np.repeat(r, 64, axis=1)
    scaled = scaled / 2.0 ** np.repeat(e2, 8, axis=1) / 2.0 ** np.repeat(e3, 4, axis=1)
    q = np.minimum(np.floor(scaled * 4 + 0.5) / 4, 1.75)
    return HiF4(np.where(finite, sf, np.nan), e2, e3, np.copysign(q, x))


def hadamard_matrix(n=GROUP):
    """Natural-order n x n Hadamard matrix of +-1, not normalised."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])


def rotation_signs(size, key=0):
    """Signs of a rotation drawn with a key: the bits of one Philox call, 1 being -1."""
    words = philox((0, 0, 1, 0), split64(key))
    return [1 - 2 * (int(words[i // 32]) >> (i % 32) & 1) for i in range(size)]


class Eden(NamedTuple):
    values: np.ndarray  # (M, K) of the codes, signed, on the grid
    wanted: np.ndarray  # (M, K/16) float64, S * s_b, which is rounded stochastically to E4M3
    g: float


def ms_eden(x, signs, target=6 * (16 / 17) / 0.93, top=256.0, group=GROUP):
    """MS-EDEN (PAPERS 4.3) of x (M, K) up to the rounding of its scales, in float64: rotation by
    H diag(signs) / sqrt(n) in runs of n, codes to nearest with clipping, the correction S of each group."""
    n = len(signs)
    runs = np.asarray(x, np.float64).reshape(x.shape[0], -1, n)
    y = ((runs * np.asarray(signs, np.float64)) @ hadamard_matrix(n) / np.sqrt(n)).reshape(x.shape)
    g = np.abs(y).max() / (target * top)
    blocks = y.reshape(x.shape[0], -1, GROUP)
    s_b = decode_e4m3(e4m3_bytes(np.abs(blocks).max(axis=2) / (g * target))).astype(np.float64)
    scaled = blocks / (s_b * g)[:, :, None]
    q = np.copysign(E2M1[nearest(np.minimum(np.abs(scaled), 6), E2M1)], scaled)
    by_group = (x.shape[0], -1, group)
    yy = (scaled * scaled).reshape(by_group).sum(axis=2)
    yq = (scaled * q).reshape(by_group).sum(axis=2)
    correction = np.repeat(yy / yq, group // GROUP, axis=1)
    return Eden(q.reshape(x.shape), correction * s_b, g)


def hadamard(x, signs=SIGNS, bf16=False):
    """(x * signs) @ H_n / sqrt(n) in runs of n signs of the last axis, by fp32 butterflies; then to bf16 if
    asked."""
    x, n = np.asarray(x), len(signs)
    assert x.dtype == F32 and x.shape[-1] % n == 0
    y = x.reshape(-1, n) * np.asarray(signs, F32)
    for stride in [2**i for i in range(n.bit_length() - 1)]:
        low = np.array([i for i in range(n) if not i & stride])
        u, v = y[:, low], y[:, low + stride]
        y = np.empty_like(y)
        with np.errstate(over="ignore", invalid="ignore"):
            y[:, low], y[:, low + stride] = u + v, u - v
    y = (y * F32(n**-0.5)).reshape(x.shape)
    return to_bf16(y) if bf16 else y

