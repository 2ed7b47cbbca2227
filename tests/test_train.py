"""Proofs for train.py and data/run.py: schedule, optimizer, and runs that are stopped, killed and resumed
without changing a bit.

The runs are real: tiny models in FP4 on the CPU, see runs.py. Nothing is compiled, which changes no bit
(tests/test_nvfp4.py) and saves minutes. What must be a process of its own is forked.
"""
import contextlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import graphs as graphs_file
import nvfp4
import train
from data.run import UserError, load_checkpoint
from data.tokens import batch_at, load_data, prepare, read_tokens, val_starts, write_tokens
from model import ModelConfig, build, flops_per_token, load_model, outline, rank_bytes
from ranks import tensors_of
from runs import (BUG, RUNS, Process, contents, die, differences, each_step, files_of, metrics,
                  one_line, ranks, refusal_of, wait_for)
from train import load_config, load_run, make_config, unflatten

CAN_COMPILE = nvfp4.can_compile                     # that of the module, which eager() replaces
pytestmark = pytest.mark.usefixtures("eager")

FILES = {"ckpt.pt", "config.json", "log.txt", "metrics.jsonl", "tokenizer.json"}


def refusal(argv):
    return refusal_of(train.main, argv)


def tried(work, before=lambda: None):
    """(exit status, the line it said, or nothing) of a forked process; a traceback is an error."""
    status, said = Process(work, before).end()
    assert status != BUG and (not said or one_line(said)), said
    return status, said


@pytest.fixture
def goes_on(tiny, whole):
    """Resume a run in a folder: it ends as the run that nobody stopped."""
    def resume(folder, kind="plain"):
        train.main(tiny(folder, **RUNS[kind], resume=True))
        assert differences(folder, whole(kind)) == set()
    return resume


@pytest.fixture
def hook(monkeypatch):
    """each_step() of runs.py, for this test."""
    monkeypatch.setattr(train, "training_step", train.training_step)            # to be put back at the end
    return each_step


def saved_step(folder):
    return load_checkpoint(folder / "ckpt.pt")["step"]


# ---------------------------------------------------------------- CUDA graphs

class Recorded:
    """Plays a CUDA graph where there is none. Recording leaves no trace; a replay does the work in the memory
    and by the attributes that layers had then. What was not copied there it does not see."""
    run = None

    def __init__(self, work, pool):
        self.work, self.layers = work, nvfp4.fp4_layers(self.run.model)
        self.gradients = [p.grad for p in self.run.model.parameters()]
        self.there = [dict(vars(m)) for m in self.layers]
        before = [g.clone() for g in self.gradients]
        self.result = work()
        torch._foreach_copy_(self.gradients, before)

    def replay(self):
        assert all(p.grad is g for p, g in zip(self.run.model.parameters(), self.gradients, strict=True))
        now, real = [dict(vars(m)) for m in self.layers], nvfp4.FP4Linear.current_weight
        for m, there in zip(self.layers, self.there, strict=True):
            vars(m).update(there)
        try:
            nvfp4.FP4Linear.current_weight = lambda m: m.quantized or real(m)
            for old, new in zip(tree_leaves(self.result), tree_leaves(self.work()), strict=True):
                old.copy_(new)
        finally:
            nvfp4.FP4Linear.current_weight = real
            for m, later in zip(self.layers, now, strict=True):
                vars(m).update(later)


