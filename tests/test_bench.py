"""Proofs for tests/bench.py: its rows follow from amounts and times, with times made up and everything run
once at a small size; the bytes that a layer keeps are exact.
"""
import itertools

import pytest
import torch
from torch.utils._pytree import tree_map

import bench
import nvfp4
import train
from nvfp4 import FORMATS, RECIPES, FP4Config, FP4Linear

CPU = torch.device("cpu")
TINY = bench.Sizes(
    dtype=torch.float32, matrix=64, product=80, linear=(96, 48), config="tiny",
    hybrid="ngpt_hybrid_tiny", flags=("--n_layer=1", "--n_embd=32", "--n_head=2", "--n_ffn=64",
                                      "--block_size=32", "--vocab_size=128", "--batch_size=2"),
    widths=(16,), length=16)


@pytest.fixture(autouse=True)
def small_and_eager(unfused, monkeypatch):
    monkeypatch.setattr(train, "choose_device", lambda c, local_rank=0: (CPU, torch.float32))
    monkeypatch.setattr(bench, "SIZES", {"cpu": TINY})
    for name, value in {"WARM_UP": 1, "REPETITIONS": 3, "ITERATIONS": 1}.items():
        monkeypatch.setattr(bench, name, value)


@pytest.fixture
def made_up_times(monkeypatch):
    """Every function runs once; the first is said to take 2 ms, the next 3, and so on."""
    clock = itertools.count(2)

    def time_in_turn(functions, device, repeat):
        for function in functions:
            function()
        return [[float(next(clock))] * repeat for _ in functions]
    monkeypatch.setattr(bench, "time_in_turn", time_in_turn)


# ---------------------------------------------------------------- the rows

def amounts(high):
    """{row: bytes or FLOPs}, counted by hand."""
    matrix, linear = "64 x 64 float32: ", "Linear(48, 48), 96 tokens, forward + backward: "
    found = {matrix + name: 64 * 64 * width for name, width in {
        "copy into place": 4 + 4, "x.clone()": 4 + 4, "quantize, fixed amax": 4 + 0.5625,
        "quantize": 4 + 4 + 0.5625, "quantize, stochastic": 4 + 4 + 0.5625,
        "quantize columns, stochastic": 4 + 4 + 0.5625,
        "quantize rows and rotated columns, stochastic": 4 + 4 + 2 * 0.5625,
        "quantize, decoded": 4 + 4 + 2, "quantize, decoded, stochastic": 4 + 4 + 2}.items()}
    found |= {f"matmul 80 x 80 x 80: {name}": 2 * 80**3 for name in (high, "packed codes")}
    linears = {"float32", {"bf16": "bfloat16", "fp32": "float32"}[high], "nvfp4", "ngpt"}
    found |= {linear + name: 3 * 2 * 96 * 48 * 48 for name in linears}
    attention = 6 * (3 * 32 * 32 + 32 * 32) + 12 * 32 * 32                      # weights, and 32 positions
    per_token = attention + 6 * 2 * 32 * 64 + 6 * 32 * 128
    for case in ("ngpt_tiny, 64 tokens: fp32", "ngpt_tiny, 64 tokens: ngpt", "ngpt_tiny, 64 tokens: nvfp4",
                 "gpt_tiny, 64 tokens: fp32"):
        found[f"training step of {case}"] = 64 * per_token
    scan = 32 * (2 * 32 + 256) + 2 * 256 * 32       # chunks of 32, 2 groups, 16 heads of 16, 32 x 16 states
    mamba = 6 * (32 * (2 * 256 + 2 * 64 + 16) + 256 * 32 + scan)
    experts = 6 * (32 * 8 + 2 * 2 * 32 * 64 + 2 * 32 * 128)                     # router, 2 of 8, the shared
    for name in ("fp32", "ngpt"):                   # MEM*EMEM
        found[f"training step of ngpt_hybrid_tiny, 64 tokens: {name}"] = 64 * (
            4 * mamba + 3 * experts + attention + 6 * 32 * 128)
    return found


