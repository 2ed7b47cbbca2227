"""Proofs for ranks.py: a model in parts computes what one process computes, its checkpoints are read by any
number of ranks, and a failure of one rank ends all of them with its name.

Real processes, started by torchrun, which talk over the loopback interface. Each start costs seconds, so one
start makes several runs.
"""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import nvfp4  # noqa: E402
import train  # noqa: E402
from data.run import UserError  # noqa: E402
from model import describe, load_checkpoint, load_model, newest_checkpoint, outline  # noqa: E402
from ranks import part_of  # noqa: E402
from train import load_config  # noqa: E402

# Two numbers have one sum, and halves are exact; what else adds up in another order where weights are in
# parts, the norm for clipping and nGPT's norms of columns, is not there in these.
SHORT = {"n_layer": 2, "batch_size": 2, "max_steps": 6, "eval_interval": 3, "gradient_accumulation_steps": 2}
EXACT = SHORT | {"arch": "gpt", "grad_clip": 0}
RUNS = {
    "all random": EXACT | {"recipe": "nvfp4", "fp4_tail": 0, "fp4_hadamard_signs": "fresh",
                           "fp4_stochastic": ",".join(nvfp4.OPERANDS), "weight_decay": 0.1, "eval_iters": 3},
    "hybrid": EXACT | {"pattern": "ME*", "n_ffn": 48, "mamba_n_head": 16, "mamba_head_dim": 4,
                       "mamba_n_group": 2, "mamba_n_state": 16, "mamba_chunk": 8, "moe_n_expert": 4},
    "bf16": EXACT | {"recipe": "bf16"},
    "dge, occ": EXACT | {"recipe": "fp4_dge_occ"},
}
DRIVER = f"""
import atexit, json, os, signal, sys
sys.path.insert(0, {str(REPO)!r})
import torch, nvfp4, train
from data.run import Stop, command
torch.set_num_threads(1)
nvfp4.can_compile = lambda kind: False
leave, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda: None
atexit.register(lambda: torch.distributed.is_initialized() and leave())     # runs talk through one group
for argv, stopped in json.loads(sys.argv[1]):
    stop = Stop()
    stop.why = "the test" if stopped else ""
    command("train.py")(train.train)(train.load_config(argv), stop)
"""


pytestmark = pytest.mark.usefixtures("eager")


def torchrun(n, folder, *runs, status=0, first=""):
    """Start n ranks, which make all these runs, (argv, whether it is stopped at once). Returns stderr."""
    (folder / "driver.py").write_text(DRIVER.replace("for argv", f"{first}for argv"))
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
         folder / "driver.py", json.dumps(runs)], text=True, capture_output=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == status, process.stderr
    return process.stderr


def state(folder):
    """{name: tensor} of the newest checkpoint, moments too, and its log but for times and norms."""
    path = newest_checkpoint(folder)
    saved = load_checkpoint(path)
    c = train.unflatten(saved["config"])
    model = outline(c.model).to_empty(device="cpu")
    optimizer = train.make_optimizer(model, c)
    train.restore(saved, path, model, optimizer, outline(c.model), train.Ranks())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in row.items() if key not in ("ms", "grad_norm")} for row in rows]
    return train.tensors_of(model, optimizer, saved["step"] > 0), log


def differences(a, b):
    (tensors, log), (others, other_log) = state(a), state(b)
    assert tensors.keys() == others.keys()
    return {name for name, t in tensors.items() if not torch.equal(t, others[name])} | (
        {"log"} if log != other_log else set())


