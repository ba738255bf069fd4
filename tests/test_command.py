"""Exit codes and messages of every command, read from real processes."""

import os
import pathlib
import subprocess
import sys

import pytest

# Buffered, as by default: what was printed before a hard exit must have been flushed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent), "PYTHONUNBUFFERED": ""}

SCRIPT = '''
"""Does nothing, as an example."""
import atexit, os, sys, warnings
from absl import flags
from phijax import command, errors

FLAGS = flags.FlagValues() if "own" in sys.argv[-1] else flags.FLAGS
flags.DEFINE_integer("count", 3, "how many", flag_values=FLAGS)
flags.DEFINE_boolean("loud", False, "say more", flag_values=FLAGS)

def main(arguments):
    print("count", FLAGS.count, arguments)
    match arguments[0] if arguments else None:
        case "user": raise errors.UserError("the sky is green.\\nMake it blue.")
        case "crash": raise ZeroDivisionError("oops")
        case "stop": raise KeyboardInterrupt
        case "warning":
            warnings.warn("of another")
            warnings.warn_explicit("of ours", UserWarning, os.sep.join(["", "phijax", "x.py"]), 3)
        case "full": raise OSError(28, "No space left on device")
        case "nowhere":
            import tempfile
            tempfile._candidate_tempdir_list = lambda: ["/proc/nothing"]
            tempfile.TemporaryDirectory()
        case "accents": print("na\\u00efve \\u4e2d \\udce9"); print("caf\\u00e9", file=sys.stderr)
        case "reads": print(repr(sys.stdin.readline()))
        case "opens":
            with open("opened.bin", "wb") as file:
                os.write(1, b"of a library"); os.write(2, b"of a library"); file.write(b"ours")
            os.system("echo of a child; echo of a child >&2")
        case "restart": return errors.EXIT_RESTART
        case "exit": sys.exit(3)
        case "exit_text": sys.exit("text")
        case "exit_none": sys.exit()
        case "long":
            for number in range(100_000): print(number)

if __name__ == "__main__":
    command.run(main, FLAGS)
'''


def run(tmp_path, *arguments):
    (tmp_path / "example.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "example.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.parametrize(
    ("argument", "code", "message"),
    [
        ("fine", 0, ""),
        ("user", 2, "error: the sky is green.\nMake it blue.\n"),
        ("stop", 75, "stopped from the keyboard; the same command can be started again\n"),
        ("full", 2, "error: [Errno 28] No space left on device. Start the same command again when that is mended.\n"),
        (
            "nowhere",
            2,
            "error: [Errno 2] No usable temporary directory found in ['/proc/nothing']. "
            "Start the same command again when that is mended.\n",
        ),
        ("restart", 75, ""),
        ("exit", 3, ""),
        ("exit_text", 1, None),
        ("exit_none", 0, ""),
        ("--count=x", 2, "error: flag --count=x: invalid literal for int() with base 10: 'x'\nAll flags: --help\n"),
        ("--countt=5", 2, "error: Unknown command line flag 'countt'. Did you mean: count ?\nAll flags: --help\n"),
    ],
)
def test_exit_codes(tmp_path, argument, code, message):
    result = run(tmp_path, argument)
    assert result.returncode == code
    assert message is None or result.stderr == message


def test_a_crash_has_its_traceback(tmp_path):
    result = run(tmp_path, "crash", "--count=5")
    assert result.returncode == 1
    assert result.stdout == "count 5 ['crash']\n"  # flushed, though the process left in a hurry
    assert "Traceback" in result.stderr and "ZeroDivisionError: oops" in result.stderr


def test_our_warnings_are_lines_for_people(tmp_path):
    lines = run(tmp_path, "warning").stderr.splitlines()
    assert lines[-1] == "warning: of ours" and "example.py" in lines[0] and "UserWarning: of another" in lines[0]


def test_a_reader_that_stops_early_ends_it_in_silence(tmp_path):
    (tmp_path / "example.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "example.py", "long"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout.readline() == b"count 3 ['long']\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def shell(tmp_path, argument, redirection, **environment):
    (tmp_path / "example.py").write_text(SCRIPT)
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {redirection}', "bash", sys.executable, "example.py", argument],
        capture_output=True,
        cwd=tmp_path,
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_lead_nowhere_and_change_no_exit_code(tmp_path, closed):
    for argument, code in (("fine", 0), ("user", 2), ("crash", 1), ("restart", 75), ("reads", 0), ("exit_none", 0)):
        result = shell(tmp_path, argument, closed)
        assert result.returncode == code and (code == 1 or b"Traceback" not in result.stderr), (argument, result)
    assert shell(tmp_path, "opens", closed).returncode == 0
    assert (tmp_path / "opened.bin").read_bytes() == b"ours"  # and nothing that was written to a number


LATIN = dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        (LATIN, b"na\\xefve \\u4e2d \\udce9\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"na\xefve \\u4e2d \\udce9\n"),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"na\\xefve \\u4e2d \\udce9\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "naïve 中 ".encode() + b"\\udce9\n"),
    ],
)
def test_what_a_stream_cannot_hold_is_written_out(tmp_path, environment, printed):
    result = shell(tmp_path, "accents", "", **environment)
    assert result.returncode == 0 and result.stdout.splitlines(True)[1] == printed and b"caf" in result.stderr


