"""Train a model of model.py with the FP4 linear layers of nvfp4.py.

    python train.py configs/ngpt_tiny.py                          the default job: minutes on two CPU cores
    python train.py configs/ngpt_tiny.py --recipe=bf16 --out_dir=out/bf16
    python train.py configs/gpt_tiny.py configs/mine.py --max_steps=200
    torchrun --nproc_per_node=8 train.py configs/ngpt_1b.py       the same, on several GPUs or processes
    python train.py -h                                            every field, its default and meaning

A run is a folder, out_dir: config.json, metrics.jsonl (an object a step), log.txt, tokenizer.json, ckpt.pt.
It keeps no random state: data order, stochastic rounding and initialization are functions of seed and step.
So --resume continues a stopped run bit for bit, and n ranks compute what one process with n micro-batches
does. A GPU needs --deterministic for this, because the backward of attention adds up in any order otherwise.

Exit status: 0 done, also where --resume finds nothing left to do; 75 stopped by SIGINT, SIGTERM, SIGHUP or a
closed console, with a checkpoint: run it again with --resume; 1 an error, in one line. The second signal of
a kind ends a run at once, without a checkpoint.
"""
import contextlib
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import nvfp4
from configs import config
from configs.config import Count, Fraction, NotNegative, Some
from data.run import (STOPPED, Log, Stop, UserError, catch_signals, command, free_bytes, keep_memory,
                      load_checkpoint, naming_memory, newest_checkpoint)
from data.tokens import (Data, batch_at, keep_tokenizer, load_data, prepare_missing, train_starts,
                         unigram_loss, val_starts)
from graphs import Graph, graph_of, why_no_graph
from model import (ModelConfig, compile_blocks, count_parameters, first_model, flops_per_token, load_model,
                   outline, rank_bytes, sample_text)
from nvfp4 import RECIPES
from papers import PaperConfig, gradient_to_noise
from ranks import Ranks, local, not_finite, tensors_of

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    out_dir: str | None = None                      # run folder; None: out/<name of the first config file>
    dataset: str = "sotu"                           # folder below data/, or a path to one
    init_from: str | None = None                    # run folder, whose weights it begins with; None: random
    recipe: str | None = None                       # FP4 recipe, listed below; None: the architecture's own
    seed: Annotated[int, 0, 2**64 - 1] = 1337       # seeds initialization, data order and stochastic rounding
    # batch
    batch_size: Count = 16                          # sequences in a micro-batch
    gradient_accumulation_steps: Count = 1          # micro-batches in a step, over all ranks together
    # length and learning rate
    max_steps: Count = 1000                         # optimizer steps of the whole schedule
    stop_at: Count | None = None                    # stop at this step, with a checkpoint; None: at max_steps
    learning_rate: NotNegative = 1e-3               # peak
    min_lr: NotNegative | None = None               # at the end of the schedule; None: learning_rate / 50
    schedule: Literal["wsd", "cosine"] = "wsd"      # wsd: constant, then 1 - sqrt decay
    warmup_steps: Some = 0                          # linear warm-up, max_steps at most
    decay_fraction: Fraction = 0.15                 # wsd: the last part of max_steps, where the rate decays
    # optimizer
    weight_decay: NotNegative = 0.0                 # of matrices; all else has none
    beta1: Annotated[float, 0, 1 - 2**-53] = 0.9    # AdamW: of the first moment
    beta2: Annotated[float, 0, 1 - 2**-53] = 0.95   # AdamW: of the second moment
    grad_clip: NotNegative = 1.0                    # largest norm of the gradient; 0: no clipping
    # evaluation, logging, checkpoints
    eval_interval: Count = 100                      # steps between evaluations
    eval_iters: Count = 8                           # batches in an evaluation, always the same
    gradient_noise: bool = False                    # also measure gradient over noise of each FP4 layer
    log_interval: Count = 10                        # steps between console lines
    checkpoint_interval: Count = 500                # steps between checkpoints; one is written at the end too
    sample_tokens: Some = 120                       # length of the sample at the end; 0: none
    profile: Some = 0                               # steps to trace, from the third on: trace-<rank>.json
    mirror: Literal["none", "wandb", "tensorboard"] = "none"    # where metrics.jsonl is shown as well
    resume: bool = False                            # continue the run in out_dir
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 where it is fast
    compile: bool = True                            # torch.compile all that can be; False: nothing at all
    cuda_graph: bool = True                         # GPU: replay micro-batches, where that can be: graphs.py
    deterministic: bool = False                     # GPU: the same bits in every run, at some cost in speed
    parallel: Literal["ddp", "zero2", "fsdp"] = "ddp"  # what ranks keep: all, or parts of it; see ranks.py
    activation_checkpointing: bool = False          # keep a block's input alone; compute the rest twice

    model: ModelConfig = ModelConfig()
    fp4: PaperConfig = PaperConfig()