def follows(row, amount):
    """Whether its rate is amount over its time."""
    per_second = amount / (1e-3 * row["ms"])
    return row["rate"] == pytest.approx(per_second / {"GB/s": 1e9, "TFLOP/s": 1e12}[row["unit"]], rel=1e-12)


def in_percent_of(row, bound):
    return row["percent"] == pytest.approx(100 * row["rate"] / bound["rate"], rel=1e-12)


@pytest.mark.parametrize("bf16", (False, pytest.param(True, marks=pytest.mark.long)))
def test_rows_follow_from_amounts_and_times(bf16, made_up_times, monkeypatch):
    """Rates, percents of the right bound, and ratios of times."""
    monkeypatch.setattr(nvfp4, "cpu_has_bf16", lambda: bf16)
    rows = list(bench.benchmark(CPU, TINY))
    high = "bf16" if bf16 else "fp32"
    want, timed = amounts(high), [row for row in rows if "ms" in row]
    assert {row["what"] for row in timed} == set(want)
    by = {row["what"]: row for row in rows}
    bounds = {"GB/s": "64 x 64 float32: copy into place", "TFLOP/s": f"matmul 80 x 80 x 80: {high}"}
    for row in timed:
        amount, bound = want[row["what"]], by[bounds[row["unit"]]]
        assert follows(row, amount) and not follows(row | {"rate": 0.98 * row["rate"]}, amount), row
        if row is bound:
            assert "percent" not in row
            continue
        assert row["percent_of"] == bound["what"] and in_percent_of(row, bound), row
        others = [other for other in timed if other["rate"] != bound["rate"]]
        assert not any(in_percent_of(row, other) for other in others)           # control: the wrong bound
    compared = [row for row in rows if "ratio" in row]
    assert bf16 or all(                             # there two rows have the same name
        row["ratio"] == row["ms"] / by[row["ratio_to"]]["ms"] != 1 for row in compared)
    pairs = {(row["what"].rpartition(": ")[2], row["ratio_to"].rpartition(": ")[2]) for row in compared}
    assert pairs >= {("quantize", "x.clone()"), ("packed codes", high), ("nvfp4", "float32")}
    assert not any(row["what"].startswith("training step of gpt") for row in compared)


def test_functions_are_timed_in_turn():
    calls = []
    functions = [lambda name=name: calls.append(name) for name in "abc"]
    times = bench.time_in_turn(functions, CPU, repeat=4)
    assert "".join(calls) == "abc" * (bench.WARM_UP + 4)
    assert [len(ms) for ms in times] == [4, 4, 4] and all(ms > 0 for ms in sum(times, []))


def test_a_step_is_timed_and_profiled(made_up_times, monkeypatch, capsys):
    bench.main(["step", "ngpt_tiny", *TINY.flags])
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert head == "step of ngpt_tiny, 64 tokens, ngpt: 2.0 ms, 32,000 tokens/s"
    shares = [float(row.split()[2]) for row in rows]
    assert len(rows) == bench.LONGEST and shares == sorted(shares, reverse=True) and 50 < sum(shares) < 100.2
    monkeypatch.setattr(bench, "LONGEST", 1000)     # which are the longest is the machine's affair
    bench.main(["step", "ngpt_tiny", *TINY.flags])
    assert any("aten::addmm" in row for row in capsys.readouterr().out.splitlines())
    with pytest.raises(SystemExit, match="step takes a config"):
        bench.main(["step"])


# ---------------------------------------------------------------- what a layer keeps

K, N, TOKENS = 128, 64, 256                          # of x (TOKENS, K) and the weight (N, K)
S_DEC = 4                                           # bytes of the tensor scale, one for all of x or each row
BF16_BYTES = 2


def kept(layer):
    return bench.kept_bytes(layer, TOKENS)


