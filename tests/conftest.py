"""Without a GPU the kernels run under Triton's interpreter, to be chosen before they are made. Tests marked
long run where they are asked for: python -m pytest -m long.
"""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes many minutes; left out unless -m is given")
    if not config.getoption("-m"):
        config.option.markexpr = "not long"
