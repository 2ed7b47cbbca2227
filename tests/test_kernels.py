"""Proofs for the Triton kernels of nvfp4.py: on a GPU where there is one, else under Triton's interpreter;
and compiled for five chips without one. They must be what _cast_torch is, which test_nvfp4.py holds to the
oracle.
"""
import functools
import json
import os
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import nvfp4  # noqa: E402
from nvfp4 import (BLOCK, RECIPES, SIGNS, Cast, Decoded, FP4Config, FP4Linear, NVFP4Tensor, convert,  # noqa: E402
                   matmul, quantize)
from test_nvfp4 import KINDS, SEED, broken, eager, gaussian, same, sample  # noqa: E402, F401

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
    return how and how._replace(**{name: t.to(device) for name in ("key", "signs")
                                   if (t := getattr(how, name)) is not None})


def home(q):
    """An operand on the CPU."""
    if not isinstance(q, NVFP4Tensor):
        return q and Decoded(*(t.cpu() for t in q))
    return NVFP4Tensor(q.codes.cpu(), q.scales.cpu(), q.amax.cpu(), q.s_dec.cpu())


def kernels(x, row, col, ptx=SOFTWARE):
    """cast() by the kernels."""
    return [home(q) for q in nvfp4._cast_triton(x.to(DEVICE), move(row, DEVICE), move(col, DEVICE), ptx)]


def agree(got, want):
    """Bit for bit; in blocks whose scale is NaN the codes mean nothing."""
    if type(got) is not type(want) or not same(got.s_dec, want.s_dec):
        return False
    if isinstance(want, Decoded):
        return same(got.decoded, want.decoded)
    if not same(got.scales.contiguous(), want.scales.contiguous()):
        return False
    n = want.shape[0] // want.scales.shape[0]
    number = ~want.scales.float().isnan().repeat_interleave(n, 0).repeat_interleave(BLOCK // 2, 1)
    return torch.equal(got.codes[number], want.codes[number])


CASES = list(product((*KINDS, "nan", "inf"), (BF16, FP16, FP32)))
OPTIONS = list(product((None, KEY), (None, FIXED), (None, 1.0), (1, 16), (False, True), (None, BF16, FP32)))


SHAPES = (1, 16), (37, 48), (80, 112), (65, 16), (16, 80), (128, 64)


def chosen(case):
    """(shape, row, col) of a case: the next 36 of OPTIONS or so; 16x16 blocks only where they fit."""
    options = cycle(OPTIONS)
    for _ in range(37 * case % len(OPTIONS)):
        next(options)
    for shape, _ in product(SHAPES, range(3)):
        yield shape, *(how._replace(rows=how.rows if size % how.rows == 0 else 1)
                       for how, size in zip((Cast(*next(options)), Cast(*next(options))), shape, strict=True))


@pytest.mark.parametrize("kind, dtype", CASES, ids=str)
def test_quantize_kernel_is_the_definition(kind, dtype):
    """Codes, scales, s_dec and values, of rows and columns at once. The shapes: one row; K = 16; tiles not
    filled; 16x16 blocks where they fit."""
    for shape, row, col in chosen(CASES.index((kind, dtype))):
        x = sample(kind if kind in KINDS else "gaussian", shape, dtype)
        if kind not in KINDS:
            x[-1, ::7] = float(kind)
        for got, how, axis in zip(kernels(x, row, col), (row, col), (1, 0), strict=True):
            assert agree(got, nvfp4._cast_torch(x, how, axis)), (shape, axis, how)


def test_every_combination_of_options_occurs():
    """All 96 along rows and along columns, and a third of them with every kind of trouble."""
    for side in (1, 2):
        met = {kind: set() for kind, _ in CASES}
        for i, (kind, _) in enumerate(CASES):
            met[kind] |= {tuple(torch.is_tensor(v) or v for v in choice[side]) for choice in chosen(i)}
        assert len(set().union(*met.values())) == 96 and min(map(len, met.values())) >= 32, side


@pytest.mark.parametrize("change", (
    {"key": KEY + 1}, {"key": None}, {"signs": -FIXED.flip(0)}, {"signs": None}, {"amax": 2.0}, {"rows": 1},
    {"unbiased": False}), ids=lambda c: next(iter(c)))
@pytest.mark.parametrize("axis", (0, 1))
def test_each_option_reaches_the_kernel(change, axis):
    """Negative control: with one option changed the kernel no longer agrees with the definition."""
    x, how = sample("ties", (32, 48), BF16), Cast(KEY, FIXED, None, 16, True)
    want = nvfp4._cast_torch(x, how, axis)
    for changed in (how, how._replace(**change)):
        got = kernels(x, *((None, changed) if axis == 0 else (changed, None)))[1 - axis]
        assert agree(got, want) is (changed is how)


def test_rows_and_columns_need_not_be_asked_for_together():
    x = sample("gaussian", (70, 96), BF16)
    row, col = Cast(KEY, dtype=BF16), Cast(KEY, FIXED)
    (left, none), (nothing, right) = kernels(x, row, None), kernels(x, None, col)
    assert none is nothing is None
    for got, alone in zip(kernels(x, row, col), (left, right), strict=True):
        assert agree(got, alone)
    assert not agree(left, kernels(x, col, None)[0])


# ---------------------------------------------------------------- the GEMM

SMALL = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}


