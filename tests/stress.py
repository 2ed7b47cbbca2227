"""What must never happen, tried over and over: runs that are killed or signalled, disks that are full, files
with a bit or a piece missing, commands without sense. No row and no step may be lost beyond the last save, a
resumed run must be the uninterrupted one bit for bit, and every error must be one line.

    python tests/stress.py                   all of it, minutes
    python tests/stress.py short             a few of each, as the tests do
    python tests/stress.py files 500         one kind, so often

Each trial is a process of its own, forked, so that it can be killed; tiny models on the CPU. Prints a line of
figures for each kind; an AssertionError names the seed of a trial that failed.
"""
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

import analyze  # noqa: E402
import model  # noqa: E402
import nvfp4  # noqa: E402
import train  # noqa: E402
from configs import config  # noqa: E402
from data.run import UserError, load_checkpoint, read_metrics  # noqa: E402
from runs import INTERRUPTED, LONGEST, Process, contents, flags_of, one_line, prepare_letters  # noqa: E402


class Bench:
    """A folder with a dataset, a finished run of ten steps, and the flags of such runs."""

    def __init__(self, folder):
        self.folder, self.data, self.whole = folder, folder / "data", folder / "whole"
        self.data.mkdir()
        prepare_letters(self.data)
        started = time.monotonic()
        assert self.run(self.whole).end()[0] == 0
        self.seconds = time.monotonic() - started   # of a run
        train.main(self.flags(self.folder / "half", stop_at=5))

    def flags(self, out_dir, **changes):
        return flags_of(self.data, out_dir, **{"checkpoint_interval": 2} | changes)

    def copy(self, name):
        """A run that stopped at step 5, to be damaged and resumed."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Path(shutil.copytree(self.folder / "half", self.folder / name))

    def run(self, out_dir, before=lambda: None, **changes):
        return Process(lambda: train.main(self.flags(out_dir, **changes)), before)


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
            step = load_checkpoint(folder / "ckpt.pt")["step"]
            rows = [row["step"] for row in read_metrics(folder) if "loss" in row]
            assert rows[:step] == list(range(step)), f"{name}: rows are lost"
    raise AssertionError(f"{name}: no progress in 40 processes")


def interrupted(bench, n, numbers):
    """Runs with signals of these numbers at random moments, until n have come in time."""
    dice, found, tries = random.Random(str(numbers)), 0, 0
    while found < n:
        found += until_done(bench, "hurt", lambda pid: os.kill(pid, dice.choice(numbers)), dice)[1]
        tries += 1
    names = "|".join(number.name for number in numbers)
    return f"{found} times {names} in {tries} runs; each ended bit for bit as the uninterrupted one"


def kills(bench, n):
    return interrupted(bench, n, [signal.SIGKILL])


def signals(bench, n):
    return interrupted(bench, n, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


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
        lost = {name for name in before if re.match("metrics/[0-4]/", name) and name not in after}
        assert not left and not lost and after["step"] >= 5, (seed, limit)
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


def files(bench, n):
    """Resume a run of which a file is damaged: one line, or the same end as without."""
    dice, refused = random.Random(4), 0
    for seed in range(n):
        folder, name = bench.copy("damaged"), ("ckpt.pt", "metrics.jsonl")[seed % 2]
        path = folder / name
        path.write_bytes(damage(path.read_bytes(), dice, dice.choice(("flip", "flip", "cut", "hole"))))
        status, line = bench.run(folder, resume=True).end()
        said = one_line(line) and str(path) in line
        assert status == 0 or status == 1 and said, (name, seed, status, line)
        if status == 0:
            assert contents(folder) == contents(bench.whole), (name, seed, "passed")
        refused += status
    return f"{n} files with a bit flipped or a piece gone: {refused} refused, the others changed no bit"


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
    ranks = train.Ranks()
    ranks.join(torch.device("cpu"))
    dice, refused, names = random.Random(5), 0, list(config.schema(train.OWNERS))
    for seed in range(n):
        argv, started = senseless(dice, bench.folder, names), time.monotonic()
        try:
            c = train.load_config(argv)
            sizes = model.outline(train.replace(c.model, vocab_size=c.model.vocab_size or 256))
            train.check_memory(c, sizes, ranks)
            assert train.unflatten(json.loads(json.dumps(train.flatten(c)))) == c
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < LONGEST, (seed, argv)
            refused += 1
        assert time.monotonic() - started < 20, (seed, argv)
    return f"{n} configs in one process: {refused} refused in a line each, no traceback"


def commands(bench, n):
    """From end to end: train, look at, and analyse, with flags of which some make no sense."""
    dice, ends, names = random.Random(6), {}, list(config.schema(train.OWNERS))
    options = ["tokens", "channels", "seed", "out_dir"]
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
            argv = dice.choice((["losses"], ["outliers"], [])) + [str(bench.whole)]
            argv, work = argv + senseless(dice, bench.folder, options) + [f"--out_dir={out}"], analyze.main
        process = Process(lambda work=work, argv=argv: work(argv), before=lambda: os.chdir(bench.folder))
        status, line = process.end(120)
        assert status in (0, 1, 2) and "Traceback" not in line, (seed, kind, argv, status, line[-2000:])
        assert status != 1 or one_line("\n" + line.rstrip("\n").rpartition("\n")[2]), (seed, kind, argv, line)
        ends[status] = ends.get(status, 0) + 1
    return f"{n} commands from end to end: {ends.get(0, 0)} done, {n - ends.get(0, 0)} refused, no traceback"


# ---------------------------------------------------------------- all of it

KINDS = {                                           # how often: short, and by hand
    kills: (1, 100), signals: (1, 60), disks: (2, 60), files: (4, 200), configs: (60, 2000),
    commands: (3, 150)}


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