@pytest.fixture
def graphs(monkeypatch):
    """A function from which on micro-batches are captured. It returns their shapes, a list that grows."""
    made = []

    class Graph(graphs_file.Graph):
        def __init__(self, run, shape, work):
            Recorded.run = run
            made.append(shape)
            super().__init__(run, shape, work)

    def capture(work, pool):
        recorded = Recorded(work, pool)
        return recorded, recorded.result

    def begin():
        monkeypatch.setattr(graphs_file, "Graph", Graph)
        monkeypatch.setattr(graphs_file, "capture", capture)
        monkeypatch.setattr(graphs_file, "why_no_graph", lambda run: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        return made
    return begin


@pytest.mark.parametrize("kind, captured", [("plain", 1), ("ngpt", 1), ("gpt, all random", 2)])
def test_graphs_change_no_bit(tiny, whole, tmp_path, graphs, kind, captured):
    """Of weights, moments and metrics: new tokens, keys and weights reach what was recorded, and gradients
    add up. A recipe that changes on the way is recorded anew."""
    right, made = whole(kind), graphs()
    train.main(tiny(tmp_path, **RUNS[kind]))
    assert differences(tmp_path, right) == set() and made == captured * [(2, 32)]


@pytest.mark.parametrize("forgotten", ["idx", "keys", "weights"])
def test_control_what_is_not_copied_is_noticed(tiny, whole, tmp_path, monkeypatch, graphs, forgotten):
    right, replay = whole("gpt, all random"), graphs_file.Graph.replay
    graphs()

    def wrong(graph, idx, targets):
        if forgotten == "idx":
            idx = graph.idx
        if forgotten == "keys":
            graph.keys = [keys.clone() for keys in graph.keys]
        if forgotten == "weights" and graph.drawn:
            graph.drawn = graph.layers[0].drawn
        return replay(graph, idx, targets)
    monkeypatch.setattr(graphs_file.Graph, "replay", wrong)
    train.main(tiny(tmp_path, **RUNS["gpt, all random"]))
    assert "metrics/4/loss" in differences(tmp_path, right)


def test_a_graph_follows_a_change_of_length(tiny, tmp_path, monkeypatch, graphs):
    """A curriculum, which changes sequence_length() alone: short, long, short again."""
    monkeypatch.setattr(train, "sequence_length", lambda c, step: 16 if step < 3 or step > 6 else 32)
    train.main(tiny(tmp_path / "none", max_steps=9))
    made = graphs()
    train.main(tiny(tmp_path / "graphs", max_steps=9))
    assert differences(tmp_path / "graphs", tmp_path / "none") == set()
    assert made == [(2, 16), (2, 32), (2, 16)]


def test_what_cannot_be_a_graph_says_why():
    def why(device="cuda", sharded=False, **settings):
        c = make_config({"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64} | settings)
        model = nvfp4.convert(outline(c.model), c.fp4, report=lambda line: None)
        return graphs_file.why_no_graph(SimpleNamespace(
            c=c, model=model, device=torch.device(device), ranks=SimpleNamespace(sharded=sharded)))
    for settings in ({}, {"recipe": "nvfp4"}, {"recipe": "bf16"}, {"recipe": "tetrajet2"}):
        assert why(**settings) is None
    for settings, says in (({"device": "cpu"}, "a GPU"), ({"compile": False}, "--compile"),
                           ({"cuda_graph": False}, "--cuda_graph"), ({"sharded": True}, "ranks exchange"),
                           ({"document_start": 3}, "documents"), ({"pattern": "E*"}, "experts wait"),
                           ({"recipe": "quartet2"}, "no kernels for ms_eden, nvfp4_46")):
        assert says in why(**settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["plain", "ngpt", "gpt, all random"])
def test_graphs_on_a_gpu_change_no_bit(tiny, tmp_path, monkeypatch, kind):
    settings = RUNS[kind] | {"device": "cuda", "compile": True, "deterministic": True, "max_steps": 20}
    train.main(tiny(tmp_path / "graphs", **settings))
    assert "are a CUDA graph" in (tmp_path / "graphs/log.txt").read_text()
    monkeypatch.setattr(train, "graph_of", lambda *_: None)
    train.main(tiny(tmp_path / "none", **settings))
    assert differences(tmp_path / "graphs", tmp_path / "none") == set()


# ---------------------------------------------------------------- schedule and optimizer

WSD = {"learning_rate": 1.0, "min_lr": 0.1, "max_steps": 100, "warmup_steps": 10, "decay_fraction": 0.2}
COSINE = WSD | {"schedule": "cosine"}


@pytest.mark.parametrize("settings, step, value", [
    (WSD, 0, 0.1), (WSD, 4, 0.5), (WSD, 9, 1.0), (WSD, 10, 1.0), (WSD, 80, 1.0),
    (WSD, 85, 0.1 + 0.9 * 0.5), (WSD, 90, 0.1 + 0.9 * (1 - 0.5**0.5)), (WSD, 100, 0.1),
    (COSINE, 0, 0.1), (COSINE, 9, 1.0), (COSINE, 10, 1.0), (COSINE, 55, 0.55), (COSINE, 100, 0.1),
    (COSINE, 32.5, 0.1 + 0.9 * (1 + 0.5**0.5) / 2), (COSINE | {"warmup_steps": 0}, 0, 1.0),
    (WSD | {"decay_fraction": 0.0}, 99, 1.0), (WSD | {"decay_fraction": 1.0}, 25, 0.55),
    (WSD | {"warmup_steps": 100}, 49, 0.5), (WSD | {"warmup_steps": 100}, 95, 0.1 + 0.9 * (1 - 0.75**0.5)),
    (WSD | {"warmup_steps": 85}, 82, 0.1 + 0.9 * (1 - 0.1**0.5)), (WSD | {"min_lr": None}, 100, 1 / 50)])
def test_learning_rate(settings, step, value):
    assert train.learning_rate(make_config(settings), step) == pytest.approx(value, rel=1e-12)


def test_warm_up_and_decay_meet_without_a_jump():
    c = make_config(WSD | {"warmup_steps": 95})
    rates = [train.learning_rate(c, step) for step in range(101)]
    assert max(abs(b - a) for a, b in zip(rates, rates[1:], strict=False)) < 0.25     # a root begins steeply
    with pytest.raises(UserError, match="^min_lr=2.0 must be learning_rate=1.0 at most"):
        make_config(WSD | {"min_lr": 2.0})


@pytest.mark.parametrize("settings", [{"arch": "ngpt"}, {"arch": "gpt", "activation": "swiglu"}], ids=str)
def test_weight_decay_is_for_matrices_in_their_order(settings):
    """Optimizer state is saved by position: the order of the parameters is part of the checkpoint."""
    c = make_config(settings | {"n_layer": 2, "n_embd": 32, "vocab_size": 64, "weight_decay": 0.1})
    for model in (build(c.model), nvfp4.convert(build(c.model), c.fp4, report=lambda line: None)):
        decayed, others = train.make_optimizer(model, c).param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
        for group, n_dim in ((decayed, 2), (others, 1)):
            expected = [p for p in model.parameters() if p.dim() == n_dim]
            assert all(a is b for a, b in zip(expected, group["params"], strict=True))


# ---------------------------------------------------------------- a run

@pytest.mark.parametrize("arch", ["ngpt", "gpt"])
def test_run_folder(tiny, dataset, tmp_path, monkeypatch, capsys, arch):
    shutil.copytree(dataset, tmp_path / "data")
    ids, _ = read_tokens(dataset / "val.bin")       # as if a token were three bytes
    write_tokens(tmp_path / "data" / "val.bin", ids, 256, "bytes", "a test", 3 * len(ids))
    saves, save = [], train.save
    monkeypatch.setattr(train, "save", lambda run, step: saves.append(step) or save(run, step))
    seeds, noise = set(), nvfp4.set_step
    monkeypatch.setattr(nvfp4, "set_step", lambda model, seed, *where: (
        seeds.add(seed), noise(model, seed, *where)))
    out = tmp_path / "deep" / "run"
    argv = tiny(out, dataset=tmp_path / "data", arch=arch, warmup_steps=3, gradient_accumulation_steps=2,
                batch_size=4, eval_iters=2, checkpoint_interval=3, dtype="float32", sample_tokens=8,
                weight_decay=0.1, beta1=0.8, seed=5)
    train.main(argv)
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "log.txt").read_text() == said and "\nsample, begun by 8 " in said
    assert saves == [3, 6, 9, 10] and saved_step(out) == 10 and seeds == {5}
    c = load_config([*argv, "--vocab_size=256"])    # the dataset's
    assert unflatten(json.loads((out / "config.json").read_text())) == c

    steps, evaluations = metrics(out, "loss"), metrics(out, "val_loss")
    assert [set(row) for row in steps] == [{"step", "loss", "lr", "grad_norm", "tokens", "ms"}] * 10
    assert [(row["step"], row["tokens"]) for row in steps] == [(i, (i + 1) * 2 * 4 * 32) for i in range(10)]
    assert [row["lr"] for row in steps] == [train.learning_rate(c, i) for i in range(10)]
    assert abs(steps[0]["loss"] - math.log(256)) < 0.1 and all(0 < row["grad_norm"] < 10 for row in steps)
    assert [set(row) for row in evaluations] == [{"step", "val_loss", "val_bpb", "val_loss_fp4"}] * 4
    assert [row["step"] for row in evaluations] == [0, 4, 8, 10] and len(metrics(out)) == 14
    assert all(row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2) / 3) for row in evaluations)

    matrices, vectors = load_checkpoint(out / "ckpt.pt")["optimizer"]["param_groups"]
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


