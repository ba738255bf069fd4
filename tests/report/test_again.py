"""The command to type again."""

import shlex
import sys

from phijax.report.again import same_command

KEY = "checkpoint.restore_step"


def test_the_command_is_quoted_and_the_key_stands_once():
    typed = ["python", "-m", "phijax.main", "--workdir=my run", "--config.data.phases[0].steps=5", "--config.a='b'"]
    command = same_command(KEY, 22, [*typed, f"--config.{KEY}=18", f"-config.{KEY}=3\n4"])
    assert shlex.split(command) == [*typed, "--config.checkpoint.restore_step=22"]
    assert "'--workdir=my run'" in command and "\n" not in command
    near = ["python", "-m", "phijax.main", f"--config.{KEY}s=1", f"--config.x{KEY}=1"]
    assert shlex.split(same_command(KEY, 1, near))[:-1] == near


def test_a_script_is_typed_without_its_interpreter():
    command = same_command(KEY, 2, ["/usr/bin/python3", ".venv/bin/phijax", "main"])
    assert command == ".venv/bin/phijax main --config.checkpoint.restore_step=2"
    assert same_command(KEY, 2).startswith(shlex.quote(sys.orig_argv[0]))