OWNERS = (("", Config), ("", ModelConfig), ("fp4_", PaperConfig))
OWN_RECIPE = {"gpt": "nvfp4", "ngpt": "ngpt"}       # what recipe=None stands for in each architecture


def load_config(argv):
    """Config files and --key=value flags, as configs/config.py reads them -> Config. raises UserError"""
    settings, files = config.read_settings(argv, OWNERS)
    return make_config(settings, Path(files[0]).stem if files else "run")


def make_config(settings, name="run"):
    """Config from {field: value}; what depends on other fields is resolved here, after all overrides."""
    of = config.by_owner(settings, OWNERS)
    try:
        c = Config(**of[Config], model=ModelConfig(**of[ModelConfig]))
        recipe = config.check_choice("recipe", c.recipe or OWN_RECIPE[c.model.arch], RECIPES)
        c = replace(c, recipe=recipe, fp4=PaperConfig(**vars(RECIPES[recipe]) | of[PaperConfig]),
                    out_dir=os.path.expanduser(c.out_dir or f"out/{name}"),
                    init_from=c.init_from and os.path.expanduser(c.init_from),
                    dataset=os.path.expanduser(c.dataset),
                    min_lr=c.learning_rate / 50 if c.min_lr is None else c.min_lr)
    except ValueError as error:
        raise UserError(str(error)) from None
    if c.min_lr > c.learning_rate:
        raise UserError(f"min_lr={c.min_lr} must be learning_rate={c.learning_rate} at most; it is where the "
                        "rate ends")
    if c.stop_at and c.stop_at > c.max_steps:
        raise UserError(f"stop_at={c.stop_at} must be in [1, {c.max_steps}], max_steps at most")
    return c


def flatten(c):
    """Config -> {field: value} as json takes it; unflatten(flatten(c)) == c."""
    return config.flatten(("", c), ("", c.model), ("fp4_", c.fp4))


def unflatten(flat):
    return make_config(config.unflatten(flat, OWNERS))


def load_run(folder):
    """A trained model in high precision, with its tokenizer and Config: (model, tokenizer, c)."""
    model, tokenizer, flat = load_model(folder)
    for note in config.unknown(flat, OWNERS):
        print(f"{folder}: {note} and is left out", file=sys.stderr)
    return model, tokenizer, unflatten(flat)


def help_text():
    """The docstring, every field, and what the recipes set."""
    lines = [__doc__.strip(), config.help_fields(OWNERS)]
    for recipe, cfg in RECIPES.items():
        own = "".join(f" ({arch}'s own)" for arch, name in OWN_RECIPE.items() if name == recipe)
        lines.append(f"  recipe {recipe}{own} sets {nvfp4.recipe_changes(cfg) or 'nothing else'}")
    return "\n".join(lines)


# ---------------------------------------------------------------- schedule and optimizer

