"""The README tells the truth: its commands parse, its snippet runs, what its tables name exists. And the
rooms: imports point down only."""
import ast
import importlib
import re
import shlex
import subprocess

import pytest

import train
from model import describe
from runs import REPO

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
        describe(train.load_config([word for word in arguments if not word.startswith("--ranks=")]).model)


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


def test_the_file_table_names_every_file():
    rows = re.findall(r"^\| `([\w/]+\.py)` \|", README, re.M)
    assert {p.name for p in REPO.glob("*.py")} <= set(rows)
    assert all((REPO / name).is_file() for name in rows)


def named_functions(text):
    """(module, dotted name) of every `module.py: name` or `module.name` in the tables of equations."""
    tables = re.findall(r"<!-- equations -->\n(.*?)<!-- end -->", text, re.S)
    return re.findall(r"`(nvfp4|papers|model|train|analyze)\.([\w.]+)`", "".join(tables))


def find(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_functions_of_the_equation_tables_exist():
    names = named_functions(LOG)
    assert len(names) >= 20
    for module, name in names:
        assert callable(find(module, name)) or name.isupper(), f"{module}.{name}"
    with pytest.raises(AttributeError):             # control
        find("nvfp4", "no_such_function")


# ---------------------------------------------------------------- the rooms

FLOORS = {"nvfp4": 0, "assets.figures": 0, "data.run": 0, "configs.config": 1, "data.tokens": 1, "ranks": 1,
          "graphs": 1, "papers": 1, "data.shards": 2, "model": 2, "train": 3, "analyze": 4, "export": 4,
          "assets.experiments": 5}


def rooms():
    return {name: REPO / (name.replace(".", "/") + ".py") for name in FLOORS}


def imported(tree):
    """(line, module) of every import in a file, those inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def points_up(room, source):
    return [(line, name) for line, name in imported(ast.parse(source))
            if name in FLOORS and name != room and FLOORS[name] >= FLOORS[room]]


def test_imports_point_down_only():
    for room, path in rooms().items():
        source = path.read_text()
        assert points_up(room, source) == [], path
        assert "sys.modules" not in source, path
    for source in ("import train", "def f():\n    from analyze import rho", "from data import tokens"):
        assert points_up("nvfp4", source)           # control
    assert not points_up("train", "import nvfp4\nfrom model import build\nimport json")


def test_no_function_is_longer_than_a_screen():
    """60 lines; GPU kernels may be longer."""
    others = [*(REPO / "data").glob("*/prepare.py"), *(REPO / "tests").glob("[abs]*.py")]   # aot, bench, ...
    for path in [*rooms().values(), *others]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "kernel" not in node.name:
                assert node.end_lineno - node.lineno <= 60, (path, node.name)


# ---------------------------------------------------------------- the first screen, pictures, plain text

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
