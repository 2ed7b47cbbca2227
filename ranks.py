"""One process, or several that torchrun started: how they talk, how they share one model, and the tensors of
its checkpoint, which any number of ranks can read.

    ddp     a rank keeps all of the model, and gradients are averaged once a step, after its last backward
    zero2   a rank keeps its part of the fp32 weights and of the optimizer's state. The weights are gathered
            once a step, and so quantized once; they stay, and gradients add up, until its last backward
    fsdp    as zero2, but a block's weights are gathered whenever it is used, and its gradients are handed out
            after each backward: besides its parts a rank holds one block, the embedding and the head

zero2 and fsdp are ZeRO's stages 2 and 3 (1910.02054), by torch's fully_shard, on the first axis of every
weight. Where a weight's 4-bit blocks are square, each rank quantizes its own rows, and their codes and scales
are gathered: 4.03 bits a value in place of 32. All three compute the same bits. Nothing here knows what a
model is, but that it has blocks, nor which optimizer trains it.
"""
import collections
import contextlib
import math
import os
import re
import shutil
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import nvfp4
from data.run import ABOUT, UserError, explain, naming, remove_others, write_json, write_whole


def of_launcher(name, default):
    """A number that torchrun or srun leaves in the environment. raises UserError"""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value} in the environment must be a number; unset it, or use torchrun")
    return int(value)


