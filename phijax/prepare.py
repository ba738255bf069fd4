"""Raw text -> token shards: python -m phijax.prepare --input=GLOB_OR_FOLDER --output=DIR [--tokenizer=PATH]

Reads .txt and .md (a file is a document), .jsonl, .jsonl.gz, .jsonl.zst and .parquet (a row is one). Writes shards,
their manifest and their tokenizer into --output, or into --output/train and --output/validation. Started again after
it was stopped it goes on where it was, also after files were mended, added or left out; the result is the same to the
byte, whatever the number of processes. Several machines over one disk: --part=I/N on each, with --tokenizer, and at
the end once without. --on_error=skip leaves out files that are broken, and counts them.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from phijax import command
from phijax.curation import preparation
from phijax.curation.dropped import said
from phijax.data.shard_manifest import MANIFEST_FILE, Manifest
from phijax.errors import UserError

FLAGS = flags.FlagValues()
command.define_path("input", "a folder (with all below it), a file, or a quoted glob", FLAGS)
command.define_path("output", "a new or empty folder, or one to go on with", FLAGS)
command.define_path(
    "tokenizer",
    "folder with tokenizer.model or tokenizer.json, or a GGUF file; none: one is trained on the input",
    FLAGS,
)
flags.DEFINE_integer("vocab_size", 32011, "ids of a tokenizer trained here, phi-3's is 32011", flag_values=FLAGS)
flags.DEFINE_integer("block", 1024, "tokens in a record; rows of training are multiples of it", flag_values=FLAGS)
flags.DEFINE_integer("num_shards", None, "shard files for training; none: one for 128 MB of text", flag_values=FLAGS)
flags.DEFINE_float(
    "validation_fraction", 0.0, "share of documents held out, chosen by their text alone", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "of the order of documents", flag_values=FLAGS)
flags.DEFINE_string("text_field", "text", "key or column of the text in .jsonl and .parquet", flag_values=FLAGS)
flags.DEFINE_integer("workers", None, "processes; none: as many as there are cores", flag_values=FLAGS)
flags.DEFINE_string(
    "part", None, "I/N: only every N-th piece of the input, from I on (0 to N-1); then once without", flag_values=FLAGS
)
flags.DEFINE_enum(
    "on_error",
    "stop",
    ["stop", "skip"],
    "at a file that cannot be read: stop, or leave it out, count it and go on",
    flag_values=FLAGS,
)
flags.DEFINE_boolean("dry_run", False, "say what would be done, and write nothing", flag_values=FLAGS)

_FILES_LISTED = 20
_SECONDS_BETWEEN_LINES = 10


def main(arguments: list[str]) -> None:
    plan = preparation.make_plan(_request(arguments))
    workers = FLAGS.workers if FLAGS.workers is not None else _cores()
    if workers < 1:
        raise UserError(f"--workers={workers} must be 1 or more.")
    already = preparation.finished(plan) is not None
    if FLAGS.dry_run:
        print("\n".join(_described(plan, workers)))
        return
    started = time.monotonic()
    if FLAGS.part is not None:
        part, parts = _part(FLAGS.part)
        done = preparation.prepare_part(plan, workers, _watch, part, parts, _say)
        print(f"Part {part} of {parts}: {done} pieces. After all parts: the same command without --part.")
        return
    manifests = preparation.prepare(plan, workers, _watch, _say)
    print("\n".join(_summary(plan, manifests)))
    print("It was complete already." if already else f"Done in {time.monotonic() - started:.0f} s.")


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--part={text} is meant as I/N with I from 0 to N-1, such as --part=0/16.")
    return int(match[1]), int(match[2])


def _cores() -> int:
    """Those this process may use, where the system tells (macOS does not)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _request(arguments: list[str]) -> preparation.Request:
    if arguments:
        raise UserError(f"{arguments[0]!r} is no flag. A glob is quoted: --input='texts/*.jsonl'")
    for name in ("input", "output"):
        if not FLAGS[name].value:
            raise UserError(f"--{name} is missing. Usage: python -m phijax.prepare --input=GLOB_OR_FOLDER --output=DIR")
    if FLAGS.tokenizer and FLAGS["vocab_size"].present:
        raise UserError("--vocab_size is of a tokenizer trained here; with --tokenizer leave it out.")
    return preparation.Request(
        input=FLAGS.input,
        output=FLAGS.output,
        tokenizer=FLAGS.tokenizer,
        vocab_size=FLAGS.vocab_size,
        block=FLAGS.block,
        num_shards=FLAGS.num_shards,
        validation_fraction=FLAGS.validation_fraction,
        seed=FLAGS.seed,
        text_field=FLAGS.text_field,
        skip_broken=FLAGS.on_error == "skip",
    )


