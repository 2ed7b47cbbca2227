"""Without a GPU the kernels run under Triton's interpreter, to be chosen before they are made. Tests marked
long run where they are asked for: python -m pytest -m long.
"""
import contextlib
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.tokens import prepare  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# In the background of a shell, or under nohup, these are ignored; the processes of tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes many minutes; left out unless -m is given")
    if not config.getoption("-m"):
        config.option.markexpr = "not long"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A prepared folder: random letters in plain bytes, of which no model can learn more than ln 27 = 3.3."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=20000))
    prepare([text[2000:]], [text[:2000]], folder, "a test", tokenizer="bytes")
    return folder


@pytest.fixture(scope="session")
def tiny(dataset):
    """(out_dir, field=value, ...) -> the command line of a tiny run of train.py."""
    def flags(out_dir, **changes):
        settings = {"out_dir": out_dir, "dataset": dataset, "n_layer": 1, "n_embd": 32, "n_head": 2,
                    "block_size": 32, "batch_size": 4, "max_steps": 10, "learning_rate": 1e-2,
                    "eval_interval": 4, "eval_iters": 2, "sample_tokens": 0, "device": "cpu",
                    "compile": False, **changes}
        return [f"--{name}={value}" for name, value in settings.items()]
    return flags


@contextlib.contextmanager
def without_compiler():
    """Definitions as they stand, without torch.compile. One thread: more are slower on tiny tensors."""
    import nvfp4                                    # once it is known who runs the kernels
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvfp4, "can_compile", lambda kind: False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def eager():
    """without_compiler() for all of a module, its fixtures too."""
    with without_compiler():
        yield


@pytest.fixture
def unfused():
    """without_compiler() for a test, which begins with the same random numbers wherever it stands."""
    with without_compiler():
        torch.manual_seed(0)
        yield
