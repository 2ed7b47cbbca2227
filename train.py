"""Train a model of model.py with the FP4 linear layers of nvfp4.py.

    python train.py configs/ngpt_tiny.py                          the default job: minutes on two CPU cores
    python train.py configs/ngpt_tiny.py --recipe=bf16 --out_dir=out/bf16
    python train.py configs/gpt_tiny.py configs/mine.py --max_steps=200
    torchrun --nproc_per_node=8 train.py configs/ngpt_1b.py       the same, on several GPUs or processes
    python train.py -h                                            every field, its default and meaning

A run is a folder, out_dir: config.json, metrics.jsonl (an object a step), log.txt, ckpt.pt. Nothing random is
kept in it: data order, stochastic rounding and initialization are functions of the seed and the step, so a
run that was stopped goes on bit for bit (--resume), and n ranks compute what one process with n micro-batches
does.
"""
import contextlib
import ctypes
import difflib
import inspect
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import nvfp4
from data.tokens import DataError, load_tokenizer, read_tokens
from model import ModelConfig, build, count_parameters, flops_per_token, sample_text
from nvfp4 import RECIPES, FP4Config

REPO = Path(__file__).resolve().parent

# ---------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    out_dir: str | None = None                      # run folder; None: out/<name of the first config file>
    dataset: str = "sotu"                           # folder below data/, or a path; train.bin and val.bin
    recipe: Literal["bf16", "ngpt", "nvfp4"] | None = None  # FP4 recipe; None: ngpt for ngpt, nvfp4 for gpt
    seed: int = 1337                                # of initialization, data order and stochastic rounding
    # batch
    batch_size: int = 16                            # sequences in a micro-batch
    gradient_accumulation_steps: int = 1            # micro-batches in a step, over all ranks together
    # length and learning rate
    max_steps: int = 1000                           # optimizer steps of the whole schedule
    stop_at: int | None = None                      # stop at this step, with a checkpoint; None: at max_steps
    learning_rate: float = 1e-3                     # peak
    min_lr: float | None = None                     # at the end of the schedule; None: learning_rate / 50
    schedule: Literal["wsd", "cosine"] = "wsd"      # wsd: constant, then 1 - sqrt decay
    warmup_steps: int = 0                           # linear warm-up
    decay_fraction: float = 0.15                    # wsd: the last part of max_steps, where the rate decays
    # optimizer
    weight_decay: float = 0.0                       # of matrices
    beta1: float = 0.9                              # AdamW
    beta2: float = 0.95                             # AdamW
    grad_clip: float = 1.0                          # largest norm of the gradient; 0: no clipping
    # evaluation, logging, checkpoints
    eval_interval: int = 100                        # steps between evaluations
    eval_iters: int = 8                             # batches in an evaluation, always the same
    log_interval: int = 10                          # steps between console lines
    checkpoint_interval: int = 500                  # steps between checkpoints; one is written at the end too
    sample_tokens: int = 120                        # length of the sample at the end; 0: none
    resume: bool = False                            # continue the run in out_dir
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 where it is fast
    compile: bool = True                            # torch.compile the blocks

    model: ModelConfig = ModelConfig()
    fp4: FP4Config = FP4Config()


class UserError(ValueError):
    """A mistake in a command, a config or a run folder: one line that names the remedy, no traceback."""


def schema():
    """name -> (owner class, its field, type) for all that a config file or the command line can set."""
    table = {}
    for prefix, owner in (("", Config), ("", ModelConfig), ("fp4_", FP4Config)):
        hints = typing.get_type_hints(owner)
        table |= {prefix + f.name: (owner, f, hints[f.name])
                  for f in fields(owner) if f.name not in ("model", "fp4")}
    return table


