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
(R/16, 16, C) where it sums over rows. Whole-tensor PyTorch is the definition; torch.compile fuses it.

Sources: 2509.25149 (the format and NVIDIA's recipe), 2605.06067 (nGPT's recipe). M N K are GEMM sizes
throughout.

    python nvfp4.py             the format, its errors, what runs on this machine, and what it costs
"""
import fnmatch
import functools
import itertools
import json
import math
import re
import sys
import time
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

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
def _pack(codes):
    """Pairs of codes, (n,) int16 with a code in each byte -> one byte, the low nibble from the low byte."""
    return (codes & 15 | codes >> 4).to(torch.uint8)


def _quantize(x, amax, key, axis, rows, unbiased, dtype):
    """The whole of NVFP4: x (R, C), blocks of rows x 16 along axis, amax () fp32, key (2,) int64 or None.

    returns for a dtype: values (R, C); for None: codes (R, C) uint8, one a byte; scales; s_dec ()
    """
    blocks, dim = x.unflatten(axis, (-1, BLOCK)), axis + 1
    scales, scale, inverse, s_dec = _scale_blocks(blocks, amax, dim, rows, unbiased)
    byte = None if key is None else random_bytes(key, scale.shape, dim)
    return _round_blocks(blocks, scale, inverse, byte, dim, dtype).view(x.shape), scales, s_dec


def _check(x, axis, block):
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be a floating-point matrix; reshape it")
    if tuple(block) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"block={tuple(block)} must be (1, 16) or (16, 16)")
    _check_size("K", x.shape[axis], BLOCK)
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
    amax    () fp32, the number that fixed the tensor scale; unbiased: for which target
    """
    codes: torch.Tensor
    scales: torch.Tensor
    amax: torch.Tensor
    unbiased: bool = False

    @property
    def s_dec(self):
        return tensor_scales(self.amax, self.unbiased)[1]

    def values(self):
        """code * scale, (M, K) bf16, exact."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1).int()
        table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
        rows = codes.shape[0] // self.scales.shape[0]
        scale = self.scales.float().repeat_interleave(rows, 0).repeat_interleave(BLOCK, 1)
        return (table[codes] * scale).to(torch.bfloat16)

    def dequantize(self, dtype=torch.float32):
        """code * scale * s_dec, (M, K), rounded once to fp32 and, where asked, once more to dtype."""
        return (self.values().float() * self.s_dec).to(dtype)


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
    amax = _amax(x, amax)
    key = _key(seed, x.device) if stochastic else None
    codes, scales, _ = _quantize(x, amax, key, 1, block[0], unbiased, None)
    return NVFP4Tensor(_pack(codes.contiguous().view(torch.int16)), scales.contiguous(), amax, unbiased)


def count_saturated(x, amax, block=(1, BLOCK)):
    """How many blocks of x (M, K) hold a magnitude above a fixed amax: their scale is capped at 448."""
    _check(x, 1, block)
    blocks = x.float().abs().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, block[0]))
    return int((blocks.amax((1, 3)) > amax).sum())


def fake_quantize(x, key=None, signs=None, amax=None, axis=1, rows=1, unbiased=False, dtype=torch.bfloat16):
    """Quantize and decode in one pass: the operand of a GEMM on hardware that has no FP4.

    x       (R, C), blocks of rows x 16 along axis
    key     (2,) int64: round stochastically; signs (16,) fp32: rotate first; amax: as in quantize()
    returns values (R, C) in dtype: code * scale, exact in bf16, padded with zeros where axis does not fill
            its last block; s_dec () fp32, to be applied to the GEMM's result
    raises  ValueError for rows = 16 where the other axis does not divide
    """
    x = x.contiguous()
    short = -x.shape[axis] % BLOCK
    if short:
        x = F.pad(x, (0, short) if axis == 1 else (0, 0, 0, short))
    _check(x, axis, (rows, BLOCK))
    if signs is not None:
        x = hadamard(x, signs, axis)
    values, _, s_dec = _quantize(x, _amax(x, amax), key, axis, rows, unbiased, dtype)
    return values, s_dec


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
    """alpha * a @ b: a (M, K) and b (K, N) hold values that are exact in bf16, alpha () is fp32.

    returns (M, N) in dtype; products exact, accumulated in fp32, alpha applied in fp32, rounded to dtype once
    """
    want = gemm_dtype(a.device, dtype)
    a, b = a.to(want), b.to(want)
    if a.is_cuda:
        return (torch.mm(a, b, out_dtype=torch.float32) * alpha).to(dtype)
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


def matmul(a, b, dtype=torch.float32):
    """a (M, K) @ b (N, K)^T of two NVFP4Tensors -> (M, N).

    error   the order of fp32 accumulation only: 1e-5 relative to float64, test_matmul_is_exact_products
    """
    return gemm(a.values(), b.values().t(), a.s_dec * b.s_dec, dtype)


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

class _FP4Function(torch.autograd.Function):
    """The three GEMMs: x (M, K), w (N, K) the fp32 master weight, layer the FP4Linear that they belong to."""

    @staticmethod
    def forward(ctx, x, w, layer):
        ctx.save_for_backward(x, w)
        ctx.layer = layer
        # === fprop: y = x w^T ===
        if "fprop" not in layer.cfg.gemms:
            return F.linear(x, w.to(x.dtype))
        xq, x_dec = layer.operand("fprop.x", x, axis=1, out_dtype=x.dtype)      # (M, K)
        wq, w_dec = layer.w_fprop, layer.w_fprop_dec                            # (N, K)
        return gemm(xq, wq.t(), x_dec * w_dec, x.dtype)                         # (M, N)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        layer, dx, dw = ctx.layer, None, None
        # === dgrad: dx = dy w ===
        if ctx.needs_input_grad[0]:
            if "dgrad" in layer.cfg.gemms:
                dyq, dy_dec = layer.operand("dgrad.dy", dy, axis=1, out_dtype=dy.dtype)  # (M, N)
                dx = gemm(dyq, layer.w_dgrad, dy_dec * layer.w_dgrad_dec, dy.dtype)      # (M, K)
            else:
                dx = dy @ w.to(dy.dtype)
        # === wgrad: dw = dy^T x, into fp32, because micro-batches and ranks are summed ===
        if ctx.needs_input_grad[1]:
            if "wgrad" in layer.cfg.gemms:
                dyq, dy_dec = layer.operand("wgrad.dy", dy, axis=0, out_dtype=w.dtype)   # (M, N)
                xq, x_dec = layer.operand("wgrad.x", x, axis=0, out_dtype=w.dtype)       # (M, K)
                dw = gemm(dyq.t(), xq, dy_dec * x_dec, w.dtype)                          # (N, K)
            else:
                dw = (dy.t() @ x).to(w.dtype)
        return dx, dw, None


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
    micro-batch. Changes through weight.data go unnoticed until the next set_step or optimizer step. keys
    (6, 2) int64 are the Philox keys of the six operands; set_step draws them.
    """

    def __init__(self, linear, cfg, index=0):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.cfg, self.index = cfg, index           # index: which linear layer, for the random stream
        self.fp4 = True                             # False: high precision for now, see high_precision()
        self.drawn = None                           # (seed, step) that the keys belong to
        self.version = None                         # of the weight behind w_fprop and w_dgrad
        # no buffer: DistributedDataParallel would overwrite it with the first rank's
        self.keys = torch.zeros(len(OPERANDS), 2, dtype=torch.int64, device=linear.weight.device)
        _optimizer_steps()                          # starts counting
        _check_size("K", self.in_features, BLOCK)
        _check_size("N", self.out_features, BLOCK)

    def operand(self, name, tensor, axis, out_dtype):
        """Quantize an operand of a GEMM with a result in out_dtype, as the recipe says: values, s_dec ()."""
        cfg, (gemm_name, kind) = self.cfg, name.split(".")
        stochastic = name in cfg.stochastic
        return fake_quantize(
            tensor.detach(), axis=axis, dtype=gemm_dtype(tensor.device, out_dtype),
            key=self.keys[OPERANDS.index(name)] if stochastic else None,
            signs=self.rotation(gemm_name) if gemm_name in cfg.hadamard else None,
            amax={"x": cfg.input_amax, "w": cfg.weight_amax, "dy": cfg.grad_amax}[kind],
            rows=BLOCK if kind == "w" and cfg.weight_block == "16x16" else 1,
            unbiased=stochastic and cfg.unbiased)

    def rotation(self, gemm_name):
        """Signs (16,) fp32 of the rotation, the same for both operands of a GEMM."""
        if self.cfg.signs == "fresh":               # 16 bits of a key; of the weight's, where it takes part
            bits = self.keys[{"fprop": 1, "dgrad": 3, "wgrad": 4}[gemm_name], 0]
            return 1.0 - 2.0 * ((bits >> torch.arange(BLOCK, device=bits.device)) & 1)
        return torch.tensor(SIGNS if self.cfg.signs == "fixed" else (1,) * BLOCK, dtype=torch.float32,
                            device=self.weight.device)

    @torch.no_grad()
    def refresh(self):
        """Quantize the weight if it has changed since the last time."""
        w, cfg = self.weight, self.cfg
        version = (w._version, w.data_ptr(), _optimizer_steps()[0], self.drawn)
        if self.version == version:
            return
        self.version = version
        self.w_fprop, self.w_fprop_dec = self.operand("fprop.w", w, axis=1, out_dtype=torch.bfloat16)
        self.w_dgrad, self.w_dgrad_dec = self.w_fprop, self.w_fprop_dec
        shared = cfg.weight_block == "16x16" and not {"fprop", "dgrad"} & set(cfg.hadamard)
        if not shared or {"fprop.w", "dgrad.w"} & set(cfg.stochastic):
            self.w_dgrad, self.w_dgrad_dec = self.operand("dgrad.w", w, axis=0, out_dtype=torch.bfloat16)

    @torch.compiler.disable                     # fused inside; a compiled model breaks its graph around GEMMs
    def forward(self, x):
        if not self.fp4:
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            self.refresh()
            y = _FP4Function.apply(x.reshape(-1, self.in_features), self.weight, self)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, gemms={','.join(self.cfg.gemms)}"


