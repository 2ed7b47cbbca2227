"""What a program and its machine do to each other: files that are whole or not there, lines that are never
lost, signals, and errors of the machine as one line.

Dealt with here, once, and nowhere else: a kill at any moment, a full or read-only disk, a damaged file, a
second process in the same folder, too little memory. Nothing here knows of models.
"""
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:                                 # no POSIX: no locks
    fcntl = None


class UserError(ValueError):
    """A mistake in a command, a config or a run folder, or an error of the machine: one line that names the
    remedy, no traceback. What is quoted in it may have many lines and no end; the middle goes first."""

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
    """Errors of the operating system, which may not say what they are about, as a UserError that does."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


@contextlib.contextmanager
def naming_memory(advice):
    """Running out of memory, which torch says in three ways, as a UserError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        raise UserError(f"out of memory; {advice}") from error


# ---------------------------------------------------------------- whole files

def write_whole(writers):
    """Write files, {path: function that writes to an open binary file}. Each is written beside its path and
    flushed to disk, and only when all are there do they take their places: an interruption at any moment
    leaves what was there before. Their folders are flushed too, so that they survive a power cut.

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
    """Remove what killed processes left of write_whole()'s files in a folder that nobody else writes to."""
    for temporary in Path(folder).glob("*.[0-9]*.tmp*"):
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- reading strictly

def parse_object(text, where):
    """The JSON object in bytes of UTF-8, as a dict; NaN and infinity, which JSON has not, are refused.

    raises UserError that begins with where
    """
    def refuse(constant):
        raise ValueError(constant)
    try:
        found = json.loads(text.decode(), parse_constant=refuse)
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):            # no UTF-8, no JSON, or nested without end
        pass
    raise UserError(f"{where}: damaged, no JSON object")


def read_json(path):
    """The JSON object that is a file, as a dict. raises UserError"""
    with naming(path):
        text = Path(path).read_bytes()
    return parse_object(text, path)


def read_json_lines(path):
    """The JSON objects of a file, one a line, as dicts. A last line that breaks off was cut by a kill, and is
    left out. raises UserError that names the line"""
    with naming(path):
        *lines, last = Path(path).read_bytes().split(b"\n")
    rows = [parse_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    with contextlib.suppress(UserError):
        rows.append(parse_object(last, path))
    return rows


# ---------------------------------------------------------------- files that grow

class Lines:
    """A text file that grows by lines, each handed to the system at once, so that a kill costs none.

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


# ---------------------------------------------------------------- signals

TOGETHER = 0.2                                      # seconds: what a terminal and torchrun send is one signal


class Stop:
    """Whether work that takes steps is to end after the one under way."""
    why = ""                                        # it is: the name of a signal, or the like
    at = None                                       # the step at which it did
    times = ()                                      # seconds of each step done, for who has to wait


@contextlib.contextmanager
def catch_signals(stop):
    """Let SIGINT, SIGTERM and SIGHUP fill a Stop; the second of a kind ends the process at once. A thread
    looks after them: Python itself would not before the operation under way is done, a backward of minutes.
    """
    came = {}

    def watch():
        for number in iter(lambda: os.read(reader, 1), b""):
            name, now = signal.Signals(number[0]).name, time.monotonic()
            first = name not in came
            if now - came.setdefault(name, now) > TOGETHER:
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


# ---------------------------------------------------------------- processes

def run_all(commands, at_once, stop, **environment):
    """Run commands, {key: argv}, so many at once; yields (key, exit status, last line of stderr) as they end.
    Where a Stop says so no other one begins, and those under way get a SIGTERM and are waited for.
    """
    queue, running = list(commands), {}
    while running or queue and not stop.why:
        while queue and not stop.why and len(running) < at_once:
            key, said = queue.pop(0), tempfile.TemporaryFile()
            running[key] = said, subprocess.Popen(commands[key], stdout=subprocess.DEVNULL, stderr=said,
                                                  env=os.environ | environment)
        if stop.why:
            for _, process in running.values():
                process.terminate()                 # once: what a terminal sends is another signal
            for _, process in running.values():
                process.wait()
        for key, (said, process) in list(running.items()):
            if process.poll() is not None:
                said.seek(0)
                lines = said.read().decode(errors="replace").splitlines()
                del running[key]
                yield key, process.returncode, lines[-1] if lines else ""
        time.sleep(0.1)


# ---------------------------------------------------------------- commands

def mute(stream):
    """Let what is still to be said go nowhere: whoever listened has left, and the end of the process would
    complain about it once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command(name):
    """Decorator of a function that is a command of this name. A UserError and an error of the system are one
    line on stderr and exit status 1; all else is our own mistake and keeps its traceback."""
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
