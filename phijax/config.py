"""The configuration of a run: composes the sections of the rooms, loads experiment files, applies overrides.

Every section's dataclass lives in the room that reads it; no room sees the whole. An experiment file starts from
`defaults()`, in which every key exists, and sets what differs.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re
import traceback
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from phijax.checkpoint.config import CheckpointConfig
from phijax.data.loader import DataConfig
from phijax.errors import UserError, nearest_name
from phijax.evaluation.held_out import EvaluationConfig
from phijax.model.config import ModelSection
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.hardware import CompilerConfig
from phijax.parallel.mesh import MeshConfig
from phijax.parallel.processes import ProcessConfig
from phijax.report.config import LoggingConfig
from phijax.storage.named import named
from phijax.tasks import TASKS
from phijax.training.optimizer import OptimizerConfig

# Keys that name files and folders; `~` is the home folder in them.
PATHS = ("init_from", "model.long_rope_from", "data.phases[].mixture[].path", "evaluation.sets[].path")


@dataclasses.dataclass(frozen=True)
class Config:
    """All of a run. Written, resolved, to config.json of its workdir."""

    task: Literal[*TASKS] = "pretrain"  # what is trained, and on which rows
    seed: int = 0  # of start values and of the order of rows; 0 to 2**32 - 1
    init_from: str | None = None  # start weights: any checkpoint that `phijax show` knows; all else begins anew
    init_from_other_tokenizer: bool = False  # whether they may train on shards of another tokenizer than theirs
    model: ModelSection = ModelSection()
    mesh: MeshConfig = MeshConfig()
    compiler: CompilerConfig = CompilerConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    processes: ProcessConfig = ProcessConfig()

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be from 0 to 2**32 - 1.")


def defaults() -> ConfigDict:
    """Every key with its default, for an experiment file to change. An unknown key is refused on the spot."""
    config = ConfigDict(dataclasses.asdict(Config()), type_safe=False, convert_dict=False)
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.default):
            config[section.name] = ConfigDict(dataclasses.asdict(section.default), type_safe=False, convert_dict=False)
    return config.lock()


def load(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The config of an experiment file with overrides applied, fully typed.

    The file is Python and is run: take it only from where you would take a program.

    Args:
      overrides: (dotted path with list indices, literal) pairs, e.g. ("data.phases[0].steps", "100").
    Raises: UserError with the key, what was expected, and the nearest valid name.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--config={path}: no such file. Experiments lie under experiments/.")
    module_spec = importlib.util.spec_from_file_location("phijax_experiment", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={path} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no get_config(). Copy experiments/tiny.py and change what differs.")
        tree = _plain(module.get_config())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}{_line_in(file, error)}: {_said(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: get_config() returns {tree!r}, not the config.")
    for key, text in overrides:
        _override(tree, key, text)
    return from_dict(tree, where=str(path))


def _line_in(file: pathlib.Path, error: Exception) -> str:
    """The line of the experiment file where it went wrong, as ":5"; nothing where that is not known."""
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(file) else (frames or [None])[-1]
    return f":{line}" if line else ""


def _said(error: Exception) -> str:
    """An error of an experiment file for people. Wrong keys: ml_collections wraps the text, and lists all there are."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    if not isinstance(error, AttributeError | KeyError):
        return f"{type(error).__name__}: {error}"
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if error.args else str(error)
    return re.sub(r" Other fields present: .*?(?=\nDid you mean|$)", "", text, flags=re.DOTALL)


def from_dict(tree: dict[str, Any], where: str = "config") -> Config:
    """Plain nested dicts (an experiment's, or config.json's) -> Config. Raises: UserError as `load`."""
    return _typed(Config, tree, "", where)


def to_dict(config: Config) -> dict[str, Any]:
    """JSON-ready; `from_dict` is its inverse."""
    return _plain(dataclasses.asdict(config))


def filled(tree: dict[str, Any], kind: type = Config) -> dict[str, Any]:
    """A plain tree that an older version wrote, with the keys that it lacks at their defaults; else as it is."""
    hints, out = typing.get_type_hints(kind), dict(tree)
    for field in dataclasses.fields(kind):
        section, record = hints[field.name], _record_of(hints[field.name])
        if field.name not in tree:
            if field.default is not dataclasses.MISSING:
                out[field.name] = _plain(field.default)
        elif dataclasses.is_dataclass(section) and isinstance(tree[field.name], dict):
            out[field.name] = filled(tree[field.name], section)
        elif dataclasses.is_dataclass(record) and isinstance(tree[field.name], list):
            out[field.name] = [filled(x, record) if isinstance(x, dict) else x for x in tree[field.name]]
    return out


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of everything that differs between two plain trees; lists compare whole."""
    out = {}
    for name in sorted(set(old) | set(new)):
        a, b, key = old.get(name), new.get(name), f"{prefix}{name}"
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, f"{key}.")
        elif a != b:
            out[key] = (a, b)
    return out


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every key that can be set, dotted; `[]` marks a list of records."""
    out = []
    for name, kind in typing.get_type_hints(cls).items():
        item = _record_of(kind)
        if dataclasses.is_dataclass(kind):
            out += keys(kind, f"{prefix}{name}.")
        elif item:
            out += keys(item, f"{prefix}{name}[].")
        else:
            out.append(prefix + name)
    return out


