"""The README tells the truth: its commands parse, its line counts and its file list are right."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from model import describe

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()
LOG = (REPO / "LOG.md").read_text()


def commands(text):
    """Lines of the code blocks of a page that start one of our scripts."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.S)
    found = []
    for line in "".join(blocks).splitlines():
        for part in line.removeprefix("$ ").split("&&"):
            words = shlex.split(part, comments=True)
            if len(words) > 1 and words[0] in ("python", "torchrun"):
                found.append(words)
    return found


def check_command(words):
    """A training command loads its config; any other script exists. Raises otherwise."""
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        assert words[:3] == ["python", "-m", "pytest"], words
        return
    script, arguments = words[scripts[0]], words[scripts[0] + 1:]
    assert (REPO / script).is_file(), script
    if script == "train.py" and "-h" not in arguments:
        train.load_config(arguments)
    if script == "model.py" and arguments[0].endswith(".py"):
        describe(train.load_config(arguments).model)


@pytest.mark.parametrize("words", commands(README) + commands(LOG), ids=" ".join)
def test_commands_parse(words):
    check_command(words)


def test_a_wrong_command_would_be_noticed():
    for words in (["python", "train.py", "configs/ngpt_tiny.py", "--recipee=bf16"], ["python", "missing.py"],
                  ["python", "train.py", "configs/no_such.py"]):
        with pytest.raises((AssertionError, train.UserError)):
            check_command(words)
    assert len(commands(README)) >= 5


def test_the_snippet_runs():
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_line_counts_and_files():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {p.name for p in REPO.glob("*.py")}
    for name, count in rows:
        assert len((REPO / name).read_text().splitlines()) == int(count), name


def test_two_commands_stand_on_the_first_screen_and_ci_runs_the_second():
    first_screen = "\n".join(README.splitlines()[:30])
    assert "pip install -r requirements.txt && python train.py configs/ngpt_tiny.py" in first_screen
    test_command = "pip install -r requirements.txt && python -m pytest -q"
    assert test_command in first_screen and test_command in (REPO / ".ci" / "run").read_text()


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((REPO / p).stat().st_size > 1000 for p in pictures)


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [REPO / name for name in listed.stdout.split()]


def test_code_is_ascii_and_names_no_machine():
    for path in tracked_files():
        if path.suffix == ".py":
            text = path.read_text()
            assert text.isascii(), path
            assert not re.search(r"/(?:home|root|work)/", text) or path.name == "test_repo.py", path
