"""SIGTERM and Ctrl-C in real processes, while the main thread is in a call that does not look at signals."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from saved_run import save_run

from phijax.model.config import ModelConfig
from phijax.text.train_tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ModelConfig(
    vocab_size=400, model_dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, ffn_dim=32, max_position=64
)

# Waits as a compiler does: in C, without the interpreter's lock. STOPPED gets a line when it is there.
DEAF = """
import ctypes, importlib, pathlib, runpy, sys
ready, verb, where, calls, *sys.argv = sys.argv[1:]
sys.argv.insert(0, verb)

def wait(*arguments, **options):
    if isinstance(arguments[0] if arguments else None, pathlib.Path):
        pathlib.Path(arguments[0]).write_text("begun")
    pathlib.Path(ready).touch()
    ctypes.CDLL(None).sleep(600)

def patched(original):
    seen = []
    def call(*arguments, **options):
        seen.append(1)
        return original(*arguments, **options) if len(seen) < int(calls) else wait(*arguments, **options)
    return call

if __name__ == "__main__":
    module, name = where.split(":")
    owner = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name = name.split(".")[-1]
    setattr(owner, name, patched(getattr(owner, name)))
    runpy.run_module(f"phijax.{verb}", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, a text."""
    folder = tmp_path_factory.mktemp("stops")
    text = (ROOT / "README.md").read_text()
    (folder / "text.txt").write_text(text)
    save_run(folder / "run", MODEL, train_tokenizer([text], 400))
    return folder


CASES = {
    "prepare": ("phijax.curation.preparation:train_tokenizer", 1, "--input=TEXT --output=OUT"),
    "generate": ("phijax.inference.model:load", 1, "--checkpoint=RUN --prompt_file=TEXT"),
    "export": ("phijax.interchange.huggingface.safetensors:write_file", 1, "--checkpoint=RUN --format=hf --output=OUT"),
    "quantize": ("phijax.interchange.native.quantize:_Arrays.write", 3, "--checkpoint=RUN --scheme=int8 --output=OUT"),
    "plan": ("phijax.planner:make_plan", 1, "--config=experiments/tiny.py --topology=v5e:2x2"),
    "main": ("phijax.config:load", 1, "--config=experiments/tiny.py --workdir=OUT"),
}
LEFT = {"prepare": {"out"}, "quantize": {"out.unfinished"}}  # what the next start goes on with


@pytest.mark.parametrize("verb", CASES)
def test_a_command_ends_at_once_with_75_and_leaves_what_can_be_gone_on_with(folder, tmp_path, verb):
    where, calls, flags = CASES[verb]
    for name, path in (("TEXT", folder / "text.txt"), ("RUN", folder / "run"), ("OUT", tmp_path / "out")):
        flags = flags.replace(name, str(path))
    number = signal.SIGINT if verb in ("export", "main") else signal.SIGTERM
    code, said = stopped(DEAF, number, tmp_path / "ready", verb, where, str(calls), *flags.split())
    assert code == 75, said
    assert f"{number.name}: stopped; the same command can be started again" in said and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == LEFT.get(verb, set()) | {"ready"}
    if verb == "quantize":
        assert len((tmp_path / "out.unfinished" / "progress.jsonl").read_text().splitlines()) == 3  # a head, two pieces
        assert not (tmp_path / "out.unfinished" / "writer.lock").exists()


def stopped(script, number, ready, *arguments):
    """Runs it, signals it when `ready` is there -> exit code, what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, ready, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not ready.exists() and process.poll() is None:
        assert time.monotonic() < deadline, "never ready"
        time.sleep(0.01)
    process.send_signal(number)
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, said


IN_LITTLE = """
import os, pathlib, signal, subprocess, sys, time
from absl import flags
from phijax import command
from phijax.storage import signals

ready, case, tidied = pathlib.Path(sys.argv.pop(1)), sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))

def main(arguments):
    print("printed before")
    match case:
        case "tidies":
            with signals.tidied(tidied.touch):
                with signals.tidied(lambda: 1 / 0):
                    ready.touch(); time.sleep(600)
        case "tidied no more":
            with signals.tidied(tidied.touch): pass
            ready.touch(); time.sleep(600)
        case "another's handler":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); ready.touch(); time.sleep(600)
        case "a forked child":
            if (child := os.fork()) == 0:
                ready.touch(); time.sleep(600)
            while not ready.exists(): time.sleep(0.01)
            os.kill(child, signal.SIGTERM)
            _, status = os.waitpid(child, 0)
            time.sleep(0.2)  # in which this process would be ended by it
            return 40 + os.WTERMSIG(status)
        case "wakeup taken":
            signal.set_wakeup_fd(-1); ready.touch(); time.sleep(600)
        case "as interrupt":
            try:
                with signals.as_keyboard_interrupt(): ready.touch(); time.sleep(600)
            except KeyboardInterrupt:
                return 8

command.run(main, flags.FlagValues())
"""


@pytest.mark.parametrize(
    ("case", "code", "tidied"),
    [
        ("tidies", 75, True),
        ("tidied no more", 75, False),
        ("another's handler", 9, False),
        ("wakeup taken", 75, False),
        ("as interrupt", 8, False),
    ],
)
def test_what_is_tidied_and_who_handles_it(tmp_path, case, code, tidied):
    found, said = stopped(IN_LITTLE, signal.SIGTERM, tmp_path / "ready", case, tmp_path / "tidied")
    assert found == code, said
    assert (tmp_path / "tidied").exists() == tidied
    assert said.startswith("printed before\n") or "\nprinted before\n" in said  # though it was in a buffer


def test_a_forked_child_is_ended_without_its_parent(tmp_path):
    command = [sys.executable, "-c", IN_LITTLE, tmp_path / "ready", "a forked child", tmp_path / "tidied"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert done.returncode == 40 + signal.SIGTERM