def _described(plan: preparation.Plan, workers: int) -> list[str]:
    request = plan.request
    lines = [f"{file.bytes:>15,}  {file.name}" for file in plan.files[:_FILES_LISTED]]
    if len(plan.files) > _FILES_LISTED:
        lines.append(f"{'':>15}  and {len(plan.files) - _FILES_LISTED} more")
    tokens = plan.text_bytes / preparation.BYTES_PER_TOKEN
    size = 2 if plan.given_tokenizer is None or plan.given_tokenizer.vocab_size <= 65536 else 4
    given = plan.given_tokenizer
    tokenizer = f"{request.tokenizer}, {given.vocab_size} ids" if given else f"trained here, {request.vocab_size} ids"
    existing = os.path.abspath(request.output)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    lines += [
        f"{sum(file.bytes for file in plan.files):>15,}  bytes in {len(plan.files)} files, {len(plan.ignored)} ignored",
        "",
        f"tokens     about {tokens:,.0f}, {tokens / request.block:,.0f} records of {request.block} + 1",
        f"tokenizer  {tokenizer}",
        f"shards     {plan.num_train_shards} for training, {plan.num_validation_shards} for validation",
        f"work       {len(plan.units)} parts over {workers} processes",
        # The tokens lie on disk twice for a while: as the parts were read, and as shards.
        f"disk       about {2 * size * tokens:,.0f} bytes, {shutil.disk_usage(existing).free:,} free at {existing}",
        "",
        "Nothing was written (--dry_run).",
    ]
    return lines


def _summary(plan: preparation.Plan, manifests: list[Manifest]) -> list[str]:
    first = manifests[0]
    lines = [f"documents  {first.documents_read:>15,}  read from {len(plan.files)} files"]
    for reason, count in first.documents_dropped.items():
        lines.append(f"           {count:>15,}  dropped: {reason}, as {said(first.documents_dropped_at, reason)}")
    for name, why in list(first.files_skipped.items())[:_FILES_LISTED]:
        lines.append(f"skipped    {name} {why}")
    if len(first.files_skipped) > _FILES_LISTED:
        lines.append(f"           {len(first.files_skipped):>15,}  files skipped in all, see {MANIFEST_FILE}")
    if plan.ignored:
        lines.append(f"files      {len(plan.ignored):>15,}  ignored, as {plan.ignored[0]}")
    if first.unknown_tokens:
        lines.append(f"tokens     {first.unknown_tokens:>15,}  unknown to the tokenizer, which has no byte fallback")
    for folder, manifest in zip(plan.folders.values(), manifests, strict=True):
        counted = [
            (manifest.documents_kept, "documents"),
            (manifest.num_tokens, f"tokens, {manifest.num_tail_tokens:,} of them lost in the tails of shards"),
            (manifest.num_records, f"records of {manifest.block} + 1 tokens in {len(manifest.shards)} shards"),
        ]
        lines += [str(folder), *(f"{'':<10} {count:>15,}  {what}" for count, what in counted)]
    lines.append(f"tokenizer  {first.vocab_size:>15,}  ids, fingerprint {first.tokenizer_fingerprint[:12]}")
    return lines


def _say(line: str) -> None:
    print(line, flush=True)


def _watch(doing: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
    """A bar on a terminal; elsewhere a line when it begins, every ten seconds, and when it is done."""
    if sys.stdout.isatty():
        import rich.progress

        yield from rich.progress.track(results, f"{doing:<32}", total=total or None)
        return
    started = spoken = time.monotonic()
    print(f"{doing} ...", flush=True)
    done = 0
    for result in results:
        yield result
        done += 1
        if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            print(f"{doing}: {done:,}{f' of {total:,}' if total else ''}, {spoken - started:.0f} s", flush=True)
    print(f"{doing}: {done:,} done, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    command.run(main, FLAGS)
