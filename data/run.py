"""The folder of a run: its log, its metrics, its checkpoint; and what a machine does to whoever writes there.

A kill at any moment, a full disk, a damaged file, a second process in the same folder, too little memory: we
deal with them here and nowhere else. A file is written whole or not at all, a line is written at once, and an
error is one line that names the remedy. Nothing here knows of models.
"""
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:                                 # no POSIX: no locks
    fcntl = None

STOPPED = 75                                        # exit status with a checkpoint: --resume goes on


class UserError(ValueError):
    """A mistake in a command, a config or a run folder, or an error of the machine: one line that names the
    remedy, no traceback. A quoted text may be long; we cut its middle."""

    def __init__(self, message):
        line = " ".join(str(message).splitlines())
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}")


def explain(error):
    """The line for a UserError or an OSError."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


@contextlib.contextmanager
def naming(path):
    """Turn errors of the operating system, which may not say their file, into a UserError that does."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


@contextlib.contextmanager
def naming_memory(advice):
    """Turn the three ways in which torch runs out of memory into a UserError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        raise UserError(f"out of memory; {advice}") from error


# ---------------------------------------------------------------- files, whole or not at all

def write_whole(writers):
    """Write files, {path: function that writes to an open binary file}. We write each beside its path and
    flush it; when all are on disk, they take their places. So an interruption leaves the old files. We flush
    their folders too: a power cut takes nothing.

    raises UserError naming the path; then nothing is left behind
    """
    beside = {}
    try:
        for path, write in writers.items():
            path = Path(path)
            beside[path] = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
            with naming(path), open(beside[path], "wb") as file:
                try:
                    write(file)
                except RuntimeError as error:       # torch.save's own, raised while it cleans up after ...
                    raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in beside.items():
            with naming(path):
                os.replace(temporary, path)
        for folder in {path.parent for path in beside} if os.name == "posix" else ():
            with naming(folder):
                descriptor = os.open(folder, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
    finally:
        for temporary in beside.values():
            with contextlib.suppress(OSError):      # it has taken its place, or never came to be
                temporary.unlink()


def write_json(path, value):
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole({path: lambda file: file.write(text.encode())})


def sweep(folder):
    """Remove the temporary files of killed processes from a folder that nobody else writes to."""
    for temporary in Path(folder).glob("*.[0-9]*.tmp*"):
        temporary.unlink(missing_ok=True)


def json_object(text, strict=True):
    """The JSON object in bytes, as a dict; None for all else. strict: in UTF-8 without a byte order mark, and
    with neither NaN nor infinity, which JSON has not; not so strict with the files of others."""
    def refuse(constant):
        raise ValueError(constant)
    try:
        found = json.loads(text.decode(), parse_constant=refuse) if strict else json.loads(text)
        return found if isinstance(found, dict) else None
    except (ValueError, RecursionError):            # no UTF-8, no JSON, or nested without end
        return None


def parse_object(text, where, strict=True):
    """json_object(), which must be there. raises UserError that begins with where"""
    found = json_object(text, strict)
    if found is None:
        raise UserError(f"{where}: damaged, no JSON object")
    return found


def read_json(path):
    """The JSON object of a file, as a dict. raises UserError"""
    with naming(path):
        text = Path(path).read_bytes()
    return parse_object(text, path)


class Lines:
    """A text file that grows by lines. Each is handed to the system at once, so a kill costs none.

    alone   lock the file: no other Lines may have it so, in this process or another. The lock goes with the
            process, however that ends
    raises  UserError, also where the disk is full
    """

    def __init__(self, path, alone=False):
        self.path = path
        with naming(path):
            self.file = open(path, "ab", buffering=0)
        if alone and fcntl:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise UserError(f"{Path(path).parent}: another process is at work there; wait for its end, "
                                "or choose another folder") from None
            except OSError as error:
                print(f"{path}: cannot be locked ({explain(error)}); see to it that no other process uses it",
                      file=sys.stderr)

    def add(self, text):
        data = memoryview(f"{text}\n".encode(errors="backslashreplace"))
        with naming(self.path):
            while data:
                data = data[self.file.write(data):]

    def sync(self):
        """Flush to disk what a power cut would take."""
        with naming(self.path):
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()


# ---------------------------------------------------------------- log and metrics

def read_metrics(folder):
    """The rows of a run's metrics.jsonl, as dicts. A kill may have cut the last line: we leave it out.

    raises  UserError that names the line which is no row of numbers, or is out of order
    """
    path, rows, next_step = Path(folder, "metrics.jsonl"), [], None
    with naming(path):
        *lines, last = path.read_bytes().split(b"\n")
    if json_object(last) is not None:
        lines.append(last)
    for number, line in enumerate(lines, 1):
        row = parse_object(line, f"{path}, line {number}")
        step, numbers = row.get("step"), all(type(v) in (int, float) for v in row.values())
        if type(step) is not int or not numbers or not all(map(math.isfinite, row.values())):
            raise UserError(f"{path}, line {number}: damaged, these are not the numbers of a step")
        if step < 0 or next_step is not None and step != next_step:
            raise UserError(f"{path}, line {number}: damaged, step {step} stands where {next_step} should")
        next_step = step + ("loss" in row)          # an evaluation comes before its step
        rows.append(row)
    return rows


class Log:
    """Console and log.txt, and metrics.jsonl. It is silent until it is opened: the first rank alone does
    that. One run at a time can have those of a folder."""

    def __init__(self, stop):
        self.stop, self.files = stop, []
        self.mirror = self.end_mirror = lambda *row: None
        self.crc = self.crc_before = 0              # CRC-32 of all rows, and of those before this step

    def open(self, folder, config, first_step=0, crc=None, mirror="none", check=lambda: None):
        """Take the folder, and check() it once it is ours. Of its metrics we keep the rows before the
        checkpoint, whose CRC-32 it knows: the steps after it are about to be done again."""
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.files = [Lines(folder / "log.txt", alone=True)]
        path = folder / "metrics.jsonl"
        check()
        sweep(folder)
        rows = read_metrics(folder) if path.exists() else []
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] < first_step).encode()
        self.crc = self.crc_before = zlib.crc32(kept)
        if path.exists() and crc not in (None, self.crc):
            raise UserError(f"{path}: damaged, not what the checkpoint of step {first_step} saw; restore it, "
                            "or remove it and go on without it")
        write_whole({path: lambda file: file.write(kept)})
        write_json(folder / "config.json", config)
        self.files.append(Lines(path))
        if mirror != "none":
            self.mirror, self.end_mirror = mirror_of(mirror, folder, config)

    def __call__(self, text):
        if self.files:
            self.files[0].add(text)
            try:
                print(text, flush=True)
            except OSError:                         # a pipe without a reader, a terminal that is gone
                mute(sys.stdout)
                self.stop.why = self.stop.why or "the console is closed"

    def metrics(self, row):
        if self.files:
            line = json.dumps(row, allow_nan=False)
            self.files[1].add(line)
            self.mirror(row)
            self.crc = zlib.crc32(f"{line}\n".encode(), self.crc)
            if "loss" in row:                       # the last of its step; an evaluation is made anew
                self.crc_before = self.crc

    def sync(self):
        self.files[1].sync()

    def close(self):
        self.end_mirror()
        for file in self.files:
            file.close()


def mirror_of(mirror, folder, config):
    """(what shows a row of metrics.jsonl elsewhere too, what ends that). raises UserError"""
    try:
        if mirror == "wandb":
            import wandb
            shown = wandb.init(project="four-bits", dir=folder, config=config, resume="allow",
                               name=folder.name)
            return lambda row: shown.log(row, step=row["step"]), shown.finish
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
        return lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()], writer.close
    except ModuleNotFoundError as error:
        raise UserError(f"mirror={mirror}: {error} (pip install {mirror}); or leave it out") from None


# ---------------------------------------------------------------- checkpoints
# A file, ckpt.pt, or a folder of the ranks' parts, ckpt-STEP (see ranks.py), whole when ABOUT is there.

ABOUT = "about.json"


def newest_checkpoint(folder):
    """The path of a run's checkpoint, whether it exists or not: ckpt.pt, or a folder of parts."""
    parts = sorted(about.parent for about in Path(folder).glob(f"ckpt-*/{ABOUT}"))
    file = Path(folder, "ckpt.pt")
    if parts and file.exists():                     # a kill came before the older one was removed
        return max(parts[-1], file, key=lambda path: load_checkpoint(path)["step"])
    return parts[-1] if parts else file


