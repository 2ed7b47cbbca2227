"""Compile every kernel of nvfp4.py for GPUs that need not be there, and print what came out as JSON.

Each in the configurations that training uses: {"kernel, configuration": {chip: facts}}. test_kernels.py runs
it in a process of its own, because Triton's interpreter, under which the other tests run, does not compile.

    python tests/aot.py             all facts, as JSON: two minutes on one core
    python tests/aot.py --few       a few of them, in seconds
    python tests/aot.py --floors    how fast quantizing can be at best, as a table: an estimate
"""
import collections
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nvfp4  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CHIPS = (80, 90, 100, 103, 120)
FEW = {90: ("amax bf16, plain", "starved codes, stochastic", "ordered maximum"),
       100: ("quantize x, evaluation", "quantize codes, stochastic", "matmul bf16, native")}
INSTRUCTIONS = r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync|cvt\.r[ns]\.satfinite\.e2m1)([\w.:]*)"

# ---------------------------------------------------------------- floors: what is assumed
# None of it was measured by us. sms and warps (the most that an SM holds) are from the data sheets; ghz is a
# clock kept under load, somewhat below the boost; tb_s is 87 % of the data sheet's bandwidth, as a copy gets.

SIZE = 8192                                         # of a matrix SIZE x SIZE
CARDS = {90: {"name": "H100 SXM", "sms": 132, "ghz": 1.70, "tb_s": 2.9, "warps": 64},
         100: {"name": "B200", "sms": 148, "ghz": 1.85, "tb_s": 7.0, "warps": 64},
         120: {"name": "RTX 5090", "sms": 170, "ghz": 2.40, "tb_s": 1.55, "warps": 48}}
REGISTERS = 65536                                   # of an SM, a quarter for every fourth warp
# Threads that an SM serves in a clock. ALU: integers, logic, shifts, comparisons, minima. FMA: sums and
# products of fp32; IMAD, products of integers, has half of that pipe. XU: reciprocals, conversions between
# int and float. LSU: memory and shuffles. all: what four schedulers issue, also what no pipe here names.
LANES = {"ALU": 64, "FMA": 128, "IMAD": 64, "XU": 16, "LSU": 32, "all": 128}
PIPES = {"ALU": "V?IADD3? LOP3 LEA SH[FLR] SGXT (F|VI)MNMX3? VIADDMNMX [FI]SETP F?SEL PRMT PLOP3 P2R "
                "R2P IABS VABSDIFF4? FCHK F2FP I2FP MOV VOTE",
         "FMA": "[FH](ADD|MUL|FMA)2?", "IMAD": "IMAD", "XU": "MUFU F2I I2F FLO POPC",
         "LSU": "LD[GSL] ST[GSL] ATOM[GS]? REDG? SHFL"}


def how(height=1, stochastic=False, rotate=False, decode=False, ptx=False, swizzled=False):
    """The flags of one direction of _quantize_kernel."""
    return height, nvfp4.E2M1_MAX, stochastic, rotate, decode, ptx, swizzled


@triton.jit
def _ordered_kernel(x_ptr, amax_ptr):
    """A control for the count of fences: a maximum in the order that Triton keeps unless told otherwise."""
    tl.atomic_max(amax_ptr, tl.load(x_ptr).to(tl.int32, bitcast=True))


