"""Proofs for the Triton kernels of nvfp4.py: on a GPU where there is one, else under Triton's interpreter;
and compiled for five chips without one. They must be what quantize() and quantize_both() say in the lesson,
which test_nvfp4.py holds to the oracle.
"""
import functools
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import nvfp4  # noqa: E402
from nvfp4 import (GEMMS, OPERANDS, RECIPES, SIGNS, Both, Decoded, FP4Config, FP4Linear, choices,  # noqa: E402
                   convert, matmul, quantize, quantize_both, quantize_both_triton, tensors_of)
from test_nvfp4 import (BLOCK, CONFIGS, KINDS, SEED, batch, broken, eager, gaussian, make_layer,  # noqa: E402, F401
                        run, same, sample)

triton = pytest.importorskip("triton", reason="no Triton on this system")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEY = torch.tensor(nvfp4.stream_key(SEED, 1, 2, 3, 4))
FIXED = torch.tensor(SIGNS, dtype=FP32)
SOFTWARE = (False, False)                           # rounding by PTX instructions is for Blackwell


def move(how, device):
    return how and how | {name: how[name].to(device) for name in ("seed", "signs")
                          if torch.is_tensor(how[name])}


def home(q):
    """An operand on the CPU."""
    return q.cpu() if torch.is_tensor(q) else q._replace(**{
        name: value.cpu() for name, value in q._asdict().items() if torch.is_tensor(value)})


def kernels(x, rows, columns, ptx=SOFTWARE):
    """quantize_both() by the kernels."""
    both = quantize_both_triton(x.to(DEVICE), move(rows, DEVICE), move(columns, DEVICE), ptx)
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


CASES = list(product((*KINDS, "nan", "inf"), (BF16, FP16, FP32)))
OPTIONS = [choices("nvfp4", square, stochastic, KEY, amax, unbiased, signs, decode)
           for stochastic, signs, amax, square, unbiased, decode in product(
               (False, True), (None, FIXED), (None, 1.0), (False, True), (False, True), (None, BF16, FP32))]


SHAPES = (1, 16), (37, 48), (80, 112), (65, 16), (16, 80), (128, 64)


def chosen(case, n):
    """(shape, rows, columns), n of each shape: from a place of its own on, a case takes every twentieth of
    OPTIONS, for columns others than for rows; square blocks only where they fit."""
    for i, (shape, _) in enumerate(product(SHAPES, range(n))):
        how = [OPTIONS[(case + 20 * i + 41 * side) % len(OPTIONS)] for side in (0, 1)]
        yield shape, *(h | {"square": h["square"] and size % BLOCK == 0}
                       for h, size in zip(how, shape, strict=True))


@pytest.mark.parametrize("n", (1, pytest.param(6, marks=pytest.mark.long)), ids=("6 choices", "36 choices"))
@pytest.mark.parametrize("kind, dtype", CASES, ids=str)
def test_quantize_kernel_is_the_definition(kind, dtype, n):
    """Codes, scales, s_dec and values, of rows and columns at once. The shapes: one row; K = 16; tiles not
    filled; square blocks where they fit."""
    for shape, rows, columns in chosen(CASES.index((kind, dtype)), n):
        x = sample(kind if kind in KINDS else "gaussian", shape, dtype)
        if kind not in KINDS:
            x[-1, ::7] = float(kind)
        want = quantize_both.definition(x, rows, columns)
        assert all(map(agree, kernels(x, rows, columns), want)), (shape, rows, columns)


def test_every_combination_of_options_occurs():
    """In the README's command all 96 along columns and 94 along rows, where square blocks fit half the
    heights; in the long run all along both. Each kind of trouble meets 18, in the long run 70."""
    for side, n, occur, each in (1, 1, 94, 18), (2, 1, 96, 18), (1, 6, 96, 70), (2, 6, 96, 70):
        met = {kind: set() for kind, _ in CASES}
        for i, (kind, _) in enumerate(CASES):
            met[kind] |= {tuple(torch.is_tensor(v) or v for v in choice[side].values())
                          for choice in chosen(i, n)}
        assert len(set().union(*met.values())) == occur and min(map(len, met.values())) >= each, (side, n)


@pytest.mark.parametrize("change", (
    {"seed": KEY + 1}, {"stochastic": False}, {"signs": -FIXED.flip(0)}, {"signs": None}, {"amax": 2.0},
    {"square": False}, {"unbiased": False}), ids=lambda c: next(iter(c)))
