"""Token files and tokenizers: everything between text and the ids a model is trained on.

A prepared dataset is a folder with train.bin, val.bin and tokenizer.json. In place of train.bin, or beside
it, there may be shards: train_00000.bin, train_00001.bin and so on (data/shards.py makes them).

A .bin file is a header of 1024 bytes, then the ids, little-endian:

    bytes 0-7      magic  b"NVFP4BIN"
    bytes 8-11     layout version, int32
    bytes 12-1023  the fields of Header as UTF-8 JSON, padded with zero bytes

tokenizer.json holds the tokenizer's name and, for our own BPE, the split pattern, the special tokens and the
bytes of each token in base64, in the order of the ids. The name ends in a digest of pattern and tokens. Every
.bin file repeats it, so nobody reads ids with another tokenizer.

A run takes windows of block_size + 1 tokens, each out of one file. The seed and the step alone decide where
they begin, so a checkpoint keeps no state of the data.

Each document begins with <|endoftext|>, which separates documents and opens a sample. Plain bytes ("bytes",
for tests) have no such token; there the documents follow each other directly.
"""
import base64
import hashlib
import heapq
import json
import math
import mmap
import os
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken

from data.run import UserError, naming, parse_object, read_json, write_whole

MAGIC = b"NVFP4BIN"
VERSION = 1
HEADER_BYTES = 1024
ID_TYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SCAN_TOKENS = 30_000_000   # we check and count so many ids at most: small text is read whole
PIECE = 2**16              # of larger text we read runs of this length, spread evenly
MIN_SPLIT_BYTES = 1000     # less text than this in a split is a mistake, not a dataset
MAX_WORD_BYTES = 64        # the BPE trainer cuts longer words (rules, base64): its time is quadratic in them
ENDOFTEXT = "<|endoftext|>"
# GPT-2's split: contractions; letters, digits, other signs, each with one leading space; white space. Runs of
# it end at 64, because tiktoken's regex engine overflows its stack when it looks back through a million.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s{1,64}(?!\S)|\s"
# The name under which tiktoken caches r50k_base.tiktoken (GPT-2's ids), and the sha256 it demands of it.
GPT2_CACHE_NAME = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


# ---------------------------------------------------------------- token files

@dataclass
class Header:
    dtype: str       # of the ids: uint16 for a vocabulary of up to 65536 tokens, else uint32
    n_tokens: int
    vocab_size: int
    n_bytes: int     # UTF-8 bytes of text behind the tokens; <|endoftext|> counts as none
    tokenizer: str   # "gpt2", "bytes" or "bpe<vocab_size>-<digest>"
    source: str      # where the text came from, with its version and sha256

    @property
    def bytes_per_token(self):
        """bits per byte = loss in nats / ln 2 / bytes_per_token"""
        return self.n_bytes / self.n_tokens


def write_tokens(path, ids, vocab_size, tokenizer, source, n_bytes):
    """ids (n,): any integers; n_bytes: of text behind them. returns: the Header. raises: UserError."""
    header, write = token_file(path, ids, vocab_size, tokenizer, source, n_bytes)
    write_whole({path: write})
    return header


def token_file(path, ids, vocab_size, tokenizer, source, n_bytes):
    """returns: the Header of write_tokens() and a function that writes the file."""
    ids = np.asarray(ids)
    if ids.size == 0:
        raise UserError(f"{path}: there are no tokens to write; give more text")
    for extreme in (ids.min(), ids.max()):
        if not 0 <= extreme < vocab_size:
            raise UserError(f"{path}: id {extreme} is outside vocab_size={vocab_size}; raise vocab_size")
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    header = Header(dtype, ids.size, int(vocab_size), int(n_bytes), tokenizer, source)
    head = MAGIC + VERSION.to_bytes(4, "little") + json.dumps(asdict(header), ensure_ascii=False).encode()
    if len(head) > HEADER_BYTES:
        raise UserError(f"{path}: source={source[:40]!r}... does not fit {HEADER_BYTES} bytes; shorten it")

    def write(file):
        file.write(head.ljust(HEADER_BYTES, b"\0"))
        file.write(ids.astype(ID_TYPES[dtype]).data)
    return header, write


def read_tokens(path, scan=SCAN_TOKENS):
    """returns: ids (n_tokens,) as a read-only memmap, and their Header. Of the ids about scan are compared
    with the size of the vocabulary. raises: UserError"""
    path = Path(path)
    ids, header = _map_tokens(path, scan)
    if (path.parent / "tokenizer.json").exists():
        name = read_tokenizer_file(path.parent)["name"]
        if name != header.tokenizer:
            raise UserError(f"{path}: its ids are of {header.tokenizer}, but the tokenizer.json beside it is "
                            f"{name}; run: {_prepare_command(path.parent)}")
    return ids, header


