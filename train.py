"""Train a model of model.py with the FP4 linear layers of nvfp4.py.

    python train.py configs/ngpt_tiny.py                          the default job: minutes on two CPU cores
    python train.py configs/ngpt_tiny.py --recipe=bf16 --out_dir=out/bf16
    python train.py configs/gpt_tiny.py configs/mine.py --max_steps=200
    torchrun --nproc_per_node=8 train.py configs/ngpt_1b.py       the same, on several GPUs or processes
    python train.py -h                                            every field, its default and meaning

A run is a folder, out_dir: config.json, metrics.jsonl (an object a step), log.txt, ckpt.pt. Nothing random is
kept in it: data order, stochastic rounding and initialization are functions of the seed and the step, so a
run that was stopped goes on bit for bit (--resume), and n ranks compute what one process with n micro-batches
does. On a GPU that takes --deterministic: attention's backward there adds up in the order in which its parts
are done, unless it is told not to.

Exit status: 0 done, also where --resume finds nothing left to do; 75 stopped with a checkpoint, by SIGINT,
SIGTERM, SIGHUP or a closed console: run it again with --resume; 1 an error, which running it again does not
mend. The same signal once more ends a run at once, without a checkpoint.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # no traceback of imports; main() has a way of its own

import contextlib
import ctypes
import json
import math
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor

import nvfp4
from configs import config
from configs.config import Count, Fraction, NotNegative, Some
from data.run import (Lines, Stop, UserError, catch_signals, command, mute, naming, naming_memory,
                        read_json_lines, sweep, write_json, write_whole)
from data.tokens import Data, batch_at, load_data, prepare_missing, train_starts, unigram_loss, val_starts
from model import (ModelConfig, build, compile_blocks, count_parameters, flops_per_token, is_finite,
                   load_checkpoint, load_model, misfit, newest_checkpoint, outline, rank_bytes, sample_text)
from nvfp4 import RECIPES
from papers import PaperConfig
from ranks import Ranks, put, read_parts, remove_others

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    out_dir: str | None = None                      # run folder; None: out/<name of the first config file>
    dataset: str = "sotu"                           # folder below data/, or a path to one
    recipe: str | None = None                       # FP4 recipe, listed below; None: the architecture's own
    seed: Annotated[int, 0, 2**64 - 1] = 1337       # of initialization, data order and stochastic rounding
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
    weight_decay: NotNegative = 0.0                 # of matrices
    beta1: Annotated[float, 0, 1 - 2**-53] = 0.9    # AdamW
    beta2: Annotated[float, 0, 1 - 2**-53] = 0.95   # AdamW
    grad_clip: NotNegative = 1.0                    # largest norm of the gradient; 0: no clipping
    # evaluation, logging, checkpoints
    eval_interval: Count = 100                      # steps between evaluations
    eval_iters: Count = 8                           # batches in an evaluation, always the same
    gradient_noise: bool = False                    # and gradient over noise of each FP4 backward
    log_interval: Count = 10                        # steps between console lines
    checkpoint_interval: Count = 500                # steps between checkpoints; one is written at the end too
    sample_tokens: Some = 120                       # length of the sample at the end; 0: none
    profile: Some = 0                               # steps to trace, after two others: trace-<rank>.json
    mirror: Literal["none", "wandb", "tensorboard"] = "none"    # where metrics.jsonl is shown as well
    resume: bool = False                            # continue the run in out_dir
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 where it is fast
    compile: bool = True                            # torch.compile all that can be; False: nothing at all
    deterministic: bool = False                     # GPU: the same bits in every run, at some cost in speed
    parallel: Literal["ddp", "zero2", "fsdp"] = "ddp"  # what ranks keep: all, or parts of it; see ranks.py
    activation_checkpointing: bool = False          # keep a block's input alone; compute the rest twice

    model: ModelConfig = ModelConfig()
    fp4: PaperConfig = PaperConfig()

    @property
    def tokens_per_step(self):
        return self.gradient_accumulation_steps * self.batch_size * self.model.block_size


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
                    out_dir=c.out_dir or f"out/{name}",
                    min_lr=c.learning_rate / 50 if c.min_lr is None else c.min_lr)
    except ValueError as error:
        raise UserError(str(error)) from None
    if c.stop_at and c.stop_at > c.max_steps:
        raise UserError(f"stop_at={c.stop_at} must be in [1, {c.max_steps}], max_steps at most")
    return c


def flatten(c):
    """Config -> {field: value} as json takes it; unflatten(flatten(c)) == c."""
    return config.flatten(("", c), ("", c.model), ("fp4_", c.fp4))


def unflatten(flat):
    return make_config(config.unflatten(current_names(flat), OWNERS))


def current_names(flat):
    """What flatten() made in an earlier version, under today's names."""
    flat = dict(flat)
    if "fp4_weight_block" in flat:
        flat["fp4_square_weights"] = flat.pop("fp4_weight_block") == "16x16"
    if "fp4_signs" in flat:
        flat["fp4_hadamard_signs"] = flat.pop("fp4_signs")
    return flat