def learning_rate(c, step):
    """Of a step: the lower one of warm-up and decay, where they meet."""
    rising = c.learning_rate * (step + 1) / c.warmup_steps if step < c.warmup_steps else math.inf
    if c.schedule == "cosine":
        t = max(0.0, (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps))
        left = 0.5 * (1 + math.cos(math.pi * t))
    else:
        start = c.max_steps * (1 - c.decay_fraction)
        left = 1 - math.sqrt(max(0.0, (step - start) / max(1.0, c.max_steps - start)))
    return min(rising, c.min_lr + (c.learning_rate - c.min_lr) * left)


def make_optimizer(model, c):
    """AdamW; weight decay for what the model calls its matrices, none for the rest (gains, nGPT's scales)."""
    matrices = {id(weight) for weight in model.matrices()}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    assert len(decayed) == len(matrices), "a matrix is no parameter of the model"
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


# ---------------------------------------------------------------- the loop

class Finished(UserError):
    """The run is complete already. main() prints this and exits with status 0."""


class Diverged(UserError):
    """A loss, a gradient, a weight or a moment that is not finite."""

    def __init__(self, what):
        super().__init__(f"{what}: stopped; lower learning_rate, or look at the data")


@dataclass
class Run:
    """A run: all that the loop reads and changes."""
    c: Config                                       # with what the data and a checkpoint decide filled in
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype                              # of the activations
    data: Data
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    log: Log
    first_step: int
    last_step: int                                  # the loop ends before it, after a last evaluation
    times: list = field(default_factory=list)       # seconds of each step done
    tokens: int = 0                                 # trained on so far
    saved: int | None = None                        # step of the newest complete checkpoint
    trace: torch.profiler.profile | None = None     # records a few steps; see trace_of()
    graph: Graph | None = None                      # of the micro-batches, on a GPU; see graphs.py
    kind: tuple | None = None                       # of the last step: shape and recipes of its micro-batches

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def sequence_length(c, step):
    """Tokens in a sequence. A fork that trains on growing lengths changes this function alone: batches, the
    count of tokens, speed and MFU follow."""
    return c.model.block_size


def tokens_of(c, step):
    """Tokens of all micro-batches of a step."""
    return c.gradient_accumulation_steps * c.batch_size * sequence_length(c, step)


def micro_batches(run, step):
    """A function of n: micro-batch n of a step, counted over all ranks, as (idx, targets), int64 (B, T)."""
    c, T = run.c, sequence_length(run.c, step)
    shape = c.gradient_accumulation_steps, c.batch_size
    starts = train_starts(len(run.data.train), T, shape, c.seed, step)
    return lambda n: batch_at(run.data.train, starts[n], T, run.device)


def add_gradients(run, idx, targets):
    """Forward and backward of a micro-batch -> its part of the mean loss of a rank's step, ()."""
    with run.autocast():
        loss = run.model(idx, targets) / (run.c.gradient_accumulation_steps // run.ranks.world)
    loss.backward()
    return loss.detach()


def training_step(run, step):
    """One optimizer step -> (loss, gradient norm, {name: number} that the model adds to the log)."""
    c, ranks, model, optimizer = run.c, run.ranks, run.model, run.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(c, step)
    micro_batch, mine = micro_batches(run, step), ranks.share(range(c.gradient_accumulation_steps))
    graph = graph_of(run, (c.batch_size, sequence_length(c, step)), add_gradients)
    mean_loss = torch.zeros((), device=run.device)
    for n in mine:
        nvfp4.set_step(model, c.seed, step, n)      # random bits of this micro-batch
        ranks.before_backward(model, last=n == mine[-1])
        idx, targets = micro_batch(n)
        mean_loss += graph.replay(idx, targets) if graph else add_gradients(run, idx, targets)
    ranks.average(model)
    loss = float(ranks.sum(mean_loss) / ranks.world)
    norm = clip_gradient(model, c.grad_clip, ranks)
    if not math.isfinite(loss) or not math.isfinite(norm):                      # the model stays as it was
        raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}")
    optimizer.step()
    model.normalize_()                              # nGPT: back onto the sphere
    optimizer.zero_grad(set_to_none=graph is None)  # a graph adds to gradients where they are
    more = model.after_step(ranks.sum)              # a mixture of experts balances its load
    return loss, norm, more


