"""Opens a checkpoint of ours, a run's or an exported one, to read its weights alone. Takes no lock, changes nothing."""

import functools
import math
import warnings
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath

from phijax.checkpoint import manifest, reading, steps
from phijax.checkpoint.agreement import from_process_zero
from phijax.checkpoint.array_spec import array_spec
from phijax.checkpoint.steps import CHECKPOINTS_FOLDER
from phijax.errors import UserError
from phijax.interchange.facts import Facts, carried
from phijax.interchange.opened import Opened
from phijax.interchange.weight_source import Index, model_shapes
from phijax.model import params
from phijax.model.config import ModelConfig, model_from_dict
from phijax.quantization import packing, policy
from phijax.quantization.policy import Scheme
from phijax.storage import durable
from phijax.storage.strict_json import Fields
from phijax.text.open import open_tokenizer
from phijax.text.tokenizer import TextTokenizer

TOKENIZER_FOLDER = "tokenizer"
PARAMS = "params/"
START = "start"  # in a run's identity: what its start weights brought with them (run/start.py)
QUANTIZATION = "quantization"  # in the manifest's extra: the schemes by leaf, the method, the errors
QUALITY_FILE, PLOT_FILE = "quality.json", "error_by_layer.png"  # what it cost; beside the weights
DTYPES = ("float32", "bfloat16", "float16")
VALUES, SCALES = "values", "scales"  # of four bits: two to a byte, see quantization/packing.py

# A chunk that several reads share is decoded once while it lies here. Chunks of one layer fit; those of checkpoints
# written before the chunk size was bounded (run_state.CHUNK_BYTES) may not, and are then decoded for each layer.
CACHE_BYTES = 256 << 20
_MOST_SHRUNK = 64  # times: weights of a model shrink by a tenth, zeros wholly


