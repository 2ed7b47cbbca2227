"""tests/stress.py: a few of each kind here, all of it where it is asked for (-m long)."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nvfp4  # noqa: E402
import stress  # noqa: E402


@pytest.mark.parametrize("how", ["short", pytest.param("long", marks=pytest.mark.long)])
def test_nothing_is_lost_and_nothing_vague(monkeypatch, capsys, how):
    threads = torch.get_num_threads()
    monkeypatch.setattr(nvfp4, "can_compile", nvfp4.can_compile)                # which main() replaces
    stress.main(["short"] * (how == "short"))
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("\n") == len(stress.KINDS)