def clip_gradient(model, largest, ranks):
    """Shorten the gradient to this norm, if it is longer; 0: never. Returns the norm that it had.

    We add squares up in fp64: ranks that share a model add in another order, and fp32 would show it.
    """
    here = [local(p.grad) for p in model.parameters() if p.grad is not None]
    parts = [part for g in here for part in g.flatten().split(2**22)]           # a CPU copies each to fp64
    total = torch.stack(torch._foreach_norm(parts, dtype=torch.float64)).square().sum()
    norm = float((ranks.sum(total) if ranks.sharded else total).sqrt().float())
    factor = largest / (norm + 1e-6) if largest else 1.0
    if factor < 1:
        torch._foreach_mul_(here, factor)
    return norm


@torch.no_grad()
def validation_loss(run):
    """Mean loss over the fixed validation batches, which the ranks share."""
    c, n, world = run.c, run.c.eval_iters, run.ranks.world
    starts = val_starts(len(run.data.val), c.model.block_size, (n, c.batch_size))
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.model.eval()
    # Every rank computes as many batches, since ranks may share weights. We count each batch once.
    for i in run.ranks.share(range(math.ceil(n / world) * world)):
        batch = batch_at(run.data.val, starts[min(i, n - 1)], c.model.block_size, run.device)
        with run.autocast():
            loss = run.model(*batch)
        if i < n:
            total += loss.double()
    run.model.train()
    return float(run.ranks.sum(total)) / n


NOISE = "gradient_to_noise/"                        # in metrics.jsonl it stands before a layer's name


def evaluate(run, step):
    """Validation in high precision and, where there are layers in FP4, in FP4: a row of metrics.jsonl."""
    nvfp4.set_step(run.model, run.c.seed, step)
    with nvfp4.high_precision(run.model):
        loss = validation_loss(run)
    bits_per_byte = 1 / math.log(2) / run.data.header.bytes_per_token
    row = {"step": step, "val_loss": loss, "val_bpb": loss * bits_per_byte}
    if any(m.cfg.gemms for m in nvfp4.fp4_layers(run.model)):
        row["val_loss_fp4"] = validation_loss(run)
    if run.c.gradient_noise:                        # the first micro-batch: all ranks find the same
        batch = micro_batches(run, step)(0)

        def first_loss():
            with run.autocast():                    # autocast is for the forward alone
                return run.model(*batch)
        ratios = gradient_to_noise(run.model, first_loss)
        row |= {NOISE + name: ratio for name, ratio in ratios.items()}
    for name, value in row.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} {value}")
    return row


def save(run, step):
    """A checkpoint, whole or not at all. A tensor that is not finite takes no good one's place."""
    c, wrong = run.c, not_finite(tensors_of(run.model, run.optimizer))
    if run.ranks.any(wrong is not None):
        raise Diverged(f"step {step}: {wrong or 'a tensor'} is not finite")
    run.ranks.once(run.log.sync)                    # no checkpoint without the rows before it
    about = {"step": step, "config": flatten(c), "origin": run.data.origin, "rows": run.log.crc_before}
    run.ranks.save(c.out_dir, run.model, run.optimizer, about)
    if not run.ranks.sharded:                       # parts are on their way still
        run.saved = step


