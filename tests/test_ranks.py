"""Proofs for ranks.py: ranks compute what one process computes, any number of ranks reads their checkpoints,
and a failure of one rank ends all of them with its name.

Ranks are forked processes that talk over the loopback interface, in the environment that torchrun gives them;
a long test starts torchrun itself. The runs are those of runs.py.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

import nvfp4
import train
from data.run import UserError, load_checkpoint, newest_checkpoint
from model import load_model, outline
from nvfp4 import RECIPES, FP4Config
from papers import PaperConfig
from ranks import for_parts
from runs import REPO, RUNS, TWO, contents, differences, each_step, metrics, one_line, ranks, wait_for
from train import load_config

pytestmark = pytest.mark.usefixtures("eager")
KINDS = [kind for kind in RUNS if kind != "plain"]  # of two micro-batches, or ranks
ALL_RANDOM = RUNS["gpt, all random"]


def ends_of(n, argv, before=lambda: None):
    """[(exit status, what was said)] of n ranks that train."""
    return [process.end() for process in ranks(n, lambda: train.main(argv), before)]


def together(n, argv):
    """n ranks train, and no one complains."""
    assert ends_of(n, argv) == [(0, "")] * n


# ---------------------------------------------------------------- the same bits

QUICK = [("ngpt", "ddp"), ("ngpt", "zero2"), ("ngpt", "fsdp"), ("hybrid", "fsdp")]     # gpt: it changes hands


@pytest.mark.parametrize("kind, way", [
    *QUICK, *(pytest.param(kind, way, marks=pytest.mark.long) for kind in KINDS
              for way in ("ddp", "zero2", "fsdp") if (kind, way) not in QUICK)])
def test_two_ranks_equal_two_micro_batches(tiny, whole, tmp_path, kind, way):
    """One process computes a/2 + b/2, two ranks (a + b)/2: of the loss, of every gradient.

    error   0, of weights, moments and metrics. Halving is exact in floating point, NVFP4's scales follow it
            exactly, and the sum of two numbers has one order. Norms are added up in fp64, which ends in the
            same fp32 whatever the order. So all kinds of random choices agree, and the load of experts, too,
            which is counted over all ranks.
    """
    together(2, tiny(tmp_path, **RUNS[kind], parallel=way))
    assert newest_checkpoint(tmp_path).is_dir() == (way != "ddp")
    assert differences(tmp_path, whole(kind)) == set()


def swizzled(q):
    packed = isinstance(q, nvfp4.Quantized)
    return q._replace(scales=nvfp4.swizzle(q.scales, len(q.codes))) if packed else q


FP4_WEIGHTS = {                                     # ranks, run, FP4 layers, those cut into whole blocks
    "ngpt": (2, TWO, 4, 4), "experts": (2, RUNS["hybrid"], 8, 7), "swizzled scales": (2, TWO, 4, 4),
    "ngpt on four": (4, TWO | {"gradient_accumulation_steps": 4, "n_embd": 64}, 4, 4),
    "measured scales": (2, TWO | {"arch": "gpt", "recipe": "nvfp4", "fp4_tail": 0}, 4, 4),
    "ngpt on three": (3, TWO | {"gradient_accumulation_steps": 3}, 4, 1)}


@pytest.mark.parametrize("way, times", [("zero2", 1), ("fsdp", 2)])
@pytest.mark.parametrize("name", ["ngpt", *(pytest.param(name, marks=pytest.mark.long)
                                            for name in [*FP4_WEIGHTS][1:])])
def test_codes_of_weights_are_gathered_not_weights(tiny, tmp_path, name, way, times):
    """times a step: zero2 once, fsdp for the forward and the backward.

    error   0, of weights, moments and metrics, to gathering fp32. A rank receives of each FP4 weight half a
            byte a value and a byte for 256 of them, where it would receive 4 bytes a value; what stands for
            the whole weight takes no memory
    """
    n, settings, n_layers, n_codes = FP4_WEIGHTS[name]
    found = {}
    gather = next(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name))
    for gathered in ("codes", "fp32"):
        sizes, memory, file = [], [], tmp_path / f"{gathered}.json"
        real, current = getattr(dist, gather), nvfp4.FP4Linear.current_weight

        def count(sizes=sizes, memory=memory, real=real, current=current, gathered=gathered, file=file):
            if gathered == "fp32":
                train.Ranks.gather_codes = lambda self, model: 0
            if name == "swizzled scales":           # as a GPU with FP4 units has them
                quantize = nvfp4.quantize
                nvfp4.quantize = lambda x, **how: swizzled(quantize(x, **how))

            def all_gather(output, *args, **kwargs):
                sizes.append(output.numel() * output.itemsize)
                return real(output, *args, **kwargs)

            def current_weight(layer):
                memory.append(layer.weight.untyped_storage().nbytes())
                return current(layer)

            def write(run, step):
                layers = nvfp4.fp4_layers(run.model)
                values = [layer.weight.numel() for layer in layers if layer.codes is not None]
                if run.ranks.first and step == 1:   # before step 0 zero2 has evaluated, and has the weights
                    file.write_text(json.dumps([len(layers), values, sum(sizes), memory.count(0)]))
            setattr(dist, gather, all_gather)
            nvfp4.FP4Linear.current_weight = current_weight
            each_step(lambda run, step: sizes.clear(), write)
        assert ends_of(n, tiny(tmp_path / gathered, **settings, parallel=way), count) == [(0, "")] * n
        found[gathered] = json.loads(file.read_text())
    assert differences(tmp_path / "codes", tmp_path / "fp32") == set()
    (layers, values, codes, without_memory), (_, none, fp32, always) = found["codes"], found["fp32"]
    assert (layers, len(values), none) == (n_layers, n_codes, [])
    assert fp32 - codes == times * sum(values) * (4 - 1 / 2 - 1 / 256)
    assert always == 0 < without_memory and without_memory % n_codes == 0


def test_all_ranks_begin_with_the_first_one_s_weights(tiny, whole, tmp_path, monkeypatch):
    """Here the second draws others, as another CPU may from the same seed."""
    right, first_model = whole("ngpt"), train.first_model

    def drawn(*what):
        model = first_model(*what)
        with torch.no_grad():
            model.embed.weight.add_(float(os.environ["RANK"]))
        return model
    monkeypatch.setattr(train, "first_model", drawn)
    together(2, tiny(tmp_path, **RUNS["ngpt"]))
    assert differences(tmp_path, right) == set()


@pytest.mark.parametrize("wrong", [lambda real: lambda model, seed, step, micro=0: real(model, seed, step),
                                   lambda real: lambda model, seed, *where: real(model, seed + 1, *where)],
                         ids=["ranks with the same noise", "another seed"])
def test_control_wrong_noise_of_ranks_is_noticed(tiny, whole, tmp_path, monkeypatch, wrong):
    right = whole("ngpt")                           # made before anything is wrong
    monkeypatch.setattr(nvfp4, "set_step", wrong(nvfp4.set_step))
    train.main(tiny(tmp_path, **RUNS["ngpt"]))      # one process: it draws what such ranks would draw
    found = differences(tmp_path, right)
    assert {name.split("/")[0] for name in found} == {"model", "optimizer", "metrics"}
    assert {"metrics/0/grad_norm", "metrics/1/loss", "metrics/7/loss"} <= found


@pytest.mark.parametrize("n, way", [(2, "ddp"), pytest.param(4, "fsdp", marks=pytest.mark.long)])
def test_four_micro_batches_on_ranks_are_equal_to_summation_order(tiny, tmp_path, monkeypatch, n, way):
    """((a + b) + c) + d in one process, (a + c) + (b + d) on two ranks; at learning rate 0, where a
    difference cannot grow.

    error   u = 2^-24. A sum of four positive terms errs by 3u in any order, the divisions by 4 not at all:
            6u between two losses. Sums of gradients err by 3u (|a| + |b| + |c| + |d|) an element, of norm
            4 |g| at most unless the four cancel: 24u between two norms; and 16u for computing the norms.
    """
    four = {"gradient_accumulation_steps": 4, "learning_rate": 0, "max_steps": 2}
    train.main(tiny(tmp_path / "one", **four))
    together(n, tiny(tmp_path / "ranks", **four, parallel=way))
    noise, starts = nvfp4.set_step, train.train_starts
    monkeypatch.setattr(nvfp4, "set_step", lambda *where: noise(*where[:3], *(m // 2 for m in where[3:])))
    monkeypatch.setattr(train, "train_starts", lambda *where: starts(*where)[[0, 1, 2, 2]])
    train.main(tiny(tmp_path / "wrong", **four))    # control: noise shared by two, data read twice
    one, several, wrong = (metrics(tmp_path / name, "loss") for name in ("one", "ranks", "wrong"))
    for key, bound in (("loss", 6 * 2**-24), ("grad_norm", 40 * 2**-24)):
        assert all(abs(b[key] / a[key] - 1) <= bound for a, b in zip(one, several, strict=True)), key
        assert all(abs(b[key] / a[key] - 1) > bound for a, b in zip(one, wrong, strict=True)), "control"


def test_activation_checkpointing_changes_no_bit(tiny, whole, tmp_path):
    """Of weights, moments, losses and of the experts' load, which is counted once."""
    documents = RUNS["hybrid"] | {"document_start": 32, "max_steps": 3}         # a blank
    train.main(tiny(tmp_path / "documents", **documents))
    assert "metrics/1/loss" in differences(tmp_path / "documents", whole("hybrid"))     # control
    for name, settings, folder in (("documents again", documents, tmp_path / "documents"),
                                   ("random again", ALL_RANDOM, whole("gpt, all random"))):
        train.main(tiny(tmp_path / name, **settings, activation_checkpointing=True))
        assert differences(tmp_path / name, folder) == set()