def test_a_model_in_parts_computes_what_one_process_does(tiny, tmp_path):
    """error   0, see EXACT: weights, moments, losses, evaluations. With nGPT's columns and clipping the
            first loss is alike, later ones within 1e-4: 2^-24 in a sum, enlarged by six steps"""
    runs = []
    for kind, settings in RUNS.items():
        train.main(tiny(tmp_path / kind, **settings))
        runs += [(tiny(tmp_path / f"{kind} {way}", **settings, parallel=way), False)
                 for way in ("zero2", "fsdp")]
    ngpt = SHORT | {"recipe": "bf16", "dtype": "float32"}
    train.main(tiny(tmp_path / "ngpt", **ngpt))
    runs += [(tiny(tmp_path / "ngpt fsdp", **ngpt, parallel="fsdp"), False)]
    torchrun(2, tmp_path, *runs)
    for kind in RUNS:
        for way in ("zero2", "fsdp"):
            assert differences(tmp_path / kind, tmp_path / f"{kind} {way}") == set(), (kind, way)
    one, shards = state(tmp_path / "ngpt")[1], state(tmp_path / "ngpt fsdp")[1]
    assert one[1]["loss"] == shards[1]["loss"]
    for a, b in zip(one, shards, strict=True):
        assert all(abs(b[key] / a[key] - 1) < 1e-4 for key in ("loss", "val_loss") if key in a)
    assert "log" in differences(tmp_path / "bf16", tmp_path / "all random")         # control


@pytest.mark.long
def test_four_ranks_have_the_losses_of_one_process(tiny, tmp_path):
    """In whole models and in parts; in BF16, with everything random, and by nGPT's own recipe.

    error   1e-4, six steps: four gradients add up in another order, which costs 2^-24 of a sum and, where an
            activation rounds the other way, 2^-8 of one number in bf16, or a step of E2M1. Seen: 6e-5
    """
    kinds = {"ngpt": SHORT | {"recipe": "ngpt"}, **{kind: RUNS[kind] for kind in ("bf16", "all random")}}
    kinds = {kind: settings | {"gradient_accumulation_steps": 4} for kind, settings in kinds.items()}
    runs = []
    for kind, settings in kinds.items():
        train.main(tiny(tmp_path / kind, **settings))
        runs += [(tiny(tmp_path / f"{kind} {way}", **settings, parallel=way), False)
                 for way in ("ddp", "fsdp")]
    torchrun(4, tmp_path, *runs)
    train.main(tiny(tmp_path / "ngpt half", **kinds["ngpt"] | {"gradient_accumulation_steps": 2}))

    def distance(a, b):
        rows = zip(state(tmp_path / a)[1], state(tmp_path / b)[1], strict=True)
        return max(abs(y[key] / x[key] - 1) for x, y in rows for key in x if "loss" in key)
    for kind in kinds:
        assert all(distance(kind, f"{kind} {way}") < 1e-4 for way in ("ddp", "fsdp")), kind
    assert distance("ngpt", "ngpt half") > 1e-3     # control


@pytest.mark.long
def test_a_checkpoint_goes_from_any_number_of_ranks_to_any_other(tiny, tmp_path):
    """Four ranks train; then others load and save what they did, without a step: every bit is passed on, from
    parts to parts and to files and back. A run that changes hands in its midst ends as if it had not."""
    out, settings = tmp_path / "run", RUNS["hybrid"] | {"gradient_accumulation_steps": 12}
    torchrun(4, tmp_path, (tiny(out, **settings, parallel="fsdp", stop_at=2), False))
    first, _ = state(out)
    files = {path.name for path in newest_checkpoint(out).iterdir()}
    assert len(files) == 6 and newest_checkpoint(out).name == "ckpt-000000002"
    for n, way in ((2, "ddp"), (3, "zero2"), (1, "ddp"), (2, "fsdp")):
        argv = tiny(out, **settings, parallel=way, resume=True)
        if n == 1:
            model, _, _ = load_model(out)
            assert all(torch.equal(t, first[f"model/{name}"]) for name, t in model.state_dict().items())
            stop = train.Stop()
            stop.why = "the test"
            train.train(load_config(argv), stop)
        else:
            torchrun(n, tmp_path, (argv, True))
        again, _ = state(out)
        assert newest_checkpoint(out).is_dir() == (way != "ddp") and len(list(out.glob("ckpt*"))) == 1
        assert again.keys() == first.keys() and all(torch.equal(t, first[name]) for name, t in again.items())


