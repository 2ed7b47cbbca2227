"""Proofs for memory.py: what is counted, against numbers that are known; what is estimated, against runs."""
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import memory  # noqa: E402
import nvfp4  # noqa: E402
import train  # noqa: E402
from data.files import UserError  # noqa: E402
from model import outline, training_bytes  # noqa: E402

CPU, ALONE = torch.device("cpu"), SimpleNamespace(world=1, beside=1)
SMALL = ["--n_layer=2", "--n_embd=64", "--n_head=2", "--n_ffn=128", "--block_size=64", "--vocab_size=256",
         "--batch_size=4", "--compile=False"]


def config(*flags):
    return train.load_config([*SMALL, *flags])


def step(*flags, dtype=torch.bfloat16):
    return memory.step_bytes(config(*flags), CPU, dtype)


@pytest.mark.parametrize("fake", [False, True])
def test_bytes_that_are_there_at_once(fake):
    """Of views none, of what is gone none any more."""
    mode = memory.FakeTensorMode() if fake else torch.no_grad()
    with mode, memory.Alive() as alive:
        a = torch.zeros(1000)
        b = a.view(10, 100)[3:] + 1                 # 700 numbers more
        assert (alive.now, alive.most) == (6800, 6800)
        a = a.double()                              # the first 1000 are gone once it is there
        assert (alive.now, alive.most) == (10800, 14800)
        del a, b
        assert (alive.now, alive.most) == (0, 14800)


def test_a_step_of_linear_layers_in_numbers():
    """Weights and gradients exactly; batches count, the second micro-batch has gradients beside it."""
    sizes = outline(config("--recipe=bf16").model)
    n = sum(p.numel() for p in sizes.parameters())
    one, two = (step("--recipe=bf16", f"--batch_size={n}", dtype=torch.float32) for n in (8, 16))
    assert one > 8 * n and 1.9 < (two - 4 * n) / (one - 4 * n) < 2.1
    more = step("--recipe=bf16", "--batch_size=8", "--gradient_accumulation_steps=2", dtype=torch.float32)
    assert 0.5 * 4 * n < more - one <= 4 * n


def test_what_saves_memory_is_seen_to():
    whole = step("--recipe=bf16", "--pattern=*-*-*-*-")
    again = step("--recipe=bf16", "--pattern=*-*-*-*-", "--activation_checkpointing=True")
    assert again < 0.7 * whole
    hidden = ["--n_ffn=2048", "--pattern=--------", "--batch_size=16"]          # where inputs are most of it
    fp4, bf16 = (step(f"--recipe={recipe}", "--arch=gpt", "--fp4_tail=0", *hidden)
                 for recipe in ("nvfp4", "bf16"))
    assert fp4 < bf16


def test_what_the_compiler_computes_again_is_not_counted():
    """nGPT's norms are cheap to compute again, and it does so."""
    one = ["--recipe=ngpt", "--n_layer=1"]
    as_it_stands, compiled = (step(*one, f"--compile={how}") for how in (False, True))
    assert 0.3 * as_it_stands < compiled < 0.9 * as_it_stands


def test_parts_of_ranks():
    sizes = outline(config().model)
    state = training_bytes(sizes)
    for way in ("ddp", "zero2", "fsdp"):
        assert memory.rank_bytes(way, sizes, 1) == state
    blocks = [training_bytes(block) for block in sizes.blocks]
    whole = state - sum(blocks) + max(blocks)
    assert memory.rank_bytes("zero2", sizes, 4) == state / 2 + state / 8
    assert memory.rank_bytes("fsdp", sizes, 4) == pytest.approx(state / 4 + whole / 2 * 3 / 4)


@pytest.mark.filterwarnings("error")
def test_what_does_not_fit_is_refused_and_what_would_is_said(monkeypatch):
    c = config("--batch_size=64")
    sizes, need = outline(c.model), memory.run_bytes(c, CPU, torch.bfloat16, outline(c.model))

    def check(c, free):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return train.check_memory(c, sizes, CPU, torch.bfloat16, ALONE)
    assert check(c, 2 * need) is None
    assert "GiB are needed" in check(c, need)       # it might not
    with pytest.raises(UserError, match=r"what would fit: --batch_size=\d+ \(and") as refused:
        check(c, need / 3)
    flag = re.search(r"--batch_size=\d+", str(refused.value)).group()
    assert check(config(flag), need / 3) is None
    twice = "--batch_size=%d" % (2 * int(flag.partition("=")[2]))               # control
    assert memory.run_bytes(config(twice), CPU, torch.bfloat16, sizes) >= memory.FITS * need / 3
    with pytest.raises(UserError, match=r"--parallel=fsdp --batch_size=1 on \d+ or more"):
        check(c, training_bytes(sizes) * 0.9)


# The kernel's own count, VmHWM: that of getrusage begins at what the parent had.
MEASURE = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import torch, memory, train
def own(count):
    return 1024 * int(open("/proc/self/status").read().split(count + ":")[1].split()[0])
real = train.make_model
def measured(c, ranks, device, *more, **kw):
    need = memory.run_bytes(c, device, train.choose_device(c)[1], train.outline(c.model))
    measured.expected = own("VmRSS") + int(need)
    return real(c, ranks, device, *more, **kw)
train.make_model = measured
train.main(sys.argv[1:])
print("expected", measured.expected, "measured", own("VmHWM"))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("config", ["ngpt_tiny", "gpt_tiny", "ngpt_hybrid_tiny", "hybrid_tiny", "gpt_124m",
                                    "ngpt_124m", "ngpt_tiny --recipe=bf16",
                                    "ngpt_hybrid_tiny --dtype=float32",         # as without bf16 units
                                    "gpt_124m --activation_checkpointing=True"])
def test_estimate_is_what_runs_take(config, dataset, tmp_path):
    """Expected: what the process has before there is a model, and the estimate. Measured: the most that it
    ever has, the compiler's own memory too."""
    name, *flags = config.split()
    if "124m" in name:
        flags += ["--batch_size=2", "--gradient_accumulation_steps=2", f"--dataset={dataset}"]
    flags += ["--max_steps=2", "--eval_iters=1", "--sample_tokens=0", f"--out_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", MEASURE, f"configs/{name}.py", *flags], cwd=REPO, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    expected, measured = map(int, re.search(r"expected (\d+) measured (\d+)", done.stdout).groups())
    print(f"{config}: expected {expected / 2**20:.0f} MiB, measured {measured / 2**20:.0f}")
    fp32 = "float32" in config or not nvfp4.cpu_has_bf16()                      # see memory.py
    least, most = 0.8 if fp32 else 0.85, 1.25 if "checkpointing" in config else 1.15
    assert least < expected / measured < most