def by_registers(a, b, dtype=FP32, block=None if GPU else SMALL):
    a, b = ([t.to(DEVICE) for t in (q.codes, q.scales, q.s_dec)] for q in (a, b))
    through = None if GPU else triton.language.float32
    return nvfp4.matmul_registers(*a, *b, dtype, block, through).cpu()


@pytest.mark.skipif(not GPU and triton.__version__ < "3.7" and np.__version__ >= "2.4",
                    reason="the interpreter of this Triton cannot loop with this numpy")
@pytest.mark.parametrize("M, N, K, rows", ((32, 64, 256, (1, 1)), (37, 70, 80, (1, 1)), (1, 1, 16, (1, 1)),
                                           (48, 16, 112, (16, 1)), (16, 96, 4096, (1, 16))))
def test_matmul_in_registers_is_exact_products(M, N, K, rows):
    """Within 1e-5 of sum |a||b| of float64, and nothing beyond the edge is written."""
    a, b = (quantize(gaussian(n, K, seed=n), (r, BLOCK)) for n, r in zip((M, N), rows, strict=True))
    left, right = (q.values().double() * q.s_dec.double() for q in (a, b))
    exact, bound = left @ right.T, 1e-5 * (left.abs() @ right.abs().T)

    def close(y):
        return y.shape == exact.shape and bool(((y - exact).abs() <= bound).all())
    y = by_registers(a, b)
    assert close(y) and not close(0.98 * y) and close(by_registers(a, b, block=SMALL))
    if K > 16:
        assert not any(close(by_registers(q, b)) for q in broken(a))
        assert not any(close(by_registers(a, q)) for q in broken(b))
    a.scales.view(torch.uint8)[-1, -1] = 0x7F       # NaN stays NaN, in the rows that it belongs to
    assert torch.equal(by_registers(a, b).isnan().all(1), torch.arange(M) >= M - rows[0])


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


@pytest.mark.skipif(GPU, reason="on a GPU hardware() itself is looked at")
@pytest.mark.parametrize("wrong", (None, "nearest", "stochastic", "matmul"))
def test_hardware_uses_what_agrees_with_the_definition(wrong, monkeypatch, capsys):
    """The probes of a Blackwell that is not there: the software kernels play its instructions, one of them
    broken. That one, and no other, is left out, and named."""
    original = nvfp4._cast_triton

    def instructions(x, row, col, ptx):
        q, _ = original(x, row, col, SOFTWARE)
        if wrong == ("nearest" if row.key is None else "stochastic"):
            q.codes[0, 3] ^= 1
        return q, None

    def product(*args):                             # rounded here: the interpreter truncates to bf16
        y = nvfp4.matmul_registers(*args[:-1], FP32, SMALL, triton.language.float32).to(args[-1])
        return 0.98 * y if wrong == "matmul" else y
    for name, value in (("get_device_capability", (10, 0)), ("get_device_name", "a Blackwell")):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(nvfp4, "_cast_triton", instructions)
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
    assert len(table) == (16 if int(chip) >= 100 else 14)
    for name, facts in table.items():
        said = " ".join(facts["instructions"])
        assert facts["stack"] == facts["local"] == 0 < facts["reg"], name
        assert 0 < facts["shared"] <= SHARED_MEMORY[chip], name
        if name.startswith("matmul"):
            assert (TENSOR_CORES[chip] in said) == (int(chip) < 100 or "native" in name), name
        stochastic = any(word in name for word in ("dy", "stochastic")) and "software" not in name
        nearest = name.startswith("quantize") and not stochastic and "software" not in name
        assert ("cvt.rs.satfinite.e2m1x4" in said) == (stochastic and chip in ("100", "103")), name
        assert ("cvt.rn.satfinite.e2m1x2" in said) == (nearest and int(chip) >= 100), name


