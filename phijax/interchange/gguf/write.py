"""Writes a GGUF file tensor by tensor, in pieces, under a temporary name until all of it is on the disk."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Literal

import jax.numpy as jnp
import numpy as np
from etils import epath

from phijax.errors import UserError
from phijax.interchange import model_card, small_matrices, tokenizer_files
from phijax.interchange.gguf import integers as gguf_integers
from phijax.interchange.gguf import long_rope
from phijax.interchange.gguf import sampling as gguf_sampling
from phijax.interchange.gguf.config import keys_of
from phijax.interchange.gguf.families import FAMILIES
from phijax.interchange.gguf.families.family import Family
from phijax.interchange.gguf.file import gguf_library
from phijax.interchange.gguf.tokenizer import NAMED_STOPS, PHI3_NAMES, PREFIX, STOPS_KEY
from phijax.interchange.gguf.vocabulary import vocabulary
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Part, Tensor, interleave, tensors
from phijax.storage import atomic, durable, staging

Kind = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
KINDS: tuple[str, ...] = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
}
_ALIGNMENT = 32
_AT_ONCE = 1 << 22  # values in memory at once


def write_gguf(
    opened: Opened,
    output: epath.PathLike,
    *,
    kind: Kind,
    keep_integers: bool = True,
    architecture: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> epath.Path:
    """Writes `opened` as one GGUF file and returns its path: `output` if it ends in .gguf, else a file in that folder.

    Norms stay float32, as ggml wants them; every other tensor becomes `kind`, rounded to the nearest where it is
    narrower. Q8_0 and Q4_0 are blocks of 32 as `gguf.quants.quantize` makes them.

    Args:
      keep_integers: what a checkpoint of ours stores quantised becomes Q4_0 or Q8_0, integer for integer, whatever
        `kind` the others get.
      architecture: a name of FAMILIES; None: `family_for`.
      name: of the model, shown by those who read it; that of a phi3 file always holds "phi3", since llama.cpp's rule
        for whitespace behind special tokens hangs on it.
      say: is told, in a line, what a reader will do otherwise.
    Raises: UserError for what a GGUF file cannot hold, before anything is written; for weights that are not finite or
      too large for `kind`. Nothing is left behind then.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is not written; written are {', '.join(KINDS)}.")
    family = FAMILIES[architecture] if architecture else family_for(opened)
    keys = keys_of(opened.model, family)
    plan = tensors(opened.model, family.rows)
    small = _small(opened, plan) if keep_integers else {}
    kinds = {tensor.name: small.get(tensor.name) or _kind(tensor, kind) for tensor in plan}
    most = _most(plan, kinds)
    path = output_path(epath.Path(output), opened, most, overwrite)
    header = _header(opened, family, keys, most, name, say)
    if small:
        counted = Counter(kinds[tensor.name] for tensor in plan)
        say("quantised weights integer for integer: " + ", ".join(f"{n} tensors {k}" for k, n in counted.items()))
    if opened.model.sliding_window:
        say(
            f"warning: the sliding window of {opened.model.sliding_window} is written, but llama.cpp does not use it "
            f"with architecture {family.architecture!r}: texts longer than that give other outputs there"
        )
    extra = long_rope.tensors_of(opened.model)
    staging.check_room(path, sum(_nbytes(tensor, kinds[tensor.name]) for tensor in plan))
    with staging.staged_file(path) as temporary:
        _write_header(temporary, family.architecture, header, plan, kinds, extra)
        with open(os.fspath(temporary), "ab") as file:
            for values in extra.values():
                _append(file, [values])
            for tensor in plan:
                pieces = _blocks if tensor.name in small else _pieces
                _append(file, pieces(opened, tensor, kinds[tensor.name]))
    return path


def write_card(opened: Opened, output: epath.PathLike) -> None:
    """A model card beside the file in the folder `output`, where there is none; nothing where `output` is the file."""
    path = epath.Path(output) / model_card.FILE
    if epath.Path(output).suffix != ".gguf" and not path.exists():
        atomic.write_text(path, model_card.render(opened, family_for(opened).classes[0], "gguf"))


def _small(opened: Opened, plan: list[Tensor]) -> dict[str, str]:
    """Tensor -> kind, of those that the checkpoint stores quantised."""
    schemes = opened.weights.schemes
    found = {tensor.name: gguf_integers.kind_of(schemes, tensor) for tensor in plan}
    return {name: kind for name, kind in found.items() if kind}