@pytest.mark.parametrize("side", ("rows", "columns"))
def test_each_option_reaches_the_kernel(change, side):
    """Negative control: with one option changed the kernel no longer agrees with the definition."""
    x = sample("ties", (32, 48), BF16)
    how = choices(square=True, stochastic=True, seed=KEY, unbiased=True, signs=FIXED)
    want = quantize.definition(x if side == "rows" else x.t(), **how)
    for changed in (how, how | change):
        got = getattr(kernels(x, **({"rows": None, "columns": None} | {side: changed})), side)
        assert agree(got, want) is (changed is how)


def test_rows_and_columns_need_not_be_asked_for_together():
    x = sample("gaussian", (70, 96), BF16)
    rows = choices(stochastic=True, seed=KEY, decode=BF16)
    columns = choices(stochastic=True, seed=KEY, signs=FIXED)
    (left, plain_t), (plain, right) = kernels(x, rows, None), kernels(x, None, columns)
    assert torch.equal(plain, x) and torch.equal(plain_t, x.t())                # not asked for: as it is
    for got, alone in zip(kernels(x, rows, columns), (left, right), strict=True):
        assert agree(got, alone)
    assert not agree(left, kernels(x, columns, None).rows)


# ---------------------------------------------------------------- the GEMM

SMALL = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}


def by_registers(a, b, dtype=FP32, block=None if GPU else SMALL):
    a, b = ([t.to(DEVICE) for t in (q.codes, q.scales, q.s_dec)] for q in (a, b))
    through = None if GPU else triton.language.float32
    return nvfp4.matmul_registers(*a, *b, dtype, block, through).cpu()


@pytest.mark.skipif(not GPU and triton.__version__ < "3.7" and np.__version__ >= "2.4",
                    reason="the interpreter of this Triton cannot loop with this numpy")
@pytest.mark.parametrize("M, N, K, squares", (
    (32, 64, 256, (False, False)), (37, 70, 80, (False, False)), (1, 1, 16, (False, False)),
    (48, 16, 112, (True, False)), (16, 96, 4096, (False, True))))
def test_matmul_in_registers_is_exact_products(M, N, K, squares):
    """Within 1e-5 of sum |a||b| of float64, and nothing beyond the edge is written."""
    a, b = (quantize(gaussian(n, K, seed=n), square=square)
            for n, square in zip((M, N), squares, strict=True))
    left, right = (q.decode().double() * q.s_dec.double() for q in (a, b))
    exact, bound = left @ right.T, 1e-5 * (left.abs() @ right.abs().T)

    def close(y):
        return y.shape == exact.shape and bool(((y - exact).abs() <= bound).all())
    y = by_registers(a, b)
    assert close(y) and not close(0.98 * y)
    if GPU:                                         # which has tiles of its own
        assert close(by_registers(a, b, block=SMALL))
    if 16 < K < 4096:                               # the longest takes the interpreter too long
        assert not any(close(by_registers(q, b)) for q in broken(a))
        assert not any(close(by_registers(a, q)) for q in broken(b))
    a.scales.view(torch.uint8)[-1, -1] = 0x7F       # NaN stays NaN, in the rows that it belongs to
    assert torch.equal(by_registers(a, b).isnan().all(1), torch.arange(M) >= M - (16 if squares[0] else 1))


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


@functools.cache
def once():
    """What the software kernels found for the probes of hardware(), which are the same each time."""
    return {}


@pytest.mark.skipif(GPU, reason="on a GPU hardware() itself is looked at")
@pytest.mark.parametrize("wrong", (None, "nearest", "stochastic", "matmul"))
def test_hardware_uses_what_agrees_with_the_definition(wrong, monkeypatch, capsys):
    """The probes of a Blackwell that is not there: the software kernels play its instructions, one of them
    broken. That one, and no other, is left out, and named."""
    def instructions(x, rows, columns, ptx):
        assert ptx == (True, True)
        place = rows["stochastic"], rows["amax"]
        if place not in once():
            once()[place] = quantize_both_triton(x, rows, columns, SOFTWARE).rows
        codes = once()[place].codes.clone()
        if wrong == ("stochastic" if rows["stochastic"] else "nearest"):
            codes[0, 3] ^= 1
        return Both(once()[place]._replace(codes=codes), columns)

    def product(*args):                             # rounded here: the interpreter truncates to bf16
        place = args[3].shape
        if place not in once():
            once()[place] = nvfp4.matmul_registers(*args[:-1], FP32, SMALL, triton.language.float32)
        y = once()[place].to(args[-1])
        return 0.98 * y if wrong == "matmul" else y
    for name, value in (("get_device_capability", (10, 0)), ("get_device_name", "a Blackwell")):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(nvfp4, "quantize_both_triton", instructions)
    monkeypatch.setattr(nvfp4, "WAYS", {"scaled_mm": product, "dot_scaled": product})
    way = "registers" if wrong == "matmul" else "scaled_mm"
    assert nvfp4.hardware.__wrapped__(DEVICE) == (wrong != "nearest", wrong != "stochastic", way)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == {None: 0, "matmul": 2}.get(wrong, 1) and all("is not used" in line for line in said)