def configurations(chip):
    """(name, kernel, {pointer: type}, {constant: value}, options) for a chip."""
    native, ptx_sr = chip >= 100, chip in (100, 103)
    for x in ("bf16", "fp32"):                      # activations under autocast; master weights
        for name, flags in (("plain", (1, 0, 0)), ("plain and rotated columns", (1, 0, 1))):
            yield (f"amax {x}, {name}", nvfp4._amax_kernel, {"x_ptr": "*" + x, "amax_ptr": "*i32"},
                   dict(zip(("PLAIN", "ROW", "COL"), flags, strict=True)) | {"TILE": nvfp4.TILE},
                   nvfp4.QUANTIZE_OPTIONS)
    # a chip without FP4 GEMMs decodes, all but what is saved for the backward; one with them swizzles scales
    rn, sr = {"ptx": native, "swizzled": native}, {"ptx": ptx_sr, "swizzled": native, "stochastic": True}
    saved = how(**rn), how(rotate=True, **rn)
    if not native:
        rn, sr = {"decode": True}, {"decode": True, "stochastic": True}
    for name, x, row, col in (
            ("x, evaluation", "bf16", how(**rn), None), ("x, ngpt", "bf16", how(**rn), saved[0]),
            ("x, nvfp4", "bf16", how(**rn), saved[1]), ("dy, ngpt", "bf16", how(**sr), how(**sr)),
            ("dy, nvfp4", "bf16", how(**sr), how(rotate=True, **sr)),
            ("w", "fp32", how(height=16, **rn), how(height=16, **rn) if native else None),
            ("codes, nearest", "bf16", how(ptx=native), None),                  # where no FP4 GEMM agrees
            ("codes, stochastic", "bf16", how(stochastic=True, ptx=ptx_sr, swizzled=native), None)):
        types = {"x_ptr": "*" + x}
        for side, flags in (("row", row), ("col", col)):
            types |= {f"{side}_ptr": "*bf16" if flags and flags[4] else "*i64", f"{side}_scales_ptr": "*u8",
                      f"{side}_s_dec_ptr": "*fp32", f"{side}_amax_ptr": "*fp32", f"{side}_key_ptr": "*i64"}
        yield (f"quantize {name}", nvfp4._quantize_kernel, types,
               {"ROW": row, "COL": col, "TILE": nvfp4.TILE}, nvfp4.QUANTIZE_OPTIONS)
    yield ("decode x", nvfp4._decode_kernel, {"codes_ptr": "*i64", "scales_ptr": "*u8", "out_ptr": "*bf16"},
           {"HEIGHT": 1, "TILE": nvfp4.TILE}, nvfp4.QUANTIZE_OPTIONS)
    if chip == 90:                                  # a control: too few registers, which must be seen
        yield (f"starved {name}", nvfp4._quantize_kernel, types,
               {"ROW": row, "COL": col, "TILE": nvfp4.TILE}, nvfp4.QUANTIZE_OPTIONS | {"maxnreg": 32})
        yield "ordered maximum", _ordered_kernel, {"x_ptr": "*fp32", "amax_ptr": "*i32"}, {}, {}
    if native:                                      # what runs where an instruction was found wanting
        flags = {"stochastic": True, "decode": True}
        yield ("quantize dy, software", nvfp4._quantize_kernel,
               types | {"row_ptr": "*bf16", "col_ptr": "*bf16"},
               {"ROW": how(**flags), "COL": how(rotate=True, **flags), "TILE": nvfp4.TILE},
               nvfp4.QUANTIZE_OPTIONS)
    for y in ("bf16", "fp32") if native else ():
        types = {"a_ptr": "*u8", "b_ptr": "*u8", "y_ptr": "*" + y,
                 "a_scales_ptr": "*fp8e4nv", "b_scales_ptr": "*fp8e4nv"}
        yield (f"matmul {y}, native", nvfp4._matmul_native_kernel, types, nvfp4.NATIVE_BLOCK,
               nvfp4.NATIVE_OPTIONS)