@pytest.mark.parametrize("largest", [0.0, 0.1, 1e3])
def test_the_gradient_is_clipped_as_a_whole(tiny, tmp_path, monkeypatch, largest):
    """The norm in the log is that before clipping, of all parameters together; 0 clips nothing."""
    norms, step = [], torch.optim.AdamW.step

    def norm(self, *rest):
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum())
                                   for group in self.param_groups for p in group["params"])))
        return step(self, *rest)
    monkeypatch.setattr(torch.optim.AdamW, "step", norm)
    train.main(tiny(tmp_path, grad_clip=largest, max_steps=3))
    logged = [row["grad_norm"] for row in metrics(tmp_path, "loss")]
    assert all(n > 0.1 for n in logged)             # so that 0.1 clips
    wanted = [largest] * 3 if largest == 0.1 else logged
    assert norms == pytest.approx(wanted, rel=1e-4)


def test_a_warm_up_that_does_not_fit_is_shortened_and_said(tiny, tmp_path, capsys):
    train.main(tiny(tmp_path, max_steps=4, warmup_steps=40, stop_at=2))
    assert capsys.readouterr().out.count("warmup_steps=40 shortened to max_steps=4\n") == 1
    train.main(tiny(tmp_path, max_steps=4, warmup_steps=40, resume=True))
    assert [row["lr"] for row in metrics(tmp_path, "loss")] == [0.0025, 0.005, 0.0075, 0.01]


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
    counters = torch._dynamo.utils.counters
    counters.clear()
    train.main(tiny(tmp_path, max_steps=1, sample_tokens=2))
    assert not counters["frames"] and not counters["stats"]
    machine = capsys.readouterr().out.splitlines()[1]
    assert machine.startswith("cpu") and "not fused, which is several times slower (the compi" in machine
    assert nvfp4.COMPILER.on                        # the run has left the compiler as it was
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))             # control: this is counted
    assert counters["frames"] and counters["stats"]


class Plus(torch.nn.Module):
    """A block with a graph of its own."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return x + self.n


def test_blocks_of_many_graphs_are_all_compiled(monkeypatch):
    """torch allows 8 graphs of one function, and keeps that limit thread by thread: here one that has not
    compiled yet, as the main thread of a run on a GPU, where the backward quantizes elsewhere."""
    model = build(ModelConfig(n_embd=32, n_head=2, vocab_size=32))
    model.blocks = torch.nn.ModuleList(map(Plus, range(10)))
    compiler, graphs = torch.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="eager", **options))
    monkeypatch.setattr(nvfp4, "can_compile", lambda kind: True)

    def main():
        torch._dynamo.reset()
        graphs.clear()
        assert train.compile_model(model, make_config({}))
        for block in model.blocks:
            block(torch.zeros(2))
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    assert graphs["unique_graphs"] == 10


@pytest.mark.parametrize("name, peak", (
    ("NVIDIA A100-SXM4-80GB", 312e12), ("A100-PCIE-40GB", 312e12), ("NVIDIA RTX A1000", None),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12), ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12),
    ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None)))
def test_peak_flops_of_a_gpu_s_exact_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train.peak_flops(torch.device("cuda", 0)) == peak
    assert train.peak_flops(torch.device("cpu")) is None


def test_deterministic_reaches_torch(tiny, tmp_path, monkeypatch, hook):
    """What attention, cuBLAS and indexing ask, while the run lasts; a run may be resumed with it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    hook(lambda run, step: seen.append((torch.are_deterministic_algorithms_enabled(),
                                        torch.is_deterministic_algorithms_warn_only_enabled(),
                                        os.environ.get("CUBLAS_WORKSPACE_CONFIG"))))
    train.main(tiny(tmp_path, max_steps=2, stop_at=1))
    train.main(tiny(tmp_path, max_steps=2, resume=True, deterministic=True))
    assert seen == [(False, False, None), (True, False, ":4096:8")]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_another_version_set_is_said(tiny, tmp_path, capsys):
    train.main(tiny(tmp_path, max_steps=2, stop_at=1))
    saved = load_checkpoint(tmp_path / "ckpt.pt")
    saved["config"]["fp4_old_field"] = "16x16"
    torch.save(saved, tmp_path / "ckpt.pt")
    capsys.readouterr()
    load_model(tmp_path)                            # whose business it is not
    assert capsys.readouterr() == ("", "")
    train.load_run(tmp_path)
    says = "made by another version of this code: fp4_old_field=16x16 is no field here"
    assert capsys.readouterr().err.startswith(f"{tmp_path}: {says}")
    assert f"{says}; finish it with that version" in refusal(tiny(tmp_path, max_steps=2, resume=True))
    assert saved_step(tmp_path) == 1


def test_documents_apart_is_a_run_s_own_choice(tiny, tmp_path):
    """-1 finds the token; it goes on bit for bit, and is not taken back by --resume."""
    text = ["".join(random.Random(seed).choices("ab c", k=60)) for seed in range(200)]
    prepare(text[:150], text[150:], tmp_path / "data", "a test", vocab_size=257)

    def flags(name, start=-1, **changes):
        return tiny(tmp_path / name, dataset=tmp_path / "data", batch_size=4, max_steps=4,
                    document_start=start, **changes)
    train.main(flags("apart"))
    train.main(flags("joined", None))
    assert "metrics/1/loss" in differences(tmp_path / "apart", tmp_path / "joined")
    assert [train.load_run(tmp_path / name)[2].model.document_start for name in ("apart", "joined")] == [
        256, None]
    train.main(flags("halves", stop_at=2))
    assert "document_start=None" in refusal(flags("halves", None, resume=True))
    train.main(flags("halves", resume=True))
    assert differences(tmp_path / "halves", tmp_path / "apart") == set()
    assert "has not; give a token" in refusal(tiny(tmp_path / "bytes", document_start=-1))
    assert "must be a token, from 0 to" in refusal(tiny(tmp_path / "far", document_start=256))


def gradients_of(folder, gemms, step):
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


