"""Scripts of launch/ as a user runs them, with clouds that only write down what they were asked."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))

# In place of gcloud, kubectl, ...: notes its arguments, answers `describe` with the next state that was scripted (the
# last one for ever), `tpu-vm list` with the next states of machines, and a run on the workers with the next exit code.
FAKE = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
stdin = sys.stdin.buffer.read() if "--filename=-" in arguments or arguments[-1:] == ["-"] else b""
with open(folder / "asked", "a") as file:
    file.write(json.dumps(dict(name=name, arguments=arguments, stdin=stdin.decode(errors='replace')[:100_000])) + "\\n")

def next_of(what, default):
    path = folder / what
    left = json.loads(path.read_text()) if path.exists() else []
    if len(left) > 1:
        path.write_text(json.dumps(left[1:]))
    return left[0] if left else default

if "describe" in arguments:
    state = next_of("states", "ACTIVE")
    if state == "ABSENT":
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    if state == "BROKEN":
        sys.exit("ERROR: (gcloud) UNAUTHENTICATED: no credentials")
    print(state)
    print("Updates are available for some Google Cloud CLI components.", file=sys.stderr)
if "tpu-vm" in arguments and "list" in arguments:
    print(*next_of("machines", ["READY"]), sep="\\n")
for what in ("install", "start", "create"):
    if what in arguments or any(text.startswith("--command=bash on_worker.sh " + what) for text in arguments):
        preflight = any("--verb=preflight" in text for text in arguments)
        sys.exit(next_of("preflight" if preflight else what, 0))
if name == "sbatch":
    print("4711;cluster")
if name in ("srun",):
    sys.exit(next_of("start", 0))
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


class Cloud:
    """A folder of fake programs on PATH, and what they were asked."""

    def __init__(
        self, folder: pathlib.Path, programs=("gcloud", "kubectl", "sbatch", "srun", "scontrol", "xpk", "docker")
    ):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for program in programs:
            path = folder / "bin" / program
            path.write_text(FAKE.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)

    def script(self, **answers) -> None:
        """states=[...], machines=[[...], ...], start=[...], install=[...], preflight=[...], create=[...]: in order."""
        for what, values in answers.items():
            (self.folder / what).write_text(json.dumps(values))

    def asked(self) -> list[dict]:
        path = self.folder / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What was done, in short, without the looking: create, delete, install, start, preflight, ..."""
        out = []
        for asked in self.asked():
            remote = next((text for text in asked["arguments"] if text.startswith("--command=bash on_worker.sh")), "")
            if "--verb=preflight" in remote:
                out.append("preflight")
            elif remote:
                out.append(remote.split()[2])
            elif asked["name"] == "gcloud" and asked["arguments"][3] not in ("describe", "list", "scp"):
                out.append(asked["arguments"][3])
            elif asked["name"] != "gcloud":
                out.append(asked["name"])
        return out

    def run(self, script: str, *arguments: str, **environment: str) -> Ended:
        return run(script, *arguments, PATH=f"{self.folder / 'bin'}:{os.environ['PATH']}", **environment)


def run(script: str, *arguments: str, **environment: str) -> Ended:
    """One of launch/, from the repository's root."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_", "XLA_"))}
    quick = dict(POLL_SECONDS="0", SETTLE_SECONDS="0")
    ended = subprocess.run(
        [f"launch/{script}", *arguments],
        cwd=ROOT,
        env=kept | quick | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)