def _most(plan: list[Tensor], kinds: dict[str, str]) -> str:
    """The kind that most weights are of: the file's."""
    counts: Counter[str] = Counter()
    for tensor in plan:
        if tensor.matrix:
            counts[kinds[tensor.name]] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def family_for(opened: Opened) -> Family:
    """The architecture that is written for the class that the checkpoint was of; the first that can hold the model."""
    order = sorted(FAMILIES.values(), key=lambda family: opened.facts.architecture not in family.classes)
    return next((family for family in order if family.unwritable(opened.model) is None), order[0])


def planned_path(opened: Opened, output: epath.PathLike, kind: str) -> epath.Path:
    """Where `write_gguf`, or `write_k_quants`, would write. Raises: UserError as they do, if it is there already."""
    if kind in KINDS:
        plan = tensors(opened.model, family_for(opened).rows)
        small = _small(opened, plan)
        kind = _most(plan, {tensor.name: small.get(tensor.name) or _kind(tensor, kind) for tensor in plan})
    return output_path(epath.Path(output), opened, kind, overwrite=False)


def output_path(path: epath.Path, opened: Opened, kind: str, overwrite: bool) -> epath.Path:
    """The file's path. Raises: UserError if it is there already."""
    if not durable.is_local(path):
        raise UserError(f"{path}: GGUF files are written to a local disk. Copy it afterwards.")
    if path.suffix != ".gguf":
        path = path / f"{_safe(opened.facts.name or 'model')}-{kind}.gguf"
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Remove it or name another file.")
    return path


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"


def _kind(tensor: Tensor, kind: str) -> str:
    """Raises: UserError for rows that blocks do not divide."""
    if not tensor.matrix:
        return "F32"
    if kind in ("Q8_0", "Q4_0") and tensor.shape[-1] % 32:
        raise UserError(
            f"{tensor.name} has rows of {tensor.shape[-1]} weights; {kind} needs a multiple of 32. Take F16 or BF16."
        )
    return kind


