"""Other papers' recipes, as differences from NVFP4. A section is a paper, with rows and subclasses.

nvfp4.py does not know this file. Importing it adds its formats to nvfp4.FORMATS and its recipes to
nvfp4.RECIPES; a format of your own is a row like these, and takes ten to sixty lines.

    format          a grid of eight magnitudes (round, number_of), and how a block finds its scale (scales)
    recipe          a row of RECIPES: FP4Config, or PaperConfig where it needs a field that is below
    layer           PaperFunction: what changes in the three GEMMs

    python papers.py            all formats, their errors, all recipes
"""
import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import nvfp4
from nvfp4 import (E2M1, E2M1_MAX, E4M3_MAX, FORMATS, GEMMS, OPERANDS, RECIPES, SIGNS, Both,
                   FP4Config, FP4Function, FP4Linear, Format, Grid, as_signs, block_amax, check_words,
                   dgrad, e2m1, e4m3_scales, encode_scale, fill_up, fprop, largest_magnitude, matmul,
                   philox, quantize, quantize_both, save, saved, wgrad)

# ---------------------------------------------------------------- MXFP4: blocks of 32, scales powers of two


def e8m0_scales(blocks, s_enc, target):
    """The smallest power of two that brings the block to target or below. Nothing saturates at a target of 6.

    source  2509.25149 appendix B
    """
    amax_b = block_amax(blocks)
    mantissa, exponent = torch.frexp(amax_b.clamp(min=2.0**-126))               # 0.5 <= mantissa < 1
    return power_of_two(exponent - 3 + (mantissa > target / 8), amax_b)


def power_of_two(exponent, amax_b):
    """E8M0's numbers: exponents from -127 to 127, and NaN."""
    scale = torch.ldexp(torch.ones_like(amax_b), exponent.clamp(-127, 127))
    return torch.where(amax_b < math.inf, scale, math.nan)


MXFP4 = Format("mxfp4", block=32, top=None, scales=e8m0_scales, scale_dtype=torch.float8_e8m0fnu)
FORMATS["mxfp4"] = MXFP4
# By the OCP specification of 2023 a scale is 2^(floor(log2(amax_b)) - 2): the block's largest magnitude lands
# in [4, 8), and saturates beyond 6.
FORMATS["mxfp4_floor"] = replace(MXFP4, name="mxfp4_floor", target=8.0)


# ---------------------------------------------------------------- four over six: 2512.02010

def four_six_scales(blocks, s_enc, target):
    """NVFP4's scale, or the one that brings the largest magnitude to 4 instead of 6, whichever leaves the
    smaller mean square error; 6 where both are alike. Near 6 the grid is coarse, with nothing between 4 and
    6; near 4 it is finer. The choice is made to nearest, also for an operand that is rounded stochastically,
    and in float64, so that the order of addition decides nothing.

    On unit Gaussians in 1x16 blocks 45 % choose 4, in 16x16 blocks 3 %: nothing is gained there.
    """
    magnitude, s_dec = blocks.float().abs(), s_enc.reciprocal()

    def left(scale):
        number, _ = e2m1(magnitude * encode_scale(scale, s_dec))
        return (number.double() * scale * s_dec - magnitude).square().sum((1, 3), keepdim=True)
    six = e4m3_scales(blocks, s_enc, target)
    four = e4m3_scales(blocks, s_enc, target * 4 / 6)
    return torch.where(left(four) < left(six), four, six)


# A block that chooses 4 has a scale of up to 3/2 times 256, which E4M3 holds.
FORMATS["nvfp4_46"] = Format("nvfp4_46", top=256.0, scales=four_six_scales, reads_as_nvfp4=True)


# ---------------------------------------------------------------- MS-EDEN: 2601.22813, Quartet II

# E4M3 may round a scale down by 1/17. Then a block's largest magnitude lands beyond 6, where it is cut off,
# and stochastic rounding is too small on average. From this target nothing exceeds 6.
UNBIASED = E2M1_MAX * 16 / 17
FORMATS["nvfp4_unbiased"] = replace(FORMATS["nvfp4"], name="nvfp4_unbiased", target=UNBIASED)


