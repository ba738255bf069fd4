"""From raw text to a folder of token shards: plan, tokenizer, both stages, the manifest last. Can be started again."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from phijax.curation import fruitless, jobs
from phijax.curation.documents import InputFile, Part, find_inputs, parts_of, read_part
from phijax.curation.fruitless import Fruitless
from phijax.curation.given_tokenizer import open_given
from phijax.curation.tokenize_shards import Stage, assemble_shard, is_validation, tokenize_unit
from phijax.data.shard_manifest import MANIFEST_FILE, InputEntry, Manifest, ShardEntry, read_manifest
from phijax.data.shards import Shards, token_dtype
from phijax.errors import UserError
from phijax.storage import atomic
from phijax.text.tokenizer import TextTokenizer
from phijax.text.train_tokenizer import train_tokenizer

UNIT_BYTES = 32 << 20  # of input, tokenized by one process at a time: some ten seconds
SHARD_BYTES = 128 << 20  # of text in a shard when their number is not given; its tokens are held in memory
SAMPLE_BYTES = 64 << 20  # of text that a tokenizer is trained on, at most: half a minute, 0.8 GB of memory
COMPRESSION = 3.5  # text bytes for a byte of a compressed file, about
BYTES_PER_TOKEN = 3.5  # about
_WORK = "unfinished"

# Shows results as they come: (what is done, how many there will be, the results) -> the results.
Watch = Callable[[str, int, Iterator[Any]], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for."""

    input: str
    output: str
    tokenizer: str | None = None  # None: trained on the input
    vocab_size: int = 32011
    block: int = 1024
    num_shards: int | None = None  # None: by size
    validation_fraction: float = 0.0
    seed: int = 0
    text_field: str = "text"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done, all of it known before any text is read."""

    request: Request
    files: tuple[InputFile, ...]
    ignored: tuple[str, ...]
    units: tuple[tuple[Part, ...], ...]
    num_train_shards: int
    num_validation_shards: int
    given_tokenizer: TextTokenizer | None

    @property
    def text_bytes(self) -> int:
        """About how much text there is."""
        return _text_bytes(self.files)

    @property
    def folders(self) -> dict[str, pathlib.Path]:
        """Where the shards of each split go."""
        output = pathlib.Path(self.request.output)
        if self.num_validation_shards:
            return {"train": output / "train", "validation": output / "validation"}
        return {"all": output}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the bytes of the shards, besides the input: kept in the manifest, compared at a restart."""
        trained = {"trained": True, "vocab_size": self.request.vocab_size}
        given = self.given_tokenizer and {"trained": False, "fingerprint": self.given_tokenizer.fingerprint}
        return {
            "block": self.request.block,
            "seed": self.request.seed,
            "text_field": self.request.text_field,
            "num_shards": self.num_train_shards,
            "num_validation_shards": self.num_validation_shards,
            "validation_fraction": self.request.validation_fraction,
            "tokenizer": given or trained,
        }


def make_plan(request: Request) -> Plan:
    """Finds the input and checks what was asked for. Writes nothing. Raises UserError."""
    _check(request)
    files, ignored = find_inputs(request.input, outside=request.output)
    shards = request.num_shards or math.ceil(max(_text_bytes(files), 1) / SHARD_BYTES)
    fraction = request.validation_fraction
    return Plan(
        request=request,
        files=tuple(files),
        ignored=tuple(ignored),
        units=_units(parts_of(files, UNIT_BYTES)),
        num_train_shards=shards,
        num_validation_shards=math.ceil(shards * fraction),
        given_tokenizer=open_given(request.tokenizer) if request.tokenizer else None,
    )


