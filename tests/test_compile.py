"""What a user runs: compiled blocks, loss and kernels, several threads; and a machine without a compiler."""
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

import nvfp4
from model import ModelConfig, build, compile_blocks
from nvfp4 import RECIPES, FP4Linear
from runs import REPO, metrics

TINY = ["--arch=ngpt", "--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=32", "--batch_size=4",
        "--max_steps=4", "--sample_tokens=0", "--device=cpu"]


def python(*arguments, **environment):
    finished = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                              cwd=REPO, timeout=400, env=os.environ | environment)
    assert finished.returncode == 0, finished.stderr
    return finished


# ---------------------------------------------------------------- what torch.compile sees

class Compiled:
    """A tiny nGPT in FP4, once eager and once with its blocks and loss compiled by a backend that runs graphs
    as they are, so that all bits must be the same; and what dynamo makes of it."""

    def __init__(self, pattern, recipe):
        torch._dynamo.reset()
        counters.clear()
        clear_compilation_metrics()
        self.graphs = CompileCounterWithBackend("eager")
        sizes = ModelConfig(arch="ngpt", pattern=pattern, n_embd=32, n_head=2, n_ffn=64,
                            block_size=16, vocab_size=48, moe_n_expert=2, moe_n_active=1, moe_n_ffn_shared=32,
                            mamba_n_head=4, mamba_head_dim=16, mamba_n_group=1, mamba_n_state=16)
        self.pair = []                              # the eager model and the compiled, with optimizers
        for _ in range(2):
            torch.manual_seed(0)
            model = nvfp4.convert(build(sizes), RECIPES.get(recipe, recipe), report=lambda line: None)
            self.pair.append((model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)))
        compile_blocks(self.pair[1][0], backend=self.graphs)
        self.ids = torch.randint(48, (2, 17), generator=torch.Generator().manual_seed(0))

    def each(self, action):
        """Whether action(model), which gives tensors, gives the same bits for both."""
        eager, compiled = (action(model) for model, _ in self.pair)
        return len(eager) > 0 and all(map(torch.equal, eager, compiled))

    def micro_batch(self, step, micro_batch):
        def run(model):
            nvfp4.set_step(model, 0, step, micro_batch)
            loss = model(self.ids[:, :-1], self.ids[:, 1:])
            loss.backward()
            return [loss.detach(), *(p.grad for p in model.parameters())]
        return self.each(run)

    def update(self):
        """A fused optimizer leaves the version counters of weights as they are: set_step() has to do."""
        for _, optimizer in self.pair:
            optimizer.step()
            optimizer.zero_grad()

    def evaluate(self, gemms=()):
        """With these GEMMs in high precision."""
        @torch.no_grad()
        def run(model):
            model.eval()
            with nvfp4.high_precision(model, gemms):
                loss = model(self.ids[:, :-1], self.ids[:, 1:])
            model.train()
            return [loss]
        return self.each(run)

    def found(self):
        """(frames, graphs) that dynamo has made."""
        return counters["frames"]["total"], self.graphs.frame_count

    def files(self):
        """Names of the files that anything in a graph, and any frame, comes from."""
        traces = [node.stack_trace or "" for graph in self.graphs.graphs for node in graph.graph.nodes]
        in_graphs = {Path(name).name for trace in traces for name in re.findall(r'File "([^"]+)"', trace)}
        return in_graphs | {Path(m.co_filename).name for m in get_compilation_metrics() if m.co_filename}


# Four graphs: what lies between attention's two linear layers, what lies between an MLP's, the step on the
# sphere, which both share, and the loss. The other frames lie in front of a linear layer, with nothing in
# them.
@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("pattern, frames, graphs", (
    ("*-*-", 8, 4), pytest.param("*-", 8, 4, marks=pytest.mark.long),
    pytest.param("ME", 13, 8, marks=pytest.mark.long)))