@pytest.mark.parametrize("cfg, shape, n, fits", (
    (RECIPES["ngpt"], (96, 64), 2, True), (RECIPES["ngpt"], (96, 64), 4, False),        # 24 rows
    (RECIPES["ngpt"], (72, 64), 1, False), (RECIPES["nvfp4"], (96, 64), 3, True),
    (RECIPES["ngpt"], (4, 16, 64), 4, True), (RECIPES["ngpt"], (6, 16, 64), 4, False),
    (RECIPES["ngpt"], (4, 24, 64), 2, False),                                   # experts are filled up
    (FP4Config(until=0.5), (96, 64), 2, False), (RECIPES["bf16"], (96, 64), 2, False),
    (FP4Config(square_weights=False), (96, 64), 2, False), (FP4Config(gemms=("fprop",)), (96, 64), 2, False),
    (FP4Config(stochastic=("fprop.w", "dgrad.w")), (96, 64), 2, False),
    (FP4Config(hadamard=("fprop", "dgrad")), (96, 64), 2, False),
    (PaperConfig(dge_k=5.0), (96, 64), 2, False)), ids=str)
def test_which_weights_may_be_quantized_by_parts(cfg, shape, n, fits):
    """Whole blocks in every part, the same for both GEMMs, and nobody looks at the weight itself."""
    linear = torch.nn.Linear(shape[-1], shape[-2], bias=False)
    linear.weight = torch.nn.Parameter(torch.zeros(shape))
    layer = cfg.layer(linear, cfg)
    assert (for_parts(layer, n) is not None) == fits


