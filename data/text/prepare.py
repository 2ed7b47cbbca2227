"""Your own text: a file, or all files of a folder that match a pattern.

    python data/text/prepare.py PATH [--glob "*.md"] [--val_every 20] [--vocab_size 4096] [--tokenizer bpe]
                                     [--out data/<name of PATH>]
    python data/text/prepare.py PATH --glob "*.parquet" [--field text] [--tokens 1e9] [--processes 8] ...

Several documents, files or parts of one between <|endoftext|>, in order of path: every val_every-th is
validation. A single one: the last 1/val_every of it, cut at the nearest line or word. Interleaved paragraphs
would put each validation paragraph between two trained ones on its subject, and cut up the contexts of both.
Parquet or JSON lines, told by what a file holds and not by its name: each row or line is a document, and one
in val_every, by its hash, is validation. They become shards, in several processes; a command that was stopped
goes on (data/shards.py).
"""
import argparse
import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whatever the current folder

from data.run import UserError, command
from data.shards import Corpus, kind_of, prepare_shards
from data.tokens import ENDOFTEXT, prepare


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("path", help="a text file in UTF-8, parquet, JSON lines, or a folder of these")
    parser.add_argument("--glob", default="*.txt", help="which files of a folder and its subfolders")
    parser.add_argument("--val_every", type=int, default=20, help="one file or part in so many is validation")
    parser.add_argument("--vocab_size", type=int, default=4096, help="size of the bpe tokenizer")
    parser.add_argument("--tokenizer", default="bpe", help="bpe (trained here), gpt2, bytes, a run's folder")
    parser.add_argument("--out", help="folder for train.bin, val.bin and tokenizer.json")
    parser.add_argument("--field", default="text", help="of parquet or JSON lines: what holds the text")
    parser.add_argument("--tokens", type=float, help="of parquet or JSON lines: stop at about so many")
    parser.add_argument("--processes", type=int, help="of parquet or JSON lines: at work at once; all cores")
    c = parser.parse_args(argv)
    path = Path(os.path.abspath(os.path.expanduser(c.path)))    # a link keeps its name
    if not path.exists():
        raise UserError(f"{c.path}: no such file or folder; give a text file or a folder of text files")
    if c.val_every < 2:
        raise UserError(f"--val_every={c.val_every} must be at least 2 (one document in so many); raise it")
    out = Path(c.out or Path(__file__).resolve().parents[1] / (path.stem if path.is_file() else path.name))
    if not c.out and (out / "prepare.py").exists():
        raise UserError(f"{out}: belongs to another dataset; choose a folder with --out")

    paths = find_files(path, c.glob)
    kinds = {kind_of(file): file for file in paths}
    kinds.pop("nothing", None)
    if len(kinds) > 1:
        found = ", ".join(f"{file.name} is {kind}" for kind, file in kinds.items())
        raise UserError(f"{c.path}: {found}; choose files of one kind with --glob")
    kind = next(iter(kinds), "text")
    if kind != "text":
        prepare_shards(corpus(path, paths, kind, c), out, c.tokenizer, c.vocab_size, c.tokens, c.processes)
        return
    docs, source = read_documents(path, paths)
    train, val = split_files(docs, c.val_every) if len(docs) > 1 else split_text(docs[0], c.val_every)
    print(f"validation: {100 * sum(map(len, val)) / sum(map(len, docs)):.1f} % of the text")
    prepare(train, val, out, source, c.tokenizer, c.vocab_size)


def find_files(path, glob):
    """Files of a folder that match, in upper or lower case; or this one."""
    letters = glob if "[" in glob else "".join(
        f"[{a.lower()}{a.upper()}]" if a.isalpha() else a for a in glob)
    try:
        paths = [path] if path.is_file() else sorted(p for p in path.rglob(letters) if p.is_file())
    except (ValueError, NotImplementedError):
        raise UserError(f"--glob={glob} must be a pattern below {path}, as in --glob='*.md'") from None
    if not paths:
        raise UserError(f"{path}: no file matches --glob={glob}; give another pattern, as in --glob='*.md'")
    return paths


def corpus(path, paths, kind, c):
    """Files of documents, known again by their names and sizes."""
    sizes = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in paths]
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
    files = [(str(file), size) for file, (_, size) in zip(paths, sizes, strict=True)]
    source = f"{plain(path.name)}, {len(paths)} files, names and sizes sha256 {digest}"
    return Corpus(source, files, open, c.field, c.val_every, kind)


def plain(name):
    return name.encode(errors="replace").decode()   # not all names are UTF-8


def read_documents(path, paths):
    """returns: the texts, and their source. Files that are empty or not UTF-8 are skipped and named."""
    docs, empty, foreign, digest = [], [], [], hashlib.sha256()
    for file in paths:
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            foreign.append(file.name)
            continue
        if text.strip():
            docs += [doc for doc in text.split(ENDOFTEXT) if doc.strip()]
            digest.update(raw)
        else:
            empty.append(file.name)
    skipped = " and ".join(f"{len(names)} {why}" + (f" ({', '.join(names[:4])})" if names else "")
                           for why, names in (("empty", empty), ("not UTF-8", foreign)))
    if not docs:
        raise UserError(f"{plain(str(path))}: no text found: {plain(skipped)}; give text in UTF-8")
    if empty or foreign:
        print(f"skipped {plain(skipped)} of {len(paths)} files")
    files = f", {len(paths) - len(empty) - len(foreign)} files" if path.is_dir() else ""
    return docs, f"{plain(path.name)}{files}, sha256 {digest.hexdigest()}"


def split_files(docs, val_every):
    """returns: the training documents and the validation documents, one in val_every, spread evenly; of few
    the last"""
    first = min(val_every // 2, len(docs) - 1)
    return ([doc for i, doc in enumerate(docs) if i % val_every != first],
            [doc for i, doc in enumerate(docs) if i % val_every == first])


def split_text(text, val_every):
    """returns: [the text up to a line, or else a word], [the last 1/val_every of it, give or take a tenth]"""
    middle, far = len(text) - len(text) // val_every, max(1, len(text) // val_every // 10)
    for end in "\n ":
        before, after = text.rfind(end, middle - far, middle) + 1, text.find(end, middle, middle + far) + 1
        if before or after:
            middle = min((cut for cut in (before, after) if cut), key=lambda cut: abs(cut - middle))
            break
    return [text[:middle]], [text[middle:]]


if __name__ == "__main__":
    command("error")(main)()