def fp4_layers(model):
    return [m for m in model.modules() if isinstance(m, FP4Linear)]


def set_step(model, seed, step, micro_batch=0):
    """Give every FP4 layer its random keys for one micro-batch; micro_batch counts over all ranks of a step.

    Weights get the key of micro-batch 0: they are quantized once a step, alike on every rank.
    """
    layers = fp4_layers(model)
    if layers:
        layer = torch.tensor([m.index for m in layers])[:, None]                # (n, 1)
        operand = torch.arange(len(OPERANDS))[None, :]                          # (1, 6)
        micro = torch.tensor([0 if name.endswith(".w") else micro_batch for name in OPERANDS])
        keys = torch.stack(stream_key(seed, step, micro, layer, operand), -1)   # (n, 6, 2)
        for m, key in zip(layers, keys.to(layers[0].weight.device), strict=True):
            m.keys, m.drawn = key, (seed, step)


class high_precision:
    """Context: the model's FP4 layers compute in high precision, for evaluation beside FP4."""

    def __init__(self, model):
        self.layers = fp4_layers(model)

    def __enter__(self):
        for m in self.layers:
            m.fp4 = False

    def __exit__(self, *_):
        for m in self.layers:
            m.fp4 = True


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
    line = f"converted {n_converted}/{len(linears)} linears to NVFP4 ({','.join(cfg.gemms)})"
    for why, names in kept.items():
        line += f"; {why}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''} in high precision"
    report(line)
    return model


