"""Prints what is in shards or a checkpoint: python -m phijax.show PATH [--rows=3] [--verify]

PATH is a folder of token shards, a run's workdir or its checkpoints, a Hugging Face folder or a GGUF file. Of shards:
the manifest as a table, and rows decoded, with a mark where a document begins. Of a run: every step. Of others: the
model.
"""

import os
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags
from etils import epath

from phijax import command
from phijax.curation.dropped import said
from phijax.data.shard_manifest import MANIFEST_FILE, Manifest
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.storage.named import named
from phijax.text.tokenizer import TextTokenizer

FLAGS = flags.FlagValues()
flags.DEFINE_integer("rows", 3, "rows to decode, from all over the shards", flag_values=FLAGS)
flags.DEFINE_boolean("verify", False, "read every shard and compare its sha256", flag_values=FLAGS)

_SHARDS_LISTED = 10


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UserError("Give one folder of shards, or one checkpoint: python -m phijax.show PATH")
    if FLAGS.rows < 0:
        raise UserError(f"--rows={FLAGS.rows} must be 0 or more.")
    folder = epath.Path(named(arguments[0]))
    if not folder.exists():
        raise UserError(f"{folder} does not exist.")
    if not folder.is_dir():
        print("\n".join(_model(folder)))
        return
    splits = [folder / name for name in ("train", "validation") if (folder / name / MANIFEST_FILE).exists()]
    if _is_shards(folder):
        _show_shards(folder)
    elif splits:
        for split in splits:
            _show_shards(split)
    elif (steps := _steps_of(folder)) is not None:
        # Imported here: it brings jax, seconds that a look at shards need not wait.
        from phijax.checkpoint.reading import describe

        print(describe(steps))
    elif (folder / "config.json").exists() or any(path.suffix == ".gguf" for path in folder.iterdir()):
        print("\n".join(_model(folder)))
    else:
        raise UserError(
            f"{folder} holds neither token shards ({MANIFEST_FILE} by phijax.prepare) nor checkpoints (a workdir, "
            "numbered folders, a Hugging Face folder, a GGUF file). "
            f"It has: {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}."
        )


def _is_shards(folder: epath.Path) -> bool:
    # A step of a checkpoint has a manifest too, but no tokenizer beside it.
    return (folder / MANIFEST_FILE).exists() and not (folder / "state").exists()


def _is_checkpoints(folder: epath.Path) -> bool:
    """A step's folder, or one with steps in it."""
    return (folder / MANIFEST_FILE).exists() or any(
        path.name.isdigit() and (path / MANIFEST_FILE).exists() for path in folder.iterdir()
    )


def _steps_of(folder: epath.Path) -> epath.Path | None:
    """The folder itself, or the one of a run's workdir, that has steps."""
    return next((path for path in (folder, folder / "checkpoints") if path.is_dir() and _is_checkpoints(path)), None)


def _model(path: epath.Path) -> list[str]:
    """What a checkpoint of others is, as lines; its weights are not read."""
    from phijax.interchange.open import open_checkpoint
    from phijax.planning.summary import describe_model

    opened = open_checkpoint(path)
    try:
        tokenizer = f"{opened.tokenizer().vocab_size:,} ids"
    except UserError as error:
        tokenizer = f"none: {str(error).splitlines()[0]}"
    return [
        f"{opened.path}: a {opened.kind} checkpoint",
        *describe_model(opened.model),
        f"tokenizer: {tokenizer}; begins texts with {list(opened.begin)}, ends them with {list(opened.stop_ids)}",
        f"chat template: {'none' if opened.chat_template is None else f'{len(opened.chat_template):,} characters'}",
    ]


def _show_shards(folder: epath.Path) -> None:
    shards = Shards.open(folder)
    print("\n".join(_table(os.fspath(folder), shards.manifest)))
    if FLAGS.verify:
        shards.verify()
        print("Every shard has the sha256 of the manifest.")
    for text in decoded_rows(shards, FLAGS.rows):
        print(f"\n{text}")
    sys.stdout.flush()


def _table(folder: str, manifest: Manifest) -> list[str]:
    """The manifest for people: a line a number, then the shards."""
    dropped = "".join(f", {count:,} {reason}" for reason, count in manifest.documents_dropped.items()) or ", 0"
    places = manifest.documents_dropped_at
    ignored = f", {len(manifest.ignored_files)} ignored" if manifest.ignored_files else ""
    rows = [
        ("shards", f"{folder} ({manifest.split})"),
        ("records", f"{manifest.num_records:,} of {manifest.block} + 1 tokens, {manifest.dtype}"),
        ("tokens", f"{manifest.num_tokens:,}, {manifest.num_tail_tokens:,} of them lost in the tails of shards"),
        ("documents", f"{manifest.documents_kept:,} here, {manifest.documents_in_other_split:,} in the other split"),
        ("dropped", f"{dropped[2:]}, of {manifest.documents_read:,} read"),
        *(("  as", f"{reason}: {said(places, reason)}") for reason in places),
        *(("skipped", f"{name} {why}") for name, why in list(manifest.files_skipped.items())[:_SHARDS_LISTED]),
        ("input", f"{len(manifest.inputs)} files, {sum(entry.bytes for entry in manifest.inputs):,} bytes{ignored}"),
        ("tokenizer", f"{manifest.vocab_size:,} ids, fingerprint {manifest.tokenizer_fingerprint[:12]}"),
        ("digest", manifest.digest[:12]),
        ("seed", str(manifest.seed)),
    ]
    lines = [f"{name:<11}{value}" for name, value in rows]
    lines += ["", f"{'file':<42}{'records':>10}{'documents':>11}{'tokens':>14}{'bytes':>14}"]
    for shard in manifest.shards[:_SHARDS_LISTED]:
        lines.append(f"{shard.file:<42}{shard.records:>10,}{shard.documents:>11,}{shard.tokens:>14,}{shard.bytes:>14,}")
    if len(manifest.shards) > _SHARDS_LISTED:
        lines.append(f"and {len(manifest.shards) - _SHARDS_LISTED} more")
    return lines


def decoded_rows(shards: Shards, count: int) -> Iterator[str]:
    """Text of `count` records from all over the shards, each under a line that says which, documents marked."""
    tokenizer = shards.tokenizer()
    ends = np.cumsum(shards.records_per_shard)
    count = min(count, shards.num_records)
    for i in range(count):
        record = i * shards.num_records // count
        shard = int(np.searchsorted(ends, record, side="right"))
        record -= int(ends[shard] - shards.records_per_shard[shard])
        ((tokens, starts),) = shards.read(shard, [record])
        head = f"--- record {record} of {shards.manifest.shards[shard].file}: {starts.sum()} documents begin ---"
        yield f"{head}\n{_decoded(tokenizer, tokens, starts)}"


def _decoded(tokenizer: TextTokenizer, tokens: np.ndarray, starts: np.ndarray) -> str:
    pieces = []
    borders = np.flatnonzero(starts)
    for ids in np.split(tokens, borders[borders > 0]):
        text = tokenizer.decode(ids.tolist())
        # Text of strangers may hold sequences that move the cursor or rename the terminal.
        pieces.append("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text))
    first = "[document begins]\n" if starts[0] else "[document goes on]\n"
    return first + "\n[document begins]\n".join(pieces)


if __name__ == "__main__":
    command.run(main, FLAGS)
