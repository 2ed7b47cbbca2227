"""NVFP4: a number format of 4.5 bits, and the linear layer that trains in it.

The lesson in one page
----------------------
A 4-bit float (E2M1: one sign bit, two exponent bits, one mantissa bit) has sixteen codes,

    +-{0, 0.5, 1, 1.5, 2, 3, 4, 6},

far too few for a tensor whose values span decades. NVFP4 gives every block of 16 values a scale of its own,
an 8-bit float (E4M3), and the whole tensor one fp32 scale that moves the block scales into E4M3's range:

    value = code * scale * s_dec          4 bits each, 8 bits per 16, 32 bits per tensor

To quantize: the tensor's largest magnitude fixes s_dec, the block's largest magnitude fixes its scale (so
that it lands on 6, the largest code), and each element is rounded to the nearest code - or up or down at
random, with probabilities that make the average right (stochastic rounding).

A matrix product multiplies codes and adds them up. code * scale has at most six significant bits, so it is
exact in bf16: a bf16 GEMM on code * scale, times the two tensor scales at the end, *is* the FP4 GEMM up to
the order of accumulation. That sentence is how this file trains in FP4 on machines without FP4 units; what it
measures is the arithmetic of FP4, not its speed.

Training a linear layer takes three GEMMs, each summing over another axis, so each quantizes its own operands
in blocks along its own axis of summation:

    fprop  y  = x  w^T     x (M, K), w (N, K)     blocks along K
    dgrad  dx = dy w       dy (M, N)              blocks along N
    wgrad  dw = dy^T x                            blocks along M, the tokens

Which rounding, block shape, rotation and tensor scale each operand gets is a recipe (see RECIPES): plain
data.

Layout of the code: a matrix is looked at as blocks, (R, C/16, 16) where the GEMM sums over columns and
(R/16, 16, C) where it sums over rows. Whole-tensor PyTorch is the definition and, fused by torch.compile,
what runs on a CPU. On NVIDIA GPUs Triton kernels do the same bit for bit; a first reading may skip both
sections named Triton. What multiplies: on Blackwell its FP4 units, elsewhere bf16 units, as said above.

Sources: 2509.25149 (the format and NVIDIA's recipe), 2605.06067 (nGPT's recipe). M N K are GEMM sizes
throughout.

    python nvfp4.py             the format, its errors, what runs on this machine, and what it costs
    python nvfp4.py --json      the same for machines
    python nvfp4.py 0.1 -2.5 3  these numbers through the format, step by step
"""
import ast
import contextlib
import fnmatch
import functools
import itertools
import json
import math
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

try:
    import triton
    import triton.language as tl
except ImportError:                                 # the definition runs on any device
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)

# ---------------------------------------------------------------- constants of the format

BLOCK = 16                                          # values that share a scale
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of codes 0..7; bit 3 is the sign
E2M1_MAX = 6.0
E4M3_MAX = 448.0                                    # of the block scales (float8_e4m3fn)
FLT_MAX = torch.finfo(torch.float32).max
# Rounding a block scale to E4M3 can enlarge x / scale by 17/16. Mapping the block's largest magnitude to this
# instead of 6 keeps everything within 6, so that stochastic rounding never saturates.
UNBIASED_TARGET = E2M1_MAX * 16 / 17

# ---------------------------------------------------------------- E2M1: rounding one element


def e2m1(a, byte=None):
    """Round magnitudes to the E2M1 grid: nearest with ties to the even code, or stochastically.

    a       fp32 >= 0, any shape; above 6 and NaN saturate to 6
    byte    integers 0..255 of the same shape, or None. With f the position of a in its grid interval, a goes
            up iff floor(256 f) + byte >= 256: for floor(256 f) of the 256 bytes (Blackwell's cvt.rs adds its
            random bits below the mantissa in the same way)
    returns value fp32 on the grid, code fp32 in 0..7
    source  2509.25149 appendix B
    """
    a = torch.where(a < E2M1_MAX, a, E2M1_MAX)
    low, middle = a < 2, a < 4                      # the grid's step is 0.5 below 2, 1 below 4, 2 above
    per_unit = torch.where(low, 2.0, torch.where(middle, 1.0, 0.5))
    if byte is None:
        n = torch.round(a * per_unit)               # halves go to the even n, which is the even code
    else:
        n = torch.floor((torch.floor(a * (256 * per_unit)) + byte) * (1 / 256))
    value = n * torch.where(low, 0.5, torch.where(middle, 1.0, 2.0))
    code = n + torch.where(low, 0.0, torch.where(middle, 2.0, 4.0))
    return value, code


# ---------------------------------------------------------------- the two scales

def tensor_scales(amax, unbiased=False):
    """The tensor's encode and decode scale, fp32: the largest block is to have scale 448 and largest code 6.

    value   s_enc = 448 * target / amax, at most FLT_MAX, 1 for an all-zero tensor; s_dec = 1 / s_enc
    error   NaN if amax is NaN or infinite, so that a broken tensor stays visibly broken
    source  2509.25149 appendix B; order of rounding as in TransformerEngine
    """
    target = UNBIASED_TARGET if unbiased else E2M1_MAX
    s_enc = torch.clamp(torch.full_like(amax, E4M3_MAX * target) / amax, max=FLT_MAX)
    s_enc = torch.where(amax == 0, 1.0, s_enc)
    s_enc = torch.where(amax < math.inf, s_enc, math.nan)
    return s_enc, s_enc.reciprocal()


def block_scales(amax_b, s_enc, unbiased=False):
    """Block scales, float8_e4m3fn, from block maxima (fp32): e4m3(min(amax_b * (s_enc * (1 / target)), 448)).

    error   relative 1/16 at most (E4M3 has 3 mantissa bits) above 2^-6 / s_enc; NaN for a block with NaN or
            Inf
    """
    target = UNBIASED_TARGET if unbiased else E2M1_MAX
    scale = torch.clamp(amax_b * (s_enc * (1 / target)), max=E4M3_MAX)
    return torch.where(amax_b < math.inf, scale, math.nan).to(torch.float8_e4m3fn)


# ---------------------------------------------------------------- randomness: Philox4x32-10

MASK32 = 0xFFFFFFFF


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
    process with two micro-batches draws; operand is an index into OPERANDS.
    """
    key = seed & MASK32, (seed >> 32) & MASK32
    return philox(step & MASK32, micro_batch & MASK32, layer, operand, *key)[:2]


# ---------------------------------------------------------------- the random Hadamard transform

# one vector for every layer and step: TransformerEngine's
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard(x, signs=SIGNS, axis=-1):
    """Rotate x in blocks of 16 along axis: v -> (v * signs) H / 4, with the 16-point Sylvester matrix H.

    Orthogonal, so (A H)(B H)^T = A B^T: it changes no product, but spreads an outlier over its whole block.
    Butterflies at distance 1, 2, 4, 8, in this order, in fp32; the result is rounded to x's dtype.
    source  2509.25149 section 4.2
    """
    signs = torch.as_tensor(signs, dtype=torch.float32, device=x.device)
    axis %= x.dim()
    return _hadamard_blocks(x.unflatten(axis, (-1, BLOCK)), signs, axis + 1).view(x.shape)


# ---------------------------------------------------------------- compiling the definition

@functools.cache
def can_compile(kind):
    """Whether torch.compile works for a device type here (on CPU it needs a C++ compiler); says so if not."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(32, device=kind))
        return True
    except Exception as error:
        why = f"{type(error).__name__}: " + str(error).strip().partition("\n")[0]
        print(f"torch.compile does not work here: nothing is fused, all is several times slower ({why})",
              file=sys.stderr)
        return False


def compiled(definition):
    """Decorator: the function fused by torch.compile where that works, as it is where not; the same bits."""
    # inductor's heuristic would rather not vectorize loads that lie 16 apart, at several times the cost
    fused = torch.compile(definition, dynamic=True, fullgraph=True,
                          options={"cpp.enable_tiling_heuristics": False})

    @functools.wraps(definition)
    def run(x, *args):
        if not can_compile(x.device.type):
            return definition(x, *args)
        torch._dynamo.config.specialize_float = True                            # constants stay constants
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        return fused(x, *args)
    return run


# ---------------------------------------------------------------- quantize: the definition
# In the functions below blocks is a matrix seen as blocks, (R, C/16, 16) with dim = 2, or (R/16, 16, C) with
# dim = 1; dim is the axis inside a block. What belongs to a block has the shape without it, (R, C/16) or
# (R/16, C).

@compiled
def _hadamard_blocks(blocks, signs, dim):
    """hadamard() along dim; signs (16,) fp32."""
    v = [v.float() * signs[j] for j, v in enumerate(blocks.unbind(dim))]
    for stride in (1, 2, 4, 8):
        v = [v[j - stride] - v[j] if j & stride else v[j] + v[j + stride] for j in range(BLOCK)]
    return torch.stack([w * 0.25 for w in v], dim).to(blocks.dtype)


@compiled
def _scale_blocks(blocks, amax, dim, rows, unbiased):
    """Block scales from block maxima.

    returns scales float8_e4m3fn, one for each 1x16 (rows 1) or 16x16 (rows 16) block; for every 1x16 block
            the same in fp32 and the factor for its elements, min(1 / (scale * s_dec), FLT_MAX); s_dec ()
    """
    s_enc, s_dec = tensor_scales(amax, unbiased)
    amax_b = blocks.abs().amax(dim).float()
    across = 2 - dim                                                            # the axis across the blocks
    if rows > 1:
        amax_b = amax_b.unflatten(across, (-1, rows)).amax(across + 1)
    scales = block_scales(amax_b, s_enc, unbiased)
    scale = scales.float()
    inverse = torch.clamp((scale * s_dec).reciprocal(), max=FLT_MAX)            # of the scale as rounded
    if rows > 1:
        scale, inverse = scale.repeat_interleave(rows, across), inverse.repeat_interleave(rows, across)
    return scales, scale, inverse, s_dec


