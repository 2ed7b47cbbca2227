"""Proofs for train.py: schedule, optimizer, and runs that are stopped, killed, resumed and spread over ranks
without changing a bit.

The runs are real: tiny models in FP4 on the CPU, a third of a second each. Only the quantizer is not
compiled, which changes no bit (tests/test_nvfp4.py) and saves minutes. A test that speaks of a process starts
one.
"""
import ctypes
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import nvfp4  # noqa: E402
import stress  # noqa: E402
import train  # noqa: E402
from data.run import Lines, UserError  # noqa: E402
from data.tokens import prepare, read_tokens, write_tokens  # noqa: E402
from model import ABOUT, TENSORS, ModelConfig, MoE, build, load_model, outline, rank_bytes  # noqa: E402
from nvfp4 import OPERANDS  # noqa: E402
from stress import Process  # noqa: E402
from train import load_config, make_config, unflatten  # noqa: E402

RUNS = {                                            # kinds of runs that must go on bit for bit
    "ngpt": {},
    "gpt": {"arch": "gpt", "recipe": "nvfp4"},
    "all random": {"fp4_stochastic": ",".join(OPERANDS), "fp4_hadamard": "wgrad",
                   "fp4_hadamard_signs": "fresh", "gradient_accumulation_steps": 2, "weight_decay": 0.1,
                   "schedule": "cosine", "warmup_steps": 3, "eval_iters": 3},
    "hybrid": {"pattern": "ME*", "n_ffn": 48, "mamba_n_head": 16, "mamba_head_dim": 4, "mamba_n_group": 2,
               "mamba_n_state": 16, "mamba_chunk": 8, "moe_n_expert": 4, "gradient_accumulation_steps": 2,
               "gradient_noise": True},
    "late switch": {"recipe": "quartet2", "fp4_hadamard_size": 32, "fp4_until": 0.6, "fp4_switched": "fprop",
                    "gradient_accumulation_steps": 2},
    "dge, occ, experts": {"recipe": "fp4_dge_occ", "pattern": "E*", "n_ffn": 48, "moe_n_expert": 4,
                          "gradient_accumulation_steps": 2},
}
CAN_COMPILE = nvfp4.can_compile                     # that of the module, which eager() replaces
EAGER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPO)!r})
import torch, nvfp4, train
torch.set_num_threads(1)
nvfp4.can_compile = lambda kind: False
"""
TRAIN = "train.main(sys.argv[1:])"


@pytest.fixture(scope="module", autouse=True)
def handlers(eager):
    """A run that ends in an error leaves its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A kind of RUNS -> the folder of an uninterrupted run of 10 steps."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("whole")
            train.main(tiny(folders[kind], **RUNS[kind]))
        return folders[kind]
    return folder


def start(*command, **kw):
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


def finish(process):
    """returns (exit status, stdout, stderr)"""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.terminate()                         # no kill: torchrun has processes of its own to end
    return process.returncode, out, err


def refusal(argv):
    """The one line with which train.py ends."""
    with pytest.raises(SystemExit) as stopped:
        train.main([str(argument) for argument in argv])
    line = stopped.value.code                       # text: python prints it on stderr and exits with 1
    assert isinstance(line, str) and line.startswith("train.py: ") and "\n" not in line
    return line


def metrics(folder, having="step"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if having in row]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved_step(folder):
    return train.load_checkpoint(folder / "ckpt.pt")["step"]


def leaves(tree, name=""):
    if not isinstance(tree, (dict, list, tuple)):
        yield name[1:], tree.numpy().tobytes() if torch.is_tensor(tree) else tree
        return
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(child, f"{name}/{key}")


def changed(a, b):
    """Names of what differs by a bit between two run folders: weights, optimizer state, step, and metrics but
    for the times (metrics/<step>/... and metrics/<step> val/...)."""
    found = []
    for folder in (a, b):
        saved, rows = train.load_checkpoint(folder / "ckpt.pt"), metrics(folder)
        named = {f"{row['step']}{'' if 'loss' in row else ' val'}": row | {"ms": 0} for row in rows}
        assert len(named) == len(rows), "a step stands twice in metrics.jsonl"
        found.append(dict(leaves(saved | {"config": None, "rows": None, "metrics": named})))
    return {name for name in found[0] | found[1] if found[0].get(name) != found[1].get(name)}


def parts(names):
    return {name.split("/")[0] for name in names}


# ---------------------------------------------------------------- schedule and optimizer

WSD = {"learning_rate": 1.0, "min_lr": 0.1, "max_steps": 100, "warmup_steps": 10, "decay_fraction": 0.2}
COSINE = WSD | {"schedule": "cosine"}


@pytest.mark.parametrize("settings, step, value", [
    (WSD, 0, 0.1), (WSD, 4, 0.5), (WSD, 9, 1.0), (WSD, 10, 1.0), (WSD, 80, 1.0),
    (WSD, 85, 0.1 + 0.9 * 0.5), (WSD, 90, 0.1 + 0.9 * (1 - 0.5**0.5)), (WSD, 100, 0.1),
    (COSINE, 0, 0.1), (COSINE, 9, 1.0), (COSINE, 10, 1.0), (COSINE, 55, 0.55), (COSINE, 100, 0.1),
    (COSINE, 32.5, 0.1 + 0.9 * (1 + 0.5**0.5) / 2), (COSINE | {"warmup_steps": 0}, 0, 1.0),
    (WSD | {"decay_fraction": 0.0}, 99, 1.0), (WSD | {"decay_fraction": 1.0}, 25, 0.55),
    (WSD | {"warmup_steps": 100}, 99, 1.0), (WSD | {"min_lr": None}, 100, 1 / 50)])
def test_learning_rate(settings, step, value):
    assert train.learning_rate(make_config(settings), step) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("settings", [{"arch": "ngpt"}, {"arch": "gpt", "activation": "swiglu"}], ids=str)
def test_weight_decay_is_for_matrices_in_their_order(settings):
    """Optimizer state is saved by position: the order of the parameters is part of the checkpoint."""
    c = make_config(settings | {"n_layer": 2, "n_embd": 32, "vocab_size": 64, "weight_decay": 0.1})
    model = nvfp4.convert(build(c.model), c.fp4, report=lambda line: None)
    for optimizer in (train.make_optimizer(model, c), train.make_optimizer(build(c.model), c)):
        decayed, others = optimizer.param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
        assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in others["params"])
    parameters = list(model.parameters())
    decayed, others = train.make_optimizer(model, c).param_groups
    for group, n_dim in ((decayed, 2), (others, 1)):
        expected = [p for p in parameters if p.dim() == n_dim]
        assert len(expected) == len(group["params"])
        assert all(a is b for a, b in zip(expected, group["params"], strict=True))


# ---------------------------------------------------------------- a run

