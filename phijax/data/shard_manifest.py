"""manifest.json of a shards folder: what is in it, of what it was made, what was dropped and why."""

import dataclasses
import hashlib
import json
import re
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.storage.regular_files import read_bounded

MANIFEST_FILE = "manifest.json"
FORMAT = "phijax token shards"
VERSION = 1
LONGEST = 1 << 28  # bytes: every input file has a line
DTYPES = {"uint16": 1 << 16, "uint32": 1 << 31}  # and how many ids each can hold (tokens become int32)


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One shard file. records * block + 1 + tail_tokens == tokens, unless there are no records."""

    file: str
    records: int
    tokens: int  # of its documents, end-of-text included
    tail_tokens: int  # of these, not stored: the end of the shard that fills no record
    documents: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class InputEntry:
    """One file that was read, its name relative to the input folder."""

    file: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that training and a reader need to know about a folder of shards."""

    block: int
    dtype: str
    seed: int
    split: str  # "all", "train" or "validation"
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_text: int
    shards: tuple[ShardEntry, ...]
    inputs: tuple[InputEntry, ...]
    ignored_files: tuple[str, ...]  # in the input folder, of no kind that is read
    documents_read: int
    documents_kept: int  # in this folder
    documents_in_other_split: int
    documents_dropped: dict[str, int]  # reason -> how many
    unknown_tokens: int  # <unk> of a tokenizer without byte fallback
    settings: dict[str, Any]  # how it was made
    # Later than others: manifests that lack them are read.
    # Reason -> "first": where the first hundred are ({"file", "line"}), "files": how many in each file.
    documents_dropped_at: dict[str, Any] = dataclasses.field(default_factory=dict)
    files_skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # that could not be read -> why

    @property
    def num_records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, the dropped tails included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_tail_tokens(self) -> int:
        return sum(shard.tail_tokens for shard in self.shards)

    @property
    def digest(self) -> str:
        """sha256 over what decides the rows: shard names, counts and digests in order, block, dtype, tokenizer."""
        decides = [self.block, self.dtype, self.tokenizer_fingerprint, self.vocab_size]
        decides += [[shard.file, shard.records, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"


def read_manifest(folder: epath.Path) -> Manifest:
    """Raises UserError when there is none, or it is not one, or of another version."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise UserError(_no_shards(folder))
    try:
        found = json.loads(read_bounded(path, LONGEST))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}). Prepare the shards again, or copy them again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of token shards: its format is not {FORMAT!r}.")
    if found.get("version") != VERSION:
        raise UserError(f"{path} has version {found.get('version')}; this phijax reads version {VERSION}.")
    try:
        later = {"documents_dropped_at": {}, "files_skipped": {}}
        values = {field.name: (later | found)[field.name] for field in dataclasses.fields(Manifest)}
        values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
        values["inputs"] = tuple(InputEntry(**entry) for entry in values["inputs"])
        values["ignored_files"] = tuple(values["ignored_files"])
        manifest = Manifest(**values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}. Prepare the shards again, or copy them again.") from error
    _check(manifest, path)
    return manifest


def _no_shards(folder: epath.Path) -> str:
    if not folder.exists():
        return f"No shards at {folder}: there is no such folder."
    splits = [name for name in ("train", "validation") if (folder / name / MANIFEST_FILE).exists()]
    if splits:
        return f"{folder} is split: take {' or '.join(str(folder / name) for name in splits)}."
    return (
        f"No shards at {folder}: it has no {MANIFEST_FILE}, which `python -m phijax.prepare` writes last. "
        "If a preparation was stopped, start the same command again."
    )


def _check(manifest: Manifest, path: epath.Path) -> None:
    """What reading relies on; a manifest may come from anybody."""
    problems = []
    for field in dataclasses.fields(Manifest):
        if field.type is int and type(getattr(manifest, field.name)) is not int:
            problems.append(f"{field.name} is not a whole number")
    if not problems and manifest.block < 1:
        problems.append(f"block is {manifest.block}")
    if not _are_places(manifest.documents_dropped_at):
        problems.append("documents_dropped_at is no list of places")
    if manifest.dtype not in DTYPES:
        problems.append(f"dtype is {manifest.dtype!r}")
    elif not problems and not 0 < manifest.vocab_size <= DTYPES[manifest.dtype]:
        problems.append(f"vocab_size is {manifest.vocab_size}, which {manifest.dtype} does not hold")
    names = [shard.file for shard in manifest.shards]
    if len(set(map(str, names))) < len(names):
        problems.append("a shard is named twice")
    for shard in manifest.shards:
        # A name with a path in it could point at any file of the reader's.
        if type(shard.file) is not str or not re.fullmatch(r"[\w-][\w.-]*", shard.file):
            problems.append(f"{shard.file!r} is no name of a shard")
        counts = (shard.records, shard.tokens, shard.tail_tokens, shard.documents, shard.bytes)
        if not all(type(count) is int and count >= 0 for count in counts):
            problems.append(f"the counts of {shard.file!r} are not whole numbers")
    if problems:
        raise UserError(f"{path} is damaged: {'; '.join(problems[:3])}. Prepare the shards again, or copy them again.")


def _are_places(found: Any) -> bool:
    """As `Manifest.documents_dropped_at` has them, a place at least for each reason."""
    if not isinstance(found, dict) or not all(isinstance(of_reason, dict) for of_reason in found.values()):
        return False
    for of_reason in found.values():
        first, files = of_reason.get("first"), of_reason.get("files")
        if not isinstance(files, dict) or not isinstance(first, list) or not first:
            return False
        if not all(isinstance(place, dict) and isinstance(place.get("file"), str) for place in first):
            return False
    return True
