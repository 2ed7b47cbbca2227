"""What it costs: the time of quantizing, of GEMMs, of a linear layer and of a training step on this machine,
and the memory that a layer keeps for its backward.

    python tests/bench.py              all of it, a row each: minutes on two CPU cores
    python tests/bench.py layer        one transformer layer in BF16 and in FP4, by width (2605.06067 fig. 6b)
    python tests/bench.py step ngpt_124m --recipe=ngpt    a training step of a config: time, MFU, peak memory,
                                       and the longest kernels (on a CPU: operators)
    python tests/bench.py -h           this page

All rows are measured side by side in one process, set up as train.py sets itself up, because a number alone
says little on a machine that is not alone. A row has its time (the median), its rate, and how far that is
from what the machine allows:

    GB/s           bytes that must be read and written, over the time; in percent of a copy's, the bound of
                   whatever does little arithmetic
    TFLOP/s        FLOPs of the GEMMs, over the time; in percent of a large bf16 matmul's, the bound of a
                   layer and of a training step; only FP4 units can exceed it
    MFU            the same in percent of the chip's peak, where train.py knows that
    1.23 x         the time as a multiple of another row's; for layer the reverse, time in BF16 / time in FP4
    bytes a value  what a linear layer keeps of its input for the backward, for each of its values

Where the machine has no FP4 units, FP4 is emulated, and what is measured is the speed of the emulation: it
says nothing about FP4 hardware. On a CPU without bf16 units fp32 takes the place of bf16, and a row that has
bf16 in its name elsewhere has fp32 there. The line about the machine tells which it is.
"""
import contextlib
import gc
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import nvfp4  # noqa: E402
import train  # noqa: E402
from data.run import command  # noqa: E402
from model import ModelConfig, build, flops_per_token  # noqa: E402
from nvfp4 import (FORMATS, RECIPES, SIGNS, FP4Linear, choices, convert, matmul, quantize,  # noqa: E402
                   quantize_both, set_step)

WARM_UP = 2                                         # calls before the timings: the first compiles
REPEAT = 15                                         # timings of a kernel, of which the median counts
REPEAT_STEPS = 7                                    # timings of a layer or a training step, likewise
REPETITIONS, ITERATIONS = 10, 10                    # layer: timings, and steps in each


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device: matrices larger than its caches, GEMMs that fill its units."""
    dtype: torch.dtype                              # of what is quantized, and of activations of a Linear
    matrix: int                                     # n: n x n values are copied and quantized
    product: int                                    # n: the matmuls are n x n x n
    linear: tuple[int, int]                         # tokens and channels, in and out, of a Linear
    config: str                                     # training steps of configs/{gpt,ngpt}_<config>.py ...
    hybrid: str                                     # ... of the Mamba-2 + MoE hybrid of that config ...
    flags: tuple[str, ...]                          # ... and with these flags
    widths: tuple[int, ...]                         # layer: channels; on a GPU the paper's
    length: int                                     # layer: tokens


SIZES = {
    "cpu": Sizes(torch.float32, matrix=4096, product=2048, linear=(2048, 2048),
                 config="tiny", hybrid="ngpt_hybrid_tiny", flags=(), widths=(128, 256, 512), length=256),
    "cuda": Sizes(torch.bfloat16, matrix=8192, product=8192, linear=(16384, 4096),
                  config="124m", hybrid="ngpt_hybrid_600m", flags=("--gradient_accumulation_steps=1",),
                  widths=(1536, 3072, 6144, 12288, 24576, 49152), length=8192),
}
KEPT = 1024, 512, 256                               # tokens, channels in and out of the Linear that keeps
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- clocks

def time_in_turn(functions, device, repeat):
    """Milliseconds of each function, a list of repeat timings each. Warmed up, then timed in turn, so that
    they share the machine's moods."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = [[] for _ in functions]
    for _ in range(WARM_UP + repeat):
        for function, ms in zip(functions, times, strict=True):
            finish()
            start = time.perf_counter()
            function()
            finish()
            ms.append(1e3 * (time.perf_counter() - start))
    return [ms[WARM_UP:] for ms in times]


def median_ms(functions, device, repeat):
    return [statistics.median(ms) for ms in time_in_turn(functions, device, repeat)]