def test_gradient_noise_is_that_of_the_backward(tiny, tmp_path):
    """The last evaluation by brute force, bit for bit: layers that never ran but in FP4 against others that
    never had a backward in FP4. The run itself, experts and their loads included, is untouched."""
    folder, settings = tmp_path / "noise", RUNS["hybrid"] | {"max_steps": 2}
    train.main(tiny(folder, **settings, gradient_noise=True))
    train.main(tiny(tmp_path / "plain", **settings))
    found = differences(folder, tmp_path / "plain")
    assert found and all(re.match(f"metrics/.* val/{train.NOISE}", name) for name in found)
    row, said = metrics(folder, "val_loss")[-1], (folder / "log.txt").read_text()

    def ratios(gemms, step=2):
        fp4, exact = (gradients_of(folder, gemms, step) for gemms in (gemms, ("fprop",)))
        return {train.NOISE + name: float(dw.std() / (fp4[name] - dw).std()) for name, dw in exact.items()}
    want = ratios(nvfp4.GEMMS)
    assert want == {name: ratio for name, ratio in row.items() if name.startswith(train.NOISE)}
    assert "blocks.1.mixer.experts.fc1" in " ".join(want) and all(0.1 < r < 100 for r in want.values())
    noisiest = min(want, key=want.get)
    assert f"gradient over noise {want[noisiest]:.2f} in {noisiest.removeprefix(train.NOISE)}\n" in said
    last = train.NOISE + "blocks.2.mixer.out"       # whose dy is exact: above it is the head
    for other, equal in ((ratios(nvfp4.GEMMS, step=1), []), (ratios(("fprop", "wgrad")), [last])):  # controls
        assert [name for name in want if other[name] == want[name]] == equal


@pytest.mark.parametrize("recipe, loss", [("bf16", set()), ("fp4_dge_occ", {"val_loss_fp4"})])
def test_where_fp4_is_not_it_is_not_evaluated(tiny, tmp_path, capsys, recipe, loss):
    """No FP4 loss without a layer in FP4, no noise without a backward in FP4; the latter was asked for."""
    train.main(tiny(tmp_path, recipe=recipe, max_steps=1, gradient_noise=True))
    assert "gradient_noise: no layer has its backward in FP4" in capsys.readouterr().out
    assert [set(row) for row in metrics(tmp_path, "val_loss")] == [{"step", "val_loss", "val_bpb"} | loss] * 2


def losses(folder):
    return [(row["loss"], row["grad_norm"]) for row in metrics(folder, "loss")]


def test_late_switch(tiny, whole, tmp_path, capsys):
    """The steps before it are the other run's bit for bit, the one after it is not; from the first step on,
    of all GEMMs, it is the bf16 run."""
    for switched in ("fprop", "dgrad,wgrad", "fprop,dgrad,wgrad"):
        train.main(tiny(tmp_path / switched, fp4_until=0.6, fp4_switched=switched))
        assert f"step 6: {switched} in high precision from now on" in capsys.readouterr().out
        want, got = losses(whole("plain")), losses(tmp_path / switched)
        assert got[:6] == want[:6] and got[6] != want[6]
    train.main(tiny(tmp_path / "bf16", recipe="bf16"))
    train.main(tiny(tmp_path / "at once", fp4_until=0, fp4_switched="fprop,dgrad,wgrad"))
    assert losses(tmp_path / "at once") == losses(tmp_path / "bf16") != want


@pytest.mark.parametrize("arch", ["ngpt", pytest.param("gpt", marks=pytest.mark.long)])
def test_one_batch_is_learnt_by_heart(tiny, tmp_path, monkeypatch, arch):
    starts = train.train_starts
    monkeypatch.setattr(train, "train_starts", lambda *where: starts(*where[:-1], 0))
    train.main(tiny(tmp_path, arch=arch, max_steps=60, learning_rate=2e-2, eval_interval=60))
    first, *_, last = [loss for loss, _ in losses(tmp_path)]
    assert first > 5.4 and last < 0.5
    assert metrics(tmp_path, "val_loss")[-1]["val_loss"] > 3    # control: but for a batch, ln 27 is the end


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "/no/such"}, "/no/such/train.bin: no such folder; run: python data/text/prepare.py"),
    ({"dataset": "A" * 300}, "File name too long"),
    ({"block_size": 2000}, "val.bin: 2000 tokens must be 2001 at least; lower block_size"),
    ({"vocab_size": 100}, "vocab_size=100 must be 256 at least"),
    ({"device": "cuda"}, "device=cuda must find a GPU"),
    ({"n_embd": 33}, "n_embd=33 must be a multiple of n_head=2"),
    ({"n_embd": 24}, "K=24 must be a multiple of 16 (nvfp4 block)"),
    ({"pattern": "*x"}, "pattern=*x must consist of"),
    ({"n_embd": 2**18, "n_head": 8}, "weights, gradients and Adam's moments take"),
], ids=lambda value: str(value)[:30])
def test_impossible_run_is_one_line(tiny, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refusal(tiny(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_on_stderr(tmp_path):
    """A command's mistake, or a file's; exit status 1."""
    (tmp_path / "bad.py").write_text("lerning_rate = 1\n")
    assert tried(lambda: train.main([str(tmp_path / "bad.py")])) == (
        1, f"train.py: {tmp_path}/bad.py: no field is called lerning_rate; did you mean learning_rate? "
           "(-h lists them)\n")


# ---------------------------------------------------------------- stop and resume

QUICK = ("gpt, all random", "hybrid")               # the others are of the same kind: -m long


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.long)
                                            for kind in RUNS if kind not in QUICK)])
