"""Peak host memory of exporting a full-size model: python benchmarks/export_memory.py [--scheme=int4_g128]

Writes a Hugging Face folder of the preset's shapes in bfloat16 (random bytes, 7.6 GB for phi3_mini), then exports it
from format to format, each in a process of its own. Reported is VmHWM of /proc/self/status, the most memory that the
process ever had resident, and the largest RssAnon seen every 20 ms, the part of it that is no file. Bound: 3 GiB and
the model's largest tensor. Needs three times the model's bytes on disk; removes all of it.

With --scheme the folder is quantised first (minutes), and what is exported is that, to the formats for small weights;
their sizes are bounded too.
"""

import argparse
import multiprocessing
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from pydoc_data.topics import topics

import ml_dtypes
import numpy as np
from etils import epath

BOUND = 3 << 30
PAIRS = (("hf", "phijax"), ("phijax", "hf"), ("phijax", "mistral"), ("hf", "gguf"))
SMALL_PAIRS = (("small", "mlx"), ("small", "compressed_tensors"), ("small", "gguf"))
SIZE_BOUNDS = {("phi3_mini", "int4_g128", "mlx"): 1.90}  # GiB, the whole folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="phi3_mini")
    parser.add_argument("--scheme")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    work = pathlib.Path(tempfile.mkdtemp(prefix="export-memory-", dir=arguments.folder))
    try:
        largest = in_process(make, work / "hf", arguments.preset)
        bound = BOUND + largest
        print(f"{arguments.preset}: largest tensor {largest / 2**30:.2f} GiB, bound {bound / 2**30:.2f} GiB")
        if arguments.scheme:
            in_process(quantize, work / "hf", arguments.scheme, work / "small")
            shutil.rmtree(work / "hf")
        print(f"{'from':>7} {'to':>18} {'VmHWM GiB':>10} {'RssAnon GiB':>12} {'seconds':>8} {'GB':>7} {'GiB':>7}")
        within = True
        for source, target in SMALL_PAIRS if arguments.scheme else PAIRS:
            output = work / (target if target == "phijax" else "out")
            try:
                peak, anonymous, seconds = in_process(measure, work / source, target, output)
            except ModuleNotFoundError as error:
                print(f"{source:>7} {target:>18} skipped: {error}")
                continue
            size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
            print(
                f"{source:>7} {target:>18} {peak / 2**30:>10.2f} {anonymous / 2**30:>12.2f} {seconds:>8.0f} "
                f"{size / 1e9:>7.3f} {size / 2**30:>7.3f}",
                flush=True,
            )
            allowed = SIZE_BOUNDS.get((arguments.preset, arguments.scheme, target), float("inf"))
            within &= peak <= bound and size / 2**30 <= allowed
            if output.name == "out":
                shutil.rmtree(output)
        print("within the bounds" if within else "ABOVE A BOUND")
        return 0 if within else 1
    finally:
        shutil.rmtree(work)


def in_process(act, *arguments):
    """`act(*arguments)` in a fresh interpreter: VmHWM never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(act, arguments)


def make(folder: pathlib.Path, preset: str) -> int:
    """A Hugging Face folder of random weights, streamed. -> bytes of its largest tensor."""
    from phijax.interchange.huggingface import config as huggingface_config
    from phijax.interchange.huggingface import safetensors as safetensors_files
    from phijax.interchange.huggingface.families import FAMILIES
    from phijax.interchange.tensors import tensors
    from phijax.model.presets import PRESETS
    from phijax.storage import atomic
    from phijax.text.train_tokenizer import train_tokenizer

    model = PRESETS[preset]
    half = np.dtype(ml_dtypes.bfloat16)
    shapes = [safetensors_files.Shape(t.name, t.shape, half) for t in tensors(model, FAMILIES["phi3"].rows)]
    random = np.random.default_rng(0)
    # Sign and seven bits of mantissa are random, so that it does not compress; the size is that of a weight.
    block = ((random.integers(0, 256, 1 << 25, dtype=np.uint16) & 0x80FF) | 0x3C00).astype(np.uint16).view(half)
    folder.mkdir()
    files = safetensors_files.plan_files(shapes, 5 * 10**9)
    for name, group in files.items():
        pieces = (
            block[: min(block.size, n - start)]
            for n in (int(np.prod(shape.shape)) for shape in group)
            for start in range(0, n, block.size)
        )
        safetensors_files.write_file(epath.Path(folder) / name, group, pieces)
    safetensors_files.write_index(epath.Path(folder) / safetensors_files.INDEX_FILE, files)
    ids = {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}
    config = huggingface_config.render(model, FAMILIES["phi3"], dtype="bfloat16", ids=ids)
    atomic.write_json(epath.Path(folder) / "config.json", config)
    train_tokenizer(topics.values(), 2048).save_huggingface(folder)
    return max(shape.nbytes for shape in shapes)


def quantize(source: pathlib.Path, scheme: str, output: pathlib.Path) -> None:
    from phijax import quantize

    quantize.FLAGS(["quantize", f"--checkpoint={source}", f"--scheme={scheme}", f"--output={output}"])
    quantize.main([])


def measure(source: pathlib.Path, target: str, output: pathlib.Path) -> tuple[int, int, float]:
    """One export, as the command does it. -> VmHWM, largest RssAnon in bytes, seconds."""
    from phijax import export

    anonymous, done = [0], threading.Event()

    def watch():
        while not done.wait(0.02):
            anonymous[0] = max(anonymous[0], status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.monotonic()
    try:
        if target == "gguf":
            import gguf  # noqa: F401  an extra: without it this pair is skipped
        export.FLAGS(["export", f"--checkpoint={source}", f"--format={target}", f"--output={output}"])
        export.main([])
    finally:
        done.set()
        thread.join()
    return status("VmHWM"), anonymous[0], time.monotonic() - begin


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
