"""More text than one process or one file can take: parquet files or JSON lines, here or far away, become the
shards of a dataset (data/tokens.py).

We cut the files, one after the other, into equal slices, and each slice becomes a shard. A process makes one
at a time and writes it whole, so that a kill leaves shards that the next call passes over. A document's text
alone decides whether it is held out: equal documents are on one side. The held-out documents of a slice wait
in val_00000.jsonl and so on for val.bin, which is written last.
"""
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.run import Lines, UserError, json_object, naming, parse_object, sweep, write_whole
from data.tokens import (MIN_SPLIT_BYTES, encode, load_tokenizer, make_tokenizer, read_tokenizer_file,
                         read_tokens, shard_path, token_file, write_tokens)

SLICE_BYTES = 200_000_000   # of the files, at least: about 70M tokens of parquet, 40M of JSON lines
BPE_BYTES = 50_000_000      # of text, the first, train the bpe tokenizer
VAL_BYTES = 40_000_000      # of held-out text at most go into val.bin


class Corpus(NamedTuple):
    """Documents in parquet files or files of JSON lines."""
    source: str             # for the headers: name and version, no path
    files: list             # (path, bytes), in order
    open: Callable          # open(path, "rb") -> file, also in a process of its own
    field: str = "text"     # the column, or key, of the text
    val_every: int = 1000   # about one document in so many is held out
    kind: str = "parquet"   # of the files, as kind_of() says


class Plan(NamedTuple):
    """What a process has to know to make a shard."""
    corpus: Corpus
    out: Path
    n_slices: int
    val_bytes: int          # of held-out text at most are kept, of a slice
    tokenizer: str          # for the headers, like source
    source: str