def eden_scales(a, number, scale, random):
    """Codes are rounded to nearest, which shrinks or stretches the block. Its scale is multiplied by S, so
    that <a, S number> = <a, a>, and rounded stochastically. Over random rotations the average is then x, with
    the small error of rounding to nearest.

    a, number, scale    blocks with four axes: |x| in units of the scale, rounded, and the scale
    random              bytes for each element, of which two a block are used, or None: to nearest
    returns             scale * S in E4M3, as fp32, with S = <a, a> / <a, number>. Added up in float64, so
                        that the order decides nothing
    source              a correction for each block as in its algorithm 1 (its code has one for each run)
    """
    a, number = a.double(), number.double()
    S = a.square().sum((1, 3), keepdim=True) / (a * number).sum((1, 3), keepdim=True)
    wanted = torch.where(scale > 0, scale * S, scale).float()                   # NaN stays too
    if random is None:
        return torch.clamp(wanted, max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    _, exponent = torch.frexp(wanted.clamp(min=2.0**-6))
    step = torch.ldexp(torch.ones_like(wanted), exponent - 4)                   # E4M3's: wanted has 8 to 16
    first, second = (random.narrow(axis_of(random), i, 1).float() for i in (0, 1))
    steps = torch.floor((torch.floor(wanted / step * 65536) + (first * 256 + second)) * (1 / 65536))
    return torch.clamp(steps * step, max=E4M3_MAX)


def axis_of(blocks):
    """Along which of four axes blocks lie that are not square."""
    return 1 if blocks.shape[1] > 1 else 3


TARGET_EDEN = UNBIASED / 0.93                       # this target has the least error, by the paper
FORMATS["ms_eden"] = Format("ms_eden", top=256.0, target=TARGET_EDEN, correct=eden_scales, squares=False,
                            reads_as_nvfp4=True)


# ---------------------------------------------------------------- a scale for each row: 2501.17116

def no_scales(blocks, s_enc, target):
    """1: the scale of a token or of an output channel is all."""
    return torch.where(block_amax(blocks) < math.inf, 1.0, math.nan)


FORMATS["e2m1_vector"] = Format("e2m1_vector", top=1.0, scales=no_scales,
                                scale_dtype=torch.float8_e8m0fnu, squares=False, by_row=True)


# ---------------------------------------------------------------- a uniform grid: 2606.20381, UFP4

def e1m2(a, random=None):
    """e2m1() on the grid 0, 1, ..., 7: E1M2 or INT4, which differ by a factor that scales take up."""
    a = torch.where(a < 7, a, 7.0)
    n = torch.round(a) if random is None else torch.floor((torch.floor(a * 256) + random) * (1 / 256))
    return n, n


def e1m2_number(code):
    return code


# The text that we have of the paper does not give its blocks and scales. We take NVFP4's.
FORMATS["ufp4"] = Format("ufp4", Grid(e1m2, e1m2_number), target=7.0)


# ---------------------------------------------------------------- three levels of scales: 2604.08826, HiF4

def hif4_scales(blocks, s_enc, target):
    """The scale of each value: E6M2 for 64 of them, doubled for 8 and once more for 4 whose largest magnitude
    asks for it; in units of a code, which is a quarter of the paper's.

    source  Huawei's reference code; its bf16 arithmetic where it decides
    """
    axis = axis_of(blocks)
    groups = blocks.abs().unflatten(axis, (8, 2, 4))
    fours = groups.amax(axis + 2, keepdim=True)
    eights = fours.amax(axis + 1, keepdim=True)
    whole = eights.amax(axis, keepdim=True)
    mantissa, exponent = torch.frexp(to_bf16(whole * 0.142578125).clamp(2.0**-48, 49152.0))     # bf16(1 / 7)
    scale = torch.ldexp(torch.round(mantissa * 8) / 8, exponent)
    inverse = to_bf16(scale.reciprocal())
    times = torch.where(eights * inverse >= 4, 2.0, 1.0)
    times = times * torch.where(fours * inverse >= 2 * times, 2.0, 1.0)
    scale = torch.where(whole < math.inf, scale * times / 4, math.nan)
    return scale.expand_as(groups).flatten(axis, axis + 2)


def to_bf16(x):
    """x >= 0 rounded to bf16, in fp32. By its bits: a compiler drops a cast that is cast back."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & -65536).view(torch.float32)


def hif4_encode(scale, s_dec):
    return to_bf16(scale.reciprocal())


def hif4_round(a, random=None):
    """e1m2(), but ties go up."""
    return e1m2(torch.floor(a + 0.5) if random is None else a, random)


def hif4_word(scale):
    """Scales of values (M, K/64, 64) in 32 bits: a byte of E6M2, a bit for each 4 values, one for each 8."""
    first = scale.amax(2).clamp(min=2.0**-48)
    mantissa, exponent = torch.frexp(first)
    byte = torch.where(first < math.inf, 4 * (exponent + 47) + (8 * mantissa - 4).int(), 255)
    doubled = 4 * scale[..., ::4] / first[..., None]                            # 1, 2 or 4 times
    eights = doubled.unflatten(2, (8, 2)).amax(3) == 4
    fours = doubled > torch.where(eights, 2, 1).repeat_interleave(2, 2)
    bits = torch.cat([eights, fours], 2).int() << torch.arange(24, dtype=torch.int32, device=scale.device)
    return byte.int() << 24 | bits.sum(2, dtype=torch.int32)


def hif4_unpack(word):
    byte, bits = word >> 24 & 255, word[..., None] >> torch.arange(24, device=word.device) & 1
    first = torch.ldexp(1 + (byte & 3) / 4, (byte >> 2) - 48)
    first = torch.where(byte < 255, first, math.nan)[..., None]
    doubled = 1 << (bits[..., :8].repeat_interleave(2, 2) + bits[..., 8:])
    return (first / 4 * doubled).repeat_interleave(2, 2)         # for every two values


FORMATS["hif4"] = Format("hif4", Grid(hif4_round, e1m2_number), block=64, top=None, target=7.0,
                         scales=hif4_scales, encode_scale=hif4_encode, squares=False,
                         scale_dtype=torch.int32, pack_scale=hif4_word, unpack_scale=hif4_unpack)


# ---------------------------------------------------------------- OCC, DGE, gradients in FP8: 2501.17116

def split_outliers(x, quantile):
    """OCC, outlier clamping and compensation: x (M, K) in two, clamped to two quantiles of each token, and
    the rest, which is zero but for 2 (1 - quantile) of it. The first is quantized; y gets the product of the
    second in high precision (here a dense one). The gradient is that of all of x.

    source  section 3.3; quantiles of tokens as in its code, so that none sees a later one
    """
    K = x.shape[1]
    rank = round(quantile * (K - 1))
    ordered = x.sort(1).values
    clamped = x.clamp(ordered[:, K - 1 - rank, None], ordered[:, rank, None])
    return clamped, x - clamped


def dge_slope(w, how, k, clip=3.0):
    """DGE, the differentiable gradient estimator: what dw is multiplied by. It is the slope of a smooth curve
    through the steps of rounding.

    how     arguments of quantize(), by which the weight w is quantized
    returns fp32, of w's shape
    value   with u in [-1, 1] the place of w, in units of its scale, between two codes: f'(u) =
            1/k |u|^(1/k - 1), at most clip: 1/k next to a code, most where rounding jumps
    source  section 3.2
    """
    form, rows = FORMATS[how["format"]], w.float().flatten(0, -2)               # of all experts
    q = quantize(rows, **how | {"decode": None, "signs": None, "stochastic": False})
    s_dec = q.s_dec[..., None] if q.s_dec.dim() else q.s_dec
    blocks = rows.abs().unflatten(1, (-1, form.block))
    a = torch.clamp(blocks * form.encode_scale(q.scale_of_lines(), s_dec), max=E2M1_MAX)
    steps = a * torch.where(a < 2, 2.0, torch.where(a < 4, 1.0, 0.5))
    u = 2 * (steps - torch.floor(steps)) - 1
    return torch.clamp(u.abs() ** (1 / k - 1) / k, max=clip).reshape(w.shape)


def e5m2(dy):
    """A gradient as FP8 E5M2 has it, in its own dtype: by a power of two its largest magnitude comes as close
    to E5M2's, 57344 = 0.875 * 2^16, as it can from below.

    source  its code has gradients in FP8; its text is silent, and the scale is our choice
    """
    amax = largest_magnitude(dy)
    mantissa, exponent = torch.frexp(amax)          # 0.5 <= mantissa < 1
    scale = power_of_two(15 - exponent + (mantissa <= 0.875), amax)
    return ((dy.float() * scale).to(torch.float8_e5m2).float() / scale).to(dy.dtype)


# ---------------------------------------------------------------- the layer

@dataclass(frozen=True)
class PaperConfig(FP4Config):
    backward_format: str | None = None              # of dy, and of wgrad's x; None: format
    hadamard_size: int = 16                         # of the rotation: runs of 16, 32 or 128
    hadamard_signs: str = "fixed"                   # of the rotation: fixed, none (all +1), fresh (drawn)
    reuse_codes: bool = False                       # dgrad's w and wgrad's x are what fprop's codes stand for
    dge_k: float | None = None                      # gradient estimator of weights: exponent, 5; None: off
    occ: float | None = None                        # clamp a token's outliers: quantile, 0.99; None: off
    e5m2: tuple[str, ...] = ()                      # GEMMs that take the output gradient in FP8: dgrad,wgrad

    def __post_init__(self):
        super().__post_init__()
        check_words(self, backward_format=(None, *FORMATS), hadamard_size=(16, 32, 128), e5m2=GEMMS[1:],
                    hadamard_signs=("fixed", "none", "fresh"))
        for gemm_name in set(self.e5m2) & set(self.gemms):
            raise ValueError(f"fp4_e5m2={gemm_name} must not be in FP4; take it out of fp4_gemms")
        if self.dge_k is not None and not self.dge_k >= 1:
            raise ValueError(f"fp4_dge_k={self.dge_k} must be 1 or more")
        form = FORMATS[self.format]
        if self.dge_k is not None and (form.grid is not E2M1 or form.correct):
            raise ValueError(f"fp4_dge_k={self.dge_k} must go with scales and a grid like NVFP4's, and "
                             f"{self.format} has others")
        if self.occ is not None and not 0.5 < self.occ <= 1:
            raise ValueError(f"fp4_occ={self.occ} must be a quantile in (0.5, 1]")

    @property
    def active(self):
        return bool(self.gemms or self.e5m2)

    @property
    def layer(self):
        return PaperLinear if self.reuse_codes or self.dge_k or self.occ or self.e5m2 else FP4Linear

    def remarks(self, name):
        if name in [f"{gemm_name}.dy" for gemm_name in self.e5m2]:
            return ["FP8 E5M2"]
        if not self.reuse_codes or name not in ("dgrad.w", "wgrad.x"):
            return []
        in_fp4 = name.split(".")[0] in self.gemms
        return ["of fprop's codes"] if in_fp4 else ["high precision", "of fprop's codes"]

    def without(self, gemms):
        return replace(super().without(gemms), e5m2=tuple(name for name in self.e5m2 if name not in gemms))

    def format_of(self, name):
        gemm_name, matrix = name.split(".")
        if gemm_name == "fprop" or (matrix == "w" and self.square_weights):     # square: one weight for both
            return self.format
        return self.backward_format or self.format

    def signs_of(self, gemm_name, keys):
        """Fixed signs of another size than SIGNS are drawn too, with the key 0."""
        size = self.hadamard_size
        if self.hadamard_signs == "fresh":          # w's key is another each step, dy's each micro-batch
            return drawn_signs(keys[OPERANDS.index("wgrad.dy" if gemm_name == "wgrad" else f"{gemm_name}.w")],
                               size)
        if self.hadamard_signs == "none":
            return as_signs((1,) * size, keys.device)
        return super().signs_of(gemm_name, keys) if size == len(SIGNS) else drawn_signs(0 * keys[0], size)

    @property
    def whole_channels(self):
        blocks = [FORMATS[format].block for format in (self.format, self.backward_format or self.format)]
        return max(*blocks, self.hadamard_size if "dgrad" in self.hadamard else 1)


def drawn_signs(key, size):
    """Signs (size,), fp32, of a rotation, drawn with a key."""
    words = torch.stack(philox(0, 0, 1, 0, key[0], key[1]))     # random_bytes() never has a 1 there
    bits = words[:, None] >> torch.arange(32, device=key.device) & 1
    return 1.0 - 2.0 * bits.flatten()[:size]


def from_codes(rows, how, dtype):
    """Decode a matrix that is quantized along its rows, and quantize its transpose by how; without how the
    transpose stays in dtype.

    source  2601.22813 section 4, 2510.27527: the gradient at the weights and inputs that the forward had
    """
    return quantize_both(rows if torch.is_tensor(rows) else rows.dequantize(dtype), None, how).columns


class PaperFunction(FP4Function):
    """FP4Function, line by line, with what PaperConfig adds."""

    @staticmethod
    def forward(ctx, x, w, quantized_w, keys, cfg, ends):
        needs_dw, experts, N = ctx.needs_input_grad[1], ends is not None, w.shape[-2]
        clamps = cfg.occ is not None and "fprop" in cfg.gemms
        inside, outliers = split_outliers(x, cfg.occ) if clamps else (x, None)
        packs = needs_dw and cfg.reuse_codes        # codes are kept, for the backward
        for_wgrad = cfg.operand("wgrad.x", keys) if needs_dw and not packs else None
        x_both = quantize_both(inside, cfg.operand("fprop.x", keys, None if packs else x.dtype, experts),
                               for_wgrad)
        kept = x_both.rows if cfg.reuse_codes else x_both.columns
        save(ctx, keys, ends, quantized_w.columns, kept if needs_dw else None, w if cfg.dge_k else None)
        ctx.cfg, ctx.w_dtype, ctx.N = cfg, w.dtype, N
        y = fprop(x_both, quantized_w, x.dtype, ends)
        y = y if y.shape[1] == N else y[:, :N].contiguous()
        return y + matmul(outliers, w, y.dtype, ends) if clamps else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        keys, ends, w_columns, x_columns, w = saved(ctx)
        cfg, experts, (needs_dx, needs_dw, *_) = ctx.cfg, ends is not None, ctx.needs_input_grad
        dy = fill_up(dy, columns=-ctx.N % cfg.whole_channels)
        dy_both = quantize_both(dy,
                                cfg.operand("dgrad.dy", keys, dy.dtype, experts) if needs_dx else None,
                                cfg.operand("wgrad.dy", keys, ctx.w_dtype, experts) if needs_dw else None)
        if cfg.e5m2:
            rounded = e5m2(dy)
            dy_both = Both(rounded if "dgrad" in cfg.e5m2 else dy_both.rows,
                           rounded.t() if "wgrad" in cfg.e5m2 else dy_both.columns)
        if needs_dw and cfg.reuse_codes:
            x_columns = from_codes(x_columns, cfg.operand("wgrad.x", keys, ctx.w_dtype, experts), dy.dtype)
        dx = dgrad(dy_both, Both(None, w_columns), dy.dtype, ends) if needs_dx else None
        dw = wgrad(dy_both, Both(None, x_columns), ctx.w_dtype, ends) if needs_dw else None
        dw = dw if dw is None else dw[..., :ctx.N, :]
        if needs_dw and cfg.dge_k is not None and "fprop" in cfg.gemms:
            filled = fill_up(w, rows=-ctx.N % cfg.whole_channels)
            dw = dw * dge_slope(filled, cfg.operand("fprop.w", keys), cfg.dge_k)[..., :ctx.N, :]
        return dx, dw, None, None, None, None


class PaperLinear(FP4Linear):
    function = PaperFunction

    def quantize_weight(self):
        if not self.cfg.reuse_codes:
            return super().quantize_weight()
        w, (for_fprop, for_dgrad) = self.filled_weight(), self.weight_operands()
        rows = quantize_both(w, for_fprop).rows
        return self.by_expert(Both(rows, from_codes(rows, for_dgrad, w.dtype)))


# ---------------------------------------------------------------- gradient over noise: 2505.19115

def weight_gradients(model, loss, high=()):
    """{name: dw} of every FP4 layer for loss(), a loss of the model, with these GEMMs in high precision.

    It leaves no trace in gradients, in buffers of mixers or on other ranks: no leaf of the graph is reached,
    so no hook of one fires.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FP4Linear)}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with nvfp4.high_precision(model, high):
        dw = torch.autograd.grad(loss(), [m.weight for m in layers.values()])
    for buffer, before in buffers:
        buffer.copy_(before)
    return dict(zip(layers, dw, strict=True))