def loop(run, stop):
    """Evaluate, save, train, report, until the last step or until a Stop says so. Returns the last
    evaluation."""
    c, ranks, row = run.c, run.ranks, {}
    for step in range(run.first_step, run.last_step + 1):
        stopped = ranks.any(bool(stop.why)) and step < run.last_step
        last = stopped or step == run.last_step
        if nvfp4.switch_late(run.model, step / c.max_steps):
            run.log(f"step {step}: {','.join(c.fp4.switched)} in high precision from now on")
        if not stopped and (step % c.eval_interval == 0 or last):
            row = evaluate(run, step)
            report_evaluation(run, row)
        due = last or step % c.checkpoint_interval == 0
        if due and (stopped or step > run.first_step) and step != run.saved:
            save(run, step)
        written = ranks.finish_saving(wait=last)    # step of a checkpoint in parts that is complete now
        if written is not None:
            run.saved = written
        if last:
            break
        start = time.perf_counter()
        loss, norm, more = training_step(run, step)
        run.times.append(time.perf_counter() - start)
        run.tokens += tokens_of(c, step)
        report_step(run, step, loss, norm, more)
        if run.trace:
            run.trace.step()
    if stopped:
        stop.at = step
        why = stop.why or "signal"                  # another rank got it
        run.log(f"{why}: stopped at step {step}; continue with --resume")
    elif c.sample_tokens and (ranks.first or ranks.sharded):
        report_sample(run, step)
    run.log(f"saved in {c.out_dir}")
    ranks.barrier()                                 # no rank leaves while the first one still writes
    return row


# ---------------------------------------------------------------- report

def introduce(run, notes):
    """The model, the machine, and how hard the text is."""
    c, (total, active) = run.c, count_parameters(run.model)
    run.log(f"{c.model.arch} with {total:,} parameters ({active:,} active), "
            f"recipe {c.recipe}, {str(run.dtype).removeprefix('torch.')} activations")
    run.log(nvfp4.capability(run.device, c.fp4.format))
    for note in notes:
        run.log(note)
    if run.device.type == "cuda":
        why = why_no_graph(run)
        run.log(f"no CUDA graph: {why}" if why else "micro-batches are a CUDA graph from the second step on")
    unigram = unigram_loss(run.data.train, run.data.val)
    run.log(f"token frequencies alone would give a validation loss of {unigram:.4f}")


def report_evaluation(run, row):
    line = f"step {row['step']}/{run.c.max_steps} | val loss {row['val_loss']:.4f}"
    line += f" | {row['val_bpb']:.3f} bits/byte"
    if "val_loss_fp4" in row:
        line += f" | in FP4 {row['val_loss_fp4']:.4f}"
    ratios = {name.removeprefix(NOISE): ratio for name, ratio in row.items() if name.startswith(NOISE)}
    if ratios:
        noisiest = min(ratios, key=ratios.get)
        line += f" | gradient over noise {ratios[noisiest]:.2f} in {noisiest}"
    run.log(line)
    run.log.metrics(row)


def report_step(run, step, loss, norm, more):
    """Every step to metrics.jsonl; every log_interval-th to the console, with the speed and what is left."""
    c, times, lr = run.c, run.times, run.optimizer.param_groups[0]["lr"]
    run.log.metrics({"step": step, "loss": loss, "lr": lr, "grad_norm": norm,
                     "tokens": run.tokens, "ms": 1e3 * times[-1], **more})
    if step % c.log_interval == 0 or step + 1 == run.last_step:
        rate, peak = tokens_of(c, step) / usual(times), peak_flops(run.device)
        flops = flops_per_token(run.model, sequence_length(c, step))
        line = [f"step {step}/{c.max_steps}", f"loss {loss:.4f}", f"lr {lr:.1e}", f"norm {norm:.2f}",
                f"{1e3 * times[-1]:.0f} ms", f"{rate / 1e3:.1f}k tok/s"]
        line += [f"mfu {100 * rate * flops / peak / run.ranks.world:.1f}%"] if peak else []
        line += [f"eta {clock(usual(times) * (run.last_step - step - 1))}"] if len(times) > 1 else []
        run.log(" | ".join(line))


