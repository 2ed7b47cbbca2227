"""Without a GPU the kernels run under Triton's interpreter, to be chosen before they are made. Tests marked
long run where they are asked for: python -m pytest -m long.
"""
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
