"""What must never happen, tried over and over: runs that are killed or signalled, disks that are full, files
with a bit or a piece missing, commands without sense. No row and no step may be lost beyond the last save, a
resumed run must be the uninterrupted one bit for bit, and every error must be one line.

    python tests/stress.py                   all of it, minutes
    python tests/stress.py short             a few of each, as the tests do
    python tests/stress.py flips 500         one kind, so often

Each trial is a process of its own, forked, so that it can be killed; tiny models on the CPU. Prints a line of
figures for each kind; an AssertionError names the seed of a trial that failed.
"""
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

import analyze  # noqa: E402
import model  # noqa: E402
import nvfp4  # noqa: E402
import train  # noqa: E402
from configs import config  # noqa: E402
from data.run import UserError  # noqa: E402
from data.tokens import prepare  # noqa: E402

BUG, INTERRUPTED = 70, 130                          # exit status of a traceback, and of SIGINT
LONGEST = 1200                                      # letters of an error


# ---------------------------------------------------------------- processes

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

    def end(self, seconds=60):
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
            print(end.code, file=sys.stderr, flush=True)
            return 1
        return end.code or 0
    except BaseException as error:
        files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
        if isinstance(error, KeyboardInterrupt) and files == {__file__}:
            return INTERRUPTED                      # the command had not begun, or had ended
        traceback.print_exc()
        sys.stderr.flush()
        return BUG


def one_line(text):
    return text.count("\n") == 1 and len(text) < LONGEST and "Traceback" not in text


# ---------------------------------------------------------------- runs

