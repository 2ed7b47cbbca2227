"""What a run will take of a device's memory, told before it takes any.

A training step is made on tensors that have shapes but no memory, by torch's FakeTensorMode, and the bytes of
those that are there at the same time are counted. So this knows no model and no recipe: whatever a mixer or a
format keeps from forward to backward is seen. On a CPU torch.compile's first half takes part: it decides what
is kept and what is computed once more, of nGPT's norms a good deal. What is left out: that its second half
fuses some of what lies in between, and what the compiler and allocators need for themselves. Together with
what a process has before, it is within 15 % of what runs take on a CPU; of the small models in fp32 it has
been 14 % too little, with activation checkpointing 18 % too much (LOG.md, tests/test_memory.py). On a GPU
nothing of this was tried, and steps are counted as they stand.
"""
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import nvfp4
from model import build, compile_blocks, training_bytes

FITS = 0.9                                          # of what is free is to be used, as far as is known


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made in it, each storage once, for as long as it is there."""

    @classmethod
    def is_infra_mode(cls):
        return True                                 # else torch.compile keeps away

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(result) if torch.is_tensor(t)]:
            if storage not in self.known:
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, n_bytes):
        self.now += n_bytes
        self.most = max(self.most, self.now)


def step_bytes(c, device, dtype):
    """The most that a step of a Config takes at once, but for Adam's moments: weights, in fp32 and in 4 bits,
    gradients, what a micro-batch keeps for its backward, and what is in between."""
    nvfp4.capability(device)                        # a first look at a GPU wants real numbers
    compiled = c.compile and device.type == "cpu" and nvfp4.can_compile("cpu")
    with FakeTensorMode(), Alive() as alive, torch.device(device):
        model = nvfp4.convert(build(c.model), c.fp4, report=lambda line: None)
        model.activation_checkpointing = c.activation_checkpointing
        if compiled:                                # to graphs of operations, which run one by one
            nvfp4.set_up_compiler()
            compile_blocks(model, backend="aot_eager_decomp_partition")
        nvfp4.set_step(model, c.seed, 0)
        idx = torch.zeros(c.batch_size, c.model.block_size, dtype=torch.int64)
        try:
            for _ in range(min(2, c.gradient_accumulation_steps)):  # the second has gradients beside it
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = model(idx, idx)
                loss.backward()
        finally:
            if compiled:
                torch.compiler.reset()              # what was compiled is for tensors without memory
    return alive.most


def run_bytes(c, device, dtype, sizes, n_ranks=1):
    """The most that a run takes of a rank's device: what is kept of the model, and a step beside it. sizes:
    the model's outline."""
    weights_and_gradients = training_bytes(sizes) / 2
    return step_bytes(c, device, dtype) - weights_and_gradients + rank_bytes(c.parallel, sizes, n_ranks)


def rank_bytes(parallel, sizes, n_ranks):
    """What one of n ranks has of weights, gradients and moments, together training_bytes().

    value   by zero2 1/n of the moments, by fsdp of the others too, where beside that the largest block and
            what is no block are there whole, as weights and as gradients
    """
    state, others = training_bytes(sizes), 1 - 1 / n_ranks
    if parallel == "zero2":
        return state - state / 2 * others
    if parallel == "fsdp":
        blocks = [training_bytes(block) for block in sizes.blocks]
        return state - (state - (max(blocks) + state - sum(blocks)) / 2) * others
    return state


def least_bytes(c, sizes, parallel, n_ranks):
    """What a run takes in any case, known at once: beside the state, in bf16, the logits of a micro-batch and
    the stream before each block."""
    tokens = c.batch_size * c.model.block_size
    batch = 2 * tokens * (sizes.config.vocab_size + sizes.config.n_embd * len(sizes.blocks))
    return batch + rank_bytes(parallel, sizes, n_ranks)


def free_bytes(device):
    """What is left of a device's memory; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None


def what_fits(c, device, dtype, sizes, n_ranks, free):
    """What would make a run fit into so many bytes, in words: flags of train.py, and how many ranks."""
    few = replace(c, batch_size=1)
    if least_bytes(few, sizes, c.parallel, n_ranks) > FITS * free:
        enough = [n for n in (2**i for i in range(1, 13)) if least_bytes(few, sizes, "fsdp", n) < free / 2]
        return f"--parallel=fsdp --batch_size=1 on {enough[0]} or more" if enough else "a smaller model"
    for again in (False, True):
        one, two = (run_bytes(replace(c, batch_size=n, activation_checkpointing=again), device, dtype, sizes,
                              n_ranks) for n in (1, 2))
        most = min(int((FITS * free - one) / max(two - one, 1)) + 1, c.batch_size)
        if one < FITS * free and (again or most < c.batch_size):
            way = "--activation_checkpointing=True " * again
            return f"{way}--batch_size={most} (and gradient_accumulation_steps to make up for it)"
    return "--parallel=fsdp --activation_checkpointing=True --batch_size=1 on several of these"
