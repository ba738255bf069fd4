"""Peak host memory and size on disk of quantising a full-size model: python benchmarks/quantize_memory.py

Writes weights of the preset's shapes in bfloat16 as a checkpoint of ours (normal, as trained weights roughly are: 7.6
GB for phi3_mini, less compression), then runs phijax quantize on them in a process of its own; --method=awq and gptq
are calibrated on the text that every Python carries. Reported are VmHWM of /proc/self/status, the most memory that the
process ever had resident, what lies on disk, and the seconds that it took and that its cores worked: on a machine that
is shared, half of these is what two idle ones would take. --layers=N is the same with fewer: memory goes with the width
of a layer, time with their number. Removes all of it.
"""

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from etils import epath

MEMORY_BOUND = {"rtn": 6 << 30, "awq": 14 << 30, "gptq": 14 << 30}
SIZE_BOUND = {"int4_g128": 1.84}  # GiB, of phi3_mini with everything in it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="phi3_mini")
    parser.add_argument("--scheme", default="int4_g128")
    parser.add_argument("--method", default="rtn", choices=MEMORY_BOUND)
    parser.add_argument("--calibration_rows", type=int, default=4)
    parser.add_argument("--layers", type=int, help="fewer than the preset's, each as wide")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    work = pathlib.Path(tempfile.mkdtemp(prefix="quantize-memory-", dir=arguments.folder))
    try:
        in_process(make, work / "float", arguments.preset, arguments.layers)
        flags = [f"--scheme={arguments.scheme}", f"--method={arguments.method}"]
        if arguments.method != "rtn":
            in_process(write_text, work / "text.txt")
            flags += [f"--calibration={work / 'text.txt'}", f"--calibration_rows={arguments.calibration_rows}"]
        peak, seconds, worked = in_process(measure, work / "float", work / "small", flags)
        size = sum(file.stat().st_size for file in (work / "small").rglob("*") if file.is_file())
        layers = f", {arguments.layers} layers" if arguments.layers else ""
        print(
            f"{arguments.preset}{layers}, {arguments.scheme} by {arguments.method}: VmHWM {peak / 2**30:.2f} GiB, "
            f"{seconds:.0f} s, {worked:.0f} core seconds, {size / 1e9:.3f} GB = {size / 2**30:.3f} GiB on disk"
        )
        allowed = SIZE_BOUND.get(arguments.scheme, float("inf")) if arguments.preset == "phi3_mini" else float("inf")
        within = peak <= MEMORY_BOUND[arguments.method] and size / 2**30 <= allowed
        print("within the bounds" if within else "ABOVE A BOUND")
        return 0 if within else 1
    finally:
        shutil.rmtree(work)


def in_process(act, *arguments):
    """`act(*arguments)` in a fresh interpreter: VmHWM never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(act, arguments)


def make(folder: pathlib.Path, preset: str, layers: int | None) -> None:
    """A checkpoint of ours, weights and some tokenizer, streamed."""
    import functools

    from phijax.interchange.native import write as native_write
    from phijax.interchange.opened import Opened
    from phijax.interchange.weight_source import NOT_QUANTIZED, model_shapes
    from phijax.model.presets import PRESETS
    from phijax.text.train_tokenizer import train_tokenizer

    model, half = PRESETS[preset], np.dtype(ml_dtypes.bfloat16)
    model = dataclasses.replace(model, num_layers=layers or model.num_layers)
    random = np.random.default_rng(0)
    block = (0.02 * random.standard_normal(1 << 26, np.float32)).astype(half)

    class Source:
        shapes, schemes = functools.partial(model_shapes, model), NOT_QUANTIZED

        def dtype(self, path):
            return half

        def read(self, path, index):
            shape = tuple(i.stop - i.start for i in index)
            start = int(random.integers(block.size - int(np.prod(shape))))
            return block[start : start + int(np.prod(shape))].reshape(shape)

    tokenizer = train_tokenizer([text()], 1024)
    opened = Opened(epath.Path(folder), "phijax", model, Source(), lambda: tokenizer)
    native_write.write(opened, epath.Path(folder), dtype=None)


def text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def write_text(path: pathlib.Path) -> None:
    path.write_text(text())


def measure(source: pathlib.Path, output: pathlib.Path, flags: list[str]) -> tuple[int, float, float]:
    """As the command does it. -> VmHWM in bytes, seconds, seconds of all cores."""
    from phijax import quantize

    begin, before = time.monotonic(), time.process_time()
    quantize.FLAGS(["quantize", f"--checkpoint={source}", f"--output={output}", *flags])
    quantize.main([])
    return status("VmHWM"), time.monotonic() - begin, time.process_time() - before


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