@pytest.mark.parametrize("config, world", [
    ("ngpt_1b", 8), pytest.param("ngpt_hybrid_30b", 64, marks=pytest.mark.long)])
def test_parts_of_models_that_fit_no_rank(config, world):
    """On the meta device, among ranks that are not there: every parameter is in parts of its first axis, the
    last ones smaller or empty."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    c = load_config([f"configs/{config}.py"])
    whole = {name: p.shape for name, p in outline(c.model).named_parameters()}
    for rank in (0, world - 1):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        here = train.Ranks("fsdp")
        here.device, here.sharded = torch.device("meta"), True
        model = here.place(nvfp4.convert(outline(c.model), c.fp4, report=lambda line: None))
        torch.distributed.destroy_process_group()
        assert {name: p.shape for name, p in model.named_parameters()} == whole
        for p in model.parameters():
            part = -(-p.shape[0] // world)
            mine = min(max(p.shape[0] - rank * part, 0), part)
            assert p.to_local().shape == (mine, *p.shape[1:])


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("launcher", [[], pytest.param(
    ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], marks=pytest.mark.long)], ids=str)
def test_new_processes_go_on_with_a_run(tiny, whole, tmp_path, launcher):
    """The command itself, by torchrun too; of its ranks the first alone speaks."""
    train.main(tiny(tmp_path, **ALL_RANDOM, stop_at=5))
    done = subprocess.run(
        [sys.executable, *launcher, REPO / "train.py", *tiny(tmp_path, **ALL_RANDOM, resume=True)], text=True,
        capture_output=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and (launcher or not done.stderr), done.stderr
    assert done.stdout.count("converted ") == done.stdout.count("saved in ") == 1
    assert differences(tmp_path, whole("gpt, all random")) == set()


def test_a_run_that_changes_hands_ends_as_if_it_had_not(tiny, whole, tmp_path):
    """From parts to a file, from a file to parts, and from parts to one process."""
    for n, way, until in ((2, "fsdp", 2), (2, "ddp", 3), (2, "zero2", 5), (1, "ddp", 8)):
        argv = tiny(tmp_path, **ALL_RANDOM, parallel=way, stop_at=until, resume=until > 2)
        together(n, argv)
        assert len([*tmp_path.glob("ckpt*")]) == 1
        assert newest_checkpoint(tmp_path).is_dir() == (way != "ddp")
    assert differences(tmp_path, whole("gpt, all random")) == set()


@pytest.mark.long
def test_a_checkpoint_goes_from_any_number_of_ranks_to_any_other(tiny, tmp_path):
    """Four ranks train; then others load and save what they did, without a step: every bit is passed on."""
    settings = RUNS["hybrid"] | {"gradient_accumulation_steps": 12}
    together(4, tiny(tmp_path, **settings, parallel="fsdp", stop_at=2))
    first, path = contents(tmp_path), newest_checkpoint(tmp_path)
    assert len([*path.iterdir()]) == 6 and path.name == "ckpt-000000002"
    def stop_at_once():                             # before the first step, and yet save what was read
        set_up, train.Stop.why = train.set_up, "the test"

        def not_saved(*args):
            run = set_up(*args)
            run.saved = None
            return run
        train.set_up = not_saved
    for n, way in ((2, "ddp"), (3, "zero2"), (1, "ddp"), (2, "fsdp")):
        argv = tiny(tmp_path, **settings, parallel=way, resume=True)
        assert ends_of(n, argv, stop_at_once) == [(train.STOPPED, "")] * n
        assert newest_checkpoint(tmp_path).is_dir() == (way != "ddp") and len([*tmp_path.glob("ckpt*")]) == 1
        again = contents(tmp_path)                  # but for the evaluation of step 2: it is to be made anew
        assert all(again[name] == first[name] for name in first if not name.startswith("metrics/2 val"))


@pytest.fixture(scope="module")
def in_parts(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "run"
    together(2, tiny(out, **RUNS["ngpt"], parallel="fsdp", stop_at=2))
    return out


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, said", [
    (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp is damaged on disk"),
    (lambda path: flip(path / ".metadata"), ".metadata is damaged on disk"),
    (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp: No such file"),
    (lambda path: (path / "about.json").write_text("{}"), "not a checkpoint of this code")])
def test_a_damaged_checkpoint_in_parts_is_refused(tiny, in_parts, tmp_path, damage, said):
    """By one process and by ranks: the file is looked at by one of them alone, and the others end without a
    word."""
    out = shutil.copytree(in_parts, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")              # a command would print it
        model, _, _ = load_model(out)               # control: those weights
    found = contents(out)
    assert all(found[f"model/{name}"] == t.numpy().tobytes() for name, t in model.state_dict().items())
    damage(newest_checkpoint(out))
    argv = tiny(out, **RUNS["ngpt"], parallel="fsdp", resume=True)
    for reader in (lambda: load_model(out), lambda: train.train(load_config(argv))):
        with pytest.raises(UserError, match=re.escape(said)):
            reader()
    ends = ends_of(2, argv)
    assert [status for status, _ in ends] == [1, 1]
    assert all(not line or one_line(line) and said in line for _, line in ends)
    assert any(line for _, line in ends)


def test_what_is_not_whole_is_no_checkpoint(in_parts, tmp_path):
    out = shutil.copytree(in_parts, tmp_path / "run")
    newer = shutil.copytree(newest_checkpoint(out), out / "ckpt-000000004")
    (newer / "about.json").unlink()                 # killed while it was written
    assert newest_checkpoint(out).name == "ckpt-000000002"
    shutil.copy(newest_checkpoint(out) / "about.json", newer)   # control
    assert newest_checkpoint(out).name == "ckpt-000000004"


# ---------------------------------------------------------------- an optimizer of a fork

class Muon(torch.optim.Optimizer):
    """As a fork would write it: momentum and, for matrices, the nearest orthogonal matrix to that by
    Newton-Schulz (Keller Jordan's Muon). Ranks gather a whole matrix for it."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                parts = hasattr(buffer, "full_tensor")
                update = buffer.full_tensor() if parts else buffer
                if p.dim() == 2:
                    update = self.orthogonal(update)
                if parts:
                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                p.add_(update, alpha=-group["lr"])

    @staticmethod
    def orthogonal(matrix):
        x = matrix / (matrix.norm() + 1e-7)
        for _ in range(5):
            product = x @ x.T
            x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
        return x


def use_muon():
    train.make_optimizer = lambda model, c: Muon(model.parameters(), c.learning_rate)


def test_an_optimizer_of_a_fork_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    """train.make_optimizer() is all that it replaces. In a file and in parts, by one process and by ranks."""
    settings = RUNS["ngpt"] | {"learning_rate": 0.3, "max_steps": 6}
    train.main(tiny(tmp_path / "adam", **settings, stop_at=1))
    monkeypatch.setattr(train, "make_optimizer", train.make_optimizer)          # to be put back at the end
    use_muon()
    train.main(tiny(tmp_path / "whole", **settings))
    first, *_, last = metrics(tmp_path / "whole", "val_loss")
    assert last["val_loss"] < first["val_loss"] - 0.1
    kept = {name.split("/")[2] for name in contents(tmp_path / "whole") if name.startswith("optimizer/")}
    assert kept == {"momentum_buffer"}
    for until in (1, 2):
        train.main(tiny(tmp_path / "run", **settings, stop_at=until, resume=until > 1))
    for until in (3, 4):
        together(2, tiny(tmp_path / "run", **settings, parallel="fsdp", stop_at=until, resume=True))
    train.main(tiny(tmp_path / "run", **settings, resume=True))
    assert differences(tmp_path / "run", tmp_path / "whole") == set()
    with pytest.raises(UserError, match="was trained by AdamW; start another"):
        train.train(load_config(tiny(tmp_path / "adam", **settings, resume=True)))


# ---------------------------------------------------------------- what befalls a rank

def test_an_error_of_one_rank_ends_both_in_order(tiny, tmp_path):
    """The first cannot write; the other learns of it, and both leave the group they talk through."""
    def watch():
        leave = torch.distributed.destroy_process_group
        torch.distributed.destroy_process_group = lambda: (
            leave(), (tmp_path / f"left{os.environ['RANK']}").touch())
    (tmp_path / "file").write_text("")
    assert ends_of(2, tiny(tmp_path / "file", **RUNS["ngpt"]), watch) == [
        (1, f"train.py: {tmp_path / 'file'}: File exists\n"), (1, "")]
    assert {path.name for path in tmp_path.glob("left?")} == {"left0", "left1"}


def test_a_rank_that_is_gone_is_named(tiny, tmp_path):
    """One is killed in its third step. The other says that it lost one, in a line; what was saved stays."""
    def die(run, step):
        if (run.ranks.rank, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
    argv = tiny(tmp_path, **RUNS["ngpt"], checkpoint_interval=1)
    (status, said), other = ends_of(2, argv, lambda: each_step(die))
    assert other == (-signal.SIGKILL, "") and status == 1
    assert "rank 0 lost another one, whose own error says why" in said
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 2


def test_what_is_not_finite_on_one_rank_is_never_saved(tiny, tmp_path):
    """It stands in the part of one rank alone. Both say so; the checkpoint before stays whole."""
    def hurt(run, step):
        if (run.ranks.rank, step) == (1, 2):
            run.optimizer.state[run.model.head.weight]["exp_avg"].to_local()[0, 0] = float("inf")
    argv = tiny(tmp_path, **RUNS["ngpt"], parallel="fsdp", checkpoint_interval=1)
    ends = ends_of(2, argv, lambda: each_step(after=hurt))
    assert [status for status, _ in ends] == [1, 1]
    for (_, said), what in zip(ends, ("a tensor", r"optimizer\S*exp_avg"), strict=True):
        assert re.search(f"step 3: {what} is not finite: stopped", said)
    assert newest_checkpoint(tmp_path).name in ("ckpt-000000001", "ckpt-000000002")
    load_model(tmp_path)


def test_signalled_ranks_stop_together(tiny, tmp_path):
    """Both get a signal, at different moments, and say by their exit status to go on."""
    argv = tiny(tmp_path, **RUNS["ngpt"] | {"max_steps": 10**5, "parallel": "fsdp"})
    both = ranks(2, lambda: train.main(argv))
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"loss"' in log.read_text())
    for process in both:
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    assert [process.end()[0] for process in both] == [train.STOPPED] * 2
    assert newest_checkpoint(tmp_path).is_dir()


@pytest.mark.long
def test_kills_cost_nothing_but_steps(tiny, tmp_path):
    """One rank and two, by all ways, are killed in a random step, while the checkpoint before it may be on
    its way still; the other number goes on."""
    settings, out = ALL_RANDOM | {"checkpoint_interval": 1, "max_steps": 30}, tmp_path / "run"
    train.main(tiny(tmp_path / "whole", **settings))
    dice, ways, kills = random.Random(0), ("fsdp", "ddp", "zero2"), 0
    for n in range(60):
        path = newest_checkpoint(out)
        last = dice.randrange(6) + (load_checkpoint(path)["step"] if path.exists() else 0)
        moment = dice.uniform(0, 0.1)

        def die(run, step, last=last, moment=moment):
            if step == last:
                time.sleep(moment)
                os.kill(os.getpid(), signal.SIGKILL)
        argv = tiny(out, **settings, parallel=ways[n % 3], resume=path.exists())
        ends = ends_of(1 + n % 2, argv, lambda die=die: each_step(die))
        assert all(end in ((0, ""), (-signal.SIGKILL, "")) or "lost another one" in end[1] for end in ends)
        if ends[0][0] == 0:
            break
        kills += 1
    assert kills >= 5 and differences(tmp_path / "whole", out) == set()


@pytest.mark.parametrize("place, says", [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment must be a number"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment must be below WORLD_SIZE=2"),
    ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR and MASTER_PORT must")], ids=str)
def test_an_environment_that_is_no_launcher_s_is_refused(monkeypatch, place, says):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        train.Ranks()
