"""Proofs for the Triton kernels of nvfp4.py: on a GPU where there is one, else under Triton's interpreter;
and compiled for five chips without one. They must be what quantize() and quantize_both() say in the lesson,
which test_nvfp4.py holds to the oracle.
"""
import collections
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import nvfp4
import train
from nvfp4 import (GEMMS, OPERANDS, RECIPES, SIGNS, Both, Decoded, Quantized, choices,
                   convert, matmul, quantize, quantize_both, quantize_both_triton)
from papers import PaperConfig
from runs import REPO, metrics
from test_nvfp4 import BLOCK, KINDS, SEED, gaussian, same, sample

triton = pytest.importorskip("triton", reason="no Triton on this system")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
needs_none = pytest.mark.skipif(GPU, reason="plays a GPU that is not here")
pytestmark = [pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning"),
              pytest.mark.usefixtures("unfused")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEY = torch.tensor(nvfp4.stream_key(SEED, 1, 2, 3, 4))
FIXED = torch.tensor(SIGNS, dtype=FP32)
SOFTWARE = (False, False)                           # rounding by PTX instructions is for Blackwell


def move(how, device):
    return how and how | {name: how[name].to(device) for name in ("seed", "signs", "amax")
                          if torch.is_tensor(how[name])}


def home(q):
    """An operand on the CPU."""
    return q.cpu() if torch.is_tensor(q) else q._replace(**{
        name: value.cpu() for name, value in q._asdict().items() if torch.is_tensor(value)})


def kernels(x, rows, columns, ptx=SOFTWARE, swizzled=False):
    """quantize_both() by the kernels."""
    both = quantize_both_triton(x.to(DEVICE), move(rows, DEVICE), move(columns, DEVICE), ptx, swizzled)
    return Both(*map(home, both))


def agree(got, want):
    """Bit for bit; in blocks whose scale is NaN the codes mean nothing."""
    if type(got) is not type(want) or not same(got.s_dec, want.s_dec):
        return False
    if isinstance(want, Decoded):
        return same(got.values, want.values)
    if not same(got.scales.contiguous(), want.scales.contiguous()):
        return False
    n = want.shape[0] // want.scales.shape[0]
    number = ~want.scales.float().isnan().repeat_interleave(n, 0).repeat_interleave(BLOCK // 2, 1)
    return torch.equal(got.codes[number], want.codes[number])


ALL_KINDS = (*KINDS, "nan", "inf")
DTYPES = BF16, FP16, FP32
CASES = list(product(ALL_KINDS, DTYPES))
ONE_EACH = [(kind, DTYPES[i % 3]) for i, kind in enumerate(ALL_KINDS)]
OPTIONS = [choices(name, square, stochastic, KEY, amax, signs, decode)
           for stochastic, signs, amax, square, name, decode in product(
               (False, True), (None, FIXED), (None, 1.0), (False, True), ("nvfp4", "nvfp4_unbiased"),
               (None, BF16, FP32))]
SHAPES = (1, 16), (37, 48), (80, 112), (65, 16), (16, 80), (128, 64)


def sample_of(kind, shape, dtype):
    """sample(), also with NaN or Inf."""
    x = sample(kind if kind in KINDS else "gaussian", shape, dtype)
    if kind not in KINDS:
        x[-1, ::7] = float(kind)
    return x


def chosen(case, n):
    """(shape, rows, columns), n of them, of each shape in turn: from a place of its own on, a case takes
    every twentieth of OPTIONS, for columns others than for rows; square blocks only where they fit."""
    for i in range(n):
        shape = SHAPES[(case + i) % len(SHAPES)]
        how = [OPTIONS[(7 * case + 20 * i + 41 * side) % len(OPTIONS)] for side in (0, 1)]
        yield shape, *(h | {"square": h["square"] and size % BLOCK == 0}
                       for h, size in zip(how, shape, strict=True))


@pytest.mark.parametrize("kind, dtype, n", (
    *((*case, 1) for case in ONE_EACH), *(pytest.param(*case, 36, marks=pytest.mark.long) for case in CASES)))
def test_quantize_kernel_is_the_definition(kind, dtype, n):
    """Codes, scales, s_dec and values, of rows and columns at once. The shapes: one row; K = 16; tiles not
    filled; square blocks where they fit."""
    for shape, rows, columns in chosen(CASES.index((kind, dtype)), n):
        x = sample_of(kind, shape, dtype)
        want = quantize_both(x, rows, columns)
        assert all(map(agree, kernels(x, rows, columns), want)), (shape, rows, columns)


@pytest.mark.parametrize("decode", (None, FP32), ids=str)
def test_a_largest_magnitude_may_be_a_tensor(decode):
    """As ranks have it that found it together: what the search finds, given."""
    x, how = gaussian(48, 64), choices(decode=decode)
    largest = x.abs().max()
    searched, given, twice = (kernels(x, how | {"amax": amax}, None).rows
                              for amax in (None, largest, 2 * largest))
    assert agree(given, searched) and not agree(twice, searched)
    assert agree(given, quantize_both(x, how | {"amax": largest}).rows)


@pytest.mark.parametrize("decode", (None, FP32), ids=str)
def test_what_lies_next_to_a_random_step_is_not_taken_for_it(decode):
    """Stochastic rounding looks at 256ths of a step, cut off. A value and both its neighbours in fp32, of all
    of these, and numbers that fp32 can hardly add to 1."""
    steps = torch.arange(1, 3072) / 512
    near = torch.cat([steps, steps.nextafter(torch.tensor(0.0)), steps.nextafter(torch.tensor(9.0)),
                      2.0 ** -torch.arange(10, 149.0), 1.75 * 2.0 ** -torch.arange(10, 149.0)])
    x = F.pad(F.pad(near, (0, -len(near) % 15)).view(-1, 15), (0, 1), value=6.0)        # blocks of scale 1
    how = choices(stochastic=True, amax=6.0 * 448, decode=decode)
    for key in range(3):
        want = quantize_both(x, how | {"seed": key})
        assert agree(kernels(x, how | {"seed": key}, None).rows, want.rows)
    lower = quantize_both(x.nextafter(torch.tensor(0.0)), how | {"seed": key}).rows     # control
    assert not agree(lower, want.rows)


@pytest.mark.parametrize("kind", ["gaussian", "subnormal", "nan"])
def test_decode_kernel_is_the_definition(kind):
    """Bit for bit, whatever the shape, NaN and subnormal scales among them; a control with other scales."""
    x = sample_of(kind, (80, 112), FP32) * torch.logspace(-7, 0, 80)[:, None]
    for square, dtype in product((False, True), DTYPES):
        q = quantize(x, square=square)
        want, there = q.decode(dtype), Quantized(*(t.to(DEVICE) for t in q[:3]))
        assert same(nvfp4.decode_triton(there, dtype).cpu(), want)
        swizzled = there._replace(scales=nvfp4.swizzle(there.scales, 80))
        assert same(nvfp4.decode_triton(swizzled, dtype).cpu(), want)
    x = gaussian(32, 64)
    there = Quantized(*(t.to(DEVICE) for t in quantize(x)[:3]))
    for wrong in ({"scales": there.scales.flip(0)}, {"codes": there.codes.flip(1)}):
        assert not same(nvfp4.decode_triton(there._replace(**wrong), BF16).cpu(), quantize(x).decode())


def test_block_scales_of_all_sizes():
    """E4M3's subnormal ones too, and maxima that a rotation leaves between two numbers of bf16."""
    x = (gaussian(64, 64) * torch.logspace(-7, 0, 64)[:, None]).bfloat16()
    for rows, columns in ((choices(), choices(signs=FIXED)), (choices(signs=FIXED), choices(decode=BF16))):
        want = quantize_both(x, rows, columns)
        assert all(map(agree, kernels(x, rows, columns), want))
        assert set(range(8)) < set(want.rows.scales.view(torch.uint8).flatten().tolist())


def test_every_option_occurs():
    """In the README's command each value of each option, along rows and along columns, and each shape; in the
    long run all combinations."""
    for cases, n in ((ONE_EACH, 1), (CASES, 36)):
        met = [choice for case in cases for choice in chosen(CASES.index(case), n)]
        assert {shape for shape, _, _ in met} == set(SHAPES)
        for side in (1, 2):
            values = {tuple(torch.is_tensor(v) or v for v in choice[side].values()) for choice in met}
            assert [len(set(column)) for column in zip(*values, strict=True)] == [2, 2, 2, 1, 2, 2, 3]
            assert n == 1 or len(values) == len(OPTIONS)


def test_each_option_reaches_the_kernel():
    """Negative control: with one option changed the kernel no longer agrees with the definition."""
    x = sample("ties", (32, 48), BF16)
    how = choices("nvfp4_unbiased", square=True, stochastic=True, seed=KEY, signs=FIXED)
    want = quantize_both(x, how, how)
    for change in ({}, {"seed": KEY + 1}, {"stochastic": False}, {"signs": -FIXED.flip(0)}, {"signs": None},
                   {"amax": 2.0}, {"square": False}, {"format": "nvfp4"}):
        got = kernels(x, how | change, how | change)
        assert [agree(g, w) for g, w in zip(got, want, strict=True)] == [not change] * 2, change


def test_rows_and_columns_need_not_be_asked_for_together():
    x = sample("gaussian", (37, 48), BF16)
    rows = choices(stochastic=True, seed=KEY, decode=BF16)
    columns = choices(stochastic=True, seed=KEY, signs=FIXED)
    (left, plain_t), (plain, right) = kernels(x, rows, None), kernels(x, None, columns)
    assert torch.equal(plain, x) and torch.equal(plain_t, x.t())                # not asked for: as it is
    assert all(map(agree, kernels(x, rows, columns), (left, right)))
    assert not agree(left, kernels(x, columns, None).rows)


@needs_none
def test_a_transpose_is_quantized_without_being_copied(monkeypatch):
    """quantize(x.t()) works along the columns of x as it lies in memory, quantize(x) along its rows; a matrix
    that lies in neither way is copied. All are the definition's."""
    x, how = sample("ties", (64, 64), BF16), {"stochastic": True, "seed": KEY, "signs": FIXED}
    cases = [(x, "rows", True), (x.t(), "columns", True), (x[:, ::2], "rows", False),
             (x.t()[:, ::4], "columns", False), (x[:, :1].expand(64, 16), "rows", False)]
    wanted, launched, kernel = [quantize(matrix, **how) for matrix, _, _ in cases], [], nvfp4._quantize_kernel

    class Kernel:
        def __getitem__(self, grid):
            def launch(x, R, C, *others, **options):
                asked = zip(("rows", "columns"), others[-3:-1], strict=True)
                launched.append((x.data_ptr(), *(side for side, flags in asked if flags)))
                return kernel[grid](x, R, C, *others, **options)
            return launch
    monkeypatch.setattr(nvfp4, "_quantize_kernel", Kernel())
    play_a_gpu(monkeypatch)
    for (matrix, side, in_place), want in zip(cases, wanted, strict=True):
        assert agree(quantize(matrix, **how), want)
        (place, *sides), = launched
        assert sides == [side] and (place == matrix.data_ptr()) is in_place
        launched.clear()


# ---------------------------------------------------------------- GEMMs on packed codes

def random_scales(*shape):
    return torch.randint(1, 120, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_swizzle_is_the_documented_order():
    """The scale of row r and column c of a 128 x 4 tile lies at (r % 32) * 16 + (r // 32) * 4 + c."""
    scales = random_scales(200, 6)
    flat = nvfp4.swizzle(scales.view(torch.float8_e4m3fn), 200).view(torch.uint8).flatten()
    assert flat.numel() == 256 * 8
    for r, c in product(range(256), range(8)):
        place = ((r // 128) * 2 + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
        assert flat[place] == (scales[r, c] if r < 200 and c < 6 else 0)
    square = nvfp4.swizzle(scales[:8].view(torch.float8_e4m3fn), 128)           # of 16 x 16 blocks
    assert torch.equal(square.view(torch.uint8), nvfp4.swizzle(
        scales[:8].repeat_interleave(16, 0).view(torch.float8_e4m3fn), 128).view(torch.uint8))


@pytest.mark.parametrize("kind, shape, square", (
    ("gaussian", (37, 48), False), ("gaussian", (144, 80), False), ("gaussian", (16, 144), True),
    *(pytest.param(*case, marks=pytest.mark.long) for case in product(
        ("gaussian", "inf"), (*SHAPES, (200, 144), (256, 192)), (False, True)))))
def test_kernel_stores_scales_as_swizzle_orders_them(kind, shape, square):
    """Of rows and columns at once; tiles not filled, which are padded with zeros beside a NaN too; square
    blocks, where they fit, for each of their lines. Then all that reads scales finds the definition's, and
    not that of tiles, or scales in a tile, in another order."""
    x = sample_of(kind, shape, BF16)
    rows, columns = (choices(square=square and size % BLOCK == 0, stochastic=True, seed=KEY)
                     for size in shape)
    want = quantize_both(x, rows, columns)
    for got, plain in zip(kernels(x, rows, columns, swizzled=True), want, strict=True):
        (M, K), lines = got.shape, plain.scales.float().repeat_interleave(
            len(plain.codes) // len(plain.scales), 0)
        right = nvfp4.swizzle(plain.scales, M)
        assert same(got.scales, right) and nvfp4.swizzle(got.scales, M) is got.scales       # GEMMs take it so
        assert agree(got._replace(scales=nvfp4.unswizzle(got.scales, M, K)),
                     plain._replace(scales=lines.to(torch.float8_e4m3fn)))
        if kind == "gaussian":
            assert same(got.decode(), plain.decode()) and same(got.dequantize(), plain.dequantize())
        if kind == "gaussian" and min(got.scales.shape[:2]) > 1:                # controls: not of NaN alone
            for axes in ((1, 0, 2, 3, 4), (0, 1, 3, 2, 4), (0, 1, 2, 4, 3)):
                other = got._replace(scales=right.permute(axes).reshape(right.shape))
                assert not same(got.scales, other.scales) and not same(other.decode(), plain.decode())


def play_a_gpu(monkeypatch, *ways):
    """Have this CPU taken for a GPU whose FP4 units multiply in these ways; without any, it decodes."""
    monkeypatch.setattr(nvfp4, "has_kernels", lambda device: True)
    monkeypatch.setattr(nvfp4, "hardware", lambda device: nvfp4.Hardware(False, False, ways, ()))


@needs_none
@pytest.mark.parametrize("ways", ((), ("dot_scaled",)), ids=("no FP4 units", "FP4 units"))
def test_scales_are_swizzled_where_fp4_units_read_them(ways, monkeypatch):
    """The numbers are the definition's. Products go to the FP4 units, where there are some."""
    x, how = gaussian(48, 64), choices(square=True)
    want = quantize_both(x, how, how)
    play_a_gpu(monkeypatch, *ways)
    got = quantize_both(x, how, how)
    for q, plain in zip(got, want, strict=True):
        assert q.scales.dim() == (5 if ways else 2) and same(q.dequantize(), plain.dequantize())
    assert nvfp4.native_way(got.rows, got.rows) is (nvfp4.WAYS["dot_scaled"] if ways else None)
    assert isinstance(quantize(x, decode=BF16), Decoded)


@pytest.mark.skipif(GPU, reason="on a GPU the native GEMM itself is tested")
def test_the_native_kernel_reads_swizzled_scales():
    """_load_swizzled undoes swizzle(), also where neither axis fills its tile."""
    tl = triton.language

    @triton.jit
    def copy(s_ptr, out_ptr, n_lines, K, LINES: tl.constexpr, BLOCK_K: tl.constexpr):
        k = tl.program_id(1) * BLOCK_K
        s = nvfp4._load_swizzled(s_ptr, n_lines, K, tl.program_id(0), k, LINES, BLOCK_K)
        rows = tl.program_id(0) * LINES + tl.arange(0, LINES)
        columns = tl.program_id(1) * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
        tl.store(out_ptr + rows[:, None] * 16 + columns[None, :], s)
    scales = random_scales(200, 10)
    out = torch.full((256, 16), 255, dtype=torch.uint8)
    swizzled = nvfp4.swizzle(scales.view(torch.float8_e4m3fn), 200).view(torch.uint8)
    copy[(2, 2)](swizzled, out, 200, 160, 128, 128)
    assert torch.equal(out, F.pad(scales, (0, 6, 0, 56)))


def definition_of_codes(a, a_scales, a_s_dec, b, b_scales, b_s_dec, dtype):
    """matmul() of codes by their definition: what the FP4 units of a GPU that is not here would give."""
    assert a_scales.dim() == b_scales.dim() == 5                                # swizzled
    exact = nvfp4.gemm_dtype(a.device, dtype)
    a, b = Quantized(a, a_scales, a_s_dec), Quantized(b, b_scales, b_s_dec)
    return nvfp4.gemm(a.decode(exact), b.decode(exact), a_s_dec * b_s_dec, dtype)


def native_kernel(a, a_scales, a_s_dec, b, b_scales, b_s_dec, y, M, N, K, **options):
    """In place of the kernel of matmul_dot_scaled."""
    y.copy_(definition_of_codes(a, a_scales, a_s_dec, b, b_scales, b_s_dec, y.dtype))


def by_torch(a, b, a_scales, recipe_a, b_scales, recipe_b, swizzle_a, swizzle_b, output_dtype):
    """In place of torch's scaled_mm; refuses what cuBLAS does."""
    (M, K), N = (a.shape[0], 2 * a.shape[1]), b.shape[1]
    if K % 32 or N % 16:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
    y = torch.empty(M, N, dtype=output_dtype)
    a_blocks, b_blocks = (scales[0].view(-(-n // 128), -(-K // 64), 32, 4, 4)
                          for scales, n in ((a_scales, M), (b_scales, N)))
    native_kernel(a.view(torch.uint8), a_blocks, a_scales[1], b.t().view(torch.uint8), b_blocks, b_scales[1],
                  y, M, N, K)
    return y


@pytest.fixture
def blackwell(monkeypatch):
    """A GPU of sm_100 that is not here: it rounds and multiplies by the definition. What is put into the set
    that it gives is broken."""
    broken = set()

    def instructions(x, rows, columns, ptx):
        assert ptx == (True, True) and columns is None
        q = quantize(x, **rows)
        q.codes[0, 3] ^= ("stochastic" if rows["stochastic"] else "nearest") in broken
        return Both(q, None)

    def kernel(*args, **options):
        native_kernel(*args, **options)
        args[6].mul_(0.98 if "dot_scaled" in broken else 1)

    def scaled_mm(*args, **options):
        if "scaled_mm" in broken:
            raise RuntimeError("no kernel image\nfor this GPU")
        return by_torch(*args, **options)
    for name, value in (("get_device_capability", (10, 0)), ("get_device_name", "a Blackwell")):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(nvfp4, "quantize_both_triton", instructions)
    monkeypatch.setattr(nvfp4, "_matmul_native_kernel", collections.defaultdict(lambda: kernel))  # [grid]
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm, raising=False)
    return broken


PARTS = {"nearest": "cvt.rn", "stochastic": "cvt.rs", "dot_scaled": "dot_scaled (its result is not",
         "scaled_mm": "scaled_mm (RuntimeError: no kernel image)"}


@needs_none
@pytest.mark.parametrize("wrong", ((), ("nearest",), ("stochastic",), ("dot_scaled",), ("scaled_mm",),
                                   ("dot_scaled", "scaled_mm")), ids=str)
def test_hardware_uses_what_agrees_with_the_definition(wrong, blackwell, monkeypatch, capsys):
    """The probes of a Blackwell that is not there, with some of its parts broken. These, and no others, are
    left out and named on stderr, and no product crashes afterwards."""
    blackwell.update(wrong)
    found = nvfp4.hardware.__wrapped__(DEVICE)
    ways = tuple(name for name in ("scaled_mm", "dot_scaled") if name not in wrong)
    assert found[:3] == ("nearest" not in wrong, "stochastic" not in wrong, ways)
    said = capsys.readouterr().err
    assert said.count("is not used") == len(said.splitlines()) == len(found.refused) == len(wrong)
    assert all(PARTS[name].split(" (")[0] in said for name in wrong)
    assert all(any(why.startswith(PARTS[name]) for why in found.refused) for name in wrong)
    a, b = (quantize(gaussian(n, 64, seed=n)) for n in (32, 48))
    want = matmul(a, b)
    monkeypatch.setattr(nvfp4, "hardware", lambda device: found)
    monkeypatch.setattr(nvfp4, "has_kernels", lambda device: True)
    assert same(matmul(a, b), want) and (nvfp4.native_way(a, b) is None) is (not ways)


@needs_none
def test_shapes_that_scaled_mm_does_not_take_go_another_way(blackwell):
    """K must be a multiple of 32 for it, and N of 16."""
    found = nvfp4.hardware.__wrapped__(DEVICE)
    ways = {(K, N): [name for name in found.matmul if nvfp4.WAYS[name].takes(
        quantize(gaussian(16, K)), quantize(gaussian(N, K)))] for K, N in ((64, 32), (48, 32), (64, 33))}
    assert ways[64, 32] == ["scaled_mm", "dot_scaled"] and ways[48, 32] == ways[64, 33] == ["dot_scaled"]


@needs_none
def test_the_probe_allows_for_what_tensor_cores_cut_off(blackwell, monkeypatch):
    """The sums of blocks, added up with 14 bits as by Hopper's 8-bit units, pass; off by 1 % they do not, and
    held to what fp32 keeps, 1e-5, they did not."""
    def cut(x):                                     # to 14 significant bits
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp(torch.trunc(mantissa * 2**14), exponent - 14)

    def short_sums(a, *args, output_dtype, factor):
        codes, y = a.view(torch.uint8), 0
        for k in range(0, codes.shape[1], BLOCK // 2):                          # of a block: the others are 0
            block = torch.zeros_like(codes)
            block[:, k:k + BLOCK // 2] = codes[:, k:k + BLOCK // 2]
            y = cut(y + cut(by_torch(block.view(a.dtype), *args, output_dtype=FP32)))
        return (factor * y).to(output_dtype)
    allowed = nvfp4.ACCUMULATION_ERROR
    for factor, error, passes in ((1, allowed, True), (0.99, allowed, False), (1, 1e-5 / 288, False)):
        monkeypatch.setattr(nvfp4, "ACCUMULATION_ERROR", error)
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", functools.partial(short_sums, factor=factor))
        assert ("scaled_mm" in nvfp4.hardware.__wrapped__(DEVICE).matmul) is passes


@needs_none
@pytest.mark.parametrize("matmul, refused, said", (
    (("dot_scaled",), ("scaled_mm (RuntimeError: no)",), "FP4 GEMMs native, by dot_scaled; rounding to "
     "nearest in PTX, stochastic in PTX; not used: scaled_mm (RuntimeError: no)"),
    ((), ("scaled_mm (a)", "dot_scaled (b)"), "GEMMs on exact values in bf16 tensor cores; not used: "
     "scaled_mm (a), dot_scaled (b)"),
    ((), (), "a GPU (sm_100) has no FP4 units: FP4 emulated")))
def test_capability_names_what_is_not_used(matmul, refused, said, monkeypatch):
    """On the console, where a run begins: a Blackwell that emulates is not to pass unnoticed."""
    for name, value in (("get_device_capability", (10, 0)), ("get_device_name", "a GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(nvfp4, "has_kernels", lambda device: True)
    monkeypatch.setattr(nvfp4, "hardware", lambda device: nvfp4.Hardware(True, True, matmul, refused))
    assert said in nvfp4.capability("cuda") and ("not used" in nvfp4.capability("cuda")) == bool(refused)


# ---------------------------------------------------------------- compiled for chips that are not here

@functools.cache
def compile_for_chips(*arguments):
    finished = subprocess.run([sys.executable, REPO / "tests/aot.py", *arguments], capture_output=True,
                              text=True, timeout=900, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout)


@pytest.fixture(params=("--few", pytest.param(None, marks=pytest.mark.long)), ids=("few", "all"))
def compiled(request):
    """{"kernel, configuration": {chip: facts}}"""
    return compile_for_chips(*[request.param] * bool(request.param))


SHARED_MEMORY = {"80": 99 << 10, "90": 227 << 10, "100": 227 << 10, "103": 227 << 10, "120": 99 << 10}
# bytes that a block may use; "80" stands for sm_86 and sm_89 too, which have less of it
TENSOR_CORES = {"100": "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X",
                "120": "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"}
TENSOR_CORES["103"] = TENSOR_CORES["100"]


def test_kernels_compile_to_the_chip_s_instructions(compiled):
    """Kernels in the configurations of training: the chip's tensor cores and conversions, no register
    spilled, shared memory within its limit. sm_120 must not be given cvt.rs, which it does not have."""
    for name, chip, facts in each(compiled):
        said = " ".join(facts["instructions"])
        assert facts["stack"] == facts["local"] == 0 < facts["reg"], name
        assert facts["shared"] <= SHARED_MEMORY[chip] and (facts["shared"] > 0 or name in ROWS), name
        if name.startswith("matmul"):
            assert TENSOR_CORES[chip] in said, name
        stochastic = any(word in name for word in ("dy", "stochastic")) and "software" not in name
        nearest = name.startswith("quantize") and not stochastic and "software" not in name
        assert ("cvt.rs.satfinite.e2m1x4" in said) == (stochastic and chip in ("100", "103")), name
        assert ("cvt.rn.satfinite.e2m1x2" in said) == (nearest and int(chip) >= 100), name
    assert compiled["starved codes, stochastic"]["90"]["stack"] > 0             # control: spills are seen


ROWS = "quantize codes, nearest", "quantize codes, stochastic", "quantize x, evaluation", "decode x"
SQUARE = "quantize w"                               # the maximum of a square block is looked for by two warps
CONTROLS = "starved codes, stochastic", "ordered maximum"


def each(compiled):
    """(name, chip, facts) of every kernel that is no control."""
    return [(name, chip, facts) for name, chips in compiled.items() if name not in CONTROLS
            for chip, facts in chips.items()]


def test_threads_wait_for_each_other_as_little_as_they_can(compiled):
    """Rows pass through no shared memory. The codes and scales of columns do, to be turned around: three
    barriers. A maximum takes two a tensor and one between, and is sent off without a fence."""
    for name, chip, facts in each(compiled):
        if name.startswith("amax"):
            assert facts["fences"] == 0 and facts["barriers"] == (2 if name.endswith("plain") else 5), name
        elif name in ROWS:
            assert facts["barriers"] == facts["shared_accesses"] == facts["shared"] == 0, name
        elif name == SQUARE:
            assert facts["barriers"] <= (6 if int(chip) >= 100 else 2)          # there along both axes
        elif name.startswith("quantize"):           # not 0: they are seen
            assert 1 <= facts["barriers"] <= 3 and 0 < facts["shared_accesses"] <= 8, name
    assert compiled["ordered maximum"]["90"]["fences"] > 0                      # control: fences are seen


@pytest.mark.long
@pytest.mark.parametrize("chip", ("90", "100"))
def test_rows_are_bound_by_memory(chip):
    """By the floors of aot.py, an estimate; rounded to nearest, the tensor's maximum given. Control: random
    rounding by software along rows and rotated columns is bound by arithmetic."""
    table = compile_for_chips()
    for name in ("quantize codes, nearest", "quantize x, evaluation", "amax bf16, plain", "decode x"):
        assert 0 < table[name][chip]["arithmetic_us"] < table[name][chip]["memory_us"], name
    slow = table["quantize dy, nvfp4" if chip == "90" else "quantize dy, software"][chip]
    assert slow["arithmetic_us"] > slow["memory_us"]


LISTING = """
    /*0000*/            FMUL R0, R1, R2 ;
    /*0010*/       @!P3 BRA 0x0040 ;
    /*0020*/            MOV R4, 0x30 ;
    /*0030*/            CALL.REL.NOINC 0x00c0 ;
    /*0040*/        @P1 FADD R0, R0, R0 ;
    /*0050*/            BRA.U !UP0, 0x0070 ;
    /*0060*/            STG.E desc[UR4][R2.64], R0 ;
    /*0070*/            LOP3.LUT R1, R0, 0x7, RZ, 0xc0, !PT ;
    /*0080*/       @!P0 EXIT ;
    /*0090*/            STG.E desc[UR4][R2.64], R0 ;
    /*00a0*/            EXIT ;
    /*00b0*/            BRA 0x00b0 ;
    /*00c0*/            FFMA R0, R1, R2, R3 ;
    /*00d0*/            RET.REL.NODEC R4 0x0 ;
"""


def test_instructions_are_counted_on_the_shortest_way():
    """The branches around the call and around the first store are taken; what a predicate may switch off
    counts; nothing does after the end. A loop is refused."""
    from aot import executed, parsed
    assert executed(parsed(LISTING)) == {"FMUL": 1, "BRA": 2, "FADD": 1, "LOP3": 1, "EXIT": 2, "STG": 1}
    with pytest.raises(AssertionError, match="a loop"):
        executed(parsed(LISTING.replace("0x0070", "0x0010")))


def small_model(recipe="nvfp4"):
    """Two linears with a nonlinearity between; 45 tokens: the last block of wgrad is not full."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64))
    convert(model, RECIPES.get(recipe, recipe), report=lambda line: None)
    nvfp4.set_step(model.to(DEVICE), SEED, 3)
    return model, gaussian(45, 64).to(DEVICE).requires_grad_()


def gradients(model, x, call):
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


RANDOM = PaperConfig(stochastic=OPERANDS, hadamard=GEMMS, hadamard_signs="fresh")
QUARTET2 = replace(RECIPES["quartet2"], hadamard_size=32)


@pytest.mark.parametrize("recipe", ("nvfp4", "ngpt", "nvfp4_46", QUARTET2, RANDOM),
                         ids=("nvfp4", "ngpt", "nvfp4_46", "quartet2", "all random"))
def test_activation_checkpointing_changes_no_bit(recipe):
    """The forward, computed again in the backward, draws the same random bits and quantizes the same."""
    want = gradients(*(pair := small_model(recipe)), pair[0])
    model, x = small_model(recipe)
    got = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    assert all(same(g, w) for g, w in zip(got, want, strict=True))
    model, x = small_model(recipe)
    nvfp4.set_step(model, SEED, 4)
    assert not all(same(g, w) for g, w in zip(gradients(model, x, model), want, strict=True))


@pytest.mark.parametrize("recipe", ("nvfp4", replace(RECIPES["fp4_dge_occ"], e5m2=("dgrad", "wgrad"))),
                         ids=("nvfp4", "fp4_dge_occ, fp8"))
def test_a_gradient_of_gradients_is_refused(recipe):
    """A penalty on gradients would be wrong without a word: the backward rounds, and has no derivative."""
    def penalize(model, x):
        dx, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiate twice.*once_differentiable"):
        penalize(*small_model(recipe))
    model, x = small_model("bf16")                  # control: of high precision there is one
    penalize(model, x)
    assert bool(x.grad.any()) and all(bool(p.grad.any()) for p in model[0].parameters())


# ---------------------------------------------------------------- a run, as on a GPU that is not here

@needs_none
@pytest.mark.parametrize("recipe, dtype, pattern, steps", (
    ("nvfp4", "bfloat16", "-", 1), *(pytest.param(*case, 2, marks=pytest.mark.long) for case in (
        ("ngpt", "float32", "*-"), ("nvfp4", "bfloat16", "*-"), ("ngpt", "float32", "ME")))))
def test_a_run_on_a_gpu_is_the_definition_s(recipe, dtype, pattern, steps, tiny, tmp_path, monkeypatch):
    """train.py from set-up to evaluation, bit for bit: by the definition; by the kernels, decoded (sm_80 to
    sm_90); by the kernels, packed, with FP4 units that follow the definition (Blackwell), though not for
    experts."""
    calls = collections.Counter()

    def counted(name, function):
        def run(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)
        monkeypatch.setattr(nvfp4, name, run)

    def way(a, b, dtype):
        calls["way"] += 1
        return definition_of_codes(*a[:3], *b[:3], dtype)

    def rows(name, **changes):
        calls.clear()
        arch = "ngpt" if recipe == "ngpt" else "gpt"
        train.main(tiny(tmp_path / name, arch=arch, recipe=recipe, dtype=dtype, pattern=pattern, n_ffn=64,
                        moe_n_expert=2, moe_n_active=1, mamba_n_head=16, mamba_head_dim=4, mamba_n_group=2,
                        mamba_n_state=16, block_size=16, batch_size=3, max_steps=steps, fp4_tail=0,
                        **changes))
        return [{key: value for key, value in row.items() if key != "ms"} for row in metrics(tmp_path / name)]
    want = rows("definition")
    counted("quantize_both_triton", quantize_both_triton)
    counted("gemm", nvfp4.gemm)
    monkeypatch.setattr(nvfp4, "has_kernels", lambda device: True)
    monkeypatch.setattr(nvfp4, "WAYS", {"scaled_mm": nvfp4.Way(way, 32, 16)})   # not wgrad: of 48 tokens
    for name, ways in (("sm_90", ()), ("sm_100", ("scaled_mm",))):
        found = nvfp4.Hardware(False, False, ways, ())
        monkeypatch.setattr(nvfp4, "hardware", lambda device, found=found: found)
        assert rows(name) == want and calls["quantize_both_triton"] > 6
        assert (0 < calls["way"] < calls["gemm"]) == bool(ways), calls
    monkeypatch.setattr(nvfp4, "has_kernels", lambda device: False)
    assert rows("control", fp4_stochastic="") != want and not calls["quantize_both_triton"]


# ---------------------------------------------------------------- on a GPU

@needs_gpu
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "bf16"])
def test_layer_on_a_gpu_is_the_layer_on_a_cpu(name):
    """The operands are the same bits; y, dx and dw differ by the order of summation and bf16's rounding."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = RECIPES[name].layer(torch.nn.Linear(256, 384, bias=False), RECIPES[name], 3).to(device)
        nvfp4.set_step(layer, SEED, 5)
        x = F.normalize(gaussian(200, 256), dim=1).bfloat16().to(device).requires_grad_()
        y = layer(x)
        y.backward(gaussian(200, 384, seed=1).bfloat16().to(device))
        results.append([t.detach().cpu().float() for t in (y, x.grad, layer.weight.grad)])
    for got, want in zip(*results, strict=True):
        assert float((got - want).norm() / want.norm()) < 2**-8
    assert float((results[0][0] - results[1][0].roll(1, 0)).norm() / results[0][0].norm()) > 0.5


@needs_gpu
def test_matmul_on_a_gpu(M=300, N=200, K=1024):
    """Whatever way hardware() chose: 1e-5 in fp32, in FP4 units what those may cut off, and one rounding more
    in bf16."""
    tolerance = K * nvfp4.ACCUMULATION_ERROR if nvfp4.hardware(DEVICE).matmul else 1e-5
    x = [gaussian(n, K, seed=n) for n in (M, N)]
    for t in x:
        t[0].abs_()                                 # a product of which nothing cancels
    a, b = (quantize(t.to(DEVICE)) for t in x)
    left, right = (q.decode().double() * q.s_dec.double() for q in (a, b))
    exact, bound = left @ right.T, tolerance * (left.abs() @ right.abs().T)
    assert bool(((matmul(a, b) - exact).abs() <= bound).all())
    assert bool(((matmul(a, b, BF16) - exact).abs() <= bound + 2**-8 * exact.abs()).all())
    assert not bool(((matmul(a, b) * 0.98 - exact).abs() <= bound).all())


@needs_gpu
@pytest.mark.parametrize("recipe", ("nvfp4", "ngpt"))
def test_a_layer_does_not_wait_for_the_gpu(recipe):
    """torch raises where the host would have to. A tensor scale that the recipe fixes is known on the CPU; a
    measured one stays on the GPU, and is multiplied there."""
    decoded = quantize_both(gaussian(64, 64).to(DEVICE), choices(amax=1.0, decode=BF16), choices(decode=BF16))
    assert decoded.rows.s_dec.device.type == "cpu" and decoded.columns.s_dec.is_cuda
    model, x = small_model(recipe)
    gradients(model, x, model)                      # constants are made, and the chip is looked at
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model[0].weight.mul_(0.5)               # is quantized anew
        with torch.autocast("cuda", BF16):
            gradients(model, x, model)
        gradients(model, x, model)
        with pytest.raises(RuntimeError, match="synchronizing"):                # control
            float(decoded.columns.s_dec)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu
def test_rounding_instructions_agree_with_the_definition():
    """Where the chip has them: cvt.rn, and cvt.rs with the definition's random bytes."""
    found, generation = nvfp4.hardware(DEVICE), torch.cuda.get_device_capability()[0]
    assert found[:2] == (generation in (10, 12), generation == 10)
    assert bool(found.matmul) == (generation in (10, 12))
    for has, stochastic in zip(found[:2], (False, True), strict=True):
        if has:
            rows, columns = (choices(stochastic=stochastic, seed=KEY, signs=signs) for signs in (None, FIXED))
            for kind in KINDS:
                x = sample(kind, (128, 112), BF16)
                want = quantize_both(x, rows, columns)
                assert all(map(agree, kernels(x, rows, columns, (True, True)), want)), kind
