"""Training in four bits: the number formats, and the linear layer that computes in them.

    1  The lesson          plain PyTorch, complete: formats, rounding, rotation, the three GEMMs of a linear
                           layer, recipes, the layer. Whoever stops at its end has understood everything and
                           could train.
    2  The same on a GPU   Triton kernels that quantize and multiply, the same bit for bit; what a chip can do
    3  The machinery       what torch.compile, CUDA graphs and checkpointing ask for. It ends by putting
                           functions of the lesson, under their own names, through the compiler or the kernels

The lesson in one page
----------------------
A 4-bit float (E2M1: one sign bit, two exponent bits, one mantissa bit) has sixteen codes, which stand for

    +-{0, 0.5, 1, 1.5, 2, 3, 4, 6},

far too few for a tensor whose values span decades. NVFP4 gives every block of 16 values a scale of its own,
an 8-bit float (E4M3, up to 448), and the whole tensor one fp32 scale that moves the block scales into E4M3's
range. In formulas a code is the number that it stands for:

    value = code * scale * s_dec          4 bits each, 8 bits per 16, 32 bits per tensor

To quantize: the tensor's largest magnitude, amax, fixes the encode scale s_enc = 448 * 6 / amax, which brings
it to the largest scale times the largest code; the decode scale s_dec = 1 / s_enc undoes that in the end. The
block's largest magnitude fixes its scale, so that it lands on 6. Each element is rounded to the nearest code,
or up or down at random, with probabilities that make the average right (stochastic rounding). Four numbers,
of a tensor with amax 3:

    s_enc = 448 * 6 / 3 = 896; the block's scale is 3 * 896 / 6 = 448, in E4M3 448; scale * s_dec = 0.5

    x                       0.1   -2.5      3    0.7
    x / (scale * s_dec)     0.2     -5      6    1.4
    code                      0     -4      6    1.5    5 lies halfway from 4 to 6: the even code, 4's, wins
    value                     0     -2      3   0.75

A matrix product sums over one axis of each operand, and blocks lie along that axis. So a matrix is cut up
differently for different products. With tokens as rows and channels as columns:

      row blocks, 1 x 16           column blocks, 16 x 1        square blocks, 16 x 16
     +---------+---------+         +-+-+-+-+-+-+-+-+-+-+        +---------+---------+
     +---------+---------+         | | | | | | | | | | |        |         |         |
     +---------+---------+         | | | | | | | | | | |        |         |         |
     +---------+---------+         +-+-+-+-+-+-+-+-+-+-+        +---------+---------+
     +---------+---------+         | | | | | | | | | | |        |         |         |
     +---------+---------+         | | | | | | | | | | |        |         |         |
     +---------+---------+         +-+-+-+-+-+-+-+-+-+-+        +---------+---------+
     for a product that sums       for one that sums over       for both: turned over, they
     over channels                 tokens                       are square blocks still
     quantize(x)                   quantize(x.t())              quantize(x, square=True)

There is one convention: blocks lie along the last axis, the one that is summed. A product that sums over rows
is given the transpose.

A product multiplies codes and adds them up. code * scale has at most six significant bits, so it is exact in
bf16: a bf16 GEMM on code * scale, times the two tensor scales at the end, *is* the FP4 GEMM up to the order
of accumulation. That sentence is how this file trains in FP4 on machines without FP4 units; what it measures
is the arithmetic of FP4, not its speed.

Training a linear layer takes three GEMMs, fprop, dgrad and wgrad. Each of its three matrices, x, w and dy,
takes part in two of them, once along its rows and once along its columns. Which rounding, block, rotation and
tensor scale each of these six operands gets is a recipe (see RECIPES): plain data.

A mixture of experts has such a layer for each expert, and each token meets but a few. Their tokens are sorted
by expert and quantized as one matrix; only the products are made expert by expert.

In quantize() and matmul() K is the axis that is summed. In the layer M counts tokens, K input channels and N
output channels. Sources: arXiv 2509.25149 (the format and NVIDIA's recipe), 2605.06067 (nGPT's recipe).

    convert(model, RECIPES["nvfp4"])                # its linear layers, in place
    for step in range(n):
        set_step(model, seed, step)                 # or stochastic rounding would repeat its random bits
        model(x).backward()                         # loss, optimizer and all else as ever

    python nvfp4.py             formats, their errors, recipes, and what runs on this machine
    python nvfp4.py --json      the same for machines
    python nvfp4.py 0.1 -2.5 3  these numbers through the format, step by step
"""
import contextlib
import fnmatch
import functools
import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

try:
    import triton
    import triton.language as tl
except ImportError:                                 # the lesson runs on any device
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)

# ================================================================ 1 The lesson

# ---------------------------------------------------------------- E2M1: rounding

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what codes 0..7 stand for; bit 3 is the sign
E2M1_MAX = 6.0


def e2m1(a, random=None):
    """Round magnitudes to the E2M1 grid: nearest with ties to the even code, or stochastically.

    a       fp32 >= 0, any shape; above 6 and NaN saturate to 6
    random  integers 0..255 of the same shape, or None: nearest. With f in [0, 1) the position of a in its
            grid interval, a goes up iff floor(256 f) + random >= 256: with probability floor(256 f) / 256
            (Blackwell's cvt.rs adds its random bits below the mantissa in the same way)
    returns value fp32 on the grid, code fp32 in 0..7
    source  2509.25149 appendix B
    """
    a = torch.where(a < E2M1_MAX, a, E2M1_MAX)
    low, middle = a < 2, a < 4                      # the grid's step is 0.5 below 2, 1 below 4, 2 above
    per_unit = torch.where(low, 2.0, torch.where(middle, 1.0, 0.5))
    if random is None:
        n = torch.round(a * per_unit)               # in steps; halves go to the even n: an even code
    else:
        n = torch.floor((torch.floor(a * (256 * per_unit)) + random) * (1 / 256))
    value = n * torch.where(low, 0.5, torch.where(middle, 1.0, 2.0))
    code = n + torch.where(low, 0.0, torch.where(middle, 2.0, 4.0))             # 2 is code 4, 4 is code 6
    return value, code


# ---------------------------------------------------------------- formats: codes, and scales of blocks

E4M3_MAX = 448.0                                    # the largest float8_e4m3fn
FLT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Format:
    """A 4-bit format as data: E2M1 codes, and how a block finds the scale of its codes.

    scales  function of (blocks, s_enc, target), with blocks (M/h, h, K/block, block) and h = 1, or h = block
            where they are square: for each block the scale (M/h, 1, K/block, 1) that brings s_enc times its
            largest magnitude to target; fp32, but exact in scale_dtype; NaN for a block with NaN or Inf.
            It is compiled: no branches on values in it
    """
    name: str
    block: int                                      # values in a row that share a scale
    scale_dtype: torch.dtype
    scales: Callable
    top: float | None                               # largest block scale of a tensor; None: no tensor scale
    unbiased: float | None                          # a target below 6, see target(); None: none would do
    kernels: bool = False                           # has kernels in part 2; its definition runs otherwise
    by_row: bool = False                            # each row has a tensor scale: s_enc and s_dec are (M, 1)
    lands: float = E2M1_MAX                         # the target; above 6 the largest magnitudes are cut off
    correct: Callable | None = None                 # what scales become once codes are known: eden_scales()

    @property
    def bits(self):
        """Bits a value takes, scales included, but those of a tensor or row."""
        return 4 + 8 * self.scale_dtype.itemsize / self.block

    @property
    def squares(self):
        """Whether its blocks may be square."""
        return not self.by_row and self.correct is None

    def shape_of(self, square):
        """(rows, columns) of a block."""
        if square and not self.squares:
            raise ValueError(f"square: {self.name} has no square blocks; set fp4_square_weights=False")
        return (self.block if square else 1), self.block

    def target(self, unbiased):
        """Where a block's largest magnitude is to land: on 6. A scale that is rounded down takes it beyond,
        where it is cut off; stochastic rounding is then too small on average. unbiased aims lower."""
        if unbiased and self.unbiased is None:
            raise ValueError(f"unbiased=True: {self.name} saturates at any target; leave it out")
        return self.unbiased if unbiased else self.lands


def encode_scale(scale, s_dec):
    """What x is multiplied by to be in units of its code: 1 / (scale * s_dec), where the scale is 0 too."""
    s_dec = s_dec[..., None] if s_dec.dim() else s_dec                          # of rows: (M, 1, 1)
    return torch.clamp((scale * s_dec).reciprocal(), max=FLT_MAX)


def block_amax(blocks):
    """Largest magnitude of each block, fp32: (M/h, h, K/block, block) -> (M/h, 1, K/block, 1)."""
    return blocks.float().abs().amax((1, 3), keepdim=True)


def e4m3_scales(blocks, s_enc, target):
    """NVFP4's: e4m3(min(amax_b * (s_enc * (1 / target)), 448)).

    error   relative 1/16 at most (E4M3 has 3 mantissa bits) for scales from 2^-6, its smallest normal number
    source  2509.25149 appendix B; order of rounding as in TransformerEngine
    """
    amax_b = block_amax(blocks)
    scale = torch.clamp(amax_b * (s_enc * (1 / target)), max=E4M3_MAX)
    return torch.where(amax_b < math.inf, scale, math.nan).to(torch.float8_e4m3fn).float()


def tensor_scales(amax, top, target=E2M1_MAX):
    """The tensor's encode and decode scale, fp32: its largest block is to have scale top and largest code
    target. Those of rows, where amax is (M, 1).

    value   s_enc = top * target / amax, at most FLT_MAX, 1 for an all-zero tensor; s_dec = 1 / s_enc; without
            a top both are 1
            NaN if amax is NaN or infinite, so that a broken tensor stays visibly broken
    source  2509.25149 appendix B
    """
    if top is None:
        return torch.ones_like(amax), torch.ones_like(amax)
    s_enc = torch.clamp(torch.full_like(amax, top * target) / amax, max=FLT_MAX)
    s_enc = torch.where(amax == 0, 1.0, s_enc)
    s_enc = torch.where(amax < math.inf, s_enc, math.nan)
    return s_enc, s_enc.reciprocal()


def find_scales(blocks, amax, scales, top, target):
    """The block scales (M/h, 1, K/block, 1) and s_dec (), from a Format's scales and top and amax () fp32."""
    s_enc, s_dec = tensor_scales(amax, top, target)
    return scales(blocks, s_enc, target), s_dec


def round_blocks(blocks, scale, s_dec, random, decode, correct):
    """Divide blocks (M, K/block, block) by their scales (M, K/block, 1) and round to the grid.

    returns codes uint8, 0..15, or, for a dtype in decode, code * scale in it; and the scales, which a format
            may correct. Then these are what is random
    """
    x, random = blocks.float(), unpack_bytes(random)
    a = x.abs() * encode_scale(scale, s_dec)
    value, code = e2m1(a, random if correct is None else None)
    if correct is not None:
        scale = correct(a, value, scale, random)
    negative = x.view(torch.int32) < 0                                          # the sign bit, of -0.0 too
    if decode is None:
        return torch.where(negative, code + 8, code).to(torch.uint8), scale
    value = value * scale
    return torch.where(negative, -value, value).to(decode), scale


# ---------------------------------------------------------------- other formats, as other papers have them

def e8m0_scales(blocks, s_enc, target):
    """MXFP4's, a power of two: the smallest that brings the block to target or below. Nothing saturates.

    source  2509.25149 appendix B
    """
    amax_b = block_amax(blocks)
    mantissa, exponent = torch.frexp(amax_b.clamp(min=2.0**-126))               # 0.5 <= mantissa < 1
    return power_of_two(exponent - 3 + (mantissa > target / 8), amax_b)


def e8m0_floor_scales(blocks, s_enc, target):
    """The same by the OCP specification of 2023: 2^(floor(log2(amax_b)) - 2). The block's largest magnitude
    lands in [4, 8), and saturates beyond 6."""
    amax_b = block_amax(blocks)
    _, exponent = torch.frexp(amax_b.clamp(min=2.0**-126))
    return power_of_two(exponent - 3, amax_b)


def power_of_two(exponent, amax_b):
    """E8M0's numbers: exponents from -127 to 127, and NaN."""
    scale = torch.ldexp(torch.ones_like(amax_b), exponent.clamp(-127, 127))
    return torch.where(amax_b < math.inf, scale, math.nan)


def four_or_six(blocks, s_enc, target, error):
    """Four over six: NVFP4's scale, or the one that brings the largest magnitude to 4 instead of 6, whichever
    leaves the smaller error; 6 where both are alike. Near 6 the grid is coarse, with nothing between 4 and 6;
    near 4 it is finer. The choice is made to nearest, also for an operand that is rounded stochastically.

    error   function of value - |x|, float64: a number for each block. In float64 the order in which it adds
            up decides nothing
    source  2512.02010. On unit Gaussians in 1x16 blocks 45 % choose 4, in 16x16 blocks 3 %: nothing is gained
    """
    magnitude, s_dec = blocks.float().abs(), s_enc.reciprocal()

    def left(scale):
        value, _ = e2m1(magnitude * encode_scale(scale, s_dec))
        return error(value.double() * scale * s_dec - magnitude)
    six = e4m3_scales(blocks, s_enc, target)
    four = e4m3_scales(blocks, s_enc, target * 4 / 6)
    return torch.where(left(four) < left(six), four, six)


def four_six_scales(blocks, s_enc, target):
    """By the mean square error of a block, the paper's choice."""
    return four_or_six(blocks, s_enc, target, lambda d: d.square().sum((1, 3), keepdim=True))


def four_six_mae_scales(blocks, s_enc, target):
    """By its mean absolute error."""
    return four_or_six(blocks, s_enc, target, lambda d: d.abs().sum((1, 3), keepdim=True))


def four_six_max_scales(blocks, s_enc, target):
    """By its largest error."""
    return four_or_six(blocks, s_enc, target, lambda d: d.abs().amax((1, 3), keepdim=True))