def usual(times):
    """Seconds of a step: the median of the last 20. The first compiles, and counts only while it is alone."""
    return float(np.median(times[1:][-20:] or times))


def clock(seconds):
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


PROMPT = 8                                          # tokens from the middle of the validation text


def report_sample(run, step):
    val, tokenizer = run.data.val, run.data.tokenizer
    prompt = tokenizer.decode(val[len(val) // 2:][:PROMPT].tolist())
    nvfp4.set_step(run.model, run.c.seed, step)
    run.model.eval()
    with run.autocast(), torch.compiler.set_stance("force_eager"):     # not a kernel for every length
        text = sample_text(run.model, tokenizer, prompt, n_tokens=run.c.sample_tokens, seed=run.c.seed)
    run.log(f"\nsample, begun by {PROMPT} tokens of the validation text:\n{text}\n")


# Dense bf16 FLOP/s by NVIDIA's data sheets, for the MFU; the first that a GPU's name holds as whole words.
PEAK_BF16 = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
             "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2500e12, "L4": 121e12, "L40S": 362e12}


def peak_flops(device):
    """Dense bf16 FLOP/s of a GPU by its name; None for a name not in the table, or a slice of a GPU (MIG)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    named = (flops for gpu, flops in PEAK_BF16.items() if re.search(rf"\b{gpu}\b", name))
    return None if "MIG" in name else next(named, None)


# ---------------------------------------------------------------- set up

# --resume accepts other values of these fields. WATCHING fields place a run or look at it; those of MACHINE
# change the order of sums at most. The dataset may move: check_resumable() compares the origin of the data.
WATCHING = ("out_dir", "resume", "stop_at", "device", "eval_interval", "eval_iters", "gradient_noise",
            "log_interval", "checkpoint_interval", "sample_tokens", "profile", "mirror")
MACHINE = ("compile", "cuda_graph", "deterministic", "parallel", "activation_checkpointing")
FREE = (*WATCHING, *MACHINE, "init_from", "dataset")


def check_resumable(c, saved, origin):
    """A run goes on with the same model, numerics and data; UserError names the first field that differs."""
    old, step = saved["config"], saved["step"]
    for note in config.unknown(old, OWNERS):
        raise UserError(f"--resume: the run in {c.out_dir} was {note}; finish it with that version")
    free = (*FREE, "max_steps") if may_change_length(c, old, step) else FREE
    for name, value in flatten(c).items():
        if name not in free and name in old and old[name] != value:
            instead = ", with --init_from=" + c.out_dir if name == "max_steps" else ""
            raise UserError(f"--resume: {name}={value} but the run in {c.out_dir} has {name}={old[name]}; "
                            f"leave it as it was, or start another --out_dir{instead}")
    if saved["origin"] != origin:
        raise UserError(f"--resume: {c.dataset} is not the data of the run in {c.out_dir} any more "
                        f"({origin}, not {saved['origin']}); prepare that, or start another --out_dir")
    if step >= c.max_steps:
        raise Finished(f"the run in {c.out_dir} is complete, at step {step}; start another --out_dir")
    if step >= (c.stop_at or c.max_steps):
        raise Finished(f"the run in {c.out_dir} is at step {step} already; raise --stop_at")


def may_change_length(c, old, step):
    """Whether with max_steps as it is now the run would have come to this step in the same way: its rate has
    not begun to decay, and no GEMM has left FP4."""
    before = replace(c, max_steps=old["max_steps"])
    done = step / min(c.max_steps, before.max_steps)
    last = max(0, step - 1)
    return (learning_rate(c, last) == learning_rate(before, last)
            and (c.fp4.until is None or done <= c.fp4.until))


def refuse_to_overwrite(c):
    if newest_checkpoint(c.out_dir).exists() and not c.resume:
        raise UserError(f"out_dir={c.out_dir} holds a run; continue it with --resume, or give another "
                        "--out_dir")


def check_memory(c, sizes, ranks):
    """UserError where a rank's weights, gradients and moments do not fit into free memory. A step takes more;
    an out-of-memory error says then what to lower. sizes: the model's outline"""
    free, need = free_bytes(ranks.device), rank_bytes(c.parallel, sizes, ranks.world)
    if free and ranks.device.type == "cpu":
        free /= ranks.beside                        # who share this memory
    if free is not None and need > free:
        raise UserError(f"weights, gradients and Adam's moments take {need / 2**30:,.1f} GiB of a rank, and "
                        f"{free / 2**30:,.1f} GiB are free here; take more ranks and --parallel=fsdp, or a "
                        "smaller model")


def choose_device(c, local_rank=0):
    """(device, dtype of the activations), 'auto' resolved."""
    kind = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda must find a GPU, and there is none; use --device=cpu")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK={local_rank} must be below the {torch.cuda.device_count()} GPUs of this "
                        "machine; lower --nproc_per_node")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    fast = kind == "cuda" or nvfp4.cpu_has_bf16()
    dtype = torch.float32 if c.dtype == "float32" or (c.dtype == "auto" and not fast) else torch.bfloat16
    return device, dtype


def compile_model(model, c):
    """Have torch.compile fuse all that lies between the GEMMs. Returns whether it does."""
    if not c.compile or not nvfp4.can_compile(model.embed.weight.device.type):
        return False
    nvfp4.set_up_compiler()
    compile_blocks(model)
    return True


def trace_of(c, rank):
    """A profiler of c.profile steps, after two that compile; None without. Open in chrome://tracing."""
    if not c.profile:
        return None
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=2, active=c.profile, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(f"{c.out_dir}/trace-{rank}.json"))


