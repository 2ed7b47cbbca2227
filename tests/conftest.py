"""Without a GPU the kernels run under Triton's interpreter, to be chosen before they are made. Tests marked
long run where they are asked for: python -m pytest -m long.
"""
import contextlib
import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import nvfp4  # noqa: E402
import runs  # noqa: E402

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
    """A prepared folder, see runs.py."""
    return runs.prepare_letters(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny(dataset):
    """(out_dir, field=value, ...) -> the command line of a tiny run of train.py."""
    return functools.partial(runs.flags_of, dataset)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """A kind of runs.RUNS -> the folder of such a run that nobody stopped."""
    @functools.cache
    def folder(kind):
        import train                                # not every test has to do with it
        out = tmp_path_factory.mktemp("whole") / "run"
        train.main(tiny(out, **runs.RUNS[kind]))
        return out
    return folder


@contextlib.contextmanager
def without_compiler():
    """Definitions as they stand, without torch.compile. One thread: more are slower on tiny tensors."""
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