def gradient_to_noise(model, loss):
    """std(dw) / std(noise of dw) of every FP4 layer for loss(), {name: number}. The noise is what the FP4
    backward adds to dw of a backward in high precision; the forward is the same. Layers without noise are
    left out.

    source  2505.19115: training stalls below sqrt(3)
    """
    if not nvfp4.fp4_layers(model):
        return {}
    exact, found = weight_gradients(model, loss, ("dgrad", "wgrad")), {}
    for name, dw in weight_gradients(model, loss).items():
        noise = (dw.double() - exact[name].double()).std()
        if noise != 0:
            found[name] = float(exact[name].double().std() / noise)
    return found


# ---------------------------------------------------------------- how Blackwell adds up

def tensor_core_sum(a, b, bits=35, dot=16, k=64):
    """a (M, K) @ b (N, K)^T as a tensor core adds it up: float64, of values number * scale.

    An instruction takes k products and the sum so far. Its terms are exact dot products of dot values, four
    of 16 by Blackwell's instruction for FP4, and that sum. They are aligned to the largest of them: each is
    cut off toward zero behind so many fractional bits of that one's power of two. Then they are added
    exactly, and the sum is cut off to fp32. Values are finite.

    source  2511.10909, by whose models real chips were reproduced bit for bit; the last step, which it does
            not spell out for FP4, is our choice
    """
    a, b = (F.pad(t.double(), (0, -t.shape[1] % k)).unflatten(1, (-1, k // dot, dot)) for t in (a, b))
    y = a.new_zeros(len(a), len(b))
    for i in range(a.shape[1]):
        terms = torch.cat([torch.einsum("mgd,ngd->gmn", a[:, i], b[:, i]), y[None]])
        unit = torch.ldexp(torch.ones_like(y), torch.frexp(terms.abs().amax(0)).exponent - 1 - bits)
        y = toward_zero((terms / unit).trunc().sum(0) * unit)
    return y


def toward_zero(y):
    """float64 cut off to a number of fp32, as float64."""
    rounded = y.float()
    return torch.where(rounded.double().abs() > y.abs(), rounded.nextafter(torch.zeros(())), rounded).double()


# ---------------------------------------------------------------- recipes

RECIPES |= {
    # 2512.02010, four over six, in the forward alone. The paper has it for gradients too, where it chooses by
    # errors of rounding at random; that is biased (2601.22813 section 4.2).
    "nvfp4_46": PaperConfig(format="nvfp4_46", backward_format="nvfp4", hadamard=("wgrad",), tail=0.15),
    # 2601.22813: four over six in the forward; in the backward MS-EDEN for all four operands, with a rotation
    # drawn anew, of x and w as the forward's codes have them. So no square weights and no layers in BF16.
    "quartet2": PaperConfig(format="nvfp4_46", backward_format="ms_eden", square_weights=False,
                            reuse_codes=True, stochastic=("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"),
                            hadamard=("dgrad", "wgrad"), hadamard_size=128, hadamard_signs="fresh"),
    # 2505.19115: no rotation; beside gradients the activation of wgrad is rounded stochastically. The
    # paper ends with a short phase whose backward is in BF16: until=..., switched=("dgrad", "wgrad").
    "fp4_all_the_way": FP4Config(square_weights=False, stochastic=("dgrad.dy", "wgrad.dy", "wgrad.x")),
    # 2510.27527, TetraJet-v2, its aligned backward alone: of x and w as the forward's codes have them, all of
    # it rounded stochastically, rotated with signs that are drawn anew, as in its code. Missing are scales of
    # 1x128 blocks in place of the tensor's, OsciReset, which stops weights from swinging between two codes,
    # and OutControl, a tenth of the activation's channels in MXFP8.
    "tetrajet2": PaperConfig(square_weights=False, reuse_codes=True,
                             stochastic=("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"),
                             hadamard=("dgrad", "wgrad"), hadamard_signs="fresh"),
    # 2501.17116: scales of tokens and output channels, outliers clamped and compensated, dw by DGE. Gradients
    # stay in BF16, and so do the GEMMs of the backward, which multiply them with the 4-bit values. In the
    # paper's code they are in FP8, of which its text says nothing: e5m2=("dgrad", "wgrad").
    "fp4_dge_occ": PaperConfig(format="e2m1_vector", gemms=("fprop",), stochastic=(), square_weights=False,
                               reuse_codes=True, dge_k=5.0, occ=0.99),
    # 2509.25149 compares with MXFP4, rotated in runs of its block.
    "mxfp4": PaperConfig(format="mxfp4", hadamard=("wgrad",), hadamard_size=32, tail=0.15),
    # 2605.09825 section 4: nothing is random. All is rounded to nearest, wgrad's operands are rotated without
    # signs, and no block is kept in BF16.
    "mxfp4_h16": PaperConfig(format="mxfp4", stochastic=(), hadamard=("wgrad",), hadamard_signs="none"),
    # 2606.20381: a uniform grid in all three GEMMs, all rotated; dy alone is rounded stochastically.
    "ufp4": FP4Config(format="ufp4", square_weights=False, hadamard=GEMMS),
    # 2604.08826: all to nearest, wgrad rotated. The text that we have gives neither the rotation's size nor
    # the layers that stay in BF16.
    "hif4": FP4Config(format="hif4", square_weights=False, stochastic=(), hadamard=("wgrad",)),
}


if __name__ == "__main__":
    nvfp4.main(sys.argv[1:], __doc__)