class NativeSource:
    """Leaves of params/ in one step's folder, read through TensorStore without Orbax: slices, not whole arrays.

    Leaves with a scheme are stored quantised, as VALUES and SCALES below their path; `read` gives them in float32.
    """

    def __init__(
        self, folder: epath.Path, model: ModelConfig, leaves: list[dict], schemes: Mapping[str, Scheme] | None = None
    ):
        """Args: leaves: those of the manifest. Raises: UserError where they are not this model's."""
        self._folder = durable.absolute(folder)
        self.schemes = dict(schemes or {})
        self._shapes = model_shapes(model)
        stored = {leaf["path"]: leaf for leaf in leaves}
        wanted = []
        for path, shape in params.shapes(model).items():
            if path in self.schemes:
                wanted += described(path, shape, self.schemes[path])
            else:
                dtype = stored.get(PARAMS + path, {}).get("dtype")
                wanted.append({"path": PARAMS + path, "shape": list(shape), "dtype": dtype})
        lines = manifest.differences(leaves, wanted, partial=True)
        known = {leaf["path"] for leaf in wanted}
        extra = [path for path in stored if path.startswith(PARAMS) and path not in known]
        manifest.refuse_differences(folder, lines + [f"{path}: only in the checkpoint" for path in extra], len(stored))
        names = {path: "float32" if path in self.schemes else stored[PARAMS + path]["dtype"] for path in self._shapes}
        if unknown := next((path for path, name in names.items() if name not in DTYPES), None):
            raise UserError(f"{folder}: {unknown} is stored as {names[unknown]}; weights are {', '.join(DTYPES)}.")
        self._dtypes = {path: jnp.dtype(name) for path, name in names.items()}
        self._said = {leaf["path"]: (tuple(leaf["shape"]), leaf["dtype"]) for leaf in leaves}
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._arrays: dict[str, tensorstore.TensorStore] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def dtype(self, path: str) -> np.dtype:
        return self._dtypes[path]

    def read(self, path: str, index: Index) -> np.ndarray:
        bounded = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, self._shapes[path], strict=True))
        return self._dequantized(path, bounded) if path in self.schemes else self.read_stored(path, bounded)

    def read_values(self, path: str, index: Index) -> np.ndarray:
        """Integers of a quantised leaf as int8; `index` may reach into the rows that pad the vocabulary."""
        if self.schemes[path].bits == 8:
            return self.read_stored(f"{path}/{VALUES}", index)
        start, stop, _ = index[-1].indices(self._shapes[path][-1])
        packed = self.read_stored(f"{path}/{VALUES}", (*index[:-1], slice(start // 2, -(-stop // 2))))
        return packing.unpack(packed)[..., start % 2 : start % 2 + stop - start]

    def read_scales(self, path: str, index: Index) -> np.ndarray:
        """Scales of a quantised leaf, float16; `index` counts groups."""
        return self.read_stored(f"{path}/{SCALES}", index)

    def read_stored(self, path: str, index: Index) -> np.ndarray:
        """Of an array as it lies in the folder: of a quantised leaf path/values (packed) or path/scales."""
        try:
            return np.asarray(self._array(path)[index].read().result())
        except ValueError as error:  # what TensorStore raises for files that are missing or cannot be decoded
            raise UserError(f"{self._folder}: {path} cannot be read: {error}") from error

    def _dequantized(self, path: str, index: Index) -> np.ndarray:
        whole = self._shapes[path]
        axis = policy.summed_axis(path) % len(whole)
        group = self.schemes[path].group or whole[axis]
        start, stop = index[axis].start, index[axis].stop
        groups = (*index[:axis], slice(start // group, -(-stop // group)), *index[axis + 1 :])
        scales = np.repeat(self.read_scales(path, groups).astype(np.float32), group, axis)
        within = start - start // group * group
        return self.read_values(path, index) * np.take(scales, range(within, within + stop - start), axis)

    def _array(self, path: str) -> tensorstore.TensorStore:
        if path not in self._arrays:
            spec = array_spec(self._folder / manifest.STATE_FOLDER, PARAMS + path)
            found = tensorstore.open(spec, context=self._context, open=True, read=True).result()
            if (found.shape, found.dtype.name) != (said := self._said[PARAMS + path]):
                raise UserError(
                    f"{self._folder}: {path} is {found.dtype.name} {found.shape}, but {manifest.MANIFEST_FILE} says "
                    f"{said[1]} {said[0]}."
                )
            self._arrays[path] = found
        return self._arrays[path]


def described(path: str, shape: tuple[int, ...], scheme: Scheme) -> list[dict]:
    """The manifest's entries of a quantised leaf."""
    values = (*shape[:-1], shape[-1] // 2) if scheme.bits == 4 else shape
    scales = scheme.scales_shape(shape, policy.summed_axis(path))
    return [
        {"path": f"{PARAMS}{path}/{VALUES}", "shape": list(values), "dtype": "uint8" if scheme.bits == 4 else "int8"},
        {"path": f"{PARAMS}{path}/{SCALES}", "shape": list(scales), "dtype": "float16"},
    ]


def is_native(path: epath.Path) -> bool:
    """Whether a folder is a step of ours, or the workdir of a run with steps."""
    # Token shards have a manifest too.
    step = (path / manifest.MANIFEST_FILE).exists() and (path / manifest.STATE_FOLDER).exists()
    return step or (path / CHECKPOINTS_FOLDER).exists()


def is_step_of_run(folder: epath.Path) -> bool:
    """Whether a step's folder lies in a workdir, whose tokenizer and metrics are then its own."""
    return folder.parent.name == CHECKPOINTS_FOLDER


def open_native(path: epath.Path, *, verify: bool = True) -> Opened:
    """A run's workdir (its newest step whose every byte is as it was written), or one step's folder. Collective.

    A newer step that is damaged, or not called good, is a warning. Raises: UserError where there is none that is whole
    (of one step: the file that is damaged is named).
    Args: verify: False: the newest step, its bytes unread; not collective.
    """
    if verify:
        # Which step process 0 says, but each where it has them: the folder's path may differ from host to host.
        within = from_process_zero(lambda: str(_whole_step(path).relative_to(path)))
        folder = path if within == "." else path / within
    else:
        folder = _newest_step(path)
    content = reading.read_manifest(folder)
    model = model_of(folder, content["identity"])
    _refuse_empty_promises(folder, content)
    said = Fields(content, f"{folder}: {manifest.MANIFEST_FILE}")
    extra, identity = said.object("extra"), said.object("identity")
    # What an export of another kind of checkpoint wrote down; of a run, what its start weights brought with them.
    before = extra.object("weights_only", None) or identity.object(START, Fields({}, said.file))
    tokenizer = _tokenizer_folder(folder)
    return Opened(
        path=folder,
        kind="phijax",
        model=model,
        weights=NativeSource(folder, model, content["leaves"], _schemes_of(extra)),
        tokenizer=functools.partial(_open_tokenizer, folder, tokenizer, _fingerprint(identity, before)),
        chat_template=before.text("chat_template", None),
        begin=_begin(identity, before),
        stop_ids=tuple(before.integers("stop_ids", ())),
        facts=Facts(
            step=content["step"],
            identity=content["identity"],
            tokenizer_folder=tokenizer,
            quantization=extra.object(QUANTIZATION).values if extra.has(QUANTIZATION) else None,
            **carried(before),
        ),
    )


def _refuse_empty_promises(folder: epath.Path, content: dict) -> None:
    """Raises: UserError for weights that the step's files cannot hold: chunks that are missing read as zeros."""
    weights = [leaf for leaf in content["leaves"] if leaf["path"].startswith(PARAMS)]
    said = sum(math.prod(leaf["shape"]) for leaf in weights)  # a byte each at least
    held = sum(entry["bytes"] for entry in content["files"])
    if said > _MOST_SHRUNK * held + CACHE_BYTES:
        raise UserError(
            f"{folder / manifest.MANIFEST_FILE} describes {said:,} numbers; the step's files have {held:,} bytes."
        )


def _begin(identity: Fields, before: Fields) -> tuple[int, ...]:
    """Of a run: as its rows' segments begin. Of an export: as the checkpoint that it was made of."""
    if before.has("begin"):
        return tuple(before.integers("begin"))
    begin = identity.object("data", Fields({}, "")).integer("begin", None)
    return () if begin is None else (begin,)


def _whole_step(path: epath.Path) -> epath.Path:
    if (path / manifest.MANIFEST_FILE).exists():
        if problems := manifest.verify(path, by_step=False):
            raise UserError(manifest.damage(path, problems))
        return path
    folder = path / CHECKPOINTS_FOLDER
    listing = steps.list_folders(folder)
    saved, damaged, not_good = listing.steps, [], None
    passed = [f"{folder / name} is no step: it {why}." for name, why in steps.later_without_manifest(listing).items()]
    for step in reversed(saved):
        problems = manifest.verify(folder / str(step))
        if not problems and manifest.called_good(manifest.read(folder / str(step))) is False:
            not_good = not_good or folder / str(step)
            passed.append(f"Step {step} is not called good: the updates before it were not finite.")
        elif not problems:
            _warn(passed, step)
            return folder / str(step)
        else:
            passed.append(manifest.damage(folder / str(step), problems))
            damaged.append(step)
    if not_good is not None:
        warnings.warn(f"{not_good} is not called good, but there is no other.", stacklevel=2)
        return not_good
    raise UserError(f"{path} holds no whole checkpoint" + (f" (damaged: {saved})." if saved else "."))


def _newest_step(path: epath.Path) -> epath.Path:
    if (path / manifest.MANIFEST_FILE).exists():
        return path
    folder = path / CHECKPOINTS_FOLDER
    listing = steps.list_folders(folder)
    if not listing.steps:
        raise UserError(f"{path} holds no whole checkpoint.")
    later = steps.later_without_manifest(listing)
    _warn([f"{folder / name} is no step: it {why}." for name, why in later.items()], listing.steps[-1])
    return folder / str(listing.steps[-1])


def _warn(passed: Sequence[str], step: int) -> None:
    for text in passed:
        warnings.warn(f"{text}\nUsing step {step} instead.", stacklevel=3)


def _schemes_of(extra: Fields) -> dict[str, Scheme]:
    """Leaf path -> scheme of what is stored quantised."""
    if not extra.has(QUANTIZATION):
        return {}
    schemes = extra.object(QUANTIZATION).object("schemes")
    names = {path: schemes.text(path) for path in schemes.values}
    if unknown := next((path for path, name in names.items() if name not in policy.SCHEMES), None):
        raise schemes.refusal(unknown, f"one of {', '.join(policy.SCHEMES)}, which this version of phijax knows")
    return {path: policy.SCHEMES[name] for path, name in names.items()}


def model_of(folder: epath.Path | str, identity: dict) -> ModelConfig:
    """The model of a manifest's identity. Raises: UserError for what is none, or is of a newer version."""
    where = f"{folder}: {manifest.MANIFEST_FILE}"
    return model_from_dict(Fields(identity, where).object("model").values, where)


def _tokenizer_folder(folder: epath.Path) -> epath.Path | None:
    """Inside of an exported checkpoint; beside the checkpoints of a run."""
    candidates = [folder / TOKENIZER_FOLDER]
    if is_step_of_run(folder):
        candidates.append(folder.parent.parent / TOKENIZER_FOLDER)
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def _fingerprint(identity: Fields, before: Fields) -> str | None:
    """Of the tokenizer that the step was saved with; None where an older phijax wrote down none."""
    return before.text(TOKENIZER_FOLDER, None) or identity.object("data", Fields({}, "")).text("tokenizer", None)


def _open_tokenizer(folder: epath.Path, tokenizer: epath.Path | None, fingerprint: str | None) -> TextTokenizer:
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: neither in it nor in its run's workdir is a {TOKENIZER_FOLDER}/.")
    opened = open_tokenizer(tokenizer)
    if fingerprint not in (None, opened.fingerprint):
        raise UserError(
            f"{tokenizer} is damaged, or not the tokenizer of {folder}: its fingerprint is {opened.fingerprint[:12]}, "
            f"the manifest says {fingerprint[:12]}. Copy the tokenizer's folder again from where it came."
        )
    return opened
