"""launch/local.sh and the images."""

import os
import re
import subprocess
import sys
import time

import pytest
from cloud_case import LAUNCH, ROOT, run

# In place of phijax: exits as its process id is told to ("0:75,1:0"), or waits to be asked.
PROGRAM = f"""#!{sys.executable}
import os, signal, sys, time
index = next(text for text in sys.argv if text.startswith("--process_id="))[-1]
os.write(1, " ".join(["process", index, *sys.argv[1:3]]).encode() + b"\\n")
code = dict(pair.split(":") for pair in sys.argv[-1].split(","))[index]
if code == "late":  # the others have long ended when this one is waited for
    time.sleep(0.5)
    code = "0"
if code == "wait":
    def stop(*_):
        time.sleep(0.3 * int(index))
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    open(os.environ["READY"] + index, "w")
    time.sleep(60)
sys.exit(int(code))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "python"
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("codes", "expected"), [("0:0,1:0,2:0", 0), ("0:late,1:0,2:75", 75), ("0:2,1:2,2:1", 2)])
def test_the_first_code_that_is_not_zero(program, codes, expected):
    ended = run("local.sh", "--verb=preflight", "3", codes, PYTHON=program)
    assert ended.code == expected
    assert sorted(ended.out.splitlines()) == [f"process {i} -m phijax.preflight" for i in range(3)]


def test_a_stop_reaches_every_process_and_its_code_comes_back(program, tmp_path):
    """They end one after the other, so that the script's wait is interrupted while all of them still save."""
    environment = os.environ | {"PYTHON": program, "READY": str(tmp_path / "ready")}
    command = ["launch/local.sh", "3", "0:wait,1:wait,2:wait"]
    script = subprocess.Popen(command, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.terminate()
    assert script.wait(timeout=60) == 75


@pytest.mark.parametrize("kind", ["tpu", "gpu", "cpu"])
def test_an_image_is_built_of_one_commit(cloud, kind):
    shown = run("image.sh", "--dry-run", f"--for={kind}", "--image=example.com/phijax", "--push")
    assert shown.code == 0
    match = re.fullmatch(
        rf"git -C (\S+) archive (\w{{12}}) \| docker build --file=launch/docker/Dockerfile\.{kind} "
        rf"--tag=example\.com/phijax:{kind}-(\w{{12}}) -\ndocker push example\.com/phijax:{kind}-(\w{{12}})\n",
        shown.out,
    )
    assert match and match[2] == match[3] == match[4]
    assert cloud.run("image.sh", f"--for={kind}", "--image=example.com/phijax").code == 0
    (build,) = cloud.asked()
    assert build["arguments"][:2] == ["build", f"--file=launch/docker/Dockerfile.{kind}"]


@pytest.mark.parametrize("kind", ["tpu", "gpu", "cpu"])
def test_an_image_runs_python_as_its_first_process(kind):
    """A shell in between would keep SIGTERM to itself; what is copied must be in the repository."""
    text = (LAUNCH / "docker" / f"Dockerfile.{kind}").read_text()
    assert 'ENTRYPOINT ["python", "-m"]' in text
    assert {"tpu": '"jax[tpu]"', "gpu": '"jax[cuda13]"', "cpu": "pyarrow"}[kind] in text
    assert "COPY requirements.txt ./" in text and (ROOT / "requirements.txt").exists()