# ---------------------------------------------------------------- a tour: python nvfp4.py

def capability(device=None):
    """One line: what runs FP4 on a device (default: the GPU if there is one), and why."""
    kind = torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu"
    fused = "fused by torch.compile" if can_compile(kind) else "not fused (torch.compile does not work here)"
    if kind == "cuda":
        name, units = torch.cuda.get_device_name(device), "bf16 tensor cores"
    else:
        name = f"{kind}, {torch.get_num_threads()} threads"
        units = "bf16 units" if cpu_has_bf16() else "fp32 (no bf16 units here)"
    return f"{name}: FP4 emulated by its PyTorch definition, {fused}; GEMMs on exact values in {units}"


def _median_ms(functions, repeat=15):
    """Median milliseconds of each function, warmed up, then timed in turn: they share the machine's moods."""
    for f in functions * 2:
        f()
    times = [[] for _ in functions]
    for _ in range(repeat):
        for f, ms in zip(functions, times, strict=True):
            start = time.perf_counter()
            f()
            ms.append(1e3 * (time.perf_counter() - start))
    return [sorted(ms)[repeat // 2] for ms in times]


def _linear_step(recipe, x, dy, n):
    """A function that runs forward and backward of a Linear(K, n), after a weight update as in training."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[1], n, bias=False)
    if recipe != "fp32":
        layer = FP4Linear(layer, RECIPES[recipe])
    x = x.clone().requires_grad_()

    def step():
        with torch.no_grad():
            layer.weight.add_(0)                    # counts as an update: the weight is quantized anew
        x.grad = layer.weight.grad = None
        layer(x).backward(dy)
    return step


def _training_step(*overrides):
    """A function that runs one optimizer step of configs/ngpt_tiny.py, put together as train.py does."""
    import train                                    # the one place where this file looks at the others
    from model import build
    c = train.load_config(["configs/ngpt_tiny.py", "--device=cpu", *overrides])
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
    return step


def benchmark():
    """Rows of (what, milliseconds, ratio to its yardstick, the yardstick), measured side by side."""
    x = torch.randn(4096, 4096)
    names = ("4096 x 4096 fp32: x.clone()", "copy into place", "quantize, nearest, codes",
             "quantize, stochastic, codes", "fake_quantize, nearest, bf16 values",
             "fake_quantize, stochastic, bf16 values")
    key = _key(1, "cpu")
    into = torch.empty_like(x)
    clone, copy, *ms = _median_ms([
        x.clone, lambda: into.copy_(x), lambda: quantize(x), lambda: quantize(x, stochastic=True, seed=1),
        lambda: fake_quantize(x), lambda: fake_quantize(x, key)])
    rows = [(name, t, t / clone, "x.clone()") for name, t in zip(names, (clone, copy, *ms), strict=True)]
    x, dy = torch.randn(2048, 2048), torch.randn(2048, 2048)
    plain, *ms = _median_ms([_linear_step(r, x, dy, 2048) for r in ("fp32", "nvfp4", "ngpt")], repeat=7)
    rows.append(("Linear(2048, 2048), 2048 tokens, forward + backward, fp32", plain, 1.0, "plain fp32 layer"))
    rows += [(f"the same in the {r} recipe", t, t / plain, "plain fp32 layer")
             for r, t in zip(("nvfp4", "ngpt"), ms, strict=True)]
    steps = [_training_step("--recipe=bf16", "--dtype=float32"), _training_step("--recipe=bf16"),
             _training_step("--recipe=ngpt")]
    plain, *ms = _median_ms(steps, repeat=7)
    rows.append(("training step of ngpt_tiny, 4096 tokens, fp32", plain, 1.0, "the fp32 step"))
    rows += [(f"the same in the {r} recipe", t, t / plain, "the fp32 step")
             for r, t in zip(("bf16", "ngpt"), ms, strict=True)]
    return rows


def error_table():
    """{case: mean square error} of quantizing unit Gaussians, 2048 x 4096."""
    x = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))
    cases = {"nearest, 1x16": {}, "nearest, 16x16": {"block": (16, 16)},
             "stochastic, 1x16": {"stochastic": True},
             "stochastic, 1x16, unbiased": {"stochastic": True, "unbiased": True}}
    return {name: float((quantize(x, **kw).dequantize() - x).square().mean()) for name, kw in cases.items()}


def main(argv):
    if argv not in ([], ["--json"]):
        sys.exit(f"nvfp4.py takes --json or nothing, not {' '.join(argv)}")
    as_json = argv == ["--json"]
    errors, rows = error_table(), benchmark()
    if as_json:
        print(json.dumps({"capability": capability(), "mse": errors, "benchmark": rows}))
        return
    print("codes  ", "  ".join(f"{c:4d}" for c in range(8)), "   (8..15: the same, negative)")
    print("values ", "  ".join(f"{v:4.1f}" for v in E2M1_VALUES))
    print(f"\nmean square error on unit Gaussians (2048 x 4096), {4 + 8 / BLOCK} bits a value")
    for name, error in errors.items():
        print(f"  {name:34s} {error:.2e}   SNR {-10 * math.log10(error):.1f} dB")
    print("\nrecipes")
    for name, cfg in RECIPES.items():
        print(f"  {name:6s} {recipe_changes(cfg)}")
    print(f"\n{capability()}\n\ncost on this machine (of emulation: FP4 hardware is another matter)")
    for name, ms, ratio, yardstick in rows:
        print(f"  {name:60s} {ms:8.1f} ms   {ratio:5.2f} x {yardstick}")


if __name__ == "__main__":
    sys.modules["nvfp4"] = sys.modules["__main__"]  # train.py imports this file: let it find the one running
    main(sys.argv[1:])
