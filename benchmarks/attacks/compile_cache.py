"""One bit of one compiled program of a small run is flipped, and the run started in a process of its own."""

import pathlib
import random
import shutil

from attacks.small_run import ended, experiment, fork, learned, prepared, train
from attacks.tries import Outcome, Try
from phijax.training.compile_cache import FOLDER


def ready(folder: pathlib.Path) -> Try:
    prepared(folder)
    config = experiment(folder, steps=3, every=1000)
    before = folder / "before"
    code, said = _start(config, before)
    expected = learned(before)
    if code or not expected:
        raise RuntimeError(said)

    def attempt(number: int, chance: random.Random) -> Outcome:
        workdir = folder / str(number)
        where = _flipped(before / FOLDER, workdir / FOLDER, chance)
        code, said = _start(config, workdir)
        dropped = "is dropped, its program compiled anew" in said
        crashed = code != 0
        if crashed:
            code, said = _start(config, workdir)
        same = learned(workdir) == expected
        shutil.rmtree(workdir)
        came = "dropped, and said" if dropped else "passed over"
        if code or not same:
            came = "crashed twice" if code else "other losses"
        elif crashed:
            came += "; the first start crashed"
        return Outcome("a compiled program", came, bool(code) or not same, f"{where}\n{said[-2000:]}")

    return attempt


def _start(config: pathlib.Path, workdir: pathlib.Path) -> tuple[int, str]:
    log = workdir.with_suffix(".txt")
    code = ended(fork(train(config, workdir), log))
    return code, log.read_text(errors="replace")


def _flipped(source: pathlib.Path, target: pathlib.Path, chance: random.Random) -> str:
    """Copies a folder with one bit changed, every bit of it as likely. -> which."""
    shutil.copytree(source, target)
    files = sorted(target.iterdir())
    (file,) = chance.choices(files, [path.stat().st_size for path in files])
    data = bytearray(file.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return f"bit {bit} of {file.name}"
