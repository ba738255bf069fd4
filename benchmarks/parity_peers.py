"""Two other projects that have phi-3 on JAX beside ours, on the same weights and tokens: make parity-peers

benchmarks/parity.py's cases and models. Each peer runs in its own environment, in a process of its own, and is compared
with transformers' float32 logits. Cached decoding is given transformers' tokens, so that a peer which would choose
another one is still compared at every step.
"""

import argparse
import pathlib
import subprocess
import tempfile

import numpy as np
import parity
from peers.exchange import Case, write_cases

SCRIPTS = pathlib.Path(__file__).resolve().parent / "peers"
PEERS = {"EasyDeL": ("easydel_peer.py", "easydel"), "KerasHub": ("keras_hub_peer.py", "keras-hub")}  # script, package
FOLDERS = {
    parity.PLAIN: "plain",
    parity.WINDOW: "window",
    parity.LONG: "long",
    parity.PARTIAL: "partial",
    parity.LLAMA: "llama",
}
NO_ANSWER = "n/a: no answer"


def make_case(measure, answer: str) -> tuple[Case, np.ndarray]:
    """One entry of parity.CASES as a peer is asked for it, and transformers' logits."""
    shape, *numbers = measure.args
    theirs = parity.both(shape)[0]
    ask = {"model": FOLDERS[shape], "answer": answer}
    if measure.func is parity.decoded:
        start, steps = numbers
        tokens, expected = parity.their_decoding(theirs, parity.random_tokens(start), steps)
        return Case(kind="decode", tokens=tokens.tolist(), start=start, **ask), expected
    if measure.func is parity.packed:
        documents = parity.packed_documents()
        expected = np.concatenate([parity.their_logits(theirs, d) for d in documents])
        lengths = tuple(map(len, documents))
        return Case(kind="row", tokens=np.concatenate(documents).tolist(), documents=lengths, **ask), expected
    tokens = parity.random_tokens(*numbers)
    return Case(kind="text", tokens=tokens.tolist(), **ask), parity.their_logits(theirs, tokens)


def write_folder(folder: pathlib.Path) -> dict[str, tuple[Case, np.ndarray]]:
    """The models as transformers saves them, and cases.json."""
    for shape, name in FOLDERS.items():
        parity.both(shape)[0].save_pretrained(folder / name)
    cases = {name: make_case(measure, f"case_{i}") for i, (name, measure) in enumerate(parity.CASES.items())}
    write_cases(folder, {name: case for name, (case, _) in cases.items()})
    return cases


def ask(python: pathlib.Path, script: str, folder: pathlib.Path) -> str | None:
    """Runs a peer; the last line that it wrote if it died."""
    done = subprocess.run([python, SCRIPTS / script, folder], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else ((done.stderr or done.stdout).strip().splitlines() or ["it died"])[-1]


def read_answer(folder: pathlib.Path, case: Case, expected: np.ndarray) -> str:
    """The cell of the table; removes the answer, so that the next peer's is its own."""
    logits, reason = (folder / f"{case.answer}{suffix}" for suffix in (".npy", ".txt"))
    if reason.exists():
        text = reason.read_text()
        reason.unlink()
        return f"n/a: {text}"
    if not logits.exists():
        return NO_ANSWER
    got = np.load(logits)
    logits.unlink()
    return f"{parity.difference(got, expected):.1e}"


def version(python: pathlib.Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def column(folder: pathlib.Path, environment: pathlib.Path, peer: str, cases: dict) -> tuple[str, list[str]]:
    """(head, cells). Where a peer did not install, the Makefile leaves pip's reason in a file `failed`."""
    script, package = PEERS[peer]
    python, failed = environment / "bin" / "python", environment / "failed"
    if failed.exists() or not python.exists():
        reason = failed.read_text().strip() if failed.exists() else "not installed (make parity-peers)"
        return peer, [f"n/a: {reason}"] * len(cases)
    died = ask(python, script, folder)
    cells = [read_answer(folder, case, expected) for case, expected in cases.values()]
    if died:
        cells = [f"n/a: {died}" if cell == NO_ANSWER else cell for cell in cells]
    return f"{peer} {version(python, package)}", cells


def table(heads: list[str], columns: list[list[str]]) -> str:
    """Markdown; a bar inside a cell would end it."""
    rows = [heads, ["---"] * len(heads), *zip(*columns, strict=True)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=pathlib.Path, default=pathlib.Path(".venv-peers"))
    environments = parser.parse_args(arguments).environments.absolute()
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        cases = write_folder(folder)
        ours = [f"{measure():.1e}" for measure in parity.CASES.values()]
        others = [column(folder, environments / PEERS[peer][1], peer, cases) for peer in PEERS]
    heads = [f"max abs, float32, to transformers {transformers.__version__}", "phijax", *(head for head, _ in others)]
    print(table(heads, [list(cases), ours, *(cells for _, cells in others)]))
    # A peer that is not here today keeps the column of the day when it was.
    here = [("phijax", ours), *((head, cells) for head, cells in others if head not in PEERS)]
    columns = {head: dict(zip(cases, (cell.replace("|", "/") for cell in cells), strict=True)) for head, cells in here}
    parity.PAGE.write_text(parity.with_columns(parity.PAGE.read_text(), columns))


if __name__ == "__main__":
    main()