def test_resume_is_bit_for_bit(tiny, whole, goes_on, tmp_path, kind):
    """In a new process: tests/test_ranks.py. It draws no weights: those of a billion take half a minute."""
    whole(kind)
    train.main(tiny(tmp_path, **RUNS[kind], stop_at=5))
    assert saved_step(tmp_path) == 5
    torch.manual_seed(0)                            # of another process, or none at all
    before = torch.get_rng_state()
    goes_on(tmp_path, kind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("owner, name, wrong", [
    (nvfp4, "set_step", lambda real: lambda model, seed, *where: real(model, seed + 1, *where)),
    (nvfp4, "set_step", lambda real: lambda model, seed, step, *micro: real(model, seed, step - 5, *micro)),
    (train, "train_starts", lambda real: lambda *where: real(*where[:-1], where[-1] - 5)),
    (torch.optim.AdamW, "load_state_dict", lambda real: lambda self, state: None),
], ids=["noise of another seed", "noise counted anew", "batches counted anew", "optimizer forgotten"])
def test_control_wrong_resume_is_noticed(tiny, whole, tmp_path, monkeypatch, owner, name, wrong):
    right = whole("plain")                          # made before anything is wrong
    train.main(tiny(tmp_path, stop_at=5))
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    train.main(tiny(tmp_path, resume=True))
    found = differences(tmp_path, right)
    assert {name.split("/")[0] for name in found} == {"model", "optimizer", "metrics"}
    assert "metrics/9/loss" in found and "metrics/4/loss" not in found


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long)])
def test_signalled_run_goes_on_bit_for_bit(tiny, goes_on, tmp_path, name):
    argv = tiny(tmp_path, checkpoint_interval=3)
    process = Process(lambda: train.main(argv),
                      lambda: each_step(lambda run, step: time.sleep(0.3 * (step > 1))))
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and '"step": 2' in
             (tmp_path / "metrics.jsonl").read_text())
    os.kill(process.pid, getattr(signal, name))
    status, said = process.end()
    step = saved_step(tmp_path)
    assert status == train.STOPPED == 75 and 2 < step < 10
    says = rf"{name}: stopping after this step \(one takes 0\.\d s\); once more to stop at once\n"
    assert re.fullmatch(says, said)
    log = (tmp_path / "log.txt").read_text()
    assert f"{name}: stopped at step {step}; continue with --resume" in log
    goes_on(tmp_path)


def die_before_the_rename():
    rename = os.replace
    os.replace = lambda new, old: die() if old.name == "ckpt.pt" and old.exists() else rename(new, old)


def die_in_half_a_file():
    save = torch.save

    def save_half(saved, file):
        save(saved, file)
        if saved["step"] == 6:
            file.truncate(file.tell() // 2)
            die()
    torch.save = save_half


@pytest.mark.parametrize("before", [die_in_half_a_file, die_before_the_rename], ids=lambda f: f.__name__)
def test_a_kill_during_a_save_leaves_the_checkpoint_before(tiny, goes_on, tmp_path, before):
    status, _ = Process(lambda: train.main(tiny(tmp_path, checkpoint_interval=3)), before).end()
    assert (status, saved_step(tmp_path)) == (-signal.SIGKILL, 3)
    assert metrics(tmp_path)[-1]["step"] == 5       # two steps that are lost and done again
    beside, = tmp_path.glob("ckpt.*.tmp.pt")
    if before is die_in_half_a_file:                # control: written in place, this would be it
        with pytest.raises(UserError, match="not a checkpoint of this code"):
            load_checkpoint(beside)
    goes_on(tmp_path)
    assert not beside.exists()


def test_a_second_signal_ends_at_once(tiny, tmp_path):
    """In an operation of minutes, in which Python itself would not look for signals; within a moment, two are
    one."""
    def busy(run, step):
        (tmp_path / "busy").touch()
        while True:
            torch.mm(big, big)
    big = torch.ones(8000, 8000)                    # 10^12 operations: many seconds on one core
    process = Process(lambda: train.main(tiny(tmp_path / "run")), lambda: each_step(busy))
    wait_for((tmp_path / "busy").exists)
    for pause in (0.05, 0.5, 0.0):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(pause)
    started = time.monotonic()
    status, said = process.end()
    assert status == 128 + signal.SIGTERM and time.monotonic() - started < 3
    assert said == "SIGTERM: stopping after this step; once more to stop at once\n"


def test_ignored_signals_stay_ignored(tiny, tmp_path, hook):
    """As under nohup. Handlers of others come back at the end."""
    handlers, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    mine = signal.getsignal(signal.SIGTERM)
    hook(lambda run, step: handlers.extend(map(signal.getsignal, (signal.SIGHUP, signal.SIGTERM))))
    train.main(tiny(tmp_path, max_steps=1))
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN is handlers[0]
    assert signal.getsignal(signal.SIGTERM) == mine != handlers[1]


def test_a_signal_before_the_first_step_ends_at_once(tiny, tmp_path):
    """There is nothing to be saved yet."""
    def load(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    ended = Process(lambda: train.main(tiny(tmp_path)), lambda: setattr(train, "load_data", load)).end()
    assert ended == (128 + signal.SIGTERM, "") and not list(tmp_path.iterdir())


def test_a_loop_until_done_ends(tiny, whole, tmp_path):
    """What a cluster's queue does: the same command until it exits with 0; here each step is interrupted."""
    train.main(tiny(tmp_path, stop_at=6))
    ends = [Process(lambda: train.main(tiny(tmp_path, resume=True)),
                    lambda: each_step(lambda run, step: os.kill(os.getpid(), signal.SIGHUP))).end()[0]
            for _ in range(5)]
    assert ends == [train.STOPPED] * 3 + [0] * 2 and differences(tmp_path, whole("plain")) == set()


# ---------------------------------------------------------------- what is not finite

@pytest.mark.parametrize("arch", ["ngpt", "gpt"])
def test_nan_stops_the_run_and_leaves_the_checkpoint(tiny, tmp_path, hook, arch):
    """A weight becomes NaN in step 4: FP4 must not hide it from the next loss."""
    def hurt(run, step):
        if step == 4:
            run.model.blocks[0].mixer.out.weight.data[0, 5] = math.nan
    hook(after=hurt)
    line = refusal(tiny(tmp_path, arch=arch, checkpoint_interval=2, eval_interval=100))
    assert re.search("step 5: loss nan, .*stopped; lower learn.*; the checkpoint of step 4 is whole", line)
    assert saved_step(tmp_path) == 4


@pytest.mark.parametrize("name, value", [("head.weight", math.nan), ("exp_avg", math.inf)])
def test_what_is_not_finite_is_never_saved(tiny, goes_on, tmp_path, hook, name, value):
    """It appears in step 5, and 6 is to be saved: the next loss, which would show it, comes too late."""
    def hurt(run, step):
        weight = run.model.head.weight
        if step == 5:
            (weight if name == "head.weight" else run.optimizer.state[weight][name]).data.view(-1)[5] = value
    real = train.training_step
    hook(after=hurt)
    line = refusal(tiny(tmp_path, checkpoint_interval=3))
    train.training_step = real
    assert re.search(rf"step 6: \S*{name} is not finite: stopped; .* checkpoint of step 3 is whole", line)
    assert set(files_of(tmp_path)) == FILES
    goes_on(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_all_as_it_was(tiny, tmp_path, monkeypatch, value):
    unchanged, training_step = [], train.training_step

    def copies(run):
        return {name: tensor.clone() for name, tensor in tensors_of(run.model, run.optimizer).items()}

    def step(run, number):
        if number == 2:
            run.model.head.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), value))
        before = copies(run)
        try:
            return training_step(run, number)
        finally:
            after = copies(run)
            unchanged.append(before.keys() == after.keys()
                             and all(torch.equal(t, after[name]) for name, t in before.items()))
    monkeypatch.setattr(train, "training_step", step)
    line = refusal(tiny(tmp_path))
    assert re.search(r"step 2: loss \d\..*, gradient norm (nan|inf): stopped.*; there is no checkpoint", line)
    assert unchanged == [False, False, True] and not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("flags", [{"checkpoint_interval": 1}, {"max_steps": 1}], ids=str)