@compiled
def _random_words(key, R, C, dim):
    """The 16 random bytes of each 1x16 block as two int64 in the shape of the blocks, (..., 2).

    One Philox call a block, its counter the block's position in the matrix that the GEMM sees, whose rows are
    cut into blocks: row * blocks_per_row + block. key (2,) int64.
    """
    i, j = torch.arange(R, device=key.device)[:, None], torch.arange(C, device=key.device)
    index = i * C + j if dim == 2 else j * R + i    # dim 1: the GEMM sees C rows of R blocks
    zero = torch.zeros_like(index)
    w = philox(index & MASK32, index >> 32, zero, zero, key[0], key[1])
    return torch.stack([w[0] | w[1] << 32, w[2] | w[3] << 32], -1)


def random_bytes(key, shape, dim):
    """uint8 for every element: byte j of a block's 16 for its element j. shape: the blocks' without dim."""
    byte = _random_words(key, *shape, dim).view(torch.uint8)                    # little-endian, w[0] first
    return byte if dim == 2 else byte.transpose(1, 2)


@compiled
def _round_blocks(blocks, scale, inverse, byte, dim, dtype):
    """Divide each element by its block's scale and round it to the grid.

    returns for a dtype: code * scale in it, exact in bf16; for None: codes uint8, 0..15
    """
    x = blocks.float()
    value, code = e2m1(x.abs() * inverse.unsqueeze(dim), byte)
    negative = x.view(torch.int32) < 0                                          # the sign bit, of -0.0 too
    if dtype is None:
        return torch.where(negative, code + 8, code).to(torch.uint8)
    value = value * scale.unsqueeze(dim)
    return torch.where(negative, -value, value).to(dtype)


@compiled
def _pack(codes, dim):
    """Codes (R, C) uint8, one a byte -> two a byte, low nibble first: (R, C/2) for dim 2, (R/2, C) for 1."""
    if dim == 2:
        pairs = codes.view(torch.int16)             # a code in each byte
        return (pairs & 15 | pairs >> 4).to(torch.uint8)
    low, high = codes.unflatten(0, (-1, 2)).unbind(1)
    return low | high << 4