def help_text():
    """The docstring, every field, and what the recipes set."""
    lines = [__doc__.strip(), config.help_fields(OWNERS)]
    for recipe, cfg in RECIPES.items():
        own = "".join(f" ({arch}'s own)" for arch, name in OWN_RECIPE.items() if name == recipe)
        lines.append(f"  recipe {recipe}{own} sets {nvfp4.recipe_changes(cfg) or 'nothing else'}")
    return "\n".join(lines)


# ---------------------------------------------------------------- schedule and optimizer

def learning_rate(c, step):
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    if c.schedule == "cosine":
        t = (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
        return c.min_lr + (c.learning_rate - c.min_lr) * 0.5 * (1 + math.cos(math.pi * t))
    start = c.max_steps * (1 - c.decay_fraction)
    t = max(0.0, (step - start) / max(1.0, c.max_steps - start))
    return c.min_lr + (c.learning_rate - c.min_lr) * (1 - math.sqrt(t))


def make_optimizer(model, c):
    """AdamW; weight decay for what the model calls its matrices, none for the rest (gains, nGPT's scales)."""
    matrices = {id(weight) for weight in model.matrices()}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    others = [p for p in model.parameters() if id(p) not in matrices]
    assert len(decayed) == len(matrices), "a matrix is no parameter of the model"
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


def update(model, optimizer, grad_clip):
    """One step of the optimizer and back onto the sphere; nothing where the gradient is not finite. Returns
    the gradient's norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if math.isfinite(norm):
        optimizer.step()
        model.normalize_()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------- checkpoints

class Finished(UserError):
    """There is nothing left to do: no mistake, but no run either."""


class Diverged(UserError):
    """A loss, a gradient, a weight or a moment that is not finite."""

    def __init__(self, what):
        super().__init__(f"{what}: stopped; lower learning_rate, or look at the data")


def about(step, c, origin, rows):
    """What a checkpoint says of itself; rows: CRC-32 of those of metrics.jsonl that a resumed run keeps."""
    return {"step": step, "config": flatten(c), "origin": origin, "rows": rows}


def save_checkpoint(path, model, optimizer, step, c, origin, rows=None):
    """Whole or not at all, as data/run.py writes; what is not finite takes no good one's place.

    raises  Diverged, UserError
    """
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **about(step, c, origin, rows)}
    for part in ("model", "optimizer"):
        wrong = misfit(saved[part], saved[part], part)
        if wrong:
            raise Diverged(f"step {step}: {wrong}")
    write_whole({path: lambda file: torch.save(saved, file)})
    remove_others(path)


# Fields that place a run or look at it, and those with which it may go on too, for they change no more than
# the order of sums; of the dataset its origin tells whether it is the same.
WATCHING = ("out_dir", "resume", "stop_at", "device", "eval_interval", "eval_iters", "gradient_noise",
            "log_interval", "checkpoint_interval", "sample_tokens", "profile", "mirror")
FREE = (*WATCHING, "dataset", "compile", "deterministic", "parallel", "activation_checkpointing")


def check_resumable(c, saved, origin):
    """A run goes on with the same model, numerics and data; UserError names the first field that differs."""
    old = current_names(saved["config"])
    for note in config.unknown(old, OWNERS):
        raise UserError(f"--resume: the run in {c.out_dir} was {note}; finish it with that version")
    for name, value in flatten(c).items():
        if name not in FREE and name in old and old[name] != value:
            raise UserError(f"--resume: {name}={value} but the run in {c.out_dir} has {name}={old[name]}; "
                            f"leave it as it was, or start another --out_dir")
    if saved["origin"] != origin:
        raise UserError(f"--resume: {c.dataset} is not the data of the run in {c.out_dir} any more "
                        f"({origin}, not {saved['origin']}); prepare that, or start another --out_dir")


def check_unfinished(c, saved):
    if saved["step"] >= c.max_steps:
        raise Finished(f"the run in {c.out_dir} is complete, at step {saved['step']}; start another "
                       "--out_dir")
    if saved["step"] >= (c.stop_at or c.max_steps):
        raise Finished(f"the run in {c.out_dir} is at step {saved['step']} already; raise --stop_at")


def learned(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def tensors_of(model, optimizer, begun):
    """Weights, buffers and, once training has begun, Adam's moments: {name: tensor, or a rank's part}."""
    found = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for i, p in enumerate(learned(optimizer) if begun else ()):
        if not optimizer.state[p]:                  # as AdamW makes them in its first step
            optimizer.state[p] |= {"step": torch.zeros((), device=p.device),
                                   "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        found |= {f"optimizer/{i}/{key}": tensor for key, tensor in optimizer.state[p].items()}
    return found


def not_finite(tensors):
    """The name of a tensor that is not, of what is here of it, or None."""
    here = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return next((name for name, t in here.items() if not is_finite(t)), None)


def check_fits(saved, sizes, optimizer, path):
    """Every tensor of a checkpoint must be one of the model's weights or Adam's moments, and finite."""
    like = optimizer.state_dict()
    if saved["step"]:                               # then AdamW holds these for each parameter
        like["state"] = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
                         for i, p in enumerate(learned(optimizer))}
    wrong = (misfit(saved["model"], dict(sizes.state_dict()), "model")
             or misfit(saved["optimizer"], like, "optimizer", free=("lr",)))
    counts = set() if wrong else {int(state["step"]) for state in saved["optimizer"]["state"].values()}
    if counts - {min(saved["step"], 2**24)}:        # where fp32 stops to count
        wrong = f"step {saved['step']} is not that of its optimizer, {max(counts)}"
    if wrong:
        raise UserError(f"{path}: {wrong}, so that no run can start from it; start another --out_dir")


def restore(saved, path, model, optimizer, sizes, ranks):
    """Weights and moments as they were left, in one file or in parts, or this rank's part of them."""
    if path.is_file():
        check_fits(saved, sizes, optimizer, path)
    if path.is_file() and not ranks.sharded:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return
    tensors = tensors_of(model, optimizer, saved["step"] > 0)
    if path.is_file():
        moments = saved["optimizer"]["state"].items()
        put(tensors, {f"model/{name}": t for name, t in saved["model"].items()}
            | {f"optimizer/{i}/{key}": t for i, state in moments for key, t in state.items()})
    else:
        read_parts(path, tensors, saved, ranks)
        wrong = not_finite(tensors)
        if ranks.any(wrong is not None):
            raise UserError(f"{path}: {wrong or 'a tensor'} is not finite, so that no run can start from it; "
                            "start another --out_dir")