@pytest.mark.parametrize("arch", ["ngpt", "gpt"])
def test_run_folder(tiny, dataset, tmp_path, monkeypatch, capsys, arch):
    shutil.copytree(dataset, tmp_path / "data")
    ids, _ = read_tokens(dataset / "val.bin")       # as if a token were three bytes
    write_tokens(tmp_path / "data" / "val.bin", ids, 256, "bytes", "a test", 3 * len(ids))
    saves, save = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint",
                        lambda path, *rest: saves.append((path, rest[2])) or save(path, *rest))
    out = tmp_path / "deep" / "run"
    argv = tiny(out, dataset=tmp_path / "data", arch=arch, warmup_steps=3, gradient_accumulation_steps=2,
                checkpoint_interval=3, dtype="float32", sample_tokens=8, weight_decay=0.1, beta1=0.8)
    train.main(argv)
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "config.json", "log.txt", "metrics.jsonl"}
    assert (out / "log.txt").read_text() == said and "\nsample:\n" in said
    assert saves == [(out / "ckpt.pt", step) for step in (3, 6, 9, 10)] and saved_step(out) == 10
    c = load_config([*argv, "--vocab_size=256"])    # the dataset's
    assert unflatten(json.loads((out / "config.json").read_text())) == c

    steps, evaluations = metrics(out, "loss"), metrics(out, "val_loss")
    assert [set(row) for row in steps] == [{"step", "loss", "lr", "grad_norm", "tokens", "ms"}] * 10
    assert [(row["step"], row["tokens"]) for row in steps] == [(i, (i + 1) * 2 * 4 * 32) for i in range(10)]
    assert [row["lr"] for row in steps] == [train.learning_rate(c, i) for i in range(10)]
    assert abs(steps[0]["loss"] - math.log(256)) < 0.1 and all(0 < row["grad_norm"] < 10 for row in steps)
    assert [set(row) for row in evaluations] == [{"step", "val_loss", "val_bpb", "val_loss_fp4"}] * 4
    assert [row["step"] for row in evaluations] == [0, 4, 8, 10]
    assert len(metrics(out)) == 14
    assert all(row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2) / 3) for row in evaluations)

    matrices, vectors = train.load_checkpoint(out / "ckpt.pt")["optimizer"]["param_groups"]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0)
    assert all((g["lr"], g["betas"]) == (train.learning_rate(c, 9), (0.8, 0.95)) for g in (matrices, vectors))

    # the last losses, computed anew from the checkpoint: in high precision, then in FP4
    model, tokenizer, c_run = train.load_run(out)
    assert c_run == c and tokenizer.n_vocab == 256
    unit_rows = (model.embed.weight.norm(dim=1) - 1).abs().max() < 1e-5
    assert unit_rows == (arch == "ngpt")
    x = torch.from_numpy(np.stack([ids[i * (len(ids) - 33) // 7:][:33] for i in range(8)]).astype(np.int64))

    def loss():
        with torch.no_grad():                       # two batches of four, as tensor scales are a batch's
            return sum(float(F.cross_entropy(model(half[:, :-1]).flatten(0, 1), half[:, 1:].flatten()))
                       for half in x.split(4)) / 2
    assert loss() == evaluations[-1]["val_loss"]
    nvfp4.convert(model, c.fp4)
    nvfp4.set_step(model, c.seed, 10)
    assert loss() == evaluations[-1]["val_loss_fp4"] != evaluations[-1]["val_loss"]


def test_a_warm_up_that_does_not_fit_is_shortened_and_said(tiny, tmp_path, capsys):
    train.main(tiny(tmp_path, max_steps=4, warmup_steps=40, stop_at=2))
    said = capsys.readouterr().out
    assert said.count("warmup_steps=40 shortened to max_steps=4\n") == 1
    train.main(tiny(tmp_path, max_steps=4, warmup_steps=40, resume=True))
    assert [row["lr"] for row in metrics(tmp_path, "loss")] == [0.0025, 0.005, 0.0075, 0.01]
    assert json.loads((tmp_path / "config.json").read_text())["warmup_steps"] == 4
    train.main(tiny(tmp_path / "fits", max_steps=4, warmup_steps=4, stop_at=1))
    assert "shortened" not in capsys.readouterr().out.partition("saved in")[2]  # control


def test_the_first_step_promises_no_end(tiny, tmp_path, capsys):
    """It compiles, so that its time says nothing of the rest."""
    train.main(tiny(tmp_path, max_steps=3, log_interval=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if " tok/s" in line]
    assert ["eta" in line for line in lines] == [False, True, True] and lines[2].endswith("| eta 0:00:00")
    assert train.usual([40.0]) == 40 and train.usual([40.0, 2.0, 1.0, 1.5]) == 1.5
    assert train.usual([40.0] + [9.0] * 30 + [1.0] * 20) == 1
    assert train.clock(4 * 3600 + 61.5) == "4:01:01"


def test_compile_false_compiles_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nvfp4, "can_compile", CAN_COMPILE)
    if not nvfp4.can_compile("cpu"):
        pytest.skip("no C++ compiler")
    counters = torch._dynamo.utils.counters
    counters.clear()
    train.main(tiny(tmp_path, max_steps=1, sample_tokens=2))
    assert not counters["frames"] and not counters["stats"]
    machine = capsys.readouterr().out.splitlines()[1]
    assert machine.startswith("cpu") and "not fused, which is several times slower (the compi" in machine
    assert nvfp4.can_compile("cpu")                 # the run has left the compiler as it was
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))             # control: this is counted
    assert counters["frames"] and counters["stats"]


def test_blocks_of_many_graphs_are_all_compiled():
    """torch allows 8 graphs of one function, and keeps that limit thread by thread: here one that has not
    compiled yet, as the main thread of a run on a GPU, where the backward quantizes elsewhere."""
    class Block(torch.nn.Module):
        def __init__(self, n):
            super().__init__()
            self.n = n                              # a graph of its own

        def forward(self, x):
            return x + self.n

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(2, 2)
            self.blocks = torch.nn.ModuleList(map(Block, range(10)))

        def loss(self, x):
            return x.sum()
    found = []

    def compile(f, **options):
        return original(f, backend="eager", **options)

    def main():
        model = Model()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert train.compile_model(model, make_config({}))
        x = torch.zeros(2)
        for block in model.blocks:
            x = block(x)
        found.append((float(model.loss(x)), torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    original = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        patch.setattr(nvfp4, "can_compile", lambda kind: True)
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
    assert found == [(90, 11)]                      # 10 blocks and the loss


@pytest.mark.parametrize("name, peak", (
    ("NVIDIA A100-SXM4-80GB", 312e12), ("A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA RTX A1000", None), ("NVIDIA A10", None), ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", None), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None)))
def test_peak_flops_of_a_gpu_s_exact_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train.peak_flops(torch.device("cuda", 0)) == peak
    assert train.peak_flops(torch.device("cpu")) is None


def test_deterministic_reaches_torch(tiny, tmp_path, monkeypatch):
    """What attention, cuBLAS and indexing ask, while the run lasts; a run may be resumed with it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def update(*args):
        seen.append((torch.are_deterministic_algorithms_enabled(),
                     torch.is_deterministic_algorithms_warn_only_enabled(),
                     os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return original(*args)
    original = train.update
    monkeypatch.setattr(train, "update", update)
    train.main(tiny(tmp_path, max_steps=2, stop_at=1))
    train.main(tiny(tmp_path, max_steps=2, resume=True, deterministic=True))
    assert seen == [(False, False, None), (True, False, ":4096:8")]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_another_version_set_is_said(tiny, tmp_path, capsys):
    train.main(tiny(tmp_path, max_steps=2, stop_at=1))
    saved = train.load_checkpoint(tmp_path / "ckpt.pt")
    saved["config"]["fp4_old_field"] = "16x16"
    torch.save(saved, tmp_path / "ckpt.pt")
    line = f"{tmp_path}: made by another version of this code: fp4_old_field=16x16 is no field here"
    capsys.readouterr()
    load_model(tmp_path)                            # whose business it is not
    assert capsys.readouterr() == ("", "")
    train.load_run(tmp_path)
    assert capsys.readouterr().err.startswith(line)
    assert "fp4_old_field=16x16 is no field here; finish it with" in refusal(tiny(tmp_path, resume=True))
    assert saved_step(tmp_path) == 1
    del saved["config"]["fp4_old_field"]            # a renamed field is no unknown one
    square = saved["config"].pop("fp4_square_weights")
    saved["config"]["fp4_weight_block"] = "1x16"
    torch.save(saved, tmp_path / "ckpt.pt")
    assert square and train.load_run(tmp_path)[2].fp4.square_weights is False
    assert "fp4_square_weights=True but the run" in refusal(tiny(tmp_path, max_steps=2, resume=True))
    train.main(tiny(tmp_path, max_steps=2, resume=True, fp4_square_weights=False))
    assert saved_step(tmp_path) == 2


def test_documents_apart_is_a_run_s_own_choice(tiny, dataset, tmp_path, capsys):
    """-1 finds the token; it goes on bit for bit, and is not taken back by --resume."""
    data, cost = tmp_path / "data", {}
    text = ["".join(random.Random(seed).choices("ab c", k=60)) for seed in range(200)]
    prepare(text[:150], text[150:], data, "a test", vocab_size=257)
    for start in (-1, None):
        folder = tmp_path / f"{start}"
        train.main(tiny(folder, dataset=data, document_start=start))
        cost[start] = [row["loss"] for row in metrics(folder, "loss")]
        assert train.load_run(folder)[2].model.document_start == (256 if start else None)
    assert cost[-1] != cost[None]
    halves = tmp_path / "halves"
    train.main(tiny(halves, dataset=data, document_start=-1, stop_at=5))
    train.main(tiny(halves, dataset=data, document_start=-1, resume=True))
    assert [row["loss"] for row in metrics(halves, "loss")] == cost[-1]
    assert "document_start=None" in refusal(tiny(halves, dataset=data, resume=True))
    assert "has not; give a token" in refusal(tiny(tmp_path / "bytes", document_start=-1))
    assert "must be a token, from 0 to" in refusal(tiny(tmp_path / "far", document_start=256))


def test_bf16_run_has_no_fp4_loss(tiny, tmp_path):
    train.main(tiny(tmp_path, recipe="bf16", max_steps=1))
    assert [set(row) for row in metrics(tmp_path, "val_loss")] == [{"step", "val_loss", "val_bpb"}] * 2


def gradients_of(folder, gemms, step=10):
    """dw of a finished run's FP4 layers for the first micro-batch of a step, by loss.backward()."""
    model, _, c = train.load_run(folder)
    nvfp4.convert(model, replace(c.fp4, gemms=gemms), report=lambda line: None)
    nvfp4.set_step(model, c.seed, step)
    data = train.load_data(c.dataset, c.model.block_size, c.model.vocab_size).train
    shape = c.gradient_accumulation_steps, c.batch_size
    starts = train.train_starts(len(data), c.model.block_size, shape, c.seed, step)[0]
    _, dtype = train.choose_device(c)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model.train()(*train.batch_at(data, starts, c.model.block_size, torch.device("cpu")))
    loss.backward()
    return {name: m.weight.grad.double() for name, m in model.named_modules()
            if isinstance(m, nvfp4.FP4Linear)}


def test_gradient_noise_is_that_of_the_backward(tiny, whole, tmp_path, capsys):
    """The last evaluation by brute force, bit for bit: layers that never ran but in FP4 against others that
    never had a backward in FP4. The run itself, experts and their loads included, is untouched."""
    train.main(tiny(tmp_path, **RUNS["hybrid"] | {"gradient_noise": False}))
    plain = capsys.readouterr().out
    watched = whole("hybrid")
    found = changed(watched, tmp_path)
    assert found and all(re.match(f"metrics/.* val/{train.NOISE}", name) for name in found)
    row, said = metrics(watched, "val_loss")[-1], (watched / "log.txt").read_text()

    def ratios(gemms, step=10):
        fp4, exact = (gradients_of(watched, gemms, step) for gemms in (gemms, ("fprop",)))
        return {train.NOISE + name: float(dw.std() / (fp4[name] - dw).std()) for name, dw in exact.items()}
    want = ratios(nvfp4.GEMMS)
    assert want == {name: ratio for name, ratio in row.items() if name.startswith(train.NOISE)}
    assert "blocks.1.mixer.experts.fc1" in " ".join(want) and all(0.1 < r < 100 for r in want.values())
    noisiest = min(want, key=want.get)
    assert f"gradient over noise {want[noisiest]:.2f} in {noisiest.removeprefix(train.NOISE)}\n" in said
    assert "gradient over noise" not in plain
    last = train.NOISE + "blocks.2.mixer.out"       # whose dy is exact: above it is the head
    for other, equal in ((ratios(nvfp4.GEMMS, step=9), []), (ratios(("fprop", "wgrad")), [last])):  # controls
        assert [name for name in want if other[name] == want[name]] == equal


def test_no_backward_in_fp4_has_no_noise(tiny, tmp_path, capsys):
    for recipe in ("bf16", "fp4_dge_occ"):
        train.main(tiny(tmp_path / recipe, recipe=recipe, max_steps=1, gradient_noise=True))
        assert f"gradient_noise: recipe {recipe} has no backward in FP4" in capsys.readouterr().out
        assert not any(name.startswith(train.NOISE) for row in metrics(tmp_path / recipe) for name in row)


@pytest.mark.parametrize("switched", ["fprop", "dgrad,wgrad", "fprop,dgrad,wgrad"])
def test_late_switch(tiny, whole, tmp_path, capsys, switched):
    """The steps before it are the other run's bit for bit, the one after it is not; from the first step on,
    of all GEMMs, it is the bf16 run."""
    def losses(folder):
        return [(row["loss"], row["grad_norm"]) for row in metrics(folder, "loss")]
    train.main(tiny(tmp_path / "late", fp4_until=0.6, fp4_switched=switched))
    assert f"step 6: {switched} in high precision from now on" in capsys.readouterr().out
    want, got = losses(whole("ngpt")), losses(tmp_path / "late")
    assert got[:6] == want[:6] and got[6] != want[6]
    if switched == "fprop,dgrad,wgrad":
        train.main(tiny(tmp_path / "bf16", recipe="bf16"))
        train.main(tiny(tmp_path / "at once", fp4_until=0))
        assert losses(tmp_path / "at once") == losses(tmp_path / "bf16") != want


def test_experts_keep_the_distance_that_layers_count_on():
    assert MoE.multiple == nvfp4.EXPERT_TOKENS


@pytest.mark.parametrize("arch", ["ngpt", "gpt"])
def test_one_batch_is_learnt_by_heart(tiny, tmp_path, monkeypatch, arch):
    def losses(name):
        train.main(tiny(tmp_path / name, arch=arch, max_steps=100, learning_rate=2e-2, batch_size=2,
                        eval_interval=100))
        return [row["loss"] for row in metrics(tmp_path / name, "loss")]
    assert losses("fresh")[-1] > 3                  # control: but for a batch, ln 27 = 3.3 is the end
    starts = train.train_starts
    monkeypatch.setattr(train, "train_starts", lambda *where: starts(*where[:-1], 0))
    same = losses("same")
    assert same[0] > 5.4 and same[-1] < 0.5


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "/no/such"}, "/no/such/train.bin: no such folder; run: python data/text/prepare.py"),
    ({"block_size": 2000}, "val.bin: 2000 tokens must be 2001 at least; lower block_size"),
    ({"vocab_size": 100}, "vocab_size=100 must be 256 at least"),
    ({"device": "cuda"}, "device=cuda must find a GPU"),
    ({"n_embd": 33}, "n_embd=33 must be a multiple of n_head=2"),
    ({"n_embd": 24}, "K=24 must be a multiple of 16 (nvfp4 block)"),
    ({"pattern": "*x"}, "pattern=*x must consist of"),
    ({"n_head": 0}, "n_head=0 must be"),
    ({"block_size": 0}, "block_size=0 must be"),
    ({"beta1": 2}, "beta1=2.0 must be"),
], ids=str)
def test_impossible_run_is_one_line(tiny, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refusal(tiny(tmp_path, **changes))
    assert not (tmp_path / "ckpt.pt").exists()


# ---------------------------------------------------------------- stop and resume

QUICK = ("all random", "hybrid", "late switch")     # the others are of the same kind: -m long


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.long)
                                            for kind in RUNS if kind not in QUICK)])