def _kinds(hint):
    """A type hint as (list of plain types or Literals, whether None is allowed)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        arguments = typing.get_args(hint)
        return [a for a in arguments if a is not type(None)], type(None) in arguments
    return [hint], False


def _convert(name, value, hint):
    """A value of a config file (any type) or of the command line (str) as the field's type, or a
    UserError."""
    kinds, optional = _kinds(hint)
    kind = kinds[0]
    if value is None or value == "None":
        if optional:
            return None
        raise UserError(f"{name}=None must be {_type_name(hint)}")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        raise UserError(f"{name}={value} must be one of {', '.join(choices)}{_nearest(value, choices)}")
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(w for w in (value.split(",") if isinstance(value, str) else map(str, value)) if w)
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            if re.fullmatch(r"[-+]?[\d_]+", str(value)):
                return int(value)
            if float(value).is_integer():           # 1e6 is a whole number too
                return int(float(value))
        elif type(value) is kind:
            return value
    except (ValueError, KeyError, OverflowError, TypeError):
        pass
    raise UserError(f"{name}={value!r} must be {_type_name(hint)}")


def _type_name(hint):
    kinds, optional = _kinds(hint)
    kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        name = " or ".join(typing.get_args(kind))
    else:
        name = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}.get(kind)
    return (name or "names with commas between") + (" or None" if optional else "")


def _nearest(word, words):
    close = difflib.get_close_matches(str(word), list(words), 1)
    return f"; did you mean {close[0]}?" if close else ""


def load_config(argv):
    """Config files (run one by one, isolated) and --key=value flags, later ones winning -> Config.

    raises  UserError: one line, with the nearest name for one that does not exist
    """
    table, settings, files = schema(), {}, []

    def put(name, value, where):
        if name not in table:
            raise UserError(f"{where}: no field is called {name}{_nearest(name, table)} "
                            "(python train.py -h lists them)")
        settings[name] = _convert(name, value, table[name][2])

    for argument in argv:
        if not argument.startswith("-"):
            path = next((p for p in (Path(argument), REPO / argument) if p.is_file()), None)
            if path is None or path.suffix != ".py":
                known = [f"configs/{p.name}" for p in sorted((REPO / "configs").glob("*.py"))]
                raise UserError(f"{argument}: no such config file{_nearest(argument, known)}")
            files.append(path)
            try:
                found = runpy.run_path(str(path))
            except Exception as error:
                raise UserError(f"{argument}: {type(error).__name__}: {error}") from None
            for name, value in found.items():
                if not name.startswith("_") and not isinstance(value, types.ModuleType):
                    put(name, value, argument)
    for argument in argv:                           # flags win over files wherever they stand
        if argument.startswith("-"):
            name, equals, value = argument.removeprefix("--").partition("=")
            if not equals:
                if name not in table or table[name][2] is not bool:
                    example = f"--{name}=VALUE" if name in table else f"--key=value{_nearest(name, table)}"
                    raise UserError(f"{argument} must be given as {example}")
                value = "True"
            put(name, value, "command line")
    return make_config(settings, files[0].stem if files else "run")


def make_config(settings, name="run"):
    """Config from {field: value}; what depends on other fields is resolved here, after all overrides."""
    table = schema()
    of = {owner: {table[k][1].name: v for k, v in settings.items() if table[k][0] is owner}
          for owner in (Config, ModelConfig, FP4Config)}
    try:
        c = Config(**of[Config], model=ModelConfig(**of[ModelConfig]))
        recipe = c.recipe or {"gpt": "nvfp4", "ngpt": "ngpt"}[c.model.arch]
        c = replace(c, recipe=recipe, fp4=replace(RECIPES[recipe], **of[FP4Config]),
                    out_dir=c.out_dir or f"out/{name}",
                    min_lr=c.learning_rate / 50 if c.min_lr is None else c.min_lr)
    except ValueError as error:
        raise UserError(str(error)) from None
    for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "eval_interval", "eval_iters",
                 "log_interval", "checkpoint_interval"):
        if getattr(c, name) < 1:
            raise UserError(f"{name}={getattr(c, name)} must be 1 or more")
    below_1 = math.nextafter(1, 0)
    for name, low, high in (("warmup_steps", 0, c.max_steps), ("stop_at", 1, c.max_steps),
                            ("learning_rate", 0, math.inf), ("grad_clip", 0, math.inf),
                            ("decay_fraction", 0, 1), ("seed", 0, 2**64 - 1), ("sample_tokens", 0, math.inf),
                            ("beta1", 0, below_1), ("beta2", 0, below_1), ("weight_decay", 0, math.inf)):
        if not low <= (low if getattr(c, name) is None else getattr(c, name)) <= high:
            raise UserError(f"{name}={getattr(c, name)} must be in [{low}, {high}]")
    return c


def flatten(c):
    """Config -> {field: value} as json takes it; make_config(flatten(c)) == c."""
    flat = {k: v for k, v in asdict(c).items() if k not in ("model", "fp4")}
    return json.loads(json.dumps(flat | asdict(c.model) | {f"fp4_{k}": v for k, v in asdict(c.fp4).items()}))


def unflatten(flat):
    table = schema()
    return make_config({k: _convert(k, v, table[k][2]) for k, v in flat.items() if k in table})


def help_text():
    """The docstring, then every field with its default and the comment beside it in the source."""
    lines = [__doc__.strip()]
    owners = (("train", Config, ""), ("model", ModelConfig, ""), ("nvfp4", FP4Config, "fp4_"))
    for file, owner, prefix in owners:
        source = inspect.getsource(owner)
        lines.append(f"\nfields of {file}.py")
        for f in fields(owner):
            comment = re.search(rf"^    {f.name}: .*?  # (.*)$", source, re.M)
            if comment:
                default = ",".join(f.default) if isinstance(f.default, tuple) else str(f.default)
                lines.append(f"  --{prefix + f.name:30s} {default or 'none':10s} {comment[1]}")
    for recipe, cfg in RECIPES.items():
        lines.append(f"  recipe {recipe} sets {nvfp4.recipe_changes(cfg) or 'nothing else'}")
    return "\n".join(lines)


# ---------------------------------------------------------------- data

def data_folder(c):
    return Path(c.dataset) if os.sep in c.dataset else REPO / "data" / c.dataset


def load_data(c, rank=0):
    """(train ids, val ids, header of val, tokenizer, vocabulary); prepares a dataset that is missing."""
    folder = data_folder(c)
    script = folder / "prepare.py"
    if rank == 0 and not (folder / "train.bin").exists() and c.dataset != "text" and script.exists():
        print(f"preparing {c.dataset}: python {script}", flush=True)
        if subprocess.run([sys.executable, str(script)]).returncode:
            raise UserError(f"dataset={c.dataset}: {script} failed; see above")
    if dist.is_initialized():
        dist.barrier()
    (train, head), (val, val_head) = read_tokens(folder / "train.bin"), read_tokens(folder / "val.bin")
    need = c.model.block_size + 1
    for name, ids in (("train.bin", train), ("val.bin", val)):
        if len(ids) < need:
            raise UserError(f"{folder / name}: {len(ids)} tokens must be {need} at least; lower block_size "
                            "or give more text")
    vocab_size = c.model.vocab_size or head.vocab_size
    if vocab_size < head.vocab_size:
        raise UserError(f"vocab_size={vocab_size} must be {head.vocab_size} at least, the vocabulary of "
                        f"{c.dataset}")
    return train, val, val_head, load_tokenizer(folder), vocab_size


def batch_at(ids, starts, T, device):
    """Windows of ids at starts -> (idx, targets), each (len(starts), T) int64 on device."""
    window = torch.from_numpy(np.stack([ids[s:s + T + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def unigram_loss(train, val):
    """Cross-entropy in nats of val under the token frequencies of train, one count added to each token."""
    size = int(max(train.max(), val.max())) + 1
    counts = np.bincount(train, minlength=size) + 1
    return float(-np.log(counts / counts.sum())[val].mean())


def train_starts(c, n_tokens, step):
    """Where the samples of a step begin, (gradient_accumulation_steps, batch_size), from seed and step."""
    rng = np.random.Generator(np.random.Philox(key=c.seed, counter=[0, 0, 0, step]))
    return rng.integers(0, n_tokens - c.model.block_size, (c.gradient_accumulation_steps, c.batch_size))


def val_starts(c, n_tokens):
    """Fixed windows, spread evenly over the validation text: (eval_iters, batch_size)."""
    n = c.eval_iters * c.batch_size
    last = n_tokens - c.model.block_size - 1
    return (np.arange(n) * last // max(n - 1, 1)).reshape(c.eval_iters, c.batch_size)


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
    """AdamW; weight decay for matrices, none for vectors (norm gains, nGPT's scales)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    assert len(matrices) + len(vectors) == len(list(model.parameters()))
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, optimizer, step, c, origin):
    """Written beside the old one, flushed to disk, then renamed: a kill at any moment leaves one that loads.

    The folder is flushed too, so that the rename survives a power cut.
    """
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                    "config": flatten(c), "origin": origin}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load_checkpoint(path, device="cpu"):
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there; train a run first, or give another folder")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of this code ({why})") from None