@compiled
def _unpack(codes, scale, dim, dtype):
    """The reverse: codes, two a byte, and scale fp32, one for each 1x16 block -> code * scale (R, C)."""
    values = []
    for nibble in (codes & 15, codes >> 4):
        code = (nibble & 7).float()                 # three steps of the grid: the largest of three lines
        value = torch.maximum(torch.maximum(0.5 * code, code - 2), 2 * code - 8)
        values.append(torch.where(nibble > 7, -value, value))
    pairs = torch.stack(values, dim)                # (R, C/2, 2) or (R/2, 2, C)
    blocks = pairs.unflatten(dim - 1, (-1, BLOCK // 2)) * scale.unsqueeze(dim).unsqueeze(dim)
    return blocks.flatten(dim - 1, dim + 1).to(dtype)


def _quantize(x, amax, key, axis, rows, unbiased, dtype):
    """The whole of NVFP4: x (R, C), blocks of rows x 16 along axis, amax () fp32, key (2,) int64 or None.

    returns for a dtype: values (R, C); for None: codes (R, C) uint8, one a byte; scales; s_dec ()
    """
    blocks, dim = x.unflatten(axis, (-1, BLOCK)), axis + 1
    scales, scale, inverse, s_dec = _scale_blocks(blocks, amax, dim, rows, unbiased)
    byte = None if key is None else random_bytes(key, scale.shape, dim)
    return _round_blocks(blocks, scale, inverse, byte, dim, dtype).view(x.shape), scales, s_dec


def _check(x, axis, block, pads=False):
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be a floating-point matrix; reshape it")
    if tuple(block) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"block={tuple(block)} must be (1, 16) or (16, 16)")
    _check_size("K", x.shape[axis], 1 if pads else BLOCK)
    _check_size("M", x.shape[1 - axis], block[0])


def _check_size(name, size, of):
    if size == 0:
        raise ValueError(f"{name}=0: an empty matrix cannot be quantized; leave it out")
    if size % of:
        raise ValueError(f"{name}={size} must be a multiple of {of} (NVFP4 block); pad the layer or leave it "
                         "out with --fp4_skip")


def _amax(x, amax):
    """The number that fixes the tensor scale, () fp32 on x's device: given, or the largest magnitude."""
    if amax is not None:
        return torch.full((), float(amax), device=x.device)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def _key(seed, device):
    """A 64-bit integer, or the (2,) int64 tensor that it stands for, as that tensor."""
    if torch.is_tensor(seed):
        return seed
    return torch.tensor([seed & MASK32, (seed >> 32) & MASK32], device=device)


@dataclass
class NVFP4Tensor:
    """A quantized matrix: value = code * scale * s_dec.

    codes   (M, K/2) uint8, two E2M1 codes a byte, the low nibble is the even column
    scales  (M, K/16) or (M/16, K/16) float8_e4m3fn
    amax    () fp32, the number that fixed the tensor scale
    s_dec   () fp32; left out, what amax makes it for the standard target
    """
    codes: torch.Tensor
    scales: torch.Tensor
    amax: torch.Tensor | None
    s_dec: torch.Tensor | None = None

    def __post_init__(self):
        if self.s_dec is None and self.amax is not None:
            _, self.s_dec = tensor_scales(self.amax)

    @property
    def shape(self):
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def values(self, dtype=torch.bfloat16):
        """code * scale, (M, K) in dtype, exact in bf16."""
        scale = self.scales.float().repeat_interleave(self.shape[0] // self.scales.shape[0], 0)
        if self.codes.stride(0) == 1:               # quantized along the columns of a matrix: see cast()
            return _unpack(self.codes.t(), scale.t(), 1, dtype).t()
        return _unpack(self.codes, scale, 2, dtype)

    def dequantize(self, dtype=torch.float32):
        """code * scale * s_dec, (M, K), rounded once to fp32 and, where asked, once more to dtype."""
        return (self.values().float() * self.s_dec).to(dtype)


class Decoded(NamedTuple):
    """The same matrix decoded again: decoded = code * scale (M, K), exact in bf16; s_dec () fp32."""
    decoded: torch.Tensor
    s_dec: torch.Tensor

    def values(self, dtype=torch.bfloat16):
        return self.decoded.to(dtype)


class Cast(NamedTuple):
    """How to quantize a matrix along one of its axes."""
    key: torch.Tensor | None = None                 # (2,) int64: round stochastically
    signs: torch.Tensor | None = None               # (16,) fp32: rotate first
    amax: float | None = None                       # fixed tensor scale; None: measured
    rows: int = 1                                   # blocks of rows x 16
    unbiased: bool = False                          # stochastic rounding aims at 6 * 16/17
    dtype: torch.dtype | None = None                # None: an NVFP4Tensor; else Decoded, in this dtype


def cast(x, row=None, col=None):
    """x (R, C) as an operand of up to two GEMMs: quantized along its rows, along its columns, or both.

    row, col    a Cast each, or None
    returns     two matrices seen with the summed axis last, NVFP4Tensor or Decoded (None where not asked): x
                (R, C), and x^T (C, R); an axis that does not fill its last block is padded with zeros
    raises      ValueError for rows = 16 where the other axis does not divide
    """
    if row is None and col is None:
        return None, None
    for axis, how in ((1, row), (0, col)):
        if how is not None:
            _check(x, axis, (how.rows, BLOCK), pads=True)
    x = x.contiguous()
    if row is not None and x.shape[1] % BLOCK:
        x = F.pad(x, (0, -x.shape[1] % BLOCK))
    if uses_kernels(x.device):
        return _cast_triton(x, row, col)
    return row and _cast_torch(x, row, 1), col and _cast_torch(x, col, 0)


@functools.cache
def uses_kernels(device):
    """Whether the Triton kernels run on a device: NVIDIA GPUs from sm_80 on, where there is Triton."""
    return (device.type == "cuda" and torch.version.hip is None and hasattr(triton, "cdiv")
            and torch.cuda.get_device_capability(device)[0] >= 8)


def _cast_torch(x, how, axis):
    """cast() along one axis: the definition."""
    if axis == 0 and x.shape[0] % BLOCK:
        x = F.pad(x, (0, 0, 0, -x.shape[0] % BLOCK))
    if how.signs is not None:
        x = hadamard(x, how.signs, axis)
    amax = _amax(x, how.amax)
    result, scales, s_dec = _quantize(x, amax, how.key, axis, how.rows, how.unbiased, how.dtype)
    if how.dtype is not None:
        return Decoded(result if axis else result.t(), s_dec)
    codes = _pack(result.contiguous(), axis + 1)
    return NVFP4Tensor(*((codes, scales.contiguous()) if axis else (codes.t(), scales.t())), amax, s_dec)


def quantize(x, block=(1, BLOCK), stochastic=False, seed=0, amax=None, unbiased=False):
    """Quantize a matrix to NVFP4.

    x       (M, K) bf16, fp16 or fp32; K a multiple of 16 (for block (16, 16) M too)
    seed    64-bit integer (or its two 32-bit words as a (2,) int64 tensor): the key of stochastic rounding
    amax    a number skips the search for the largest magnitude; what exceeds it saturates (count_saturated)
    unbiased    map a block's largest magnitude to 6 * 16/17, so that stochastic rounding never saturates
    error   mean square 9.0e-3 (nearest, 1x16), 12.4e-3 (16x16), 18.8e-3 (stochastic), 23.5e-3 (stochastic,
            unbiased) on unit Gaussians: tests/test_nvfp4.py, test_gaussian_mse
    source  2509.25149 appendix B
    raises  ValueError for a shape that does not divide into blocks
    """
    _check(x, 1, block)
    key = _key(seed, x.device) if stochastic else None
    return NVFP4Tensor(*_quantize_op(x, key, amax, block[0], unbiased))


@torch.library.custom_op("nvfp4::quantize", mutates_args=())
def _quantize_op(x: torch.Tensor, key: torch.Tensor | None, amax: float | None, rows: int, unbiased: bool
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """quantize() as one operator, through which torch.compile sees: codes, scales, amax, s_dec."""
    q, _ = cast(x, row=Cast(key, None, amax, rows, unbiased))
    return q.codes, q.scales, q.amax.clone(), q.s_dec


@_quantize_op.register_fake
def _(x, key, amax, rows, unbiased):
    M, K = x.shape
    return (x.new_empty((M, K // 2), dtype=torch.uint8),
            x.new_empty((M // rows, K // BLOCK), dtype=torch.float8_e4m3fn),
            x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.float32))


def count_saturated(x, amax, block=(1, BLOCK)):
    """How many blocks of x (M, K) hold a magnitude above a fixed amax: their scale is capped at 448."""
    _check(x, 1, block)
    blocks = x.float().abs().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, block[0]))
    return int((blocks.amax((1, 3)) > amax).sum())


def fake_quantize(x, key=None, signs=None, amax=None, axis=1, rows=1, unbiased=False, dtype=torch.bfloat16):
    """Quantize and decode in one pass: cast() along one axis, in the layout of x.

    returns values (R, C) in dtype: code * scale, exact in bf16, padded with zeros where axis does not fill
            its last block; s_dec () fp32, to be applied to the GEMM's result
    """
    how = Cast(key, signs, amax, rows, unbiased, dtype)
    if axis == 1:
        return tuple(cast(x, row=how)[0])
    values, s_dec = cast(x, col=how)[1]
    return values.t(), s_dec


# ---------------------------------------------------------------- quantize: Triton
# The same on NVIDIA GPUs, in one pass over x, and one before it where the largest magnitude is wanted. A
# program owns a tile of x and looks at its blocks as 16 tensors, v[j] holding element j of every block, so
# that what happens inside a block - maximum, butterflies, packing - is arithmetic between registers. Along
# the rows (axis 1) they come from splitting the loaded tile four times in halves, along the columns (axis 0)
# from loading every 16th row; the second reading of a tile finds it in the cache. All rounding is by fp32 and
# integer arithmetic, the same everywhere; chips with instructions for it use them (PTX, below).

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
def _load_blocks(x_ptr, R, C, pid_m, pid_n, AXIS: tl.constexpr, TILE: tl.constexpr):
    """16 fp32 tensors, (TILE, TILE/16) for axis 1 and (TILE/16, TILE) for axis 0; zeros beyond the edge."""
    offs_n = pid_n * TILE + tl.arange(0, TILE)
    if AXIS == 1:
        offs_m = pid_m * TILE + tl.arange(0, TILE)
        mask = (offs_m < R)[:, None] & (offs_n < C)[None, :]
        x = tl.load(x_ptr + offs_m[:, None].to(tl.int64) * C + offs_n[None, :], mask=mask, other=0.0)
        halves = (_upcast(x),)
        for level in tl.static_range(4):            # by the lowest bit of j, then the next, ...
            even, odd = (), ()
            for i in tl.static_range(1 << level):
                a, b = tl.split(tl.reshape(halves[i], (TILE, TILE // 16, 8 >> level, 2)))
                even, odd = even + (a,), odd + (b,)
            halves = even + odd
        v = ()
        for j in tl.static_range(16):
            v = v + (tl.reshape(halves[j], (TILE, TILE // 16)),)
        return v
    else:
        offs_m = pid_m * TILE + 16 * tl.arange(0, TILE // 16)
        v = ()
        for j in tl.static_range(16):
            mask = (offs_m + j < R)[:, None] & (offs_n < C)[None, :]
            offs = (offs_m + j)[:, None].to(tl.int64) * C + offs_n[None, :]
            v = v + (_upcast(tl.load(x_ptr + offs, mask=mask, other=0.0)),)
        return v


@triton.jit
def _store_blocks(out_ptr, v, R, C, pid_m, pid_n, AXIS: tl.constexpr, TILE: tl.constexpr):
    """The reverse of _load_blocks."""
    offs_n = pid_n * TILE + tl.arange(0, TILE)
    if AXIS == 1:
        for level in tl.static_range(4):
            joined = ()
            for i in tl.static_range(8 >> level):
                pair = tl.join(v[i], v[i + (8 >> level)])
                joined = joined + (tl.reshape(pair, (TILE, TILE // 16, 2 << level)),)
            v = joined
        offs_m = pid_m * TILE + tl.arange(0, TILE)
        mask = (offs_m < R)[:, None] & (offs_n < C)[None, :]
        tl.store(out_ptr + offs_m[:, None].to(tl.int64) * C + offs_n[None, :], tl.reshape(v[0], (TILE, TILE)),
                 mask=mask)
    else:
        offs_m = pid_m * TILE + 16 * tl.arange(0, TILE // 16)
        mask = (offs_m < R)[:, None] & (offs_n < C)[None, :]                    # whole blocks: R is padded
        for j in tl.static_range(16):
            tl.store(out_ptr + (offs_m + j)[:, None].to(tl.int64) * C + offs_n[None, :], v[j], mask=mask)


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
        v = _load_blocks(x_ptr, R, C, pid_m, pid_n, 0, TILE)
        if PLAIN:
            tl.atomic_max(amax_ptr, tl.max(_magnitude(v, dtype)))
        if COL:
            tl.atomic_max(amax_ptr + 2, tl.max(_magnitude(_rotate(v, col_signs_ptr), dtype)))
    if ROW:
        v = _rotate(_load_blocks(x_ptr, R, C, pid_m, pid_n, 1, TILE), row_signs_ptr)
        tl.atomic_max(amax_ptr + 1, tl.max(_magnitude(v, dtype)))


@triton.jit
def _tensor_scales_triton(amax, TARGET: tl.constexpr):
    """tensor_scales(); div_rn because Triton's own / is an approximation."""
    s_enc = tl.div_rn(448.0 * TARGET, amax)
    s_enc = tl.where(s_enc > 3.4028234663852886e38, 3.4028234663852886e38, s_enc)
    s_enc = tl.where(amax == 0.0, 1.0, s_enc)
    s_enc = tl.where(amax < float("inf"), s_enc, float("nan"))
    return s_enc, tl.div_rn(1.0, s_enc)


@triton.jit
def _block_scales_triton(amax_b, s_enc, s_dec, TARGET: tl.constexpr):
    """block_scales(): the E4M3 byte, its value in fp32, and the factor for the block's elements."""
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
def _e2m1_triton(a, byte, STOCHASTIC: tl.constexpr):
    """e2m1(): the code of magnitudes a, int32 0..7.

    In steps of the grid a lies at min(2 a, a + 2, a / 2 + 4): three lines, one for each step, and a rounding
    of the least is the least of the roundings.
    """
    a = tl.minimum(a, 6.0)                          # of NaN too
    if STOCHASTIC:
        t = (a * 512.0).to(tl.int32)                # floor(256 * 2 a); halving it floors again
        return (tl.minimum(tl.minimum(t, (t >> 1) + 512), (t >> 2) + 1024) + byte) >> 8
    else:                                           # add the power of two whose last bit weighs a step at a
        power = (tl.maximum(a, 1.0).to(tl.int32, bitcast=True) & 0x7F800000) + (22 << 23)
        bits = (a + power.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
        return (bits & 7) + (bits >> 22) - 298      # steps, and 2 for every doubling: 298 is 2^22's exponent


@triton.jit
def _codes(v, inverse, random, STOCHASTIC: tl.constexpr):
    """The 16 codes of every block, int32 0..15; random: its four random words, uint32."""
    codes = ()
    for j in tl.static_range(16):
        byte = ((random[j // 4] >> (8 * (j % 4))) & 255).to(tl.int32) if STOCHASTIC else 0
        sign = (v[j].to(tl.int32, bitcast=True) >> 28) & 8
        codes = codes + (_e2m1_triton(tl.abs(v[j]) * inverse, byte, STOCHASTIC) | sign,)
    return codes


@triton.jit
def _word(codes, FIRST: tl.constexpr):
    """8 of the 16 codes of every block, from FIRST on, as one int32 word."""
    word = codes[FIRST]
    for j in tl.static_range(1, 8):
        word |= codes[FIRST + j] << (4 * j)
    return word


@triton.jit
def _word_ptx(v, inverse, random, FIRST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The same by the chip's conversions, from the elements."""
    u = ()
    for j in tl.static_range(FIRST, FIRST + 8):     # the sign is put back, for a NaN has lost it
        a = tl.minimum(tl.abs(v[j]) * inverse, 6.0).to(tl.int32, bitcast=True)
        u = u + (a | (v[j].to(tl.int32, bitcast=True) & -2147483648),)
    if STOCHASTIC:                                  # byte k of a random word belongs to the k-th element
        return tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; cvt.rs.satfinite.e2m1x4.f32 a, {$4, $3, $2, $1}, $9; "
            "cvt.rs.satfinite.e2m1x4.f32 b, {$8, $7, $6, $5}, $10; mov.b32 $0, {a, b}; }",
            "=r,r,r,r,r,r,r,r,r,r,r",
            [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], random[FIRST // 4], random[FIRST // 4 + 1]],
            dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b8 a, b, c, d; cvt.rn.satfinite.e2m1x2.f32 a, $2, $1; "
            "cvt.rn.satfinite.e2m1x2.f32 b, $4, $3; cvt.rn.satfinite.e2m1x2.f32 c, $6, $5; "
            "cvt.rn.satfinite.e2m1x2.f32 d, $8, $7; mov.b32 $0, {a, b, c, d}; }",
            "=r,r,r,r,r,r,r,r,r", [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7]],
            dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _decode(code):
    """2^-126 of a code's value, exact: its three bits stand where an fp32 has its lowest exponent bits."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_tile(x_ptr, out_ptr, scales_ptr, s_dec_ptr, amax_ptr, key_ptr, signs_ptr, R, C,
                   AXIS: tl.constexpr, ROWS: tl.constexpr, TARGET: tl.constexpr, STOCHASTIC: tl.constexpr,
                   ROTATE: tl.constexpr, DECODE: tl.constexpr, PTX: tl.constexpr, TILE: tl.constexpr):
    """One direction of _quantize_kernel. line, block: where a block stands in the matrix the GEMM sees."""
    n = tl.cdiv(C, TILE)
    pid_m, pid_n = tl.program_id(0) // n, tl.program_id(0) % n
    if AXIS == 1:
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
    v = _load_blocks(x_ptr, R, C, pid_m, pid_n, AXIS, TILE)
    if ROTATE:
        v = _rotate(v, signs_ptr)
    amax_b = _magnitude(v, dtype)
    if ROTATE:
        rounded = ()
        for j in tl.static_range(16):
            rounded = rounded + (_round_to(v[j], dtype),)
        v = rounded
    if ROWS == 16:                                  # the largest of 16 lines, for each of them
        SHAPE: tl.constexpr = (TILE // 16, 16, TILE // 16) if AXIS == 1 else (TILE // 16, TILE // 16, 16)
        lines: tl.constexpr = 1 if AXIS == 1 else 2
        largest = tl.expand_dims(tl.max(tl.reshape(amax_b, SHAPE), lines), lines)
        amax_b = tl.reshape(tl.broadcast_to(largest, SHAPE), amax_b.shape)
    s_enc, s_dec = _tensor_scales_triton(tl.load(amax_ptr), TARGET)
    byte, scale, inverse = _block_scales_triton(amax_b.to(tl.float32, bitcast=True), s_enc, s_dec, TARGET)
    tl.store(scales_ptr + (line // ROWS).to(tl.int64) * n_blocks + block, byte.to(tl.uint8),
             mask=inside & (line % ROWS == 0))
    if tl.program_id(0) == 0:
        tl.store(s_dec_ptr, s_dec)
    # === elements ===
    random = (0, 0, 0, 0)
    if STOCHASTIC:
        zero = tl.zeros_like(index).to(tl.uint32)
        random = tl.philox_impl(index.to(tl.uint32), (index >> 32).to(tl.uint32), zero, zero,
                                tl.load(key_ptr).to(tl.uint32), tl.load(key_ptr + 1).to(tl.uint32))
    if DECODE:
        codes, values = _codes(v, inverse, random, STOCHASTIC), ()
        for j in tl.static_range(16):
            value = _decode(codes[j]) * 8.507059173023462e37 * scale            # 2^126
            values = values + (value.to(out_ptr.dtype.element_ty),)
        _store_blocks(out_ptr, values, R, C, pid_m, pid_n, AXIS, TILE)
    else:                                           # the codes of a block are one 64-bit word
        if PTX:
            low = _word_ptx(v, inverse, random, 0, STOCHASTIC)
            high = _word_ptx(v, inverse, random, 8, STOCHASTIC)
        else:
            codes = _codes(v, inverse, random, STOCHASTIC)
            low, high = _word(codes, 0), _word(codes, 8)
        word = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
        tl.store(out_ptr + index, word, mask=inside)


@triton.jit
def _quantize_kernel(x_ptr, R, C, row_ptr, row_scales_ptr, row_s_dec_ptr, row_amax_ptr, row_key_ptr,
                     row_signs_ptr, col_ptr, col_scales_ptr, col_s_dec_ptr, col_amax_ptr, col_key_ptr,
                     col_signs_ptr, ROW: tl.constexpr, COL: tl.constexpr, TILE: tl.constexpr):
    """x (R, C) quantized along its rows, its columns or both; ROW, COL: how (the flags of _quantize_tile)."""
    if ROW is not None:
        _quantize_tile(x_ptr, row_ptr, row_scales_ptr, row_s_dec_ptr, row_amax_ptr, row_key_ptr,
                       row_signs_ptr, R, C, 1, ROW[0], ROW[1], ROW[2], ROW[3], ROW[4], ROW[5], TILE)
    if COL is not None:
        _quantize_tile(x_ptr, col_ptr, col_scales_ptr, col_s_dec_ptr, col_amax_ptr, col_key_ptr,
                       col_signs_ptr, R, C, 0, COL[0], COL[1], COL[2], COL[3], COL[4], COL[5], TILE)


@functools.cache
def _constant(value, device):
    return torch.full((), value, device=device)


def _cast_triton(x, row, col, ptx=None):
    """cast() by the kernels, for a contiguous x. ptx: chip has instructions for (nearest, stochastic)."""
    ptx = hardware(x.device)[:2] if ptx is None else ptx
    with _current(x.device):
        return _launch_quantize(x, row, col, ptx)


def _current(device):
    """Context: Triton launches on the current device, which need not be that of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch_quantize(x, row, col, ptx):
    R, C = x.shape
    grid = (triton.cdiv(R, TILE) * triton.cdiv(C, TILE),)
    signs = [x if how is None or how.signs is None else how.signs for how in (row, col)]  # x: not read
    slots = [0 if s is x else slot for slot, s in enumerate(signs, 1)]          # in _amax_kernel's maxima
    wanted = [slot for slot, how in zip(slots, (row, col), strict=True) if how and how.amax is None]
    maxima = None
    if wanted:
        maxima = torch.zeros(3, dtype=torch.int32, device=x.device)
        _amax_kernel[grid](x, maxima, *signs, R, C, *(slot in wanted for slot in range(3)), TILE,
                           **QUANTIZE_OPTIONS)
    pointers, flags, results = [], [], []
    for axis, how, sign, slot in ((1, row, signs[0], slots[0]), (0, col, signs[1], slots[1])):
        if how is None:
            pointers, flags, results = pointers + [x] * 6, flags + [None], results + [None]
            continue
        lines, n_blocks = (R, C // BLOCK) if axis else (C, triton.cdiv(R, BLOCK))
        scales = x.new_empty((lines // how.rows, n_blocks), dtype=torch.uint8)
        amax = maxima.view(torch.float32)[slot] if how.amax is None else _constant(float(how.amax), x.device)
        s_dec = x.new_empty((), dtype=torch.float32)
        if how.dtype is None:
            out = x.new_empty((lines, n_blocks), dtype=torch.int64)
            q = NVFP4Tensor(out.view(torch.uint8), scales.view(torch.float8_e4m3fn), amax, s_dec)
        else:
            out = x.new_empty((R if axis else BLOCK * n_blocks, C), dtype=how.dtype)
            q = Decoded(out if axis else out.t(), s_dec)
        stochastic = how.key is not None
        pointers += [out, scales, s_dec, amax, how.key if stochastic else x, sign]
        flags.append((how.rows, UNBIASED_TARGET if how.unbiased else E2M1_MAX, stochastic, sign is not x,
                      how.dtype is not None, bool(ptx[stochastic])))
        results.append(q)
    _quantize_kernel[grid](x, R, C, *pointers, *flags, TILE, **QUANTIZE_OPTIONS)
    return tuple(results)


# ---------------------------------------------------------------- GEMM

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
            return _scale_result(torch.mm(a, b, out_dtype=torch.float32), alpha, dtype)
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


@compiled
def _scale_result(y, alpha, dtype):
    return (y * alpha).to(dtype)


def matmul(a, b, dtype=torch.float32, alpha=None):
    """a (M, K) @ b (N, K)^T of two NVFP4Tensors or Decoded -> (M, N) in dtype.

    alpha   the product of their s_dec, where it is known on the host; of use to Decoded operands only
    error   the order of fp32 accumulation only: 1e-5 relative to float64, test_matmul_is_exact_products
    """
    if isinstance(a, NVFP4Tensor) and isinstance(b, NVFP4Tensor):
        return _matmul_op(a.codes, a.scales, a.s_dec, b.codes, b.scales, b.s_dec, dtype)
    device = a[0].device if isinstance(a, Decoded) else a.codes.device
    want = gemm_dtype(device, dtype)
    return gemm(a.values(want), b.values(want).t(), a.s_dec * b.s_dec if alpha is None else alpha, dtype)


@torch.library.custom_op("nvfp4::matmul", mutates_args=())
def _matmul_op(a: torch.Tensor, a_scales: torch.Tensor, a_s_dec: torch.Tensor, b: torch.Tensor,
               b_scales: torch.Tensor, b_s_dec: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """matmul() of codes as one operator: native where the chip multiplies FP4, decoded in registers on other
    GPUs, decoded in memory elsewhere."""
    if uses_kernels(a.device):
        way = hardware(a.device).matmul
        return WAYS[way](a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype)
    a, b = (NVFP4Tensor(codes, scales, None).values(gemm_dtype(codes.device, dtype))
            for codes, scales in ((a, a_scales), (b, b_scales)))
    return gemm(a, b.t(), a_s_dec * b_s_dec, dtype)


@_matmul_op.register_fake
def _(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


# ---------------------------------------------------------------- GEMM: Triton
# y = alpha * a b^T on packed codes, tile by tile: the codes travel, 4.5 bits a value instead of 16.


@triton.jit
def _position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles in groups of 8 rows: programs that run together share operands in the L2 cache."""
    pid, n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = pid // (8 * n) * 8
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, 8)
    return first + pid % (8 * n) % rows, pid % (8 * n) // rows


@triton.jit
def _load_codes(codes_ptr, n_lines, K, offs_line, k, BLOCK_K: tl.constexpr):
    """(lines, BLOCK_K/2) uint8; zeros beyond the edge."""
    offs_k = k // 2 + tl.arange(0, BLOCK_K // 2)
    mask = (offs_line < n_lines)[:, None] & (offs_k < K // 2)[None, :]
    offs = offs_line[:, None].to(tl.int64) * (K // 2) + offs_k[None, :]
    return tl.load(codes_ptr + offs, mask=mask, other=0)


@triton.jit
def _load_decoded(codes_ptr, scales_ptr, n_lines, K, offs_line, k, ROWS: tl.constexpr, LINES: tl.constexpr,
                  BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """code * scale * 2^-7 in DTYPE, (LINES, BLOCK_K): of _decode's 2^-126 as much is made good here as does
    not overflow."""
    codes = _load_codes(codes_ptr, n_lines, K, offs_line, k, BLOCK_K).to(tl.int32)
    offs_b = k // 16 + tl.arange(0, BLOCK_K // 16)
    mask = (offs_line < n_lines)[:, None] & (offs_b < K // 16)[None, :]
    byte = tl.load(scales_ptr + (offs_line // ROWS)[:, None].to(tl.int64) * (K // 16) + offs_b[None, :],
                   mask=mask, other=0).to(tl.int32)
    scale = (byte << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36    # E4M3's bits: 2^-120 of it
    scale = tl.where((byte & 0x7F) == 0x7F, float("nan"), scale * 6.64613997892458e35)      # 2^119
    scale = tl.broadcast_to(scale[:, :, None], (LINES, BLOCK_K // 16, 8))
    scale = tl.reshape(scale, (LINES, BLOCK_K // 2))
    even, odd = _decode(codes) * scale, _decode(codes >> 4) * scale
    return tl.reshape(tl.join(even.to(DTYPE), odd.to(DTYPE)), (LINES, BLOCK_K))


@triton.jit
def _store_product(y_ptr, y, a_s_dec_ptr, b_s_dec_ptr, M, N, offs_m, offs_n):
    """y * alpha, rounded once to the dtype of the result."""
    y = y * (tl.load(a_s_dec_ptr) * tl.load(b_s_dec_ptr))
    tl.store(y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _matmul_kernel(a_ptr, a_scales_ptr, a_s_dec_ptr, b_ptr, b_scales_ptr, b_s_dec_ptr, y_ptr, M, N, K,
                   A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """Decoded in registers, multiplied by bf16 tensor cores (sm_80 to sm_90). a has blocks of A_ROWS x 16."""
    pid_m, pid_n = _position(M, N, BLOCK_M, BLOCK_N)
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = _load_decoded(a_ptr, a_scales_ptr, M, K, offs_m, k, A_ROWS, BLOCK_M, BLOCK_K, DTYPE)
        b = _load_decoded(b_ptr, b_scales_ptr, N, K, offs_n, k, B_ROWS, BLOCK_N, BLOCK_K, DTYPE)
        y = tl.dot(a, tl.trans(b), y)
    y = y * 16384.0                                 # the rest of _decode's 2^-126, twice 2^7
    _store_product(y_ptr, y, a_s_dec_ptr, b_s_dec_ptr, M, N, offs_m, offs_n)


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

    scales  (M, K/16) or (M/16, K/16) float8_e4m3fn; n_lines = M
    returns (M/128, K/64, 32, 4, 4), zero-padded: of every 128 x 4 tile, rows r, r + 32, r + 64, r + 96 side
            by side. source: cuBLAS documentation, "1D block scaling factors layout"
    """
    scales = scales.view(torch.uint8).repeat_interleave(n_lines // scales.shape[0], 0)
    scales = F.pad(scales, (0, -scales.shape[1] % 4, 0, -n_lines % 128))
    tiles = scales.view(scales.shape[0] // 128, 4, 32, scales.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(torch.float8_e4m3fn)


REGISTERS_BLOCK = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
HOPPER_BLOCK = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}  # more shared memory, for fewer decodings
REGISTERS_OPTIONS = {"num_warps": 8, "num_stages": 3}
NATIVE_BLOCK = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}
NATIVE_OPTIONS = {"num_warps": 8, "num_stages": 2}


def _launch_matmul(kernel, a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype, block, **constants):
    (M, K), N = (a.shape[0], 2 * a.shape[1]), b.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    grid = (triton.cdiv(M, block["BLOCK_M"]) * triton.cdiv(N, block["BLOCK_N"]),)
    with _current(a.device):
        kernel[grid](a.contiguous(), a_scales, a_s_dec, b.contiguous(), b_scales, b_s_dec, y, M, N, K,
                     **block, **constants)
    return y


def matmul_registers(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype, block=None, through=None):
    """matmul() of codes on a GPU without FP4 units; through the tensor cores as bf16 (Triton's interpreter,
    whose dot takes bf16 for integers, needs fp32 instead: the values are the same)."""
    if block is None:
        block = HOPPER_BLOCK if torch.cuda.get_device_capability(a.device)[0] == 9 else REGISTERS_BLOCK
    rows = {"A_ROWS": a.shape[0] // a_scales.shape[0], "B_ROWS": b.shape[0] // b_scales.shape[0]}
    a_scales, b_scales = (s.contiguous().view(torch.uint8) for s in (a_scales, b_scales))
    return _launch_matmul(_matmul_kernel, a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype, block, **rows,
                          DTYPE=through or tl.bfloat16, **REGISTERS_OPTIONS)


def matmul_dot_scaled(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype):
    """matmul() of codes by the FP4 units of sm_100, sm_103 and sm_120."""
    return _launch_matmul(_matmul_native_kernel, a, swizzle(a_scales, a.shape[0]), a_s_dec, b,
                          swizzle(b_scales, b.shape[0]), b_s_dec, dtype, NATIVE_BLOCK, **NATIVE_OPTIONS)


def matmul_scaled_mm(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype):
    """matmul() of codes by torch's own block-scaled matmul (cuBLAS), where the installed torch offers it."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm
    if a.shape[1] % 16 or b.shape[0] % 16:          # cuBLAS reads 16 bytes at a time, and writes 16 columns
        return matmul_dot_scaled(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype)
    scaling = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    order = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    a, b = (t.contiguous().view(torch.float4_e2m1fn_x2) for t in (a, b))
    return scaled_mm(a, b.t(), [swizzle(a_scales, a.shape[0]).flatten(), a_s_dec], scaling,
                     [swizzle(b_scales, b.shape[0]).flatten(), b_s_dec], scaling, order, order,
                     output_dtype=dtype)


WAYS = {"scaled_mm": matmul_scaled_mm, "dot_scaled": matmul_dot_scaled, "registers": matmul_registers}


class Hardware(NamedTuple):
    """What a GPU's FP4 instructions are used for, because they were seen to agree with the definition."""
    nearest: bool                                   # PTX cvt.rn.satfinite.e2m1x2
    stochastic: bool                                # PTX cvt.rs.satfinite.e2m1x4
    matmul: str                                     # of WAYS; registers: no FP4 units


@functools.cache
def hardware(device):
    """Look at a GPU once: try the FP4 instructions that its generation has, and use those that
    agree with the definition: rounding bit for bit, products to 1e-5. Others are named on stderr."""
    generation = torch.cuda.get_device_capability(device)[0]
    x = torch.randn(204, 272, generator=torch.Generator().manual_seed(0)).bfloat16()   # edges, and many ties
    x[:4] *= torch.tensor([0.0, 1e-6, 1e-39, 100.0])[:, None]
    key = _key(1, "cpu")

    def agrees(what, check):
        try:
            if check():
                return True
            why = "its result is not the definition's"
        except Exception as error:
            why = f"{type(error).__name__}: " + str(error).strip().partition("\n")[0]
        print(f"{torch.cuda.get_device_name(device)}: {what} is not used ({why})", file=sys.stderr)
        return False

    def rounds(key):
        for amax in (None, 1.0):
            how = Cast(key if key is None else key.to(device), amax=amax)
            got, _ = _cast_triton(x.to(device), how, None, ptx=(True, True))
            if not torch.equal(got.codes.cpu(), _cast_torch(x, Cast(key, amax=amax), 1).codes):
                return False
        return True

    def multiplies(way):
        for n in (112, 108):                        # lines of b
            a, b = _cast_torch(x[:96], Cast(rows=16), 1), _cast_torch(x[-n:], Cast(), 1)
            args = [t.to(device) for q in (a, b) for t in (q.codes, q.scales, q.s_dec)]
            a, b = a.dequantize().double(), b.dequantize().double()
            for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float32, 0)):
                error = (way(*args, dtype).cpu().double() - a @ b.T).abs()
                if not bool((error <= 1e-5 * (a.abs() @ b.abs().T) + rounding * (a @ b.T).abs()).all()):
                    return False
        return True
    nearest = generation in (10, 12) and agrees("cvt.rn.satfinite.e2m1x2", lambda: rounds(None))
    stochastic = generation == 10 and agrees("cvt.rs.satfinite.e2m1x4", lambda: rounds(key))  # not in sm_120
    native = [way for way in ("scaled_mm", "dot_scaled")
              if generation in (10, 12) and agrees(way, lambda way=way: multiplies(WAYS[way]))]
    return Hardware(nearest, stochastic, (native or ["registers"])[0])


# ---------------------------------------------------------------- recipes

GEMMS = ("fprop", "dgrad", "wgrad")
OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")


@dataclass(frozen=True)
class FP4Config:
    gemms: tuple[str, ...] = GEMMS                  # which GEMMs of a layer run in FP4: fprop,dgrad,wgrad
    stochastic: tuple[str, ...] = ("dgrad.dy", "wgrad.dy")  # operands rounded stochastically
    unbiased: bool = False                          # stochastic operands aim at 6*16/17: none saturates
    hadamard: tuple[str, ...] = ()                  # GEMMs whose operands are rotated along the summed axis
    signs: str = "fixed"                            # of the rotation: fixed, none, or fresh (drawn each step)
    weight_block: str = "16x16"                     # 16x16 (one copy serves fprop and dgrad) or 1x16
    input_amax: float | None = None                 # fixed tensor scale of activations; None: measured
    weight_amax: float | None = None                # the same for weights
    grad_amax: float | None = None                  # the same for output gradients
    head_blocks: int = 0                            # first blocks kept in high precision
    tail: float = 0.0                               # last fraction of the blocks kept in high precision
    skip: tuple[str, ...] = ("head", "*router*")    # names of linear layers kept in high precision, as globs

    def __post_init__(self):
        for name, allowed in (("gemms", GEMMS), ("stochastic", OPERANDS), ("hadamard", GEMMS)):
            for word in getattr(self, name):
                if word not in allowed:
                    raise ValueError(f"fp4_{name}={word} must be of {', '.join(allowed)}")
        for name, allowed in (("signs", ("fixed", "none", "fresh")), ("weight_block", ("16x16", "1x16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"fp4_{name}={getattr(self, name)} must be of {', '.join(allowed)}")
        for name in ("input_amax", "weight_amax", "grad_amax"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"fp4_{name}={value} must be a positive number, or None to measure it")
        if not 0 <= self.tail <= 1:
            raise ValueError(f"fp4_tail={self.tail} must be in [0, 1]")
        if self.head_blocks < 0:
            raise ValueError(f"fp4_head_blocks={self.head_blocks} must be >= 0")

    def amax(self, operand):
        """The fixed tensor scale's amax of one of OPERANDS, or None."""
        return {"x": self.input_amax, "w": self.weight_amax, "dy": self.grad_amax}[operand.split(".")[1]]


RECIPES = {
    "bf16": FP4Config(gemms=()),
    # 2605.06067 table 2: stochastic rounding and nothing else. Unit-norm rows make amax = 1 a constant for
    # inputs and weights; gradients have no such bound and keep their measured scale, as in the paper's
    # released scripts.
    "ngpt": FP4Config(input_amax=1.0, weight_amax=1.0),
    # 2509.25149 section 4: 16x16 weights, SR on gradients, rotated wgrad operands, the last 15 % of layers in
    # BF16. The measured scale of an activation looks at all its tokens, so that a token's output depends, in
    # the last bits, on the tokens after it; the fixed scale of "ngpt" does not.
    "nvfp4": FP4Config(hadamard=("wgrad",), tail=0.15),
}


def recipe_changes(cfg):
    """{field: value} where a recipe differs from the defaults of FP4Config."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}


# ---------------------------------------------------------------- the linear layer

def native(device):
    """Whether a device multiplies FP4 itself: operands then stay packed."""
    return uses_kernels(device) and hardware(device).matmul != "registers"


def rotation(cfg, gemm_name, keys):
    """Signs (16,) fp32 of a GEMM's rotation, the same for both its operands."""
    if cfg.signs == "fresh":                        # 16 bits of a key; of the weight's, where it takes part
        bits = keys[{"fprop": 1, "dgrad": 3, "wgrad": 4}[gemm_name], 0]
        return 1.0 - 2.0 * ((bits >> torch.arange(BLOCK, device=bits.device)) & 1)
    return _fixed_signs(SIGNS if cfg.signs == "fixed" else (1,) * BLOCK, keys.device)


@functools.cache
def _fixed_signs(signs, device):
    return torch.tensor(signs, dtype=torch.float32, device=device)


def operand_cast(cfg, name, keys, out_dtype):
    """The Cast of one of OPERANDS as the recipe says, for a GEMM with a result in out_dtype; keys (6, 2)."""
    gemm_name, kind = name.split(".")
    stochastic = name in cfg.stochastic
    return Cast(key=keys[OPERANDS.index(name)] if stochastic else None,
                signs=rotation(cfg, gemm_name, keys) if gemm_name in cfg.hadamard else None,
                amax=cfg.amax(name), rows=BLOCK if kind == "w" and cfg.weight_block == "16x16" else 1,
                unbiased=stochastic and cfg.unbiased,
                dtype=None if native(keys.device) else gemm_dtype(keys.device, out_dtype))


@functools.cache
def fixed_alpha(cfg, gemm_name):
    """The product of the operands' s_dec where the recipe fixes both, so that no GPU need be asked for it."""
    alpha = torch.ones(())
    for name in (name for name in OPERANDS if name.startswith(gemm_name)):
        if cfg.amax(name) is None:
            return None
        unbiased = cfg.unbiased and name in cfg.stochastic
        alpha = alpha * tensor_scales(torch.tensor(cfg.amax(name)), unbiased)[1]
    return float(alpha)


def _tensors(operand):
    """An operand as the list of tensors that an operator takes; _operand() is the reverse."""
    return list(operand) if isinstance(operand, Decoded) else [operand.codes, operand.scales, operand.s_dec]


def _operand(tensors):
    if len(tensors) == 2:
        return Decoded(*tensors)
    codes, scales, s_dec = tensors
    return NVFP4Tensor(codes, scales, None, s_dec)


def _into(old, new):
    """Tensors copied into older ones of their kind; themselves where those are of another."""
    if [(t.shape, t.dtype, t.device) for t in old] != [(t.shape, t.dtype, t.device) for t in new]:
        return new
    for a, b in zip(old, new, strict=True):
        a.copy_(b)
    return old


@functools.cache
def _config(recipe):
    return FP4Config(**ast.literal_eval(recipe))


# The two operators of the layer. They are opaque to torch.compile, which sees their shapes and, between them,
# a graph without breaks; w_row and w_col are the quantized weight for fprop and for dgrad.

@torch.library.custom_op("nvfp4::linear", mutates_args=())
def _linear(x: torch.Tensor, w: torch.Tensor, w_row: list[torch.Tensor], w_col: list[torch.Tensor],
            keys: torch.Tensor, recipe: str, saves: bool
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (M, N) = x w^T of x (M, K) and w (N, K); and, if saves, what wgrad needs of x: 4.5 bits a value."""
    cfg, row, col = _config(recipe), None, None
    if "fprop" in cfg.gemms:
        row = operand_cast(cfg, "fprop.x", keys, x.dtype)
    if saves and "wgrad" in cfg.gemms:
        col = operand_cast(cfg, "wgrad.x", keys, w.dtype)._replace(dtype=None)
    x_row, x_col = cast(x, row, col)                                            # (M, K), (K, M)
    # === fprop: y = x w^T ===
    if row:
        y = matmul(x_row, _operand(w_row), x.dtype, fixed_alpha(cfg, "fprop"))
    else:
        y = F.linear(x, w.to(x.dtype))
    return y, *(_tensors(x_col) if col else [x.new_empty(0) for _ in range(3)])


@_linear.register_fake
def _(x, w, w_row, w_col, keys, recipe, saves):
    y = x.new_empty((x.shape[0], w.shape[0]))
    if not saves or "wgrad" not in _config(recipe).gemms:
        return y, *(x.new_empty(0) for _ in range(3))
    n, K = (x.shape[0] + BLOCK - 1) // BLOCK, x.shape[1]

    def empty(columns, dtype):                      # the kernels' x^T is contiguous, the definition's a view
        if uses_kernels(x.device):
            return x.new_empty((K, columns), dtype=dtype)
        return x.new_empty((columns, K), dtype=dtype).t()
    return (y, empty(n * BLOCK // 2, torch.uint8), empty(n, torch.float8_e4m3fn),
            x.new_empty((), dtype=torch.float32))


@torch.library.custom_op("nvfp4::linear_backward", mutates_args=())
def _linear_backward(dy: torch.Tensor, x: list[torch.Tensor], w: torch.Tensor, w_col: list[torch.Tensor],
                     keys: torch.Tensor, recipe: str, needs_dx: bool, needs_dw: bool
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (M, K) and dw (N, K) of dy (M, N); x: the codes that _linear saved or, with wgrad not in FP4, x."""
    cfg, row, col = _config(recipe), None, None
    if needs_dx and "dgrad" in cfg.gemms:
        row = operand_cast(cfg, "dgrad.dy", keys, dy.dtype)
    if needs_dw and "wgrad" in cfg.gemms:
        col = operand_cast(cfg, "wgrad.dy", keys, w.dtype)
    dy_row, dy_col = cast(dy, row, col)                                         # (M, N), (N, M)
    # === dgrad: dx = dy w ===
    dx = dw = None
    if row:
        dx = matmul(dy_row, _operand(w_col), dy.dtype, fixed_alpha(cfg, "dgrad"))
    elif needs_dx:
        dx = dy @ w.to(dy.dtype)
    # === wgrad: dw = dy^T x, into fp32, because micro-batches and ranks are summed ===
    if col:
        dw = matmul(dy_col, _operand(x), w.dtype, fixed_alpha(cfg, "wgrad"))
    elif needs_dw:
        dw = (dy.t() @ x[0]).to(w.dtype)
    return dy.new_empty(0) if dx is None else dx, dy.new_empty(0) if dw is None else dw


@_linear_backward.register_fake
def _(dy, x, w, w_col, keys, recipe, needs_dx, needs_dw):
    return (dy.new_empty((dy.shape[0], w.shape[1]) if needs_dx else 0),
            torch.empty_like(w, memory_format=torch.contiguous_format) if needs_dw else dy.new_empty(0))


def _save(ctx, inputs, output):
    x, w, _, w_col, keys, ctx.recipe, _ = inputs
    x = output[1:] if "wgrad" in _config(ctx.recipe).gemms else (x,)
    ctx.save_for_backward(w, keys, *w_col, *x)
    ctx.n_weight = len(inputs[2]), len(w_col)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dy, *_):
    w, keys, *rest = ctx.saved_tensors              # asked for once: checkpointing computes them anew
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    n_row, n_col = ctx.n_weight
    w_col, x = rest[:n_col], rest[n_col:]
    dx, dw = _linear_backward(dy, x, w, w_col, keys, ctx.recipe, needs_dx, needs_dw)
    return (dx if needs_dx else None, dw if needs_dw else None, [None] * n_row, [None] * n_col,
            None, None, None)


_linear.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def _optimizer_steps():
    """A counter, in a list, of the steps of all optimizers: fused ones change weights behind autograd's back,
    without the version counter of the tensor noticing."""
    count = [0]

    def add(*_):
        count[0] += 1
    register_optimizer_step_post_hook(add)
    return count


class FP4Linear(torch.nn.Linear):
    """nn.Linear whose GEMMs run in NVFP4; same parameters and state_dict. Use convert() to make them.

    The fp32 master weight is quantized when it has changed, once per optimizer step, and serves every
    micro-batch. Changes through weight.data, or by a CUDA graph that is replayed, go unnoticed until set_step
    opens another step or an optimizer is called. keys (6, 2) int64 are the Philox keys of the six operands;
    set_step draws them.
    """

    def __init__(self, linear, cfg, index=0):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.cfg, self.index = cfg, index           # index: which linear layer, for the random stream
        self.recipe = repr(asdict(cfg))             # cfg as an operator takes it
        self.fp4 = True                             # False: high precision for now, see high_precision()
        self.drawn = None                           # (seed, step) that the keys belong to; None: to no step
        self.hooked = False                         # a hook of convert() looks after the quantized weight
        self.version = None                         # of the weight behind w_row and w_col
        self.w_row, self.w_col = [], []
        # no buffer: DistributedDataParallel would overwrite it with the first rank's
        self.keys = torch.tensor([stream_key(0, 0, 0, index, operand) for operand in range(len(OPERANDS))],
                                 device=linear.weight.device)
        _optimizer_steps()                          # starts counting
        _check_size("K", self.in_features, BLOCK)
        _check_size("N", self.out_features, BLOCK)

    @torch.inference_mode(False)                    # an evaluation's weights must serve training too
    @torch.no_grad()
    def refresh(self):
        """Quantize the weight if it has changed since the last time, and always in a CUDA graph's capture;
        into the same memory, where graphs look for it."""
        w, cfg = self.weight, self.cfg
        version = (id(w), w._version, w.data_ptr(), _optimizer_steps()[0], self.drawn)
        if self.version == version and not (w.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self.version, self.keys = version, self.keys.to(w.device)
        row, col = (operand_cast(cfg, name, self.keys, torch.bfloat16) for name in ("fprop.w", "dgrad.w"))
        square = cfg.weight_block == "16x16" and not {"fprop", "dgrad"} & set(cfg.hadamard)
        shared = square and not {"fprop.w", "dgrad.w"} & set(cfg.stochastic) and row.dtype is not None
        w_row, w_col = cast(w, row, None if shared else col)                    # (N, K), (K, N)
        self.w_row = _into(self.w_row, _tensors(w_row))
        if shared:                                  # square blocks: the transpose of one is the other
            self.w_col = [self.w_row[0].t(), self.w_row[1]]
        else:
            self.w_col = _into(self.w_col, _tensors(w_col))

    def forward(self, x):
        if not self.fp4 or x.numel() == 0:
            return F.linear(x, self.weight, self.bias)
        if not (torch.compiler.is_compiling() and self.hooked):
            _refresh_weights(self, None)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            y = _linear(x.reshape(-1, self.in_features), self.weight, self.w_row, self.w_col, self.keys,
                        self.recipe, torch.is_grad_enabled() and self.weight.requires_grad)[0]
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, gemms={','.join(self.cfg.gemms)}"


def fp4_layers(model):
    return [m for m in model.modules() if isinstance(m, FP4Linear)]


@torch.compiler.disable
def _refresh_weights(model, _):
    """convert()'s hook before a model's forward: compiled layers cannot look whether their weight has
    changed. A part of the model that is compiled and called by itself needs set_step after each update."""
    for m in fp4_layers(model):
        if m.fp4:
            m.refresh()
            if m.drawn is None and m.training and m.cfg.stochastic and torch.is_grad_enabled():
                warnings.warn("stochastic rounding repeats its random bits: call set_step before every "
                              "micro-batch", stacklevel=2)


def set_step(model, seed, step, micro_batch=0):
    """Give every FP4 layer its random keys for one micro-batch; micro_batch counts over all ranks of a step.

    Weights get the key of micro-batch 0: they are quantized once a step, alike on every rank; here already,
    so that compiled parts of a model find them when they are called by themselves.
    """
    layers = fp4_layers(model)
    if layers:
        layer = torch.tensor([m.index for m in layers])[:, None]                # (n, 1)
        operand = torch.arange(len(OPERANDS))[None, :]                          # (1, 6)
        micro = torch.tensor([0 if name.endswith(".w") else micro_batch for name in OPERANDS])
        keys = torch.stack(stream_key(seed, step, micro, layer, operand), -1)   # (n, 6, 2)
        for m in layers:
            m.keys, m.drawn = m.keys.to(m.weight.device), (seed, step)
        for device in {m.weight.device for m in layers}:                        # in place, for CUDA graphs
            here = [i for i, m in enumerate(layers) if m.weight.device == device]
            there = keys[here].to(device, non_blocking=True)
            torch._foreach_copy_([layers[i].keys for i in here], list(there))
        _refresh_weights(model, None)


class high_precision:
    """Context: the model's FP4 layers compute in high precision, for evaluation beside FP4."""

    def __init__(self, model):
        self.layers = fp4_layers(model)

    def __enter__(self):
        self.before = [m.fp4 for m in self.layers]
        for m in self.layers:
            m.fp4 = False

    def __exit__(self, *_):
        for m, fp4 in zip(self.layers, self.before, strict=True):
            m.fp4 = fp4


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
    kept, n_converted = {}, 0
    for index, (name, linear) in enumerate(linears.items()):
        block = number.get(name)
        if any(fnmatch.fnmatch(name, glob) for glob in cfg.skip):
            kept.setdefault("skip", []).append(name)
        elif block is not None and block < cfg.head_blocks:
            kept.setdefault("head blocks", []).append(name)
        elif block is not None and block >= tail_from:
            kept.setdefault("tail", []).append(name)
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FP4Linear(linear, cfg, index))
            n_converted += 1
    model.register_forward_pre_hook(_refresh_weights)
    for m in fp4_layers(model):
        m.hooked = True
    line = f"converted {n_converted}/{len(linears)} linears to NVFP4 ({','.join(cfg.gemms)})"
    for why, names in kept.items():
        line += f"; {why}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} in high precision"
    report(line)
    return model


# ---------------------------------------------------------------- a tour: python nvfp4.py

def capability(device=None):
    """One line: what runs FP4 on a device (default: the GPU if there is one), and why."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        chip = "sm_%d%d" % torch.cuda.get_device_capability(device)
        if not uses_kernels(device):
            return f"{name} ({chip}): FP4 emulated by its PyTorch definition; the kernels need Triton and " \
                   "an NVIDIA GPU from sm_80 on"
        nearest, stochastic, way = hardware(device)
        if way == "registers":
            return f"{name} ({chip}) has no FP4 units: FP4 emulated, quantized by Triton kernels, GEMMs on " \
                   "exact values in bf16 tensor cores"
        by = ["software", "PTX"]
        return f"{name} ({chip}): FP4 GEMMs native, by {way}; rounding to nearest in {by[nearest]}, " \
               f"stochastic in {by[stochastic]}"
    kind = device.type
    fused = "fused by torch.compile" if can_compile(kind) else "not fused (torch.compile does not work here)"
    units = "bf16 units" if cpu_has_bf16() else "fp32 (no bf16 units here)"
    return f"{kind}, {torch.get_num_threads()} threads: FP4 emulated by its PyTorch definition, {fused}; " \
           f"GEMMs on exact values in {units}"


def walk(numbers):
    """The given numbers through the format, step by step, as text: the page to show in front of a class."""
    x = torch.tensor(numbers, dtype=torch.float32)[None]
    x = F.pad(x, (0, -x.shape[1] % BLOCK))
    q = quantize(x)
    y = q.dequantize()
    s_enc, s_dec = (float(s) for s in tensor_scales(q.amax))
    lines = [f"tensor   amax {float(q.amax):.8g}    s_enc = 448 * 6 / amax = {s_enc:.8g}    "
             f"s_dec = 1 / s_enc = {s_dec:.8g}"]
    for i, number in enumerate(numbers):
        b, scale = i // BLOCK, q.scales[0, i // BLOCK].float()
        if i % BLOCK == 0:
            amax_b, bits = x[0, i:i + BLOCK].abs().amax(), f"{int(q.scales.view(torch.uint8)[0, b]):08b}"
            lines += ["", f"block {b}  amax {float(amax_b):.8g}    amax * s_enc / 6 = "
                      f"{amax_b * (s_enc / 6):.8g}    as E4M3 {float(scale):.8g} = "
                      f"{bits[0]} {bits[1:5]} {bits[5:]}",
                      f"{'x':>13s} {'x / (scale s_dec)':>18s} {'code':>5s} {'bits':>7s} {'value':>6s} "
                      f"{'decoded':>13s} {'error':>10s}   at random instead"]
        scaled = float(x[0, i] * torch.clamp(1 / (scale * s_dec), max=FLT_MAX))
        code = int(q.codes[0, i // 2] >> 4 * (i % 2)) & 15
        value = math.copysign(E2M1_VALUES[code & 7], 0.5 - (code >> 3))
        outcomes, _ = e2m1(torch.full((256,), abs(scaled)), torch.arange(256))  # of all random bytes
        ups = int((outcomes > outcomes[0]).sum())
        odds = f"{outcomes[0]:g}" + (f", or {outcomes[-1]:g} in {ups} of 256" if ups else "")
        lines.append(f"{number:13.7g} {scaled:18.7g} {code:5d} {code >> 3:3b} {code >> 1 & 3:02b} "
                     f"{code & 1:b} {value:6g} {float(y[0, i]):13.7g} {float(y[0, i] - x[0, i]):10.2e}   "
                     f"{odds}")
    noise, signal = (float(t.square().sum()) for t in (y - x, x))
    snr = f"SNR {10 * math.log10(signal / noise):.1f} dB" if noise > 0 else f"error {noise:g}"
    return "\n".join([*lines, "", snr])


def error_table():
    """{case: mean square error} of quantizing unit Gaussians, 2048 x 4096."""
    x = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))
    cases = {"nearest, 1x16": {}, "nearest, 16x16": {"block": (16, 16)},
             "stochastic, 1x16": {"stochastic": True},
             "stochastic, 1x16, unbiased": {"stochastic": True, "unbiased": True}}
    return {name: float((quantize(x, **kw).dequantize() - x).square().mean()) for name, kw in cases.items()}


def _median_ms(functions, device, repeat=15):
    """Median milliseconds of each function, warmed up, then timed in turn: they share the machine's moods."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for f in functions * 3:
        f()
    times = [[] for _ in functions]
    for _ in range(repeat):
        for f, ms in zip(functions, times, strict=True):
            finish()
            start = time.perf_counter()
            f()
            finish()
            ms.append(1e3 * (time.perf_counter() - start))
    return [sorted(ms)[repeat // 2] for ms in times]


def _kernel_ms(functions, device):
    """The same of single kernels; on a GPU from a CUDA graph, so that Python's time does not count."""
    if device.type == "cuda":
        return [triton.testing.do_bench_cudagraph(f, return_mode="median") for f in functions]
    return _median_ms(functions, device)


def _linear_step(recipe, x, dy):
    """A function that runs forward and backward of a Linear, after a weight update as in training."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], dy.shape[1], bias=False, device=x.device)
    if recipe:
        layer = FP4Linear(layer, RECIPES[recipe])
        set_step(layer, 0, 0)
    x = x.clone().requires_grad_()

    def step():
        with torch.no_grad():
            layer.weight.add_(0)                    # counts as an update: the weight is quantized anew
        x.grad = layer.weight.grad = None
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            layer(x).backward(dy)
    step.layer = layer
    return step


def _kept_bytes(recipe, dtype, device):
    """Bytes that a linear layer keeps for its backward, weights aside, for every value of its input."""
    x, dy = (torch.randn(1024, n, device=device, dtype=dtype) for n in (512, 256))
    step, kept = _linear_step(recipe, x, dy), {}

    def keep(t):
        kept[t.data_ptr()] = 0 if set(t.shape) == {256, 512} else t.numel() * t.element_size()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    for t in getattr(step.layer, "w_col", []):
        kept.pop(t.data_ptr(), None)
    return sum(kept.values()) / x.numel()


def _training_step(*arguments):
    """(a function that runs one optimizer step, tokens, FLOPs) of a config, put together as train.py does."""
    import train
    from model import build, flops_per_token
    c = train.load_config(list(arguments))
    train.keep_memory()
    device, dtype = train.choose_device(c)
    torch.manual_seed(0)
    model = convert(build(c.model).to(device), c.fp4, report=lambda line: None)
    train.compile_model(model, c)
    optimizer, steps = train.make_optimizer(model, c), itertools.count()
    idx = torch.randint(c.model.vocab_size, (c.batch_size, c.model.block_size + 1), device=device)

    def step():
        set_step(model, c.seed, next(steps))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        train.update(model, optimizer, c.grad_clip)
    tokens = c.batch_size * c.model.block_size
    return step, tokens, tokens * flops_per_token(model)


def benchmark(device, say=lambda row: None):
    """Rows {what, ms, rate, unit}, most with percent of another row's rate (a copy's bandwidth, a bf16
    matmul's speed) or time as a ratio to another row's, all measured here side by side."""
    gpu, rows = device.type == "cuda", []

    def row(what, ms, amount, unit, percent_of=None, ratio_to=None):
        new = {"what": what, "ms": ms, "unit": unit,
               "rate": amount / ms * {"GB/s": 1e-6, "TFLOP/s": 1e-9}[unit]}
        if percent_of:
            new |= {"percent": 100 * new["rate"] / percent_of["rate"], "percent_of": percent_of["what"]}
        if ratio_to:
            new |= {"ratio": ms / ratio_to["ms"], "ratio_to": ratio_to["what"]}
        rows.append(new)
        say(new)
        return new

    # === what the memory allows: bytes read and written for a value ===
    n, dtype = (8192, torch.bfloat16) if gpu else (4096, torch.float32)
    x = torch.randn(n, n, device=device, dtype=dtype)
    key, signs, into, read = _key(1, device), _fixed_signs(SIGNS, device), torch.empty_like(x), x.itemsize
    cases = {"copy into place": (lambda: into.copy_(x), 2 * read), "x.clone()": (x.clone, 2 * read),
             "quantize, fixed amax": (lambda: quantize(x, amax=1.0), read + 4.5 / 8),
             "quantize": (lambda: quantize(x), 2 * read + 4.5 / 8),
             "quantize, stochastic": (lambda: quantize(x, stochastic=True, seed=key), 2 * read + 4.5 / 8),
             "quantize rows and rotated columns, stochastic": (
                 lambda: cast(x, Cast(key), Cast(key, signs)), 2 * read + 9 / 8),
             "fake_quantize": (lambda: fake_quantize(x), 2 * read + 2),
             "fake_quantize, stochastic": (lambda: fake_quantize(x, key), 2 * read + 2)}
    times = _kernel_ms([f for f, _ in cases.values()], device)
    for (what, (_, width)), ms in zip(cases.items(), times, strict=True):
        row(f"{n} x {n} {str(dtype).removeprefix('torch.')}: {what}", ms, n * n * width, "GB/s",
            rows[0] if rows else None, rows[1] if len(rows) > 1 else None)
    copy = rows[0]
    import train                                    # the one place where this file looks at the others
    from model import hypersphere_step
    tokens, width = (16384, 4096) if gpu else (4096, 1024)
    h, f, dh = (torch.randn(tokens, width, device=device) for _ in range(3))
    h, f, a = (t.requires_grad_() for t in (h, f.bfloat16(), torch.full((width,), 0.05, device=device)))
    fused = torch.compile(hypersphere_step) if can_compile(device.type) else hypersphere_step
    ms, = _median_ms([lambda: torch.autograd.grad(fused(h, f, a), (h, f, a), dh)], device)
    row(f"{tokens} x {width} float32: nGPT's step, forward + backward", ms, tokens * width * 26, "GB/s", copy)
    # === what the arithmetic allows ===
    n = 8192 if gpu else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    qa, qb = quantize(a), quantize(b)
    plain, codes = _kernel_ms([lambda: a @ b.t(), lambda: matmul(qa, qb, torch.bfloat16)], device)
    product = row(f"matmul {n} x {n} x {n}: bf16", plain, 2 * n**3, "TFLOP/s")
    row(f"matmul {n} x {n} x {n}: packed codes", codes, 2 * n**3, "TFLOP/s", product, product)
    tokens, K, dtype = (16384, 4096, torch.bfloat16) if gpu else (2048, 2048, torch.float32)
    x, dy = (torch.randn(tokens, K, device=device, dtype=dtype) for _ in range(2))
    recipes = (None, "nvfp4", "ngpt")
    plain, times = None, _median_ms([_linear_step(recipe, x, dy) for recipe in recipes], device, repeat=7)
    for recipe, ms in zip(recipes, times, strict=True):
        name = recipe or str(dtype).removeprefix("torch.")
        now = row(f"Linear({K}, {K}), {tokens} tokens, forward + backward: {name}", ms, 6 * tokens * K * K,
                  "TFLOP/s", product, plain)
        plain = plain or now
    # === training ===
    size, batch, plain = *(("124m", "--batch_size=12") if gpu else ("tiny", "--batch_size=16")), None
    cases = [("ngpt", "bf16"), ("ngpt", "ngpt"), ("ngpt", "nvfp4"), ("gpt", "bf16")]
    for arch, recipe, *more in cases if gpu else [("ngpt", "bf16", "--dtype=float32"), *cases]:
        step, tokens, flops = _training_step(f"configs/{arch}_{size}.py", batch, f"--device={device.type}",
                                             f"--recipe={recipe}", *more)
        ms, = _median_ms([step], device, repeat=7)
        name, peak = "fp32" if more else recipe, train.peak_flops(device)
        if peak:
            name += f" (MFU {100 * flops / (1e-3 * ms * peak):.1f} %)"
        now = row(f"training step of {arch}_{size}, {tokens} tokens: {name}", ms, flops, "TFLOP/s", product,
                  plain if arch == "ngpt" else None)
        plain = plain or now
    for recipe in recipes:
        rows.append({"what": f"kept by a Linear for its backward: {recipe or 'bf16'}",
                     "rate": _kept_bytes(recipe, torch.bfloat16, device), "unit": "bytes a value"})
        say(rows[-1])
    return rows


def print_row(row):
    ms = f"{row['ms']:9.3f} ms" if "ms" in row else 12 * " "
    percent = f"{row['percent']:4.0f} % of {row['percent_of'].split(': ')[1]}" if "percent" in row else ""
    ratio = f"{row['ratio']:5.2f} x {row['ratio_to'].split(': ')[1]}" if "ratio" in row else ""
    print(f"  {row['what']:69s} {ms} {row['rate']:8.4g} {row['unit']:7s} {percent:25s} {ratio}".rstrip(),
          flush=True)


def main(argv):
    if argv and argv != ["--json"]:
        try:
            print(walk([float(number) for number in argv]))
        except ValueError:
            sys.exit(f"nvfp4.py takes numbers, --json or nothing, not {' '.join(argv)}")
        return
    device, errors = torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), error_table()
    if argv:
        print(json.dumps({"capability": capability(), "mse": errors, "benchmark": benchmark(device)}))
        return
    print("codes  ", "  ".join(f"{c:4d}" for c in range(8)), "   (8..15: the same, negative)")
    print("values ", "  ".join(f"{v:4.1f}" for v in E2M1_VALUES))
    print(f"\nmean square error on unit Gaussians (2048 x 4096), {4 + 8 / BLOCK} bits a value")
    for name, error in errors.items():
        print(f"  {name:34s} {error:.2e}   SNR {-10 * math.log10(error):.1f} dB")
    print("\nrecipes")
    for name, cfg in RECIPES.items():
        print(f"  {name:6s} {recipe_changes(cfg)}")
    emulated = "" if native(device) else " (of emulation: FP4 hardware is another matter)"
    print(f"\n{capability()}\n\ncost on this machine{emulated}")
    benchmark(device, print_row)


if __name__ == "__main__":
    sys.modules["nvfp4"] = sys.modules["__main__"]  # train.py imports this file: let it find the one running
    main(sys.argv[1:])