def test_resume_in_a_new_process_is_bit_for_bit(tiny, whole, tmp_path, kind):
    train.main(tiny(tmp_path, **RUNS[kind], stop_at=5))
    assert saved_step(tmp_path) == 5
    status, _, err = finish(start("-c", EAGER + TRAIN, *tiny(tmp_path, **RUNS[kind], resume=True)))
    assert (status, err) == (0, "")
    assert changed(tmp_path, whole(kind)) == set()


@pytest.mark.parametrize("owner, name, wrong", [
    (nvfp4, "set_step", lambda real: lambda model, seed, *where: real(model, seed + 1, *where)),
    (nvfp4, "set_step", lambda real: lambda model, seed, step, *micro: real(model, seed, step - 5, *micro)),
    (train, "train_starts", lambda real: lambda *where: real(*where[:-1], where[-1] - 5)),
    (torch.optim.AdamW, "load_state_dict", lambda real: lambda self, state: None),
], ids=["noise of another seed", "noise counted anew", "batches counted anew", "optimizer forgotten"])
def test_control_wrong_resume_is_noticed(tiny, whole, tmp_path, monkeypatch, owner, name, wrong):
    train.main(tiny(tmp_path, stop_at=5))
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    train.main(tiny(tmp_path, resume=True))
    found = changed(tmp_path, whole("ngpt"))
    assert parts(found) == {"model", "optimizer", "metrics"}
    assert "metrics/9/loss" in found and "metrics/4/loss" not in found


