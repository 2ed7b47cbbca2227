"""tests/stress.py: a few of each kind here, all of it where it is asked for (-m long)."""

import pytest
import torch

import nvfp4
import stress


@pytest.mark.parametrize("how", ["short", pytest.param("long", marks=pytest.mark.long)])
def test_nothing_is_lost_and_nothing_vague(monkeypatch, capsys, how):
    threads = torch.get_num_threads()
    monkeypatch.setattr(nvfp4, "can_compile", nvfp4.can_compile)                # which main() replaces
    stress.main(["short"] * (how == "short"))
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("\n") == len(stress.KINDS)