def eden_scales(a, value, scale, random):
    """MS-EDEN: codes are rounded to nearest, and what that takes from a block's length the scale gives back,
    rounded stochastically. Over rotations drawn at random the average is then x, with the small error of
    rounding to nearest.

    a, value, scale     (M, K/block, block) twice, and (M, K/block, 1): |x| in units of the scale, and rounded
    random              bytes for each element, of which two a block are used, or None: to nearest
    returns             scale * S in E4M3, as fp32, with S = <a, a> / <a, value>. Added up in float64, so that
                        the order decides nothing
    source  2601.22813, with a correction for each block as in its algorithm 1 (its code has one for each run)
    """
    a, value = a.double(), value.double()
    S = a.square().sum(-1, keepdim=True) / (a * value).sum(-1, keepdim=True)
    wanted = torch.where(scale > 0, scale * S, scale).float()                   # NaN stays too
    if random is None:
        return torch.clamp(wanted, max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    _, exponent = torch.frexp(wanted.clamp(min=2.0**-6))
    step = torch.ldexp(torch.ones_like(wanted), exponent - 4)                   # E4M3's: 8 to 15 of it
    random = random[..., :1].float() * 256 + random[..., 1:2]
    steps = torch.floor((torch.floor(wanted / step * 65536) + random) * (1 / 65536))
    return torch.clamp(steps * step, max=E4M3_MAX)


def no_scales(blocks, s_enc, target):
    """1: the scale of a row is all."""
    return torch.where(block_amax(blocks) < math.inf, 1.0, math.nan)


UNBIASED = E2M1_MAX * 16 / 17                       # rounding a scale to E4M3 can enlarge x / scale by 17/16

FORMATS = {f.name: f for f in (
    # 2509.25149; its unbiased target 2601.22813
    Format("nvfp4", 16, torch.float8_e4m3fn, e4m3_scales, top=E4M3_MAX, unbiased=UNBIASED, kernels=True),
    # 2512.02010: a block that chooses 4 has a scale of up to 3/2 times 256, which E4M3 holds
    Format("nvfp4_46", 16, torch.float8_e4m3fn, four_six_scales, top=256.0, unbiased=UNBIASED),
    Format("nvfp4_46_mae", 16, torch.float8_e4m3fn, four_six_mae_scales, top=256.0, unbiased=UNBIASED),
    Format("nvfp4_46_max", 16, torch.float8_e4m3fn, four_six_max_scales, top=256.0, unbiased=UNBIASED),
    # 2601.22813: the target with the least error for rounding to nearest with a corrected scale
    Format("ms_eden", 16, torch.float8_e4m3fn, e4m3_scales, top=256.0, unbiased=UNBIASED / 0.93,
           lands=UNBIASED / 0.93, correct=eden_scales),
    Format("mxfp4", 32, torch.float8_e8m0fnu, e8m0_scales, top=None, unbiased=E2M1_MAX),
    Format("mxfp4_floor", 32, torch.float8_e8m0fnu, e8m0_floor_scales, top=None, unbiased=None),
    # 2501.17116: an fp32 scale for each token and each output channel. Its codes are kept in blocks too.
    Format("e2m1_vector", 16, torch.float8_e8m0fnu, no_scales, top=1.0, unbiased=E2M1_MAX, by_row=True),
)}


# ---------------------------------------------------------------- randomness: Philox4x32-10
# Used twice: to draw a key for each operand of a layer in a micro-batch, and with it the operand's bytes.

MASK32 = 0xFFFFFFFF
PHILOX_BYTES = 16                                   # that a call gives: neighbours along a row share one


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011): 128 random bits from a 128-bit counter and a 64-bit key.

    Works on Python ints and on int64 tensors alike; every word is in [0, 2^32). A counter-based generator has
    no state: the same key and position give the same bits on any machine, in any order, on any number of
    ranks.
    """
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57   # 64-bit products; an int64's sign bit is masked off below
        c0, c1, c2, c3 = (((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32,
                          ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32)
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def stream_key(seed, step, micro_batch, layer, operand):
    """The Philox key of an operand of a GEMM in a micro-batch, two 32-bit words: ints, or int64 tensors.

    seed is the run's; micro_batch counts globally (micro_step * ranks + rank), so two ranks draw what one
    process with two micro-batches draws; operand is an index into OPERANDS, the six of a layer's GEMMs.
    """
    key = seed & MASK32, (seed >> 32) & MASK32
    return philox(step & MASK32, micro_batch & MASK32, layer, operand, *key)[:2]


def as_key(seed, device):
    """A 64-bit integer, or the (2,) int64 tensor of its two words, as that tensor."""
    if torch.is_tensor(seed):
        return seed
    refuse_capture(device, "an integer seed", "give as_key(seed, device), made before")         # part 3
    return torch.tensor([seed & MASK32, (seed >> 32) & MASK32], device=device)


def philox_at(key, index):
    """The four words of philox() at every counter in index, int64 of any shape."""
    zero = torch.zeros_like(index)
    return philox(index & MASK32, index >> 32, zero, zero, key[0], key[1])


def random_words(key, M, n):
    """Philox at the counters 0, 1, 2, ... of a matrix (M, n): 16 bytes each, as two int64, (M, n, 2)."""
    w = philox_at(key, torch.arange(M * n, device=key.device).view(M, n))
    return torch.stack([w[0] | w[1] << 32, w[2] | w[3] << 32], -1)


def random_bytes(key, x):
    """A uint8 for every element of x (M, K): (M, K/16, 16). The counter of 16 neighbours in a row is their
    position in the matrix, so no byte serves two elements. Of a transposed x they come four to an int32,
    (M, K/16, 4), for speed; round_blocks() takes either."""
    M, n = x.shape[0], x.shape[1] // PHILOX_BYTES
    if lies_transposed(x):
        return words_turned(key, M, n)
    return random_words(key, M, n).view(torch.uint8)                            # little-endian: w[0] first


# ---------------------------------------------------------------- the random Hadamard transform

# Drawn at random once, by TransformerEngine, and the same for every layer and step.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard(x, signs=SIGNS):
    """Rotate x (M, K) in runs of n = len(signs), a power of two, along K: v -> (v * signs) H_n / sqrt(n),
    where H_1 = [1] and H_2n = [[H_n, H_n], [H_n, -H_n]].

    Orthogonal, so (A H)(B H)^T = A B^T: it changes no product, but spreads an outlier over its whole run.
    Computed in fp32 in rounds that replace pairs at distance 1, 2, 4, ..., n / 2, in this order, by their sum
    and their difference; the result is rounded to x's dtype.
    source  2509.25149 section 4.2
    """
    signs = torch.as_tensor(signs, dtype=torch.float32, device=x.device)
    return rotate(x.unflatten(1, (-1, len(signs))), signs).flatten(1)


def rotate(runs, signs):
    """hadamard() of runs (M, K/n, n)."""
    v = [element.float() * signs[j] for j, element in enumerate(runs.unbind(-1))]
    distance = 1
    while distance < len(v):
        v = [v[j - distance] - v[j] if j & distance else v[j] + v[j + distance] for j in range(len(v))]
        distance *= 2
    return stack_last([w * len(v) ** -0.5 for w in v], runs).to(runs.dtype)


# ---------------------------------------------------------------- quantize

class Quantized(NamedTuple):
    """A quantized matrix (M, K): value = code * scale * s_dec. Blocks can be read off its shapes.

    codes   (M, K/2) uint8, two E2M1 codes a byte, the low nibble is the even column
    scales  (M/h, K/block) in the format's dtype; h = 1, or block for square blocks. Quantized on a GPU with
            FP4 units, as swizzle() orders them; unswizzle() undoes that (part 2)
    s_dec   () fp32; (M, 1) in a format with a scale for each row
    """
    codes: torch.Tensor
    scales: torch.Tensor
    s_dec: torch.Tensor

    @property
    def shape(self):
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def decode(self, dtype=torch.bfloat16):
        """code * scale, (M, K) in dtype, exact in bf16."""
        scales = scales_of_lines(unswizzle(self.scales, *self.shape).float(), len(self.codes))
        return unpack(self.codes, scales, dtype).flatten(1)

    def dequantize(self, dtype=torch.float32):
        """code * scale * s_dec, (M, K), rounded once to fp32 and, where asked, once more to dtype."""
        return (self.decode().float() * self.s_dec).to(dtype)


def scales_of_lines(scales, n_lines):
    """Block scales (M/h, K/block) for every one of M = n_lines lines: (M, K/block)."""
    return scales if len(scales) == n_lines else scales.repeat_interleave(n_lines // len(scales), 0)


class Decoded(NamedTuple):
    """The same matrix with codes and scales multiplied out, for chips without FP4 units: values = code *
    scale (M, K), exact in bf16; s_dec () or (M, 1) fp32, and as a number where that is known."""
    values: torch.Tensor
    s_dec: torch.Tensor
    s_dec_known: float | None = None

    @property
    def shape(self):
        return tuple(self.values.shape)

    def decode(self, dtype=torch.bfloat16):
        return self.values.to(dtype)

    dequantize = Quantized.dequantize


def quantize(x, format="nvfp4", square=False, stochastic=False, seed=0, amax=None, unbiased=False, signs=None,
             decode=None):
    """Quantize a matrix, in blocks along its last axis.

    x           (M, K) bf16, fp16 or fp32; K a multiple of the block (for square blocks M too)
    format      a key of FORMATS
    square      blocks of as many rows as columns
    stochastic  round stochastically with the key seed: a 64-bit integer, or its two words as (2,) int64
    amax        a number skips the search for the largest magnitude, which fixes the tensor scale; what
                exceeds it saturates
    unbiased    leave room for the rounding of the scale, so that stochastic rounding never saturates
    signs       (n,): rotate first in runs of n, by hadamard()
    decode      a dtype: give Decoded in it instead of codes
    returns     Quantized or Decoded
    error       mean square on unit Gaussians in nvfp4 9.0e-3 (nearest, 1x16), 12.4e-3 (16x16), 18.8e-3
                (stochastic), 23.5e-3 (stochastic, unbiased): tests/test_nvfp4.py, test_gaussian_mse
    source      2509.25149 appendix B
    raises      ValueError for a shape that does not divide into blocks
    """
    form = FORMATS[format]
    height, width = form.shape_of(square)
    check_matrix(x, height, width, format)
    if signs is not None:
        check_size("K", x.shape[1], len(signs), "the run of the rotation")
        x = hadamard(x, signs)
    blocks, scale, s_dec = blocks_and_scales(x, form, square, amax, unbiased)
    random = random_bytes(as_key(seed, x.device), x).reshape(*blocks.shape[:2], -1) if stochastic else None
    rounded, scale = round_blocks(blocks, scale, s_dec, random, decode, form.correct)
    rounded = rounded.reshape(x.shape)
    if decode is not None:
        return Decoded(rounded, s_dec)
    return Quantized(pack(rounded), scale[::height, :, 0].to(form.scale_dtype), s_dec)


def blocks_and_scales(x, form, square=False, amax=None, unbiased=False):
    """x (M, K) in blocks, (M, K/block, block), the scales of each row's, (M, K/block, 1), and s_dec; the
    arguments are quantize()'s."""
    height, width = form.shape_of(square)
    blocks = x.unflatten(1, (-1, width))
    amax = tensor_amax(x, amax if form.top else 1.0, form.by_row)
    scale, s_dec = find_scales(blocks.unflatten(0, (-1, height)), amax, form.scales, form.top,
                               form.target(unbiased))
    return blocks, lay_out_like(x, scale.expand(-1, height, -1, -1).flatten(0, 1)), s_dec


def tensor_amax(x, amax=None, by_row=False):
    """The number that fixes the tensor scale, () fp32 on x's device: given, or the largest magnitude; by_row
    that of each row, (M, 1)."""
    if amax is not None:
        return torch.full((), float(amax), device=x.device)
    if by_row:
        return x.abs().amax(1, keepdim=True).float()
    low, high = torch.aminmax(x.t() if lies_transposed(x) else x)               # as it lies in memory
    return torch.maximum(-low, high).float()


def pack(codes):
    """Codes (M, K) uint8, one a byte -> (M, K/2), two a byte, the low nibble first."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(codes, scales, dtype):
    """The reverse, times scales (M, K/block) fp32: code * scale (M, K/block, block) in dtype."""
    values, codes = [], codes.int()                 # bytes would not be vectorized
    for nibble in (codes & 15, codes >> 4):
        code = (nibble & 7).float()                 # the grid is the largest of three straight lines
        value = torch.maximum(torch.maximum(0.5 * code, code - 2), 2 * code - 8)
        values.append(torch.where(nibble > 7, -value, value))
    values = stack_last(values, codes).flatten(1)   # (M, K)
    return (values.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).to(dtype)


def check_matrix(x, height, width, format):
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be a floating-point matrix; reshape it")
    check_size("K", x.shape[1], width, f"{format} block")
    check_size("M", x.shape[0], height, f"{format} block")


def check_size(name, size, of, what):
    if size == 0:
        raise ValueError(f"{name}=0: an empty matrix cannot be quantized; leave it out")
    if size % of:
        raise ValueError(f"{name}={size} must be a multiple of {of} ({what}); pad the layer or leave it out "
                         "with --fp4_skip")


class Both(NamedTuple):
    """A matrix (M, N) as an operand of two GEMMs: rows (M, N) for the one that sums over N, columns (N, M)
    for the one that sums over M. Each is Quantized, Decoded or, where its GEMM stays in high precision, a
    tensor."""
    rows: Quantized | Decoded | torch.Tensor
    columns: Quantized | Decoded | torch.Tensor


def quantize_both(x, rows=None, columns=None):
    """x (M, N) for two GEMMs, quantized along its rows and along its columns; a GPU reads it once for both.

    rows, columns   keyword arguments of quantize(), or None: that GEMM takes x as it is
    returns         Both: of x and of x^T, filled up with zeros, which add nothing to a sum
    """
    x_t = (x if columns is None else fill_up(x, 0, -len(x) % whole(columns))).t()
    return Both(x if rows is None else quantize(x, **rows),
                x_t if columns is None else quantize(x_t, **columns))


def fill_up(x, columns, rows=0):
    """x with so many columns and rows of zeros more, which add nothing to a sum."""
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x


def whole(how):
    """What a matrix's K must be a multiple of to be quantized so: of blocks, and of runs of the rotation."""
    return max(FORMATS[how["format"]].block, 1 if how["signs"] is None else len(how["signs"]))


def matmul(a, b, dtype=torch.float32, ends=None):
    """a (M, K) @ b (N, K)^T -> (M, N) in dtype; both quantized, or both in high precision.

    ends    (E,) int32: a product for each of E experts, see grouped()
    error   the order of fp32 accumulation only: 1e-5 relative to float64, test_matmul_is_exact_products
    """
    if torch.is_tensor(a):
        return grouped(F.linear, a, b.to(a.dtype), ends).to(dtype)              # w may be an fp32 master
    y = grouped(F.linear, a.decode(torch.float32), b.decode(torch.float32), ends)   # part 2 has faster ways
    return (y * scale_of_product(a.s_dec, b.s_dec, ends)).to(dtype)


def scale_of_product(a, b, ends):
    """What the product of two quantized matrices is multiplied by: () or, with scales of rows, a number for
    each of its elements. a: s_dec () or (M, 1); b: () or (N, 1), of experts' weights (E, N, 1)."""
    if b.dim() < 3:
        return a * b.t()
    a = a if a.dim() else a.expand(int(ends[-1]), 1)
    return grouped(lambda s, t: s * t.mT, a, b, ends)


def grouped(product, a, b, ends):
    """product(a, b), or one for each of E experts, whose tokens are sorted: those of expert e end at ends[e].

    a (M, K), b (E, N, K)   tokens are rows of a, and meet their expert's b: (M, N)
    a (N, M), b (K, M)      tokens are summed, expert by expert: (E, N, K)
    """
    if ends is None:
        return product(a, b)
    spans = list(itertools.pairwise([0, *ends.tolist()]))
    if b.dim() == 3:
        return torch.cat([product(a[i:j], b_e) for b_e, (i, j) in zip(b, spans, strict=True)])
    return torch.stack([product(a[:, i:j], b[:, i:j]) for i, j in spans])


# ---------------------------------------------------------------- recipes