SLOW = """
rate = train.learning_rate
train.learning_rate = lambda c, step: (time.sleep(0.3 * (step > 1)), rate(c, step))[1]
"""
DIE_IN_SECOND_SAVE = """
rename, die = os.replace, lambda *_: os.kill(os.getpid(), signal.SIGKILL)
os.replace = lambda new, old: (die if os.path.exists(old) and old.name == "ckpt.pt" else rename)(new, old)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_signalled_run_goes_on_bit_for_bit(tiny, whole, tmp_path, name):
    argv = tiny(tmp_path, checkpoint_interval=3)
    if name == "SIGKILL":
        status, _, _ = finish(start("-c", EAGER + DIE_IN_SECOND_SAVE + TRAIN, *argv))
        assert (status, saved_step(tmp_path)) == (-signal.SIGKILL, 3) and list(tmp_path.glob("ckpt.*.tmp.pt"))
        assert metrics(tmp_path)[-1]["step"] == 5   # two steps that are lost and done again
    else:
        process, until = start("-c", EAGER + SLOW + TRAIN, *argv), time.monotonic() + 60
        while not ((tmp_path / "metrics.jsonl").exists() and any(r["step"] == 2 for r in metrics(tmp_path))):
            assert process.poll() is None and time.monotonic() < until, finish(process)
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        status, out, err = finish(process)
        step = saved_step(tmp_path)
        assert status == train.STOPPED == 75 and 2 < step < 10
        said = rf"{name}: stopping after this step \(one takes 0\.\d s\); once more to stop at once\n"
        assert re.fullmatch(said, err)
        assert f"{name}: stopped at step {step}; continue with --resume" in out
    train.main(tiny(tmp_path, resume=True))
    assert changed(tmp_path, whole("ngpt")) == set()


SAVE_FOR_EVER = """
model = torch.nn.Linear(1024, 1024)
optimizer = torch.optim.AdamW(model.parameters())
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer.step()
tensors = [p.data for p in model.parameters()] + [s["exp_avg"] for s in optimizer.state.values()]
c, path = train.load_config([]), train.Path(sys.argv[1])
def save(step):
    for t in tensors:
        t.fill_(step)
    train.save_checkpoint(path, model, optimizer, step, c, "a test")