def remove_others(path):
    """Older checkpoints beside a new one, whole or not."""
    for other in path.parent.glob("ckpt*"):
        if other.is_dir() and other != path:
            shutil.rmtree(other)
        elif other.name == "ckpt.pt" != path.name:
            other.unlink()


def load_checkpoint(path):
    """A checkpoint as a dict: step, config, origin of the data, rows (CRC-32 of its metrics) and, of a file,
    the state of model and optimizer, without a flipped bit. raises UserError"""
    import torch                                    # late: processes that prepare data need none of it
    if not path.exists():
        raise UserError(f"{path}: no checkpoint there; train a run first, or give another folder")
    if path.is_dir():
        saved = read_json(path / ABOUT)
    else:
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
                flipped = archive.testzip()
            saved = None if flipped else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:                  # of readers, of whatever the file holds: no code of ours
            raise UserError(f"{path}: not a checkpoint of this code ({error or type(error).__name__})"
                            ) from None
        if flipped:
            raise UserError(f"{path}: damaged on disk, in {flipped}; copy it anew, or start another run")
    needed = {"step", "config", "origin"} | ({"files"} if path.is_dir() else {"model", "optimizer"})
    if not isinstance(saved, dict) or not needed <= saved.keys() or not isinstance(saved["config"], dict):
        raise UserError(f"{path}: not a checkpoint of this code")
    return saved