def parsed(sass):
    """cuobjdump's listing as (place, guard, name, operands) of each instruction."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z]\w*)([^;]*);", sass)
    return [(int(place, 16), *others) for place, *others in lines]


def executed(code):
    """The instructions that a thread executes, by name, on the shortest way through a kernel without loops.

    There are branches around the rare cases of a division and around the one store of a single program; the
    shortest way takes neither. An instruction that a predicate may switch off counts, for it is issued.
    """
    names, jumps, rest = {}, {}, {}                 # rest: (instructions until the end, next place)
    after = None
    for place, guard, name, operands in reversed(code):
        names[place], next_places = name, [after]
        if name == "BRA":
            jumps[place] = int(re.search("0x([0-9a-f]+)", operands)[1], 16)
            conditional = guard or "," in operands
            next_places = [after, jumps[place]] if conditional else [jumps[place]]
        elif name in ("CALL", "RET"):               # the rare cases are subroutines
            next_places = []
        known = [(rest[n][0] + 1, n) for n in next_places if n in rest]
        rest[place] = min(known, default=(float("inf"), None))
        if name == "EXIT" and not guard:
            rest[place] = (1, None)
        after = place
    counts, place = collections.Counter(), min(names)
    assert rest[place][0] < float("inf"), "no way to the end"
    while place is not None:
        assert jumps.get(place, place + 1) > place, "a loop: its instructions are executed more than once"
        counts[names[place]] += 1
        place = rest[place][1]
    return counts


def floors(chip, code, registers, types, constants):
    """What limits a quantize or amax kernel: instructions a value of x, by pipe, and the least microseconds
    that its arithmetic and its memory take for a matrix of SIZE x SIZE. What threads wait for counts wherever
    it stands in the code."""
    counts, anywhere = executed(code), collections.Counter(name for _, _, name, _ in code)
    pipes = {pipe: sum(n for name, n in counts.items() if re.fullmatch(names.replace(" ", "|"), name))
             for pipe, names in PIPES.items()} | {"all": counts.total()}
    values, threads = nvfp4.TILE ** 2, 32 * nvfp4.QUANTIZE_OPTIONS["num_warps"]
    result = {"per_value": {pipe: round(n * threads / values, 2) for pipe, n in pipes.items()},
              "barriers": anywhere["BAR"], "shared_accesses": anywhere["LDS"] + anywhere["STS"],
              "fences": anywhere["MEMBAR"] + anywhere["CCTL"]}
    if chip not in CARDS:
        return result
    card = CARDS[chip]
    allotted = -(-registers // 8) * 8
    warps = 4 * min(REGISTERS // 4 // (32 * allotted), card["warps"] // 4)
    size = {"*bf16": 2, "*fp32": 4, "*i64": 0.5}    # bytes a value; a 64-bit word holds 16 codes
    traffic = size[types.get("x_ptr", "*i64")]      # what is decoded is codes
    if "out_ptr" in types:
        traffic += size[types["out_ptr"]] + 1 / 16
    for side in ("row", "col"):
        flags = constants.get(side.upper())
        if f"{side}_ptr" in types and flags:        # not the amax kernel, which writes nothing
            lines = 1 if flags[6] else flags[0]     # that share a scale
            traffic += size[types[f"{side}_ptr"]] + 1 / (16 * lines)
    clocks = {pipe: n * threads / LANES[pipe] for pipe, n in pipes.items()}
    clocks["FMA"] += pipes["IMAD"] * threads / LANES["FMA"]
    bound, programs = max(clocks, key=clocks.get), SIZE ** 2 / values
    return result | {"warps": warps, "bound": bound,
                     "arithmetic_us": round(clocks[bound] * programs / card["sms"] / card["ghz"] / 1e3, 1),
                     "memory_us": round(SIZE ** 2 * traffic / card["tb_s"] / 1e6, 1)}


def facts(place):
    """Compile configuration number n for a chip: [name, chip, facts]."""
    chip, n = place
    name, kernel, types, constants, options = list(configurations(chip))[n]
    sizes = dict.fromkeys(("R", "C", "M", "N", "K"), "i32")
    others = {p: "*fp32" for p in kernel.arg_names if p.endswith("_ptr")}       # scales, signs
    signature = {p: (others | sizes | types).get(p, "constexpr") for p in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.arg_names)
               if p.endswith("_ptr") or p in sizes}
    source = ASTSource(kernel, signature, {p: constants[p] for p, t in signature.items() if t == "constexpr"},
                       aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage, sass = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ("-res-usage", "-sass"))
    found = {"instructions": sorted({"".join(f) for f in re.findall(INSTRUCTIONS, binary.asm["ptx"])}),
             **{fact.lower(): int(re.search(rf"{fact}:(\d+)", usage).group(1))  # STACK: where registers spill
                for fact in ("REG", "STACK", "LOCAL")},
             "shared": binary.metadata.shared}
    if not name.startswith("matmul"):
        found |= floors(chip, parsed(sass), found["reg"], types, constants)
    return name, chip, found


def print_floors(table):
    """Markdown: a line a configuration and card."""
    columns = [*LANES, "barriers", "shared accesses", "registers", "warps", "arithmetic us", "memory us"]
    print(f"| {SIZE} x {SIZE} | card | " + " | ".join(columns) + " |")
    print("|---|---" + "|---:" * len(columns) + "|")
    for name, chips in sorted(table.items()):
        for chip, found in sorted(chips.items()):
            if "arithmetic_us" in found and name.startswith(("amax", "quantize", "decode")):
                cells = [*(f"{found['per_value'][pipe]:.1f}" for pipe in LANES), found["barriers"],
                         found["shared_accesses"], found["reg"], found["warps"],
                         f"{found['arithmetic_us']:.0f} ({found['bound']})", f"{found['memory_us']:.0f}"]
                print(f"| {name} | {CARDS[chip]['name']} | " + " | ".join(map(str, cells)) + " |")


def every(places, few):
    """facts() of places; with few of them in this process, for another takes seconds to begin."""
    if few:
        yield from map(facts, places)
        return
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield from pool.imap_unordered(facts, places)


def main(argv):
    if argv not in ([], ["--few"], ["--floors"]):
        sys.exit(f"tests/aot.py takes --few, --floors or nothing, not {' '.join(argv)}")
    few, floors_alone, table = "--few" in argv, "--floors" in argv, {}
    chips = CARDS if floors_alone else CHIPS
    places = [(chip, n) for chip in chips for n, (name, *_) in enumerate(configurations(chip))
              if not few or name in FEW.get(chip, ())]
    for name, chip, found in every(places, few):
        table.setdefault(name, {})[chip] = found
    if floors_alone:
        print_floors(table)
    else:
        print(json.dumps(table, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1:])