save(0)
print("ready", flush=True)
for line in sys.stdin:
    pid, step = os.fork(), int(line)
    while pid == 0:
        step += 1
        save(step)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def test_kill_during_save_leaves_a_checkpoint_that_loads(tmp_path):
    """Processes that save 12 MB over and over, killed at random moments until three left half a file."""
    path, torn, kills, moments = tmp_path / "ckpt.pt", 0, 0, random.Random(0)
    until = time.monotonic() + 60
    with start("-c", EAGER + SAVE_FOR_EVER, path, stdin=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == "ready\n", finish(writer)
        while torn < 3 or kills < 8:
            print(1000 * kills, file=writer.stdin, flush=True)
            pid = int(writer.stdout.readline())
            time.sleep(moments.uniform(0.02, 0.1))
            os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < until, f"{torn} of {kills} kills fell into the writing of the file"
            assert writer.stdout.readline() == "dead\n"
            kills += 1
            saved = train.load_checkpoint(path)
            values = [*saved["model"].values(), *(s["exp_avg"] for s in saved["optimizer"]["state"].values())]
            assert len(values) == 4 and all((v == saved["step"]).all() for v in values)
            for beside in tmp_path.glob("ckpt.*.tmp.pt"):       # control: written in place, this would be it
                try:
                    torch.load(beside)
                except Exception:
                    torn += 1
                beside.unlink()


def breaking(step, name="head.weight", value=math.nan):
    """update(), but that in a step a number of a weight, or of a moment, becomes NaN."""
    real, done = train.update, []

    def update(model, optimizer, grad_clip):
        norm = real(model, optimizer, grad_clip)
        if len(done) == step:
            weight = model.get_parameter("head.weight")
            with torch.no_grad():
                (weight if name == "head.weight" else optimizer.state[weight][name]).view(-1)[5] = value
        done.append(step)
        return norm
    return update


@pytest.mark.parametrize("arch", ["ngpt", "gpt"])
def test_nan_stops_the_run_and_leaves_the_checkpoint(tiny, whole, tmp_path, monkeypatch, arch):
    with monkeypatch.context() as patch:            # the weights become NaN in step 6: FP4 must not hide it
        patch.setattr(train, "update", breaking(6))
        line = refusal(tiny(tmp_path, **RUNS[arch], checkpoint_interval=3))
    assert re.search("step 7: loss nan, .*stopped; lower learn.*; the checkpoint of step 6 is whole", line)
    assert saved_step(tmp_path) == 6
    train.main(tiny(tmp_path, **RUNS[arch], resume=True))
    assert changed(tmp_path, whole(arch)) == set()


@pytest.mark.parametrize("name, value", [("head.weight", math.nan), ("exp_avg", math.inf),
                                         ("exp_avg_sq", math.nan)])
def test_what_is_not_finite_is_never_saved(tiny, whole, tmp_path, monkeypatch, name, value):
    """It appears in step 5, and 6 is to be saved: the next loss, which would show it, comes too late."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", breaking(5, name, value))
        line = refusal(tiny(tmp_path, checkpoint_interval=3))
    assert re.search(rf"step 6: \S*{name} is not finite: stopped; .* checkpoint of step 3 is whole", line)
    assert set(files_of(tmp_path)) == {"ckpt.pt", "config.json", "log.txt", "metrics.jsonl"}
    train.main(tiny(tmp_path, resume=True))
    assert changed(tmp_path, whole("ngpt")) == set()


@pytest.mark.parametrize("flags", [{"checkpoint_interval": 1}, {"max_steps": 1}], ids=str)
def test_senseless_learning_rate_is_an_error_and_leaves_json(tiny, tmp_path, flags):
    line = refusal(tiny(tmp_path, arch="gpt", recipe="bf16", learning_rate=1e38, **flags))
    assert re.search("step 1: .*stopped; lower learning_rate, .*; there is no checkpoint in", line)
    assert not (tmp_path / "ckpt.pt").exists()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count("\n") >= 2 and "NaN" not in text and "Infinity" not in text


def test_a_checkpoint_that_is_broken_already_is_refused(tiny, whole, tmp_path):
    for name, value in (("model", math.nan), ("optimizer", math.inf)):
        saved = train.load_checkpoint(shutil.copytree(whole("ngpt"), tmp_path / name) / "ckpt.pt")
        tensors = saved["model"] if name == "model" else saved["optimizer"]["state"][0]
        tensors["head.weight" if name == "model" else "exp_avg"][3, 3] = value
        torch.save(saved, tmp_path / name / "ckpt.pt")
        line = refusal(tiny(tmp_path / name, resume=True))
        assert re.search(rf"ckpt.pt: {name}\.\S+ is not finite, so that no run can start from it", line)
    with pytest.raises(UserError, match="model.head.weight is not finite"):
        load_model(tmp_path / "model")


def test_update_leaves_everything_as_it_is_where_the_gradient_is_not_finite():
    c = make_config({"n_layer": 1, "n_embd": 32, "vocab_size": 64, "recipe": "bf16"})
    model = build(c.model)
    optimizer, before = train.make_optimizer(model, c), {n: p.clone() for n, p in model.named_parameters()}
    for broken in (math.nan, math.inf, 1.0):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.head.weight.grad[1, 2] = broken
        assert math.isfinite(train.update(model, optimizer, 1.0)) == (broken == 1)
        same = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert same == (not optimizer.state) == (broken != 1)                   # 1: the control


def test_infinite_gradient_stops_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    line = refusal(tiny(tmp_path))
    assert re.search(r"step 0: loss 5\..*, gradient norm inf: stopped.* there is no checkpoint in", line)
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("changes", [
    {"n_embd": 64}, {"arch": "gpt", "recipe": "ngpt"}, {"activation": "swiglu"}, {"recipe": "bf16"},
    {"fp4_stochastic": "dgrad.dy"}, {"fp4_tail": 0.5}, {"seed": 1}, {"batch_size": 8}, {"learning_rate": 1.0},
    {"max_steps": 20}, {"dtype": "float32"}], ids=str)
def test_resume_refuses_and_names_what_changed(tiny, whole, changes):
    before = {path: path.read_bytes() for path in whole("ngpt").iterdir()}
    line, name = refusal(tiny(whole("ngpt"), **changes, resume=True)), next(iter(changes))
    assert f"--resume: {name}=" in line and f"but the run in {whole('ngpt')} has {name}=" in line
    assert {path: path.read_bytes() for path in whole("ngpt").iterdir()} == before


def test_resume_refuses_other_data_under_the_same_name(tiny, dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    train.main(tiny(tmp_path / "run", dataset=data, stop_at=1))
    ids, _ = read_tokens(data / "val.bin")
    write_tokens(data / "val.bin", ids[::-1], 256, "bytes", "another source", len(ids))
    line = refusal(tiny(tmp_path / "run", dataset=data, resume=True))
    assert f"{data} is not the data of the run" in line and "another source" in line and "a test" in line


def test_a_run_goes_on_where_its_data_have_moved(tiny, dataset, tmp_path):
    """Here in two shards, as far apart as machines: no path is kept."""
    data, (ids, head) = shutil.copytree(dataset, tmp_path / "data"), read_tokens(dataset / "train.bin")
    (data / "train.bin").unlink()
    for number, part in enumerate((ids[:7000], ids[7000:])):
        write_tokens(data / f"train_{number:05}.bin", part, 256, "bytes", head.source, len(part))
    train.main(tiny(tmp_path / "whole", dataset=data))
    train.main(tiny(tmp_path / "run", dataset=data, stop_at=5))
    moved = data.rename(tmp_path / "elsewhere")
    shutil.copy(moved / "train_00000.bin", moved / "train_00002.bin")
    assert "3 files of 25000 tokens, not" in refusal(tiny(tmp_path / "run", dataset=moved, resume=True))
    (moved / "train_00002.bin").unlink()
    train.main(tiny(tmp_path / "run", dataset=moved, resume=True))
    assert changed(tmp_path / "run", tmp_path / "whole") == set()
    train.main(tiny(tmp_path / "other", dataset=dataset))       # control: the same text, uncut
    assert "metrics" in parts(changed(tmp_path / "other", tmp_path / "whole"))


def test_resume_accepts_what_changes_no_step(tiny, whole, tmp_path):
    train.main(tiny(tmp_path / "here", stop_at=5))
    (tmp_path / "here").rename(tmp_path / "there")
    train.main(tiny(tmp_path / "there", resume=True, eval_interval=3, eval_iters=1, log_interval=1,
                    checkpoint_interval=1, sample_tokens=4, gradient_noise=True))
    assert all(re.match("metrics/.* val/", name) for name in changed(tmp_path / "there", whole("ngpt")))


def test_run_folder_is_not_overwritten(tiny, whole, tmp_path, capsys):
    """To resume a finished run is no error: a job that is started again until it exits with 0 must end."""
    folder = whole("ngpt")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert f"out_dir={folder} holds a run; continue it with --resume" in refusal(tiny(folder))
    for changes, says in (({}, "is complete, at step 10"), ({"stop_at": 5}, "is complete, at step 10")):
        capsys.readouterr()
        assert train.main(tiny(folder, resume=True, **changes)) is None
        assert says in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for damaged in ((folder / "ckpt.pt").read_bytes()[:-100], b"", b"{}"):
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        assert "ckpt.pt: not a checkpoint of this code" in refusal(tiny(tmp_path, resume=True))


# ---------------------------------------------------------------- what befalls a run

@pytest.fixture
def half(tiny, tmp_path):
    """A run that stopped at step 5, with a checkpoint."""
    train.main(tiny(tmp_path / "half", stop_at=5))
    return tmp_path / "half"


def tried(work, before=lambda: None):
    """(exit status, the line it said, or nothing) of a forked process; a traceback is an error."""
    status, said = Process(work, before).end()
    assert status != stress.BUG and (not said or stress.one_line(said)), said
    return status, said


def test_metrics_survive_what_befalls_a_resume(tiny, whole, half):
    """They are written anew then: by a process that is killed meanwhile, or on a disk that is full."""
    before, argv = (half / "metrics.jsonl").read_bytes(), tiny(half, resume=True)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    assert tried(lambda: train.main(argv), lambda: setattr(os, "fsync", die))[0] == -signal.SIGKILL
    assert (half / "metrics.jsonl").read_bytes() == before and list(half.glob("metrics.*.tmp.jsonl"))
    limit = len(before) // 2
    status, said = tried(lambda: train.main(argv),
                         lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert (status, said) == (1, f"train.py: {half}/metrics.jsonl: File too large\n")
    assert (half / "metrics.jsonl").read_bytes() == before
    assert not list(half.glob("*.tmp*"))            # neither this process's, nor what was left of the other
    train.main(argv)
    assert changed(half, whole("ngpt")) == set()


def test_single_flipped_bits_of_a_checkpoint_are_noticed(half):
    """Each is refused, or lies where nothing is read."""
    raw, dice, refused = (half / "ckpt.pt").read_bytes(), random.Random(0), 0
    sound, passed = dict(leaves(train.load_checkpoint(half / "ckpt.pt"))), 0
    for _ in range(60):
        at = dice.randrange(len(raw))
        (half / "ckpt.pt").write_bytes(raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1:])
        try:
            assert dict(leaves(train.load_checkpoint(half / "ckpt.pt"))) == sound
        except UserError as error:
            assert str(half / "ckpt.pt") in str(error) and "\n" not in str(error)
            refused += 1
        try:
            passed += dict(leaves(torch.load(half / "ckpt.pt"))) != sound
        except Exception:
            pass
    assert refused > 50 and passed > 20             # control: torch alone lets many through


def mount(folder, size, read_only):
    """Put a file system in memory in place of the folder, with all that is in it, for this process alone: in
    name spaces of its own a user may do so too."""
    libc, name = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    if libc.unshare(0x10000000 | 0x00020000):       # CLONE_NEWUSER | CLONE_NEWNS
        os._exit(77)
    for file, text in maps.items():
        Path("/proc/self", file).write_text(text)
    inside = files_of(folder)
    if libc.mount(b"tmpfs", name, b"tmpfs", 0, f"size={size}".encode()):
        os._exit(77)
    for file, content in inside.items():
        (folder / file).write_bytes(content)
    if read_only and libc.mount(b"tmpfs", name, b"tmpfs", 1 | 32, b""):         # MS_RDONLY | MS_REMOUNT
        os._exit(77)


@pytest.mark.parametrize("size, read_only, says", [
    ("700k", False, "ckpt.pt: No space left on device; the checkpoint of step 5 is whole in"),
    ("9m", True, "log.txt: Read-only file system")])
def test_a_full_and_a_read_only_disk(tiny, half, size, read_only, says):
    """Real ones: with room for one checkpoint but not for two, and with none."""
    before = files_of(half)
    assert 350_000 < len(before["ckpt.pt"]) < 650_000

    def work():
        try:
            train.main(tiny(half, resume=True))
        finally:
            after = files_of(half)
            assert after.keys() == before.keys() and after["ckpt.pt"] == before["ckpt.pt"]
            rows = before["metrics.jsonl"].splitlines()         # but for the evaluation of step 5, made anew
            assert after["metrics.jsonl"].splitlines()[:len(rows) - 1] == rows[:-1]
    status, said = Process(work, lambda: mount(half, size, read_only)).end()
    if status == 77:
        pytest.skip("no mount without root here")
    assert status == 1 and stress.one_line(said) and f"train.py: {half}/" in said and says in said


@pytest.mark.parametrize("out_dir, says", [
    ("FILE", "FILE: File exists"), ("FILE/run", "FILE/run: Not a directory"),
    ("/dev/null", "/dev/null: File exists"), ("/proc/run", "/proc/run: No such file or directory"),
    ("x" * 300, "File name too long"), ("a/" * 2500, "text of 4096 letters")])
def test_an_out_dir_that_cannot_be_is_one_line(tiny, tmp_path, monkeypatch, out_dir, says):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("mine")
    assert says in refusal(tiny(out_dir)) and Path("FILE").read_text() == "mine"


def test_data_that_cannot_be_read_is_one_line(tiny, dataset, tmp_path):
    """A file that exists and opens, and whose first byte is an error of the disk, for root as well."""
    data = shutil.copytree(dataset, tmp_path / "data")
    (data / "train.bin").unlink()
    (data / "train.bin").symlink_to("/proc/self/mem")
    assert refusal(tiny(tmp_path / "run", dataset=data)).endswith("data/train.bin: Input/output error")
    assert "File name too long" in refusal(tiny(tmp_path / "run", dataset="A" * 300))


def weights(**changes):
    return lambda saved: saved["model"].update({name.replace("_", "."): t for name, t in changes.items()})


def state(number, **changes):
    return lambda saved: saved["optimizer"]["state"][number].update(changes)


def less(*keys):
    def damage(saved):
        *way, last = keys
        for key in way:
            saved = saved[key]
        saved.pop(last)
    return damage


CONTENTS = {                                        # of a checkpoint whose every bit is in order
    "nothing": (lambda saved: saved.clear(), "its model is missing"),
    **{f"no {key}": (less(key), f"its {key} is missing") for key in ABOUT | TENSORS if key != "rows"},
    "step -5": (lambda saved: saved.update(step=-5), "step -5"),
    "step 2.5": (lambda saved: saved.update(step=2.5), "its step is missing"),
    "another step": (lambda saved: saved.update(step=4), "step 4 is not that of its optimizer, 5"),
    "a weight less": (less("model", "head.weight"), "model.head.weight is missing"),
    "a weight more": (weights(x=torch.ones(2)), "model.x is missing, or should not be there"),
    "another shape": (weights(head_weight=torch.ones(2)), "model.head.weight must be (256, 32)"),
    "no tensor": (weights(head_weight=5), "model.head.weight must be (256, 32)"),
    "a moment's shape": (state(1, exp_avg=torch.ones(7)), "optimizer.state.1.exp_avg must be (96, 32)"),
    "no state": (lambda saved: saved["optimizer"]["state"].clear(), "optimizer.state.0 is missing"),
    "no moment": (less("optimizer", "state", 2, "exp_avg"), "optimizer.state.2.exp_avg is missing"),
    "other groups": (less("optimizer", "param_groups", 1), "optimizer.param_groups must be"),
    "other betas": (lambda saved: saved["optimizer"]["param_groups"][0].update(betas=(0.5, 0.5)),
                    "optimizer.param_groups.0.betas.0 must be 0.9"),
    "config": (lambda saved: saved["config"].update(n_embd="many"), "n_embd=32 but the run"),
    "a tensor": (lambda saved: saved["config"].update(n_embd=torch.ones(3)), "or its config"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_checkpoint_of_other_contents_is_one_line(tiny, half, name):
    damage, says = CONTENTS[name]
    saved = train.load_checkpoint(half / "ckpt.pt")
    damage(saved)
    torch.save(saved, half / "ckpt.pt")
    before = files_of(half)
    line = refusal(tiny(half, resume=True))
    assert says in line and str(half) in line and files_of(half) == before
    torch.save([], half / "ckpt.pt")
    assert "its model is missing" in refusal(tiny(half, resume=True))


ROWS = {                                            # damage of metrics.jsonl, the line of it, what is said
    "no JSON": (lambda rows: [*rows[:2], "{]", *rows[3:]], 3, "no JSON object"),
    "no object": (lambda rows: ["5", *rows[1:]], 1, "no JSON object"),
    "nested": (lambda rows: [*rows[:1], "[" * 10**5, *rows[2:]], 2, "no JSON object"),
    "NaN": (lambda rows: [rows[0].replace("5.", "NaN, \"x\": 5.", 1), *rows[1:]], 1, "no JSON object"),
    "infinite": (lambda rows: [*rows[:1], '{"step": 0, "loss": 1e999}', *rows[2:]], 2, "not the numbers"),
    "text": (lambda rows: [*rows[:1], '{"step": "0", "loss": 1}', *rows[2:]], 2, "not the numbers"),
    "no step": (lambda rows: [*rows[:1], '{"loss": 1}', *rows[2:]], 2, "not the numbers"),
    "order": (lambda rows: [*rows[:2], rows[4], *rows[3:]], 3, "step 3 stands where 1 should"),
    "a row less": (lambda rows: [*rows[:2], *rows[3:]], 3, "step 2 stands where 1 should"),
    "other number": (lambda rows: [*rows[:2], rows[2].replace('"loss": 5', '"loss": 4'), *rows[3:]], 0,
                     "damaged, not what the checkpoint of step 5 saw"),
    "cut": (lambda rows: rows[:4], 0, "damaged, not what the checkpoint of step 5 saw"),
}


@pytest.mark.parametrize("name", ROWS)
def test_damaged_metrics_are_one_line_with_the_place(tiny, half, name):
    damage, number, says = ROWS[name]
    path = half / "metrics.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(damage(rows)) + "\n")
    assert path.read_text().splitlines() != rows
    before = files_of(half)
    line = refusal(tiny(half, resume=True))
    assert f"{path}{f', line {number}' if number else ''}: " in line and says in line
    assert files_of(half) == before


def test_a_last_row_that_a_kill_cut_is_made_anew(tiny, whole, half):
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 5.1')
    train.main(tiny(half, resume=True))
    assert changed(half, whole("ngpt")) == set()


def test_two_runs_never_share_a_folder(tiny, whole, tmp_path):
    """The lock goes with its process, however that ends."""
    argv = tiny(tmp_path, checkpoint_interval=1)
    rate = train.learning_rate
    process = Process(lambda: train.main(argv), lambda: setattr(
        train, "learning_rate", lambda c, step: (time.sleep(0.1), rate(c, step))[1]))
    while not (tmp_path / "ckpt.pt").exists():
        time.sleep(0.01)
    line = refusal(tiny(tmp_path, resume=True))
    assert f"{tmp_path}: another process is at work there" in line
    os.kill(process.pid, signal.SIGKILL)
    assert process.end() == (-signal.SIGKILL, "")
    train.main(tiny(tmp_path, resume=True))
    assert changed(tmp_path, whole("ngpt")) == set()
    lines = Lines(tmp_path / "log.txt", alone=True)
    with pytest.raises(UserError, match="another process is at work there"):    # in one process too
        Lines(tmp_path / "log.txt", alone=True)
    lines.close()
    Lines(tmp_path / "log.txt", alone=True).close()


def test_what_a_rank_keeps_of_a_model():
    """In bytes, by hand: 4 each for weights, gradients and two moments. zero2 parts the moments; fsdp all,
    but weights and gradients of the largest block, and of what is no block, are there whole."""
    attention, mlp = 64 * (1 + 4 * 64), 64 * (1 + 2 * 192)                      # with the weights of a norm
    others = 2 * 256 * 64 + 64                      # embedding, head and the last norm
    n = attention + mlp + others
    with torch.device("meta"):
        sizes = build(ModelConfig(arch="gpt", pattern="*-", n_embd=64, n_head=2, n_ffn=192, vocab_size=256))
    assert sum(p.numel() for p in sizes.parameters()) == n
    for ranks in (1, 2, 4, 8):
        assert rank_bytes("ddp", sizes, ranks) == 16 * n
        assert rank_bytes("zero2", sizes, ranks) == 8 * n + 8 * n / ranks
        whole = 8 * (mlp + others)
        assert rank_bytes("fsdp", sizes, ranks) == whole + (16 * n - whole) / ranks
    assert rank_bytes("zero2", sizes, 1) == rank_bytes("fsdp", sizes, 1) == 16 * n
    assert rank_bytes("fsdp", sizes, 4) < rank_bytes("zero2", sizes, 4) < rank_bytes("ddp", sizes, 4)


def test_a_model_that_does_not_fit_is_refused(tiny, tmp_path, monkeypatch):
    """To the byte. What ranks on one machine need is there several times."""
    c = load_config(tiny(tmp_path, vocab_size=256))
    sizes, cpu = outline(c.model), torch.device("cpu")
    need = rank_bytes("ddp", sizes, 1)
    for free, beside, fits in ((need, 1, True), (need - 1, 1, False), (None, 1, True), (2 * need, 2, True),
                               (2 * need - 1, 2, False)):
        monkeypatch.setattr(train, "free_bytes", lambda device, free=free: free)
        ranks = SimpleNamespace(world=beside, beside=beside)
        if fits:
            train.check_memory(c, sizes, cpu, ranks)
            continue
        with pytest.raises(UserError, match="GiB of a rank, .* GiB are free here; .*--parallel=fsdp"):
            train.check_memory(c, sizes, cpu, ranks)


def test_only_what_a_machine_can_hold_is_begun(tiny, tmp_path, monkeypatch):
    line = refusal(tiny(tmp_path, n_embd=2**18, n_head=8))
    assert "weights, gradients and Adam's moments take" in line and "free here; take more ranks" in line
    assert not list(tmp_path.iterdir())
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        def fail(*_, error=error):
            raise error
        monkeypatch.setattr(train, "update", fail)
        line = refusal(tiny(tmp_path / type(error).__name__))
        assert "out of memory; lower batch_size=4 (and raise gradient_accumulation_steps)" in line
    monkeypatch.setattr(train, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):          # a mistake of ours keeps its traceback
        train.main(tiny(tmp_path / "bug"))


def test_a_second_signal_ends_at_once(tiny, tmp_path):
    """In an operation of minutes, in which Python itself would not look for signals; within a moment, two are
    one."""
    def busy(*_):
        while True:
            torch.mm(big, big)
    big = torch.ones(8000, 8000)                    # 10^12 operations: many seconds on one core
    process = Process(lambda: train.main(tiny(tmp_path)), lambda: setattr(train, "update", busy))
    while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    for pause in (0.05, 0.5, 0.0):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(pause)
    started = time.monotonic()
    status, said = process.end()
    assert status == 128 + signal.SIGTERM and time.monotonic() - started < 3
    assert said == "SIGTERM: stopping after this step; once more to stop at once\n"


def test_ignored_signals_stay_ignored(tiny, tmp_path):
    """As under nohup."""
    handlers = []

    def update(*args):
        handlers.append(signal.getsignal(signal.SIGHUP))
        return original(*args)
    original, before = train.update, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", update)
        train.main(tiny(tmp_path, max_steps=1))
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN and handlers == [signal.SIG_IGN]


@pytest.mark.parametrize("console", ["a pipe that nobody reads", "/dev/full"])
def test_a_run_whose_console_is_gone_ends_with_a_checkpoint(tiny, whole, tmp_path, console):
    def close():
        if console == "/dev/full":
            os.dup2(os.open(console, os.O_WRONLY), 1)
        else:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
    assert tried(lambda: train.main(tiny(tmp_path)), close) == (train.STOPPED, "")
    said = (tmp_path / "log.txt").read_text()
    assert "the console is closed: stopped at step 0; continue with --resume" in said
    train.main(tiny(tmp_path, resume=True))
    assert changed(tmp_path, whole("ngpt")) == set()


def test_interrupted_start_up_says_nothing(tmp_path):
    process = start(REPO / "train.py", "--out_dir=none", cwd=tmp_path)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():      # among its imports
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (-signal.SIGINT, "", "")


def test_a_loop_until_done_ends(tiny, whole, tmp_path):
    """What a cluster's queue does: the same command until it exits with 0; here each step is interrupted."""
    def stop():
        rate = train.learning_rate
        train.learning_rate = lambda c, step: (os.kill(os.getpid(), signal.SIGHUP), rate(c, step))[1]
    train.main(tiny(tmp_path, stop_at=6))
    ends = [Process(lambda: train.main(tiny(tmp_path, resume=True)), stop).end()[0] for _ in range(5)]
    assert ends == [train.STOPPED] * 3 + [0] * 2 and changed(tmp_path, whole("ngpt")) == set()


def test_a_run_is_sampled_with_its_own_tokenizer(tiny, dataset, half, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    train.main(tiny(tmp_path / "run", dataset=data, stop_at=1))
    load_model(tmp_path / "run")
    (data / "tokenizer.json").write_text('{"name": "gpt2"}')
    for load in (load_model, train.load_run):
        with pytest.raises(UserError, match="json: gpt2 is not the tokenizer of the run, bytes, a test"):
            load(tmp_path / "run")


# ---------------------------------------------------------------- ranks

def torchrun(folder, argv):
    (folder / "driver.py").write_text(EAGER + TRAIN)
    status, out, err = finish(start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                    folder / "driver.py", *argv))
    assert status == 0, err
    assert out.count("converted ") == 1             # only the first rank speaks


@pytest.mark.long
def test_an_error_of_one_rank_ends_both_in_order(tiny, tmp_path):
    """The first cannot write; the other learns of it, and both leave the group they talk through."""
    leave = f"""
import pathlib, torch.distributed as dist
def leave(real=dist.destroy_process_group):
    real()
    pathlib.Path({str(tmp_path)!r}, "left" + os.environ["RANK"]).touch()
    deadline = time.time() + 30                     # torchrun ends the other as soon as one has ended
    while len([*pathlib.Path({str(tmp_path)!r}).glob("left?")]) < 2 and time.time() < deadline:
        time.sleep(0.05)
dist.destroy_process_group = leave
"""
    (tmp_path / "driver.py").write_text(EAGER + leave + TRAIN)
    (tmp_path / "file").write_text("")
    status, _, err = finish(start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                  tmp_path / "driver.py",
                                  *tiny(tmp_path / "file", gradient_accumulation_steps=2)))
    assert status == 1 and {path.name for path in tmp_path.glob("left?")} == {"left0", "left1"}
    assert err.count("train.py: ") == 1 and f"train.py: {tmp_path / 'file'}: File exists" in err