class Ranks:
    """One process, or several: which of them this is, and how it talks to the others. Alone, it has nothing
    to say, and each method does its work for one.

    raises  UserError where the environment is no launcher's
    """

    def __init__(self, parallel="ddp"):
        self.rank, self.world = of_launcher("RANK", 0), of_launcher("WORLD_SIZE", 1)
        self.local, self.beside = of_launcher("LOCAL_RANK", 0), max(1, of_launcher("LOCAL_WORLD_SIZE", 1))
        if self.rank >= self.world:
            raise UserError(f"RANK={self.rank} in the environment must be below WORLD_SIZE={self.world}; "
                            "unset both, or use torchrun")
        if self.world > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(f"WORLD_SIZE={self.world} in the environment: RANK, MASTER_ADDR and MASTER_PORT "
                            "must say who this is and where ranks meet; set them, or use torchrun")
        of_launcher("MASTER_PORT", 0)
        self.first = self.rank == 0                 # the one that writes and speaks
        self.parallel = parallel
        self.sharded = parallel != "ddp" and self.world > 1
        self.saving = None                          # a checkpoint on its way: folder, about, future

    def join(self, device):
        """Meet the others, from a device of one's own."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.world > 1 and not dist.is_initialized():
            # Others wait while the first one draws the weights: those of 30B take it longer than the ten
            # minutes of NCCL. So a rank that hangs is noticed later; one that dies is at once.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        if self.sharded:
            self.files = dist.new_group(backend="gloo")         # checkpoints are written while training talks

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def each(self, work, *args):
        """Have every rank do this, for its result. An error of one ends the others too; it alone says why."""
        error = found = None
        try:
            found = work(*args)
        except (UserError, OSError) as caught:
            error = caught
        if self.any(error is not None):
            raise error or SystemExit(1)
        return found

    def once(self, work, *args):
        """Have the first rank do this while the others wait; they get None for its result."""
        return self.each(work if self.first else lambda *_: None, *args)

    def share(self, sequence):
        """This rank's part of a sequence."""
        return sequence[self.rank::self.world]

    def sum(self, x):
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag):
        """Whether the flag of some rank is true: a signal may reach them in different steps."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    @contextlib.contextmanager
    def together(self):
        """Put the rank before an error. When one is gone the others fail too, and say no more than that."""
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

    # --- sharing a model

    def place(self, model):
        """Give a model on the meta device memory here, for all of it or, where ranks share it, for this
        rank's part. It has no values yet: fill() or restore() gives it those."""
        if self.sharded:
            for block in model.blocks:
                fully_shard(block, reshard_after_forward=self.parallel == "fsdp")
            fully_shard(model)
        model.to_empty(device=self.device)
        for buffer in model.buffers():
            buffer.zero_()
        return model

    def fill(self, model, whole):
        """Give all ranks the weights of the whole model, which the first rank alone needs to have: another
        CPU may draw others from the same seed."""
        if self.sharded:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, whole.state_dict() if self.first else {}, options=options)
            return
        if self.first:
            model.load_state_dict(whole.state_dict())
        if self.world > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def gather_codes(self, model):
        """From now on gather codes of weights, where they will do, and no two layers share the weight.
        Returns how many these are."""
        uses = collections.Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        n = 0
        for layer in nvfp4.fp4_layers(model):
            how = for_parts(layer, self.world)
            if how and uses[id(layer.weight)] == 1:
                gather_codes_of(layer, how)
                n += 1
        return n

    def before_backward(self, model, last):
        """Called before each micro-batch; last: whether it is the step's last one. Until then zero2 keeps
        whole weights and gradients."""
        if self.sharded and self.parallel == "zero2":
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)

    def average(self, model):
        """Average a step's gradients over the ranks, where these have whole ones. DistributedDataParallel
        would begin during the last backward. We wait for its end: so the backward can be a CUDA graph, and a
        gradient needs no second place in a bucket. Over many micro-batches it comes to the same time."""
        if self.world > 1 and not self.sharded:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()
            torch._foreach_div_(gradients, self.world)

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()

    # --- checkpoints: a file or, where ranks share the model, a folder of parts, whole when ABOUT is there

    def save(self, run_folder, model, optimizer, about):
        """Save the state of model and optimizer and about, a dict with its step. Parts are copied and written
        while training goes on; finish_saving() ends that. All ranks call it together. raises UserError"""
        about = about | {"trained_by": type(optimizer).__name__}
        if not self.sharded:
            path = Path(run_folder, "ckpt.pt")
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **about}
            self.once(save_file, path, saved)
            return
        self.finish_saving()
        path = Path(run_folder, f"ckpt-{about['step']:09d}")
        self.once(shutil.rmtree, path, True)
        tensors = tensors_of(model, optimizer)
        self.saving = path, about, dcp.async_save(tensors, checkpoint_id=path, process_group=self.files)

    def finish_saving(self, wait=True):
        """Put ABOUT beside the parts when all ranks have written theirs, with the CRC-32 of every file; older
        checkpoints go. Returns the step of what has become whole, or None. raises UserError"""
        if not self.saving or not wait and self.any(not self.saving[2].done()):
            return None
        (path, about, future), self.saving = self.saving, None
        error = future.exception()
        if self.any(error is not None):
            failures = getattr(error, "failures", None)     # {rank: (error, traceback)}
            rank, (error, *_) = next(iter(failures.items())) if failures else ("another", (error,))
            raise UserError(f"{path}: rank {rank}: {explain(error) if error else 'failed'}")
        mine = {file.name: crc32_of(file) for file in path.glob(f"__{self.rank}_*")}
        sums = [None] * self.world
        dist.all_gather_object(sums, mine, group=self.files)
        self.once(complete, path, about, dict(collections.ChainMap(*sums)))
        return about["step"]

    @torch.no_grad()
    def restore(self, path, saved, model, optimizer):
        """Give model and optimizer the state of a checkpoint, saved as load_checkpoint() has it, whoever
        wrote it: one process, or any number of ranks. raises UserError where a file is damaged, or does not
        fit
        """
        by = saved.get("trained_by", "AdamW")       # earlier versions had no other
        if by != type(optimizer).__name__:
            raise UserError(f"{path}: was trained by {by}; start another --out_dir")
        if path.is_file() and not self.sharded:
            try:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: does not fit this model and optimizer ({error})") from None
            return
        if saved["step"]:
            begin_state(optimizer)
        tensors = tensors_of(model, optimizer)
        if path.is_dir():
            read_parts(path, tensors, saved, self)
            return
        whole = {f"model/{name}": tensor for name, tensor in saved["model"].items()}
        for i, state in saved["optimizer"]["state"].items():
            whole |= {f"optimizer/{i}/{key}": tensor for key, tensor in state.items()}
        for name, tensor in tensors.items():
            check_fits(path, name, tensor, whole.get(name))
            value = whole[name]
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements,
                                          src_data_rank=None)
            tensor.copy_(value)


def for_parts(layer, n):
    """Arguments of quantize() for n equal parts of the first axis of an FP4Linear's weight, each (N/n, K), or
    (E N/n, K) of experts. None: side by side their codes are not the weight's, or codes will not do: another
    class of layers looks at the weight, and after a late switch all do.
    """
    (rows, columns), shape, block = layer.weight_operands(), layer.weight.shape, layer.cfg.whole_channels
    fits = shape[0] % n == 0 and shape[:-1].numel() // n % block == 0 and layer.out_features % block == 0
    codes_do = type(layer) is nvfp4.FP4Linear and layer.cfg.until is None
    if fits and codes_do and nvfp4.one_for_both(rows, columns):
        return rows | {"decode": None}
    return None