# ---------------------------------------------------------------- compiled for chips that are not here

@functools.cache
def compiled_for_all_chips():
    finished = subprocess.run([sys.executable, REPO / "tests/aot.py"], capture_output=True, text=True,
                              timeout=900, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout)


SHARED_MEMORY = {"80": 99 << 10, "90": 227 << 10, "100": 227 << 10, "103": 227 << 10, "120": 99 << 10}
# bytes that a block may use; "80" stands for sm_86 and sm_89 too, which have less of it
TENSOR_CORES = {"80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "90": "wgmma.mma_async",
                "100": "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X",
                "120": "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"}
TENSOR_CORES["103"] = TENSOR_CORES["100"]


@pytest.mark.parametrize("chip", SHARED_MEMORY)
def test_kernels_compile_to_the_chip_s_instructions(chip):
    """Every kernel in the configurations of training: the chip's tensor cores and conversions, no register
    spilled, shared memory within its limit. sm_120 must not be given cvt.rs, which it does not have."""
    table = {name: chips[chip] for name, chips in compiled_for_all_chips().items() if chip in chips}
    assert not any(name.startswith("starved") for name in table) or table.pop(
        "starved codes, stochastic")["stack"] > 0   # control: spilled registers are seen
    table.pop("ordered maximum", None)
    assert len(table) == (16 if int(chip) >= 100 else 14)
    for name, facts in table.items():
        said = " ".join(facts["instructions"])
        assert facts["stack"] == facts["local"] == 0 < facts["reg"], name
        assert facts["shared"] <= SHARED_MEMORY[chip] and (facts["shared"] > 0 or name in ROWS), name
        if name.startswith("matmul"):
            assert (TENSOR_CORES[chip] in said) == (int(chip) < 100 or "native" in name), name
        stochastic = any(word in name for word in ("dy", "stochastic")) and "software" not in name
        nearest = name.startswith("quantize") and not stochastic and "software" not in name
        assert ("cvt.rs.satfinite.e2m1x4" in said) == (stochastic and chip in ("100", "103")), name
        assert ("cvt.rn.satfinite.e2m1x2" in said) == (nearest and int(chip) >= 100), name


ROWS = "quantize codes, nearest", "quantize codes, stochastic", "quantize x, evaluation"    # only along rows
SQUARE = "quantize w"                               # the maximum of a square block is looked for by two warps


@pytest.mark.parametrize("chip", SHARED_MEMORY)
def test_threads_wait_for_each_other_as_little_as_they_can(chip):
    """Rows pass through no shared memory. The codes and scales of columns do, to be turned around: three
    barriers. A maximum takes two a tensor and one between, and is sent off without a fence."""
    compiled = compiled_for_all_chips()
    table = {name: chips[chip] for name, chips in compiled.items() if chip in chips}
    for name, facts in table.items():
        if name.startswith("amax"):
            assert facts["fences"] == 0 and facts["barriers"] == (2 if name.endswith("plain") else 5), name
        elif name in ROWS:
            assert facts["barriers"] == facts["shared_accesses"] == facts["shared"] == 0, name
        elif name.startswith("quantize") and name != SQUARE:                    # not 0: they are seen
            assert 1 <= facts["barriers"] <= 3 and 0 < facts["shared_accesses"] <= 8, name
    assert table[SQUARE]["barriers"] <= (6 if int(chip) >= 100 else 2)          # there along both axes
    assert compiled["ordered maximum"]["90"]["fences"] > 0                      # control: fences are seen


@pytest.mark.parametrize("chip", ("90", "100"))
def test_rows_are_bound_by_memory(chip):
    """By the floors of aot.py, an estimate; rounded to nearest, the tensor's maximum given. Control: random
    rounding by software along rows and rotated columns is bound by arithmetic."""
    table = compiled_for_all_chips()
    for name in ("quantize codes, nearest", "quantize x, evaluation", "amax bf16, plain"):
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