GEMMS = ("fprop", "dgrad", "wgrad")
OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")


@dataclass(frozen=True)
class FP4Config:
    format: str = "nvfp4"                           # number format, a key of FORMATS
    backward_format: str | None = None              # of dy, and of wgrad's x; None: format
    gemms: tuple[str, ...] = GEMMS                  # which GEMMs of a layer run in FP4: fprop,dgrad,wgrad
    stochastic: tuple[str, ...] = ("dgrad.dy", "wgrad.dy")  # operands rounded stochastically
    unbiased: bool = False                          # stochastic operands leave room for rounding the scale
    hadamard: tuple[str, ...] = ()                  # GEMMs whose operands are rotated along the summed axis
    hadamard_size: int = 16                         # of the rotation: runs of 16, 32 or 128
    signs: str = "fixed"                            # of the rotation: fixed, none (all +1), fresh (each step)
    square_weights: bool = True                     # square blocks: one quantized weight for fprop and dgrad
    reuse_codes: bool = False                       # dgrad's w and wgrad's x are what fprop's codes stand for
    dge_k: float | None = None                      # gradient estimator of weights: exponent, 5; None: off
    dge_clip: float = 3.0                           # its largest slope
    occ: float | None = None                        # clamp a token's outliers: quantile, 0.99; None: off
    occ_compensate: bool = True                     # and add their product in high precision
    input_amax: float | None = None                 # fixed tensor scale of activations; None: measured
    weight_amax: float | None = None                # the same for weights
    grad_amax: float | None = None                  # the same for output gradients
    e5m2: tuple[str, ...] = ()                      # GEMMs that take the output gradient in FP8: dgrad,wgrad
    until: float | None = None                      # part of training after which GEMMs leave FP4; None: none
    switched: tuple[str, ...] = GEMMS               # the GEMMs that do
    head_blocks: int = 0                            # first blocks of the model kept in high precision
    tail: float = 0.0                               # last fraction of its blocks kept in high precision
    skip: tuple[str, ...] = ("head", "*router*")    # names of linear layers kept in high precision, as globs

    def __post_init__(self):
        for name, allowed in (("gemms", GEMMS), ("stochastic", OPERANDS), ("hadamard", GEMMS),
                              ("switched", GEMMS), ("e5m2", GEMMS[1:]),
                              ("format", FORMATS), ("backward_format", (None, *FORMATS)),
                              ("hadamard_size", (16, 32, 128)), ("signs", ("fixed", "none", "fresh"))):
            value = getattr(self, name)
            for word in value if isinstance(value, tuple) else (value,):
                if word not in allowed:
                    raise ValueError(f"fp4_{name}={word} must be of {', '.join(map(str, allowed))}")
        for name in ("input_amax", "weight_amax", "grad_amax"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"fp4_{name}={value} must be a positive number, or None to measure it")
        for gemm_name in set(self.e5m2) & set(self.gemms):
            raise ValueError(f"fp4_e5m2={gemm_name} must not be in FP4; take it out of fp4_gemms")
        if self.until is not None and not 0 <= self.until < 1:
            raise ValueError(f"fp4_until={self.until} must be in [0, 1), or None for never")
        if not 0 <= self.tail <= 1:
            raise ValueError(f"fp4_tail={self.tail} must be in [0, 1]")
        if self.head_blocks < 0:
            raise ValueError(f"fp4_head_blocks={self.head_blocks} must be >= 0")
        if self.dge_k is not None and not self.dge_k >= 1 or not self.dge_clip > 0:
            raise ValueError(f"fp4_dge_k={self.dge_k} must be 1 or more, and fp4_dge_clip={self.dge_clip} "
                             "positive")
        if self.occ is not None and not 0.5 < self.occ <= 1:
            raise ValueError(f"fp4_occ={self.occ} must be a quantile in (0.5, 1]")
        FORMATS[self.format].shape_of(self.square_weights)
        for format in self.formats:
            FORMATS[format].target(self.unbiased)

    @property
    def clamps(self):
        """Whether OCC is on, which goes with a quantized activation."""
        return self.occ is not None and "fprop" in self.gemms

    @property
    def estimates(self):
        """Whether DGE is on, which goes with a quantized weight."""
        return self.dge_k is not None and "fprop" in self.gemms

    @property
    def formats(self):
        """The names of the forward's and the backward's."""
        return self.format, self.backward_format or self.format

    @property
    def whole_channels(self):
        """What a layer's N is filled up to a multiple of: blocks and, where dgrad is rotated, its runs."""
        blocks = [FORMATS[format].block for format in self.formats]
        return max(*blocks, self.hadamard_size if "dgrad" in self.hadamard else 1)

    def without(self, gemms):
        """The same recipe with these GEMMs in high precision."""
        gemms, e5m2 = (tuple(gemm_name for gemm_name in names if gemm_name not in gemms)
                       for names in (self.gemms, self.e5m2))
        return replace(self, gemms=gemms, e5m2=e5m2)

    def operand(self, name, keys, signs=None, result=None, experts=False):
        """What the recipe gives one of OPERANDS: keyword arguments of quantize(), or None where that GEMM
        stays in high precision.

        keys    (6, 2) int64, layer_keys()
        signs   (hadamard_size,) of the rotation, where they are at hand
        result  dtype of the GEMM's result: a chip without FP4 units wants its operands Decoded; None: packed
                on any chip, as what is kept for the backward
        experts whether it is a grouped GEMM, which is not done on packed operands here
        """
        gemm_name, matrix = name.split(".")
        if gemm_name not in self.gemms:
            return None
        stochastic = name in self.stochastic
        if gemm_name not in self.hadamard:
            signs = None
        elif signs is None or self.signs == "fresh":
            signs = rotation_signs(self.signs, gemm_name, keys, self.hadamard_size)
        square = matrix == "w" and self.square_weights
        forward, backward = self.formats
        format = forward if gemm_name == "fprop" or square else backward        # square: one weight for both
        decode = None if result is None else decoded_dtype(keys.device, format, result, experts)
        return {"format": format, "square": square,
                "stochastic": stochastic, "seed": keys[OPERANDS.index(name)],
                "amax": {"x": self.input_amax, "w": self.weight_amax, "dy": self.grad_amax}[matrix],
                "unbiased": stochastic and self.unbiased, "signs": signs,
                "decode": decode}


def rotation_signs(signs, gemm_name, keys, size=16):
    """The signs (size,), fp32, of a GEMM's rotation, which are the same for both its operands. Fixed ones of
    another size than SIGNS are drawn too, with the key 0."""
    if signs == "none":
        return torch.ones(size, device=keys.device)
    if signs == "fixed" and size == len(SIGNS):
        return torch.tensor(SIGNS, dtype=torch.float32, device=keys.device)
    key = torch.zeros_like(keys[0])
    if signs == "fresh":                            # the key of w, for a whole step, or of dy
        key = keys[OPERANDS.index("wgrad.dy" if gemm_name == "wgrad" else f"{gemm_name}.w")]
    words = torch.stack(philox(0, 0, 1, 0, key[0], key[1]))     # random_bytes() never has a 1 there
    bits = words[:, None] >> torch.arange(32, device=keys.device) & 1
    return 1.0 - 2.0 * bits.flatten()[:size]


RECIPES = {
    "bf16": FP4Config(gemms=()),
    # Both of the next keep the defaults: square weights, and stochastic rounding of gradients alone.
    # 2605.06067 table 2: no rotation, no tensor scale. nGPT keeps rows of weights and inputs at norm 1, so
    # that no element exceeds 1; gradients have no such bound and keep their measured scale, as in the paper's
    # released scripts.
    "ngpt": FP4Config(input_amax=1.0, weight_amax=1.0),
    # 2509.25149 section 4: rotated wgrad operands, the last 15 % of layers in BF16. The measured scale of an
    # activation looks at all its tokens, so that a token's output depends, in the last bits, on the tokens
    # after it; the fixed scale of "ngpt" does not.
    "nvfp4": FP4Config(hadamard=("wgrad",), tail=0.15),
    # 2512.02010, four over six, in the forward alone. The paper has it for gradients too, where it chooses by
    # errors of rounding at random; that is biased (2601.22813 section 4.2).
    "nvfp4_46": FP4Config(format="nvfp4_46", backward_format="nvfp4", hadamard=("wgrad",), tail=0.15),
    # The same as "nvfp4" in MXFP4, with which 2509.25149 compares, rotated in runs of its block.
    "mxfp4": FP4Config(format="mxfp4", hadamard=("wgrad",), hadamard_size=32, tail=0.15),
    # 2501.17116: scales of tokens and output channels, outliers clamped and compensated, dw by DGE. Gradients
    # stay in BF16, and so do the GEMMs of the backward, which multiply them with the 4-bit values. In the
    # paper's code they are in FP8, of which its text says nothing: e5m2=("dgrad", "wgrad").
    "fp4_dge_occ": FP4Config(format="e2m1_vector", gemms=("fprop",), stochastic=(), square_weights=False,
                             reuse_codes=True, dge_k=5.0, occ=0.99),
    # 2601.22813: four over six in the forward; in the backward MS-EDEN for all four operands, with a rotation
    # drawn anew, of x and w as the forward's codes have them. So no square weights and no layers in BF16.
    "quartet2": FP4Config(format="nvfp4_46", backward_format="ms_eden", square_weights=False,
                          reuse_codes=True, stochastic=("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"),
                          hadamard=("dgrad", "wgrad"), hadamard_size=128, signs="fresh"),
    # 2505.19115: no rotation; beside gradients the activation of wgrad is rounded stochastically. The
    # paper ends with a short phase whose backward is in BF16: until=..., switched=("dgrad", "wgrad").
    "fp4_all_the_way": FP4Config(square_weights=False, stochastic=("dgrad.dy", "wgrad.dy", "wgrad.x")),
    # 2510.27527, TetraJet-v2, its aligned backward alone: of x and w as the forward's codes have them, all of
    # it rounded stochastically, rotated with signs that are drawn anew, as in its code. Missing are scales of
    # 1x128 blocks in place of the tensor's, OsciReset, which stops weights from swinging between two codes,
    # and OutControl, a tenth of the activation's channels in MXFP8.
    "tetrajet2": FP4Config(square_weights=False, reuse_codes=True,
                           stochastic=("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"),
                           hadamard=("dgrad", "wgrad"), signs="fresh"),
    # 2605.09825 section 4: nothing is random. All is rounded to nearest, wgrad's operands are rotated without
    # signs, and no block is kept in BF16.
    "mxfp4_h16": FP4Config(format="mxfp4", stochastic=(), hadamard=("wgrad",), signs="none"),
}