def finished(plan: Plan) -> list[Manifest] | None:
    """The manifests of an output that is complete and is what `plan` would make. Raises UserError if it is another."""
    output = pathlib.Path(plan.request.output)
    found = {split: path for split, path in _possible_folders(output).items() if (path / MANIFEST_FILE).exists()}
    if not found or (output / _WORK / "plan.json").exists():
        return None
    manifests = {split: read_manifest(epath.Path(path)) for split, path in found.items()}
    first = next(iter(manifests.values()))
    inputs = {entry.file: entry.bytes for entry in first.inputs}
    _refuse_difference(output, first.settings, inputs, plan, {file.name: file.bytes for file in plan.files})
    return [Shards.open(folder).manifest for folder in plan.folders.values()]


def prepare(plan: Plan, workers: int, watch: Watch) -> list[Manifest]:
    """Does it, or what is left to do of it. Returns the manifest of each folder written: train, validation.

    Killed at any instant and started again it gives the same bytes.
    Raises UserError for another plan's output, unreadable input, a full disk, text too short for one record.
    """
    if (manifests := finished(plan)) is not None:
        shutil.rmtree(pathlib.Path(plan.request.output) / _WORK, ignore_errors=True)  # killed while tidying up
        return manifests
    work = _claim_output(plan)
    with _only_one(work):
        _same_plan_as_before(plan, work)
        _remove_temporary_files(plan, work)
        try:
            tokenizer = _tokenizer(plan, work, watch)
            stage = _stage(plan, work)
            tasks = _units_to_tokenize(plan, stage, work)
            units = [task.output for task in tasks]
            counts = _tokenize(plan, tasks, workers, watch)
            manifests = _manifests(plan, tokenizer, counts, _assemble(plan, stage, units, workers, watch, work))
        except Fruitless:
            fruitless.discard(plan.folders.values(), work)
            raise
        for folder, manifest in zip(plan.folders.values(), manifests, strict=True):
            tokenizer.save(folder)
            atomic.write_bytes(folder / MANIFEST_FILE, manifest.to_json().encode())
        (work / "plan.json").unlink()  # from here on the output is complete, the rest is tidying up
    shutil.rmtree(work)
    return manifests


