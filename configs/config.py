"""How runs are configured: config files and --key=value flags set the fields of dataclasses.

A config file is Python, run by itself; the names that it leaves behind are the fields it sets. A later file
wins over an earlier one, and flags win over files. Which fields there are is not known here: the owners are
handed over, as pairs of a prefix and a dataclass, and a field goes by its prefix and its name.

    owners = (("", Config), ("fp4_", FP4Config))
    settings, files = read_settings(["configs/ngpt_tiny.py", "--fp4_tail=0.5"], owners)
    by_owner(settings, owners)[FP4Config]           # {"tail": 0.5}

Type, range, default and meaning of a field stand where it is declared: as its type hint, its default and the
comment beside it, which is what -h prints. A type with a range is Annotated[type, smallest, largest].
"""
import difflib
import inspect
import json
import numbers
import re
import runpy
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal

from data.run import UserError, naming

HERE = Path(__file__).resolve()
LONGEST = 4096                                      # letters of a text: no path is longer


# ---------------------------------------------------------------- fields

def schema(owners):
    """{name: (owner, its field, type)} of all that can be set. A field that is a dataclass itself holds an
    owner's values and cannot."""
    table = {}
    for prefix, owner in owners:
        hints = typing.get_type_hints(owner, include_extras=True)
        for field in fields(owner):
            if not is_dataclass(hints[field.name]):
                assert prefix + field.name not in table, "two owners of one name"
                table[prefix + field.name] = owner, field, hints[field.name]
    return table


def by_owner(settings, owners):
    """{name: value} -> {owner: {name without the prefix: value}}"""
    table, parts = schema(owners), {owner: {} for _, owner in owners}
    for name, value in settings.items():
        owner, field, _ = table[name]
        parts[owner][field.name] = value
    return parts


def help_fields(owners):
    """Every field by the file that owns it, with its default and the comment beside it in the source."""
    lines = []
    for prefix, owner in owners:
        for declares in [kind for kind in reversed(owner.__mro__) if is_dataclass(kind)]:
            source = inspect.getsource(declares)
            lines.append(f"\nfields of {Path(inspect.getfile(declares)).name}")
            for name, (_, field, _) in schema([(prefix, owner)]).items():
                if field.name in inspect.get_annotations(declares):
                    comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.M)
                    default = field.default
                    default = ",".join(default) if isinstance(default, tuple) else str(default)
                    line = f"  --{name:30s} {default or 'none':10s} {comment[1] if comment else ''}"
                    lines.append(line.rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------- values
# What is not of the type raises one of WRONG, which typed() makes one line for the user.

WRONG = ValueError, TypeError, KeyError, OverflowError


def _truth(value):
    return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]


def _whole(value):
    if isinstance(value, bool):
        raise TypeError
    if re.fullmatch(r"[-+]?[\d_]+", str(value)):
        return int(value)                           # not by way of a float, which is exact to 2^53 only
    if not float(value).is_integer():
        raise ValueError
    return int(float(value))                        # 1e6 is a whole number too


def _number(value):
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _text(value):
    if not isinstance(value, str) or "\0" in value or len(value) > LONGEST:
        raise TypeError
    return value


def _names(value):
    names = value.split(",") if isinstance(value, str) else map(str, value)
    return tuple(name for name in names if name)


KINDS = {bool: (_truth, "True or False"), int: (_whole, "a whole number"), float: (_number, "a number"),
         str: (_text, f"text of {LONGEST} letters at most"), tuple: (_names, "names with commas between")}

# Ranges: what a field without one of its own must fit, and those that many fields have. Their ends are where
# numbers stop to make sense on any machine; what is too much for this one is for others to say.
FP32 = 3.4e38                                       # the largest number a tensor takes, about
RANGE = {int: (-2**63, 2**63 - 1), float: (-FP32, FP32)}                        # inf and nan are in neither
Count = Annotated[int, 1, 10**9]
Some = Annotated[int, 0, 10**9]                     # a count that may be none
Size = Annotated[int, 1, 2**18]                     # of a matrix
Fraction = Annotated[float, 0, 1]
Positive = Annotated[float, 1e-30, FP32]
NotNegative = Annotated[float, 0, FP32]