def meet(c):
    """Start to talk to the other processes of torchrun, if any -> (Ranks, device, dtype of activations)."""
    ranks = Ranks(c.parallel)
    device, dtype = choose_device(c, ranks.local)
    if c.gradient_accumulation_steps % ranks.world:
        raise UserError(f"gradient_accumulation_steps={c.gradient_accumulation_steps} must be a multiple of "
                        f"the {ranks.world} ranks, which share them")
    if c.gradient_noise and ranks.sharded:
        raise UserError(f"gradient_noise=True must see whole weights; take --parallel=ddp, not {c.parallel}")
    if device.type == "cpu":
        keep_memory()
    ranks.join(device)
    return ranks, device, dtype


def set_up(c, after, stop):
    """A Run as the config says; UserError for what cannot be, before a file of the run is touched.

    after   an ExitStack, for what a run has to leave behind in order, however it ends
    """
    if c.deterministic:                             # attention's backward, cuBLAS and indexing ask for these
        after.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")             # read when cuBLAS begins
        torch.use_deterministic_algorithms(True)
    ranks, device, dtype = meet(c)
    after.callback(ranks.close)
    refuse_to_overwrite(c)
    path = newest_checkpoint(c.out_dir)
    saved = load_checkpoint(path) if c.resume else None

    # --- data, and the config that depends on it
    ranks.once(prepare_missing, c.dataset)
    data = load_data(c.dataset, c.model.block_size, c.model.vocab_size)
    notes = []
    c = replace(c, model=replace(c.model, vocab_size=data.vocab_size))
    if c.model.document_start == -1:
        c = replace(c, model=replace(c.model, document_start=data.document_start))
    if c.warmup_steps > c.max_steps:
        notes.append(f"warmup_steps={c.warmup_steps} shortened to max_steps={c.max_steps}")
        c = replace(c, warmup_steps=c.max_steps)
    if saved:
        check_resumable(c, saved, data.origin)
        c = replace(c, init_from=saved["config"].get("init_from"))

    # --- model and optimizer, new or from the checkpoint
    converted = []
    try:
        model = outline(c.model)
        ranks.each(check_memory, c, model, ranks)
        model = make_model(c, model, ranks, data.tokenizer, converted.append, begins=not saved)
    except ValueError as error:                     # sizes that do not fit each other, or the format's blocks
        raise UserError(str(error)) from None
    if c.gradient_noise and not any({"dgrad", "wgrad"} & {*m.cfg.gemms, *m.cfg.e5m2}
                                    for m in nvfp4.fp4_layers(model)):
        notes.append("gradient_noise: no layer has its backward in FP4, and so there is none")
    optimizer = make_optimizer(model, c)
    if saved:
        ranks.restore(path, saved, model, optimizer)

    # --- the folder, the log, and what they say first
    first_step = saved["step"] if saved else 0
    log = Log(stop)
    after.callback(log.close)
    crc = saved and saved.get("rows")               # of the metrics that the checkpoint has seen
    ranks.once(log.open, Path(c.out_dir), flatten(c), first_step, crc, c.mirror,
               lambda: refuse_to_overwrite(c))      # again: another run may have ended here meanwhile
    ranks.once(keep_tokenizer, c.dataset, c.out_dir)
    run = Run(c, ranks, device, dtype, data, model, optimizer, log, first_step=first_step,
              last_step=c.stop_at or c.max_steps, saved=first_step if saved else None,
              trace=trace_of(c, ranks.rank))
    run.tokens = sum(tokens_of(c, step) for step in range(first_step))
    introduce(run, [*converted, *notes])
    if compile_model(model, c):
        log("compiling: the first step takes a minute or so; the next run finds the kernels cached")
    return run