def prepare_shards(corpus, out, tokenizer="bpe", vocab_size=50304, n_tokens=None, processes=None):
    """Write train_00000.bin and so on, val.bin and tokenizer.json into out. After a kill the same call goes
    on. Neither a kill nor the number of processes changes a byte.

    tokenizer, vocab_size: as in tokens.prepare(). n_tokens: of the first shards, about; None: all shards
    raises: UserError
    """
    started, out, size = time.time(), Path(out), sum(size for _, size in corpus.files)
    for knob, value, least in (("val_every", corpus.val_every, 2), ("tokens", n_tokens, 1),
                               ("processes", processes, 1)):
        if value is not None and not value >= least:
            raise UserError(f"--{knob}={value} must be at least {least}; raise it")
    if (out / "train.bin").exists():
        raise UserError(f"{out}: holds another dataset, train.bin; choose a folder with --out")
    n = max(1, size // SLICE_BYTES)
    known = tokenizer in ("bpe", "gpt2", "bytes") or not Path(tokenizer).is_dir()
    by = tokenizer if known else load_tokenizer(tokenizer).name
    source = f"{corpus.source}, {corpus.field}, 1 in {corpus.val_every} held out, {n} slices, {by}"
    source += f" of {vocab_size}" if tokenizer == "bpe" else ""
    print(f"{out}: {len(corpus.files)} files, {size / 1e9:,.2f} GB, in {n} slices", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Lines(out / "prepare.txt", alone=True)):
        sweep(out)
        if (out / "val.bin").exists():
            check_made(out / "val.bin", source)
        if not any(out.glob("train_*.bin")):
            write_tokenizer = make_tokenizer(tokenizer, first_docs(corpus), vocab_size)[2]
            write_whole({out / "tokenizer.json": write_tokenizer})
        plan = Plan(corpus, out, n, VAL_BYTES // n, read_tokenizer_file(out)["name"], source)
        count = make_shards(plan, n_tokens, min(processes or os.cpu_count(), n))
        if not (out / "val.bin").exists():
            write_val(plan, count)
        for held in out.glob("val_*.jsonl"):
            held.unlink()
    print(f"source: {source} | {time.time() - started:.1f} s")


def first_docs(corpus):
    """The training documents that a tokenizer is trained on."""
    left = BPE_BYTES
    for text in documents(corpus, 0, 1):
        raw = text.encode()
        if not held_out(raw, corpus.val_every):
            left -= len(raw)
            yield text
        if left <= 0:
            return


def make_shards(plan, n_tokens, processes):
    """returns: how many. The first is made alone: it tells what is to come."""
    started, new = time.time(), not shard_path(plan.out, 0).exists()
    first = make_shard(plan, 0)
    count = math.ceil(min(plan.n_slices, (n_tokens or math.inf) / first.n_tokens))
    gigabytes = count * shard_path(plan.out, 0).stat().st_size / 1e9
    minutes = (time.time() - started) / 60 * math.ceil((count - 1) / processes)
    print(f"{count} shards will be {gigabytes:.2f} GB, about {count * first.n_tokens:,} tokens"
          + (f", in {minutes:.1f} minutes by {processes} processes" if new else ""), flush=True)
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
            others = pool.map(partial(make_shard, plan), range(1, count))
            for number, header in enumerate(chain([first], others)):
                print(f"{shard_path(plan.out, number)}: {header.n_tokens:,} tokens of {header.n_bytes:,} "
                      f"bytes, {header.bytes_per_token:.3f} bytes/token", flush=True)
    except BrokenProcessPool:
        raise UserError(f"{plan.out}: a process was killed, perhaps for want of memory; the same command "
                        "goes on, with fewer --processes") from None
    return count


def end_with_parent():
    """A process of the pool ends when its parent was killed: nobody else would tell it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_shard(plan, number):
    """A shard and its held-out documents, unless they are there. returns: the Header"""
    path, held = shard_path(plan.out, number), held_path(plan.out, number)
    if path.exists() and (held.exists() or (plan.out / "val.bin").exists()):
        return check_made(path, plan.source)
    encoding, room = load_tokenizer(plan.out), plan.val_bytes
    ids, n_bytes, kept = [], 0, []
    for text in documents(plan.corpus, number, plan.n_slices):
        raw = text.encode()
        if not held_out(raw, plan.corpus.val_every):
            ids.append(encode([text], encoding))
            n_bytes += len(raw)
        elif room > 0:
            kept.append(json.dumps(text) + "\n")
            room -= len(raw)
    if not ids:                                     # a long document ends here, and no other begins
        ids, n_bytes = [encode(["\n"], encoding)], 1
    header, write = token_file(path, np.concatenate(ids), encoding.n_vocab, plan.tokenizer, plan.source,
                               n_bytes)
    write_whole({path: write, held: lambda file: file.write("".join(kept).encode())})
    return header


def held_path(out, number):
    return out / f"val_{number:05}.jsonl"


def held_out(raw, val_every):
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") % val_every == 0


def check_made(path, source):
    """The Header of a file that is there, and so is whole. raises: UserError where its source differs"""
    header = read_tokens(path, scan=1)[1]
    if header.source != source:
        raise UserError(f"{path}: made from {header.source}, not from {source}; choose a folder with --out, "
                        "or empty this one")
    return header


def write_val(plan, count):
    lines = [line for number in range(count) for line in held_path(plan.out, number).open()]
    docs = [json.loads(line) for line in lines]
    n_bytes = sum(len(doc.encode()) for doc in docs)
    if n_bytes < MIN_SPLIT_BYTES:
        raise UserError(f"{plan.out}: too little text, {n_bytes} bytes for val.bin which needs at least "
                        f"{MIN_SPLIT_BYTES}; lower --val_every or give more text, in an empty folder")
    encoding = load_tokenizer(plan.out)
    header = write_tokens(plan.out / "val.bin", encode(docs, encoding), encoding.n_vocab, plan.tokenizer,
                          plan.source, n_bytes)
    print(f"{plan.out / 'val.bin'}: {header.n_tokens:,} tokens from {len(docs):,} documents held out")


# ---------------------------------------------------------------- documents

COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2",
              b"\xfd7zXZ": "xz"}     # by their first bytes


def kind_of(path):
    """What a file holds: "parquet", "JSON lines", "text" or "nothing", whatever its name; but .jsonl and
    .parquet must not lie. raises: UserError"""
    with naming(path), open(path, "rb") as file:
        head = file.read(8)
        file.seek(0)
        line = next((line for line in file if line.strip()), b"") if head[:4] != b"PAR1" else b""
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is compressed by {name}; unpack it first")
    if head[:4] == b"PAR1":
        return "parquet"
    kind = "nothing" if not line else "text" if json_object(line, strict=False) is None else "JSON lines"
    if kind == "text" and str(path).lower().endswith((".parquet", ".jsonl")):
        raise UserError(f"{path}: damaged, its first line is no JSON object and the file no parquet")
    return kind


def documents(corpus, number, n_slices):
    """The texts that begin in a slice, in order, but for empty ones. raises: UserError naming the file"""
    total = sum(size for _, size in corpus.files)
    start, end = total * number // n_slices, total * (number + 1) // n_slices
    for path, size in corpus.files:
        if start < size and end > 0:
            read = parquet_texts if corpus.kind == "parquet" else json_texts
            try:
                with corpus.open(path, "rb") as file:
                    for text in read(file, corpus.field, size, max(start, 0), min(end, size)):
                        if type(text) not in (str, int, float, type(None)):
                            raise UserError(f"{corpus.field} has a {type(text).__name__}, no text")
                        if text == text is not None and str(text).strip():      # nor NaN, which others write
                            yield str(text).encode(errors="replace").decode()   # JSON has half characters
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            except Exception as error:              # of the system, of pyarrow, of what fetches
                raise UserError(f"{path}: {type(error).__name__}: {error}") from None
        start, end = start - size, end - size


def parquet_texts(file, field, size, start, end):
    """Rows in proportion to bytes [start, end) of the file"""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet is read by pyarrow: pip install pyarrow") from None
    table = parquet.ParquetFile(file)
    if field not in table.schema_arrow.names:
        raise UserError(f"no column {field}, but {', '.join(table.schema_arrow.names)}; give another --field")
    n_rows = table.metadata.num_rows
    first, last = -(-start * n_rows // size), -(-end * n_rows // size)
    for group in range(table.num_row_groups):
        n = table.metadata.row_group(group).num_rows
        if first < n and last > 0:
            batches = table.iter_batches(1000, row_groups=[group], columns=[field], use_threads=False)
            rows = (text for batch in batches for text in batch.column(0).to_pylist())
            yield from islice(rows, max(first, 0), last)
        first, last = first - n, last - n


def json_texts(file, field, size, start, end):
    """Texts of the lines that begin in bytes [start, end) of the file"""
    if start:
        file.seek(start - 1)
        file.readline()
    while file.tell() < end:
        where = f"the line at byte {file.tell():,}"
        line = file.readline()
        if line.strip():
            record = parse_object(line, where, strict=False)
            if field not in record:
                raise UserError(f"{where} has no {field}, but {', '.join(record)}; give another --field")
            yield record[field]
