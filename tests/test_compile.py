"""What a user runs: compiled blocks, loss and kernels, several threads; and a machine without a compiler."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nvfp4

REPO = Path(__file__).resolve().parents[1]
TINY = ["--arch=ngpt", "--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=32", "--batch_size=4",
        "--max_steps=4", "--sample_tokens=0", "--device=cpu"]


def python(*arguments, **environment):
    finished = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                              cwd=REPO, timeout=400, env=os.environ | environment)
    assert finished.returncode == 0, finished.stderr
    return finished


def make_dataset(folder):
    """A prepared folder of text: this repository's own code."""
    python("data/text/prepare.py", REPO, "--glob", "*.py", "--val_every", 3, "--tokenizer", "bytes",
           "--out", folder)
    return folder


@pytest.mark.long                                   # a minute of compiling
def test_compiled_run_resumes_bit_for_bit_in_a_new_process(tmp_path):
    """4 steps equal 2 + a new process + 2.

    error   0. Beside the uncompiled run losses agree to bf16's rounding, 2^-8 relative: fusion only saves
            intermediate roundings.
    """
    if not nvfp4.can_compile("cpu"):
        pytest.skip("no C++ compiler")
    data = make_dataset(tmp_path / "data")

    def run(folder, *extra):
        said = python("train.py", *TINY, f"--dataset={data}", f"--out_dir={folder}", *extra).stdout
        assert ("compiling" in said) == ("--compile=False" not in extra)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "ms"} for row in rows]

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "--stop_at=2")
    assert run(tmp_path / "parts", "--resume") == whole
    plain = run(tmp_path / "plain", "--compile=False")
    for a, b in zip(whole, plain, strict=True):
        for key in {"loss", "val_loss", "val_loss_fp4"} & set(a):
            assert abs(a[key] - b[key]) <= 2**-8 * b[key]
    assert run(tmp_path / "other", "--compile=False", "--fp4_stochastic=") != plain         # control


WITHOUT = """
import torch, nvfp4
torch.manual_seed(0)
x = torch.randn(64, 64)
q = nvfp4.quantize(x, stochastic=True, seed=3)
print(q.codes.long().sum().item(), nvfp4.quantize(x.t(), decode=torch.bfloat16).values.double().sum().item())
print(nvfp4.capability("cpu"))
"""


def test_without_a_compiler_it_works_and_says_so(tmp_path):
    """The same numbers with a compiler and without; without one, a line on stderr says what that costs."""
    bare = {"CXX": "no-such-compiler", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    without = python("-c", WITHOUT, **bare)
    assert without.stderr.count("torch.compile does not work here") == 1 and "not fused" in without.stdout
    usual = python("-c", WITHOUT)
    assert usual.stdout.splitlines()[0] == without.stdout.splitlines()[0]
    assert ("not fused" in usual.stdout) != nvfp4.can_compile("cpu")            # control