def _map_tokens(path, scan):
    """read_tokens() without a look at tokenizer.json"""

    def error(what):
        return UserError(f"{path}: {what}; run: {_prepare_command(path.parent)}")

    if not path.is_file():
        raise error("no such file" if path.parent.is_dir() else "no such folder")
    with naming(path), open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC):
        raise error(f"not a token file (begins with {head[:8]!r}, not {MAGIC!r})")
    version = int.from_bytes(head[8:12], "little")
    if version != VERSION:
        raise error(f"its layout is version {version}, this code reads version {VERSION}")
    try:
        header = Header(**parse_object(head[12:].rstrip(b"\0"), path))
        sound = all(type(getattr(header, field.name)) is field.type for field in fields(Header))
        sound = sound and min(header.n_tokens, header.vocab_size, header.n_bytes) > 0
    except (UserError, TypeError):                  # TypeError: fields that are missing, or not known
        sound = False
    if not sound or header.dtype not in ID_TYPES:
        raise error("its header is damaged")
    dtype = ID_TYPES[header.dtype]
    expected, size = HEADER_BYTES + header.n_tokens * dtype.itemsize, path.stat().st_size
    if size != expected:
        raise error(f"{size} bytes long, but {header.n_tokens} tokens of {header.dtype} take {expected}")
    ids = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)
    if hasattr(mmap, "MADV_RANDOM"):                # else a disk may read megabytes beside each window
        ids.base.madvise(mmap.MADV_RANDOM)
    largest = max(piece.max() for piece in pieces(ids, scan))
    if largest >= header.vocab_size:
        raise error(f"holds id {largest}, not below vocab_size={header.vocab_size}")
    return ids, header


def _prepare_command(folder):
    script = Path(folder, "prepare.py")
    if script.exists():
        return f"python {shlex.quote(str(script))}"
    return f"python data/text/prepare.py PATH --out {shlex.quote(str(folder))}"


# ---------------------------------------------------------------- byte-level BPE

def train_bpe(docs, vocab_size):
    """docs: a text or a list of texts. vocab_size: counts the 256 bytes and <|endoftext|>.

    value: again and again, the next token is the byte string that neighbouring tokens of a word spell most
        often; of equals, the smallest. Ends early when no string is spelled twice. We count strings in place
        of pairs: between two boundaries nothing outside matters, so "abc" is spelled "ab" + "c" everywhere or
        "a" + "bc" everywhere, and cannot become two tokens.
    returns: ranks {bytes of a token: its id}; <|endoftext|> is not among them, its id is len(ranks)
    source: arXiv 1508.07909, section 3.2, on bytes instead of characters
    """
    if vocab_size < 257:
        raise UserError(f"--vocab_size={vocab_size} must be 257 or more (bytes and {ENDOFTEXT}); raise it")
    whole, distinct = Counter(), Counter()
    for doc in [docs] if isinstance(docs, str) else docs:
        whole.update(regex.findall(SPLIT, doc))
    for word, count in whole.items():
        raw = word.encode()
        for start in range(0, len(raw), MAX_WORD_BYTES):
            distinct[raw[start:start + MAX_WORD_BYTES]] += count
    words = [[bytes([byte]) for byte in raw] for raw in distinct]  # as lists of their tokens
    counts = list(distinct.values())

    ranks = {bytes([byte]): byte for byte in range(256)}
    spelled = Counter()       # string: how often two neighbours spell it
    where = defaultdict(set)  # string: indices of the words that spell it, or once did
    for index, word in enumerate(words):
        for string in _spell(word):
            spelled[string] += counts[index]
            where[string].add(index)
    heap = [(-count, string) for string, count in spelled.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size - 1:
        count, best = heapq.heappop(heap)
        if -count != spelled[best]:  # outdated: each change of a count pushes an entry of its own
            continue
        if -count < 2:
            break
        ranks[best] = len(ranks)
        changes = Counter()
        for index in where.pop(best):
            for string in _spell(words[index]):
                changes[string] -= counts[index]
            _merge(words[index], best)
            for string in _spell(words[index]):
                changes[string] += counts[index]
                where[string].add(index)
        for string, change in changes.items():
            if change:
                spelled[string] += change
                heapq.heappush(heap, (-spelled[string], string))
    return ranks


def _spell(word):
    return [left + right for left, right in zip(word, word[1:], strict=False)]


def _merge(word, string):
    """Join, in place and from the left, the neighbours that spell string."""
    at = 0
    while at < len(word) - 1:
        if word[at] + word[at + 1] == string:
            word[at:at + 2] = [string]
        at += 1


# ---------------------------------------------------------------- tokenizers

def bpe_encoding(ranks, pattern=SPLIT):
    """ranks from train_bpe -> tiktoken.Encoding"""
    return tiktoken.Encoding(_bpe_name(ranks, pattern), pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={ENDOFTEXT: len(ranks)})


def _bpe_name(ranks, pattern):
    digest = hashlib.sha256(repr((pattern, sorted(ranks, key=ranks.get))).encode()).hexdigest()
    return f"bpe{len(ranks) + 1}-{digest[:12]}"


def tokenizer_file(name, ranks=None):
    """name: "gpt2", "bytes", or that of bpe_encoding(ranks), with those ranks.

    returns: a function that writes tokenizer.json
    """
    saved = {"name": name}
    if ranks is not None:
        tokens = [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)]
        saved |= {"pattern": SPLIT, "special_tokens": {ENDOFTEXT: len(ranks)}, "tokens": tokens}
    return lambda file: file.write(json.dumps(saved).encode())