def recipe_changes(cfg):
    """{field: value} where a recipe differs from the defaults of FP4Config."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}


def describe_operand(cfg, name):
    """What a recipe gives one of OPERANDS, in words; None: high precision."""
    how = cfg.operand(name, torch.zeros(len(OPERANDS), 2, dtype=torch.int64))
    of_codes = ["of fprop's codes"] * (cfg.reuse_codes and name in ("dgrad.w", "wgrad.x"))
    if how is None:
        if name in [f"{gemm_name}.dy" for gemm_name in cfg.e5m2]:
            return "FP8 E5M2"
        return ", ".join(["high precision", *of_codes]) if of_codes else None
    form = FORMATS[how["format"]]
    words = of_codes + [form.name] * (form.name != cfg.format)
    words += ["stochastic" if how["stochastic"] else "nearest",
              "a row" if form.by_row else "%dx%d" % form.shape_of(how["square"])]
    words += ["unbiased"] * how["unbiased"]
    if how["signs"] is not None:
        words.append("rotated" if len(how["signs"]) == len(SIGNS) else f"rotated by {len(how['signs'])}")
    if form.top is not None and how["amax"] is not None:
        words.append(f"amax = {how['amax']:g}")
    return ", ".join(words)


# ---------------------------------------------------------------- the three GEMMs of a linear layer
# x (M, K) of M tokens, w (N, K) and dy (M, N) come as Both: quantized along rows and along columns.
# In a layer of E experts the tokens are sorted by expert, and each one's begin at a multiple of any block: so
# all are quantized as one matrix, and w as (E N, K), and only the products are made expert by expert, which
# end at ends.

def fprop(x, w, dtype, ends=None):
    """y = x w^T (M, N): sums over K, the input channels.

    x.rows      (M, K)   fprop.x    nearest; nGPT: amax = 1
    w.rows      (N, K)   fprop.w    nearest, square blocks; nGPT: amax = 1
    """
    return matmul(x.rows, w.rows, dtype, ends)


def dgrad(dy, w, dtype, ends=None):
    """dx = dy w (M, K): sums over N, the output channels.

    dy.rows     (M, N)   dgrad.dy   stochastic, for the error of a gradient must average out
    w.columns   (K, N)   dgrad.w    the same square blocks turned over: backward and forward see one weight
    """
    return matmul(dy.rows, w.columns, dtype, ends)


def wgrad(dy, x, dtype, ends=None):
    """dw = dy^T x (N, K): sums over M, the tokens. In the fp32 of the master weight, because micro-batches
    and ranks are summed.

    dy.columns  (N, M)   wgrad.dy   stochastic; NVIDIA: rotated
    x.columns   (K, M)   wgrad.x    nearest; NVIDIA: rotated by the same signs; nGPT: amax = 1
    """
    return matmul(dy.columns, x.columns, dtype, ends)


EXPERT_TOKENS = 32                                  # an expert's tokens begin at a multiple of it


# ---------------------------------------------------------------- forward and backward

class FP4Function(torch.autograd.Function):
    """The layer for autograd: fprop in the forward, dgrad and wgrad in the backward. What is kept of x in
    between is x.columns, or x.rows where those are made of it: 4.5 bits a value where that GEMM is in FP4."""

    @staticmethod
    def forward(ctx, x, w, quantized_w, keys, signs, cfg, ends):
        """y (M, N) of x (M, K) and the master weight w (N, K), with Both of w; the rest as in FP4Linear."""
        needs_dw, experts, N = ctx.needs_input_grad[1], ends is not None, w.shape[-2]
        for_wgrad, result = None, x.dtype
        if needs_dw and cfg.reuse_codes:
            result = None                           # packed, to be kept
        elif needs_dw:
            for_wgrad = cfg.operand("wgrad.x", keys, signs)
        quantized_x = quantize_both(x, cfg.operand("fprop.x", keys, signs, result, experts), for_wgrad)
        kept = quantized_x.rows if cfg.reuse_codes else quantized_x.columns
        ctx.cfg, ctx.w_dtype, ctx.padding = cfg, w.dtype, quantized_w.rows.shape[-2] - N
        save(ctx, keys, signs, ends, quantized_w.columns, kept if needs_dw else None)
        y = fprop(quantized_x, quantized_w, x.dtype, ends)
        return y[:, :N].contiguous() if ctx.padding else y

    @staticmethod
    def backward(ctx, dy):
        """dy (M, N) -> dx (M, K), dw (N, K)"""
        keys, signs, ends, w_columns, x_columns = saved(ctx)
        cfg, experts, (needs_dx, needs_dw, *_) = ctx.cfg, ends is not None, ctx.needs_input_grad
        for_dgrad = cfg.operand("dgrad.dy", keys, signs, dy.dtype, experts) if needs_dx else None
        for_wgrad = cfg.operand("wgrad.dy", keys, signs, ctx.w_dtype, experts) if needs_dw else None
        dy = fill_up(dy, ctx.padding)
        quantized_dy = quantize_both(dy, for_dgrad, for_wgrad)
        if cfg.e5m2:
            rounded = e5m2(dy)
            quantized_dy = Both(rounded if "dgrad" in cfg.e5m2 else quantized_dy.rows,
                                rounded.t() if "wgrad" in cfg.e5m2 else quantized_dy.columns)
        if needs_dw and cfg.reuse_codes:
            for_x = cfg.operand("wgrad.x", keys, signs, ctx.w_dtype, experts)
            x_columns = from_codes(x_columns, for_x, dy.dtype)
        dx = dgrad(quantized_dy, Both(None, w_columns), dy.dtype, ends) if needs_dx else None
        dw = wgrad(quantized_dy, Both(None, x_columns), ctx.w_dtype, ends) if needs_dw else None
        if needs_dw and ctx.padding:
            dw = dw[..., :-ctx.padding, :]
        return dx, dw, None, None, None, None, None


def from_codes(rows, how, dtype):
    """A matrix, quantized along its rows, as the operand along its columns that its 4-bit values make, which
    is quantized once more or, without how, left in dtype.

    source  2601.22813 section 4, 2510.27527: the gradient at the weights and inputs that the forward had
    """
    return quantize_both(rows if torch.is_tensor(rows) else rows.dequantize(dtype), None, how).columns


# ---------------------------------------------------------------- what 2501.17116 puts before and after

def e5m2(dy):
    """A gradient as FP8 E5M2 has it, in its own dtype: by a power of two its largest magnitude comes as close
    to E5M2's, 57344 = 0.875 * 2^16, as it can from below.

    source  2501.17116's code; its text is silent, and the scale is our choice
    """
    amax = tensor_amax(dy)
    mantissa, exponent = torch.frexp(amax)          # 0.5 <= mantissa < 1
    scale = power_of_two(15 - exponent + (mantissa <= 0.875), amax)
    return ((dy.float() * scale).to(torch.float8_e5m2).float() / scale).to(dy.dtype)


def split_outliers(x, quantile):
    """OCC, outlier clamping and compensation: x (M, K) in two, clamped to two quantiles of each token, and
    the rest, which is zero but for 2 (1 - quantile) of it. The first is quantized; y gets the product of the
    second in high precision (here a dense one).

    source  2501.17116 section 3.3; quantiles of tokens as in its code, so that none sees a later one
    """
    K = x.shape[1]
    rank = round(quantile * (K - 1))
    ordered = x.sort(1).values
    clamped = x.clamp(ordered[:, K - 1 - rank, None], ordered[:, rank, None])
    return clamped, x - clamped


class ClampOutliers(torch.autograd.Function):
    """x without its outliers; the gradient is that of all of x."""

    @staticmethod
    def forward(ctx, x, quantile):
        return split_outliers(x, quantile)[0]

    @staticmethod
    def backward(ctx, dx):
        return dx, None


class EstimateGradient(torch.autograd.Function):
    """DGE, the differentiable gradient estimator: w (N, K) or (E, N, K) itself, but dw is multiplied by the
    slope of a smooth curve through the steps of its rounding.

    source  2501.17116 section 3.2
    """

    @staticmethod
    def forward(ctx, w, keys, cfg):
        ctx.save_for_backward(w, keys)
        ctx.cfg = cfg
        return w.view_as(w)

    @staticmethod
    def backward(ctx, dw):
        w, keys = ctx.saved_tensors
        rows = fill_up(w, 0, -w.shape[-2] % ctx.cfg.whole_channels)
        slope = dge_slope(rows, ctx.cfg.operand("fprop.w", keys), ctx.cfg.dge_k, ctx.cfg.dge_clip)
        return dw * slope[..., :w.shape[-2], :], None, None


def dge_slope(w, how, k, clip):
    """The slope for a weight that is quantized by how, arguments of quantize(): fp32 of w's shape. With u in
    [-1, 1] the place of w, in units of its scale, between two codes:

    value   f'(u) = 1/k |u|^(1/k - 1), at most clip: 1/k next to a code, most where rounding jumps
    """
    form = FORMATS[how["format"]]
    rows = w.float().flatten(0, -2)                 # of all experts
    blocks, scale, s_dec = blocks_and_scales(rows, form, how["square"], how["amax"], how["unbiased"])
    a = torch.clamp(blocks.abs() * encode_scale(scale, s_dec), max=E2M1_MAX)
    steps = a * torch.where(a < 2, 2.0, torch.where(a < 4, 1.0, 0.5))
    u = 2 * (steps - torch.floor(steps)) - 1
    return torch.clamp(u.abs() ** (1 / k - 1) / k, max=clip).reshape(w.shape)


# ---------------------------------------------------------------- the layer

def layer_keys(seed, step, micro_batch, layer):
    """The Philox keys of a layer's six operands in one micro-batch, (6, 2) int64; of n layers, given as a
    tensor (n, 1), (n, 6, 2).

    Weights get the key of micro-batch 0: they are quantized once a step, alike on every rank.
    """
    micro = torch.tensor([0 if name.endswith(".w") else micro_batch for name in OPERANDS])
    operand, layer = torch.arange(len(OPERANDS)), torch.as_tensor(layer)
    return torch.stack(torch.broadcast_tensors(*stream_key(seed, step, micro, layer, operand)), -1)


class FP4Linear(torch.nn.Linear):
    """nn.Linear whose GEMMs run in a 4-bit format; same parameters and state_dict. convert() makes them, also
    from a subclass for E experts: weight (E, N, K), and forward(x, ends) as grouped() describes it, each ends
    a multiple of the block. Any N will do: it is filled up with zeros.

    The fp32 master weight is quantized when it has changed, once per optimizer step, and serves every
    micro-batch. Changes through weight.data, or by a CUDA graph that is replayed, go unnoticed until set_step
    opens another step or an optimizer is called.
    """

    fp4 = True                                      # False: high precision for now, see high_precision()
    quantized = None                                # the weight as Both
    drawn = None                                    # (seed, step) that the keys belong to; None: to no step
    version = None                                  # the weight behind quantized, and its version (part 3)
    hooked = False                                  # a hook before the model looks after it (part 3)

    def __init__(self, linear, cfg, index=0):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.plain_forward = linear.weight, linear.bias, type(linear).forward
        self.cfg, self.index = cfg, index           # index: which linear layer, for the random stream
        # no buffers: DistributedDataParallel would overwrite them with the first rank's
        self.keys = layer_keys(0, 0, 0, index)
        if not linear.weight.is_meta:               # the keys of a model without memory wait for its device
            self.keys = self.keys.to(linear.weight.device)
        self.signs = rotation_signs("none" if cfg.signs == "none" else "fixed", None, self.keys,
                                    cfg.hadamard_size)
        check_layer(self, cfg)

    @property
    def padding(self):
        """With how many zero channels N is filled up to whole blocks."""
        return -self.out_features % self.cfg.whole_channels

    def quantize_weight(self):
        """The weight as Both, as the recipe wants fprop.w and dgrad.w."""
        experts = self.weight.dim() == 3
        w = fill_up(self.weight.detach(), 0, self.padding).flatten(0, -2)
        for_fprop, for_dgrad = (self.cfg.operand(name, self.keys, self.signs, torch.bfloat16, experts)
                                for name in ("fprop.w", "dgrad.w"))
        both = quantize_both(w, for_fprop, None if self.cfg.reuse_codes else for_dgrad)
        if self.cfg.reuse_codes:
            both = both._replace(columns=from_codes(both.rows, for_dgrad, w.dtype))
        return by_expert(both, len(self.weight)) if experts else both

    def forward(self, x, ends=None):
        if not self.fp4 or x.numel() == 0:
            return self.plain_forward(self, x, *([] if ends is None else [ends]))
        refresh_unless_hooked(self)                 # quantize_weight() where the weight has changed (part 3)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            rows, w = x.reshape(-1, self.in_features), self.weight
            inside = ClampOutliers.apply(rows, self.cfg.occ) if self.cfg.clamps else rows
            if self.cfg.estimates:
                w = EstimateGradient.apply(w, self.keys, self.cfg)
            y = FP4Function.apply(inside, w, self.quantized, self.keys, self.signs, self.cfg, ends)
            if self.cfg.clamps and self.cfg.occ_compensate:
                y = y + matmul((rows - inside).detach(), self.weight.detach(), y.dtype, ends)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.cfg.format}, gemms={','.join(self.cfg.gemms)}"


def by_expert(w, E):
    """Both of E experts' weights, (E N, K) and (K, E N), as grouped() takes them: (E, N, K) and (E, K, N)."""
    def shaped(operand, view, view_scales):
        if torch.is_tensor(operand):
            return view(operand)
        s_dec = view_scales(operand.s_dec) if operand.s_dec.dim() else operand.s_dec
        return operand._replace(values=view(operand.values), s_dec=s_dec)
    return Both(shaped(w.rows, lambda t: t.unflatten(0, (E, -1)), lambda t: t.unflatten(0, (E, -1))),
                shaped(w.columns, lambda t: t.unflatten(1, (E, -1)).transpose(0, 1),
                       lambda t: t.expand(E, *t.shape)))


def check_layer(layer, cfg):
    """raises ValueError where a layer's K does not divide into blocks, or into runs of the rotation."""
    check_size("K", layer.in_features, FORMATS[cfg.format].block, f"{cfg.format} block")
    if "fprop" in cfg.hadamard:
        check_size("K", layer.in_features, cfg.hadamard_size, "fp4_hadamard_size")
    if layer.weight.dim() == 3 and "wgrad" in cfg.hadamard and cfg.hadamard_size > EXPERT_TOKENS:
        raise ValueError(f"fp4_hadamard_size={cfg.hadamard_size} must be {EXPERT_TOKENS} at most where there "
                         "are experts: wgrad would mix the tokens of two; or leave them out with --fp4_skip")


def fp4_layers(model):
    return [m for m in model.modules() if isinstance(m, FP4Linear)]


def set_step(model, seed, step, micro_batch=0):
    """Give every FP4 layer its random keys for one micro-batch, which counts over all ranks of a step.
    Weights that have changed are quantized here already, so that compiled parts of a model find them when
    they are called by themselves."""
    layers = fp4_layers(model)
    if layers:
        keys = layer_keys(seed, step, micro_batch, torch.tensor([m.index for m in layers])[:, None])
        for m in layers:
            m.keys, m.drawn = m.keys.to(m.weight.device), (seed, step)
        for device in {m.weight.device for m in layers}:                        # in place, for CUDA graphs
            here = [i for i, m in enumerate(layers) if m.weight.device == device]
            there = keys[here].to(device, non_blocking=True)
            torch._foreach_copy_([layers[i].keys for i in here], list(there))
        refresh_weights(model)


def switch_late(model, done):
    """Late switch: where done, the part of training that is over, has reached a layer's cfg.until, its
    cfg.switched GEMMs run in high precision from now on. Returns whether that is news to a layer.

    source  2509.25149 section 5: all of them, or fprop alone, shortly before the learning rate decays;
            2505.19115: dgrad and wgrad, for a short phase at the end
    """
    news = False
    for m in fp4_layers(model):
        left = m.cfg.without(m.cfg.switched)
        if m.cfg.until is not None and done >= m.cfg.until and left != m.cfg:
            m.cfg, news = left, True
    return news


class high_precision:
    """Context: these GEMMs of the model's FP4 layers run in high precision; all of them for an evaluation
    beside FP4. Weights that were quantized before serve again after it."""

    def __init__(self, model, gemms=GEMMS):
        self.layers, self.gemms = fp4_layers(model), gemms

    def __enter__(self):
        self.before = [(m.fp4, m.cfg, m.quantized, m.version) for m in self.layers]
        for m in self.layers:
            left = m.cfg.without(self.gemms)
            if not left.gemms:
                m.fp4 = False
            elif left != m.cfg:
                m.cfg, m.quantized, m.version = left, None, None

    def __exit__(self, *_):
        for m, before in zip(self.layers, self.before, strict=True):
            m.fp4, m.cfg, m.quantized, m.version = before