def test_the_compiler_sees_what_lies_between_layers_and_nothing_of_them(pattern, frames, graphs):
    """A training step costs so many frames and graphs, once, however many blocks are alike. Nothing of
    nvfp4.py is in them, so they hold no random bits and no old weights: other steps and micro-batches, other
    weights, some GEMMs in high precision and a late switch compile nothing new, and an evaluation, without
    gradients, as much again, once. All bits are the eager model's."""
    model = Compiled(pattern, replace(RECIPES["ngpt"], until=0.5))
    assert model.micro_batch(0, 0) and model.found() == (frames, graphs)
    for step in range(2):
        assert model.micro_batch(step, 1)
        model.update()
        assert model.micro_batch(step + 1, 0)
    assert model.found() == (frames, graphs)
    assert model.evaluate(nvfp4.GEMMS)
    assert model.found() == (2 * frames, 2 * graphs)                            # what is new is seen
    assert model.evaluate() and model.evaluate(nvfp4.GEMMS) and model.evaluate(("fprop",))
    assert model.micro_batch(3, 0)
    news = [nvfp4.switch_late(m, 0.5) for m, _ in model.pair]
    assert all(news) and model.micro_batch(3, 1) and model.evaluate()
    assert model.found() == (2 * frames, 2 * graphs)
    assert "model.py" in model.files() and "nvfp4.py" not in model.files()
    with torch.no_grad():
        model.pair[1][0].embed.weight.neg_()
    assert not model.evaluate()                     # control


@pytest.mark.usefixtures("unfused")
def test_a_layer_in_the_compiler_s_sight_is_seen(monkeypatch):
    """Negative control: without torch.compiler.disable. In high precision, for dynamo of torch 2.11 fails at
    what FP4 does."""
    for seen in (False, True):
        if seen:
            monkeypatch.setattr(FP4Linear, "forward", FP4Linear.forward.__wrapped__)
        model = Compiled("-", "ngpt")
        assert model.evaluate(nvfp4.GEMMS) and ("nvfp4.py" in model.files()) is seen


@pytest.mark.usefixtures("unfused")
def test_a_layer_between_compiled_parts_fuses_its_own_functions(monkeypatch):
    """Disabled is what torch.compile would see of the layer, not what the layer itself asks it for."""
    used = []
    monkeypatch.setattr(nvfp4, "can_compile", lambda kind: True)
    monkeypatch.setattr(nvfp4, "compiled", lambda function: used.append(function.__name__) or function)
    model = Compiled("*-*-", "nvfp4")               # one block of four stays in high precision
    assert model.micro_batch(0, 0) and set(used) >= {"round_blocks", "rotate", "unpack"}
    used.clear()
    with nvfp4.use_compiler(False):                 # control
        assert model.micro_batch(0, 1) and not used


# ---------------------------------------------------------------- a run; a machine without a compiler

@pytest.mark.long                                   # a minute of compiling
def test_compiled_run_resumes_bit_for_bit_in_a_new_process(dataset, tmp_path):
    """4 steps equal 2 + a new process + 2.

    error   0. Beside the uncompiled run losses agree to bf16's rounding, 2^-8 relative: fusion only saves
            intermediate roundings.
    """
    if not nvfp4.can_compile("cpu"):
        pytest.skip("no C++ compiler")

    def run(folder, *extra):
        process = python("train.py", *TINY, f"--dataset={dataset}", f"--out_dir={folder}", *extra)
        assert ("compiling" in process.stdout) == ("--compile=False" not in extra)
        assert "does not work here" not in process.stderr
        return [{key: value for key, value in row.items() if key != "ms"} for row in metrics(folder)]

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "--stop_at=2")
    assert run(tmp_path / "parts", "--resume") == whole
    plain = run(tmp_path / "plain", "--compile=False")
    for a, b in zip(whole, plain, strict=True):
        for key in {"loss", "val_loss", "val_loss_fp4"} & set(a):
            assert abs(a[key] - b[key]) <= 2**-8 * b[key]
    assert run(tmp_path / "other", "--compile=False", "--fp4_stochastic=") != plain         # control


NUMBERS = """
import torch, nvfp4
torch.manual_seed(0)
x = torch.randn(64, 64)
q = nvfp4.quantize(x, stochastic=True, seed=3)
print(q.codes.long().sum().item(), nvfp4.quantize(x.t(), decode=torch.bfloat16).values.double().sum().item())
"""


@pytest.mark.long                                   # test_nvfp4.py plays such a machine
def test_without_a_compiler_it_works_and_says_so(tmp_path, capsys, unfused):
    """The numbers of the definition; and a line on stderr says what the lack of a compiler costs."""
    bare = {"CXX": "no-such-compiler", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    other = python("-c", NUMBERS + "print(nvfp4.capability('cpu'))", **bare)
    exec(NUMBERS, {})
    assert other.stdout.splitlines()[0] == capsys.readouterr().out.strip()
    assert other.stderr.count("torch.compile does not work here") == 1 and "not fused" in other.stdout