@pytest.mark.parametrize("kind", ["hybrid", *(pytest.param(kind, marks=pytest.mark.long) for kind in (
    "all random", "late switch", "dge, occ, experts"))])            # those in parts: tests/test_ranks.py
def test_two_ranks_equal_two_micro_batches(tiny, whole, tmp_path, kind):
    """One process computes a/2 + b/2, two ranks (a + b)/2: of the loss, of every gradient.

    error   0. Halving is exact in floating point, NVFP4's scales follow it exactly, and the sum of two
            numbers has one order. So all agrees bit for bit, all kinds of random choices included, and the
            load of experts, too, which is counted over all ranks.
    """
    torchrun(tmp_path, tiny(tmp_path / "ranks", **RUNS[kind]))
    assert changed(tmp_path / "ranks", whole(kind)) == set()


@pytest.mark.parametrize("wrong", [lambda real: lambda model, seed, step, micro=0: real(model, seed, step),
                                   lambda real: lambda model, seed, *where: real(model, seed + 1, *where)],
                         ids=["ranks with the same noise", "another seed"])
def test_control_wrong_noise_of_ranks_is_noticed(tiny, tmp_path, monkeypatch, wrong):
    two = {"gradient_accumulation_steps": 2}        # one process: it draws what such ranks would draw
    train.main(tiny(tmp_path / "right", **two))
    monkeypatch.setattr(nvfp4, "set_step", wrong(nvfp4.set_step))
    train.main(tiny(tmp_path / "wrong", **two))
    found = changed(tmp_path / "wrong", tmp_path / "right")
    assert parts(found) == {"model", "optimizer", "metrics"}
    assert {"metrics/0/grad_norm", "metrics/1/loss", "metrics/9/loss"} <= found


