"""From raw text to a folder of token shards: plan, tokenizer, both stages, the manifest last. Can be started again."""

import contextlib
import dataclasses
import fcntl
import hashlib
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from phijax.curation import fruitless, jobs, unfinished
from phijax.curation.documents import BrokenFile, InputFile, Part, find_inputs, parts_of, read_part
from phijax.curation.dropped import Found, OfPart, Total, merged, why_none
from phijax.curation.fruitless import Fruitless
from phijax.curation.given_tokenizer import open_given
from phijax.curation.tokenize_shards import Stage, assemble_shard, is_validation, tokenize_unit
from phijax.curation.unfinished import Units, Wanted, marker
from phijax.data.shard_manifest import LARGEST_SEED, MANIFEST_FILE, InputEntry, Manifest, ShardEntry, read_manifest
from phijax.data.shards import Shards, token_dtype
from phijax.errors import UserError
from phijax.storage import atomic
from phijax.storage.durable import check_text
from phijax.text.tokenizer import TextTokenizer
from phijax.text.train_tokenizer import train_tokenizer

UNIT_BYTES = 32 << 20  # of input, tokenized by one process at a time: some ten seconds
SHARD_BYTES = 128 << 20  # of text in a shard when their number is not given; its tokens are held in memory
SAMPLE_BYTES = 64 << 20  # of text that a tokenizer is trained on, at most: half a minute, 0.8 GB of memory
COMPRESSION = 3.5  # text bytes for a byte of a compressed file, about
BYTES_PER_TOKEN = 3.5  # about
_WORK = unfinished.FOLDER

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
    skip_broken: bool = False  # files that cannot be read are left out, and counted


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
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)  # files that cannot be opened, and why

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
    check_text(request.output)
    skipped: dict[str, str] = {}

    def broken(name: str, error: BrokenFile) -> None:
        if not request.skip_broken:
            raise error
        skipped[name] = error.why

    files, ignored = find_inputs(request.input, outside=request.output, broken=broken)
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
        skipped=skipped,
    )


def finished(plan: Plan) -> list[Manifest] | None:
    """The manifests of an output that is complete and is what `plan` would make. Raises UserError if it is another."""
    output = pathlib.Path(plan.request.output)
    found = {split: path for split, path in _possible_folders(output).items() if (path / MANIFEST_FILE).exists()}
    if not found or (output / _WORK / unfinished.PLAN_FILE).exists():
        return None
    manifests = {split: read_manifest(epath.Path(path)) for split, path in found.items()}
    first = next(iter(manifests.values()))
    inputs = {entry.file: entry.bytes for entry in first.inputs}
    changes = unfinished.inputs_that_differ(inputs, {file.name: file.bytes for file in plan.files})
    unfinished.refuse(output, [*unfinished.settings_that_differ(first.settings, plan.settings), *changes.values()])
    return [Shards.open(folder).manifest for folder in plan.folders.values()]


def prepare(plan: Plan, workers: int, watch: Watch, say: Callable[[str], None] = lambda line: None) -> list[Manifest]:
    """Does it, or what is left to do of it. Returns the manifest of each folder written: train, validation.

    Killed at any instant and started again it gives the same bytes. Where the input has changed meanwhile, `say` is
    told, and what did not change is not done again.
    Raises UserError for another plan's output, unreadable input, a full disk, text too short for one record.
    """
    if (manifests := finished(plan)) is not None:
        shutil.rmtree(pathlib.Path(plan.request.output) / _WORK, ignore_errors=True)  # killed while tidying up
        return manifests
    work = unfinished.claim(pathlib.Path(plan.request.output))
    with _only_one(work):
        unfinished.wait_for_workers(work)
        units = _units_of(plan, work, say)
        unfinished.try_skipped_again(work, units)
        _remove_temporary_files(plan, work)
        try:
            tokenizer = _tokenizer(plan, work, watch)
            stage = _stage(plan, work)
            tasks = list(_tasks(units, stage, work).values())
            total = _tokenize(plan, tasks, workers, watch, work)
            entries = _assemble(plan, stage, [task.output for task in tasks], workers, watch, work)
            manifests = _manifests(plan, tokenizer, total, entries)
        except Fruitless:
            fruitless.discard(plan.folders.values(), work)
            raise
        for folder, manifest in zip(plan.folders.values(), manifests, strict=True):
            tokenizer.save(folder)
            atomic.write_bytes(folder / MANIFEST_FILE, manifest.to_json().encode())
        (work / unfinished.PLAN_FILE).unlink()  # from here on the output is complete, the rest is tidying up
    shutil.rmtree(work)
    return manifests