# ---------------------------------------------------------------- torch sees through the operators

def test_operators_are_what_they_tell_torch():
    """torch.library.opcheck: dtypes, shapes and strides without data; gradients registered. (Its schema test
    compares outputs and cannot, with float8 among them.)"""
    def check(operator, *arguments, tests=("test_faketensor",)):
        torch.library.opcheck(operator, arguments, test_utils=tests)
    for M, recipe, bias in ((32, "nvfp4", False), (37, "ngpt", True)):
        layer = FP4Linear(torch.nn.Linear(64, 96, bias=bias), RECIPES[recipe]).to(DEVICE)
        layer.refresh()
        x, weights = gaussian(M, 64).to(DEVICE), (layer.w_row, layer.w_col, layer.keys, layer.recipe)
        for saves in (True, False):
            check(nvfp4._linear, x.clone().requires_grad_(), layer.weight, *weights, saves,
                  tests=("test_faketensor", "test_autograd_registration"))
        w, dy = layer.weight.detach(), gaussian(M, 96).to(DEVICE)
        saved = list(nvfp4._linear(x, w, *weights, True)[1:])
        for needs in product((True, False), repeat=2):
            check(nvfp4._linear_backward, dy, saved, w, *weights[1:], *needs)
    check(nvfp4._quantize_op, x[:32], KEY.to(DEVICE), None, 16, True)
    q = quantize(x)
    check(nvfp4._matmul_op, *[q.codes, q.scales, q.s_dec] * 2, BF16)


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


RANDOM = FP4Config(stochastic=nvfp4.OPERANDS, hadamard=nvfp4.GEMMS, signs="fresh")


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


@pytest.mark.parametrize("recipe", ("nvfp4", "ngpt"))
def test_compiled_model_is_one_graph_and_sees_new_weights(recipe):
    """convert()'s hook, before the model, looks at the weights outside of the graph; the rest is one graph.
    The backend aot_eager fuses nothing, so all bits are those of the eager model."""
    want_model, x = small_model(recipe)
    model, _ = small_model(recipe)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        x.grad = None
        want = [t.clone() for t in gradients(want_model, x, want_model)]
        x.grad = None
        assert all(same(g, w) for g, w in zip(gradients(model, x, compiled), want, strict=True)), step
        for m in (model, want_model):               # an optimizer that leaves the version counter as it was
            torch.optim.AdamW(m.parameters(), lr=0.1, fused=True).step()
            m.zero_grad()
    want = want_model(x)
    blindly = torch.compile(blind(model), backend="aot_eager", fullgraph=True)
    assert not same(blindly(x), want)               # control: the weights are stale
    nvfp4._refresh_weights(model, None)
    assert same(blindly(x), want)


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


@pytest.mark.parametrize("recipe", ("nvfp4", "ngpt"))
def test_what_the_layer_keeps_for_its_backward(recipe):
    """4.5 bits a value of its input, and the scalar s_dec: more than 3.5 times less than bf16."""
    kept = nvfp4._kept_bytes(recipe, BF16, DEVICE)
    assert kept == (4 + 8 / BLOCK) / 8 + (4 + 96) / (1024 * 512)                # its s_dec, six keys
    assert nvfp4._kept_bytes(None, BF16, DEVICE) == 2 > 3.5 * kept


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
    left, right = (q.values().double() * q.s_dec.double() for q in (a, b))
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
    for has, key in zip(found[:2], (None, KEY), strict=True):
        if has:
            for kind in KINDS:
                x = sample(kind, (128, 112), BF16)
                row, col = kernels(x, Cast(key), Cast(key, FIXED), (True, True))
                assert agree(row, nvfp4._cast_torch(x, Cast(key), 1)), kind
                assert agree(col, nvfp4._cast_torch(x, Cast(key, FIXED), 0)), kind