def make_model(c, sizes, ranks, tokenizer, report, begins):
    """The converted model on its device, or this rank's part of it, of its outline, sizes. It has values if
    the run begins."""
    model = ranks.place(nvfp4.convert(sizes, c.fp4, report))
    if begins:
        torch.manual_seed(c.seed)
        ranks.fill(model, ranks.once(first_model, c.model, c.init_from, tokenizer))
    if ranks.sharded:
        if c.parallel == "fsdp":                    # FSDP frees a block's weights: so do we with 4-bit ones
            for block in model.blocks:
                block.register_forward_hook(nvfp4.forget_weights, always_call=True)
        n = ranks.gather_codes(model)
        report(f"ranks gather the codes of {n} of {len(nvfp4.fp4_layers(model))} FP4 weights")
    model.activation_checkpointing = c.activation_checkpointing
    return model


def train(c, stop=None):
    """Train as the config says, until a Stop says to stop. Returns the last evaluation as a dict.

    raises  UserError: Finished, Diverged and others. One that ends a run says what is left of it
    """
    stop = stop or Stop()
    advice = f"lower batch_size={c.batch_size} (and raise gradient_accumulation_steps) or the model's sizes"
    with contextlib.ExitStack() as after, naming_memory(advice):
        after.enter_context(nvfp4.use_compiler(c.compile))
        run = set_up(c, after, stop)
        stop.begun, stop.times = True, run.times    # from here on a signal leaves a checkpoint
        with run.ranks.together(), run.trace or contextlib.nullcontext():
            try:
                return loop(run, stop)
            except UserError as error:
                if isinstance(error, Diverged):     # on all ranks: a checkpoint on its way can still arrive
                    written = run.ranks.finish_saving()
                    run.saved = run.saved if written is None else written
                left = "there is no checkpoint"
                if run.saved is not None:
                    left = f"the checkpoint of step {run.saved} is whole"
                error.args = (f"{error}; {left} in {c.out_dir}",)
                raise


# ---------------------------------------------------------------- the command

@command("train.py")
def main(argv):
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return
    stop = Stop()
    stop.begun = False                              # until the loop begins
    try:
        with catch_signals(stop):
            train(load_config(argv), stop)
    except Finished as done:
        print(done)
    if stop.at is not None:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(sys.argv[1:])