# ---------------------------------------------------------------- memory

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


def free_bytes(device):
    """What is left of a device's memory; None where nobody says."""
    if device.type == "cuda":
        import torch
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None


# ---------------------------------------------------------------- signals

TOGETHER = 0.2                                      # seconds: a terminal and torchrun may both send the same


class Stop:
    """Asks work that takes steps to end after the step under way."""
    why = ""                                        # the name of a signal, or another reason; "": go on
    begun = True                                    # False: nothing is to be finished, a signal ends all
    at = None                                       # the step at which it ended
    times = ()                                      # seconds of each step done, for whoever waits


@contextlib.contextmanager
def catch_signals(stop):
    """Let SIGINT, SIGTERM and SIGHUP fill a Stop; the second of a kind ends the process at once, and so does
    the first before the work has begun. A thread takes them: Python itself would wait for the operation under
    way, a backward of minutes.
    """
    came = {}

    def watch():
        for number in iter(lambda: os.read(reader, 1), b""):
            name, now = signal.Signals(number[0]).name, time.monotonic()
            first = name not in came
            if now - came.setdefault(name, now) > TOGETHER or not stop.begun:
                os._exit(128 + number[0])
            stop.why = stop.why or name
            if first:
                taking = f" (one takes {stop.times[-1]:.1f} s)" if stop.times else ""
                with contextlib.suppress(OSError):  # nobody may be there any more
                    print(f"{name}: stopping after this step{taking}; once more to stop at once",
                          file=sys.stderr, flush=True)

    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    known = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]     # nohup's wish
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in known}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()
        os.close(reader)


# ---------------------------------------------------------------- commands

def mute(stream):
    """Send the rest of a stream nowhere: its reader has left, and Python would complain at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command(name):
    """Decorator of a function that is a command of this name. A UserError and an error of the system become
    one line on stderr and exit status 1; every other error is our own mistake and keeps its traceback."""
    def decorate(work):
        @functools.wraps(work)
        def run(*arguments):
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "reconfigure"):  # a name that is no UTF-8 can be printed too
                    stream.reconfigure(errors="backslashreplace")
            try:
                with naming_memory("ask for less, or for a larger machine"):
                    result = work(*arguments)
                print(end="", flush=True)
                return result
            except BrokenPipeError:                 # ... | head
                mute(sys.stdout)
                sys.exit(141)                       # as a shell says it: SIGPIPE
            except KeyboardInterrupt:
                sys.exit(130)                       # SIGINT
            except (UserError, OSError) as error:
                sys.exit(str(UserError(f"{name}: {explain(error)}")))
        return run
    return decorate