def check_resumable(c, old):
    """A run goes on with the same model, numerics and data; UserError names the first field that differs."""
    free = ("out_dir", "resume", "stop_at", "device", "compile", "eval_interval", "eval_iters",
            "log_interval", "checkpoint_interval", "sample_tokens")
    for name, value in flatten(c).items():
        if name not in free and name in old and old[name] != value:
            raise UserError(f"--resume: {name}={value} but the run in {c.out_dir} has {name}={old[name]}; "
                            f"leave it as it was, or start another --out_dir")


def load_run(folder, device="cpu"):
    """A trained model in high precision, with its tokenizer and Config: (model, tokenizer, c)."""
    folder = Path(folder)
    saved = load_checkpoint(folder / "ckpt.pt", device)
    c = unflatten(saved["config"])
    model = build(c.model).to(device)
    model.load_state_dict(saved["model"])
    return model.eval(), load_tokenizer(data_folder(c)), c


# ---------------------------------------------------------------- training

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


PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense FLOP/s, for the MFU


def peak_flops(device):
    """Dense bf16 FLOP/s of a GPU by its name, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_BF16.items() if gpu in name), None)


def choose_device(c, local_rank=0):
    """(device, dtype of the activations), 'auto' resolved."""
    kind = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda must find a GPU, and there is none; use --device=cpu")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    fast = kind == "cuda" or nvfp4.cpu_has_bf16()
    dtype = torch.float32 if c.dtype == "float32" or (c.dtype == "auto" and not fast) else torch.bfloat16
    return device, dtype


def evaluate(model, c, val, device, autocast, rank, world):
    """Mean loss over the fixed validation batches, split over the ranks."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for starts in val_starts(c, len(val))[rank::world]:
            with autocast():
                loss = model(*batch_at(val, starts, c.model.block_size, device))
            total += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
    model.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total[0] / total[1])