@pytest.mark.long
def test_a_run_that_changes_hands_ends_as_if_it_had_not(tiny, tmp_path):
    settings, out = RUNS["all random"], tmp_path / "run"
    train.main(tiny(tmp_path / "whole", **settings))
    torchrun(2, tmp_path, (tiny(out, **settings, parallel="fsdp", stop_at=2), False),
             (tiny(out, **settings, parallel="ddp", stop_at=3, resume=True), False))
    train.main(tiny(out, **settings, stop_at=4, resume=True))
    torchrun(2, tmp_path, (tiny(out, **settings, parallel="zero2", resume=True), False))
    assert differences(tmp_path / "whole", out) == set()


@pytest.mark.parametrize("damage, said", [
    (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp is damaged on disk"),
    (lambda path: flip(path / ".metadata"), ".metadata is damaged on disk"),
    (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp: No such file"),
    (lambda path: (path / "about.json").write_text("{}"), "its step is missing"),
])
def test_a_damaged_checkpoint_in_parts_is_refused(tiny, in_parts, tmp_path, damage, said):
    out = shutil.copytree(in_parts, tmp_path / "run")
    load_model(out)                                 # control
    damage(newest_checkpoint(out))
    for reader in (lambda: load_model(out), lambda: train.train(
            load_config(tiny(out, **RUNS["bf16"], resume=True)))):
        with pytest.raises(UserError, match=re.escape(said)):
            reader()


@pytest.mark.parametrize("config, world", [("ngpt_1b", 8), ("ngpt_hybrid_30b", 64)])
def test_parts_of_models_that_fit_no_rank(config, world):
    """On the meta device, among ranks that are not there: every parameter is in parts, as large as `model.py
    --ranks` says, the last ones smaller or empty; and it knows which of nGPT's norms add up over ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    c = load_config([f"configs/{config}.py"])
    said = {line.split()[0]: line for line in describe(c.model, world).splitlines() if "blocks." in line}
    for rank in (0, 1, world // 2, world - 1):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        ranks = train.Ranks("fsdp")
        ranks.device = torch.device("meta")
        model = ranks.split(nvfp4.convert(outline(c.model), c.fp4, report=lambda line: None))
        for p in model.parameters():
            rows, part = p.shape[0], part_of(p.shape, world)
            mine = min(max(rows - rank * part[0], 0), part[0])                  # whole parts first
            assert p.to_local().shape == (mine, *p.shape[1:])
        assert [(name, p.shape) for name, p in model.named_parameters()] == [
            (name, p.shape) for name, p in outline(c.model).named_parameters()]
        for name, mixer in ((f"blocks.{i}.mixer", block.mixer) for i, block in enumerate(model.blocks)):
            names = {id(p): f"{name}.{n}".removesuffix(".weight") for n, p in mixer.named_parameters()}
            for weight, axis in mixer.stream_weights():
                adds_up = weight.norm(dim=axis, keepdim=True).placements[0].is_partial()
                assert said[names[id(weight)]].endswith("over all ranks" if adds_up else "its own")
        torch.distributed.destroy_process_group()
    assert sum("over all ranks" in line for line in said.values()) > 10


@pytest.fixture(scope="module")
def in_parts(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torchrun(2, folder, (tiny(folder / "run", **RUNS["bf16"], parallel="fsdp", stop_at=2), False))
    return folder / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.long
def test_ranks_that_cannot_read_end_with_one_line(tiny, in_parts, tmp_path):
    """The file is looked at by one rank alone; the other ends without a word."""
    out = shutil.copytree(in_parts, tmp_path / "run")
    (newest_checkpoint(out) / "__1_0.distcp").unlink()
    argv = tiny(out, **RUNS["bf16"], parallel="fsdp", resume=True)
    said = torchrun(2, tmp_path, (argv, False), status=1)
    assert said.count("__1_0.distcp: No such file") == 1 and '/ranks.py", line' not in said


def test_what_is_not_whole_is_no_checkpoint(in_parts, tmp_path):
    out = shutil.copytree(in_parts, tmp_path / "run")
    newer = shutil.copytree(newest_checkpoint(out), out / "ckpt-000000004")
    (newer / "about.json").unlink()                 # killed while it was written
    assert newest_checkpoint(out).name == "ckpt-000000002"


def test_activation_checkpointing_changes_no_bit(tiny, tmp_path):
    """Of weights, moments, losses and of the experts' load, which is counted once."""
    kinds = {"hybrid": RUNS["hybrid"], "random": RUNS["all random"],
             "documents": RUNS["hybrid"] | {"document_start": 32}}              # a blank
    for kind, settings in kinds.items():
        for name, again in ((kind, {}), (f"{kind} again", {"activation_checkpointing": True})):
            train.main(tiny(tmp_path / name, **settings, **again))
        assert differences(tmp_path / kind, tmp_path / f"{kind} again") == set()
    assert "log" in differences(tmp_path / "hybrid", tmp_path / "documents")    # control


@pytest.mark.long
def test_a_rank_that_is_gone_is_named(tiny, tmp_path):
    """One is killed in its third step. The other says that it lost one, in a line; what was saved stays."""
    out = tmp_path / "run"
    die = ("real = train.learning_rate\n"
           "def rate(c, step):\n"
           "    if step == 2 and os.environ['RANK'] == '1':\n"
           "        os.kill(os.getpid(), signal.SIGKILL)\n"
           "    return real(c, step)\n"
           "train.learning_rate = rate\n")
    argv = tiny(out, **RUNS["bf16"], checkpoint_interval=1)
    said = torchrun(2, tmp_path, (argv, False), status=1, first=die)
    assert "rank 0 lost another one, whose own error says why" in said and "Root Cause" in said
    assert "exitcode  : -9" in said and re.search(r"rank +: 1 ", said)
    assert load_checkpoint(newest_checkpoint(out))["step"] == 2


def launch(n, *command):
    """n ranks, started one by one as a queue's own launcher does. torchrun's are sessions of their own: who
    kills it does not kill them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(n)]


@pytest.mark.long
def test_processes_need_no_torchrun(tiny, tmp_path):
    """Both get a signal, and say by their exit status to go on."""
    settings = RUNS["bf16"] | {"max_steps": 10**5, "checkpoint_interval": 10**5, "parallel": "fsdp"}
    both = launch(2, REPO / "train.py", *tiny(tmp_path / "run", **settings))
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or "loss" not in log.read_text():
        time.sleep(0.1)
        assert all(process.poll() is None for process in both)
    for process in both:
        process.terminate()
    assert [process.wait(timeout=60) for process in both] == [train.STOPPED] * 2
    assert newest_checkpoint(tmp_path / "run").is_dir()


@pytest.mark.long
def test_kills_at_random_cost_nothing_but_steps(tiny, tmp_path):
    """One rank and two, by all ways, are killed after some changes of their checkpoints; the other number
    goes on. No clock says when, so that a fast machine is not done before it is killed."""
    settings, out = RUNS["all random"] | {"checkpoint_interval": 1, "max_steps": 48}, tmp_path / "run"
    train.main(tiny(tmp_path / "whole", **settings))
    (tmp_path / "driver.py").write_text(DRIVER)
    rng, ways, kills = random.Random(0), ("fsdp", "ddp", "zero2"), 0
    for n in range(60):
        resume = newest_checkpoint(out).exists()
        argv = tiny(out, **settings, parallel=ways[n % 3], resume=resume)
        processes = launch(1 + n % 2, tmp_path / "driver.py", json.dumps([(argv, False)]))
        changes, times, until = rng.randint(1, 24), {written(out)}, time.monotonic() + 120
        while any(process.poll() is None for process in processes) and len(times) <= changes:
            times.add(written(out))
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))             # into the next step, or the next checkpoint
        for process in processes:
            process.kill()
        ends = {process.wait() for process in processes}
        assert ends <= {0, -signal.SIGKILL}         # none is refused, or fails, after what befell the last
        kills += -signal.SIGKILL in ends
        if newest_checkpoint(out).exists() and load_checkpoint(newest_checkpoint(out))["step"] == 48:
            break
    assert kills >= 2 and differences(tmp_path / "whole", out) == set()


def written(folder):
    """When the newest of a run's checkpoints was written or begun; 0: not yet, or one goes right now."""
    with contextlib.suppress(OSError):
        return max((path.stat().st_mtime_ns for path in folder.glob("ckpt*")), default=0)
    return 0