def convert(model, cfg, report=print):
    """Replace, in place, the model's nn.Linear layers by FP4Linear where the policy of cfg lets it.

    Blocks are numbered by the first integer in a layer's name (blocks.7.mixer.out is in block 7). Parameters
    stay the same objects under the same names. Prints one line: how many were converted, and which were not
    and why.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if "" in linears:
        raise ValueError("the model is itself a linear layer; use FP4Linear(model, cfg)")
    if not cfg.gemms:
        report(f"converted 0/{len(linears)} linears: no GEMM is set to run in FP4")
        return model
    number = {name: int(re.search(r"\d+", name).group()) for name in linears if re.search(r"\d+", name)}
    n_blocks = max(number.values(), default=-1) + 1
    tail_from = n_blocks - round(cfg.tail * n_blocks)
    kept, converted = {}, {}
    for index, (name, linear) in enumerate(linears.items()):
        block = number.get(name)
        if any(fnmatch.fnmatch(name, glob) for glob in cfg.skip):
            kept.setdefault("skip", []).append(name)
        elif block is not None and block < cfg.head_blocks:
            kept.setdefault("head blocks", []).append(name)
        elif block is not None and block >= tail_from:
            kept.setdefault("tail", []).append(name)
        else:
            converted[linear] = FP4Linear(linear, cfg, index)
    for name, module in list(model.named_modules(remove_duplicate=False)):     # one layer under two names too
        if module in converted:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, converted[module])
    hook_weights(model)                             # quantized before the forward of the model (part 3)
    line = f"converted {len(converted)}/{len(linears)} linears to {cfg.format} ({','.join(cfg.gemms)})"
    for why, names in kept.items():
        line += f"; {why}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} in high precision"
    report(line)
    return model


# ---------------------------------------------------------------- a tour: python nvfp4.py

def walk(numbers):
    """The given numbers through NVFP4, step by step, as text: the page to show in front of a class."""
    form = FORMATS["nvfp4"]
    x = torch.tensor(numbers, dtype=torch.float32)[None]
    x = F.pad(x, (0, -x.shape[1] % form.block))
    q, amax = quantize(x, form.name), tensor_amax(x)
    y = q.dequantize()
    s_enc, s_dec = (float(s) for s in tensor_scales(amax, form.top))
    lines = [f"tensor   amax {float(amax):.8g}    s_enc = {form.top:g} * 6 / amax = {s_enc:.8g}    "
             f"s_dec = 1 / s_enc = {s_dec:.8g}"]
    for i, number in enumerate(numbers):
        b, scale = i // form.block, q.scales[0, i // form.block].float()
        if i % form.block == 0:
            amax_b, bits = x[0, i:i + form.block].abs().amax(), f"{int(q.scales.view(torch.uint8)[0, b]):08b}"
            lines += ["", f"block {b}  amax {float(amax_b):.8g}    amax * s_enc / 6 = "
                      f"{amax_b * (s_enc / 6):.8g}    as E4M3 {float(scale):.8g} = "
                      f"{bits[0]} {bits[1:5]} {bits[5:]}",
                      f"{'x':>13s} {'x / (scale s_dec)':>18s} {'bits':>7s} {'code':>6s} {'value':>13s} "
                      f"{'error':>10s}   at random instead"]
        scaled = float(x[0, i] * torch.clamp(1 / (scale * s_dec), max=FLT_MAX))
        code = int(q.codes[0, i // 2] >> 4 * (i % 2)) & 15
        number_of = math.copysign(E2M1_VALUES[code & 7], 0.5 - (code >> 3))
        outcomes, _ = e2m1(torch.full((256,), abs(scaled)), torch.arange(256))  # of all random bytes
        ups = int((outcomes > outcomes[0]).sum())
        odds = f"{outcomes[0]:g}" + (f", or {outcomes[-1]:g} in {ups} of 256" if ups else "")
        lines.append(f"{number:13.7g} {scaled:18.7g} {code >> 3:2b} {code >> 1 & 3:02b} {code & 1:b} "
                     f"{number_of:6g} {float(y[0, i]):13.7g} {float(y[0, i] - x[0, i]):10.2e}   {odds}")
    noise, signal = (float(t.square().sum()) for t in (y - x, x))
    snr = f"SNR {10 * math.log10(signal / noise):.1f} dB" if noise > 0 else f"error {noise:g}"
    return "\n".join([*lines, "", snr])


def error_table():
    """{(format, case): mean square error} of quantizing unit Gaussians, 2048 x 4096."""
    x, table = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0)), {}
    for name, form in FORMATS.items():
        row = "a row" if form.by_row else "%dx%d" % form.shape_of(False)
        cases = {f"nearest, {row}": {}}
        if form.squares:
            cases["nearest, %dx%d" % form.shape_of(True)] = {"square": True}
        cases[f"stochastic, {row}"] = {"stochastic": True}
        if form.unbiased not in (None, form.lands):
            cases[f"stochastic, {row}, unbiased"] = {"stochastic": True, "unbiased": True}
        for case, choices in cases.items():
            table[name, case] = float((quantize(x, name, **choices).dequantize() - x).square().mean())
    return table


def main(argv):
    if argv and argv != ["--json"]:
        try:
            print(walk([float(number) for number in argv]))
        except ValueError:
            sys.exit(f"nvfp4.py takes numbers, --json or nothing, not {' '.join(argv)}")
        return
    errors = error_table()
    recipes = {recipe: {name: describe_operand(cfg, name) for name in OPERANDS}
               for recipe, cfg in RECIPES.items()}
    if argv:
        formats = {name: {"block": form.block, "bits": form.bits, "tensor_scale": form.top is not None,
                          "mse": {case: error for (of, case), error in errors.items() if of == name}}
                   for name, form in FORMATS.items()}
        print(json.dumps({"capability": capability(), "formats": formats, "recipes": recipes}))
        return
    print("codes  ", "  ".join(f"{c:4d}" for c in range(8)), "   (8..15: the same, negative)")
    print("values ", "  ".join(f"{v:4.1f}" for v in E2M1_VALUES))
    print("\nmean square error on unit Gaussians (2048 x 4096)")
    for (name, case), error in errors.items():
        print(f"  {name:12s} {FORMATS[name].bits:.2f} bits  {case:30s} {error:.2e}   "
              f"SNR {-10 * math.log10(error):.1f} dB")
    for recipe, operands in recipes.items():
        print(f"\nrecipe {recipe}: {recipe_changes(RECIPES[recipe])}")
        for name, choice in operands.items():
            print(f"  {name:9s} {choice or 'high precision'}")
    print(f"\n{capability()}")


# ================================================================ 2 The same on a GPU

# ---------------------------------------------------------------- GEMMs on decoded values

@functools.cache
def cpu_has_bf16():
    """Whether this CPU multiplies bf16 in hardware; elsewhere fp32 GEMMs on the same values are faster."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def gemm_dtype(device, out_dtype):
    """The dtype of gemm()'s operands: bf16, but fp32 on a CPU for an fp32 result or without bf16 units."""
    bf16 = device.type == "cuda" or (cpu_has_bf16() and out_dtype == torch.bfloat16)
    return torch.bfloat16 if bf16 else torch.float32


def grouped_gemm(a, b, alpha, dtype, ends):
    """gemm() of a and b^T, or for each expert, as grouped() says. On GPUs torch has one GEMM for y and dx in
    bf16, which are rounded once more there, when alpha is applied; all else is a loop and waits for ends."""
    if torch.is_tensor(alpha) and alpha.dim():      # scales of rows
        return scale_result(grouped_gemm(a, b, 1.0, torch.float32, ends), alpha, dtype)
    if ends is not None and b.dim() == 3 and a.is_cuda and dtype == torch.bfloat16:
        return scale_result(F.grouped_mm(a, b.mT, offs=ends), alpha, dtype)
    return grouped(lambda a, b: gemm(a, b.t(), alpha, dtype), a, b, ends)


def gemm(a, b, alpha, dtype):
    """alpha * a @ b: a (M, K) and b (K, N) hold values exact in bf16; alpha is fp32, a () tensor or a float.

    returns (M, N) in dtype; products exact, accumulated in fp32, alpha applied in fp32, rounded to dtype once
    """
    want = gemm_dtype(a.device, dtype)
    a, b = a.to(want), b.to(want)
    if a.is_cuda:
        flags = torch.backends.cuda.matmul
        reduced = flags.allow_bf16_reduced_precision_reduction
        if reduced:                                 # partial sums stay in fp32
            flags.allow_bf16_reduced_precision_reduction = False
        try:
            if isinstance(alpha, float) and dtype == torch.bfloat16:
                return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)
            return scale_result(torch.mm(a, b, out_dtype=torch.float32), alpha, dtype)
        finally:
            if reduced:
                flags.allow_bf16_reduced_precision_reduction = True
    empty = a.new_empty(())
    if want == torch.bfloat16:
        return torch.addmm(empty, a, b, beta=0, alpha=float(alpha))
    precision = torch.backends.mkldnn.matmul.fp32_precision
    if cpu_has_bf16():                         # fp32 in and out, multiplied as bf16: exact for these operands
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        return torch.addmm(empty, a, b, beta=0, alpha=float(alpha)).to(dtype)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision


def scale_result(y, alpha, dtype):
    return (y * alpha).to(dtype)


# ---------------------------------------------------------------- quantize: Triton
# In one pass over x, and one before it where the largest magnitude is wanted. A program owns a tile of x and
# looks at its blocks as 16 tensors, v[j] holding element j of every block, so that what happens inside a
# block - maximum, butterflies, packing - is arithmetic between registers of one thread. Row blocks are loaded
# in pieces of 16 bytes, the most that a thread loads at once, and split in halves down to elements; column
# blocks (COLUMNS: the row blocks of x^T) by every 16th row; the second reading of a tile finds it in the
# cache. Threads meet in shared memory only to turn the codes of columns around before they are stored, for
# the maximum of a square block, whose lines two warps hold, and for that of a tile. All rounding is by fp32
# and integer arithmetic, the same everywhere; chips with instructions for it use them (PTX, below).

TILE = 64                                           # a program's tile of x is TILE x TILE
QUANTIZE_OPTIONS = {"num_warps": 4, "maxnreg": 168}  # left alone, ptxas spills on sm_100, with 80 registers


@triton.jit
def _upcast(x):
    """To fp32. bf16 by its bits: Triton's interpreter loses subnormals."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _pieces(R, C, pid_m, pid_n, PIECE: tl.constexpr, TILE: tl.constexpr):
    """Offsets of the first PIECE elements of every row block, and what is inside: (TILE, TILE/16 * PIECE)."""
    n = tl.arange(0, TILE // 16 * PIECE)[None, :]
    offs_m = pid_m * TILE + tl.arange(0, TILE)[:, None]
    offs_n = pid_n * TILE + n // PIECE * 16 + n % PIECE
    return offs_m.to(tl.int64) * C + offs_n, (offs_m < R) & (offs_n < C)


@triton.jit
def _load_blocks(x_ptr, R, C, pid_m, pid_n, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """16 fp32 tensors: (TILE, TILE/16) of row blocks, (TILE/16, TILE) of COLUMNS; zeros beyond the edge."""
    v = ()
    if not COLUMNS:
        PIECE: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
        LEVELS: tl.constexpr = 3 if PIECE == 8 else 2
        offs, mask = _pieces(R, C, pid_m, pid_n, PIECE, TILE)
        for first in tl.static_range(0, 16, PIECE):
            piece = (_upcast(tl.load(x_ptr + offs + first, mask=mask, other=0.0)),)
            for level in tl.static_range(LEVELS):   # by the lowest bit of j, then the next, ...
                even, odd = (), ()
                for i in tl.static_range(1 << level):
                    a, b = tl.split(tl.reshape(piece[i], (TILE, TILE // 16, PIECE >> level + 1, 2)))
                    even, odd = even + (a,), odd + (b,)
                piece = even + odd
            for j in tl.static_range(PIECE):
                v = v + (tl.reshape(piece[j], (TILE, TILE // 16)),)
    else:
        offs_m = pid_m * TILE + 16 * tl.arange(0, TILE // 16)[:, None]
        offs_n = pid_n * TILE + tl.arange(0, TILE)[None, :]
        ptrs = x_ptr + offs_m.to(tl.int64) * C + offs_n
        for j in tl.static_range(16):
            mask = (offs_m < R - j) & (offs_n < C)
            v = v + (_upcast(tl.load(ptrs, mask=mask, other=0.0)),)
            ptrs += C
    return v


@triton.jit
def _store_blocks(out_ptr, v, R, C, pid_m, pid_n, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """The reverse of _load_blocks."""
    if not COLUMNS:
        PIECE: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
        LEVELS: tl.constexpr = 3 if PIECE == 8 else 2
        offs, mask = _pieces(R, C, pid_m, pid_n, PIECE, TILE)
        for first in tl.static_range(0, 16, PIECE):
            piece = ()
            for j in tl.static_range(PIECE):
                piece = piece + (v[first + j],)
            for level in tl.static_range(LEVELS):
                joined = ()
                for i in tl.static_range(PIECE >> level + 1):
                    pair = tl.join(piece[i], piece[i + (PIECE >> level + 1)])
                    joined = joined + (tl.reshape(pair, (TILE, TILE // 16, 2 << level)),)
                piece = joined
            tl.store(out_ptr + offs + first, tl.reshape(piece[0], offs.shape), mask=mask)
    else:
        offs_m = pid_m * TILE + 16 * tl.arange(0, TILE // 16)[:, None]
        offs_n = pid_n * TILE + tl.arange(0, TILE)[None, :]
        ptrs = out_ptr + offs_m.to(tl.int64) * C + offs_n
        for j in tl.static_range(16):               # whole blocks: R is padded
            tl.store(ptrs, v[j], mask=(offs_m < R) & (offs_n < C))
            ptrs += C


@triton.jit
def _rotate(v, signs_ptr):
    """hadamard() of blocks, before its rounding to the dtype of x."""
    w = ()
    for j in tl.static_range(16):
        w = w + (v[j] * tl.load(signs_ptr + j),)
    for level in tl.static_range(4):                # butterflies at distance 1, 2, 4, 8
        v, w = w, ()
        for j in tl.static_range(16):
            if j & (1 << level):
                w = w + (v[j - (1 << level)] - v[j],)
            else:
                w = w + (v[j] + v[j + (1 << level)],)
    v = ()
    for j in tl.static_range(16):
        v = v + (w[j] * 0.25,)
    return v


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """fp32 rounded to the nearest of dtype, ties to even. A NaN may turn into a number: ask before."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def _magnitude(v, dtype: tl.constexpr):
    """Every block's largest magnitude in dtype, as an fp32's bits: ordered like integers, NaN above all."""
    m = tl.abs(v[0])
    for j in tl.static_range(1, 16):
        m = tl.maximum(m, tl.abs(v[j]), propagate_nan=tl.PropagateNan.ALL)
    return tl.where(m < float("inf"), _round_to(m, dtype), m).to(tl.int32, bitcast=True)


@triton.jit
def _amax_kernel(x_ptr, amax_ptr, row_signs_ptr, col_signs_ptr, R, C, PLAIN: tl.constexpr, ROW: tl.constexpr,
                 COL: tl.constexpr, TILE: tl.constexpr):
    """Largest magnitudes: of x (R, C), of x rotated along its rows, along its columns: amax_ptr[0, 1, 2]."""
    n = tl.cdiv(C, TILE)
    pid_m, pid_n = tl.program_id(0) // n, tl.program_id(0) % n
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if PLAIN or COL:
        v = _load_blocks(x_ptr, R, C, pid_m, pid_n, COL, TILE)
        if PLAIN:
            tl.atomic_max(amax_ptr, tl.max(_magnitude(v, dtype)), sem="relaxed")
        if COL:
            tl.atomic_max(amax_ptr + 2, tl.max(_magnitude(_rotate(v, col_signs_ptr), dtype)), sem="relaxed")
    if ROW:
        v = _rotate(_load_blocks(x_ptr, R, C, pid_m, pid_n, False, TILE), row_signs_ptr)
        tl.atomic_max(amax_ptr + 1, tl.max(_magnitude(v, dtype)), sem="relaxed")


@triton.jit
def _tensor_scales_triton(amax, TARGET: tl.constexpr):
    """tensor_scales(); div_rn because Triton's own / is an approximation."""
    s_enc = tl.div_rn(448.0 * TARGET, amax)
    s_enc = tl.where(s_enc > 3.4028234663852886e38, 3.4028234663852886e38, s_enc)
    s_enc = tl.where(amax == 0.0, 1.0, s_enc)
    s_enc = tl.where(amax < float("inf"), s_enc, float("nan"))
    return s_enc, tl.div_rn(1.0, s_enc)


@triton.jit
def _e4m3_scales_triton(amax_b, s_enc, s_dec, TARGET: tl.constexpr):
    """e4m3_scales() of block maxima: the E4M3 byte, its value in fp32, and the factor for the elements."""
    s = tl.where(amax_b < float("inf"), amax_b * (s_enc * (1 / TARGET)), float("nan"))
    s = tl.where(s > 448.0, 448.0, s)
    bits = s.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20                          # 3 bits of mantissa are left
    low = s * 512.0 + 8388608.0                     # below 2^-6: multiples of 2^-9, rounded by adding 2^23
    byte = tl.where(s < 0.015625, low.to(tl.int32, bitcast=True) & 15, bits - (120 << 3))
    scale = tl.where(s < 0.015625, (low - 8388608.0) * 0.001953125, (bits << 20).to(tl.float32, bitcast=True))
    byte, scale = tl.where(s == s, byte, 0x7F), tl.where(s == s, scale, s)      # NaN
    inverse = tl.div_rn(1.0, scale * s_dec)
    return byte, scale, tl.where(inverse > 3.4028234663852886e38, 3.4028234663852886e38, inverse)


