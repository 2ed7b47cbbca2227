"""tests/stress.py: a few of each kind here, all of them where they are asked for (-m long)."""
import os
import subprocess
import sys
from pathlib import Path

import pytest


def stress(*argv, timeout):
    return subprocess.run([sys.executable, Path(__file__).with_name("stress.py"), *argv], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout)


@pytest.mark.parametrize("how", ["short", pytest.param("long", marks=pytest.mark.long)])
def test_nothing_is_lost_and_nothing_vague(how):
    done = stress(*["short"] * (how == "short"), timeout=60 if how == "short" else 1800)
    assert done.returncode == 0 and done.stdout.count("\n") == 8, done.stdout + done.stderr
