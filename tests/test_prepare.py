"""`python -m phijax.prepare` as people start it: real processes, killed and started again."""

import json
import os
import pathlib
import pydoc_data.topics
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from phijax.data.shards import Shards
from phijax.text.train_tokenizer import train_tokenizer

CHAPTERS = [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        rows = [json.dumps({"text": text}) for text in CHAPTERS[i::8]]
        (folder / f"{i}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CHAPTERS[:10], 500).save(folder)
    return folder


def command(*flags):
    return [sys.executable, "-m", "phijax.prepare", *map(str, flags)]


def prepare(*flags, **options):
    return subprocess.run(command(*flags), capture_output=True, text=True, **options)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_text_to_shards(texts, tmp_path):
    flags = f"--input={texts}", f"--output={tmp_path / 'out'}", "--vocab_size=1000", "--validation_fraction=0.2"
    result = prepare(*flags, "--block=128", "--dry_run")
    assert result.returncode == 0 and not (tmp_path / "out").exists()
    assert "0.jsonl" in result.stdout and "1000 ids" in result.stdout and "Nothing was written" in result.stdout
    result = prepare(*flags, "--block=128", "--workers=2")
    assert result.returncode == 0, result.stderr
    assert f"{len(CHAPTERS)}  read from 8 files" in result.stdout
    assert "writing shards: 2 done" in result.stdout and "\x1b" not in result.stdout  # plain lines in a log
    train, validation = (Shards.open(tmp_path / "out" / split) for split in ("train", "validation"))
    assert train.vocab_size == 1000 and train.block == 128
    assert train.manifest.documents_kept + validation.manifest.documents_kept == len(CHAPTERS)
    result = prepare(*flags, "--block=128")
    assert result.returncode == 0 and "It was complete already." in result.stdout
    result = prepare(*flags, "--block=64")
    assert result.returncode == 2 and "block: 128 there, 64 now" in result.stderr


def test_another_tokenizer_for_the_same_output_is_refused(texts, tokenizer, tmp_path):
    flags = f"--input={texts}", f"--output={tmp_path / 'out'}", "--workers=1"
    assert prepare(*flags, f"--tokenizer={tokenizer}").returncode == 0
    assert Shards.open(tmp_path / "out").vocab_size == 500
    train_tokenizer(CHAPTERS[:5], 500).save(tmp_path / "other")
    result = prepare(*flags, f"--tokenizer={tmp_path / 'other'}")
    assert result.returncode == 2
    assert "was made from something else" in result.stderr and "tokenizer:" in result.stderr
    assert "Traceback" not in result.stderr


def test_killed_at_random_instants_and_started_again(texts, tokenizer, tmp_path):
    flags = f"--input={texts}", f"--tokenizer={tokenizer}", "--block=64", "--num_shards=6", "--workers=2"
    assert prepare(*flags, f"--output={tmp_path / 'unbroken'}").returncode == 0
    draw = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command(*flags, f"--output={tmp_path / 'out'}"), stdout=subprocess.DEVNULL)
        wait_until((tmp_path / "out").exists)
        time.sleep(draw.uniform(0, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = prepare(*flags, f"--output={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_a_killed_worker_is_said_and_the_work_goes_on(texts, tokenizer, tmp_path):
    flags = f"--input={texts}", f"--tokenizer={tokenizer}", "--block=64", "--num_shards=6"
    process = subprocess.Popen(
        command(*flags, "--workers=2", f"--output={tmp_path / 'out'}"), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(workers_of(process.pid)) == 2 or process.poll() is not None)
    for worker in workers_of(process.pid)[:1]:
        os.kill(worker, signal.SIGKILL)
    _, message = process.communicate()
    assert process.returncode == 2 and "A worker process was killed" in message and "Traceback" not in message
    assert prepare(*flags, f"--output={tmp_path / 'out'}").returncode == 0
    assert prepare(*flags, f"--output={tmp_path / 'unbroken'}").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def workers_of(pid):
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, IndexError):
            continue
    return found


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.005)


@pytest.mark.parametrize("limit", [30_000, 100_000])  # while the parts are written; while the shards are
def test_a_disk_that_takes_no_more(texts, tokenizer, tmp_path, limit):
    """A limit on the size of files stands for the disk: writing fails in the same calls, and no root is needed."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = f"--input={texts}", f"--tokenizer={tokenizer}", "--block=64", f"--output={tmp_path / 'out'}", "--workers=1"
    result = prepare(*flags, preexec_fn=limited)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "could not be written" in result.stderr
    assert "File too large" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert prepare(*flags).returncode == 0  # it goes on when there is room


def test_a_full_disk(texts, tokenizer, tmp_path):
    """A file system of 400 kB, where the user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=400k tmpfs {disk} && exec {sys.executable} -m phijax.prepare --input={texts}"
    script += f" --tokenizer={tokenizer} --output={disk}/out --workers=1"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if "error: " not in result.stderr:
        pytest.skip(f"no file system can be made here: {result.stderr}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "could not be written" in result.stderr and "No space left on device" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "error: --input is missing"),
        (("--input=x",), "error: --output is missing"),
        (("--input=x", "--output=y", "more"), "error: 'more' is no flag. A glob is quoted"),
        (("--input=x", "--output=y"), "error: --input=x means no file of .txt .md"),
        (("--inptu=x",), "error: Unknown command line flag 'inptu'. Did you mean: input"),
        (("--input=x", "--output=y", "--tokenizer=z", "--vocab_size=9"), "leave it out"),
        (("--input=TEXTS", "--output=y", "--workers=0"), "--workers=0 must be 1 or more"),
        (("--input=TEXTS", "--output=y", "--part=4/4"), "--part=4/4 is meant as I/N"),
        (("--input=TEXTS", "--output=y", "--workers=1", "--vocab_size=100000"), "Largest that it has"),
    ],
)
def test_wrong_flags(texts, tmp_path, flags, message):
    flags = [flag.replace("TEXTS", str(texts)) for flag in flags]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    result = prepare(*flags, cwd=tmp_path, env=environment)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
