"""One bit of one file is flipped: it is refused by name, or what is read is bit for bit what was written."""

import dataclasses
import hashlib
import json
import pathlib
import random
import re
import shutil
import warnings
from collections.abc import Callable

from attacks import small_run
from attacks.small_run import STEPS, ended, fork, learned
from attacks.tries import Outcome, Try

_RESUMED = 8  # every so many flips of a run's checkpoint the run goes on, which takes longer than opening it
EXPORTS = ("phijax", "hf", "gguf")
# Formats of others, which have no digests: a bit of a weight is another weight, of a setting another setting.
_WITHOUT_DIGESTS = ("hf", "gguf")


@dataclasses.dataclass(frozen=True)
class _Target:
    """folder: what is damaged. read: gives its content, or raises UserError. right: may be given, undamaged first."""

    name: str
    folder: pathlib.Path
    read: Callable[[pathlib.Path], str]
    right: list[str]


def ready(folder: pathlib.Path) -> Try:
    small_run.prepared(folder)
    config = small_run.experiment(folder)
    workdir = folder / "run"
    if ended(fork(small_run.train(config, workdir), folder / "run.txt")):
        raise RuntimeError((folder / "run.txt").read_text())
    expected = learned(workdir)
    steps = workdir / "checkpoints"
    for step in range(small_run.EVERY, STEPS - small_run.EVERY, small_run.EVERY):
        shutil.rmtree(steps / str(step))
    targets = [
        _target("checkpoint", steps / str(STEPS), lambda _: content(workdir), [steps / str(STEPS - small_run.EVERY)]),
        _target("shards", folder / "shards", records),
    ]
    for kind in EXPORTS:
        _export(workdir, folder / kind, kind, folder)
        targets.append(_target(f"export {kind}", folder / kind, content))

    def attempt(number: int, chance: random.Random) -> Outcome:
        target = targets[number % len(targets)]
        resumed = target.name == "checkpoint" and number // len(targets) % _RESUMED == 0
        files = sorted(path for path in target.folder.rglob("*") if path.is_file())
        # A file of each size as often as one of another: else the weights alone would be hit.
        file = chance.choice(files)
        before = file.read_bytes()
        if not before:
            return Outcome(target.name, "an empty file")
        bit = chance.randrange(8 * len(before))
        data = bytearray(before)
        data[bit // 8] ^= 1 << bit % 8
        where = f"bit {bit} of {file.relative_to(folder)}"
        try:
            file.write_bytes(data)
            if resumed:
                return _resumed(config, workdir, folder / "resumed", expected, where)
            return _judged(target, file, where, folder / "said.txt")
        finally:
            file.write_bytes(before)

    return attempt


def _target(name: str, folder: pathlib.Path, read: Callable, others: list[pathlib.Path] | None = None) -> _Target:
    log = folder.parent / "right.txt"
    right = []
    for place in (folder, *(others or [])):
        reader = content if others else read
        if ended(fork(lambda place=place, reader=reader: print(reader(place), flush=True), log)):
            raise RuntimeError(log.read_text())
        right.append(log.read_text().splitlines()[-1])
    log.unlink()
    return _Target(name, folder, read, right)


def _judged(target: _Target, file: pathlib.Path, where: str, log: pathlib.Path) -> Outcome:
    from phijax.errors import UserError

    def work() -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found = target.read(target.folder)
            except UserError as error:
                print(json.dumps({"refused": str(error)}), flush=True)
                return
        print(json.dumps({"found": found, "said": [str(each.message) for each in said]}), flush=True)

    code = ended(fork(work, log))
    text = log.read_text(errors="replace")
    if code:
        return Outcome(target.name, f"ended with {code}", True, f"{where}\n{text[-2000:]}")
    answer = json.loads(text.splitlines()[-1])
    if "refused" in answer:
        return refused(target.name, target.folder, file, where, answer["refused"])
    if answer["found"] == target.right[0]:
        return Outcome(target.name, "bit-equal", detail=where)
    if answer["found"] in target.right[1:] and any(str(target.folder) in text for text in answer["said"]):
        return Outcome(target.name, "named, and the step before taken", detail=where)
    without = target.name.removeprefix("export ") in _WITHOUT_DIGESTS
    return Outcome(target.name, "something else is read, without a word", not without, f"{where}\n{answer['said']}")


def refused(what: str, folder: pathlib.Path, file: pathlib.Path, where: str, said: str) -> Outcome:
    """By the name of the file, of its folder alone, which leaves people to search, or of neither."""
    inside = said.replace(str(folder), "")  # a file may be called as a part of its folder's path
    if re.search(rf"(?<![\w.]){re.escape(file.name)}(?!\w)", inside):
        return Outcome(what, "refused by name", detail=where)
    if str(folder) in said:
        return Outcome(what, "refused by its folder's name alone", detail=f"{where}\n{said}")
    return Outcome(what, "refused without its name", True, f"{where}\n{said}")


def _resumed(config, workdir: pathlib.Path, copy: pathlib.Path, expected: dict, where: str) -> Outcome:
    """The run goes on from its newest step; that it was the last one makes no difference to what is believed."""
    shutil.copytree(workdir, copy, symlinks=True)
    log = copy.with_suffix(".txt")
    try:
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(lines[: STEPS - small_run.EVERY]))
        code, said = ended(fork(small_run.train(config, copy), log)), log.read_text(errors="replace")
        here = f"{where}\n{said[-2000:]}"
        if code == 2 and "Traceback" not in said and str(copy / "checkpoints") in said:
            return Outcome("resumed", "refused by name", detail=here)
        if code:
            return Outcome("resumed", f"ended with {code}", True, here)
        named = "is damaged" in said
        same = learned(copy) == expected if named else small_run.state(copy, STEPS) == small_run.state(workdir, STEPS)
        came = "named, and gone on from the step before" if named else "bit-equal"
        return Outcome("resumed", came if same else "another run", not same, here)
    finally:
        shutil.rmtree(copy)


def _export(workdir: pathlib.Path, output: pathlib.Path, kind: str, folder: pathlib.Path) -> None:
    from phijax import export

    def work() -> None:
        export.FLAGS(["export", f"--checkpoint={workdir}", f"--format={kind}", f"--output={output}"])
        export.main([])

    log = folder / "export.txt"
    if ended(fork(work, log)):
        raise RuntimeError(log.read_text())


def content(path: pathlib.Path) -> str:
    """One digest of all that a checkpoint gives: its model, weights, ids, template, tokenizer."""
    from phijax.interchange.open import open_checkpoint
    from phijax.interchange.weight_source import blocks

    opened = open_checkpoint(path)
    tokenizer = opened.tokenizer()
    said = [opened.model, opened.begin, opened.stop_ids, opened.chat_template, tokenizer.fingerprint]
    digest = hashlib.sha256(repr(said).encode())
    for leaf, shape in sorted(opened.weights.shapes().items()):
        for index in blocks(shape, 4):
            digest.update(opened.weights.read(leaf, index).tobytes())
    return digest.hexdigest()


def records(folder: pathlib.Path) -> str:
    """One digest of all that training reads of shards, their files compared with the manifest as a run does."""
    from phijax.data.shards import Shards

    shards = Shards.open(folder)
    shards.verify()
    digest = hashlib.sha256(repr([shards.block, shards.vocab_size, shards.tokenizer_fingerprint]).encode())
    for number, count in enumerate(shards.records_per_shard):
        for tokens, starts in shards.read(number, range(count)):
            digest.update(tokens.tobytes() + starts.tobytes())
    return digest.hexdigest()