@pytest.mark.parametrize("environment", [LATIN, {"PYTHONIOENCODING": "utf-8"}])
def test_input_in_another_encoding_is_read(tmp_path, environment):
    (tmp_path / "typed").write_bytes(b"caf\xe9\n")
    result = shell(tmp_path, "reads", "< typed", **environment)
    assert (result.returncode, result.stdout.splitlines()[1]) == (0, rb"'caf\udce9\n'")


@pytest.mark.parametrize(("argument", "code"), [("long", 141), ("user", 2), ("crash", 1), ("restart", 75)])
def test_readers_that_stopped_change_no_other_exit_code(tmp_path, argument, code):
    """Both outputs into `true`, which reads nothing."""
    (tmp_path / "example.py").write_text(SCRIPT)
    command = f'"{sys.executable}" "{tmp_path}/example.py" {argument} 2>&1 | true; exit ${{PIPESTATUS[0]}}'
    assert subprocess.run(["bash", "-c", command], env=ENVIRONMENT, check=False).returncode == code


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full: of Linux")
def test_an_output_on_a_full_disk_is_one_message(tmp_path):
    for argument in ("fine", "long"):
        result = shell(tmp_path, argument, "> /dev/full")
        assert result.returncode == 2 and result.stderr.startswith(b"error: ")
        assert b"No space left" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags_of", ["own", "absl's"])
def test_help_shows_the_commands_flags_alone(tmp_path, flags_of):
    result = run(tmp_path, "--help", flags_of)
    assert result.returncode == 0
    assert result.stdout == (
        "Does nothing, as an example.\n\nFlags:\n  --count: how many (default: 3)\n  --[no]loud: say more\n"
    )


def phijax(*arguments):
    environment = {**ENVIRONMENT, "PYTHONPROFILEIMPORTTIME": "1"}
    return subprocess.run([sys.executable, "-m", "phijax", *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("prepare", "--help"), ("show", "--help")])
def test_help_needs_no_jax(arguments):
    result = phijax(*arguments)
    assert result.returncode == 0
    assert "phijax" in result.stdout
    assert "| phijax" in result.stderr  # the list of imports is there
    assert "| jax" not in result.stderr and " jaxlib" not in result.stderr


def test_an_unknown_verb(tmp_path):
    result = phijax("prepar", "--input=x")
    assert result.returncode == 2
    assert "error: phijax has no verb 'prepar'. Did you mean `phijax prepare`?" in result.stderr


def test_a_verb_is_the_module():
    result = phijax("show", "/nowhere")
    assert result.returncode == 2
    assert "error: /nowhere does not exist." in result.stderr
