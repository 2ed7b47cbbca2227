"""One process, or several that torchrun started: what they say to each other, who keeps which part of a
model, and checkpoints in parts, which any number of them can read.

    ddp     a rank keeps all of the model, and gradients are averaged once a step
    zero2   a rank keeps its part of the fp32 weights and Adam's moments. The weights are gathered once a
            step, and so quantized once; they stay, and gradients add up, until its last backward
    fsdp    the same, but a block's weights are gathered whenever it is used, and its gradients are handed out
            after each backward: besides its parts a rank holds one block, the embedding and the head

The last two are ZeRO's stages 2 and 3 (1910.02054), by torch's fully_shard, on the first axis of every
weight. All three compute the same: what is gathered is the fp32 master, so that a weight is quantized as one
process would. Nothing here knows what a model is, but that it has blocks.
"""
import collections
import contextlib
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from data.run import UserError, explain, naming, read_json, write_json

ABOUT = "about.json"                                # beside the parts of a checkpoint, once all are there


class Ranks:
    """One process, or several: which of them this is, and all that they say to each other. Alone, each of
    these does nothing."""

    def __init__(self, parallel="ddp"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # how many are on this machine
        self.first = self.rank == 0                 # the one that writes and speaks
        self.parallel = parallel
        self.sharded = parallel != "ddp" and self.world > 1
        self.saving = None                          # a checkpoint on its way: folder, about, future

    def join(self, device):
        """Meet the others, from a device of one's own."""
        self.device = device
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if self.sharded:
            self.files = dist.new_group(backend="gloo")         # checkpoints are written while others talk

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def each(self, work, *args):
        """Have every rank do this. Errors of one end the others too; it says why."""
        error = None
        try:
            work(*args)
        except (UserError, OSError) as caught:
            error = caught
        if self.any(error is not None):
            raise error or SystemExit(1)

    def once(self, work, *args):
        """Have the first rank do this while the others wait."""
        self.each(work if self.first else lambda *_: None, *args)

    def share(self, sequence):
        """This rank's part of what all of them do together."""
        return sequence[self.rank::self.world]

    def sum(self, x):
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def mean(self, x):
        return self.sum(x) / self.world

    def any(self, flag):
        """Whether a rank says so: a signal may reach them in different steps."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    @contextlib.contextmanager
    def together(self):
        """An error says whose it is. When a rank is gone the others fail too, and say that this is all."""
        try:
            yield
        except RuntimeError as error:               # of gloo and NCCL, who have many words for it
            if self.world == 1 or not re.search("(?i)gloo|nccl|connection|peer|timed? ?out", str(error)):
                raise
            raise UserError(f"rank {self.rank} lost another one, whose own error says why") from error
        except UserError as error:
            if self.world > 1:
                error.args = (f"rank {self.rank}: {error}",)
            raise

    # --- who keeps what

    def split(self, model):
        """Leave of a model without memory, on the meta device, this rank's part of each weight, with memory
        but without values: fill() or read_parts() give it those."""
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=self.parallel == "fsdp")
        fully_shard(model).to_empty(device=self.device)
        for buffer in model.buffers():
            buffer.zero_()
        return model

    def fill(self, model, whole):
        """Hand out the weights of the whole model, which only the first rank needs to have."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole.state_dict() if self.first else {}, options=options)

    def wrap(self, model):
        """Make self.replica, the model whose backward averages gradients over the ranks."""
        self.replica = model
        if self.world > 1 and not self.sharded:
            gpus = [self.device] if self.device.type == "cuda" else None
            self.replica = DistributedDataParallel(model, device_ids=gpus, broadcast_buffers=False)

    def averaging(self, now):
        """The context of a micro-batch. Where gradients accumulate, the last one's backward averages them
        all; but for fsdp, which keeps no whole gradients."""
        if self.sharded and self.parallel == "zero2":
            self.replica.set_requires_gradient_sync(now)
            self.replica.set_reshard_after_backward(now)
        accumulating = self.world > 1 and not self.sharded and not now
        return self.replica.no_sync() if accumulating else contextlib.nullcontext()

    def close(self):
        self.replica = None                         # its reducer goes before the group it talks through
        if self.world > 1:
            dist.destroy_process_group()

    # --- checkpoints in parts: a folder of the run's, whole when ABOUT is there

    def start_saving(self, run_folder, tensors, about):
        """Begin to write tensors, {name: tensor or its part}, of which a copy is made, so that training can
        go on meanwhile. All ranks do it together. about: its step, and what else is to be known of it"""
        self.finish_saving()
        path = Path(run_folder, f"ckpt-{about['step']:09d}")
        self.once(shutil.rmtree, path, True)
        self.saving = path, about, dcp.async_save(tensors, checkpoint_id=path, process_group=self.files)

    def finish_saving(self, wait=True):
        """Put ABOUT beside the parts when all ranks have written theirs, with the CRC-32 of every file; older
        checkpoints go. Returns the step of what has become whole, or None. raises UserError"""
        if not self.saving or not wait and self.any(not self.saving[2].done()):
            return None
        (path, about, future), self.saving = self.saving, None
        error = future.exception()
        if self.any(error is not None):
            raise UserError(f"{path}: {explain_parts(error)}")
        mine = {file.name: crc32_of(file) for file in path.glob(f"__{self.rank}_*")}
        sums = [None] * self.world
        dist.all_gather_object(sums, mine, group=self.files)
        self.once(complete, path, about, dict(collections.ChainMap(*sums)))
        return about["step"]


def part_of(shape, n):
    """The largest of the n parts of a weight, which ranks keep: whole rows of its first axis."""
    return (-(-shape[0] // n), *shape[1:])


def complete(path, about, sums):
    sums[".metadata"] = crc32_of(path / ".metadata")
    write_json(path / ABOUT, about | {"files": sums})
    remove_others(path)


def remove_others(path):
    """Older checkpoints beside a new one, whole or not."""
    for other in path.parent.glob("ckpt*"):
        if other.is_dir() and other != path:
            shutil.rmtree(other)
        elif other.name == "ckpt.pt" != path.name:
            other.unlink()


def crc32_of(path):
    crc = 0
    with naming(path), open(path, "rb") as file:
        for piece in iter(lambda: file.read(2**24), b""):
            crc = zlib.crc32(piece, crc)
    return crc


def explain_parts(error):
    """One line of what may be an error of each rank."""
    failures = getattr(error, "failures", None)     # {rank: (error, traceback)}
    rank, (error, *_) = next(iter(failures.items())) if failures else ("another", (error,))
    return f"rank {rank}: {explain(error) if error else 'failed'}"


def whole_parts(run_folder):
    """The checkpoints in parts of a run that are whole, in order of their steps."""
    return sorted(about.parent for about in Path(run_folder).glob(f"ckpt-*/{ABOUT}"))


def read_about(path):
    """What stands beside the parts of a checkpoint, as a dict."""
    return read_json(path / ABOUT)


def check_files(path, names, sums):
    for name in names:
        if crc32_of(path / name) != sums[name]:
            raise UserError(f"{path}: {name} is damaged on disk; copy it anew, or start another run")


@torch.no_grad()
def read_parts(path, tensors, about, ranks=None):
    """Read into tensors, {name: tensor or its part}, from a checkpoint of any number of ranks.

    raises  UserError where a file is damaged, or a tensor is not there in its shape and dtype
    """
    names = sorted(about["files"])
    if ranks:
        ranks.each(check_files, path, ranks.share(names), about["files"])
    else:
        check_files(path, names, about["files"])
    there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        found = there.get(name)
        if found is None or (found.size, found.properties.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(f"{path}: {name} must be {tuple(tensor.shape)} of {tensor.dtype}, so that no run "
                            "can start from it; start another --out_dir")
    dcp.load(tensors, checkpoint_id=path, no_dist=ranks is None or ranks.world == 1)


@torch.no_grad()
def put(tensors, whole):
    """Copy whole tensors, {name: tensor}, into tensors or their parts."""
    for name, tensor in tensors.items():
        value = whole[name]
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements,
                                      src_data_rank=None)
        tensor.copy_(value)