def load_run(folder, device="cpu"):
    """A trained model in high precision, with its tokenizer and Config: (model, tokenizer, c)."""
    model, tokenizer, flat = load_model(folder, device)
    for note in config.unknown(current_names(flat), OWNERS):
        print(f"{folder}: {note} and is left out", file=sys.stderr)
    return model, tokenizer, unflatten(flat)


# ---------------------------------------------------------------- set up

def keep_memory():
    """Have the C library keep freed memory. By default it returns each large tensor to the kernel, which
    clears the pages when the next one asks for them: much of a training step on a CPU."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):                      # a C library without mallopt
            libc = ctypes.CDLL(None)
            # M_MMAP_THRESHOLD: no tensor gets pages of its own (older versions allow 32 MiB at most);
            # M_TRIM_THRESHOLD: free memory stays with the process
            if libc.mallopt(-3, 2**31 - 1) or libc.mallopt(-3, 2**25):
                libc.mallopt(-1, 2**31 - 1)


# Dense bf16 FLOP/s by NVIDIA's data sheets, for the MFU; the first that a GPU's name holds as whole words.
PEAK_BF16 = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
             "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2500e12, "L4": 121e12, "L40S": 362e12}


def peak_flops(device):
    """Dense bf16 FLOP/s of a GPU by its name; None for a name not in the table, or a slice of a GPU (MIG)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    named = (flops for gpu, flops in PEAK_BF16.items() if re.search(rf"\b{gpu}\b", name))
    return None if "MIG" in name else next(named, None)