def agreed(flag, device):
    """Whether any rank says so: a signal may reach the ranks in different steps."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return bool(votes > 0)


def compile_model(model, c):
    """Fuse what lies between the GEMMs, block by block: equal blocks share one compilation."""
    if not c.compile or not nvfp4.can_compile(model.embed.weight.device.type):
        return False
    for block in model.blocks:
        block.compile(dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)
    return True


def update(model, optimizer, grad_clip):
    """One step of the optimizer and back onto the sphere; nothing where the gradient is not finite. Returns
    the gradient's norm."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    if math.isfinite(norm):
        optimizer.step()
        model.normalize_()
    optimizer.zero_grad(set_to_none=True)
    return norm


def read_metrics(folder):
    """The rows of a run's metrics.jsonl, as dicts."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]           # a kill can cut the last one


class Log:
    """Console and log.txt, and metrics.jsonl; silent on all ranks but the first."""

    def __init__(self, folder, rank, first_step):
        self.folder, self.rank = folder, rank
        if rank == 0:
            metrics = folder / "metrics.jsonl"      # what came after the checkpoint is about to be done again
            rows = read_metrics(folder) if metrics.exists() else []
            metrics.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] < first_step))

    def __call__(self, text):
        if self.rank == 0:
            print(text, flush=True)
            with open(self.folder / "log.txt", "a") as file:
                file.write(text + "\n")

    def metrics(self, **values):
        if self.rank == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")


@contextlib.contextmanager
def catch_signals():
    """A list that receives the names of SIGINT and SIGTERM, which end a run after the step under way."""
    caught = []

    def catch(number, _):
        caught.append(signal.Signals(number).name)
        signal.signal(number, previous[number])     # a second one ends the process at once
        print(f"{caught[-1]}: stopping after this step; once more to stop at once", file=sys.stderr)

    previous = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def train(c, stop=()):
    """Train as the config says, until stop, a list that signals fill, is not empty. Returns the last
    evaluation as a dict."""
    # --- where we are: one process, or one of torchrun's
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = choose_device(c, int(os.environ.get("LOCAL_RANK", 0)))
    if c.gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={c.gradient_accumulation_steps} must be a multiple of "
                        f"the {world} ranks, which share them")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    out = Path(c.out_dir)
    if (out / "ckpt.pt").exists() and not c.resume:
        raise UserError(f"out_dir={c.out_dir} holds a run; continue it with --resume, or give another "
                        "--out_dir")
    saved = load_checkpoint(out / "ckpt.pt") if c.resume else None
    train_ids, val_ids, header, tokenizer, vocab_size = load_data(c, rank)
    origin = f"{header.tokenizer}, {header.source}"
    c = replace(c, model=replace(c.model, vocab_size=vocab_size))

    # --- model, optimizer, and the step to begin with
    torch.manual_seed(c.seed)
    lines = []
    try:
        model = nvfp4.convert(build(c.model).to(device), c.fp4, report=lines.append)
    except ValueError as error:                     # sizes that do not fit each other, or the blocks of 16
        raise UserError(str(error)) from None
    optimizer = make_optimizer(model, c)
    first_step = 0
    if saved:
        check_resumable(c, saved["config"])
        if saved["origin"] != origin:
            raise UserError(f"--resume: {c.dataset} is not the data of the run in {c.out_dir} any more "
                            f"({origin}, not {saved['origin']}); prepare that, or start another --out_dir")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]
    last_step = c.stop_at or c.max_steps
    if first_step >= c.max_steps:
        raise UserError(f"the run in {c.out_dir} is complete, at step {first_step}; start another --out_dir")
    if first_step >= last_step:
        raise UserError(f"the run in {c.out_dir} is at step {first_step} already; raise --stop_at")
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out, rank, first_step)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(flatten(c), indent=1) + "\n")
    total, active = count_parameters(model)
    log(f"{c.model.arch} with {total:,} parameters ({active:,} without the embedding), recipe {c.recipe}, "
        f"{str(dtype).removeprefix('torch.')} activations\n{nvfp4.capability(device)}\n{lines[0]}\n"
        f"token frequencies alone would give a validation loss of {unigram_loss(train_ids, val_ids):.4f}")
    if compile_model(model, c):
        log("compiling: the first step takes a minute or so; the next run finds the kernels cached")
    step_model = model
    if world > 1:
        step_model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def autocast():
        return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    tokens_per_step = c.gradient_accumulation_steps * c.batch_size * c.model.block_size
    micro_steps = c.gradient_accumulation_steps // world
    peak = peak_flops(device)
    bits_per_byte = 1 / math.log(2) / header.bytes_per_token
    times, result = [], {}
    for step in range(first_step, last_step + 1):
        stopped = agreed(bool(stop), device) and step < last_step
        last = step == last_step or stopped
        # --- evaluate: on fixed batches, in high precision and in FP4
        if step % c.eval_interval == 0 or step == last_step:
            nvfp4.set_step(model, c.seed, step)
            with nvfp4.high_precision(model):
                loss = evaluate(model, c, val_ids, device, autocast, rank, world)
            result = {"step": step, "val_loss": loss, "val_bpb": loss * bits_per_byte}
            line = f"step {step}/{c.max_steps} | val loss {loss:.4f} | {result['val_bpb']:.3f} bits/byte"
            if nvfp4.fp4_layers(model):
                result["val_loss_fp4"] = evaluate(model, c, val_ids, device, autocast, rank, world)
                line += f" | in FP4 {result['val_loss_fp4']:.4f}"
            log(line)
            log.metrics(**result)
        if (stopped or step > first_step) and (last or step % c.checkpoint_interval == 0) and rank == 0:
            save_checkpoint(out / "ckpt.pt", model, optimizer, step, c, origin)
        if last:
            break

        # --- one optimizer step
        start = time.perf_counter()
        lr = learning_rate(c, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts, total_loss = train_starts(c, len(train_ids), step), torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            micro_batch = micro_step * world + rank                             # counted over all ranks
            nvfp4.set_step(model, c.seed, step, micro_batch)
            idx, targets = batch_at(train_ids, starts[micro_batch], c.model.block_size, device)
            more = world > 1 and micro_step < micro_steps - 1                   # reduce gradients once a step
            with step_model.no_sync() if more else contextlib.nullcontext():
                with autocast():
                    loss = step_model(idx, targets) / micro_steps
                loss.backward()
            total_loss += loss.detach()
        if world > 1:
            dist.all_reduce(total_loss)
            total_loss /= world
        loss, norm = float(total_loss), update(model, optimizer, c.grad_clip)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(f"step {step}: loss {loss}, gradient norm {norm}: stopped; the last checkpoint "
                            f"in {c.out_dir} is untouched; lower learning_rate, or look at the data")

        # --- report
        times.append(time.perf_counter() - start)
        recent = float(np.median(times[-20:]))      # not the mean: a first step compiles
        log.metrics(step=step, loss=loss, lr=lr, grad_norm=norm, tokens=(step + 1) * tokens_per_step,
                    ms=1e3 * times[-1])
        if step % c.log_interval == 0 or step + 1 == last_step:
            rate, eta = tokens_per_step / recent, int(recent * (last_step - step - 1))
            mfu = f" | mfu {100 * rate * flops_per_token(model) / peak / world:.1f}%" if peak else ""
            log(f"step {step}/{c.max_steps} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f} | "
                f"{1e3 * times[-1]:.0f} ms | {rate / 1e3:.1f}k tok/s{mfu} | "
                f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}")

    # --- the end, reached or asked for
    if stopped:
        log(f"{stop[0] if stop else 'signal'}: stopped at step {step}; continue with --resume")
    elif c.sample_tokens and rank == 0:
        nvfp4.set_step(model, c.seed, step)
        model.eval()
        with autocast(), torch.compiler.set_stance("force_eager"):             # not a kernel for every length
            log(f"\nsample:\n{sample_text(model, tokenizer, n_tokens=c.sample_tokens, seed=c.seed)}\n")
    log(f"saved in {c.out_dir}")
    if world > 1:
        dist.barrier()                              # the first rank writes while the others are done
        del step_model                              # its reducer goes before the group it talks through
        dist.destroy_process_group()
    return result


def main(argv):
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return
    try:
        with catch_signals() as stop:
            train(load_config(argv), stop)
    except (UserError, DataError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
