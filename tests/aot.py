"""Compile every kernel of nvfp4.py for GPUs that need not be there, and print what came out as JSON.

Each in the configurations that training uses: {"kernel, configuration": {chip: facts}}. test_kernels.py runs
it in a process of its own, because Triton's interpreter, under which the other tests run, does not compile.

    python tests/aot.py             all of them: two minutes on one core
    python tests/aot.py --few       a few of them, in seconds
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
    names = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+)?\s*([A-Z]\w*)", sass))
    return name, chip, found | {"barriers": names["BAR"], "shared_accesses": names["LDS"] + names["STS"],
                                "fences": names["MEMBAR"] + names["CCTL"]}


def every(places, few):
    """facts() of places; with few of them in this process, for another takes seconds to begin."""
    if few:
        yield from map(facts, places)
        return
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield from pool.imap_unordered(facts, places)


def main(argv):
    if argv not in ([], ["--few"]):
        sys.exit(f"tests/aot.py takes --few or nothing, not {' '.join(argv)}")
    few, table = bool(argv), {}
    places = [(chip, n) for chip in CHIPS for n, (name, *_) in enumerate(configurations(chip))
              if not few or name in FEW.get(chip, ())]
    for name, chip, found in every(places, few):
        table.setdefault(name, {})[chip] = found
    print(json.dumps(table, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1:])