# ---------------------------------------------------------------- torch sees through the operators

def test_operators_are_what_they_tell_torch(monkeypatch):
    """torch.library.opcheck in all forms that layers use: dtypes, shapes and strides without data. (Its
    schema test compares outputs and cannot, with float8 among them.) The results are those without them."""
    called = []

    def checked(operator):
        def run(*arguments):
            called.append(operator)
            with monkeypatch.context() as inside:
                inside.setattr(torch.compiler, "is_compiling", lambda: False)
                torch.library.opcheck(operator, arguments, test_utils=("test_faketensor",))
                return operator(*arguments)
        return run

    def results():
        for M, decode, options in product((48, 37), (None, BF16, FP32), (
                {}, {"stochastic": True, "seed": KEY, "unbiased": True}, {"amax": 1.0}, {"signs": FIXED},
                {"square": True})):
            how = move(choices(decode=decode, **options), DEVICE)
            row_how = how | {"square": how["square"] and M % BLOCK == 0}
            for rows, columns in ((row_how, None), (None, how), (row_how, how | {"decode": None})):
                for q in quantize_both(gaussian(M, 64).to(DEVICE), rows, columns):
                    yield from tensors_of(q)
        packed, square, decoded = (quantize(gaussian(48, 64).to(DEVICE), **how)
                                   for how in ({}, {"square": True}, {"decode": BF16, "amax": 1.0}))
        for a, b, dtype in product((packed, decoded), (packed, square, decoded), (BF16, FP32)):
            yield matmul(a, b, dtype)
        for cfg in CONFIGS.values():
            yield from run(make_layer(cfg).to(DEVICE), *(t.to(DEVICE) for t in batch(37)))
    want, operators = list(results()), (nvfp4._quantize_op, nvfp4._matmul_op)
    assert not called
    for operator, name in zip(operators, ("_quantize_op", "_matmul_op"), strict=True):
        monkeypatch.setattr(nvfp4, name, checked(operator))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(map(same, results(), want)) and set(called) == set(operators)


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


RANDOM = FP4Config(stochastic=OPERANDS, hadamard=GEMMS, signs="fresh")


@pytest.mark.parametrize("recipe", ("nvfp4", "ngpt", RANDOM), ids=("nvfp4", "ngpt", "all random"))
def test_activation_checkpointing_changes_no_bit(recipe):
    """The forward, computed again in the backward, draws the same random bits and quantizes the same."""
    want = gradients(*(pair := small_model(recipe)), pair[0])
    model, x = small_model(recipe)
    got = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    assert all(same(g, w) for g, w in zip(got, want, strict=True))
    model, x = small_model(recipe)
    nvfp4.set_step(model, SEED, 4)
    assert not all(same(g, w) for g, w in zip(gradients(model, x, model), want, strict=True))


@pytest.mark.parametrize("recipe", (
    "nvfp4", "ngpt", FP4Config(gemms=("fprop",)), FP4Config(gemms=("wgrad",)),
    FP4Config(hadamard=GEMMS, signs="fresh")), ids=("nvfp4", "ngpt", "fprop", "wgrad", "fresh signs"))
def test_compiled_model_is_one_graph_and_sees_new_weights(recipe):
    """convert()'s hook, before the model, looks at the weights outside of the graph; the rest is one graph.
    The backend aot_eager fuses nothing, so all bits are those of the eager model."""
    want_model, x = small_model(recipe)
    model, _ = small_model(recipe)
    compiled = torch.compile(model, backend="aot_eager")

    def equal(call):
        x.grad = None
        want = [t.clone() for t in gradients(want_model, x, want_model)]
        x.grad = None
        return all(same(g, w) for g, w in zip(gradients(model, x, call), want, strict=True))
    for step in range(3):
        assert equal(compiled), step
        for m in (model, want_model):               # an optimizer that leaves the version counter as it was
            torch.optim.AdamW(m.parameters(), lr=0.1, fused=True).step()
            m.zero_grad()
    blindly = torch.compile(blind(model), backend="aot_eager", fullgraph=True)
    stale = "fprop" in model[0].cfg.gemms           # control: an output of old weights, where they are in FP4
    assert same(blindly(x), want_model(x)) is not stale
    nvfp4.refresh_weights(model)
    assert equal(blindly)