def gather_codes_of(layer, how):
    """Have fully_shard gather the codes of an FP4Linear's weight, not the weight. For autograd a whole weight
    stands there without memory; an evaluation in high precision, which needs its values, gathers those.

    how     arguments of quantize() for the rows of one rank
    """
    part, format = layer.weight, how["format"]      # fully_shard will put the whole one in its place
    mine = part._local_tensor                       # it looks for hooks on this object: local() gives views

    def before(mesh, size, stride, module, policy):
        rows, amax = mine.flatten(0, -2), how["amax"]
        if amax is None and nvfp4.FORMATS[format].top:          # the largest of all ranks
            amax = nvfp4.largest_magnitude(rows)
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=mesh.get_group())
        q = nvfp4.quantize(rows, **how | {"amax": amax})
        scales = nvfp4.unswizzle(q.scales, *q.shape)            # swizzled ones are there for each line
        scales = scales[::nvfp4.FORMATS[format].block * len(scales) // len(rows)].contiguous()
        return (q.codes, scales.view(torch.uint8)), (scales.dtype, q.s_dec)

    def after(gathered, about, dtype, *, out=None):
        codes, scales = gathered
        layer.codes = nvfp4.Quantized(codes, scales.view(about[0]), about[1], format)
        return out if out is not None else (mine.new_empty(part.shape), ())

    @torch.compiler.disable                         # as the layer itself
    @torch.no_grad()
    def need_values(layer, *_):
        assert layer.codes is not None, "fully_shard has not asked the part how to gather it"
        layer.weight.untyped_storage().resize_(0 if layer.cfg.active else part.numel() * part.itemsize)
        if not layer.cfg.active:
            layer.weight.copy_(part.full_tensor())

    @torch.compiler.disable
    def free_values(layer, *_):
        layer.weight.untyped_storage().resize_(0)
    mine.fsdp_pre_all_gather, mine.fsdp_post_all_gather = before, after
    layer.register_forward_pre_hook(need_values)
    layer.register_forward_hook(free_values, always_call=True)


def learned(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def tensors_of(model, optimizer):
    """Weights, buffers and the optimizer's state, once it has one: {name: tensor, or a rank's part}."""
    found = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for i, p in enumerate(learned(optimizer)):
        for key, t in optimizer.state.get(p, {}).items():
            assert torch.is_tensor(t), f"{type(optimizer).__name__} keeps {key} as no tensor: it is not saved"
            found[f"optimizer/{i}/{key}"] = t
    return found


def begin_state(optimizer):
    """Have an optimizer make the state of its first step, by a step of gradients and rates that are zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in learned(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def local(tensor):
    """A tensor, or this rank's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def not_finite(tensors):
    """The name of a tensor that is not finite, of those that are here, or None."""
    for name, tensor in tensors.items():
        here = local(tensor)
        if not math.isfinite(here.sum()) and not here.isfinite().all():         # the sum needs no memory
            return name
    return None


def save_file(path, saved):
    write_whole({path: lambda file: torch.save(saved, file)})
    remove_others(path)


def complete(path, about, sums):
    sums[".metadata"] = crc32_of(path / ".metadata")
    write_json(path / ABOUT, about | {"files": sums})
    remove_others(path)


def crc32_of(path):
    crc = 0
    with naming(path), open(path, "rb") as file:
        for piece in iter(lambda: file.read(2**24), b""):
            crc = zlib.crc32(piece, crc)
    return crc


def check_files(path, names, sums):
    for name in names:
        if crc32_of(path / name) != sums[name]:
            raise UserError(f"{path}: {name} is damaged on disk; copy it anew, or start another run")


def check_fits(path, name, tensor, found):
    if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
        raise UserError(f"{path}: {name} must be {tuple(tensor.shape)} of {tensor.dtype}, so that no run can "
                        "start from it; start another --out_dir")


@torch.no_grad()
def read_parts(path, tensors, saved, ranks=None):
    """Read into tensors, {name: tensor or its part}, from the parts of any number of ranks. raises UserError
    as restore() does"""
    names, sums = sorted(saved["files"]), saved["files"]
    if ranks:
        ranks.each(check_files, path, ranks.share(names), sums)
    else:
        check_files(path, names, sums)
    there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        found = there.get(name)
        check_fits(path, name, tensor, found and SimpleNamespace(shape=found.size,
                                                                 dtype=found.properties.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")      # one process, and meant so
        dcp.load(tensors, checkpoint_id=path, no_dist=ranks is None or ranks.world == 1)
