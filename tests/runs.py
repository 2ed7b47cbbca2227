"""Tiny runs of train.py for the tests: their flags, the processes and ranks that make them, and all that a
run computed, to be compared bit for bit.

A process here is a fork: it costs no start of Python, so a test may kill many.
"""
import inspect
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from data.run import load_checkpoint, newest_checkpoint
from data.tokens import prepare
from nvfp4 import OPERANDS

REPO = Path(__file__).resolve().parents[1]
TWO = {"gradient_accumulation_steps": 2, "max_steps": 8}       # micro-batches, or ranks
RUNS = {                                            # kinds of runs that must go on bit for bit
    "plain": {},
    "ngpt": TWO,
    "gpt, all random": TWO | {"arch": "gpt", "fp4_tail": 0, "fp4_hadamard": "wgrad",
                              "fp4_stochastic": ",".join(OPERANDS), "fp4_hadamard_signs": "fresh",
                              "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3, "eval_iters": 3,
                              "fp4_until": 0.6, "fp4_switched": "fprop"},
    "hybrid": TWO | {"pattern": "ME*", "n_ffn": 48, "mamba_n_head": 16, "mamba_head_dim": 4,
                     "mamba_n_group": 2, "mamba_n_state": 16, "mamba_chunk": 8, "moe_n_expert": 4},
    "quartet2": TWO | {"recipe": "quartet2", "fp4_hadamard_size": 32},
    "dge, occ, experts": TWO | {"recipe": "fp4_dge_occ", "pattern": "E*", "n_ffn": 48, "moe_n_expert": 4},
}


def prepare_letters(folder):
    """A dataset of random letters in plain bytes, of which no model can learn more than ln 27 = 3.3."""
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=20000))
    prepare([text[2000:]], [text[:2000]], folder, "a test", tokenizer="bytes")
    return folder


def flags_of(data, out_dir, /, **changes):
    """The command line of a run of a quarter of a second."""
    settings = {"out_dir": out_dir, "dataset": data, "n_layer": 1, "n_embd": 32, "n_head": 2,
                "block_size": 32, "batch_size": 2, "max_steps": 10, "learning_rate": 1e-2,
                "eval_interval": 4, "eval_iters": 1, "sample_tokens": 0, "device": "cpu",
                "compile": False, **changes}
    return [f"--{name}={value}" for name, value in settings.items()]


def metrics(folder, having="step"):
    """Rows of metrics.jsonl, as they stand."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if having in row]


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def contents(folder):
    """{name: bytes, or a number} of all that a run computed, but for times: model/NAME and
    optimizer/NUMBER/NAME, of a file or of parts; metrics/STEP/NAME and metrics/STEP val/NAME."""
    path = newest_checkpoint(folder)
    saved, tensors = load_checkpoint(path), {}
    if path.is_dir():
        import torch.distributed.checkpoint as dcp  # takes a second
        there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in there.items()}
        with warnings.catch_warnings():             # that it reads alone
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    else:
        tensors |= {f"model/{name}": t for name, t in saved["model"].items()}
        for i, state in saved["optimizer"]["state"].items():
            tensors |= {f"optimizer/{i}/{key}": t for key, t in state.items()}
    found = {"step": saved["step"]} | {name: t.numpy().tobytes() for name, t in tensors.items()}
    for row in metrics(folder):
        place = f"metrics/{row['step']}{'' if 'loss' in row else ' val'}"
        assert f"{place}/step" not in found, "a step stands twice in metrics.jsonl"
        found |= {f"{place}/{key}": value for key, value in row.items() if key != "ms"}
    return found


def differences(a, b):
    """Names of what differs by a bit between two run folders."""
    one, other = contents(a), contents(b)
    return {name for name in one | other if one.get(name) != other.get(name)}


# ---------------------------------------------------------------- processes

BUG, INTERRUPTED = 70, 130                          # exit status of a traceback, and of SIGINT
LONGEST = 1200                                      # letters of an error


class Process:
    """A command, work(), in a process of its own. What it writes to stderr is read at its end."""

    def __init__(self, work, before=lambda: None):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writer, 2)
            os._exit(status_of(work, before))
        os.close(writer)

    def end(self, seconds=120):
        """(exit status, or the negative number of a signal; what was said). A hang is an error."""
        until = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None, "a hang"
            time.sleep(0.005)
        with open(self.reader, errors="replace") as file:
            return os.waitstatus_to_exitcode(status), file.read()


def status_of(work, before):
    """The exit status of work() as a command; what ends it is printed as Python would."""
    try:
        before()
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        work()
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException as error:
        folders = {os.path.dirname(frame.filename) for frame in traceback.extract_tb(error.__traceback__)}
        if isinstance(error, KeyboardInterrupt) and folders == {os.path.dirname(__file__)}:
            return INTERRUPTED                      # the command had not begun, or had ended
        traceback.print_exc()
        return BUG
    finally:
        sys.stderr.flush()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def one_line(text):
    return text.count("\n") == 1 and len(text) < LONGEST and "Traceback" not in text


def refusal_of(main, argv):
    """The one line with which main() of a script ends. Python prints it on stderr and exits with 1."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    line = stopped.value.code
    script = Path(inspect.getfile(inspect.unwrap(main))).name
    assert isinstance(line, str) and line.startswith(f"{script}: ") and "\n" not in line
    return line


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def ranks(n, work, before=lambda: None):
    """The Processes of n ranks that do this, in the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def begin(rank):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n,
                 "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        before()
    return [Process(work, lambda rank=rank: begin(rank)) for rank in range(n)]


def each_step(before=lambda run, step: None, after=lambda run, step: None):
    """Have this done before and after every step of training from now on, in this process."""
    import train                                    # not every test has to do with it
    training_step = train.training_step

    def step(run, number):
        before(run, number)
        found = training_step(run, number)
        after(run, number)
        return found
    train.training_step = step
