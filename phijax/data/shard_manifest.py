"""manifest.json of a shards folder: what is in it, of what it was made, what was dropped and why."""

import dataclasses
import hashlib
import json
import re
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.storage import strict_json
from phijax.storage.strict_json import Fields

MANIFEST_FILE = "manifest.json"
FORMAT = "phijax token shards"
VERSION = 1
_LONGEST = 1 << 28  # bytes; 100,000 shards take 32 MB, a million input files 83 MB
_MOST = 1 << 62
LARGEST_SEED = _MOST
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
        return _manifest(strict_json.read(path, _LONGEST, half_characters=True))
    except UserError as error:
        raise UserError(f"{error} Prepare the shards again, or copy them again.") from error


def _manifest(found: Fields) -> Manifest:
    """What reading relies on is checked; a manifest may come from anybody. Raises: UserError."""
    if found.text("format", "") != FORMAT:
        raise UserError(f"{found.file} is not the manifest of token shards: its format is not {FORMAT!r}.")
    if (version := found.integer("version")) != VERSION:
        raise UserError(f"{found.file} has version {version}; this phijax reads version {VERSION}.")
    dtype = found.text("dtype")
    if dtype not in DTYPES:
        raise found.refusal("dtype", f"one of {', '.join(DTYPES)}")
    counts = ("documents_read", "documents_kept", "documents_in_other_split", "unknown_tokens")
    vocab_size = found.integer("vocab_size", least=1, most=DTYPES[dtype])
    shards = tuple(map(_shard, found.objects("shards")))
    if len({shard.file for shard in shards}) < len(shards):
        raise UserError(f"{found.file}: a shard is named twice.")
    return Manifest(
        block=found.integer("block", least=1),
        dtype=dtype,
        seed=found.integer("seed", least=-_MOST, most=LARGEST_SEED),
        split=found.text("split"),
        tokenizer_fingerprint=found.text("tokenizer_fingerprint"),
        vocab_size=vocab_size,
        end_of_text=found.integer("end_of_text", most=vocab_size - 1),
        shards=shards,
        inputs=tuple(InputEntry(e.text("file"), e.integer("bytes", most=_MOST)) for e in found.objects("inputs")),
        ignored_files=tuple(found.texts("ignored_files")),
        documents_dropped=_counts(found.object("documents_dropped")),
        settings=dict(found.object("settings").values),
        documents_dropped_at=_places(found.object("documents_dropped_at", Fields({}, found.file))),
        files_skipped=_texts(found.object("files_skipped", Fields({}, found.file))),
        **{name: found.integer(name, most=_MOST) for name in counts},
    )


def _shard(entry: Fields) -> ShardEntry:
    # A name with a path in it could point at any file of the reader's.
    if not re.fullmatch(r"[\w-][\w.-]*", entry.text("file")):
        raise entry.refusal("file", "the name of a file in this folder")
    numbers = ("records", "tokens", "tail_tokens", "documents", "bytes")
    counts = {name: entry.integer(name, most=_MOST) for name in numbers}
    entry.only(*(field.name for field in dataclasses.fields(ShardEntry)))
    return ShardEntry(entry.text("file"), sha256=entry.text("sha256"), **counts)


def _counts(found: Fields) -> dict[str, int]:
    return {name: found.integer(name, most=_MOST) for name in found.values}


def _texts(found: Fields) -> dict[str, str]:
    return {name: found.text(name) for name in found.values}


def _places(found: Fields) -> dict[str, Any]:
    """As `Manifest.documents_dropped_at` has them, a place at least for each reason."""
    for reason in map(found.object, found.values):
        _counts(reason.object("files"))
        if not (first := reason.objects("first")):
            raise reason.refusal("first", "a list of places")
        for place in first:
            place.text("file"), place.integer("line", None, most=_MOST)
    return dict(found.values)


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
