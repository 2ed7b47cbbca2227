"""Training in four bits: NVFP4, and the linear layer that computes in it.

    1  The lesson          plain PyTorch, complete: rounding, scales, random bits, rotation, quantize, matmul,
                           the three GEMMs of a linear layer, recipes, the layer. You can stop after it.
    2  The same, fast      one pass over memory on a CPU; Triton kernels and FP4 units on a GPU. Rounding is
                           the same bit for bit, products are so up to the order of sums

The lesson in one page
----------------------
A 4-bit float (E2M1: one sign bit, two exponent bits, one mantissa bit) has sixteen codes. They stand for

    +-{0, 0.5, 1, 1.5, 2, 3, 4, 6},

far too few for a tensor whose values span decades. NVFP4 gives every block of 16 values a scale of its own,
an 8-bit float (E4M3, up to 448), and the whole tensor one fp32 scale that moves the block scales into E4M3's
range. A code, 0..7 with a sign, stands for a number of the grid:

    value = number * scale * s_dec        4 bits each, 8 bits per 16, 32 bits per tensor

To quantize: the tensor's largest magnitude, amax, fixes the encode scale s_enc = 448 * 6 / amax, which brings
it to the largest scale times the grid's largest number; the decode scale s_dec = 1 / s_enc undoes that in the
end. The block's largest magnitude fixes its scale, so that it lands on 6. Each element is rounded to the
nearest number, or up or down at random, with probabilities that make the average right (stochastic rounding).
Four elements, of a tensor with amax 3:

    s_enc = 448 * 6 / 3 = 896; the block's scale is 3 * 896 / 6 = 448, in E4M3 448; scale * s_dec = 0.5

    x                       0.1   -2.5      3    0.7
    x / (scale * s_dec)     0.2     -5      6    1.4
    number                    0     -4      6    1.5    5 is halfway: 4 is code 6, 6 code 7; the even one wins
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

A product multiplies numbers and adds them up. A number has two significant bits and a scale four, so
number * scale has at most six and is exact in bf16. Therefore a bf16 GEMM on number * scale, times the two
tensor scales at the end, *is* the FP4 GEMM up to the order of accumulation. That sentence is how this file
trains in FP4 on machines without FP4 units. It measures the arithmetic of FP4 there, not its speed.

Training a linear layer takes three GEMMs, fprop, dgrad and wgrad. Each of its three matrices, x, w and dy,
takes part in two of them, once along its rows and once along its columns. Which rounding, block, rotation and
tensor scale each of these six operands gets is a recipe (see RECIPES): plain data.

In quantize() and matmul() K is the axis that is summed. In the layer M counts tokens, K input channels and N
output channels. Sources: arXiv 2509.25149 (the format and NVIDIA's recipe), 2605.06067 (nGPT's recipe). What
other papers do otherwise stands in papers.py.

    convert(model, RECIPES["nvfp4"])                # its linear layers, in place
    for step in range(n):
        set_step(model, seed, step)                 # new random bits, and the weights are quantized anew
        model(x).backward()                         # loss, optimizer and all else as ever

    python nvfp4.py             the format, its errors, recipes, and what runs on this machine
    python nvfp4.py 0.1 -2.5 3  these numbers through the format, step by step
    python nvfp4.py --json      the first of these for machines; python papers.py: with other papers' formats
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
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

try:
    import triton
    import triton.language as tl
except ImportError:                                 # the lesson runs on any device
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)

# ================================================================ 1 The lesson
# Names that part 2 defines: fused(f, device) is f, compiled where that works. On a CPU kernels_run() is False
# and native_way() None; what ends in _triton is for GPUs. gemm(a, b, alpha, dtype) is alpha * a @ b^T, of
# operands in gemm_dtype(); decoded_dtype() is the same, or None where FP4 units take the codes.

# ---------------------------------------------------------------- E2M1: rounding

E2M1_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what codes 0..7 stand for; bit 3 is the sign
E2M1_MAX = 6.0


def e2m1(a, random=None):
    """Round magnitudes to the E2M1 grid: nearest with ties to the even code, or stochastically.

    a       fp32 >= 0, any shape; above 6 and NaN saturate to 6
    random  integers 0..255 of the same shape, or None: nearest. With f in [0, 1) the position of a in its
            grid interval, a goes up iff floor(256 f) + random >= 256: with probability floor(256 f) / 256
            (Blackwell's cvt.rs adds its random bits below the mantissa in the same way)
    returns number fp32 on the grid, code fp32 in 0..7
    source  2509.25149 appendix B
    """
    a = torch.where(a < E2M1_MAX, a, E2M1_MAX)
    low, middle = a < 2, a < 4                      # the grid's step is 0.5 below 2, 1 below 4, 2 above
    per_unit = torch.where(low, 2.0, torch.where(middle, 1.0, 0.5))
    if random is None:
        n = torch.round(a * per_unit)               # in steps; halves go to the even n: an even code
    else:
        n = torch.floor((torch.floor(a * (256 * per_unit)) + random) * (1 / 256))
    number = n * torch.where(low, 0.5, torch.where(middle, 1.0, 2.0))
    code = n + torch.where(low, 0.0, torch.where(middle, 2.0, 4.0))             # 2 is code 4, 4 is code 6
    return number, code


def e2m1_number(code):
    """The numbers that codes 0..7, fp32, stand for: the grid is the largest of three straight lines."""
    return torch.maximum(torch.maximum(0.5 * code, code - 2), 2 * code - 8)


# ---------------------------------------------------------------- NVFP4: scales of tensors and of blocks

E4M3_MAX = 448.0                                    # the largest float8_e4m3fn
FLT_MAX = torch.finfo(torch.float32).max


def tensor_scales(amax, top=E4M3_MAX, target=E2M1_MAX):
    """The tensor's encode and decode scale, fp32, so that its largest block gets scale top and its largest
    element the number target.

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


def block_amax(blocks):
    """Largest magnitude of each block, fp32. x is cut to (M/h, h, K/block, block), with h rows a block: axes
    1 and 3 span a block, and stay with length 1. So it is where x is transposed: (K/block, block, M/h, h)."""
    return blocks.float().abs().amax((1, 3), keepdim=True)


def e4m3_scales(blocks, s_enc, target):
    """The scale of each block: e4m3(min(amax_b * (s_enc * (1 / target)), 448)), as fp32.

    error   relative 1/17 at most (E4M3 has 3 mantissa bits) for scales from 2^-6, its smallest normal number
    source  2509.25149 appendix B; order of rounding as in TransformerEngine
    """
    amax_b = block_amax(blocks)
    scale = torch.clamp(amax_b * (s_enc * (1 / target)), max=E4M3_MAX)
    return torch.where(amax_b < math.inf, scale, math.nan).to(torch.float8_e4m3fn).float()


def encode_scale(scale, s_dec):
    """What x is multiplied by to be in units of the grid: 1 / (scale * s_dec). Where the scale is 0 that is
    the largest fp32, because 0 * infinity would be NaN."""
    return torch.clamp((scale * s_dec).reciprocal(), max=FLT_MAX)


class Grid(NamedTuple):
    """The eight magnitudes that codes 0..7 stand for."""
    round: Callable                                 # magnitudes, random bytes -> numbers, codes
    number_of: Callable                             # codes -> numbers


E2M1 = Grid(e2m1, e2m1_number)


@dataclass(frozen=True)
class Format:
    """A 4-bit format: its grid, its blocks and how they find their scales. What is not given is NVFP4's. Its
    functions may be compiled, so they have no branches on values."""
    name: str
    grid: Grid = E2M1
    block: int = 16                                 # values in a row that share a scale
    # how a block finds its scale
    top: float | None = E4M3_MAX                    # largest block scale of a tensor; None: no tensor scale
    target: float = E2M1_MAX                        # where the largest magnitude of a block lands
    scales: Callable = e4m3_scales                  # blocks, s_enc, target -> scale
    encode_scale: Callable = encode_scale           # scale, s_dec -> what x is multiplied by
    correct: Callable | None = None                 # what becomes of scales once codes are known (papers.py)
    # how they are kept
    scale_dtype: torch.dtype = torch.float8_e4m3fn
    pack_scale: Callable | None = None              # scale of blocks -> one number of scale_dtype ...
    unpack_scale: Callable | None = None            # ... and back; None: the scale is exact in scale_dtype
    squares: bool = True                            # whether blocks may be square
    by_row: bool = False                            # each row has a tensor scale: s_dec is (M, 1)
    reads_as_nvfp4: bool = False                    # FP4 units and inference engines take codes and scales
    kernels: bool = False                           # part 2 has kernels that quantize

    def __post_init__(self):
        codes = torch.arange(8.0)
        number, code = self.grid.round(self.grid.number_of(codes))
        if not torch.equal(code, codes) or not torch.equal(number, self.grid.number_of(codes)):
            raise ValueError(f"{self.name}: round() must give back the codes that number_of() decodes")

    @property
    def bits(self):
        """Bits a value takes, scales of blocks included, but not those of a tensor or row."""
        return 4 if self.by_row else 4 + 8 * self.scale_dtype.itemsize / self.block

    def shape_of(self, square):
        """(rows, columns) of a block."""
        if square and not self.squares:
            raise ValueError(f"square: {self.name} has no square blocks; set fp4_square_weights=False")
        return (self.block if square else 1), self.block


FORMATS = {"nvfp4": Format("nvfp4", reads_as_nvfp4=True, kernels=True)}         # papers.py has more


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
        return seed.to(device)
    return torch.tensor([seed & MASK32, (seed >> 32) & MASK32], device=device)


def is_turned(x):
    """Whether x lies turned in memory: it is the transpose of a matrix that lies row by row. Then we work on
    x.t(), and copy nothing."""
    return x.stride(0) == 1 < x.stride(-1)


def random_bytes(key, M, K, turned=False):
    """A number 0..255 for every element of a matrix (M, K): (M, K/16, 16), or (K/16, 16, M) where it lies
    turned. The counter of 16 neighbours in a row is their position in the matrix, so no byte serves two
    elements."""
    n, axis = K // PHILOX_BYTES, 1 if turned else 2
    index = torch.arange(M * n, device=key.device).view(M, n)
    index = index.t() if turned else index
    zero = torch.zeros_like(index)
    words = philox(index & MASK32, index >> 32, zero, zero, key[0], key[1])     # four, of four bytes each
    words = torch.stack([word.to(torch.int32) for word in words], axis).unsqueeze(axis + 1)
    shifts = torch.arange(0, 32, 8, device=key.device, dtype=torch.int32)       # the lowest byte first
    return (words >> (shifts[:, None] if turned else shifts) & 255).flatten(axis, axis + 1)


# ---------------------------------------------------------------- the random Hadamard transform

# Drawn at random once, by TransformerEngine, and the same for every layer and step.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@functools.cache
def as_signs(signs, device):
    return torch.tensor(signs, dtype=torch.float32, device=device)


def hadamard(x, signs=SIGNS):
    """Rotate x (M, K) in runs of n = len(signs), a power of two, along K: v -> (v * signs) H_n / sqrt(n),
    where H_1 = [1] and H_2n = [[H_n, H_n], [H_n, -H_n]].

    Orthogonal, so (A H)(B H)^T = A B^T: it changes no product, but spreads an outlier over its whole run.
    Computed in fp32 in rounds that replace pairs at distance 1, 2, 4, ..., n / 2, in this order, by their sum
    and their difference; the result is rounded to x's dtype.
    source  2509.25149 section 4.2
    """
    signs = torch.as_tensor(signs, dtype=torch.float32, device=x.device)
    (M, K), n = x.shape, len(signs)
    apply = fused(rotate, x.device) if n <= 32 else rotate                      # 128 take minutes to compile
    if is_turned(x):
        return apply(x.t().reshape(K // n, n, M), signs, 1).view(K, M).t()
    return apply(x.reshape(M, K // n, n), signs, 2).view(M, K)


def rotate(runs, signs, axis):
    """hadamard() of runs along an axis, of the size of signs."""
    v = [element.float() * signs[j] for j, element in enumerate(runs.unbind(axis))]
    distance = 1
    while distance < len(v):
        v = [v[j - distance] - v[j] if j & distance else v[j] + v[j + distance] for j in range(len(v))]
        distance *= 2
    return torch.stack([w * len(v) ** -0.5 for w in v], axis).to(runs.dtype)


# ---------------------------------------------------------------- quantize

class Quantized(NamedTuple):
    """A quantized matrix (M, K): value = number * scale * s_dec. Blocks can be read off its shapes.

    codes   (M, K/2) uint8, two codes a byte, the low nibble is the even column, bit 3 of a code its sign
    scales  (M/h, K/block) in the format's dtype; h = 1, or block for square blocks. Quantized on a GPU with
            FP4 units, as swizzle() orders them; unswizzle() undoes that (part 2)
    s_dec   () fp32; (M, 1) in a format with a scale for each row
    format  its name in FORMATS
    """
    codes: torch.Tensor
    scales: torch.Tensor
    s_dec: torch.Tensor
    format: str = "nvfp4"

    @property
    def shape(self):
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def decode(self, dtype=torch.bfloat16):
        """number * scale, (M, K) in dtype, exact in bf16."""
        (M, K), codes, form = self.shape, self.codes, FORMATS[self.format]
        if kernels_run(codes.device, form):
            return decode_triton(self, dtype)
        scale, decode, b = self.scale_of_lines(), fused(unpack, codes.device), form.block
        if is_turned(codes):
            codes = codes.t().reshape(K // b, b // 2, M)
            return decode(codes, scale.permute(1, 2, 0), form, dtype, 2).view(K, M).t()
        return decode(codes.reshape(M, K // b, b // 2), scale, form, dtype, 3).view(M, K)

    def scale_of_lines(self):
        """Block scales, fp32, for each row of a block: (M, K/block, 1); where a format has one for every two
        values, (M, K/block, block/2)."""
        form, scale = FORMATS[self.format], unswizzle(self.scales, *self.shape)
        scale = form.unpack_scale(scale) if form.unpack_scale else scale.float()[..., None]
        height = len(self.codes) // len(scale)
        return scale if height == 1 else scale.repeat_interleave(height, 0)

    def dequantize(self, dtype=torch.float32):
        """number * scale * s_dec, (M, K), rounded once to fp32 and, where asked, once more to dtype."""
        return (self.decode().float() * self.s_dec).to(dtype)


class Decoded(NamedTuple):
    """The same matrix with codes and scales multiplied out, for chips without FP4 units.

    values  number * scale (M, K), exact in bf16; s_dec is not in them
    s_dec   as in Quantized; where a GPU's kernels were given amax as a number, it is on the CPU, where we can
            read it without waiting for the GPU
    """
    values: torch.Tensor
    s_dec: torch.Tensor

    def decode(self, dtype=torch.bfloat16):
        return self.values.to(dtype)

    dequantize = Quantized.dequantize


class Both(NamedTuple):
    """A matrix (M, N) as an operand of two GEMMs: rows (M, N) for the one that sums over N, columns (N, M)
    for the one that sums over M. Each is Quantized, Decoded or, where its GEMM stays in high precision, a
    tensor."""
    rows: Quantized | Decoded | torch.Tensor
    columns: Quantized | Decoded | torch.Tensor


def round_blocks(blocks, amax, key, form, decode, turned):
    """The arithmetic of quantize(), to be fused into one pass over memory.

    blocks  (M/h, h, K/block, block) of a matrix x (M, K), or (K/block, block, M/h, h) of one that lies turned
    amax    () fp32, or as many axes as blocks: the magnitude that fixes the tensor scale
    key     (2,) int64 of stochastic rounding, or None: to nearest
    returns codes uint8, 0..15, or, decoded in a dtype, number * scale; shaped like blocks. The scale of each
            block, fp32, and s_dec
    """
    x = blocks.float()
    s_enc, s_dec = tensor_scales(amax, form.top, form.target)
    scale = form.scales(x, s_enc, form.target)
    a = x.abs() * form.encode_scale(scale, s_dec)
    random = None
    if key is not None:
        sizes = blocks.shape[0] * blocks.shape[1], blocks.shape[2] * blocks.shape[3]
        random = random_bytes(key, *(sizes[::-1] if turned else sizes), turned).view(blocks.shape)
    number, code = form.grid.round(a, None if form.correct else random)
    if form.correct:
        scale = form.correct(a, number, scale, random)
    negative = x.view(torch.int32) < 0                                          # the sign bit, of -0.0 too
    if decode is None:
        return torch.where(negative, code + 8, code).to(torch.uint8), scale, s_dec
    scaled = number * scale
    return torch.where(negative, -scaled, scaled).to(decode), scale, s_dec


@torch.compiler.disable                             # compiled with its caller, it would round otherwise
def quantize(x, format="nvfp4", square=False, stochastic=False, seed=0, amax=None, signs=None, decode=None):
    """Quantize a matrix, in blocks along its last axis.

    x           (M, K) bf16, fp16 or fp32; K a multiple of the block (for square blocks M too)
    format      a key of FORMATS
    square      blocks of as many rows as columns
    stochastic  round stochastically with the key seed: a 64-bit integer, or its two words as (2,) int64
    amax        a number, or () fp32, skips the search for the largest magnitude, which fixes the tensor
                scale; what exceeds it saturates
    signs       (n,): rotate first in runs of n, by hadamard()
    decode      a dtype: give Decoded in it instead of codes
    returns     Quantized or Decoded
    error       mean square on unit Gaussians in nvfp4 9.0e-3 (nearest, 1x16), 12.4e-3 (16x16), 18.8e-3
                (stochastic): tests/test_nvfp4.py, test_gaussian_mse
    source      2509.25149 appendix B
    raises      ValueError for a shape that does not divide into blocks
    """
    form, x = FORMATS[format], x.detach()
    height, width = form.shape_of(square)
    check_matrix(x, height, width, format)
    if kernels_run(x.device, form, signs):
        how = choices(format, square, stochastic, seed, amax, signs, decode)
        both = quantize_both_triton(x.t(), None, how) if is_turned(x) else quantize_both_triton(x, how, None)
        return both.columns if is_turned(x) else both.rows
    if signs is not None:
        check_size("K", x.shape[1], len(signs), "the run of the rotation")
        x = hadamard(x, signs)
    (M, K), turned = x.shape, is_turned(x)
    amax = 1.0 if form.top is None else amax        # no tensor scale, so no search
    amax = largest_magnitude(x, form.by_row) if amax is None else torch.as_tensor(amax, device=x.device)
    amax = amax.float()
    if amax.dim():                                  # of rows
        amax = amax.view(1, 1, M, 1) if turned else amax.view(M, 1, 1, 1)
    key = as_key(seed, x.device) if stochastic else None
    cut = (K // width, width, M // height, height) if turned else (M // height, height, K // width, width)
    codes, scale, s_dec = fused(round_blocks, x.device)((x.t() if turned else x).reshape(cut), amax, key,
                                                        form, decode, turned)
    codes = codes.view(K, M).t() if turned else codes.view(M, K)
    s_dec = s_dec.view(M, 1) if s_dec.dim() else s_dec
    if decode is not None:
        return Decoded(codes, s_dec)
    scale = scale.permute(2, 3, 0, 1)[:, 0] if turned else scale[:, 0]          # (M/h, K/block, 1)
    scale = form.pack_scale(scale) if form.pack_scale else scale[..., 0].to(form.scale_dtype)
    return Quantized(fused(pack, x.device)(codes), scale, s_dec, format)


def choices(format="nvfp4", square=False, stochastic=False, seed=0, amax=None, signs=None, decode=None):
    """All arguments of quantize() but x, as a dict."""
    return {"format": format, "square": square, "stochastic": stochastic, "seed": seed, "amax": amax,
            "signs": signs, "decode": decode}


def largest_magnitude(x, by_row=False):
    """() fp32; by_row: that of each row, (M, 1)."""
    if by_row:
        return x.abs().amax(1, keepdim=True).float()
    low, high = torch.aminmax(x.t() if is_turned(x) else x)                     # as it lies in memory
    return torch.maximum(-low, high).float()


def pack(codes):
    """Codes (M, K) uint8, one a byte -> (M, K/2), two a byte, the low nibble first."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(codes, scale, form, dtype, axis):
    """The reverse, times the scales, with an axis of length 2 for the two codes of a byte: number * scale in
    dtype of codes (M, K/block, block/2) and scale (M, K/block, 1), or of both turned, (K/block, ..., M)."""
    codes, values = codes.int(), []                 # bytes would not be vectorized
    for nibble in (codes & 15, codes >> 4):
        number = form.grid.number_of((nibble & 7).float())
        values.append((torch.where(nibble > 7, -number, number) * scale).to(dtype))
    return torch.stack(values, axis)


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


@torch.compiler.disable
def quantize_both(x, rows=None, columns=None):
    """x (M, N) for two GEMMs, quantized along its rows and along its columns; a GPU reads it once for both.

    rows, columns   keyword arguments of quantize(), or None: that GEMM takes x as it is
    returns         Both: of x and of x^T, filled up with zeros, which add nothing to a sum
    """
    rows, columns = (how and choices(**how) for how in (rows, columns))
    if one_for_both(rows, columns) and rows["decode"]:          # a weight is quantized once
        q = quantize(x, **rows)
        return Both(q, q._replace(values=q.values.t()))
    wanted = [how for how in (rows, columns) if how]
    if wanted and all(kernels_run(x.device, FORMATS[how["format"]], how["signs"]) for how in wanted):
        return quantize_both_triton(x.detach(), rows, columns)
    x_t = (fill_up(x, rows=-len(x) % whole(columns)) if columns else x).t()
    return Both(quantize(x, **rows) if rows else x, quantize(x_t, **columns) if columns else x_t)


def one_for_both(rows, columns):
    """Whether the columns are the rows transposed: square blocks, rounded to nearest, not rotated."""
    if not (rows and columns and rows["square"]) or rows["stochastic"]:
        return False
    return rows["signs"] is None and {**rows, "seed": None} == {**columns, "seed": None}


def both_of(q, format, decode, amax=None, **how):
    """Both of a matrix of square blocks from its codes q, for these arguments of quantize_both() on both
    sides: what that gives where one_for_both() holds."""
    if decode is None:
        codes = torch.stack((q.codes & 15, q.codes >> 4), -1).flatten(1)
        return Both(q, q._replace(codes=pack(codes.t()).contiguous(), scales=q.scales.t().contiguous()))
    form, s_dec = FORMATS[format], q.s_dec
    if amax is not None:                            # known on the CPU, so that no one waits for a GPU
        s_dec = given_s_dec(amax, form.top, form.target)
    rows = Decoded(q.decode(decode), s_dec)
    return Both(rows, rows._replace(values=rows.values.t()))


def fill_up(x, columns=0, rows=0):
    """x with so many columns and rows of zeros more, which add nothing to a sum."""
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x


def whole(how):
    """What a matrix's K must be a multiple of to be quantized so: of blocks, and of runs of the rotation."""
    return max(FORMATS[how["format"]].block, 1 if how["signs"] is None else len(how["signs"]))


# ---------------------------------------------------------------- matmul

@torch.compiler.disable
def matmul(a, b, dtype=torch.float32, ends=None):
    """a (M, K) @ b (N, K)^T -> (M, N) in dtype; both quantized, or both in high precision.

    ends    (E,) int32: a product for each of E experts, see grouped(). None: one product, gemm()
    error   the order of fp32 accumulation only: 1e-5 relative to float64, test_matmul_is_exact_products. Of
            experts on a GPU one more rounding, to bf16
    """
    if torch.is_tensor(a):
        return grouped(F.linear, a, b.to(a.dtype), ends).to(dtype)              # w may be an fp32 master
    way = native_way(a, b) if ends is None else None                            # FP4 units, where there are
    if way is not None:
        return way.matmul(a, b, dtype)
    exact = gemm_dtype(a[0].device, dtype)
    left, right = a.decode(exact), b.decode(exact)
    if a.s_dec.dim() or b.s_dec.dim():              # a scale for each row: for each element of the result
        y = gemms(left, right, None, torch.float32, ends)
        return (y * scales_of_product(a.s_dec, b.s_dec, ends)).to(dtype)
    return gemms(left, right, a.s_dec * b.s_dec, dtype, ends)


# A mixture of experts has E weights, (E, N, K), and each token uses a few of them. Tokens are sorted by
# expert and quantized as one matrix, and so is w, as (E N, K); only products are made expert by expert. ends
# (E,) says where each expert's tokens end.

EXPERT_TOKENS = 32                                  # an expert's tokens begin at a multiple of it: no block
                                                    # is to have tokens of two


def grouped(product, a, b, ends):
    """product(a, b), or one for each of E experts, whose tokens are sorted: those of expert e end at ends[e].

    a (M, K), b (E, N, K)   tokens are rows of a, and meet their expert's b: (M, N)
    a (N, M), b (K, M)      tokens are summed, expert by expert: (E, N, K)
    """
    if ends is None:
        return product(a, b)
    if product is F.linear and a.is_cuda and a.dtype == torch.bfloat16:         # torch has one GEMM for all
        y = F.grouped_mm(a, b.mT, offs=ends)
        if b.dim() == 3:
            return y
        some = ends.diff(prepend=ends.new_zeros(1)) > 0
        return torch.where(some[:, None, None], y, 0)                           # a sum over no tokens
    spans = list(itertools.pairwise([0, *ends.tolist()]))
    if b.dim() == 3:
        return torch.cat([product(a[i:j], b_e) for b_e, (i, j) in zip(b, spans, strict=True)])
    return torch.stack([product(a[:, i:j], b[:, i:j]) for i, j in spans])


def gemms(a, b, alpha, dtype, ends):
    """gemm(), or one for each expert."""
    if ends is not None and a.is_cuda and dtype == torch.bfloat16 and b.dim() == 3:
        return scale_result(grouped(F.linear, a, b, ends), alpha, dtype)        # torch's has no alpha
    return grouped(lambda a, b: gemm(a, b, alpha, dtype), a, b, ends)


def scales_of_product(a, b, ends):
    """What each element of a product is multiplied by, of the s_dec of its operands: a () or (M, 1), b () or
    (N, 1), of experts' weights (E, N, 1)."""
    if b.dim() < 3:
        return a * b.t()
    return grouped(lambda a, b: a * b.mT, a if a.dim() else a.expand(int(ends[-1]), 1), b, ends)


# ---------------------------------------------------------------- the three GEMMs of a linear layer
# x (M, K) of M tokens, w (N, K) and dy (M, N) come as Both: quantized along rows and along columns.

GEMMS = ("fprop", "dgrad", "wgrad")
OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")


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
    """dw = dy^T x (N, K): sums over M, the tokens. The result has the master weight's dtype, fp32, because
    micro-batches and ranks are added up; in high precision the GEMM rounds it to dy's first.

    dy.columns  (N, M)   wgrad.dy   stochastic; NVIDIA: rotated
    x.columns   (K, M)   wgrad.x    nearest; NVIDIA: rotated by the same signs; nGPT: amax = 1
    """
    return matmul(dy.columns, x.columns, dtype, ends)


# ---------------------------------------------------------------- recipes

# Linear layers that stay in high precision in every recipe: output heads and routers, by the names that most
# models give them, as globs. fp4_skip adds others.
HIGH_PRECISION = "head", "*.head", "lm_head", "*.lm_head", "*router*", "gate", "*.gate"


@dataclass(frozen=True)
class FP4Config:
    format: str = "nvfp4"                           # number format, a key of FORMATS
    gemms: tuple[str, ...] = GEMMS                  # which GEMMs of a layer run in FP4: fprop,dgrad,wgrad
    stochastic: tuple[str, ...] = ("dgrad.dy", "wgrad.dy")  # operands rounded stochastically
    hadamard: tuple[str, ...] = ()                  # GEMMs whose operands are rotated along the summed axis
    square_weights: bool = True                     # square blocks: one quantized weight for fprop and dgrad
    input_amax: float | None = None                 # fixed tensor scale of activations; None: measured
    weight_amax: float | None = None                # fixed tensor scale of weights; None: measured
    grad_amax: float | None = None                  # fixed tensor scale of output gradients; None: measured
    until: float | None = None                      # part of training that runs in FP4; None: all of it
    switched: tuple[str, ...] = GEMMS               # GEMMs that leave FP4 at fp4_until
    head_blocks: int = 0                            # first blocks of the model, kept in high precision
    tail: float = 0.0                               # last fraction of the blocks, kept in high precision
    skip: tuple[str, ...] = ()                      # more names than HIGH_PRECISION, as globs

    def __post_init__(self):
        check_words(self, gemms=GEMMS, stochastic=OPERANDS, hadamard=GEMMS, switched=GEMMS, format=FORMATS)
        for name in ("input_amax", "weight_amax", "grad_amax"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"fp4_{name}={value} must be a positive number, or None to measure it")
        if self.until is not None and not 0 <= self.until < 1:
            raise ValueError(f"fp4_until={self.until} must be in [0, 1), or None for never")
        if not 0 <= self.tail <= 1:
            raise ValueError(f"fp4_tail={self.tail} must be in [0, 1]")
        if self.head_blocks < 0:
            raise ValueError(f"fp4_head_blocks={self.head_blocks} must be >= 0")
        FORMATS[self.format].shape_of(self.square_weights)

    def operand(self, name, keys, result=None, experts=False):
        """What the recipe gives one of OPERANDS: arguments of quantize(), or None where that GEMM stays in
        high precision.

        keys    (6, 2) int64, layer_keys()
        result  dtype of the GEMM's result. Without FP4 units the operand is Decoded at once, for that GEMM.
                None: it stays packed, because the backward uses it
        experts whether it is a grouped GEMM: FP4 units have none here, and so it is Decoded at once, too
        """
        gemm_name, matrix = name.split(".")
        if gemm_name not in self.gemms:
            return None
        format = self.format_of(name)
        return choices(format, square=matrix == "w" and self.square_weights,
                       stochastic=name in self.stochastic, seed=keys[OPERANDS.index(name)],
                       amax={"x": self.input_amax, "w": self.weight_amax, "dy": self.grad_amax}[matrix],
                       signs=self.signs_of(gemm_name, keys) if gemm_name in self.hadamard else None,
                       decode=result and decoded_dtype(keys.device, format, result, experts))

    def check_layer(self, layer):
        """raises ValueError where a layer's K does not divide into blocks, or into runs of the rotation."""
        for_x = self.operand("fprop.x", layer.keys)
        check_size("K", layer.in_features, whole(for_x) if for_x else FORMATS[self.format].block,
                   f"{self.format} block" + (", fp4_hadamard_size" if "fprop" in self.hadamard else ""))
        for_wgrad = self.operand("wgrad.x", layer.keys)
        if layer.weight.dim() == 3 and for_wgrad and whole(for_wgrad) > EXPERT_TOKENS:
            raise ValueError(f"fp4_format={self.format}: its blocks and rotations must be {EXPERT_TOKENS} "
                             f"at most, not {whole(for_wgrad)}, where there are experts: wgrad would mix the "
                             "tokens of two; or leave them out with --fp4_skip")

    def without(self, gemms):
        """The same recipe with these GEMMs in high precision."""
        return replace(self, gemms=tuple(name for name in self.gemms if name not in gemms))

    # --- recipes of other papers say otherwise: papers.py

    def format_of(self, name):
        """The format of one of OPERANDS."""
        return self.format

    def signs_of(self, gemm_name, keys):
        """The signs of a GEMM's rotation, the same for both its operands."""
        return as_signs(SIGNS, keys.device)

    @property
    def whole_channels(self):
        """What a layer's N is filled up to a multiple of, because dgrad sums over it."""
        return FORMATS[self.format].block

    @property
    def active(self):
        """Whether a layer does anything else than nn.Linear."""
        return bool(self.gemms)

    @property
    def layer(self):
        """The class of the layers that convert() makes."""
        return FP4Linear

    def remarks(self, name):
        """Words for all that one of OPERANDS gets beside what operand() says."""
        return []


def check_words(cfg, **allowed):
    """raises ValueError where a field of cfg is not, or does not consist of, what is allowed."""
    for name, words in allowed.items():
        value = getattr(cfg, name)
        for word in value if isinstance(value, tuple) else (value,):
            if word not in words:
                raise ValueError(f"fp4_{name}={word} must be of {', '.join(map(str, words))}")


RECIPES = {                                         # papers.py has more
    "bf16": FP4Config(gemms=()),
    # Both of the next keep the defaults: square weights, and stochastic rounding of gradients alone.
    # 2605.06067 table 2: no rotation, no tensor scale. nGPT keeps rows of weights and inputs at norm 1, so
    # that no element exceeds 1; gradients have no such bound and keep their measured scale, as in the paper's
    # released scripts.
    "ngpt": FP4Config(input_amax=1.0, weight_amax=1.0),
    # 2509.25149 section 4: rotated wgrad operands, the last 15 % of blocks in BF16. The measured scale of an
    # activation looks at all its tokens, so that a token's output depends, in the last bits, on the tokens
    # after it; the fixed scale of "ngpt" does not.
    "nvfp4": FP4Config(hadamard=("wgrad",), tail=0.15),
}


# ---------------------------------------------------------------- the layer

def layer_keys(seed, step, micro_batch, layer):
    """The Philox keys of a layer's six operands in one micro-batch, (6, 2) int64; of n layers, given as a
    tensor (n, 1), (n, 6, 2).

    Weights get the key of micro-batch 0: they are quantized once a step, alike on every rank.
    """
    micro = torch.tensor([0 if name.endswith(".w") else micro_batch for name in OPERANDS])
    operand, layer = torch.arange(len(OPERANDS)), torch.as_tensor(layer)
    return torch.stack(torch.broadcast_tensors(*stream_key(seed, step, micro, layer, operand)), -1)


class FP4Function(torch.autograd.Function):
    """The layer for autograd: fprop in the forward, dgrad and wgrad in the backward. In between it keeps the
    quantized x.columns, 4.5 bits a value where wgrad is in FP4, and w.columns."""

    @staticmethod
    def forward(ctx, x, w, quantized_w, keys, cfg, ends):
        """y (M, N) of x (M, K). The product uses quantized_w, Both of w.

        The master weight w (N, K) is here only so that autograd gives it dw: unchanged, as if rounding had
        the slope 1, for its true slope is 0 nearly everywhere (the straight-through estimator).
        """
        needs_dw, experts, N = ctx.needs_input_grad[1], ends is not None, w.shape[-2]
        for_wgrad = cfg.operand("wgrad.x", keys) if needs_dw else None
        x_both = quantize_both(x, cfg.operand("fprop.x", keys, x.dtype, experts), for_wgrad)
        save(ctx, keys, ends, quantized_w.columns, x_both.columns if needs_dw else None)
        ctx.cfg, ctx.w_dtype, ctx.N = cfg, w.dtype, N
        y = fprop(x_both, quantized_w, x.dtype, ends)
        return y if y.shape[1] == N else y[:, :N].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dy (M, N) -> dx (M, K), dw (N, K)"""
        keys, ends, w_columns, x_columns = saved(ctx)
        cfg, experts, (needs_dx, needs_dw, *_) = ctx.cfg, ends is not None, ctx.needs_input_grad
        dy_both = quantize_both(fill_up(dy, columns=-ctx.N % cfg.whole_channels),
                                cfg.operand("dgrad.dy", keys, dy.dtype, experts) if needs_dx else None,
                                cfg.operand("wgrad.dy", keys, ctx.w_dtype, experts) if needs_dw else None)
        dx = dgrad(dy_both, Both(None, w_columns), dy.dtype, ends) if needs_dx else None
        dw = wgrad(dy_both, Both(None, x_columns), ctx.w_dtype, ends) if needs_dw else None
        return dx, dw if dw is None else dw[..., :ctx.N, :], None, None, None, None


def save(ctx, *operands):
    """Save tensors, Quantized and Decoded for the backward; saved() is the reverse."""
    leaves, ctx.structure = tree_flatten(operands)
    ctx.names = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]    # of formats
    ctx.save_for_backward(*(leaf if torch.is_tensor(leaf) else None for leaf in leaves))


def saved(ctx):
    pairs = zip(ctx.saved_tensors, ctx.names, strict=True)
    return tree_unflatten([name if tensor is None else tensor for tensor, name in pairs], ctx.structure)


class FP4Linear(torch.nn.Linear):
    """nn.Linear whose GEMMs run in a 4-bit format; same parameters and state_dict. convert() makes them, also
    from a subclass for E experts: weight (E, N, K), and forward(x, ends) as grouped() describes it, each of
    ends a multiple of the block. Any N will do: it is filled up with zeros.

    The fp32 master weight is quantized once a step and serves every micro-batch. It is quantized anew when
    set_step() begins another step, when train() or eval() is called, and when its version counter or its
    address has changed. A fused optimizer changes neither, and weight.data.copy_() does not: so call
    set_step().
    """

    function = FP4Function

    def __init__(self, linear, cfg, index=0):
        vars(self).update(vars(linear))             # parameters, hooks, mode
        self.plain = vars(linear).get("plain", type(linear))        # the class that it was
        self.codes = None                           # the weight quantized by parts, where ranks share it
        self.quantized = None                       # the weight as Both
        self.seen = None                            # the weight, contents, recipe and step it was made of
        self.drawn = None                           # (seed, step) of the keys; None until set_step()
        self.cfg, self.index = cfg, index           # index: which linear layer, for the random stream
        # no buffer: DistributedDataParallel would overwrite it with the first rank's
        self.keys = layer_keys(0, 0, 0, index)
        if not isinstance(self, cfg.layer):
            raise ValueError(f"this recipe needs a {cfg.layer.__name__}; make it by cfg.layer(linear, cfg)")
        cfg.check_layer(self)

    def revert(self):
        """Become again the layer that convert() met."""
        self.__class__ = self.plain
        for name in ("plain", "cfg", "index", "keys", "codes", "quantized", "seen", "drawn"):
            vars(self).pop(name, None)

    def train(self, mode=True):
        """Forget the quantized weight: weight.data.copy_(), as averaging does, moves no version counter."""
        self.quantized = None
        return super().train(mode)

    def quantize_weight(self):
        """The weight as Both, as the recipe wants fprop.w and dgrad.w."""
        for_fprop, for_dgrad = self.weight_operands()
        if self.codes is not None:
            return self.by_expert(both_of(self.codes, **for_fprop))
        return self.by_expert(quantize_both(self.filled_weight(), for_fprop, for_dgrad))

    def weight_operands(self):
        """Arguments of quantize() for fprop.w and dgrad.w. Inputs are not known yet: taken to be bf16."""
        experts = self.weight.dim() == 3
        return (self.cfg.operand(name, self.keys, torch.bfloat16, experts) for name in ("fprop.w", "dgrad.w"))

    def filled_weight(self):
        """(N, K) or, of all experts, (E N, K), with N filled up to whole blocks."""
        return fill_up(self.weight.detach(), rows=-self.out_features % self.cfg.whole_channels).flatten(0, -2)

    def by_expert(self, w):
        """Both of experts' weights, (E N, K) and (K, E N), as grouped() takes them: (E, N, K), (E, K, N)."""
        if self.weight.dim() == 2:
            return w
        E = len(self.weight)

        def shaped(operand, view, view_scales):
            if torch.is_tensor(operand):
                return view(operand)
            s_dec = view_scales(operand.s_dec) if operand.s_dec.dim() else operand.s_dec
            return Decoded(view(operand.values), s_dec)
        return Both(shaped(w.rows, lambda t: t.unflatten(0, (E, -1)), lambda t: t.unflatten(0, (E, -1))),
                    shaped(w.columns, lambda t: t.unflatten(1, (E, -1)).transpose(0, 1),
                           lambda t: t.expand(E, *t.shape)))

    @torch.inference_mode(False)                    # an evaluation's weights must serve training too
    @torch.no_grad()
    def current_weight(self):
        """quantize_weight(), unless that has been done."""
        w = self.weight
        self.keys = self.keys.to(w.device)
        version = w._version, w.data_ptr(), w.dtype, self.cfg, self.drawn
        if self.quantized is None or self.seen[0] is not w or self.seen[1] != version:
            self.quantized, self.seen = self.quantize_weight(), (w, version)
        return self.quantized

    # torch.compile does not look into a layer; it compiles the code between two of them.
    @torch.compiler.disable
    def forward(self, x, ends=None):
        if not self.cfg.active or x.numel() == 0:
            return self.plain.forward(self, x, *([] if ends is None else [ends]))
        if self.drawn is None and self.training and torch.is_grad_enabled():
            warnings.warn("random bits repeat and weights may be old: call set_step before every micro-batch",
                          stacklevel=2)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            w = self.weight if torch.is_grad_enabled() else self.weight.detach()    # x would be kept for dw
            y = self.function.apply(x.reshape(-1, self.in_features), w, self.current_weight(), self.keys,
                                    self.cfg, ends)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.cfg.format}, gemms={','.join(self.cfg.gemms)}"


def fp4_layers(model):
    return [m for m in model.modules() if isinstance(m, FP4Linear)]


@torch.inference_mode(False)
def set_step(model, seed, step, micro_batch=0):
    """Give every FP4 layer its random keys for one micro-batch, which counts over all ranks of a step. In a
    new step weights are quantized anew."""
    layers = fp4_layers(model)
    if not layers:
        return
    keys = layer_keys(seed, step, micro_batch, torch.tensor([m.index for m in layers])[:, None])
    for m, own in zip(layers, keys.to(layers[0].weight.device), strict=True):
        m.keys, m.drawn = own, (seed, step)


def forget_weights(model, *_):
    """Let go of quantized weights. A forward hook where FSDP gathers weights: both are freed together."""
    for m in fp4_layers(model):
        m.quantized = None


def switch_late(model, done):
    """Late switch: when done, from 0 to 1, reaches a layer's cfg.until, its cfg.switched GEMMs leave FP4.
    Returns whether one did now.

    source  2509.25149 section 5: all of them, or fprop alone, shortly before the learning rate decays;
            2505.19115: dgrad and wgrad, for a short phase at the end
    """
    news = False
    for m in fp4_layers(model):
        left = m.cfg.without(m.cfg.switched)
        if m.cfg.until is not None and done >= m.cfg.until and left != m.cfg:
            m.cfg, news = left, True
    return news


@contextlib.contextmanager
def high_precision(model, gemms=GEMMS):
    """Context: these GEMMs of the model's FP4 layers run in high precision; all of them for an evaluation
    beside FP4. Weights that were quantized before serve again after it."""
    before = [(m, m.cfg, m.quantized, m.seen) for m in fp4_layers(model)]
    for m, cfg, *_ in before:
        m.cfg = cfg.without(gemms)
    try:
        yield
    finally:
        for m, cfg, quantized, seen in before:
            m.cfg = cfg
            if m.quantized is not None:             # train() and eval() let it go
                m.quantized, m.seen = quantized, seen


# torch.compile, FSDP and activation checkpointing put these into the names of layers.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


def is_plain(linear):
    """Whether a layer computes x w^T + b and no more, or that for experts (weight (E, N, K)). A subclass, a
    parametrization, an adapter, a forward or a buffer of its own would be lost."""
    weight = linear._parameters.get("weight")
    return (type(weight) in (torch.nn.Parameter, DTensor)
            and (type(linear) is torch.nn.Linear or weight.dim() == 3)
            and linear._parameters.keys() == {"weight", "bias"}
            and not linear._buffers and not linear._modules and "forward" not in vars(linear))


def convert(model, cfg, report=print):
    """Turn the model's nn.Linear layers into FP4Linear, in place, where the policy of cfg lets them.

    A layer stays the same object: parameters, hooks, mode and attributes are kept. A second call replaces the
    recipe of the first, and RECIPES["bf16"] undoes it. Blocks are numbered by the first number in a layer's
    name (blocks.7.mixer.out is in block 7).
    Prints one line: how many were converted, and which were not and why. raises ValueError, naming the layer
    whose size does not fit; then nothing is converted
    """
    for m in fp4_layers(model):
        if type(m) is m.cfg.layer:                  # not one that was parametrized meanwhile
            m.revert()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if list(model._modules) == ["module"]:          # DistributedDataParallel
        linears = {name.removeprefix("module."): m for name, m in linears.items()}
    linears = {WRAPPERS.sub("", name): m for name, m in linears.items()}
    if "" in linears:
        raise ValueError("the model is itself a linear layer; use cfg.layer(model, cfg)")
    if not cfg.active:
        report(f"converted 0/{len(linears)} linears: no GEMM is set to run in FP4")
        return model
    found = {name: re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in linears}
    number = {name: int(match[1]) for name, match in found.items() if match}
    n_blocks = max(number.values(), default=-1) + 1
    tail_from = n_blocks - round(cfg.tail * n_blocks)
    # in evaluation this one reads weights and calls no layer
    passed_by = {m for parent in model.modules() if isinstance(parent, torch.nn.TransformerEncoderLayer)
                 for m in parent.modules()}
    kept, converted = {}, {}
    for index, (name, linear) in enumerate(linears.items()):
        block = number.get(name)
        if any(fnmatch.fnmatch(name, glob) for glob in (*HIGH_PRECISION, *cfg.skip)):
            kept.setdefault("skip", []).append(name)
        elif not is_plain(linear) or linear in passed_by:
            kept.setdefault("more than a linear layer", []).append(name)
        elif block is not None and block < cfg.head_blocks:
            kept.setdefault("head blocks", []).append(name)
        elif block is not None and block >= tail_from:
            kept.setdefault("tail", []).append(name)
        else:
            try:
                converted[linear] = cfg.layer(linear, cfg, index)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    for linear, made in converted.items():
        linear.__class__, linear.__dict__ = type(made), vars(made)
    what = f"{cfg.format} ({','.join(cfg.gemms)})" if cfg.gemms else "no GEMM in FP4"
    line = f"converted {len(converted)}/{len(linears)} linears to {what}"
    for why, names in kept.items():
        line += f"; {why}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} in high precision"
    for glob in cfg.skip:
        if not fnmatch.filter(linears, glob):
            line += f"; fp4_skip={glob} names no linear layer"
    report(line)
    return model


# ================================================================ 2 The same, fast

# ---------------------------------------------------------------- on a CPU: one pass over memory

COMPILER = SimpleNamespace(on=True)


def use_compiler(on):
    """Context: whether the lesson's functions are fused by torch.compile. That takes half a minute the first
    time and makes them several times faster; the bits are the same."""
    return setting(COMPILER, "on", on)


def fused(function, device):
    """The function as one compiled pass over memory in place of a pass for each operation; the bits are the
    same. As it stands where nothing compiles, and where a compiler is looking at the caller already."""
    if torch.compiler.is_compiling() or not COMPILER.on or not can_compile(device.type):
        return function
    set_up_compiler()
    return compiled(function)


@functools.cache
def compiled(function):
    # inductor's heuristic would rather not vectorize loads that lie a block apart, at several times the cost
    return torch.compile(function, dynamic=True, fullgraph=True,
                         options={"cpp.enable_tiling_heuristics": False})


def set_up_compiler():
    """Settings of torch.compile, in the thread that calls: torch keeps them thread by thread, and a backward
    on a GPU has a thread of its own."""
    torch._dynamo.config.specialize_float = True    # constants stay constants
    # one function serves all blocks of a model, or all operands of a layer: more graphs than torch's 8
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    torch.fx.experimental._config.use_duck_shape = False        # no graph for sizes that happen to be equal


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
        why = f"{type(error).__name__}: " + " ".join(str(error).strip().splitlines()[:2])
        print(f"torch.compile does not work here: nothing is fused, all is several times slower ({why})",
              file=sys.stderr)
        return False


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


def gemm(a, b, alpha, dtype):
    """alpha * a @ b^T: a (M, K) and b (N, K) hold values exact in bf16; alpha is () fp32, or None: 1.

    returns (M, N) in dtype; products exact, accumulated in fp32, alpha applied in fp32, rounded to dtype once
    """
    want = gemm_dtype(a.device, dtype)
    a, b, empty = a.to(want), b.to(want).t(), a.new_empty((), dtype=want)
    waits = alpha is not None and alpha.is_cuda     # to know it would be to wait for the GPU
    known = None if waits else 1.0 if alpha is None else float(alpha)
    if a.is_cuda:                                   # partial sums stay in fp32
        with setting(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False):
            if dtype == torch.bfloat16 and not waits:
                return torch.addmm(empty, a, b, beta=0, alpha=known)
            y = torch.mm(a, b, out_dtype=torch.float32)
            return y.to(dtype) if alpha is None else scale_result(y, alpha, dtype)
    # fp32 in and out, multiplied as bf16 where the CPU has units for it: exact for these operands
    precision = "bf16" if cpu_has_bf16() else torch.backends.mkldnn.matmul.fp32_precision
    with setting(torch.backends.mkldnn.matmul, "fp32_precision", precision):
        return torch.addmm(empty, a, b, beta=0, alpha=known).to(dtype)


@contextlib.contextmanager
def setting(of, name, value):
    """Context: a setting, of torch's or ours, has this value."""
    before = getattr(of, name)
    if before != value:
        setattr(of, name, value)
    try:
        yield
    finally:
        if before != value:
            setattr(of, name, before)


def scale_result(y, alpha, dtype):
    """y * alpha in dtype, in one pass."""
    return fused(multiply, y.device)(y, alpha, dtype)


def multiply(y, alpha, dtype):
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
    """e2m1(): codes of magnitudes a, in bits 22 to 24 of an int32: as an fp32 that is 2^-126 of their number.

    random  a byte in bits 14 to 21

    The grid is that of an fp32 with one bit of mantissa and exponents from 1 on, so an fp32 of 2^-126 a has
    the code, and below it the fraction of a step, as its bits. Stochastic rounding adds a random fraction to
    them and cuts off; we keep ten digits of a, for an fp32 as small as that would round more of them.
    To nearest a is rounded in full. The grid has three step widths, and the position of a on it, counted in
    steps, is the smallest of 2 a, a + 2 and a / 2 + 4. Rounding keeps order, so the smallest may be taken
    after rounding all three; a sum beyond 2^23 is rounded to whole steps.
    """
    a = tl.minimum(a, 6.0)                          # of NaN too
    if STOCHASTIC:
        a = (a.to(tl.int32, bitcast=True) & -0x4000).to(tl.float32, bitcast=True)
        place = (a * 1.1754943508222875e-38).to(tl.int32, bitcast=True)
        return (place + random) & -0x400000
    else:
        fine = (2.0 * a + 8388608.0).to(tl.int32, bitcast=True)
        middle = (a + 8388610.0).to(tl.int32, bitcast=True)
        coarse = (0.5 * a + 8388612.0).to(tl.int32, bitcast=True)
        return tl.minimum(tl.minimum(fine, middle), coarse) << 22


@triton.jit
def _codes(v, inverse, random, STOCHASTIC: tl.constexpr):
    """The 16 codes of every block as _e2m1_triton() has them; random: its four random words, uint32."""
    codes = ()
    for j in tl.static_range(16):
        own = 0
        if STOCHASTIC:
            own = (((random[j // 4] >> (8 * (j % 4))) & 255) << 14).to(tl.int32)
        codes = codes + (_e2m1_triton(tl.abs(v[j]) * inverse, own, STOCHASTIC),)
    return codes


@triton.jit
def _word(codes, v, FIRST: tl.constexpr):
    """8 of the 16 codes of every block, from FIRST on, with the signs of v, as one uint32 word."""
    word = tl.zeros_like(codes[0]).to(tl.uint32)
    for j in tl.static_range(FIRST + 7, FIRST - 1, -1):
        signed = (codes[j].to(tl.uint32) << 6) | (v[j].to(tl.uint32, bitcast=True) & 0x80000000)
        word = (word << 4) | (signed >> 28)
    return word


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
    """2^-126 of a code's number, exact: its three bits stand where an fp32 has its lowest exponent bits."""
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
            sign = v[j].to(tl.int32, bitcast=True) & -0x80000000
            value = (codes[j] | sign).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale   # 2^126
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


@triton.jit
def _decode_kernel(codes_ptr, scales_ptr, out_ptr, R, C, HEIGHT: tl.constexpr, TILE: tl.constexpr):
    """Quantized.decode(): number * scale, (R, C). HEIGHT: lines of a block."""
    n, n_blocks = tl.cdiv(C, TILE), C // 16
    pid_m, pid_n = tl.program_id(0) // n, tl.program_id(0) % n
    line = pid_m * TILE + tl.arange(0, TILE)[:, None]
    block = pid_n * (TILE // 16) + tl.arange(0, TILE // 16)[None, :]
    inside = (line < R) & (block < n_blocks)
    word = tl.load(codes_ptr + line.to(tl.int64) * n_blocks + block, mask=inside, other=0)
    byte = tl.load(scales_ptr + (line // HEIGHT).to(tl.int64) * n_blocks + block, mask=inside, other=0)
    bits = byte.to(tl.int32)
    scale = ((bits << 20) + (120 << 23)).to(tl.float32, bitcast=True)           # E4M3's bias is 7, fp32's 127
    scale = tl.where(bits < 8, bits.to(tl.float32) * 0.001953125, scale)        # below 2^-6: times 2^-9
    scale = tl.where(bits == 0x7F, float("nan"), scale)
    values = ()
    for j in tl.static_range(16):
        value = _decode((word >> (4 * j)).to(tl.int32)) * 8.507059173023462e37 * scale
        values = values + (value.to(out_ptr.dtype.element_ty),)
    _store_blocks(out_ptr, values, R, C, pid_m, pid_n, False, TILE)


def programs(M, N, rows=TILE, columns=TILE):
    """The grid of a kernel: a program for each tile of a matrix (M, N)."""
    return (-(-M // rows) * -(-N // columns),)


@functools.cache
def constant(value, device):
    return torch.full((), value, device=device)


@functools.cache
@torch.inference_mode(False)                        # what an evaluation finds first, a backward may keep
def given_s_dec(amax, top, target):
    """s_dec of an amax that is a number, on the CPU: found once, and no one asks the GPU for it."""
    return tensor_scales(torch.tensor(float(amax)), top, target)[1]


def quantize_both_triton(x, rows, columns, ptx=None, swizzled=False):
    """quantize_both() by the kernels; rows and columns are choices().

    ptx         whether the chip's own rounding is used, (nearest, stochastic); None: as hardware() found
    swizzled    whether block scales are stored in the order of swizzle(); without ptx, where that is read
    """
    for seen, how in ((x, rows), (x.t(), columns)):
        if how is not None:
            height, width = FORMATS[how["format"]].shape_of(how["square"])
            check_matrix(seen, height, width if seen is x else 1, how["format"])    # columns are filled up
    if ptx is None:
        found = hardware(x.device)
        ptx, swizzled = (found.nearest, found.stochastic), bool(found.matmul)
    x, block = x.contiguous(), FORMATS["nvfp4"].block
    (R, C), grid = x.shape, programs(*x.shape)
    signs = [x if how is None or how["signs"] is None else                      # x: will not be read
             torch.as_tensor(how["signs"], dtype=torch.float32, device=x.device) for how in (rows, columns)]
    slots = [0 if s is x else slot for slot, s in enumerate(signs, 1)]          # in _amax_kernel's maxima
    wanted = [slot for slot, how in zip(slots, (rows, columns), strict=True) if how and how["amax"] is None]
    maxima = None
    if wanted:
        maxima = torch.zeros(3, dtype=torch.int32, device=x.device)
        with torch.cuda.device_of(x):               # Triton launches on the current device, wherever x is
            _amax_kernel[grid](x, maxima, *signs, R, C, *(slot in wanted for slot in range(3)), TILE,
                               **QUANTIZE_OPTIONS)
    pointers, flags, results = [], [], []
    for turned, how, sign, slot in zip((False, True), (rows, columns), signs, slots, strict=True):
        if how is None:
            pointers, flags, results = pointers + [x] * 6, flags + [None], results + [x.t() if turned else x]
            continue
        form, stochastic, fixed = FORMATS[how["format"]], how["stochastic"], how["amax"]
        height = form.shape_of(how["square"])[0]
        n_lines, n_blocks = (C, -(-R // block)) if turned else (R, C // block)
        swizzles = swizzled and how["decode"] is None
        size = swizzled_size(n_lines, n_blocks) if swizzles else (n_lines // height, n_blocks)
        padded = swizzles and (n_lines % 128 or n_blocks % 4)                   # with zeros
        scales = (x.new_zeros if padded else x.new_empty)(size, dtype=torch.uint8)
        amax = maxima.view(torch.float32)[slot] if fixed is None else fixed
        on_cpu = not torch.is_tensor(amax)          # a number
        amax = constant(float(amax), x.device) if on_cpu else amax
        s_dec = x.new_empty((), dtype=torch.float32)
        if how["decode"] is None:
            out = x.new_empty((n_lines, n_blocks), dtype=torch.int64)
            q = Quantized(out.view(torch.uint8), scales.view(form.scale_dtype), s_dec, form.name)
        else:
            out = x.new_empty((block * n_blocks if turned else R, C), dtype=how["decode"])
            known = given_s_dec(fixed, form.top, form.target) if on_cpu else s_dec
            q = Decoded(out.t() if turned else out, known)
        pointers += [out, scales, s_dec, amax, as_key(how["seed"], x.device) if stochastic else x, sign]
        flags.append((height, form.target, stochastic, sign is not x, how["decode"] is not None,
                      bool(ptx[stochastic]), swizzles))
        results.append(q)
    with torch.cuda.device_of(x):
        _quantize_kernel[grid](x, R, C, *pointers, *flags, TILE, **QUANTIZE_OPTIONS)
    return Both(*results)


def decode_triton(q, dtype):
    """Quantized.decode() by the kernel."""
    (M, K), words = q.shape, q.codes.contiguous().view(torch.int64)             # a block's codes each
    scales = unswizzle(q.scales, M, K).contiguous().view(torch.uint8)
    out = q.codes.new_empty((M, K), dtype=dtype)
    with torch.cuda.device_of(out):
        _decode_kernel[programs(M, K)](words, scales, out, M, K, M // len(scales), TILE, **QUANTIZE_OPTIONS)
    return out


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
    scales = scales.view(torch.uint8).repeat_interleave(n_lines // len(scales), 0)
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


def matmul_dot_scaled(a, b, dtype):
    """matmul() of codes by the FP4 units of sm_100, sm_103 and sm_120."""
    (M, K), (N, _) = a.shape, b.shape
    y = a.codes.new_empty((M, N), dtype=dtype)
    grid = programs(M, N, NATIVE_BLOCK["BLOCK_M"], NATIVE_BLOCK["BLOCK_N"])
    with torch.cuda.device_of(y):
        _matmul_native_kernel[grid](a.codes.contiguous(), swizzle(a.scales, M), a.s_dec, b.codes.contiguous(),
                                    swizzle(b.scales, N), b.s_dec, y, M, N, K, **NATIVE_BLOCK,
                                    **NATIVE_OPTIONS)
    return y


SERVED = {}                                         # torch keeps the alpha of scaled_mm in one GPU's memory


def matmul_scaled_mm(a, b, dtype):
    """matmul() of codes by torch's own block-scaled matmul (cuBLAS), where the installed torch offers it."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm
    if SERVED.setdefault("scaled_mm", a.codes.device) != a.codes.device:
        raise RuntimeError(f"torch's scaled_mm serves one GPU of a process, here {SERVED['scaled_mm']}; "
                           "torchrun gives each GPU a process")
    scaling = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    order = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    left, right = (q.codes.contiguous().view(torch.float4_e2m1fn_x2) for q in (a, b))
    a_scales, b_scales = ([swizzle(q.scales, len(q.codes)).flatten(), q.s_dec] for q in (a, b))
    return scaled_mm(left, right.t(), a_scales, scaling, b_scales, scaling, order, order, output_dtype=dtype)


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
            if not torch.equal(got.codes.cpu(), quantize(x, **how).codes):
                return False
        return True

    def multiplies(way):
        for K, n in ((288, 112), (272, 107)):       # shapes for every way, and what only some of them take
            a, b = quantize(x[:96, :K], square=True), quantize(x[-n:, :K])
            if not way.takes(a, b):
                continue
            there = [Quantized(*(t.to(device) for t in q[:3])) for q in (a, b)]
            a, b = a.dequantize().double(), b.dequantize().double()
            for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float32, 0)):
                error = (way.matmul(*there, dtype).cpu().double() - a @ b.T).abs()
                bound = K * ACCUMULATION_ERROR * (a.abs() @ b.abs().T) + rounding * (a @ b.T).abs()
                if not bool((error <= bound).all()):
                    return False
        return True
    with use_compiler(False):                       # the definition, once and small: not worth half a minute
        nearest = generation in (10, 12) and agrees("cvt.rn.satfinite.e2m1x2", lambda: rounds(False))
        stochastic = generation == 10 and agrees(   # sm_120 has no such instruction
            "cvt.rs.satfinite.e2m1x4", lambda: rounds(True))
        ways = tuple(name for name, way in WAYS.items()
                     if generation in (10, 12) and agrees(name, lambda way=way: multiplies(way)))
    return Hardware(nearest, stochastic, ways, tuple(refused))


@functools.cache
def has_kernels(device):
    """Whether the Triton kernels run on a device: NVIDIA GPUs from sm_80 on, where there is Triton."""
    return (device.type == "cuda" and torch.version.hip is None and hasattr(triton, "cdiv")
            and torch.cuda.get_device_capability(device)[0] >= 8)


def kernels_run(device, form, signs=None):
    """The one place where it is decided whether the kernels quantize on a device, or the definition does."""
    return form.kernels and (signs is None or len(signs) == len(SIGNS)) and has_kernels(device)


def decoded_dtype(device, format, result, experts=False):
    """The dtype in which operands are decoded as they are quantized, for a GEMM with results of dtype result;
    None: they stay packed, because the device multiplies FP4 itself, though not for experts."""
    if not experts and kernels_run(device, FORMATS[format]) and hardware(device).matmul:
        return None
    return gemm_dtype(device, result)


def native_way(a, b):
    """The Way in which the device multiplies a and b as they are; None: they must be decoded."""
    packed = [q for q in (a, b) if isinstance(q, Quantized) and FORMATS[q.format].reads_as_nvfp4]
    if len(packed) < 2 or not has_kernels(a.codes.device):
        return None
    return next((WAYS[name] for name in hardware(a.codes.device).matmul if WAYS[name].takes(a, b)), None)


def capability(device=None, format="nvfp4"):
    """One line: what runs FP4 on a device (default: the GPU if there is one), and why."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        chip = "sm_%d%d" % torch.cuda.get_device_capability(device)
        where, units = f"{torch.cuda.get_device_name(device)} ({chip})", "bf16 tensor cores"
        if kernels_run(device, FORMATS[format]):
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
    if not COMPILER.on:
        speed = "not fused, which is several times slower (the compiler is switched off)"
    elif can_compile(device.type):
        speed = "fused by torch.compile"
    else:
        speed = "not fused (torch.compile does not work here)"
    return f"{where}: FP4 emulated by its PyTorch definition, {speed}{why}; GEMMs on exact values in {units}"


# ---------------------------------------------------------------- a tour: python nvfp4.py

def walk(numbers):
    """The given numbers through NVFP4, step by step, as text: the page to show in front of a class."""
    form = FORMATS["nvfp4"]
    x = torch.tensor(numbers, dtype=torch.float32)[None]
    x = F.pad(x, (0, -x.shape[1] % form.block))
    q, amax = quantize(x, form.name), largest_magnitude(x)
    y = q.dequantize()
    s_enc, s_dec = (float(s) for s in tensor_scales(amax, form.top))
    lines = [f"tensor   amax {float(amax):.8g}    s_enc = {form.top:g} * 6 / amax = {s_enc:.8g}    "
             f"s_dec = 1 / s_enc = {s_dec:.8g}"]
    for i, given in enumerate(numbers):
        b, scale = i // form.block, q.scales[0, i // form.block].float()
        if i % form.block == 0:
            amax_b, bits = x[0, i:i + form.block].abs().amax(), f"{int(q.scales.view(torch.uint8)[0, b]):08b}"
            lines += ["", f"block {b}  amax {float(amax_b):.8g}    amax * s_enc / 6 = "
                      f"{amax_b * (s_enc / 6):.8g}    as E4M3 {float(scale):.8g} = "
                      f"{bits[0]} {bits[1:5]} {bits[5:]}",
                      f"{'x':>13s} {'x / (scale s_dec)':>18s} {'code':>7s} {'number':>6s} {'value':>13s} "
                      f"{'error':>10s}   at random instead"]
        scaled = float(x[0, i] * torch.clamp(1 / (scale * s_dec), max=FLT_MAX))
        code = int(q.codes[0, i // 2] >> 4 * (i % 2)) & 15
        number = math.copysign(E2M1_NUMBERS[code & 7], 0.5 - (code >> 3))
        outcomes, _ = e2m1(torch.full((256,), abs(scaled)), torch.arange(256))  # of all random bytes
        ups = int((outcomes > outcomes[0]).sum())
        odds = f"{outcomes[0]:g}" + (f", or {outcomes[-1]:g} in {ups} of 256" if ups else "")
        lines.append(f"{given:13.7g} {scaled:18.7g} {code >> 3:2b} {code >> 1 & 3:02b} {code & 1:b} "
                     f"{number:6g} {float(y[0, i]):13.7g} {float(y[0, i] - x[0, i]):10.2e}   {odds}")
    noise, signal = (float(t.double().square().sum()) for t in (y - x, x))     # squares leave fp32's range
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
        for case, choices in cases.items():
            table[name, case] = float((quantize(x, name, **choices).dequantize() - x).square().mean())
    return table


def recipe_changes(cfg):
    """{field: value} where a recipe differs from the defaults of its class."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}


def describe_operand(cfg, name):
    """What a recipe gives one of OPERANDS, in words; None: high precision."""
    how, remarks = cfg.operand(name, torch.zeros(len(OPERANDS), 2, dtype=torch.int64)), cfg.remarks(name)
    if how is None:
        return ", ".join(remarks) or None
    form = FORMATS[how["format"]]
    words = remarks + [form.name] * (form.name != cfg.format)
    words += ["stochastic" if how["stochastic"] else "nearest",
              "a row" if form.by_row else "%dx%d" % form.shape_of(how["square"])]
    if how["signs"] is not None:
        words.append("rotated" if len(how["signs"]) == len(SIGNS) else f"rotated by {len(how['signs'])}")
    if form.top is not None and how["amax"] is not None:
        words.append(f"amax = {how['amax']:g}")
    return ", ".join(words)


def main(argv, page=__doc__):
    if "-h" in argv or "--help" in argv:
        print(page.strip())
        return
    if argv and argv != ["--json"]:
        try:
            with use_compiler(False):               # a few numbers are not worth half a minute
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
    print("numbers", "  ".join(f"{number:4.1f}" for number in E2M1_NUMBERS))
    print("\nmean square error on unit Gaussians (2048 x 4096)")
    for (name, case), error in errors.items():
        print(f"  {name:14s} {FORMATS[name].bits:.2f} bits  {case:30s} {error:.2e}   "
              f"SNR {-10 * math.log10(error):.1f} dB")
    for recipe, operands in recipes.items():
        print(f"\nrecipe {recipe}: {recipe_changes(RECIPES[recipe])}")
        for name, choice in operands.items():
            print(f"  {name:9s} {choice or 'high precision'}")
    print(f"\n{capability()}")


if __name__ == "__main__":
    main(sys.argv[1:])