def prepare_part(plan: Plan, workers: int, watch: Watch, part: int, parts: int) -> int:
    """Tokenizes every `parts`-th unit, from `part` on; returns how many. For machines that share the output's disk.

    Parts may run at once and in any order; `prepare` of the same plan then finds their work done and does the rest.
    Raises UserError as `prepare`, and without a given tokenizer: a trained one would have to be trained first.
    """
    if plan.given_tokenizer is None:
        raise UserError("A part needs --tokenizer=FOLDER, the same for all. Train one with a first, small output.")
    if finished(plan) is not None:
        return 0
    work = _claim_output(plan)
    with open(work / "setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all parts have the same plan and tokenizer: the first writes both
        _same_plan_as_before(plan, work)
        _tokenizer(plan, work, watch)
    with _only_one(work, but_parts=True):
        tasks = _units_to_tokenize(plan, _stage(plan, work), work)[part::parts]
        return sum(1 for _ in watch("tokenizing", len(tasks), jobs.run(tasks, workers)))


def _check(request: Request) -> None:
    if "://" in request.output:
        raise UserError(f"--output={request.output} is not a local folder. Prepare locally, then copy the folder.")
    for name, least in (("block", 1), ("num_shards", 1), ("seed", 0)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} must be {least} or more.")
    if not 0 <= request.validation_fraction < 1:
        raise UserError(f"--validation_fraction={request.validation_fraction} must be at least 0 and below 1, as 0.01.")


def _text_bytes(files: tuple[InputFile, ...] | list[InputFile]) -> int:
    return int(sum(f.bytes * (COMPRESSION if f.name.endswith((".gz", ".zst", ".parquet")) else 1) for f in files))


def _units(parts: list[Part]) -> tuple[tuple[Part, ...], ...]:
    """Neighbouring parts together until they are UNIT_BYTES: a million small files are not a million tasks."""
    units: list[list[Part]] = []
    size = 0
    for part in parts:
        if not units or size + part.stop - part.start > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(part)
        size += part.stop - part.start
    return tuple(map(tuple, units))


def _possible_folders(output: pathlib.Path) -> dict[str, pathlib.Path]:
    return {"all": output, "train": output / "train", "validation": output / "validation"}


def _refuse_difference(output: pathlib.Path, settings: dict, inputs: dict, plan: Plan, wanted_inputs: dict) -> None:
    wanted = json.loads(json.dumps(plan.settings))
    lines = [
        f"{key}: {settings.get(key)} there, {value} now" for key, value in wanted.items() if settings[key] != value
    ]
    lines += [f"input {name}: not there" for name in wanted_inputs.keys() - inputs.keys()]
    lines += [f"input {name}: there, gone now" for name in inputs.keys() - wanted_inputs.keys()]
    lines += [
        f"input {name}: changed" for name in inputs.keys() & wanted_inputs.keys() if inputs[name] != wanted_inputs[name]
    ]
    if lines:
        shown = "\n".join(f"  {line}" for line in sorted(lines)[:8])
        raise UserError(
            f"{output} was made from something else:\n{shown}\nGive another --output, or delete that folder first."
        )


def _claim_output(plan: Plan) -> pathlib.Path:
    output = pathlib.Path(plan.request.output)
    work = output / _WORK
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; it must be a folder, new or empty.")
    if output.exists() and not work.exists() and (other := sorted({path.name for path in output.iterdir()} - {_WORK})):
        raise UserError(f"--output={output} is in use: it holds {other[0]}. Give a new or empty folder.")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from error
    return work


@contextlib.contextmanager
def _only_one(work: pathlib.Path, *, but_parts: bool = False) -> Iterator[None]:
    """Two runs would mix their files. The system gives the lock back when its holder dies, however it does.

    Args: but_parts: others that say so may work at the same time.
    """
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if but_parts else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another process is preparing {work.parent} now. Let it end, or stop it.") from error
        yield


def _same_plan_as_before(plan: Plan, work: pathlib.Path) -> None:
    path = work / "plan.json"
    inputs = {file.name: [file.bytes, epath.Path(file.path).stat().mtime] for file in plan.files}
    if path.exists():
        before = json.loads(path.read_bytes())
        _refuse_difference(work.parent, before["settings"], before["inputs"], plan, inputs)
        return
    atomic.write_bytes(path, json.dumps({"settings": plan.settings, "inputs": inputs}).encode())


def _remove_temporary_files(plan: Plan, work: pathlib.Path) -> None:
    for path in (path for folder in (work, *plan.folders.values()) for path in folder.glob("*.tmp")):
        path.unlink()


def _tokenizer(plan: Plan, work: pathlib.Path, watch: Watch) -> TextTokenizer:
    folder, temporary = work / "tokenizer", work / "tokenizer_being_written"
    if not folder.exists():
        tokenizer = plan.given_tokenizer
        if tokenizer is None:
            texts = watch("reading text for the tokenizer", 0, _sample(plan))
            try:
                tokenizer = train_tokenizer(texts, plan.request.vocab_size)
            except UserError:
                (work / "plan.json").unlink()  # nothing is made yet: the next try may ask for something else
                raise
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer.save(temporary)
        temporary.rename(folder)
    return open_given(folder)


def _sample(plan: Plan) -> Iterator[str]:
    """Text of training documents, all of it or SAMPLE_BYTES from 256 parts that lie all over the input."""
    parts = [part for unit in plan.units for part in unit]
    if plan.text_bytes > SAMPLE_BYTES:
        parts.sort(
            key=lambda part: hashlib.sha256(
                f"{part.file.name}\0{part.start}".encode("utf-8", "surrogateescape")
            ).digest()
        )
        parts = parts[:256]
    share = max(SAMPLE_BYTES // len(parts), 1)
    left = SAMPLE_BYTES if plan.text_bytes <= SAMPLE_BYTES else 0
    dropped: collections.Counter[str] = collections.Counter()
    read, found = 0, False
    for part in parts:
        left += share if plan.text_bytes > SAMPLE_BYTES else 0
        for document in read_part(part, plan.request.text_field):
            if left <= 0:
                break
            read += 1
            if document.text is None:
                dropped[document.dropped] += 1
            # Validation text is held out of everything that is fitted to text.
            if document.text is not None and not is_validation(document.text, plan.request.validation_fraction):
                text = document.text[:left]
                left -= len(text.encode())
                found = True
                yield text
    if not found:
        raise fruitless.no_document(plan.request.input, plan.request.text_field, read, dropped)


def _stage(plan: Plan, work: pathlib.Path) -> Stage:
    return Stage(
        seed=plan.request.seed,
        block=plan.request.block,
        num_train_shards=plan.num_train_shards,
        num_validation_shards=plan.num_validation_shards,
        validation_fraction=plan.request.validation_fraction,
        text_field=plan.request.text_field,
        tokenizer=str(work / "tokenizer"),
    )


def _units_to_tokenize(plan: Plan, stage: Stage, work: pathlib.Path) -> list[jobs.Task]:
    units = [work / f"unit-{i:05d}" for i in range(len(plan.units))]
    return [
        jobs.Task(tokenize_unit, (parts, stage, unit), unit, unit.with_suffix(".done.json"))
        for parts, unit in zip(plan.units, units, strict=True)
    ]


def _tokenize(plan: Plan, tasks: list[jobs.Task], workers: int, watch: Watch) -> dict[str, Any]:
    total: collections.Counter[str] = collections.Counter()
    dropped: collections.Counter[str] = collections.Counter()
    for _, counts in watch("tokenizing", len(tasks), jobs.run(tasks, workers)):
        dropped.update(counts.pop("dropped"))
        total.update(counts)
    if not total["train"]:
        raise fruitless.no_document(plan.request.input, plan.request.text_field, total["read"], dropped)
    return {**total, "dropped": dict(sorted(dropped.items()))}


def _assemble(
    plan: Plan, stage: Stage, units: list[pathlib.Path], workers: int, watch: Watch, work: pathlib.Path
) -> list[ShardEntry]:
    tasks = []
    for split, folder in plan.folders.items():
        folder.mkdir(exist_ok=True)
        count = plan.num_validation_shards if split == "validation" else plan.num_train_shards
        for i in range(count):
            output = folder / f"shard-{i:05d}-of-{count:05d}.arrayrecord"
            arguments = (len(tasks), units, stage, output)
            tasks.append(jobs.Task(assemble_shard, arguments, output, work / f"shard-{len(tasks):05d}.done.json"))
    entries = dict(watch("writing shards", len(tasks), jobs.run(tasks, workers)))
    return [ShardEntry(**entries[i]) for i in range(len(tasks))]


def _manifests(plan: Plan, tokenizer: TextTokenizer, counts: dict, entries: list[ShardEntry]) -> list[Manifest]:
    manifests = []
    for split in plan.folders:
        cut = plan.num_train_shards
        shards = entries[cut:] if split == "validation" else entries[:cut]
        kept = counts["validation" if split == "validation" else "train"]
        tokens = sum(shard.tokens for shard in shards)
        if not any(shard.records for shard in shards):
            documents = counts["train"] + counts["validation"]
            raise fruitless.no_record(split, tokens, len(shards), plan.request.block, documents)
        manifests.append(
            Manifest(
                block=plan.request.block,
                dtype=token_dtype(tokenizer.vocab_size).name,
                seed=plan.request.seed,
                split=split,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
                shards=tuple(shards),
                inputs=tuple(InputEntry(file.name, file.bytes) for file in plan.files),
                ignored_files=plan.ignored,
                documents_read=counts["read"],
                documents_kept=kept,
                documents_in_other_split=counts["train"] + counts["validation"] - kept,
                documents_dropped=counts["dropped"],
                unknown_tokens=counts["unknown_tokens"],
                settings=plan.settings,
            )
        )
    return manifests