def test_compiled_layer_alone_looks_for_itself():
    """Without convert() there is no hook; the graph breaks rather than multiply by an old weight."""
    layer, x = FP4Linear(torch.nn.Linear(64, 96), RECIPES["ngpt"]).to(DEVICE), gaussian(32, 64).to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    nvfp4.set_step(layer, SEED, 0)
    for _ in range(2):
        assert same(compiled(x).detach(), layer(x).detach())
        with torch.no_grad():
            layer.weight.mul_(-1)


def test_compiled_part_called_by_itself_finds_the_weights_of_set_step():
    """The hook of convert() stands before the whole model only."""
    (model, x), (want, _) = small_model("ngpt"), small_model("ngpt")
    torch._dynamo.reset()
    part = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    for step in range(2):
        for m in (model, want):
            nvfp4.set_step(m, SEED, step)
        assert same(part(x).detach(), want[0](x).detach())
        with torch.no_grad():
            for m in (model, want):
                m[0].weight.mul_(-1)
    assert not same(part(x).detach(), want[0](x).detach())                      # control: before set_step


def blind(model):
    """The model without the hook."""
    torch._dynamo.reset()
    model._forward_pre_hooks.clear()
    return model


# ---------------------------------------------------------------- on a GPU

@needs_gpu
@pytest.mark.parametrize("name", ("ngpt", "nvfp4"))
def test_layer_on_a_gpu_is_the_layer_on_a_cpu(name):
    """The operands are the same bits; y, dx and dw differ by the order of summation and bf16's rounding."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = FP4Linear(torch.nn.Linear(256, 384, bias=False), RECIPES[name], 3).to(device)
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
    """Whatever way hardware() chose: 1e-5 in fp32, and one rounding more in bf16."""
    a, b = (quantize(gaussian(n, K, seed=n).to(DEVICE)) for n in (M, N))
    left, right = (q.decode().double() * q.s_dec.double() for q in (a, b))
    exact, bound = left @ right.T, 1e-5 * (left.abs() @ right.abs().T)
    assert bool(((matmul(a, b) - exact).abs() <= bound).all())
    assert bool(((matmul(a, b, BF16) - exact).abs() <= bound + 2**-8 * exact.abs()).all())
    assert not bool(((matmul(a, b) * 0.98 - exact).abs() <= bound).all())


@needs_gpu
@pytest.mark.parametrize("recipe", ("nvfp4", "ngpt"))
def test_cuda_graph_of_a_training_step(recipe):
    """A captured step, replayed with new keys and new weights, computes what the eager step computes."""
    def make():
        torch.manual_seed(0)
        layer = FP4Linear(torch.nn.Linear(128, 128, bias=False), RECIPES[recipe], 0).to(DEVICE)
        return layer, torch.optim.SGD(layer.parameters(), lr=0.1)
    x, dy = gaussian(64, 128).to(DEVICE), gaussian(64, 128, seed=1).to(DEVICE)

    def step(layer, optimizer):
        layer(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    (want, want_optimizer), (layer, optimizer) = make(), make()
    nvfp4.set_step(layer, SEED, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, optimizer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layer, optimizer)
    with torch.no_grad():
        layer.weight.copy_(want.weight)
    for n in range(4):
        nvfp4.set_step(layer, SEED, n)
        nvfp4.set_step(want, SEED, n)
        graph.replay()
        step(want, want_optimizer)
        assert same(layer.weight.detach(), want.weight.detach()), n
    nvfp4.set_step(layer, SEED, 4)                  # an eager forward after replays: the weight is new to it
    nvfp4.set_step(want, SEED, 4)
    assert same(layer(x).detach(), want(x).detach())


@needs_gpu
def test_rounding_instructions_agree_with_the_definition():
    """Where the chip has them: cvt.rn, and cvt.rs with the definition's random bytes."""
    found, generation = nvfp4.hardware(DEVICE), torch.cuda.get_device_capability()[0]
    assert found[:2] == (generation in (10, 12), generation == 10)
    assert (found.matmul == "registers") == (generation not in (10, 12))
    for has, stochastic in zip(found[:2], (False, True), strict=True):
        if has:
            rows, columns = (choices(stochastic=stochastic, seed=KEY, signs=signs) for signs in (None, FIXED))
            for kind in KINDS:
                x = sample(kind, (128, 112), BF16)
                want = quantize_both.definition(x, rows, columns)
                assert all(map(agree, kernels(x, rows, columns, (True, True)), want)), kind