def _header(
    opened: Opened,
    family: Family,
    keys: Mapping[str, Any],
    kind: str,
    name: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Key -> value, with `keys`, the model's, among them.

    Whole numbers are uint32, others float32; lists of them int32 and float32; arrays float64.
    """
    library = gguf_library()
    name = name or str(opened.facts.name or "model")
    if family.named and not any(part in name.lower() for part in family.named):
        name = f"{name} {family.named[-1]}"
    header = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(library.LlamaFileType[_FILE_TYPES[kind]]),
        "general.quantization_version": library.GGML_QUANT_VERSION,
        "general.alignment": _ALIGNMENT,
    }
    header |= keys
    header |= {key: np.asarray(values, np.float64) for key, values in long_rope.exact_lists(opened.model).items()}
    tokenizer = opened.tokenizer()
    stops, phi3 = tokenizer_files.ids_of(opened, tokenizer).stops, any(part in name.lower() for part in PHI3_NAMES)
    arrays = vocabulary(tokenizer, opened.model.vocab_size, opened.facts, begin=opened.begin, stops=stops, phi3=phi3)
    header |= {PREFIX + key: value for key, value in arrays.items()}
    said = {value for key, value in arrays.items() if key in ("eos_token_id", "eot_token_id", "eom_token_id")}
    said |= {i for name, i in tokenizer.specials.ids.items() if name in NAMED_STOPS}
    if not said.issuperset(stops):
        header[STOPS_KEY] = list(stops)
        say(f"warning: {len(stops)} tokens end a text; llama.cpp ends it at {', '.join(map(str, sorted(said)))} alone")
    header |= gguf_sampling.keys_of(opened.facts.generation or {})
    if template := tokenizer_files.chat_template_of(opened, tokenizer):
        header["tokenizer.chat_template"] = template
    return header


def _write_header(
    path: epath.Path,
    architecture: str,
    header: dict[str, Any],
    plan: list[Tensor],
    kinds: dict[str, str],
    extra: dict[str, np.ndarray],
) -> None:
    library = gguf_library()
    writer = library.GGUFWriter(os.fspath(path), architecture)
    value_types = library.GGUFValueType
    by_type = {bool: value_types.BOOL, int: value_types.UINT32, float: value_types.FLOAT32, str: value_types.STRING}
    of_array = {int: value_types.INT32, float: value_types.FLOAT32, str: value_types.STRING}
    for key, value in header.items():
        if isinstance(value, np.ndarray):
            writer.add_key_value(key, value.tolist(), value_types.ARRAY, sub_type=value_types.FLOAT64)
        elif isinstance(value, list):
            writer.add_key_value(key, value, value_types.ARRAY, sub_type=of_array[type(value[0])])
        else:
            writer.add_key_value(key, value, by_type[type(value)])
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for tensor in plan:
        stored = library.GGMLQuantizationType[kinds[tensor.name]]
        # The dtype says only that the shape is counted in weights, not in bytes.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), _nbytes(tensor, stored.name), raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _nbytes(tensor: Tensor, kind: str) -> int:
    library = gguf_library()
    per_block, block_size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    return math.prod(tensor.shape) // per_block * block_size


def _append(file: BinaryIO, pieces: Iterator[np.ndarray] | list[np.ndarray]) -> None:
    """One tensor, at the next multiple of the alignment, as the header has it."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    for piece in pieces:
        file.write(np.ascontiguousarray(piece).view(np.uint8).data)  # a buffer of bfloat16 there is not


def _pieces(opened: Opened, tensor: Tensor, kind: str) -> Iterator[np.ndarray]:
    """The tensor's rows from the top, some at a time, as bytes of `kind`."""
    source, head_dim = opened.weights, opened.model.head_dim
    for part in tensor.parts:
        layer = () if part.layer is None else (slice(part.layer, part.layer + 1),)
        if len(tensor.shape) == 1:
            values = source.read(part.leaf, (*layer, slice(0, part.rows)))
            yield converted(values.reshape(part.rows), kind, tensor.name)
            continue
        for rows in _row_blocks(tensor, part, head_dim):
            across = slice(0, tensor.shape[1])
            index = (across, rows) if tensor.turned(part) else (rows, across)
            values = source.read(part.leaf, (*layer, *index))
            values = values.reshape(values.shape[-2:])
            values = values.T if tensor.turned(part) else values
            yield converted(interleave(values, head_dim) if tensor.interleaved else values, kind, tensor.name)


def _blocks(opened: Opened, tensor: Tensor, kind: str) -> Iterator[np.ndarray]:
    """The same of what is stored quantised."""
    source, head_dim = opened.weights, opened.model.head_dim
    for part in tensor.parts:
        for rows in _row_blocks(tensor, part, head_dim):
            where = (source, part.leaf, part.layer, part.transposed, rows)
            values, scales = small_matrices.read_integers(*where), small_matrices.read_scales(*where)
            if tensor.interleaved:
                values, scales = (interleave(array, head_dim) for array in (values, scales))
            yield gguf_integers.blocks(values, scales, source.schemes[part.leaf].bits)


def _row_blocks(tensor: Tensor, part: Part, head_dim: int) -> Iterator[slice]:
    """Outputs of a part that are read at once; of an interleaved tensor, whole heads."""
    step = max(1, _AT_ONCE // tensor.shape[1])
    if tensor.interleaved:
        step = -(-step // head_dim) * head_dim
    return (slice(start, min(start + step, part.rows)) for start in range(0, part.rows, step))


def converted(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Values as they lie in a file of `kind`. Raises: UserError for what is not finite, before or after."""
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds NaN or infinite weights, which no runtime can use. Nothing was written.")
    if kind == "F32":
        return values.astype(np.float32, copy=False)
    if kind in ("F16", "BF16"):
        with np.errstate(over="ignore"):
            out = values.astype(np.float16 if kind == "F16" else jnp.bfloat16, copy=False)
        if not np.isfinite(out).all():
            largest = float(np.abs(values.astype(np.float32)).max())
            raise UserError(f"{name} holds a weight of {largest:.6g}, too large for {kind}. Take BF16 or F32.")
        return out
    library = gguf_library()
    wide = np.ascontiguousarray(values, np.float32)
    # The scale of a block is a float16: what does not fit becomes infinite there.
    most = 65504.0 * (127 if kind == "Q8_0" else 8)
    if wide.size and float(np.abs(wide).max()) > most:
        raise UserError(f"{name} holds a weight of {float(np.abs(wide).max()):.6g}, too large for {kind}. Take F32.")
    return library.quantize(wide, library.GGMLQuantizationType[kind])