def test_senseless_learning_rate_is_an_error_and_leaves_json(tiny, tmp_path, flags):
    line = refusal(tiny(tmp_path, arch="gpt", recipe="bf16", learning_rate=1e38, **flags))
    assert re.search("step 1: .*stopped; lower learning_rate, .*; there is no checkpoint in", line)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count("\n") >= 2 and "NaN" not in text and "Infinity" not in text


# ---------------------------------------------------------------- with what a run goes on

@pytest.mark.parametrize("changes", [
    {"n_embd": 64}, {"arch": "gpt", "recipe": "ngpt"}, {"recipe": "bf16"}, {"fp4_stochastic": "dgrad.dy"},
    {"seed": 1}, {"batch_size": 8}, {"learning_rate": 1.0}, {"max_steps": 20}, {"dtype": "float32"}], ids=str)
def test_resume_refuses_and_names_what_changed(tiny, whole, changes):
    folder, name = whole("plain"), next(iter(changes))
    before = files_of(folder)
    line = refusal(tiny(folder, **changes, resume=True))
    assert f"--resume: {name}=" in line and f"but the run in {folder} has {name}=" in line
    assert files_of(folder) == before


def test_a_run_may_become_longer_until_its_rate_decays(tiny, whole, tmp_path):
    """Then it ends as one that was as long from the start. Of 10 steps the last 15 % decay: from 8.5 on."""
    train.main(tiny(tmp_path / "longer", max_steps=16))
    for until in (4, 9):
        train.main(tiny(tmp_path / str(until), stop_at=until))
        train.main(tiny(tmp_path / str(until), max_steps=16, resume=True))
        assert differences(tmp_path / str(until), tmp_path / "longer") == set()
    last = {"stop_at": 9, "decay_fraction": 0.3}
    train.main(tiny(tmp_path / "decays", **last))
    line = refusal(tiny(tmp_path / "decays", **last, max_steps=16, resume=True))
    assert "max_steps=16 but the run in " in line and f"--init_from={tmp_path}" in line
    late = {"fp4_until": 0.3, "decay_fraction": 0.1}
    train.main(tiny(tmp_path / "left", stop_at=5, **late))
    assert "max_steps=20 but" in refusal(tiny(tmp_path / "left", max_steps=20, resume=True, **late))
    cosine = {"stop_at": 4, "schedule": "cosine"}
    train.main(tiny(tmp_path / "cosine", **cosine))
    assert "max_steps=16 but" in refusal(tiny(tmp_path / "cosine", **cosine | {"max_steps": 16}, resume=True))