def typed(name, value, hint):
    """A value of a config file (of any type) or of the command line (text) as the type of a field, within its
    range."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    optional = types.NoneType in typing.get_args(hint)
    kind = kinds[0] if optional else hint
    ends = getattr(kind, "__metadata__", None)
    kind = kind.__origin__ if ends else kind
    if typing.get_origin(kind) is Literal:
        read, what = None, " or ".join(typing.get_args(kind))
    else:
        read, what = KINDS[typing.get_origin(kind) or kind]
    if not isinstance(value, (str, numbers.Real, list, tuple, types.NoneType)):     # arrays, functions, ...
        raise UserError(f"{name}={shown(value)} must be {what}, and is a {type(value).__name__}")
    if value is None or value == "None":
        if optional:
            return None
        raise UserError(f"{name}=None must be {what}")
    if read is None:
        return check_choice(name, value if isinstance(value, str) else shown(value), typing.get_args(kind))
    try:
        found = read(value)
    except WRONG:
        raise UserError(f"{name}={shown(value)} must be {what}{' or None' if optional else ''}") from None
    low, high = ends or RANGE.get(kind, (found, found))
    if not low <= found <= high:
        raise UserError(f"{name}={found} must be in [{low}, {high}]{' or None' if optional else ''}")
    return found


def shown(value):
    try:
        return repr(value)
    except Exception:                               # of a class in a config file, or an int of 5,000 digits
        return "..."


def check_choice(name, value, choices):
    """The value, if it is one of the choices; UserError with the nearest of them if not."""
    if value not in choices:
        raise UserError(f"{name}={value} must be one of {', '.join(choices)}{nearest(value, choices)}")
    return value


def nearest(word, words):
    """The end of an error message: which of words was meant, if one is near."""
    close = difflib.get_close_matches(str(word), list(words), 1)
    return f"; did you mean {close[0]}?" if close else ""


# ---------------------------------------------------------------- files and flags

def read_settings(argv, owners, partial=False, files=True):
    """Config files and --key=value flags, wherever they stand -> ({name: value}, words that are no flags).

    partial  the owners are some of those that a config file sets: its other fields are not our business.
             A flag that is no field is a mistake all the same
    files    False: what begins with no -- are other words
    raises   UserError: one line, with the nearest name for one that does not exist
    """
    table, settings = schema(owners), {}

    def put(name, value, where):
        if name not in table:
            raise UserError(f"{where}: no field is called {name}{nearest(name, table)} (-h lists them)")
        settings[name] = typed(name, value, table[name][2])

    words, flags = [], []
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("-" if files else "--"):
            words.append(argument)
        elif equals:
            flags.append((name, value))
        elif name in table and table[name][2] is bool:
            flags.append((name, "True"))
        else:
            example = f"--{name}=VALUE" if name in table else f"--key=value{nearest(name, table)}"
            raise UserError(f"{argument} must be given as {example}")
    for file in words if files else []:
        for name, value in run_file(file).items():
            if name in table or not partial:
                put(name, value, file)
    for name, value in flags:
        put(name, value, "command line")
    return settings, words


def run_file(name):
    """The names that a config file leaves behind. It is looked for here, then in the repository."""
    with naming(name):                              # it may be too long for one
        paths = [path for path in (Path(name), HERE.parents[1] / name) if path.is_file()]
    if not paths or paths[0].suffix != ".py" or paths[0].resolve() == HERE:
        raise UserError(f"{name}: no such config file{nearest(name, config_files())}")
    try:
        found = runpy.run_path(str(paths[0]))
    except (Exception, SystemExit) as error:        # of a file that is not ours
        raise UserError(f"{name}: {type(error).__name__}: {error}") from None
    return {name: value for name, value in found.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def config_files():
    """The config files of the repository, as one gives them on the command line."""
    return [f"configs/{path.name}" for path in sorted(HERE.parent.glob("*.py")) if path != HERE]


# ---------------------------------------------------------------- config.json and checkpoints

def flatten(*parts):
    """Pairs of a prefix and a dataclass's values -> {name: value}, as json takes it."""
    flat = {prefix + field.name: getattr(part, field.name) for prefix, part in parts
            for field in fields(part) if not is_dataclass(getattr(part, field.name))}
    return json.loads(json.dumps(flat))


def unflatten(flat, owners):
    """What flatten() made -> settings of the owners. What is none of theirs is left out: see unknown()."""
    table = schema(owners)
    return {name: typed(name, value, table[name][2]) for name, value in flat.items() if name in table}


def unknown(flat, owners):
    """Words for each value that no owner takes, in what another version of this code flattened."""
    table = schema(owners)
    return [f"made by another version of this code: {name}={value} is no field here"
            for name, value in flat.items() if name not in table]