class Bench:
    """A folder with a dataset, a finished run of ten steps, and the flags of such runs."""

    def __init__(self, folder):
        self.folder, self.data, self.whole = folder, folder / "data", folder / "whole"
        self.data.mkdir()
        text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=20000))
        prepare([text[2000:]], [text[:2000]], self.data, "a test", tokenizer="bytes")
        started = time.monotonic()
        assert self.run(self.whole).end()[0] == 0
        self.seconds = time.monotonic() - started   # of a run
        train.main(self.flags(self.folder / "half", stop_at=5))

    def flags(self, out_dir, **changes):
        settings = {"out_dir": out_dir, "dataset": self.data, "n_layer": 1, "n_embd": 32, "n_head": 2,
                    "block_size": 32, "batch_size": 2, "max_steps": 10, "learning_rate": 1e-2,
                    "eval_interval": 4, "eval_iters": 1, "sample_tokens": 0, "checkpoint_interval": 2,
                    "device": "cpu", "compile": False, **changes}
        return [f"--{name}={value}" for name, value in settings.items()]

    def copy(self, name):
        """A run that stopped at step 5, to be damaged and resumed."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Path(shutil.copytree(self.folder / "half", self.folder / name))

    def run(self, out_dir, before=lambda: None, **changes):
        return Process(lambda: train.main(self.flags(out_dir, **changes)), before)


def contents(folder):
    """All that a run computed: bytes of every tensor, and the rows but for their times."""
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    state = [tensor for key in sorted(saved["optimizer"]["state"])
             for tensor in saved["optimizer"]["state"][key].values()]
    tensors = [t.numpy().tobytes() for t in (*saved["model"].values(), *state)]
    rows = [json.loads(line) | {"ms": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return saved["step"], tensors, rows


def until_done(bench, name, hurt, random):
    """Run, be hurt, and run again with --resume until it is done: (processes, those that hurt()).

    hurt(pid)   does something to a process
    """
    folder, n, n_hurt = bench.folder / name, 0, 0
    shutil.rmtree(folder, ignore_errors=True)
    while n < 40:
        process = bench.run(folder, resume=(folder / "ckpt.pt").exists())
        time.sleep(random.uniform(0, bench.seconds * (1 + n / 10)))             # a machine may become slower
        hurt(process.pid)                           # a zombie at worst: nobody has waited for it yet
        (status, line), n = process.end(), n + 1
        if status == 0:
            assert contents(folder) == contents(bench.whole), name
            return n, n_hurt
        ends = train.STOPPED, INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP
        assert status in ends, line
        n_hurt += 1
        if (folder / "ckpt.pt").exists():           # then all rows before it are there
            step = train.load_checkpoint(folder / "ckpt.pt")["step"]
            rows = [row["step"] for row in train.read_metrics(folder) if "loss" in row]
            assert rows[:step] == list(range(step)), f"{name}: rows are lost"
    raise AssertionError(f"{name}: no progress in 40 processes")


def kills(bench, n):
    dice, found, seed = random.Random(0), 0, 0
    while found < n:
        found += until_done(bench, "killed", lambda pid: os.kill(pid, signal.SIGKILL), dice)[1]
        seed += 1
    return f"{found} kills at random moments in {seed} runs; each ended bit for bit as the uninterrupted one"


def signals(bench, n):
    dice, found, seed = random.Random(1), 0, 0
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    while found < n:
        found += until_done(bench, "signalled", lambda pid: os.kill(pid, dice.choice(numbers)), dice)[1]
        seed += 1
    return f"{found} signals in {seed} runs; each ended bit for bit as the uninterrupted one"


def many_rows(bench, n):
    """A run with 100,000 rows of metrics, killed when it is about to go on."""
    folder, dice, torn = bench.copy("long"), random.Random(2), 0
    rows = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(100_000))
    (folder / "metrics.jsonl").write_text(rows)
    for seed in range(n):
        c = train.make_config({"resume": True})
        process = Process(lambda c=c: train.Log(folder, True, None).open(c, 10**6))
        time.sleep(dice.uniform(0.0, 1.2))
        os.kill(process.pid, signal.SIGKILL)
        torn += process.end()[0] == -signal.SIGKILL
        assert (folder / "metrics.jsonl").stat().st_size >= len(rows), f"seed {seed}: rows are lost"
    return f"{torn} kills while 100,000 rows were read and written anew: none lost"


def disks(bench, n):
    """Files may grow to a limit only, as on a full disk: a run ends in one line, what was there is whole."""
    dice, ends = random.Random(3), 0
    for seed in range(n):
        folder = bench.copy("full")
        limit = dice.choice((0, 300, 1000, 2000, 10**4, 10**5, 10**6, dice.randrange(4 * 10**5)))
        before = contents(folder)
        status, line = bench.run(folder, resume=True, before=lambda limit=limit: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit))).end()
        after, left = contents(folder), [path.name for path in folder.iterdir() if ".tmp" in path.name]
        assert not left and after[0] >= 5 and after[2][:before[0]] == before[2][:before[0]], (seed, limit)
        assert status == 0 or status == 1 and one_line(line), (seed, limit, line)
        ends += status
        status, line = bench.run(folder, resume=True).end()
        assert status == 0 and contents(folder) == contents(bench.whole), (seed, limit, line)
    return f"{n} disks of all sizes, {ends} of them too small: one line, nothing lost, done with more room"


# ---------------------------------------------------------------- damaged files

def damage(raw, dice, kind):
    at = dice.randrange(len(raw))
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1:]
    return raw[:at] if kind == "cut" else raw[:at] + raw[at + dice.randrange(1, 200):]


def damaged(bench, n, name, kinds=("flip", "cut", "hole")):
    """Resume, or read, a run of which a file is damaged: one line, or the same end as without."""
    dice, ends = random.Random(name), {0: 0, 1: 0, 3: 0}
    wanted, config_before = contents(bench.whole), analyze.read_run(bench.folder / "half")["config"]

    @analyze.command("read")
    def read(folder):
        sys.exit(3 * (analyze.read_run(folder)["config"] != config_before))
    for seed in range(n):
        folder = bench.copy("damaged")
        path = folder / name
        path.write_bytes(damage(path.read_bytes(), dice, dice.choice(kinds)))
        if name == "config.json":
            process = Process(lambda folder=folder: read(folder))
        else:
            process = bench.run(folder, resume=True)
        status, line = process.end()
        said = one_line(line) and str(path) in line
        assert status in (0, 3) or status == 1 and said, (name, seed, status, line)
        if status == 0 and name != "config.json":
            assert contents(folder) == wanted, (name, seed, "passed")
        ends[status] += 1
    other = f", {ends[3]} read as other values of the same kind" if name == "config.json" else ""
    return f"{n} times {name} had a {' or '.join(kinds)}: {ends[1]} refused, {ends[0]} read the same{other}"


def flips(bench, n):
    return damaged(bench, n, "ckpt.pt", ("flip",))


def files(bench, n):
    return "; ".join(damaged(bench, n, name) for name in ("ckpt.pt", "metrics.jsonl", "config.json"))


STRANGE = (None, -1, 0, 2.5, 10**30, float("nan"), "x", [], {}, True, torch.zeros(3), torch.tensor(torch.nan))


def tamper(tree, dice):
    """Replace or remove something in a tree of dicts and lists; returns where."""
    at, where = tree, []
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = dice.choice(list(keys))
        where.append(str(key))
        if isinstance(at[key], (dict, list)) and at[key] and dice.random() < 0.8:
            at = at[key]
            continue
        if isinstance(at, dict) and dice.random() < 0.3:
            del at[key]
        elif torch.is_tensor(at[key]) and dice.random() < 0.5:
            at[key] = at[key].reshape(-1)[:-1] if at[key].numel() > 1 else at[key].half()
        else:
            at[key] = dice.choice(STRANGE)
        return ".".join(where)


def checkpoints(bench, n):
    """Resume from, and look at, a checkpoint that is a whole archive of other things."""
    dice, refused = random.Random(4), 0
    good = torch.load(bench.folder / "half" / "ckpt.pt", weights_only=True)
    for seed in range(n):
        folder, saved = bench.copy("tampered"), copy.deepcopy(good)
        where = tamper(saved, dice)
        torch.save(saved, folder / "ckpt.pt")
        status, line = bench.run(folder, resume=True).end()
        assert status == 0 or status == 1 and one_line(line), (seed, where, status, line)
        if status == 0:                             # what is free, or what a run writes anew
            assert contents(folder) == contents(bench.whole), (seed, where)
        refused += status
        torch.save(saved, folder / "ckpt.pt")
        status, line = Process(lambda folder=folder: model.main([str(folder)])).end()
        assert status == 0 or status == 1 and one_line(line), (seed, where, status, line)
    return f"{n} checkpoints of other contents: {refused} refused, {n - refused} went on bit for bit"


# ---------------------------------------------------------------- senseless commands

VALUES = ("", "-1", "0", "1", "2", "3", "7", "16", "0.5", "-0.5", "1e-30", "1e10", "1e40", "1e300", "1e308",
          "1e400", "nan", "inf", "-inf", "None", "True", "maybe", "[]", "fprop", "*-", "-", "*" * 5000,
          "A" * 300, "A" * 5000, "9" * 5000, str(10**10), str(10**18), str(2**63), str(2**64), str(10**40),
          "a,b", "a\nb", "\udcff", "../..", "/dev/null", "gpt", "bf16", "nvfp4", "\u00e9", "ME*-")
PYTHON = ("1", "-1", "10**40", "10**5000", "float('nan')", "1e308", "'x'", "None", "[1, 2]", "{}",
          "__import__('numpy').ones(3)", "__import__('numpy').float64(2)", "__import__('sys').exit()",
          "type('T', (), {'__repr__': lambda s: 1 / 0})()", "'a' * 10**6", "b'x'", "2.5", "(", "'\\0'",
          "'\\n' * 9", "[10**5000]", "'[' * 9999", "1 / 0", "lambda: 0")


def senseless(dice, folder, names, most=3):
    """Flags, and sometimes a config file, of which some make no sense."""
    argv = []
    for _ in range(dice.randint(1, most)):
        kind, name = dice.random(), dice.choice(names)
        if kind < 0.75:
            argv.append(f"--{name}={dice.choice(VALUES[3:9] if dice.random() < 0.5 else VALUES)}")
        elif kind < 0.95:
            path = Path(folder, "fuzz.py")
            path.write_text(f"{name} = {dice.choice(PYTHON)}\n")
            argv.append(str(path))
        else:
            argv.append(dice.choice(("--", "-", "--=", f"--{name}", f"-{name}=1", "x" * 300, "/dev/null",
                                     "a.py", f"--{name[:-1]}=1", "--resume", "configs/config.py")))
    return argv


def configs(bench, n):
    """Read, and built without memory, in this process."""
    dice, refused, names = random.Random(5), 0, list(config.schema(train.OWNERS))
    for seed in range(n):
        argv, started = senseless(dice, bench.folder, names), time.monotonic()
        try:
            c = train.load_config(argv)
            sizes = model.outline(train.replace(c.model, vocab_size=c.model.vocab_size or 256))
            train.check_memory(c, sizes, torch.device("cpu"), train.Ranks())
            assert train.unflatten(json.loads(json.dumps(train.flatten(c)))) == c
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < LONGEST, (seed, argv)
            refused += 1
        assert time.monotonic() - started < 20, (seed, argv)
    return f"{n} configs in one process: {refused} refused in a line each, no traceback"


def commands(bench, n):
    """From end to end: train, look at, and analyse, with flags of which some make no sense."""
    dice, ends, names = random.Random(6), {}, list(config.schema(train.OWNERS))
    options = ["tokens", "channels", "seed", "config", "rates", "out_dir"]
    for seed in range(n):
        out, kind = bench.folder / "fuzz", dice.choice(("train", "train", "train", "model", "analyze"))
        shutil.rmtree(out, ignore_errors=True)
        if kind == "train":
            argv = bench.flags(out, max_steps=2, sample_tokens=2) + senseless(dice, bench.folder, names, 1)
            work = train.main
        elif kind == "model":
            argv = dice.choice(([str(bench.whole)], ["configs/ngpt_tiny.py"], []))
            argv, work = argv + senseless(dice, bench.folder, names), model.main
        else:
            lr = ["lr", *bench.flags(out, max_steps=1), "--rates=1e-3"]
            argv = dice.choice((["losses", str(bench.whole)], [str(bench.whole)], lr, ["no_such"]))
            argv, work = argv + senseless(dice, bench.folder, options) + [f"--out_dir={out}"], analyze.main
        process = Process(lambda work=work, argv=argv: work(argv), before=lambda: os.chdir(bench.folder))
        status, line = process.end(120)
        assert status in (0, 1, 2) and "Traceback" not in line, (seed, kind, argv, status, line[-2000:])
        assert status != 1 or one_line("\n" + line.rstrip("\n").rpartition("\n")[2]), (seed, kind, argv, line)
        ends[status] = ends.get(status, 0) + 1
    return f"{n} commands from end to end: {ends.get(0, 0)} done, {n - ends.get(0, 0)} refused, no traceback"


# ---------------------------------------------------------------- all of it

KINDS = {                                           # how often: short, and by hand
    kills: (2, 100), signals: (2, 60), many_rows: (1, 20), disks: (2, 60), flips: (6, 300), files: (2, 100),
    checkpoints: (3, 200), configs: (150, 2000), commands: (6, 150)}


def main(argv):
    chosen = {kind.__name__: kind for kind in KINDS}
    if argv[1:] and argv[0] in chosen:
        plan = {chosen[argv[0]]: int(argv[1])}
    elif argv in ([], ["short"]):
        plan = {kind: numbers[not argv] for kind, numbers in KINDS.items()}
    else:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    nvfp4.can_compile = lambda kind: False
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            bench = Bench(Path(folder))
        for kind, n in plan.items():
            started = time.monotonic()
            print(f"{kind.__name__:12s} {kind(bench, n)} ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