def _plain(value: Any) -> Any:
    """ConfigDicts, records and tuples -> dicts and lists."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    """Sets one value in a plain tree, along the schema, so that a wrong step is answered with the right names."""
    steps = [s for s in re.split(r"\.|(?=\[)", key) if s]
    node, kind, walked = tree, Config, ""
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        index = re.fullmatch(r"\[(\d+)\]", step)
        if index:
            item = _record_of(kind)
            if item is None or not isinstance(node, list):
                raise UserError(f"--config.{key}: {walked} is not a list.")
            place = int(index[1])
            if place >= len(node):
                raise UserError(f"--config.{key}: {walked} has {len(node)} entries, counted from 0.")
            kind, slot = item, place
        else:
            hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
            if step not in hints:
                raise UserError(_unknown(f"--config.{key}", f"{walked}.{step}".lstrip("."), step, hints, walked))
            kind, slot = hints[step], step
            if not isinstance(node, dict):
                raise UserError(f"--config.{key}: {walked} must be a section of keys, not {node!r}.")
            if step not in node and not last:
                node[step] = [] if _record_of(kind) else {}
        walked += step if index else f".{step}" if walked else step
        if last:
            node[slot] = _literal(text, kind, f"--config.{key}={text}")
            _typed(kind, node[slot], walked, "command line")
        else:
            node = node[slot]


def _literal(text: str, kind: Any, where: str) -> Any:
    """A command line's text as a value of `kind`: Python's literals, true/false/none in any case, else a string."""
    named = {"true": True, "false": False, "none": None, "null": None}
    kinds = _alternatives(kind)
    if text.lower() in named and not (kinds == [str]):
        return named[text.lower()]
    if str in kinds or any(typing.get_origin(k) is Literal and text in typing.get_args(k) for k in kinds):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if any(typing.get_origin(k) is Literal for k in kinds):
            return text
        raise UserError(f"{where}: expected {_described(kind)}.") from error


def _typed(kind: Any, value: Any, key: str, where: str) -> Any:
    """`value` as `kind`, recursively. Raises: UserError naming the key."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} must be a section of keys, not {value!r}.")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise UserError(_unknown(where, f"{key}.{name}".lstrip("."), name, hints, key))
        return kind(**{n: _typed(hints[n], v, f"{key}.{n}".lstrip("."), where) for n, v in value.items()})
    item = _record_of(kind)
    if item:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: {key} must be a list, not {value!r}.")
        return tuple(_typed(item, v, f"{key}[{i}]", where) for i, v in enumerate(value))
    for option in _alternatives(kind):
        if typing.get_origin(option) is Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif type(value) is option:
            is_path = option is str and re.sub(r"\[\d+\]", "[]", key) in PATHS
            return named(value) if is_path else value
    near = nearest_name(value, _described(kind).split(", ")) if isinstance(value, str) else None
    raise UserError(f"{where}: {key}={value!r} must be {_described(kind)}." + (f" Nearest: {near!r}." if near else ""))


def _record_of(kind: Any) -> Any:
    """X of tuple[X, ...], else None."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _alternatives(kind: Any) -> list[Any]:
    return list(typing.get_args(kind)) if isinstance(kind, types.UnionType) or _is_union(kind) else [kind]


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Union


def _described(kind: Any) -> str:
    names = []
    for option in _alternatives(kind):
        literal = typing.get_origin(option) is Literal
        names += [str(a) for a in typing.get_args(option)] if literal else [getattr(option, "__name__", str(option))]
    return ", ".join("None" if name == "NoneType" else name for name in names)


def _unknown(where: str, key: str, name: str, hints: dict[str, Any], section: str) -> str:
    if not hints:
        return f"{where}: there is no key {key!r}: {section} has no keys below it."
    near = nearest_name(name, hints)
    elsewhere = [known for known in keys() if known.split(".")[-1] == name]
    hint = (
        f" Nearest: {f'{section}.{near}'.lstrip('.')}." if near else f" There is {elsewhere[0]}." if elsewhere else ""
    )
    return f"{where}: there is no key {key!r}.{hint}\nKeys of {section or 'the config'}: {', '.join(hints)}."