def be_deterministic():
    """Have torch add up in a fixed order. Attention's backward, cuBLAS, indexing: all ask these settings; the
    kernels of nvfp4.py do it anyway. Returns what undoes it."""
    before = torch.get_deterministic_debug_mode()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    return lambda: torch.set_deterministic_debug_mode(before)


def choose_device(c, local_rank=0):
    """(device, dtype of the activations), 'auto' resolved."""
    kind = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda must find a GPU, and there is none; use --device=cpu")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    fast = kind == "cuda" or nvfp4.cpu_has_bf16()
    dtype = torch.float32 if c.dtype == "float32" or (c.dtype == "auto" and not fast) else torch.bfloat16
    return device, dtype


def compile_model(model, c):
    """Fuse what lies between the GEMMs; returns whether that is wanted and works."""
    if not c.compile or not nvfp4.can_compile(model.embed.weight.device.type):
        return False
    nvfp4.set_up_compiler()
    compile_blocks(model)
    return True


@dataclass
class Run:
    """What the loop works with."""
    c: Config                                       # its vocab_size that of the dataset, if it was None
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype                              # of the activations
    data: Data
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    log: "Log"
    first_step: int
    last_step: int                                  # the loop ends before it, after a last evaluation
    times: list = field(default_factory=list)       # seconds of each step done
    saved: int | None = None                        # step of the checkpoint in the folder
    trace: object = None                            # of a few steps, by torch's profiler

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def meet(c):
    """(Ranks, device, dtype of the activations): one process, or one of torchrun's, on its device."""
    ranks = Ranks(c.parallel)
    device, dtype = choose_device(c, ranks.local)
    if c.gradient_accumulation_steps % ranks.world:
        raise UserError(f"gradient_accumulation_steps={c.gradient_accumulation_steps} must be a multiple of "
                        f"the {ranks.world} ranks, which share them")
    if c.gradient_noise and ranks.sharded:
        raise UserError(f"gradient_noise=True must see whole weights; take --parallel=ddp, not {c.parallel}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()
    ranks.join(device)
    return ranks, device, dtype


def free_bytes(device):
    """What is left of a device's memory; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None


def check_memory(c, sizes, device, ranks):
    """UserError where what a rank keeps of the model, an outline, does not fit into what is free. A step
    takes more, and an out-of-memory error says then what to lower."""
    free, need = free_bytes(device), rank_bytes(c.parallel, sizes, ranks.world)
    if free and device.type == "cpu":
        free /= ranks.beside                        # who share this memory
    if free is not None and need > free:
        raise UserError(f"weights, gradients and Adam's moments take {need / 2**30:,.1f} GiB of a rank, and "
                        f"{free / 2**30:,.1f} GiB are free here; take more ranks and --parallel=fsdp, or a "
                        "smaller model")


def set_up(c, after, stop):
    """A Run as the config says; UserError for what cannot be, before a file of the run is touched.

    after   an ExitStack, for what a run has to leave behind in order, however it ends
    """
    ranks, device, dtype = meet(c)
    after.callback(ranks.close)
    path = newest_checkpoint(c.out_dir)
    refuse_to_overwrite(c, path)
    saved = load_checkpoint(path) if c.resume else None

    # --- data, which knows its vocabulary
    ranks.once(prepare_missing, c.dataset)
    data = load_data(c.dataset, c.model.block_size, c.model.vocab_size)
    c = replace(c, model=replace(c.model, vocab_size=data.vocab_size))
    if c.model.document_start == -1:
        c = replace(c, model=replace(c.model, document_start=data.document_start))
    notes = []
    if c.warmup_steps > c.max_steps:
        notes.append(f"warmup_steps={c.warmup_steps} shortened to max_steps={c.max_steps}")
        c = replace(c, warmup_steps=c.max_steps)
    if c.gradient_noise and not {"dgrad", "wgrad"} & {*c.fp4.gemms, *c.fp4.e5m2}:
        notes.append(f"gradient_noise: recipe {c.recipe} has no backward in FP4, and so there is none")

    # --- model and optimizer, as they begin or as they were left
    converted = []
    try:
        sizes = outline(c.model)
        check_memory(c, sizes, device, ranks)
        model = make_model(c, ranks, device, converted.append, begins=not saved)
    except ValueError as error:                     # sizes that do not fit each other, or the format's blocks
        raise UserError(str(error)) from None
    optimizer = make_optimizer(model, c)
    if saved:
        check_resumable(c, saved, data.origin)
        restore(saved, path, model, optimizer, sizes, ranks)
        check_unfinished(c, saved)

    # --- a folder, and a word about what is to come
    first_step = saved["step"] if saved else 0
    log = Log(path.parent, ranks.first, stop)
    after.callback(log.close)
    ranks.once(log.open, c, first_step, saved and saved.get("rows"))
    run = Run(c, ranks, device, dtype, data, model, optimizer, log, first_step, c.stop_at or c.max_steps,
              saved=saved and saved["step"], trace=trace_of(c, ranks.rank))
    introduce(run, converted[0])
    for note in notes:
        log(note)
    if compile_model(model, c):
        log("compiling: the first step takes a minute or so; the next run finds the kernels cached")
    ranks.wrap(model)
    return run


def make_model(c, ranks, device, report, begins):
    """The converted model on its device or, where ranks share it, this rank's part; with the weights of the
    seed if the run begins."""
    torch.manual_seed(c.seed)
    if ranks.sharded:
        model = ranks.split(nvfp4.convert(outline(c.model), c.fp4, report))
        if c.parallel == "fsdp":                    # 4-bit weights go with those they were made of
            for block in model.blocks:
                block.register_forward_hook(nvfp4.forget_weights, always_call=True)
        if begins:
            ranks.fill(model, build(c.model) if ranks.first else model)
    else:
        model = nvfp4.convert(build(c.model).to(device), c.fp4, report)
    model.activation_checkpointing = c.activation_checkpointing
    return model


def refuse_to_overwrite(c, path):
    if path.exists() and not c.resume:
        raise UserError(f"out_dir={c.out_dir} holds a run; continue it with --resume, or give another "
                        "--out_dir")


# ---------------------------------------------------------------- loop

def starts_at(run, step):
    """Where the sequences of a step's micro-batches start in the training data, over all ranks."""
    c = run.c
    shape = c.gradient_accumulation_steps, c.batch_size
    return train_starts(len(run.data.train), c.model.block_size, shape, c.seed, step)


def training_step(run, step):
    """One optimizer step: (loss, norm of the gradient, {name: number} of what the model says of itself)."""
    c, ranks, lr = run.c, run.ranks, learning_rate(run.c, step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    starts = starts_at(run, step)
    mine = ranks.share(range(len(starts)))          # micro-batches, counted over all ranks
    total = torch.zeros((), device=run.device)
    for micro_batch in mine:
        nvfp4.set_step(run.model, c.seed, step, micro_batch)
        idx, targets = batch_at(run.data.train, starts[micro_batch], c.model.block_size, run.device)
        with ranks.averaging(now=micro_batch == mine[-1]):
            with run.autocast():
                loss = ranks.replica(idx, targets) / len(mine)
            loss.backward()
        total += loss.detach()
    loss, norm = float(ranks.mean(total)), update(run.model, run.optimizer, c.grad_clip)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}")
    return loss, norm, run.model.after_step(ranks.sum)


@torch.no_grad()
def validation_loss(run):
    """Mean loss over the fixed validation batches, which the ranks share."""
    c, total = run.c, torch.zeros(2, dtype=torch.float64, device=run.device)
    n, world = c.eval_iters, run.ranks.world
    starts = val_starts(len(run.data.val), c.model.block_size, (n, c.batch_size))
    run.model.eval()
    for batch in run.ranks.share(range(-(-n // world) * world)):    # as many for each: they may share weights
        with run.autocast():
            here = starts[min(batch, n - 1)]
            loss = run.model(*batch_at(run.data.val, here, c.model.block_size, run.device))
        if batch < n:
            total += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
    run.model.train()
    run.ranks.sum(total)
    return float(total[0] / total[1])


NOISE = "gradient_to_noise/"                        # in metrics.jsonl it stands before a layer's name


def weight_gradients(model, loss, high=()):
    """{name: dw} of every FP4 layer for loss(), a loss of the model, with these GEMMs in high precision.
    Gradients, what mixers count and other ranks learn nothing of it: no leaf of the graph is reached, so that
    no hook of one fires."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nvfp4.FP4Linear)}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with nvfp4.high_precision(model, high):
        dw = torch.autograd.grad(loss(), [m.weight for m in layers.values()])
    for buffer, before in buffers:
        buffer.copy_(before)
    return dict(zip(layers, dw, strict=True))


def gradient_to_noise(model, loss):
    """std(dw) / std(noise of dw) of every FP4 layer for loss(), {name: number}: dw of a backward in high
    precision, and what the FP4 backward adds to it; the forward is the same. Layers to which it adds nothing
    are left out.

    source  2505.19115: training stalls below sqrt(3)
    """
    if not nvfp4.fp4_layers(model):
        return {}
    exact, found = weight_gradients(model, loss, ("dgrad", "wgrad")), {}
    for name, dw in weight_gradients(model, loss).items():
        noise = (dw.double() - exact[name].double()).std()
        if noise != 0:
            found[name] = float(exact[name].double().std() / noise)
    return found


def gradient_noise(run, step):
    """gradient_to_noise() of the first micro-batch of a step; every rank finds the same."""
    batch = batch_at(run.data.train, starts_at(run, step)[0], run.c.model.block_size, run.device)

    def loss():
        with run.autocast():                        # but not the backward
            return run.model(*batch)
    return gradient_to_noise(run.model, loss)


def evaluate(run, step):
    """Validation in high precision and, where there are layers in FP4, in FP4: a row of metrics.jsonl."""
    nvfp4.set_step(run.model, run.c.seed, step)
    with nvfp4.high_precision(run.model):
        loss = validation_loss(run)
    bits_per_byte = 1 / math.log(2) / run.data.header.bytes_per_token
    row = {"step": step, "val_loss": loss, "val_bpb": loss * bits_per_byte}
    if nvfp4.fp4_layers(run.model):
        row["val_loss_fp4"] = validation_loss(run)
    if run.c.gradient_noise:
        row |= {NOISE + name: ratio for name, ratio in gradient_noise(run, step).items()}
    for name, value in row.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} {value}")
    return row


def loop(run, stop):
    """Evaluate, save, train, report, until the last step or until a Stop says so. Returns the last
    evaluation."""
    c, row = run.c, {}
    for step in range(run.first_step, run.last_step + 1):
        stopped = run.ranks.any(bool(stop.why)) and step < run.last_step
        last = stopped or step == run.last_step
        if nvfp4.switch_late(run.model, step / c.max_steps):
            run.log(f"step {step}: {','.join(c.fp4.switched)} in high precision from now on")
        if not stopped and (step % c.eval_interval == 0 or last):
            row = evaluate(run, step)
            report_evaluation(run, row)
        news = stopped or step > run.first_step     # a run that is stopped at once is saved all the same
        if news and (last or step % c.checkpoint_interval == 0):
            save(run, step)
        saved = run.ranks.finish_saving(wait=last)
        run.saved = run.saved if saved is None else saved
        if last:
            break
        start = time.perf_counter()
        loss, norm, more = training_step(run, step)
        run.times.append(time.perf_counter() - start)
        report_step(run, step, loss, norm, more)
        run.trace.step()
    if stopped:
        stop.at = step
        run.log(f"{stop.why or 'signal'}: stopped at step {step}; continue with --resume")
    elif c.sample_tokens and (run.ranks.first or run.ranks.sharded):
        report_sample(run, step)
    run.log(f"saved in {c.out_dir}")
    run.ranks.barrier()                             # the first rank writes while the others are done
    return row


def save(run, step):
    """A checkpoint: one file or, where ranks share the model, a folder of parts, written while training goes
    on."""
    c, ranks = run.c, run.ranks
    ranks.once(run.log.sync)                        # no checkpoint without the rows before it
    if ranks.sharded:
        tensors = tensors_of(run.model, run.optimizer, step > 0)
        wrong = not_finite(tensors)
        if ranks.any(wrong is not None):
            raise Diverged(f"step {step}: {wrong or 'a tensor'} is not finite")
        ranks.start_saving(c.out_dir, tensors, about(step, c, run.data.origin, run.log.crc_before))
    else:
        ranks.once(save_checkpoint, Path(c.out_dir, "ckpt.pt"), run.model, run.optimizer, step, c,
                   run.data.origin, run.log.crc_before)
        run.saved = step


@contextlib.contextmanager
def last_words(run):
    """An error that ends a run says what is left of it."""
    try:
        yield
    except UserError as error:
        left = "there is no checkpoint"
        if run.saved is not None:
            left = f"the checkpoint of step {run.saved} is whole"
        error.args = (f"{error}; {left} in {run.c.out_dir}",)
        raise


def train(c, stop=None):
    """Train as the config says, until a Stop says to stop. Returns the last evaluation as a dict.

    raises UserError: Finished, Diverged and others
    """
    stop = stop or Stop()
    advice = f"lower batch_size={c.batch_size} (and raise gradient_accumulation_steps) or the model's sizes"
    with contextlib.ExitStack() as after, naming_memory(advice):    # this process may do other things
        after.callback(nvfp4.use_compiler, nvfp4.use_compiler(c.compile))
        if c.deterministic:
            after.callback(be_deterministic())
        run = set_up(c, after, stop)
        stop.times = run.times
        with run.ranks.together(), last_words(run), run.trace:
            return loop(run, stop)


# ---------------------------------------------------------------- report

class NoTrace(contextlib.nullcontext):
    def step(self):
        """Another step is done."""


def trace_of(c, rank):
    """A context that records c.profile steps, once the compiler has done its work, for chrome://tracing."""
    if not c.profile:
        return NoTrace()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=2, active=c.profile, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(f"{c.out_dir}/trace-{rank}.json"))


def mirror_of(c):
    """(what shows a row of metrics.jsonl elsewhere too, what ends that). raises UserError"""
    try:
        if c.mirror == "wandb":
            import wandb
            shown = wandb.init(project="four-bits", dir=c.out_dir, config=flatten(c), resume="allow",
                               name=Path(c.out_dir).name)
            return lambda row: shown.log(row, step=row["step"]), shown.finish
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(c.out_dir)
        return lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()], writer.close
    except ModuleNotFoundError as error:
        raise UserError(f"mirror={c.mirror}: {error} (pip install {c.mirror}); or leave it out") from None


def read_metrics(folder):
    """The rows of a run's metrics.jsonl, as dicts. raises UserError that names the line which is none, or out
    of order"""
    path, next_step = Path(folder, "metrics.jsonl"), None
    rows = read_json_lines(path)
    for line, row in enumerate(rows, 1):
        step, numbers = row.get("step"), all(type(v) in (int, float) for v in row.values())
        if type(step) is not int or not numbers or not all(map(math.isfinite, row.values())):
            raise UserError(f"{path}, line {line}: damaged, these are not the numbers of a step")
        if step < 0 or next_step is not None and step != next_step:
            raise UserError(f"{path}, line {line}: damaged, step {step} stands where {next_step} should")
        next_step = step + ("loss" in row)          # an evaluation comes before its step
    return rows


class Log:
    """Console and log.txt, and metrics.jsonl; silent on all ranks but the first. One run at a time can have
    those of a folder."""

    def __init__(self, folder, first, stop):
        self.folder, self.first, self.stop, self.files = folder, first, stop, []
        self.mirror = self.end_mirror = lambda *row: None
        self.crc = self.crc_before = 0              # CRC-32 of all rows, and of those before this step

    def open(self, c, first_step, crc=None):
        """Take the folder, and leave of its metrics what came before the checkpoint, whose CRC-32 it knows:
        the rest is about to be done again."""
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.files = [Lines(self.folder / "log.txt", alone=True)]
        refuse_to_overwrite(c, newest_checkpoint(self.folder))  # by a run that has ended meanwhile
        sweep(self.folder)
        path = self.folder / "metrics.jsonl"
        rows = read_metrics(self.folder) if path.exists() else []
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] < first_step).encode()
        self.crc = self.crc_before = zlib.crc32(kept)
        if path.exists() and crc not in (None, self.crc):
            raise UserError(f"{path}: damaged, not what the checkpoint of step {first_step} saw; restore it, "
                            "or remove it and go on without it")
        write_whole({path: lambda file: file.write(kept)})
        write_json(self.folder / "config.json", flatten(c))
        self.files.append(Lines(path))
        if c.mirror != "none":
            self.mirror, self.end_mirror = mirror_of(c)

    def __call__(self, text):
        if self.first:
            self.files[0].add(text)
            try:
                print(text, flush=True)
            except OSError:                         # a pipe without a reader, a terminal that is gone
                mute(sys.stdout)
                self.stop.why = self.stop.why or "the console is closed"

    def sync(self):
        self.files[1].sync()

    def metrics(self, row):
        if self.first:
            line = json.dumps(row, allow_nan=False)
            self.files[1].add(line)
            self.mirror(row)
            self.crc = zlib.crc32(f"{line}\n".encode(), self.crc)
            if "loss" in row:                       # the last of its step; an evaluation is made anew
                self.crc_before = self.crc

    def close(self):
        self.end_mirror()
        for file in self.files:
            file.close()


