"""Opens a Hugging Face folder: config.json, weights in safetensors, tokenizer and chat template beside them."""

import functools

import numpy as np
from etils import epath

from phijax.errors import UserError, nearest_name
from phijax.interchange.facts import Facts
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface.config import CONFIG_FILE
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.huggingface.safetensors import DTYPES, Stored, open_folder
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Part, Tensor, tensors
from phijax.interchange.weight_source import LEAST_OF_A_LAYER, NOT_QUANTIZED, Index, check_finite, model_shapes
from phijax.model.config import ModelConfig
from phijax.storage import strict_json
from phijax.storage.regular_files import size_of
from phijax.storage.strict_json import Fields
from phijax.text.beginning import read_beginning
from phijax.text.open import open_tokenizer

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"  # since transformers 4.48; in tokenizer_config.json before
LONGEST_TEMPLATE = 1_000_000

_SHOWN = 8  # of the differences between a config and its tensors
_MOST_COMPARED = 1000  # names: each comparison takes some 20 us


class HuggingFaceSource:
    """Our leaves out of transformers' tensors: a slice of a leaf reads the rows, or columns, that hold it."""

    schemes = NOT_QUANTIZED

    def __init__(self, model: ModelConfig, files: dict[str, Stored], wanted: list[Tensor]):
        self._files = files
        self._shapes = model_shapes(model)
        self._places: dict[str, list[tuple[Tensor, Part]]] = {path: [] for path in self._shapes}  # by layer
        for tensor in wanted:
            for part in tensor.parts:
                self._places[part.leaf].append((tensor, part))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def dtype(self, path: str) -> np.dtype:
        """float32 where the layers of one leaf are stored in several."""
        stored = {self._files[tensor.name].dtype for tensor, _ in self._places[path]}
        return stored.pop() if len(stored) == 1 else np.dtype(np.float32)

    def read(self, path: str, index: Index) -> np.ndarray:
        places = self._places[path]
        if places[0][1].layer is None:
            return self._read_part(*places[0], index)
        layers, *inside = index
        start, stop, _ = layers.indices(len(places))
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, self._shapes[path], strict=True))
        out = np.empty(shape, self.dtype(path))
        for i, layer in enumerate(range(start, stop)):
            out[i] = self._read_part(*places[layer], tuple(inside))
        return out

    def _read_part(self, tensor: Tensor, part: Part, index: Index) -> np.ndarray:
        stored = self._files[tensor.name]
        values = stored.read(tensor.index(part, index))
        check_finite(values, f"{stored.file}: {tensor.name}")
        return values.T if tensor.turned(part) else values


def is_huggingface(path: epath.Path) -> bool:
    """Whether a folder looks like a model of transformers, also one without weights that can be read."""
    return (path / CONFIG_FILE).exists()


def open_huggingface(folder: epath.Path) -> Opened:
    """A folder with config.json and safetensors.

    Raises: UserError, before any weight is read, for an architecture or a key that is not known, files that are cut
      off or missing, and tensors that are missing, surplus or of the wrong shape.
    """
    config = strict_json.read(folder / CONFIG_FILE)
    model, family = huggingface_config.parse(config.values, config.file)
    files = _with_prefix(open_folder(folder), family)
    if model.num_layers * LEAST_OF_A_LAYER > len(files):
        raise UserError(
            f"{folder}: {CONFIG_FILE} says {model.num_layers:,} layers; its files hold {len(files)} tensors."
        )
    wanted = tensors(model, family.rows)
    _check_tensors(folder, model, family, files, wanted)
    generation = strict_json.read_if_there(folder / GENERATION_FILE)
    ids = {
        name: _ids(generation if name in generation.values else config, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    facts = Facts(
        architecture=family.class_name,
        tokenizer_folder=folder,
        bos_id=next(iter(ids["bos_token_id"]), None),
        eos_id=next(iter(_ids(config, "eos_token_id") or ids["eos_token_id"]), None),
        pad_id=next(iter(ids["pad_token_id"]), None),
        generation=generation.values or None,
    )
    return Opened(
        path=folder,
        kind="huggingface",
        model=model,
        weights=HuggingFaceSource(model, files, wanted),
        tokenizer=functools.partial(open_tokenizer, folder),
        chat_template=_template(folder),
        begin=read_beginning(folder, facts.bos_id),
        stop_ids=ids["eos_token_id"],
        facts=facts,
    )


def _with_prefix(files: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """Under the names that the class with a head has, also where the file is of the class without."""
    if any(name.startswith(family.prefix) for name in files):
        return files
    return {name if name == family.head_name else family.prefix + name: stored for name, stored in files.items()}


def _check_tensors(
    folder: epath.Path, model: ModelConfig, family: Family, files: dict[str, Stored], wanted: list[Tensor]
) -> None:
    shapes = {tensor.name: tensor.shape for tensor in wanted}
    present = {name: stored for name, stored in files.items() if not family.derived(name, stored.shape, model)}
    if model.tied_head:
        present.pop(family.head_name, None)  # some writers store the embedding twice
    missing = [name for name in shapes if name not in present]
    surplus = [name for name in present if name not in shapes]
    lines = []
    for i, name in enumerate(missing):
        near = nearest_name(name, surplus) if i < _SHOWN and len(surplus) <= _MOST_COMPARED else None
        lines.append(f"{name} is missing" + (f" (there is {near})" if near else ""))
    lines += [f"{name} belongs to no weight of this model" for name in surplus]
    lines += [
        f"{name} has shape {present[name].shape}, {CONFIG_FILE} asks for {shape}"
        for name, shape in shapes.items()
        if name in present and present[name].shape != shape
    ]
    lines += [
        f"{name} is stored as {present[name].dtype.name}. Weights can be read as {', '.join(DTYPES)}: dequantise first"
        for name in shapes
        if name in present and present[name].dtype not in DTYPES.values()
    ]
    if lines:
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UserError(
            f"{folder}: the weights are not those that {CONFIG_FILE} describes: {len(lines)} differences, of "
            f"{len(shapes)} tensors.\n  " + "\n  ".join(lines[:_SHOWN]) + more
        )


def _ids(config: Fields, name: str) -> tuple[int, ...]:
    """One id, a list or null."""
    several = isinstance(config.values.get(name), list)
    ids = config.integers(name, least=-1) if several else [config.integer(name, -1, least=-1)]
    return tuple(i for i in ids if i >= 0)  # some tools write -1 for "none"


def _template(folder: epath.Path) -> str | None:
    file = folder / TEMPLATE_FILE
    if file.exists() and size_of(file) <= LONGEST_TEMPLATE:
        return strict_json.read_text(file, LONGEST_TEMPLATE)
    config = strict_json.read_if_there(folder / TOKENIZER_CONFIG_FILE)
    if not isinstance(config.values.get("chat_template"), list):
        return config.text("chat_template", None)
    named = {entry.text("name"): entry.text("template") for entry in config.objects("chat_template")}
    return named.get("default")