def test_two_ranks_equal_four_micro_batches_to_summation_order(tiny, tmp_path, monkeypatch):
    """((a + b) + c) + d in one process, (a + c) + (b + d) on two ranks; at learning rate 0, where a
    difference cannot grow.

    error   u = 2^-24. A sum of four positive terms errs by 3u in any order, the divisions by 4 not at all:
            6u between two losses. Sums of gradients err by 3u (|a| + |b| + |c| + |d|) an element, of norm
            4 |g| at most unless the four cancel: 24u between two norms; and 16u for computing the norms.
    """
    four = {"gradient_accumulation_steps": 4, "learning_rate": 0, "max_steps": 4, "eval_iters": 1}
    train.main(tiny(tmp_path / "one", **four))
    torchrun(tmp_path, tiny(tmp_path / "ranks", **four))
    noise, starts = nvfp4.set_step, train.train_starts
    monkeypatch.setattr(nvfp4, "set_step", lambda *where: noise(*where[:3], *(m // 2 for m in where[3:])))
    monkeypatch.setattr(train, "train_starts", lambda *where: starts(*where)[[0, 1, 2, 2]])
    train.main(tiny(tmp_path / "wrong", **four))    # control: noise shared by two, data read twice
    one, ranks, wrong = (metrics(tmp_path / name, "loss") for name in ("one", "ranks", "wrong"))
    for key, bound in (("loss", 6 * 2**-24), ("grad_norm", 40 * 2**-24)):
        assert all(abs(b[key] / a[key] - 1) <= bound for a, b in zip(one, ranks, strict=True)), key
        assert all(abs(b[key] / a[key] - 1) > bound for a, b in zip(one, wrong, strict=True)), "control"


# ---------------------------------------------------------------- the command itself

def test_commands_in_real_processes(tmp_path):
    """From another folder; a mistake is one line on stderr, nothing on stdout, and exit status 1."""
    (tmp_path / "bad.py").write_text("lerning_rate = 1\n")
    commands = {
        ("configs/ngpt_tiny.py", "bad.py"): "bad.py: no field is called lerning_rate; did you mean learning",
        ("--resume", "--out_dir=none"): "none/ckpt.pt: no checkpoint there; train a run first",
        ("-h",): None,
    }
    for argv, message in commands.items():
        status, out, err = finish(start(REPO / "train.py", *argv, cwd=tmp_path))
        if message is None:
            assert (status, err) == (0, "") and out.startswith("Train a model")
        else:
            assert (status, out) == (1, "") and err.count("\n") == 1
            assert err.startswith(f"train.py: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.py"]