def kernel_ms(functions, device):
    """The same of single kernels; on a GPU from a CUDA graph, so that Python's time does not count."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph
        return [do_bench_cudagraph(function, return_mode="median") for function in functions]
    return median_ms(functions, device, REPEAT)


# ---------------------------------------------------------------- rows

PER_MS = {"GB/s": 1e-6, "TFLOP/s": 1e-9}            # a byte or FLOP a millisecond, in the unit


def make_row(what, ms, amount, unit):
    """amount (bytes or FLOPs) in ms, as a dict."""
    return {"what": what, "ms": ms, "rate": amount / ms * PER_MS[unit], "unit": unit}


def compare(rows, percent_of=None, ratio_to=None):
    """Add to rows their rate in percent of one row's, and their time as a multiple of one row's."""
    for row in rows:
        if percent_of:
            row["percent"] = 100 * row["rate"] / percent_of["rate"]
            row["percent_of"] = percent_of["what"]
        if ratio_to:
            row["ratio"] = row["ms"] / ratio_to["ms"]
            row["ratio_to"] = ratio_to["what"]


def print_row(row):
    def short(what):
        return what.rpartition(": ")[2]
    ms = f"{row['ms']:9.3f} ms" if "ms" in row else ""
    percent = f"{row['percent']:4.0f} % of {short(row['percent_of'])}" if "percent" in row else ""
    ratio = f"{row['ratio']:5.2f} x {short(row['ratio_to'])}" if "ratio" in row else ""
    mfu = f"MFU {row['mfu']:.1f} %" if "mfu" in row else ""
    print(f"  {row['what']:69s} {ms:12s} {row['rate']:8.4g} {row['unit']:13s} {percent:25s} {ratio:20s} "
          f"{mfu}".rstrip(), flush=True)


# ---------------------------------------------------------------- what the memory allows

def memory_rows(device, sizes):
    """Copying and quantizing a matrix. The first row is the bound of all others."""
    n, read = sizes.matrix, sizes.dtype.itemsize    # bytes of a value that is read or copied
    packed = FORMATS["nvfp4"].bits / 8
    x = torch.randn(n, n, device=device, dtype=sizes.dtype)
    into = torch.empty_like(x)
    random = {"stochastic": True, "seed": nvfp4.as_key(1, device)}
    rotated = choices(**random, signs=torch.tensor(SIGNS, dtype=torch.float32, device=device))
    decoded = {"decode": torch.bfloat16}
    # bytes a value, read and written: a measured tensor scale takes a first reading
    cases = (
        ("copy into place", lambda: into.copy_(x), 2 * read),
        ("x.clone()", lambda: x.clone(), 2 * read),
        ("quantize, fixed amax", lambda: quantize(x, amax=1.0), read + packed),
        ("quantize", lambda: quantize(x), 2 * read + packed),
        ("quantize, stochastic", lambda: quantize(x, **random), 2 * read + packed),
        ("quantize columns, stochastic", lambda: quantize(x.t(), **random), 2 * read + packed),
        ("quantize rows and rotated columns, stochastic",
         lambda: quantize_both(x, choices(**random), rotated), 2 * read + 2 * packed),
        ("quantize, decoded", lambda: quantize(x, **decoded), 2 * read + 2),
        ("quantize, decoded, stochastic", lambda: quantize(x, **random, **decoded), 2 * read + 2),
    )
    times = kernel_ms([function for _, function, _ in cases], device)
    rows = [make_row(f"{n} x {n} {name_of(sizes.dtype)}: {name}", ms, n * n * width, "GB/s")
            for (name, _, width), ms in zip(cases, times, strict=True)]
    copy, clone, *quantizing = rows
    compare([clone, *quantizing], percent_of=copy)
    compare(quantizing, ratio_to=clone)
    return rows


# ---------------------------------------------------------------- what the arithmetic allows

def matmul_rows(device, sizes):
    """A matmul in bf16, the bound of all GEMMs, and of packed codes."""
    n, dtype = sizes.product, nvfp4.gemm_dtype(device, torch.bfloat16)          # fp32 without bf16 units
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    qa, qb = quantize(a), quantize(b)
    times = kernel_ms([lambda: a @ b.t(), lambda: matmul(qa, qb, torch.bfloat16)], device)
    rows = [make_row(f"matmul {n} x {n} x {n}: {name}", ms, 2 * n**3, "TFLOP/s")
            for name, ms in zip((SHORT[dtype], "packed codes"), times, strict=True)]
    compare(rows[1:], percent_of=rows[0], ratio_to=rows[0])
    return rows


def make_linear(recipe, K, N, device):
    torch.manual_seed(0)
    linear = torch.nn.Linear(K, N, bias=False, device=device)
    cfg = RECIPES[recipe]
    return cfg.layer(linear, cfg) if cfg.gemms else linear


def linear_step(layer, x, dy):
    """A function that runs forward and backward of a linear layer, after a weight update as in training."""
    set_step(layer, 0, 0)
    x = x.clone().requires_grad_()

    def step():
        with torch.no_grad():
            layer.weight.add_(0)                    # counts as an update: the weight is quantized anew
        x.grad = layer.weight.grad = None
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            y = layer(x)
        y.backward(dy)
    return step


def linear_rows(device, sizes, product):
    """A linear layer, in high precision and by recipe: three GEMMs of 2 FLOPs a weight and token. By recipe
    with the activations that train.py has on the device, in bf16 where there are units for it."""
    tokens, width = sizes.linear
    operands = torch.randn(2, tokens, width, device=device, dtype=sizes.dtype)
    trained = nvfp4.gemm_dtype(device, torch.bfloat16)
    cases = [(name_of(dtype), "bf16", dtype) for dtype in dict.fromkeys((sizes.dtype, trained))]
    cases += [(recipe, recipe, trained) for recipe in ("nvfp4", "ngpt")]
    steps = [linear_step(make_linear(recipe, width, width, device), *operands.to(dtype))
             for _, recipe, dtype in cases]
    rows = [make_row(f"Linear({width}, {width}), {tokens} tokens, forward + backward: {name}", ms,
                     6 * tokens * width * width, "TFLOP/s")
            for (name, *_), ms in zip(cases, median_ms(steps, device, REPEAT_STEPS), strict=True)]
    compare(rows, percent_of=product)
    compare(rows[1:], ratio_to=rows[0])
    return rows


# ---------------------------------------------------------------- a training step

def training_step(c):
    """(function, model): the function runs train.py's training step of a config, on random tokens."""
    ranks, device, dtype = train.meet(c)
    torch.manual_seed(c.seed)
    model = convert(build(c.model).to(device), c.fp4, report=lambda line: None)
    optimizer = train.make_optimizer(model, c)
    train.compile_model(model, c)
    ids = np.random.default_rng(0).integers(c.model.vocab_size, size=64 * c.model.block_size)
    data = train.Data(train=ids, val=ids, header=None, tokenizer=None, vocab_size=c.model.vocab_size)
    run = train.Run(c, ranks, device, dtype, data, model, optimizer, log=None, first_step=0,
                    last_step=c.max_steps)
    steps = itertools.count()
    return lambda: train.training_step(run, next(steps)), model