def prepare_part(
    plan: Plan, workers: int, watch: Watch, part: int, parts: int, say: Callable[[str], None] = lambda line: None
) -> int:
    """Tokenizes every `parts`-th unit, from `part` on; returns how many. For machines that share the output's disk.

    Parts may run at once and in any order; `prepare` of the same plan then finds their work done and does the rest.
    Raises UserError as `prepare`, and without a given tokenizer: a trained one would have to be trained first.
    """
    if plan.given_tokenizer is None:
        raise UserError("A part needs --tokenizer=FOLDER, the same for all. Train one with a first, small output.")
    if finished(plan) is not None:
        return 0
    work = unfinished.claim(pathlib.Path(plan.request.output))
    with open(work / "setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all parts have the same plan and tokenizer: the first writes both
        units = _units_of(plan, work, say)
        _tokenizer(plan, work, watch)
    with _only_one(work, but_parts=True):
        # By number, which a unit keeps: parts that saw the input before and after a change do not do the same.
        tasks = [task for n, task in _tasks(units, _stage(plan, work), work).items() if n % parts == part]
        return sum(1 for _ in watch("tokenizing", len(tasks), jobs.run(tasks, workers, _held(work))))


def _check(request: Request) -> None:
    if "://" in request.output:
        raise UserError(f"--output={request.output} is not a local folder. Prepare locally, then copy the folder.")
    for name, least in (("block", 1), ("num_shards", 1), ("seed", 0)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} must be {least} or more.")
    if request.seed > LARGEST_SEED:
        raise UserError(f"--seed={request.seed} must be {LARGEST_SEED:,} or less.")
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


def _units_of(plan: Plan, work: pathlib.Path, say: Callable[[str], None]) -> Units:
    """What is to be tokenized, by number; of an earlier start's what has not changed since."""
    parts = [part for unit in plan.units for part in unit]
    by_size = ["num_shards", "num_validation_shards"] if plan.request.num_shards is None else []
    return unfinished.go_on(work, Wanted(plan.settings, by_size, plan.files, parts, _units), say)


def _remove_temporary_files(plan: Plan, work: pathlib.Path) -> None:
    for path in (path for folder in (work, *plan.folders.values()) for path in folder.glob("*.tmp")):
        path.unlink()


def _tokenizer(plan: Plan, work: pathlib.Path, watch: Watch) -> TextTokenizer:
    folder, temporary = work / unfinished.TOKENIZER, work / "tokenizer_being_written"
    if not folder.exists():
        tokenizer = plan.given_tokenizer
        if tokenizer is None:
            texts = watch("reading text for the tokenizer", 0, _sample(plan))
            try:
                tokenizer = train_tokenizer(texts, plan.request.vocab_size)
            except UserError:
                (work / unfinished.PLAN_FILE).unlink()  # nothing is made yet: the next try may ask for something else
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
    share = max(SAMPLE_BYTES // max(len(parts), 1), 1)
    left = SAMPLE_BYTES if plan.text_bytes <= SAMPLE_BYTES else 0
    dropped, some = Found(), False
    for part in parts:
        left += share if plan.text_bytes > SAMPLE_BYTES else 0
        found = OfPart()
        try:
            for document in read_part(part, plan.request.text_field):
                if left <= 0:
                    break
                if document.text is None:
                    found.drop(document)
                # Validation text is held out of everything that is fitted to text.
                elif not is_validation(document.text, plan.request.validation_fraction):
                    text = document.text[:left]
                    left -= len(text.encode())
                    some = True
                    yield text
                else:
                    found.keep("validation", 0, 0)
        except BrokenFile as error:
            if not plan.request.skip_broken:
                raise
            dropped.skipped[part.file.name] = error.why
        dropped.add(part, found)
    if not some:
        raise _no_document(plan, merged([dropped.to_json()]))


def _stage(plan: Plan, work: pathlib.Path) -> Stage:
    return Stage(
        seed=plan.request.seed,
        block=plan.request.block,
        num_train_shards=plan.num_train_shards,
        num_validation_shards=plan.num_validation_shards,
        validation_fraction=plan.request.validation_fraction,
        text_field=plan.request.text_field,
        tokenizer=str(work / unfinished.TOKENIZER),
        skip_broken=plan.request.skip_broken,
    )


def _tasks(units: Units, stage: Stage, work: pathlib.Path) -> dict[int, jobs.Task]:
    files = {number: unfinished.unit_file(work, number) for number in units}
    return {
        number: jobs.Task(tokenize_unit, (parts, stage, files[number]), files[number], marker(files[number]))
        for number, parts in units.items()
    }


def _tokenize(plan: Plan, tasks: list[jobs.Task], workers: int, watch: Watch, work: pathlib.Path) -> Total:
    total = merged(counts for _, counts in watch("tokenizing", len(tasks), jobs.run(tasks, workers, _held(work))))
    if not total.counts["train"]:
        raise _no_document(plan, total)
    return total


def _held(work: pathlib.Path) -> pathlib.Path:
    return work / unfinished.WORKERS_LOCK


def _no_document(plan: Plan, total: Total) -> Fruitless:
    lines = "".join(f"\n  {line}" for line in why_none(total, plan.files))
    return Fruitless(
        f"No document of {total.counts['read']} in --input={plan.request.input} can be trained on.{lines}\n"
        f"In .jsonl and .parquet the text is looked for in --text_field={plan.request.text_field}."
    )


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
    entries = dict(watch("writing shards", len(tasks), jobs.run(tasks, workers, _held(work))))
    return [ShardEntry(**entries[i]) for i in range(len(tasks))]


def _manifests(plan: Plan, tokenizer: TextTokenizer, total: Total, entries: list[ShardEntry]) -> list[Manifest]:
    manifests, counts = [], total.counts
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
                documents_dropped=total.dropped,
                unknown_tokens=counts["unknown_tokens"],
                settings=plan.settings,
                documents_dropped_at=total.places,
                files_skipped=dict(sorted({**plan.skipped, **total.skipped}.items())),
            )
        )
    return manifests