@pytest.mark.parametrize("recipe", ("nvfp4", "mxfp4", "quartet2", "fp4_dge_occ", "hif4"))
def test_what_a_layer_keeps_for_its_backward(recipe):
    """Codes and scales of its input, and one s_dec or one for each row; in nvfp4 more than 3.5 times less
    than bf16."""
    form = FORMATS[RECIPES[recipe].format]
    found = kept(bench.make_linear(recipe, K, N, CPU))
    ones = 1 / form.block if form.by_row else 0     # block scales of 1, which are kept too
    assert found == form.bits / 8 + ones + S_DEC * (TOKENS if form.by_row else 1) / (TOKENS * K)
    assert kept(bench.make_linear("bf16", K, N, CPU)) == BF16_BYTES > (3 if form.by_row else 3.5) * found
    assert FORMATS["nvfp4"].bits == 4 + 8 / 16


def test_what_is_counted_as_kept(monkeypatch):
    """Controls: wgrad in high precision keeps x itself; without a gradient of the weight nothing is kept; and
    keys and the quantized weight are left out only because the layer holds them anyway."""
    linear = torch.nn.Linear(K, N, bias=False)
    assert kept(FP4Linear(linear, FP4Config(gemms=("fprop", "dgrad")))) == BF16_BYTES
    frozen = bench.make_linear("nvfp4", K, N, CPU)
    frozen.weight.requires_grad_(False)
    assert kept(frozen) == 0
    save = nvfp4.save

    def save_copies(ctx, *operands):
        save(ctx, *tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, operands))
    monkeypatch.setattr(nvfp4, "save", save_copies)
    keys, s_dec_of_w = 6 * 2 * 8, 4                 # its decoded columns count as a copy of the weight
    want = 4.5 / 8 + (S_DEC + keys + s_dec_of_w) / (TOKENS * K)
    assert kept(bench.make_linear("nvfp4", K, N, CPU)) == want


# ---------------------------------------------------------------- a layer by width

def test_speedup_is_high_precision_over_fp4(monkeypatch):
    """And mean and standard deviation are those of steps."""
    monkeypatch.setattr(bench, "ITERATIONS", 2)
    monkeypatch.setattr(bench, "time_in_turn", lambda *_: [[2.0, 4.0, 6.0], [4.0, 4.0, 4.0]])
    row = next(bench.layer_rows(CPU, torch.float32, TINY))
    assert row["high_ms"] == [2, 1] and row["fp4_ms"] == [2, 0] and row["speedup"] == [1, 0.5]


def test_a_layer_that_does_not_fit_is_null(monkeypatch, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(bench, "layer_step", no_memory)
    row = next(bench.layer_rows(CPU, torch.float32, TINY))
    assert row["high_ms"] is row["fp4_ms"] is row["speedup"] is None
    bench.print_layer_row(row)
    assert capsys.readouterr().out.split() == ["16", "gpt", "nvfp4", "-", "-", "-"]


# ---------------------------------------------------------------- the command

@pytest.mark.parametrize("command", ([], ["layer"]), ids=("all", "layer"))
def test_a_table_has_a_line_for_each_row(command, made_up_times, monkeypatch, capsys):
    rows = list(bench.layer_rows(CPU, torch.float32, TINY) if command else bench.benchmark(CPU, TINY))
    given = {}
    for name in ("benchmark", "layer_rows"):
        monkeypatch.setattr(bench, name, lambda *args, name=name: given.update({name: args}) or rows)
    bench.main(command)
    dtype, sizes = torch.bfloat16 if nvfp4.cpu_has_bf16() else torch.float32, bench.SIZES["cpu"]
    assert given == ({"layer_rows": (CPU, dtype, sizes)} if command else {"benchmark": (CPU, sizes)})
    said = capsys.readouterr().out
    assert said.startswith(nvfp4.capability(CPU)) and "emulation" in said
    for row, line in zip(rows, said.splitlines()[-len(rows):], strict=True):
        names = [row["what"]] if "what" in row else [str(row["width"]), row["arch"], row["recipe"]]
        assert all(name in line for name in names), line


def test_wrong_arguments_are_named():
    for wrong in (["--json"], ["layer", "512"], ["512", "layer", "x"]):
        with pytest.raises(SystemExit, match=f"^tests/bench.py: {wrong[-1]}: "):
            bench.main(wrong)