def training_rows(device, sizes, product):
    """nGPT's training step in high precision and by recipe, GPT's in high precision, and a hybrid's."""
    ngpt, gpt = f"ngpt_{sizes.config}", f"gpt_{sizes.config}"
    cases = [(ngpt, "bf16", "auto"), (ngpt, "ngpt", "auto"), (ngpt, "nvfp4", "auto"), (gpt, "bf16", "auto"),
             (sizes.hybrid, "bf16", "auto"), (sizes.hybrid, "ngpt", "auto")]
    if device.type == "cpu" and nvfp4.cpu_has_bf16():
        cases.insert(0, (ngpt, "bf16", "float32"))
    peak, first = train.peak_flops(device), {}      # of each config
    for config, recipe, dtype in cases:
        c = train.load_config([str(REPO / f"configs/{config}.py"), *sizes.flags,
                               f"--device={device.type}", f"--recipe={recipe}", f"--dtype={dtype}"])
        step, model = training_step(c)
        name = recipe if c.fp4.gemms else SHORT[train.choose_device(c)[1]]
        tokens = c.gradient_accumulation_steps * c.batch_size * c.model.block_size
        flops = tokens * flops_per_token(model)
        ms, = median_ms([step], device, REPEAT_STEPS)
        row = make_row(f"training step of {config}, {tokens} tokens: {name}", ms, flops, "TFLOP/s")
        if peak:
            row["mfu"] = 100 * flops / (1e-3 * ms) / peak
        compare([row], percent_of=product, ratio_to=first.get(config))
        first.setdefault(config, row)
        yield row