def load_tokenizer(folder_or_name, origin=None):
    """"gpt2", "bytes" or a prepared folder -> tiktoken.Encoding. Downloads nothing.

    origin  of a run: the folder's tokenizer must be the one that the run was trained with
    raises: UserError
    """
    if folder_or_name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", special_tokens={},
                                 mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    if folder_or_name == "gpt2":
        return _load_gpt2()
    path, saved = Path(folder_or_name, "tokenizer.json"), read_tokenizer_file(folder_or_name)
    if origin and saved["name"] != origin.partition(",")[0]:
        raise UserError(f"{path}: {saved['name']} is not the tokenizer of the run, {origin}; prepare that "
                        "data again")
    if saved["name"] in ("bytes", "gpt2"):
        return load_tokenizer(saved["name"])
    try:
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved["tokens"])}
        name = _bpe_name(ranks, saved["pattern"])
    except (KeyError, TypeError, ValueError):
        name = None
    if name != saved["name"]:
        raise UserError(f"{path}: damaged (its tokens are not those of {saved['name']}); run: "
                        f"{_prepare_command(folder_or_name)}")
    return bpe_encoding(ranks, saved["pattern"])


def keep_tokenizer(dataset, folder):
    """Put a copy of a dataset's tokenizer.json into a run's folder, which can be moved then."""
    text = (data_folder(dataset) / "tokenizer.json").read_bytes()
    write_whole({Path(folder, "tokenizer.json"): lambda file: file.write(text)})


def read_tokenizer_file(folder):
    path = Path(folder, "tokenizer.json")
    try:
        saved = read_json(path)
        if not isinstance(saved.get("name"), str):
            raise UserError(f"{path}: damaged, it has no name")
    except UserError as error:
        raise UserError(f"{error}; run: {_prepare_command(folder)}") from None
    return saved


def _load_gpt2():
    # tiktoken deletes a file with another hash, then downloads without a time-out. So we look first.
    path = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.devnull, GPT2_CACHE_NAME)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != GPT2_SHA256:
        raise UserError(f"--tokenizer=gpt2 needs r50k_base.tiktoken (sha256 {GPT2_SHA256[:12]}...) named "
                        f"{GPT2_CACHE_NAME} in the folder TIKTOKEN_CACHE_DIR; put it there (the same file "
                        "is whisper/assets/gpt2.tiktoken in openai-whisper) or take --tokenizer=bpe")
    return tiktoken.get_encoding("r50k_base")


# ---------------------------------------------------------------- a dataset, and windows of it

class Shards:
    """Token files as one array of windows of block_size + 1 tokens. We count only the places where a window
    can begin, and block_size at the end, so no window that train_starts() draws reaches across two files."""

    def __init__(self, files, block_size):
        self.files, self.n_tokens = files, sum(map(len, files))
        self.ends = np.cumsum([max(len(ids) - block_size, 0) for ids in files])
        self.length = int(self.ends[-1]) + block_size

    def __len__(self):
        return self.length

    def __getitem__(self, window):
        number = int(np.searchsorted(self.ends, window.start, side="right"))
        before = int(self.ends[number - 1]) if number else 0
        return self.files[number][window.start - before:window.stop - before]


