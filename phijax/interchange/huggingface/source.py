"""Opens a Hugging Face folder: config.json, weights in safetensors, tokenizer and chat template beside them."""

import functools
from typing import Any

import numpy as np
from etils import epath

from phijax.errors import UserError, nearest_name
from phijax.interchange.facts import Facts
from phijax.interchange.huggingface import config as huggingface_config
from phijax.interchange.huggingface.config import CONFIG_FILE, read_json
from phijax.interchange.huggingface.families.family import Family
from phijax.interchange.huggingface.safetensors import Stored, open_folder
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Part, Tensor, tensors
from phijax.interchange.weight_source import NOT_QUANTIZED, Index, check_finite, model_shapes
from phijax.model.config import ModelConfig
from phijax.text.beginning import read_beginning
from phijax.text.open import open_tokenizer
from phijax.text.special_files import size_of
from phijax.text.tokenizer import TextTokenizer

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"  # since transformers 4.48; in tokenizer_config.json before
LONGEST_TEMPLATE = 1_000_000


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
    where = str(folder / CONFIG_FILE)
    config = read_json(folder / CONFIG_FILE)
    model, family = huggingface_config.parse(config, where)
    files = _with_prefix(open_folder(folder), family)
    wanted = tensors(model, family.rows)
    _check_tensors(folder, model, family, files, wanted)
    generation = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).exists() else {}
    tokenizer_config = read_json(folder / TOKENIZER_CONFIG_FILE) if (folder / TOKENIZER_CONFIG_FILE).exists() else {}
    ids = {name: generation.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stops = _ids(ids["eos_token_id"], where)
    facts = Facts(
        architecture=family.class_name,
        tokenizer_folder=folder,
        bos_id=next(iter(_ids(ids["bos_token_id"], where)), None),
        eos_id=next(iter(_ids(config.get("eos_token_id"), where) or stops), None),
        pad_id=next(iter(_ids(ids["pad_token_id"], where)), None),
        generation=generation or None,
    )
    return Opened(
        path=folder,
        kind="huggingface",
        model=model,
        weights=HuggingFaceSource(model, files, wanted),
        tokenizer=functools.partial(_tokenizer, folder),
        chat_template=_template(folder, tokenizer_config),
        begin=read_beginning(folder, facts.bos_id),
        stop_ids=stops,
        facts=facts,
    )


def _tokenizer(folder: epath.Path) -> TextTokenizer:
    return open_tokenizer(folder)


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
    for name in missing:
        near = nearest_name(name, surplus)
        lines.append(f"{name} is missing" + (f" (there is {near})" if near else ""))
    lines += [f"{name} belongs to no weight of this model" for name in surplus]
    lines += [
        f"{name} has shape {present[name].shape}, {CONFIG_FILE} asks for {shape}"
        for name, shape in shapes.items()
        if name in present and present[name].shape != shape
    ]
    if lines:
        more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(
            f"{folder}: the weights are not those that {CONFIG_FILE} describes: {len(lines)} differences, of "
            f"{len(shapes)} tensors.\n  " + "\n  ".join(lines[:8]) + more
        )


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """One id, a list or null."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int for i in ids):
        raise UserError(f"{where}: token ids must be whole numbers, not {str(value)[:80]}.")
    # Some tools write -1 for "none".
    return tuple(i for i in ids if i >= 0)


def _template(folder: epath.Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = folder / TEMPLATE_FILE
    if file.exists() and size_of(file) <= LONGEST_TEMPLATE:
        return file.read_text()
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