LONGEST = 20                                        # kernels that step names


def print_step(argv):
    """A training step, timed, and profiled: what takes its time. argv: a config's name, and flags."""
    c = train.load_config([str(REPO / f"configs/{argv[0]}.py"), *argv[1:]])
    step, model = training_step(c)
    device = model.embed.weight.device
    gpu, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    ms, = median_ms([step], device, REPEAT_STEPS)
    tokens = train.tokens_of(c, 0)
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * gpu) as trace:
        for _ in range(2):
            step()
        if gpu:
            torch.cuda.synchronize()
    found = [(event.self_device_time_total if gpu else event.self_cpu_time_total, event.count, event.key)
             for event in trace.key_averages()
             if not gpu or "CUDA" in str(event.device_type) and not event.is_user_annotation]
    busy, launches = sum(us for us, _, _ in found) / 2e3, sum(n for _, n, _ in found) / 2
    flops, peak = tokens * flops_per_token(model), train.peak_flops(device)
    print(f"step of {argv[0]}, {tokens} tokens, {c.recipe}: {ms:.1f} ms, {1e3 * tokens / ms:,.0f} tokens/s"
          + (f", MFU {1e5 * flops / ms / peak:.1f} %" if peak else ""))
    if gpu:
        print(f"kernels {busy:.1f} ms, {launches:.0f} launches; the rest of the time, waiting for the host, "
              f"{max(0, ms - busy):.1f} ms; peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    for us, n, name in sorted(found, reverse=True)[:LONGEST]:
        print(f"  {us / 2e3:9.2f} ms {us / 20 / busy:5.1f} %  x{n / 2:6.1f}  {name[:90]}")


# ---------------------------------------------------------------- memory kept for the backward

def kept_bytes(layer, tokens):
    """Bytes of memory that a linear layer keeps for its backward, for each value of its bf16 input.

    Counted is every storage that autograd saves, once. Left out is what exists anyway, however long the
    input: what the layer itself holds (weight, quantized weight, keys), and bf16 copies of the weight by
    autocast. In high precision that leaves the input; in FP4 its codes, block scales and s_dec.
    """
    assert tokens not in layer.weight.shape, "the input would be taken for a copy of the weight"
    device, saved = layer.weight.device, []
    x = torch.randn(tokens, layer.in_features, device=device, dtype=torch.bfloat16)
    dy = torch.randn(tokens, layer.out_features, device=device, dtype=torch.bfloat16)
    step = linear_step(layer, x, dy)

    def keep(t):
        saved.append(t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    owned = [layer.weight]
    if isinstance(layer, FP4Linear):
        owned += [layer.keys, *filter(torch.is_tensor, tree_leaves(layer.quantized))]
    left_out = {t.untyped_storage().data_ptr() for t in owned}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved
                if sorted(t.shape) != sorted(layer.weight.shape)}
    return sum(n for pointer, n in storages.items() if pointer not in left_out) / x.numel()


def kept_rows(device):
    (tokens, K, N), rows = KEPT, []
    for recipe in ("bf16", "nvfp4", "ngpt"):
        kept = kept_bytes(make_linear(recipe, K, N, device), tokens)
        rows.append({"what": f"kept by a Linear for its backward: {recipe}", "rate": kept,
                     "unit": "bytes a value"})
    compare(rows[1:], percent_of=rows[0])
    return rows


def benchmark(device, sizes):
    """All rows, each group as soon as it is measured."""
    yield from memory_rows(device, sizes)
    products = matmul_rows(device, sizes)
    yield from products
    yield from linear_rows(device, sizes, product=products[0])
    yield from training_rows(device, sizes, product=products[0])
    yield from kept_rows(device)


# ---------------------------------------------------------------- one transformer layer, by width

def layer_step(arch, recipe, width, length, device, dtype):
    """A function that runs ITERATIONS times forward and backward, input gradients included, of a layer.

    Sizes of fig. 6b: FFN three times the width, heads of 128, SwiGLU, one sequence. The weights are quantized
    anew each time, as after an optimizer step.
    """
    sizes = ModelConfig(arch=arch, n_layer=1, n_embd=width, n_head=max(1, width // 128), n_ffn=3 * width,
                        vocab_size=16, activation="swiglu", block_size=length)
    with device:
        model = build(sizes)
        h, dy = F.normalize(torch.randn(2, 1, length, width), dim=-1)
    convert(model, replace(RECIPES[recipe], tail=0.0), report=lambda line: None)
    train.compile_model(model, train.make_config({}))
    h, steps = h.requires_grad_(), itertools.count()

    def run():
        for _ in range(ITERATIONS):
            set_step(model, 0, next(steps))
            y = h
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                for block in model.blocks:
                    y = block(y)
            y.backward(dy.to(y.dtype))
            model.zero_grad()                       # at the end: leave the other model this memory
            h.grad = None
    return run


def layer_rows(device, dtype, sizes):
    """{arch, width, recipe, high_ms, fp4_ms, speedup}, the last three as [mean, sample standard deviation],
    or None where the layer does not fit into memory; high: in dtype."""
    for width, (arch, recipe) in itertools.product(sizes.widths, train.OWN_RECIPE.items()):
        gc.collect()                                # compiled models are cycles, which hold their weights
        row, times = dict.fromkeys(("high_ms", "fp4_ms", "speedup")), None
        with contextlib.suppress(torch.OutOfMemoryError):
            runs = [layer_step(arch, name, width, sizes.length, device, dtype) for name in ("bf16", recipe)]
            times = np.array(time_in_turn(runs, device, REPETITIONS)) / ITERATIONS
            for name, found in zip(row, (*times, times[0] / times[1]), strict=True):
                row[name] = [float(found.mean()), float(found.std(ddof=1))]
        yield {"arch": arch, "width": width, "recipe": recipe, **row}


def print_layer_row(row):
    def cell(name, digits):
        return "+-".join(f"{value:.{digits}f}" for value in row[name]) if row[name] else "-"
    print(f"  {row['width']:6d}  {row['arch']:5s}  {row['recipe']:6s}  {cell('high_ms', 2):>16s}  "
          f"{cell('fp4_ms', 2):>16s}  {cell('speedup', 2):>12s}", flush=True)


# ---------------------------------------------------------------- the command

@command("tests/bench.py")
def main(argv):
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return
    if argv[:1] == ["step"]:
        if len(argv) < 2:
            sys.exit("tests/bench.py: step takes a config, as in step ngpt_124m --recipe=ngpt")
        print(nvfp4.capability())
        return print_step(argv[1:])
    if argv not in ([], ["layer"]):
        sys.exit(f"tests/bench.py: {argv[-1]}: no such argument; it takes layer, step, -h or nothing")
    _, device, dtype = train.meet(train.make_config({}))
    sizes, emulated = SIZES[device.type], nvfp4.decoded_dtype(device, "nvfp4", torch.bfloat16) is not None
    note = " (of emulation: FP4 hardware is another matter)" if emulated else ""
    print(f"{nvfp4.capability(device)}\n\ncost on this machine{note}")
    if argv:
        high = SHORT[dtype]
        print(f"one layer, forward + backward, {sizes.length} tokens; speedup: time in {high} / time in FP4; "
              f"+- standard deviation\nover {REPETITIONS} repetitions of {ITERATIONS} steps; -: does not fit "
              "into memory\n")
        print(f"  {'width':>6s}  {'model':5s}  {'recipe':6s}  {high + ', ms':>16s}  {'FP4, ms':>16s}  "
              f"{'speedup':>12s}")
    for row in layer_rows(device, dtype, sizes) if argv else benchmark(device, sizes):
        (print_layer_row if argv else print_row)(row)


if __name__ == "__main__":
    main(sys.argv[1:])