def introduce(run, converted):
    """What is about to run, and on what."""
    c, (total, active) = run.c, count_parameters(run.model)
    run.log(f"{c.model.arch} with {total:,} parameters ({active:,} active), "
            f"recipe {c.recipe}, {str(run.dtype).removeprefix('torch.')} activations")
    run.log(nvfp4.capability(run.device, c.fp4.format))
    run.log(converted)
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
                     "tokens": (step + 1) * c.tokens_per_step, "ms": 1e3 * times[-1], **more})
    if step % c.log_interval == 0 or step + 1 == run.last_step:
        rate, peak = c.tokens_per_step / usual(times), peak_flops(run.device)
        mfu = 100 * rate * flops_per_token(run.model) / peak / run.ranks.world if peak else None
        line = [f"step {step}/{c.max_steps}", f"loss {loss:.4f}", f"lr {lr:.1e}", f"norm {norm:.2f}",
                f"{1e3 * times[-1]:.0f} ms", f"{rate / 1e3:.1f}k tok/s"]
        line += [f"mfu {mfu:.1f}%"] if peak else []
        line += [f"eta {clock(usual(times) * (run.last_step - step - 1))}"] if len(times) > 1 else []
        run.log(" | ".join(line))


def usual(times):
    """Seconds of a step: the median of the last 20. The first compiles, and counts only while it is alone."""
    return float(np.median(times[1:][-20:] or times))


def clock(seconds):
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def report_sample(run, step):
    nvfp4.set_step(run.model, run.c.seed, step)
    run.model.eval()
    with run.autocast(), torch.compiler.set_stance("force_eager"):     # not a kernel for every length
        text = sample_text(run.model, run.data.tokenizer, n_tokens=run.c.sample_tokens, seed=run.c.seed)
    run.log(f"\nsample:\n{text}\n")


# ---------------------------------------------------------------- the command

STOPPED = 75                                        # exit status, EX_TEMPFAIL: try again


@command("train.py")
def main(argv):
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return
    stop = Stop()
    try:
        with catch_signals(stop):
            train(load_config(argv), stop)
    except Finished as done:
        print(done)
    if stop.at is not None:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main(sys.argv[1:])