@pytest.mark.parametrize("way", ["one", "ddp", "fsdp"])
def test_a_run_begins_with_the_weights_of_another(tiny, whole, tmp_path, way):
    """And with nothing else of it: its first loss is that model's, its steps and its rate are its own."""
    settings = {"init_from": whole("ngpt"), "gradient_accumulation_steps": 2, "max_steps": 2,
                "block_size": 16, "learning_rate": 1e-4, "recipe": "bf16"}
    if way == "one":                                # a run knows where it began, whoever resumes it
        train.main(tiny(tmp_path, **settings, stop_at=1))
        train.main(tiny(tmp_path, **settings | {"init_from": None}, resume=True))
        assert json.loads((tmp_path / "config.json").read_text())["init_from"] == str(whole("ngpt"))
    else:
        both = ranks(2, lambda: train.main(tiny(tmp_path, **settings, parallel=way)))
        assert [rank.end() for rank in both] == [(0, "")] * 2
    model, _, c = load_run(whole("ngpt"))
    data = load_data(c.dataset, 16)
    starts = val_starts(len(data.val), 16, (1, c.batch_size))
    with torch.no_grad():
        loss = model(*batch_at(data.val, starts[0], 16, torch.device("cpu")))
    assert metrics(tmp_path, "val_loss")[0]["val_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert [row["step"] for row in metrics(tmp_path, "loss")] == [0, 1]


def test_what_a_run_cannot_begin_with_is_one_line(tiny, whole, tmp_path):
    prepare(["abcd" * 9999], ["abcd" * 999], tmp_path / "data", "a test", tokenizer="bpe", vocab_size=258)
    for changes, says in (({"n_embd": 64}, "has n_embd=32, not 64; give the same"),
                          ({"alpha_init": 0.1}, "has alpha_init=0.05, not 0.1; give the same"),
                          ({"dataset": tmp_path / "data", "vocab_size": 256}, "vocab_size=256 must be "),
                          ({"init_from": tmp_path / "none"}, "none/ckpt.pt: no checkpoint there")):
        line = refusal(tiny(tmp_path / "new", **{"init_from": whole("plain")} | changes))
        assert says in line and not (tmp_path / "new").exists()
    for name, letters in (("a", "abcd"), ("b", "efgh")):        # two tokenizers of one size
        prepare([letters * 9999], [letters * 999], tmp_path / name, "a test", tokenizer="bpe", vocab_size=260)
    train.main(tiny(tmp_path / "run", dataset=tmp_path / "a", max_steps=1))
    new = {"init_from": tmp_path / "run", "dataset": tmp_path / "b", "max_steps": 1}
    assert "/run: its tokens are bpe260-" in refusal(tiny(tmp_path / "new", **new))
    prepare(["efgh" * 9999], ["efgh" * 999], tmp_path / "b", "a test", tokenizer=str(tmp_path / "run"))
    train.main(tiny(tmp_path / "new", **new))       # text in the tokens of the run


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
    assert differences(tmp_path / "run", tmp_path / "whole") == set()


def test_resume_accepts_what_changes_no_step(tiny, whole, tmp_path):
    train.main(tiny(tmp_path / "here", stop_at=5))
    (tmp_path / "here").rename(tmp_path / "there")
    train.main(tiny(tmp_path / "there", resume=True, eval_interval=3, eval_iters=2, log_interval=1,
                    checkpoint_interval=1, sample_tokens=4, gradient_noise=True))
    found = differences(tmp_path / "there", whole("plain"))
    assert found and all(re.match("metrics/.* val/", name) for name in found)


def test_run_folder_is_not_overwritten(tiny, whole, tmp_path, capsys):
    """To resume a finished run is no error: a job that is started again until it exits with 0 must end."""
    folder = whole("plain")
    before = files_of(folder)
    assert f"out_dir={folder} holds a run; continue it with --resume" in refusal(tiny(folder))
    assert "none/ckpt.pt: no checkpoint there" in refusal(tiny(tmp_path / "none", resume=True))
    for changes in ({}, {"stop_at": 5}):
        capsys.readouterr()
        assert train.main(tiny(folder, resume=True, **changes)) is None
        assert "is complete, at step 10" in capsys.readouterr().out
    assert files_of(folder) == before
    lists = io.BytesIO()
    torch.save([1, 2], lists)
    for damaged in (before["ckpt.pt"][:-100], b"", b"{}", lists.getvalue()):
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        assert "ckpt.pt: not a checkpoint of this code" in refusal(tiny(tmp_path, resume=True))


def test_a_run_is_sampled_with_its_own_tokenizer(tiny, dataset, tmp_path):
    """Which lies in its folder: the data may have changed, or be elsewhere. Earlier versions kept none."""
    data, run = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "run"
    train.main(tiny(run, dataset=data, stop_at=1))
    (data / "tokenizer.json").write_text('{"name": "gpt2"}')
    moved = run.rename(tmp_path / "moved")
    assert load_model(moved)[1].n_vocab == 256
    (moved / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="json: gpt2 is not the tokenizer of the run, bytes, a test"):
        load_model(moved)


# ---------------------------------------------------------------- what a fork changes; see test_ranks.py too

def test_a_curriculum_of_lengths(tiny, tmp_path, monkeypatch, capsys):
    """train.sequence_length() is all that a fork replaces. Tokens, batches, MFU and gradient noise follow. A
    resumed run is the same bit for bit."""
    settings = {"max_steps": 6, "gradient_noise": True, "eval_interval": 3, "log_interval": 1}
    train.main(tiny(tmp_path / "short", **settings, block_size=16))
    monkeypatch.setattr(train, "sequence_length",
                        lambda c, step: c.model.block_size // (2 if step < 3 else 1))
    monkeypatch.setattr(train, "usual", lambda times: 1.0)
    monkeypatch.setattr(train, "peak_flops", lambda device: 1e6)
    capsys.readouterr()
    train.main(tiny(tmp_path / "whole", **settings))
    said, (short, found) = capsys.readouterr().out, (losses(tmp_path / name) for name in ("short", "whole"))
    assert found[:3] == short[:3] and found[3] != short[3]
    assert [row["tokens"] for row in metrics(tmp_path / "whole", "loss")] == [32, 64, 96, 160, 224, 288]
    noise = [{name: value for name, value in row.items() if name.startswith(train.NOISE)}
             for name in ("short", "whole") for row in metrics(tmp_path / name, "val_loss")]
    assert noise[0] == noise[3] != {} and noise[1] != noise[4]  # before the first step, and after three
    model = build(load_config(tiny(tmp_path, vocab_size=256)).model)
    mfu = [f"mfu {100 * 2 * T * flops_per_token(model, T) / 1e6:.1f}%" for T in 3 * [16] + 3 * [32]]
    assert re.findall(r"mfu \S+%", said) == mfu and len(set(mfu)) == 2
    for stop in (2, 4):
        train.main(tiny(tmp_path / f"{stop}", **settings, stop_at=stop))
        train.main(tiny(tmp_path / f"{stop}", **settings, resume=True))
        assert differences(tmp_path / f"{stop}", tmp_path / "whole") == set()


# ---------------------------------------------------------------- what befalls a run

@pytest.fixture
def half(tiny, tmp_path):
    """A run that stopped at step 5, with a checkpoint."""
    train.main(tiny(tmp_path / "half", stop_at=5))
    return tmp_path / "half"


def test_metrics_survive_a_kill_while_they_are_written_anew(tiny, goes_on, half):
    """As they are by a run that goes on. A last row that a kill has cut is made anew, too."""
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 5.1')
    before, argv = (half / "metrics.jsonl").read_bytes(), tiny(half, resume=True)
    assert tried(lambda: train.main(argv), lambda: setattr(os, "fsync", die))[0] == -signal.SIGKILL
    assert (half / "metrics.jsonl").read_bytes() == before and list(half.glob("metrics.*.tmp.jsonl"))
    goes_on(half)
    assert not list(half.glob("*.tmp*"))


@pytest.mark.parametrize("limit, says", [
    (500, "metrics.jsonl: File too large\n"),
    (100_000, "ckpt.pt: File too large; the checkpoint of step 5 is whole in")])
def test_a_full_disk(tiny, goes_on, half, limit, says):
    """With room for neither metrics nor checkpoint, and for metrics alone: one line, and nothing is lost."""
    before = files_of(half)
    assert len(before["metrics.jsonl"]) > 900 and len(before["ckpt.pt"]) > 100_000
    status, said = tried(lambda: train.main(tiny(half, resume=True)),
                         lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert status == 1 and f"train.py: {half}/" in said and says in said
    after = files_of(half)
    assert after.keys() == before.keys() and after["ckpt.pt"] == before["ckpt.pt"]
    if limit == 500:
        assert after["metrics.jsonl"] == before["metrics.jsonl"]
    goes_on(half)


def test_single_flipped_bits_of_a_checkpoint_are_noticed(half):
    """Each is refused, or lies where nothing is read."""
    path, dice, refused, passed = half / "ckpt.pt", random.Random(0), 0, 0
    raw, sound = path.read_bytes(), contents(half)
    model = load_checkpoint(path)["model"]
    for _ in range(60):
        at = dice.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1:])
        try:
            assert contents(half) == sound
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        with contextlib.suppress(Exception):
            found = torch.load(path)["model"]
            passed += any(not torch.equal(t, found[name]) for name, t in model.items())
    assert refused > 50 and passed > 5              # control: torch alone lets many through


@pytest.mark.parametrize("out_dir, says", [
    ("FILE", "FILE: File exists"), ("FILE/run", "FILE/run: Not a directory"),
    ("/proc/run", "/proc/run: No such file or directory"),
    ("x" * 300, "File name too long"), ("a/" * 2500, "text of 4096 letters")], ids=lambda text: text[:20])
def test_an_out_dir_that_cannot_be_is_one_line(tiny, tmp_path, monkeypatch, out_dir, says):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("mine")
    assert says in refusal(tiny(out_dir)) and Path("FILE").read_text() == "mine"


ROWS = {                                            # damage of metrics.jsonl, the line of it, what is said
    "no JSON": (lambda rows: [*rows[:2], "{]", *rows[3:]], 3, "no JSON object"),
    "nested": (lambda rows: [*rows[:1], "[" * 10**5, *rows[2:]], 2, "no JSON object"),
    "NaN": (lambda rows: [rows[0].replace("5.", "NaN, \"x\": 5.", 1), *rows[1:]], 1, "no JSON object"),
    "infinite": (lambda rows: [*rows[:1], '{"step": 0, "loss": 1e999}', *rows[2:]], 2, "not the numbers"),
    "text": (lambda rows: [*rows[:1], '{"step": "0", "loss": 1}', *rows[2:]], 2, "not the numbers"),
    "no step": (lambda rows: [*rows[:1], '{"loss": 1}', *rows[2:]], 2, "not the numbers"),
    "order": (lambda rows: [*rows[:2], rows[4], *rows[3:]], 3, "step 3 stands where 1 should"),
    "other number": (lambda rows: [*rows[:2], rows[2].replace('"loss": 5', '"loss": 4'), *rows[3:]], 0,
                     "damaged, not what the checkpoint of step 5 saw"),
    "cut": (lambda rows: rows[:4], 0, "damaged, not what the checkpoint of step 5 saw"),
}


def test_damaged_metrics_are_one_line_with_the_place(tiny, half):
    path = half / "metrics.jsonl"
    rows = path.read_text().splitlines()
    for name, (damage, number, says) in ROWS.items():
        path.write_text("\n".join(damage(rows)) + "\n")
        before = files_of(half)
        assert path.read_text().splitlines() != rows, name
        line = refusal(tiny(half, resume=True))
        assert f"{path}{f', line {number}' if number else ''}: " in line and says in line, name
        assert files_of(half) == before, name


def test_two_runs_never_share_a_folder(tiny, goes_on, tmp_path):
    """The lock goes with its process, however that ends."""
    process = Process(lambda: train.main(tiny(tmp_path, checkpoint_interval=1)),
                      lambda: each_step(lambda run, step: time.sleep(0.1)))
    wait_for((tmp_path / "ckpt.pt").exists)
    assert f"{tmp_path}: another process is at work there" in refusal(tiny(tmp_path, resume=True))
    os.kill(process.pid, signal.SIGKILL)
    assert process.end() == (-signal.SIGKILL, "")
    goes_on(tmp_path)


@pytest.mark.parametrize("console", ["a pipe that nobody reads",
                                     pytest.param("/dev/full", marks=pytest.mark.long)])
def test_a_run_whose_console_is_gone_ends_with_a_checkpoint(tiny, goes_on, tmp_path, console):
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
    goes_on(tmp_path)


# ---------------------------------------------------------------- memory

def test_what_a_rank_keeps_of_a_model():
    """In bytes, by hand: 4 each for weights, gradients and two moments. Beside its part of them a rank has
    weights and gradients whole: all in zero2; in fsdp those of the largest block, and of what is no block."""
    attention, mlp = 64 * (1 + 4 * 64), 64 * (1 + 2 * 192)                      # with the weights of a norm
    others = 2 * 256 * 64 + 64                      # embedding, head and the last norm
    n = attention + mlp + others
    sizes = outline(ModelConfig(arch="gpt", pattern="*-", n_embd=64, n_head=2, n_ffn=192, vocab_size=256))
    assert sum(p.numel() for p in sizes.parameters()) == n
    for world in (2, 4, 8):
        assert rank_bytes("ddp", sizes, world) == rank_bytes("fsdp", sizes, 1) == 16 * n
        assert rank_bytes("zero2", sizes, world) == 16 * n / world + 8 * n
        assert rank_bytes("fsdp", sizes, world) == 16 * n / world + 8 * (mlp + others)


def test_a_model_that_does_not_fit_is_refused(tiny, tmp_path, monkeypatch):
    """To the byte. What ranks on one machine need is there several times."""
    c = load_config(tiny(tmp_path, vocab_size=256))
    sizes = outline(c.model)
    need = rank_bytes("ddp", sizes, 1)
    for free, beside, fits in ((need, 1, True), (need - 1, 1, False), (None, 1, True), (2 * need, 2, True),
                               (2 * need - 1, 2, False)):
        monkeypatch.setattr(train, "free_bytes", lambda device, free=free: free)
        ranks = SimpleNamespace(world=beside, beside=beside, device=torch.device("cpu"))
        if fits:
            train.check_memory(c, sizes, ranks)
            continue
        with pytest.raises(UserError, match="GiB of a rank, .* GiB are free here; .*--parallel=fsdp"):
            train.check_memory(c, sizes, ranks)


def test_too_little_memory_is_one_line_with_a_remedy(tiny, tmp_path, hook):
    errors = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), ZeroDivisionError(),
              RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]

    def fail(run, step):
        raise errors.pop()
    hook(fail)
    for _ in range(4):
        if isinstance(errors[-1], ZeroDivisionError):           # a mistake of ours keeps its traceback
            with pytest.raises(ZeroDivisionError):
                train.main(tiny(tmp_path / "run"))
            continue
        line = refusal(tiny(tmp_path / "run"))
        assert "out of memory; lower batch_size=2 (and raise gradient_accumulation_steps)" in line