def pieces(ids, at_most=SCAN_TOKENS):
    """Parts of an array or of Shards, in order. Of more than at_most tokens they are a sample: at least half
    as many, spread evenly"""
    files = ids.files if isinstance(ids, Shards) else [ids]
    every = -(-sum(map(len, files)) // at_most)
    for file in files:
        for start in range(0, len(file), every * PIECE):
            yield file[start:start + PIECE]


class Data(NamedTuple):
    train: np.ndarray | Shards                      # ids (n_tokens,)
    val: np.ndarray
    header: Header                                  # of val
    tokenizer: tiktoken.Encoding
    vocab_size: int                                 # of a model for it

    @property
    def origin(self):
        """What a run was trained on. A resumed run compares it, wherever the files lie by then."""
        origin = f"{self.header.tokenizer}, {self.header.source}"
        if isinstance(self.train, Shards):
            origin += f", {len(self.train.files)} files of {self.train.n_tokens} tokens"
        return origin

    @property
    def document_start(self):
        """The token that begins each document. raises UserError where the tokenizer has none"""
        if ENDOFTEXT not in self.tokenizer.special_tokens_set:
            raise UserError(f"document_start=-1 must find {ENDOFTEXT}, which the tokenizer "
                            f"{self.header.tokenizer} has not; give a token, or leave it out")
        return self.tokenizer.eot_token


def data_folder(dataset):
    """A name is a folder beside this file, a path itself."""
    return Path(dataset) if os.sep in dataset else Path(__file__).resolve().parent / dataset


def prepare_missing(dataset):
    """Run the prepare.py of a dataset that has no val.bin yet, its last file. data/text/prepare.py takes
    arguments, so it is left out."""
    folder = data_folder(dataset)
    script = folder / "prepare.py"
    if not (folder / "val.bin").exists() and dataset != "text" and script.exists():
        print(f"preparing {dataset}: python {script}", flush=True)
        done = subprocess.run([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
        if not done.returncode or "Traceback" in done.stderr:
            print(done.stderr, end="", file=sys.stderr)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
            raise UserError(f"dataset={dataset}: {said or f'{script} ended with {done.returncode}'}")


def load_data(dataset, block_size, vocab_size=None):
    """A prepared dataset as Data, checked to hold a window; vocab_size=None takes the tokenizer's.

    raises: UserError
    """
    folder, need = data_folder(dataset), block_size + 1
    (train, head), (val, val_head) = read_train(folder, block_size), read_tokens(folder / "val.bin")
    for name, ids in (("train_*.bin" if isinstance(train, Shards) else "train.bin", train), ("val.bin", val)):
        if len(ids) < need:
            raise UserError(f"{folder / name}: {len(ids)} tokens must be {need} at least; lower block_size "
                            "or give more text")
    vocab_size = vocab_size or head.vocab_size
    if vocab_size < head.vocab_size:
        raise UserError(f"vocab_size={vocab_size} must be {head.vocab_size} at least, the vocabulary of "
                        f"{dataset}")
    return Data(train, val, val_head, load_tokenizer(folder), vocab_size)


def read_train(folder, block_size):
    """returns: the training ids, of several files as Shards, and a Header of theirs. raises: UserError"""
    first, *others = train_files(folder)
    scan = SCAN_TOKENS // (1 + len(others))
    ids, head = read_tokens(first, scan)
    files = [ids]
    for path in others:
        ids, header = _map_tokens(path, scan)
        for name in ("tokenizer", "dtype", "vocab_size", "source"):
            mine, theirs = getattr(header, name), getattr(head, name)
            if mine != theirs:
                raise UserError(f"{path}: its {name} is {mine}, but {theirs} in {first.name}; remove what is "
                                "not of this dataset")
        files.append(ids)
    return (Shards(files, block_size) if others else files[0]), head


def train_files(folder):
    """Paths: train.bin, then the shards. raises: UserError where one is missing"""
    shards = sorted(folder.glob("train_" + 5 * "[0-9]" + ".bin"))
    for number, path in enumerate(shards):
        if path != shard_path(folder, number):
            raise UserError(f"{shard_path(folder, number)}: no such file, but {path.name} is there; run: "
                            f"{_prepare_command(folder)}")
    single = folder / "train.bin"
    return ([single] if single.exists() or not shards else []) + shards


def shard_path(folder, number):
    return Path(folder, f"train_{number:05}.bin")


def train_starts(n_tokens, block_size, shape, seed, step):
    """Where the samples of a step begin: shape is (micro-batches over all ranks, samples in each)."""
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    return rng.integers(0, n_tokens - block_size, shape)


def val_starts(n_tokens, block_size, shape):
    """Fixed windows, spread evenly over the validation text: shape is (batches, samples in each)."""
    n = math.prod(shape)
    last = n_tokens - block_size - 1
    return (np.arange(n) * last // max(n - 1, 1)).reshape(shape)


def batch_at(ids, starts, block_size, device):
    """Windows of ids at starts -> (idx, targets), each (len(starts), block_size) int64 on device."""
    import torch                                    # takes seconds, and who prepares text does not need it
    window = np.stack([ids[start:start + block_size + 1] for start in starts])
    window = torch.from_numpy(window.astype(np.int64))
    if device.type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def unigram_loss(train, val):
    """Cross-entropy in nats of val under the token frequencies of train, one count added to each token. Of
    more than SCAN_TOKENS tokens we read a sample."""
    val = np.concatenate([*pieces(val)])
    counts = np.ones(1 + max(int(piece.max()) for piece in (*pieces(train), val)), np.int64)
    for piece in pieces(train):
        counts += np.bincount(piece, minlength=len(counts))
    return float(-np.log(counts / counts.sum())[val].mean())


# ---------------------------------------------------------------- preparing a dataset

def prepare(train_docs, val_docs, out_dir, source, tokenizer="bpe", vocab_size=4096):
    """Write train.bin, val.bin and tokenizer.json into out_dir. The tokenizer sees the training split only.

    train_docs, val_docs: lists of texts. tokenizer: "bpe", "gpt2" or "bytes". vocab_size: of "bpe" only.
    raises: UserError, before anything is written
    """
    started = time.time()
    shard = shard_path(out_dir, 0)
    if shard.exists():
        raise UserError(f"{out_dir}: holds another dataset, {shard.name}; choose a folder with --out")
    splits = {"train": train_docs, "val": val_docs}
    n_bytes = {split: sum(len(doc.encode()) for doc in docs) for split, docs in splits.items()}
    for split, size in n_bytes.items():
        if size < MIN_SPLIT_BYTES:
            raise UserError(f"{out_dir}: too little text, {size} bytes for {split}.bin which needs at least "
                            f"{MIN_SPLIT_BYTES}; give more text or another split")
    name, encoding, write_tokenizer = make_tokenizer(tokenizer, train_docs, vocab_size)
    writers, headers = {Path(out_dir, "tokenizer.json"): write_tokenizer}, {}
    for split, docs in splits.items():
        path = Path(out_dir, f"{split}.bin")
        ids = encode(docs, encoding)
        headers[path], writers[path] = token_file(path, ids, encoding.n_vocab, name, source, n_bytes[split])
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    write_whole(writers)
    for (path, header), docs in zip(headers.items(), splits.values(), strict=True):
        print(f"{path}: {header.n_tokens:,} tokens of {name} from {len(docs):,} documents "
              f"of {header.n_bytes:,} bytes, {header.bytes_per_token:.3f} bytes/token")
    print(f"source: {source} | {time.time() - started:.1f} s")


def make_tokenizer(kind, docs, vocab_size):
    """kind: "bpe", which is trained on docs, an iterable of texts; "gpt2", "bytes", or the folder of a run or
    dataset, which has one.

    returns: its name, its Encoding and what writes its tokenizer.json. raises: UserError
    """
    if kind == "bpe":
        ranks = train_bpe(docs, vocab_size)
        encoding = bpe_encoding(ranks)
        fewer = f" (not {vocab_size}: nothing else repeats)" if encoding.n_vocab < vocab_size else ""
        print(f"bpe: {encoding.n_vocab} tokens{fewer} from training text")
        return encoding.name, encoding, tokenizer_file(encoding.name, ranks)
    if kind in ("gpt2", "bytes"):
        return kind, load_tokenizer(kind), tokenizer_file(kind)
    if not Path(kind).is_dir():
        raise UserError(f"--tokenizer={kind} is unknown; choose bpe, gpt2, bytes or the folder of a run")
    encoding, text = load_tokenizer(kind), Path(kind, "tokenizer.json").read_bytes()
    return encoding.name, encoding, lambda file: file.write(text)


def encode(docs, encoding):
    """docs: an iterable of texts. returns: ids (n,), each document begun by <|endoftext|> where the tokenizer
    has it"""
    begin = [encoding.eot_token] if ENDOFTEXT in encoding.special_tokens_set else []
    dtype = np.min_scalar_type(encoding.n_vocab - 1)            # a list of Python ints takes 36 bytes a token
    parts = [np.array(begin + encoding.encode_ordinary(doc), dtype) for doc in docs]
    return np.concatenate(parts) if parts else np.array([], dtype)