@triton.jit
def _e2m1_triton(a, random, STOCHASTIC: tl.constexpr):
    """e2m1(): the code of magnitudes a, int32 0..7.

    The grid has three step widths, and the position of a on it, counted in steps, is the smallest of 2 a,
    a + 2 and a / 2 + 4. Rounding keeps order, so the smallest may be taken after rounding all three.
    """
    a = tl.minimum(a, 6.0)                          # of NaN too
    if STOCHASTIC:
        t = (a * 512.0).to(tl.int32)                # floor(256 * 2 a); halving it floors again
        return (tl.minimum(tl.minimum(t, (t >> 1) + 512), (t >> 2) + 1024) + random) >> 8
    else:                                           # a sum beyond 2^23 is rounded to whole steps
        fine = (2.0 * a + 8388608.0).to(tl.int32, bitcast=True)
        middle = (a + 8388610.0).to(tl.int32, bitcast=True)
        coarse = (0.5 * a + 8388612.0).to(tl.int32, bitcast=True)
        return tl.minimum(tl.minimum(fine, middle), coarse) & 7


@triton.jit
def _codes(v, inverse, random, STOCHASTIC: tl.constexpr):
    """The 16 codes of every block without their signs, int32 0..7; random: its four random words, uint32."""
    codes = ()
    for j in tl.static_range(16):
        own = ((random[j // 4] >> (8 * (j % 4))) & 255).to(tl.int32) if STOCHASTIC else 0
        codes = codes + (_e2m1_triton(tl.abs(v[j]) * inverse, own, STOCHASTIC),)
    return codes


@triton.jit
def _word(codes, v, FIRST: tl.constexpr):
    """8 of the 16 codes of every block, from FIRST on, with the signs of v, as one uint32 word."""
    word = tl.zeros_like(codes[0]).to(tl.uint32)
    signs = word
    for j in tl.static_range(FIRST + 7, FIRST - 1, -1):
        word = (word << 4) | codes[j].to(tl.uint32)
        signs = (signs << 4) | (v[j].to(tl.uint32, bitcast=True) >> 28)
    return word | (signs & 0x88888888)              # of each four bits the first is the sign


@triton.jit
def _word_ptx(v, inverse, random, FIRST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The same by the chip's conversions, from the elements; they turn what lies beyond 6 into 6."""
    u = ()
    for j in tl.static_range(FIRST, FIRST + 8):
        u = u + (v[j] * inverse,)
    if STOCHASTIC:                                  # byte k of a random word belongs to the k-th element
        return tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; cvt.rs.satfinite.e2m1x4.f32 a, {$4, $3, $2, $1}, $9; "
            "cvt.rs.satfinite.e2m1x4.f32 b, {$8, $7, $6, $5}, $10; mov.b32 $0, {a, b}; }",
            "=r,r,r,r,r,r,r,r,r,r,r",
            [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], random[FIRST // 4], random[FIRST // 4 + 1]],
            dtype=tl.uint32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b8 a, b, c, d; cvt.rn.satfinite.e2m1x2.f32 a, $2, $1; "
            "cvt.rn.satfinite.e2m1x2.f32 b, $4, $3; cvt.rn.satfinite.e2m1x2.f32 c, $6, $5; "
            "cvt.rn.satfinite.e2m1x2.f32 d, $8, $7; mov.b32 $0, {a, b, c, d}; }",
            "=r,r,r,r,r,r,r,r,r", [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7]],
            dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _decode(code):
    """2^-126 of a code's value, exact: its three bits stand where an fp32 has its lowest exponent bits."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_tile_kernel(x_ptr, out_ptr, scales_ptr, s_dec_ptr, amax_ptr, key_ptr, signs_ptr, R, C,
                          COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, TARGET: tl.constexpr,
                          STOCHASTIC: tl.constexpr, ROTATE: tl.constexpr, DECODE: tl.constexpr,
                          PTX: tl.constexpr, SWIZZLED: tl.constexpr, TILE: tl.constexpr):
    """One direction of _quantize_kernel: quantize(x) or, of COLUMNS, quantize(x.t()).

    line, block: where a block stands in the matrix that the GEMM sees; HEIGHT: lines of a block; SWIZZLED:
    scales are stored in the order of swizzle()
    """
    n = tl.cdiv(C, TILE)
    pid_m, pid_n = tl.program_id(0) // n, tl.program_id(0) % n
    if not COLUMNS:
        n_lines, n_blocks = R, C // 16
        line = pid_m * TILE + tl.arange(0, TILE)[:, None]
        block = pid_n * (TILE // 16) + tl.arange(0, TILE // 16)[None, :]
    else:
        n_lines, n_blocks = C, tl.cdiv(R, 16)
        line = pid_n * TILE + tl.arange(0, TILE)[None, :]
        block = pid_m * (TILE // 16) + tl.arange(0, TILE // 16)[:, None]
    index, inside = line.to(tl.int64) * n_blocks + block, (line < n_lines) & (block < n_blocks)
    # === scales ===
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    v = _load_blocks(x_ptr, R, C, pid_m, pid_n, COLUMNS, TILE)
    if ROTATE:
        v = _rotate(v, signs_ptr)
    amax_b = _magnitude(v, dtype)
    if ROTATE:
        rounded = ()
        for j in tl.static_range(16):
            rounded = rounded + (_round_to(v[j], dtype),)
        v = rounded
    if HEIGHT == 16:                                # the largest of 16 lines, for each of them
        SHAPE: tl.constexpr = (TILE // 16, TILE // 16, 16) if COLUMNS else (TILE // 16, 16, TILE // 16)
        lines: tl.constexpr = 2 if COLUMNS else 1
        largest = tl.expand_dims(tl.max(tl.reshape(amax_b, SHAPE), lines), lines)
        amax_b = tl.reshape(tl.broadcast_to(largest, SHAPE), amax_b.shape)
    s_enc, s_dec = _tensor_scales_triton(tl.load(amax_ptr), TARGET)
    byte, scale, inverse = _e4m3_scales_triton(amax_b.to(tl.float32, bitcast=True), s_enc, s_dec, TARGET)
    if SWIZZLED:                                    # one for every line, also of a square block
        tile = (line >> 7).to(tl.int64) * tl.cdiv(n_blocks, 4) + block // 4
        place = tile * 512 + (line & 31) * 16 + (line >> 5 & 3) * 4 + block % 4
        # R >> 31 is 0, but Triton does not know. It would see that four neighbours make up a 32-bit word, and
        # gather them, through shared memory, in one thread.
        tl.store(scales_ptr + place + (R >> 31), byte.to(tl.uint8), mask=inside)
    else:
        tl.store(scales_ptr + (line // HEIGHT).to(tl.int64) * n_blocks + block, byte.to(tl.uint8),
                 mask=inside & (line % HEIGHT == 0))
    if tl.program_id(0) == 0:
        tl.store(s_dec_ptr, s_dec)
    # === elements ===
    random = (0, 0, 0, 0)
    if STOCHASTIC:
        # A magnitude has no sign. Counters made from it lie in the threads that hold v; made from index
        # alone, the random bytes would have to get there through shared memory.
        zero = (amax_b >> 31).to(tl.uint32)
        random = tl.philox_impl(index.to(tl.uint32) + zero, (index >> 32).to(tl.uint32) + zero, zero, zero,
                                tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32))
    if DECODE:
        codes, values = _codes(v, inverse, random, STOCHASTIC), ()
        for j in tl.static_range(16):
            sign = (v[j].to(tl.int32, bitcast=True) >> 28) & 8
            value = _decode(codes[j] | sign) * 8.507059173023462e37 * scale     # 2^126
            values = values + (value.to(out_ptr.dtype.element_ty),)
        _store_blocks(out_ptr, values, R, C, pid_m, pid_n, COLUMNS, TILE)
    else:                                           # the codes of a block are one 64-bit word
        if PTX:
            low = _word_ptx(v, inverse, random, 0, STOCHASTIC)
            high = _word_ptx(v, inverse, random, 8, STOCHASTIC)
        else:
            codes = _codes(v, inverse, random, STOCHASTIC)
            low, high = _word(codes, v, 0), _word(codes, v, 8)
        word = low.to(tl.int64) | (high.to(tl.int64) << 32)
        tl.store(out_ptr + index, word, mask=inside)


@triton.jit
def _quantize_kernel(x_ptr, R, C, row_ptr, row_scales_ptr, row_s_dec_ptr, row_amax_ptr, row_key_ptr,
                     row_signs_ptr, col_ptr, col_scales_ptr, col_s_dec_ptr, col_amax_ptr, col_key_ptr,
                     col_signs_ptr, ROW: tl.constexpr, COL: tl.constexpr, TILE: tl.constexpr):
    """x (R, C) quantized along its rows, its columns or both. ROW, COL: the constants from HEIGHT to
    SWIZZLED of _quantize_tile_kernel, or None."""
    if ROW is not None:
        _quantize_tile_kernel(x_ptr, row_ptr, row_scales_ptr, row_s_dec_ptr, row_amax_ptr, row_key_ptr,
                              row_signs_ptr, R, C, False, ROW[0], ROW[1], ROW[2], ROW[3], ROW[4], ROW[5],
                              ROW[6], TILE)
    if COL is not None:
        _quantize_tile_kernel(x_ptr, col_ptr, col_scales_ptr, col_s_dec_ptr, col_amax_ptr, col_key_ptr,
                              col_signs_ptr, R, C, True, COL[0], COL[1], COL[2], COL[3], COL[4], COL[5],
                              COL[6], TILE)


@functools.cache
def _kept_constant(value, device):
    return torch.full((), value, device=device)


def _constant(value, device):
    """() fp32. What is made while a CUDA graph is captured is memory of the graph, filled by its replays: no
    one else may keep it."""
    return (_kept_constant.__wrapped__ if capturing(device) else _kept_constant)(value, device)


def _current(device):
    """Context: Triton launches on the current device, which need not be that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def quantize_both_triton(x, rows, columns, ptx=None, swizzled=False):
    """quantize_both() by the kernels.

    ptx         whether the chip's own rounding is used, (nearest, stochastic); None: as hardware() found
    swizzled    whether block scales are stored in the order of swizzle(); without ptx, where that is read
    """
    for seen, how in ((x, rows), (x.t(), columns)):
        if how is not None:
            height, width = FORMATS[how["format"]].shape_of(how["square"])
            check_matrix(seen, height, width if seen is x else 1, how["format"])    # columns are filled up
    if ptx is None:
        ptx, swizzled = hardware(x.device)[:2], scales_swizzled(x.device)
    x = x.contiguous()
    with _current(x.device):
        return _launch_quantize(x, rows, columns, ptx, swizzled)


def _launch_quantize(x, rows, columns, ptx, swizzled):
    (R, C), block = x.shape, FORMATS["nvfp4"].block
    grid = (triton.cdiv(R, TILE) * triton.cdiv(C, TILE),)
    signs = [x if how is None or how["signs"] is None else how["signs"]         # x: will not be read
             for how in (rows, columns)]
    slots = [0 if s is x else slot for slot, s in enumerate(signs, 1)]          # in _amax_kernel's maxima
    wanted = [slot for slot, how in zip(slots, (rows, columns), strict=True) if how and how["amax"] is None]
    maxima = None
    if wanted:
        maxima = torch.zeros(3, dtype=torch.int32, device=x.device)
        _amax_kernel[grid](x, maxima, *signs, R, C, *(slot in wanted for slot in range(3)), TILE,
                           **QUANTIZE_OPTIONS)
    pointers, flags, results = [], [], []
    for turned, how, sign, slot in zip((False, True), (rows, columns), signs, slots, strict=True):
        if how is None:
            pointers, flags, results = pointers + [x] * 6, flags + [None], results + [x.t() if turned else x]
            continue
        form, stochastic = FORMATS[how["format"]], how["stochastic"]
        n_lines, n_blocks = (C, triton.cdiv(R, block)) if turned else (R, C // block)
        height, _ = form.shape_of(how["square"])
        swizzles = swizzled and how["decode"] is None
        size = swizzled_size(n_lines, n_blocks) if swizzles else (n_lines // height, n_blocks)
        padded = swizzles and (n_lines % 128 or n_blocks % 4)                   # with zeros
        scales = (x.new_zeros if padded else x.new_empty)(size, dtype=torch.uint8)
        if how["amax"] is None:
            amax = maxima.view(torch.float32)[slot]
        else:
            amax = _constant(float(how["amax"]), x.device)
        s_dec = x.new_empty((), dtype=torch.float32)
        if how["decode"] is None:
            out = x.new_empty((n_lines, n_blocks), dtype=torch.int64)
            q = Quantized(out.view(torch.uint8), scales.view(form.scale_dtype), s_dec)
        else:
            out = x.new_empty((block * n_blocks if turned else R, C), dtype=how["decode"])
            q = Decoded(out.t() if turned else out, s_dec)
        pointers += [out, scales, s_dec, amax, as_key(how["seed"], x.device) if stochastic else x, sign]
        flags.append((height, form.target(how["unbiased"]), stochastic, sign is not x,
                      how["decode"] is not None, bool(ptx[stochastic]), swizzles))
        results.append(q)
    _quantize_kernel[grid](x, R, C, *pointers, *flags, TILE, **QUANTIZE_OPTIONS)
    return Both(*results)


# ---------------------------------------------------------------- GEMMs on packed codes
# y = alpha * a b^T by FP4 tensor cores. A chip without them decodes to memory: cuBLAS on bf16 is far faster
# than a kernel that decodes the same codes again in every tile.


@triton.jit
def _position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles in groups of 8 rows: programs that run together share operands in the L2 cache."""
    pid, n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = pid // (8 * n) * 8
    n_rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    return first + pid % (8 * n) % n_rows, pid % (8 * n) // n_rows


@triton.jit
def _load_codes(codes_ptr, n_lines, K, offs_line, k, BLOCK_K: tl.constexpr):
    """(lines, BLOCK_K/2) uint8; zeros beyond the edge."""
    offs_k = k // 2 + tl.arange(0, BLOCK_K // 2)
    mask = (offs_line < n_lines)[:, None] & (offs_k < K // 2)[None, :]
    offs = offs_line[:, None].to(tl.int64) * (K // 2) + offs_k[None, :]
    return tl.load(codes_ptr + offs, mask=mask, other=0)


@triton.jit
def _store_product(y_ptr, y, a_s_dec_ptr, b_s_dec_ptr, M, N, offs_m, offs_n):
    """y * alpha, rounded once to the dtype of the result."""
    y = y * (tl.load(a_s_dec_ptr) * tl.load(b_s_dec_ptr))
    tl.store(y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _load_swizzled(scales_ptr, n_lines, K, pid, k, LINES: tl.constexpr, BLOCK_K: tl.constexpr):
    """(LINES, BLOCK_K/16) block scales from swizzle()'s layout."""
    tile = pid * (LINES // 128) + tl.arange(0, LINES // 128)[:, None, None]
    chunk = k // 64 + tl.arange(0, BLOCK_K // 64)[None, :, None]
    offs = (tile.to(tl.int64) * tl.cdiv(K, 64) + chunk) * 512 + tl.arange(0, 512)[None, None, :]
    mask = (tile < tl.cdiv(n_lines, 128)) & (chunk < tl.cdiv(K, 64))
    scales = tl.load(scales_ptr + offs, mask=mask, other=0.0)
    scales = tl.reshape(scales, (LINES // 128, BLOCK_K // 64, 32, 4, 4))
    return tl.reshape(tl.trans(scales, 0, 3, 2, 1, 4), (LINES, BLOCK_K // 16))


@triton.jit
def _matmul_native_kernel(a_ptr, a_scales_ptr, a_s_dec_ptr, b_ptr, b_scales_ptr, b_s_dec_ptr, y_ptr, M, N, K,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """By the FP4 tensor cores of sm_100, sm_103 and sm_120; scales in swizzle()'s layout."""
    pid_m, pid_n = _position(M, N, BLOCK_M, BLOCK_N)
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = _load_codes(a_ptr, M, K, offs_m, k, BLOCK_K)
        b = _load_codes(b_ptr, N, K, offs_n, k, BLOCK_K)
        a_scales = _load_swizzled(a_scales_ptr, M, K, pid_m, k, BLOCK_M, BLOCK_K)
        b_scales = _load_swizzled(b_scales_ptr, N, K, pid_n, k, BLOCK_N, BLOCK_K)
        y = tl.dot_scaled(a, a_scales, "e2m1", tl.trans(b), b_scales, "e2m1", y)
    _store_product(y_ptr, y, a_s_dec_ptr, b_s_dec_ptr, M, N, offs_m, offs_n)


def swizzle(scales, n_lines):
    """Block scales in the order in which Blackwell's tensor cores read them.

    scales  (M, K/16) or (M/16, K/16) float8_e4m3fn, n_lines = M; what the kernels have swizzled stays
    returns (M/128, K/64, 32, 4, 4), zero-padded: of every 128 x 4 tile, rows r, r + 32, r + 64, r + 96 side
            by side. source: cuBLAS documentation, "1D block scaling factors layout"
    """
    if scales.dim() == 5:
        return scales
    scales = scales_of_lines(scales.view(torch.uint8), n_lines)
    if scales.shape[1] % 4 or n_lines % 128:
        scales = F.pad(scales, (0, -scales.shape[1] % 4, 0, -n_lines % 128))
    tiles = scales.view(scales.shape[0] // 128, 4, 32, scales.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(torch.float8_e4m3fn)


def swizzled_size(n_lines, n_blocks):
    return (n_lines + 127) // 128, (n_blocks + 3) // 4, 32, 4, 4


def unswizzle(scales, M, K):
    """The reverse, of a matrix (M, K): (M, K/16), one for every line; plain scales stay as they are."""
    if scales.dim() == 2:
        return scales
    tiles, chunks = scales.shape[:2]
    return scales.permute(0, 3, 2, 1, 4).reshape(128 * tiles, 4 * chunks)[:M, :K // 16]


NATIVE_BLOCK = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
NATIVE_OPTIONS = {"num_warps": 8, "num_stages": 2}


def matmul_dot_scaled(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype):
    """matmul() of codes by the FP4 units of sm_100, sm_103 and sm_120."""
    (M, K), N = (a.shape[0], 2 * a.shape[1]), b.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    grid = (triton.cdiv(M, NATIVE_BLOCK["BLOCK_M"]) * triton.cdiv(N, NATIVE_BLOCK["BLOCK_N"]),)
    with _current(a.device):
        _matmul_native_kernel[grid](a.contiguous(), swizzle(a_scales, M), a_s_dec, b.contiguous(),
                                    swizzle(b_scales, N), b_s_dec, y, M, N, K, **NATIVE_BLOCK,
                                    **NATIVE_OPTIONS)
    return y


LAST_STREAM = {}                                    # {"scaled_mm": the stream that called it last}


def take_turns(device):
    """Before each scaled_mm. torch copies its alpha, the two tensor scales, into 4 bytes of which the process
    has one (get_user_alpha_ptr in CUDABlas.cpp): a stream must not write there before another has read.

    Not seen here: streams within a CUDA graph, and graphs replayed side by side. Keep FP4 layers to one
    stream there.
    raises  RuntimeError on another GPU than the first, for the bytes are in that one's memory
    """
    if torch.cuda.is_current_stream_capturing():
        return
    stream = torch.cuda.current_stream(device)
    last = LAST_STREAM.setdefault("scaled_mm", stream)
    if last.device != stream.device:
        raise RuntimeError(f"torch's scaled_mm serves one GPU of a process, here {last.device}; torchrun "
                           "gives each GPU a process")
    if last != stream:
        stream.wait_stream(last)
    LAST_STREAM["scaled_mm"] = stream


def matmul_scaled_mm(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype):
    """matmul() of codes by torch's own block-scaled matmul (cuBLAS), where the installed torch offers it."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm
    if a.is_cuda:
        take_turns(a.device)
    scaling = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    order = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    a, b = (t.contiguous().view(torch.float4_e2m1fn_x2) for t in (a, b))
    return scaled_mm(a, b.t(), [swizzle(a_scales, a.shape[0]).flatten(), a_s_dec], scaling,
                     [swizzle(b_scales, b.shape[0]).flatten(), b_s_dec], scaling, order, order,
                     output_dtype=dtype)


# ---------------------------------------------------------------- what the chip can do

class Way(NamedTuple):
    """A way to multiply packed codes: matmul() of codes, and the shapes that it takes."""
    matmul: Callable
    k: int                                          # K must be a multiple of it
    n: int                                          # the lines of b, too

    def takes(self, a, b):
        return a.shape[1] % self.k == 0 and b.shape[0] % self.n == 0


WAYS = {                                            # the faster first
    "scaled_mm": Way(matmul_scaled_mm, 32, 16),     # cuBLAS reads 16 bytes at a time, and writes 16 columns
    "dot_scaled": Way(matmul_dot_scaled, 16, 1),
}


class Hardware(NamedTuple):
    """What a GPU's FP4 instructions are used for, because they were seen to agree with the lesson."""
    nearest: bool                                   # PTX cvt.rn.satfinite.e2m1x2
    stochastic: bool                                # PTX cvt.rs.satfinite.e2m1x4
    matmul: tuple[str, ...]                         # of WAYS; without any, operands are decoded for gemm()
    refused: tuple[str, ...]                        # what the chip's generation has, and why it is not used


# Tensor cores may add up with fewer bits than fp32 has. Hopper's keep 14 for products of 8-bit floats, the
# fewest known (2412.19437 section 3.3.2). Granted that the 16 products of a block, small integers, are summed
# exactly, a sum over K has K/16 of these sums and, with 64 products an instruction, K/64 partial ones. Each
# is cut off by 2^-13 of the largest at most, and none exceeds sum |a||b|:
ACCUMULATION_ERROR = (1 / 16 + 1 / 64) * 2**-13     # of sum |a||b|, for each of the K products


@functools.cache
def hardware(device):
    """Look at a GPU once: try the FP4 instructions that its generation has, and use those that agree with the
    lesson: rounding bit for bit, products to ACCUMULATION_ERROR. Others are named on stderr."""
    refuse_capture(device, "the first look at a GPU", "quantize something before")              # part 3
    generation, refused = torch.cuda.get_device_capability(device)[0], []
    x = torch.randn(204, 288, generator=torch.Generator().manual_seed(0)).bfloat16()   # edges, and many ties
    x[:4] *= torch.tensor([0.0, 1e-6, 1e-39, 100.0])[:, None]
    x[[5, -1]] = x[[5, -1]].abs()                   # their product is sum |a||b|, and shows a small error

    def agrees(what, check):
        try:
            if check():
                return True
            why = "its result is not the definition's"
        except Exception as error:
            why = f"{type(error).__name__}: " + str(error).strip().partition("\n")[0]
        refused.append(f"{what} ({why})")
        print(f"{torch.cuda.get_device_name(device)}: {what} is not used ({why})", file=sys.stderr)
        return False

    def rounds(stochastic):
        for amax in (None, 1.0):
            how = choices(stochastic=stochastic, seed=1, amax=amax)
            got = quantize_both_triton(x.to(device), how, None, ptx=(True, True)).rows
            if not torch.equal(got.codes.cpu(), quantize.definition(x, **how).codes):
                return False
        return True

    def multiplies(way):
        for K, n in ((288, 112), (272, 107)):       # shapes for every way, and what only some of them take
            a, b = quantize.definition(x[:96, :K], square=True), quantize.definition(x[-n:, :K])
            if not way.takes(a, b):
                continue
            args = [t.to(device) for q in (a, b) for t in (q.codes, q.scales, q.s_dec)]
            a, b = a.dequantize().double(), b.dequantize().double()
            for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float32, 0)):
                error = (way.matmul(*args, dtype).cpu().double() - a @ b.T).abs()
                bound = K * ACCUMULATION_ERROR * (a.abs() @ b.abs().T) + rounding * (a @ b.T).abs()
                if not bool((error <= bound).all()):
                    return False
        return True
    was = use_compiler(False)                       # the definition, once and small: not worth half a minute
    try:
        nearest = generation in (10, 12) and agrees("cvt.rn.satfinite.e2m1x2", lambda: rounds(False))
        stochastic = generation == 10 and agrees(   # sm_120 has no such instruction
            "cvt.rs.satfinite.e2m1x4", lambda: rounds(True))
        ways = tuple(name for name, way in WAYS.items()
                     if generation in (10, 12) and agrees(name, lambda way=way: multiplies(way)))
    finally:
        use_compiler(was)
    return Hardware(nearest, stochastic, ways, tuple(refused))


@functools.cache
def has_kernels(device):
    """Whether the Triton kernels run on a device: NVIDIA GPUs from sm_80 on, where there is Triton."""
    return (device.type == "cuda" and torch.version.hip is None and hasattr(triton, "cdiv")
            and torch.cuda.get_device_capability(device)[0] >= 8)


def kernels_run(device, format, signs=None):
    """The one place where it is decided whether the kernels quantize on a device, or the definition does."""
    return FORMATS[format].kernels and (signs is None or len(signs) == len(SIGNS)) and has_kernels(device)


@torch.compiler.assume_constant_result
def decoded_dtype(device, format, result, experts=False):
    """The dtype in which operands are decoded as they are quantized, for a GEMM with results of dtype result;
    None: they stay packed, because the device multiplies FP4 itself, though not for experts."""
    if not experts and kernels_run(device, format) and hardware(device).matmul:
        return None
    return gemm_dtype(device, result)


def scales_swizzled(device):
    """The one place where it is decided whether block scales of codes are stored as FP4 units read them."""
    with unset_fake_temporarily():                  # torch.compile asks too; a first look wants real numbers
        return bool(hardware(device).matmul)


def capability(device=None, format="nvfp4"):
    """One line: what runs FP4 on a device (default: the GPU if there is one), and why."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        chip = "sm_%d%d" % torch.cuda.get_device_capability(device)
        where, units = f"{torch.cuda.get_device_name(device)} ({chip})", "bf16 tensor cores"
        if kernels_run(device, format):
            nearest, stochastic, ways, refused = hardware(device)
            not_used = "; not used: " + ", ".join(refused) if refused else ""
            if not ways:
                why = "" if refused else " has no FP4 units"
                return f"{where}{why}: FP4 emulated, quantized by Triton kernels, GEMMs on exact values in " \
                       f"{units}{not_used}"
            by = ["software", "PTX"]
            return f"{where}: FP4 GEMMs native, by {ways[0]}; rounding to nearest in {by[nearest]}, " \
                   f"stochastic in {by[stochastic]}{not_used}"
        why = (f"; {format} has no kernels" if has_kernels(device)
               else "; the kernels need Triton and an NVIDIA GPU from sm_80 on")
    else:
        where, why = f"{device.type}, {torch.get_num_threads()} threads", ""
        units = "bf16 units" if cpu_has_bf16() else "fp32 (no bf16 units here)"
    if not COMPILER["on"]:
        speed = "not fused, which is several times slower (the compiler is switched off)"
    elif can_compile(device.type):
        speed = "fused by torch.compile"
    else:
        speed = "not fused (torch.compile does not work here)"
    return f"{where}: FP4 emulated by its PyTorch definition, {speed}{why}; GEMMs on exact values in {units}"


# ================================================================ 3 The machinery

# ---------------------------------------------------------------- fusing the lesson's elementwise functions

def fused(definition, worth=lambda *args: True):
    """One compiled pass over memory in place of a pass for each operation; the bits are the same. worth says
    for which arguments it is."""
    @functools.wraps(definition)
    def run(*args):
        return run_fused(definition, *args) if worth(*args) else definition(*args)
    return run


COMPILER = {"on": True}


def use_compiler(on):
    """Whether the lesson's functions are fused by torch.compile from now on. That takes half a minute the
    first time and makes them several times faster; the bits are the same. Returns whether they were."""
    was, COMPILER["on"] = COMPILER["on"], on
    return was


@functools.cache
def can_compile(kind):
    """Whether torch.compile works for a device type here; says so if not. On CPU it needs a C++ compiler; on
    GPUs older than sm_89 it cannot cast to E4M3, which matters where no kernels do (before sm_80)."""
    quantizes = not has_kernels(torch.device(kind))

    def probe(x):                                   # the casts of the definition
        scale = x.to(torch.float8_e4m3fn).float() if quantizes else x
        return (x * scale).to(torch.bfloat16)
    try:
        torch.compile(probe)(torch.zeros(32, device=kind))
        return True
    except Exception as error:
        why = f"{type(error).__name__}: " + str(error).strip().partition("\n")[0]
        print(f"torch.compile does not work here: nothing is fused, all is several times slower ({why})",
              file=sys.stderr)
        return False


@functools.cache
def compiled(definition):
    # inductor's heuristic would rather not vectorize loads that lie a block apart, at several times the cost
    return torch.compile(definition, dynamic=True, fullgraph=True,
                         options={"cpp.enable_tiling_heuristics": False})


def set_up_compiler():
    """Settings of torch.compile, in the thread that calls: torch keeps them thread by thread, and a backward
    on a GPU has a thread of its own."""
    torch._dynamo.config.specialize_float = True    # constants stay constants
    # one function serves all blocks of a model, or all operands of a layer: more graphs than torch's 8
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)


def run_fused(definition, x, *args):
    """The work of fused()."""
    if torch.compiler.is_compiling() or not COMPILER["on"] or not can_compile(x.device.type):
        return definition(x, *args)                 # when one of them calls another, both are one pass
    set_up_compiler()
    return compiled(definition)(x, *args)


# A transposed matrix is quantized as it lies in memory; nothing is copied to turn it. For that to be fast,
# all that goes with it must lie the same way. These three see to it and change no value.

def lies_transposed(x):
    return x.stride(0) == 1 < x.stride(-1)


def lay_out_like(x, scale):
    """scale (M, K/block, 1), in memory as x (M, K) is."""
    return scale.transpose(0, 1).contiguous().transpose(0, 1) if lies_transposed(x) else scale


def words_turned(key, M, n):
    """random_words(key, M, n) as int32 (M, n, 4), laid out like a transposed matrix."""
    words = philox_at(key, torch.arange(M * n, device=key.device).view(M, n).t().contiguous())
    return torch.stack([word.to(torch.int32) for word in words], 1).permute(2, 0, 1)


def unpack_bytes(random):
    """None and bytes as they are; of int32 words (..., n) their bytes (..., 4 n), the lowest first."""
    if random is None or random.dtype == torch.uint8:
        return random
    shifts = torch.arange(0, 32, 8, device=random.device, dtype=torch.int32)
    return (random[..., None] >> shifts & 255).flatten(-2)


def stack_last(parts, like):
    """torch.stack(parts, -1) of matrices, but in memory as the tensor is that they come from. (A part with a
    single column would not tell.)"""
    if lies_transposed(like):
        return torch.stack([part.t() for part in parts], 1).permute(2, 0, 1)
    return torch.stack(parts, -1)


# ---------------------------------------------------------------- CUDA graphs

def capturing(device):
    """Whether a CUDA graph is being captured on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device, what, remedy):
    """raises RuntimeError where a CUDA graph is being captured: a copy from the host's memory cannot be."""
    if capturing(device):
        raise RuntimeError(f"{what} cannot be captured in a CUDA graph; {remedy}")


# ---------------------------------------------------------------- operators, opaque to torch.compile
# It sees their shapes and, between them, a graph without breaks.

def choices(format="nvfp4", square=False, stochastic=False, seed=0, amax=None, unbiased=False, signs=None,
            decode=None):
    """All arguments of quantize() but x, as a dict."""
    return locals()


def to_operator(how, device):
    """A dict of choices, or None, as seven arguments of the operator; from_operator() is the reverse."""
    if how is None:
        return "", False, None, None, False, None, None
    key = as_key(how["seed"], device) if how["stochastic"] else None
    return how["format"], how["square"], key, how["amax"], how["unbiased"], how["signs"], how["decode"]


def from_operator(format, square, key, amax, unbiased, signs, decode):
    return choices(format, square, key is not None, key, amax, unbiased, signs, decode) if format else None


def tensors_of(operand):
    """The tensors of a Quantized, a Decoded, a tensor or None; from_tensors() is the reverse."""
    return [operand] if torch.is_tensor(operand) else [t for t in operand or () if torch.is_tensor(t)]


def from_tensors(tensors):
    return {0: lambda: None, 1: lambda t: t, 2: Decoded, 3: Quantized}[len(tensors)](*tensors)


def operator(name):
    """Decorator: a function whose types torch knows becomes the operator nvfp4::name. torch.library.custom_op
    says the same, but the checks that it makes in each call are a fifth of a layer's time on the host."""
    def make(function):
        torch.library.define(f"nvfp4::{name}", torch.library.infer_schema(function, mutates_args=()),
                             tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"nvfp4::{name}", "CompositeExplicitAutograd", function)
        return getattr(torch.ops.nvfp4, name).default
    return make


@operator("quantize")
def _quantize_op(x: torch.Tensor,
                 row_format: str, row_square: bool, row_key: torch.Tensor | None, row_amax: float | None,
                 row_unbiased: bool, row_signs: torch.Tensor | None, row_decode: torch.dtype | None,
                 col_format: str, col_square: bool, col_key: torch.Tensor | None, col_amax: float | None,
                 col_unbiased: bool, col_signs: torch.Tensor | None, col_decode: torch.dtype | None
                 ) -> list[torch.Tensor]:
    """quantize_both(): the tensors of rows, then those of columns."""
    rows = from_operator(row_format, row_square, row_key, row_amax, row_unbiased, row_signs, row_decode)
    columns = from_operator(col_format, col_square, col_key, col_amax, col_unbiased, col_signs, col_decode)
    both = quantize_both_here(x, rows, columns)
    return (tensors_of(both.rows) if rows else []) + (tensors_of(both.columns) if columns else [])


@torch.library.register_fake(_quantize_op)
def _(x, *arguments):
    results = []
    for turned, how in ((False, from_operator(*arguments[:7])), (True, from_operator(*arguments[7:]))):
        if how is None:
            continue
        form, (M, K) = FORMATS[how["format"]], x.shape[::-1] if turned else x.shape
        height, block = form.shape_of(how["square"])
        n_blocks = (K + whole(how) - 1) // whole(how) * (whole(how) // block)
        kernels = kernels_run(x.device, how["format"], how["signs"])

        def empty(n, m, dtype, lies_turned):        # in memory, what comes of x^T lies as x does ...
            return x.new_empty((m, n), dtype=dtype).t() if lies_turned else x.new_empty((n, m), dtype=dtype)
        if how["decode"] is not None:
            results.append(empty(M, n_blocks * block, how["decode"], turned))
        else:                                       # ... but the kernels' codes
            lies_turned = turned and not kernels
            results.append(empty(M, n_blocks * block // 2, torch.uint8, lies_turned))
            if kernels and scales_swizzled(x.device):
                results.append(x.new_empty(swizzled_size(M, n_blocks), dtype=form.scale_dtype))
            else:
                results.append(empty(M // height, n_blocks, form.scale_dtype, lies_turned))
        by_row = form.by_row and how["amax"] is None
        results.append(x.new_empty((M, 1) if by_row else (), dtype=torch.float32))
    return results


@operator("matmul")
def _matmul_op(a: torch.Tensor, a_scales: torch.Tensor | None, a_s_dec: torch.Tensor | None,
               a_known: float | None,
               b: torch.Tensor, b_scales: torch.Tensor | None, b_s_dec: torch.Tensor | None,
               b_known: float | None, dtype: torch.dtype, ends: torch.Tensor | None) -> torch.Tensor:
    """matmul() of Quantized or, without scales, Decoded or, without s_dec, tensors."""
    if a_s_dec is None:
        return matmul.definition(a, b, dtype, ends)
    a = Decoded(a, a_s_dec, a_known) if a_scales is None else Quantized(a, a_scales, a_s_dec)
    b = Decoded(b, b_s_dec, b_known) if b_scales is None else Quantized(b, b_scales, b_s_dec)
    return matmul_here(a, b, dtype, ends)


@torch.library.register_fake(_matmul_op)
def _(a, a_scales, a_s_dec, a_known, b, b_scales, b_s_dec, b_known, dtype, ends):
    by_rows = ends is None or b.dim() == 3
    return a.new_empty((len(a), b.shape[-2]) if by_rows else (len(ends), len(a), len(b)), dtype=dtype)


# ---------------------------------------------------------------- kernels and operators for the lesson

def accelerated(definition):
    """The definition, or the kernels of part 2 where they run; under torch.compile one opaque operator."""
    @functools.wraps(definition)
    def run(*args, **kwargs):
        return ACCELERATED[definition.__name__](definition, *args, **kwargs)
    run.definition = definition
    return run


@functools.cache
def fixed_s_dec(format, amax, unbiased):
    form = FORMATS[format]
    if form.top is not None and amax is None:
        return None
    with unset_fake_temporarily():                  # a number, also where tensors have no memory
        amax = tensor_amax(torch.ones(1, 1), amax)
        return float(tensor_scales(amax, form.top, form.target(unbiased))[1])


@torch.compiler.assume_constant_result
def known_s_dec(format, amax, unbiased):
    """s_dec as a number where the recipe fixes it, so that no GPU need be asked for it; else None."""
    return fixed_s_dec(format, amax, unbiased)


def with_known_s_dec(q, how):
    if how is None or not isinstance(q, Decoded):
        return q
    return q._replace(s_dec_known=known_s_dec(how["format"], how["amax"], how["unbiased"]))


def quantize_both_here(x, rows, columns):
    """By the kernels where they run, and otherwise as the lesson says."""
    wanted = [how for how in (rows, columns) if how is not None]
    if wanted and all(kernels_run(x.device, how["format"], how["signs"]) for how in wanted):
        return quantize_both_triton(x, rows, columns)
    return quantize_both.definition(x, rows, columns)


def turned_over(rows, columns):
    """Whether columns will be the rows turned over, which holds for square blocks, to nearest."""
    if rows is None or columns is None or not rows["square"] or rows["signs"] is not None:
        return False
    return not rows["stochastic"] and {**rows, "seed": None} == {**columns, "seed": None}


def only_shapes(x):
    """Whether an operator has to stand for the work: under torch.compile, and for tensors without memory."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


@torch.no_grad()
def accelerate_quantize_both(_, x, rows=None, columns=None):
    rows, columns = (how and choices(**how) for how in (rows, columns))
    if only_shapes(x):
        tensors = _quantize_op(x, *to_operator(rows, x.device), *to_operator(columns, x.device))
        n = 0 if rows is None else 3 if rows["decode"] is None else 2
        found = from_tensors(tensors[:n] or [x]), from_tensors(tensors[n:] or [x.t()])
    elif rows and rows["decode"] and turned_over(rows, columns):                # a weight is quantized once
        q = quantize_both_here(x, rows, None).rows
        found = q, q._replace(values=q.values.t())
    else:
        found = quantize_both_here(x, rows, columns)
    return Both(*map(with_known_s_dec, found, (rows, columns)))


@torch.no_grad()
def accelerate_quantize(definition, x, *args, **kwargs):
    how = choices(*args, **kwargs)
    if only_shapes(x) or kernels_run(x.device, how["format"], how["signs"]):
        return accelerate_quantize_both(None, x, how).rows
    return with_known_s_dec(definition(x, **how), how)


def native_way(a, b):
    """The Way in which the device multiplies a and b as they are; None: they must be decoded."""
    nvfp4, device = FORMATS["nvfp4"], a.s_dec.device
    if not has_kernels(device) or not all(
            isinstance(q, Quantized) and q.scales.dtype == nvfp4.scale_dtype
            and (q.scales.dim() == 5 or q.shape[1] == nvfp4.block * q.scales.shape[1]) for q in (a, b)):
        return None
    return next((WAYS[name] for name in hardware(device).matmul if WAYS[name].takes(a, b)), None)


def matmul_here(a, b, dtype, ends=None):
    """By FP4 units where there are any, and otherwise decoded."""
    way = native_way(a, b) if ends is None else None
    if way is not None:
        return way.matmul(*a, *b, dtype)
    known = [q.s_dec_known if isinstance(q, Decoded) else None for q in (a, b)]
    alpha = scale_of_product(a.s_dec, b.s_dec, ends) if None in known else known[0] * known[1]
    exact = gemm_dtype(a.s_dec.device, dtype)
    return grouped_gemm(a.decode(exact), b.decode(exact), alpha, dtype, ends)


def to_matmul_operator(q):
    """A Quantized, a Decoded or a tensor as four arguments of the operator."""
    if torch.is_tensor(q):
        return q, None, None, None
    return (q.values, None, q.s_dec, q.s_dec_known) if isinstance(q, Decoded) else (*q, None)


def accelerate_matmul(definition, a, b, dtype=torch.float32, ends=None):
    by_operator = only_shapes(tensors_of(a)[0])
    if torch.is_tensor(a) and (ends is None or not by_operator):
        return definition(a, b, dtype, ends)
    with torch.no_grad():
        if not by_operator:
            return matmul_here(a, b, dtype, ends)
        return _matmul_op(*to_matmul_operator(a), *to_matmul_operator(b), dtype, ends)


ACCELERATED = {"quantize": accelerate_quantize, "quantize_both": accelerate_quantize_both,
               "matmul": accelerate_matmul}

# From here on these names, in the lesson too, mean what was made of its functions above.
find_scales, round_blocks, random_words, words_turned, pack, unpack, scale_result = map(fused, (
    find_scales, round_blocks, random_words, words_turned, pack, unpack, scale_result))
rotate = fused(rotate, worth=lambda runs, signs: len(signs) <= 32)     # 128 would take minutes to compile
quantize, quantize_both, matmul = map(accelerated, (quantize, quantize_both, matmul))


# ---------------------------------------------------------------- what a layer keeps

def save(ctx, *operands):
    """Save tensors, Quantized and Decoded for the backward; saved() is the reverse."""
    lists = [tensors_of(operand) for operand in operands]
    ctx.sizes = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*sum(lists, []))


def saved(ctx):
    tensors, operands = list(ctx.saved_tensors), []  # asked for once: checkpointing computes them anew
    for size in ctx.sizes:
        operands.append(from_tensors(tensors[:size]))
        tensors = tensors[size:]
    return operands


@functools.cache
def count_optimizer_steps():
    """A list with one number: how many steps all optimizers together have made since the first call. A fused
    optimizer changes weights without raising their version counter, which alone would miss that."""
    count = [0]

    def add(*_):
        count[0] += 1
    register_optimizer_step_post_hook(add)
    return count


def copy_into(old, new):
    """The new quantized weight, copied into the old one's memory, where CUDA graphs look for it; as it is
    where the old one is of another kind."""
    if type(old) is not type(new) or torch.is_tensor(new):
        return new
    if isinstance(new, Both):
        return Both(*map(copy_into, old, new))
    pairs = list(zip(tensors_of(old), tensors_of(new), strict=True))
    if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
        return new
    for a, b in pairs:
        a.copy_(b)
    return old


@torch.inference_mode(False)                        # an evaluation's weights must serve training too
@torch.no_grad()
def refresh(layer):
    """Quantize a layer's weight if it has changed since the last time; in a CUDA graph's capture always."""
    w = layer.weight
    place = 0 if isinstance(w, FakeTensor) else w.data_ptr()
    version = (w._version, place, count_optimizer_steps()[0], layer.drawn, layer.cfg.gemms)
    if layer.version and layer.version[0] is w and layer.version[1] == version and not capturing(w.device):
        return
    if layer.keys.device != w.device or layer.signs.device != w.device:
        refuse_capture(w.device, "a layer that has just moved to the GPU", "call set_step before")
    layer.version, layer.keys, layer.signs = (w, version), layer.keys.to(w.device), layer.signs.to(w.device)
    layer.quantized = copy_into(layer.quantized, layer.quantize_weight())


@torch.compiler.disable
def refresh_weights(model, _=None):
    """Quantize what has changed. Compiled layers cannot look for themselves; a part of the model that is
    compiled and called by itself needs set_step after each update."""
    for m in fp4_layers(model):
        if m.fp4 and not isinstance(m.weight, DTensor):     # of a shard, once it is gathered
            refresh(m)
            if m.drawn is None and m.training and m.cfg.stochastic and torch.is_grad_enabled():
                warnings.warn("stochastic rounding repeats its random bits: call set_step before every "
                              "micro-batch", stacklevel=2)


def refresh_unless_hooked(layer):
    if not (torch.compiler.is_compiling() and layer.hooked):
        refresh_weights(layer)


def forget_weights(model, *_):
    for m in fp4_layers(model):
        m.quantized = m.version = None


def hook_weights(model, forget=False):
    """Have weights looked at before the forward of a model, or of a block whose weights are gathered for it,
    outside of its compiled graph. forget: and quantized ones let go after it, as the gathered are."""
    model.register_forward_pre_hook(refresh_weights)
    if forget:
        model.register_forward_hook(forget_weights)
    for m in fp4_layers(model):
        m.hooked = True


if __name__ == "__main__":
    main(sys.argv[1:])
