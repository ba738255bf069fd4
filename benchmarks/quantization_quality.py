"""What few bits cost in quality, method beside method: python benchmarks/quantization_quality.py --checkpoint=ANY
    --calibration=build/python_text/train --held_out=build/python_text/validation [CASE ...]

A case is METHOD:SCHEME as `phijax quantize` takes them (rtn:int4_g64, awq:int4_g32_head8) or llama:KIND (llama:Q4_0,
llama:Q4_K_M), made by llama.cpp from a GGUF file without loss. Every file is read back, dequantised to float32 and run
by the same program over the same rows: the differences are those of the weights alone. llama.cpp's own products round
activations besides.

KL is from the float model, in nats; +- is one standard error, over rows, since tokens of a row are not independent.
With --results=FILE.jsonl cases that lie there are not run again.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import time

CASES = (
    *(f"{method}:int4_g{group}" for group in (32, 64, 128) for method in ("rtn", "awq", "gptq")),
    *(f"llama:{kind}" for kind in ("Q4_0", "Q4_K_M")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--calibration", required=True, help="token shards or a text file")
    parser.add_argument("--held_out", required=True, help="other shards, or another text file")
    parser.add_argument("--calibration_rows", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--row_length", type=int, default=256, help="of text files; rows of shards are their records")
    parser.add_argument("--prompt", help="its greedy continuation is shown")
    parser.add_argument("--results", type=pathlib.Path, help="a line a case, read and appended to")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    arguments = parser.parse_args()
    found = read_results(arguments.results)
    work = pathlib.Path(tempfile.mkdtemp(prefix="quantization-quality-", dir=arguments.folder))
    try:
        bench = Bench(arguments, work)
        for case in arguments.cases:
            if case not in found:
                found[case] = bench.measure(case)
                print(f"  {case}: {json.dumps({k: v for k, v in found[case].items() if k != 'by_row'})}", flush=True)
                if arguments.results:
                    with arguments.results.open("a") as file:
                        file.write(json.dumps({"case": case} | found[case]) + "\n")
    finally:
        shutil.rmtree(work)
    print("\n".join(table({case: found[case] for case in arguments.cases})))
    return 0


def read_results(path: pathlib.Path | None) -> dict[str, dict]:
    lines = path.read_text().splitlines() if path and path.exists() else []
    return {result.pop("case"): result for result in map(json.loads, lines)}


class Bench:
    """The float model, its distributions over the held-out rows on disk, and what is measured against them."""

    def __init__(self, arguments: argparse.Namespace, work: pathlib.Path):
        import numpy as np

        from phijax.evaluation.fixed_rows import read_fixed_rows
        from phijax.interchange.open import open_checkpoint

        self.arguments, self.work = arguments, work
        self.opened = open_checkpoint(arguments.checkpoint)
        settings = {"length": arguments.row_length, "vocab_size": self.opened.model.vocab_size}
        tokenizer = self.opened.tokenizer()
        self.rows = read_fixed_rows(arguments.held_out, tokenizer, count=arguments.rows, **settings)
        calibration = read_fixed_rows(arguments.calibration, tokenizer, count=arguments.calibration_rows, **settings)
        self.tokens = np.stack([row[:-1] for row in calibration])
        shape = (len(self.rows), len(self.rows[0]) - 1, self.opened.model.vocab_size)
        self.reference = np.lib.format.open_memmap(work / "reference.npy", "w+", np.float32, shape)
        generator = self.generator(self.opened)
        for number, row in enumerate(self.rows):
            self.reference[number] = generator.logits(row[:-1])
        self.answer = self.continued(generator)
        print(
            f"{self.rows[0].size - 1} x {len(self.rows)} held-out tokens; calibration {self.tokens.shape}", flush=True
        )

    def generator(self, opened):
        """Over float32 weights, whatever the file holds."""
        import jax

        from phijax.inference.generator import Generator
        from phijax.interchange.load import load_params
        from phijax.parallel.mesh import MeshConfig, make_mesh

        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        length = len(self.rows[0]) + 1
        return Generator(opened.model, load_params(opened, mesh), opened.tokenizer(), max_length=length)

    def continued(self, generator) -> str:
        from phijax.inference.sampling import Sampling

        prompt = self.arguments.prompt
        return generator.generate([prompt], Sampling(max_tokens=8, temperature=0))[0].text if prompt else ""

    def measure(self, case: str) -> dict:
        import numpy as np

        from phijax.quantization import report

        begin = time.process_time()
        opened, bits = self.made(case)
        made = time.process_time() - begin
        generator, found = self.generator(opened), []
        for before, row in zip(self.reference, self.rows, strict=True):
            found.append(report.compare(before, generator.logits(row[:-1]), row[1:]))
        quality = dataclasses.asdict(report.summarise(found))
        by_row = [float(np.mean(tokens.kl)) for tokens in found]
        return {"bits": bits, **quality, "by_row": by_row, "answer": self.continued(generator), "cpu_seconds": made}

    def made(self, case: str):
        """-> the checkpoint, opened, and its bits a weight."""
        method, _, form = case.partition(":")
        return self.by_llama_cpp(form) if method == "llama" else self.by_us(method, form)

    def by_us(self, method: str, scheme: str):
        from etils import epath

        from phijax.interchange.native import methods as quantization_methods
        from phijax.interchange.native import quantize as native_quantize
        from phijax.interchange.open import open_checkpoint
        from phijax.quantization import policy

        assigned, output = policy.assign(self.opened.model, policy.parse(scheme)), self.work / "ours"
        shutil.rmtree(output, ignore_errors=True)
        source, rounding = quantization_methods.prepare(self.opened, assigned, method, self.tokens)
        native_quantize.write(source, epath.Path(output), assigned, method=method, rounding=rounding)
        size = sum(native_quantize.nbytes(self.opened, assigned).values())
        return open_checkpoint(output), 8 * size / self.weights()

    def by_llama_cpp(self, kind: str):
        from phijax.interchange.gguf import k_quants
        from phijax.interchange.gguf.file import read_file
        from phijax.interchange.open import open_checkpoint

        path = self.work / "llama.gguf"
        path.unlink(missing_ok=True)
        k_quants.write_k_quants(self.opened, path, kind=kind)
        size = sum(stored.size for stored in read_file(path).tensors.values())
        return open_checkpoint(path), 8 * size / self.weights()

    def weights(self) -> int:
        return sum(math.prod(shape) for shape in self.opened.weights.shapes().values())


def table(found: dict[str, dict]) -> list[str]:
    """Sorted by bits; a method beside plain rounding at the same bits is compared row by row."""
    lines = [
        "| case | bits | mean KL | to rtn at these bits | 99th percentile | perplexity | same top-1 | answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, result in sorted(found.items(), key=lambda item: (item[1]["bits"], item[0])):
        plain = found.get(f"rtn:{case.partition(':')[2]}")
        lines.append(
            f"| {case} | {result['bits']:.3f} | {with_error(result['by_row'])} "
            f"| {difference(result, plain) if plain and plain is not result else ''} "
            f"| {result['kl_99th_percentile']:.2f} | {result['perplexity_quantized']:.2f} "
            f"| {result['top1_agreement']:.1%} | {' '.join(result['answer'].split())} |"
        )
    first = next(iter(found.values()))
    return [f"{first['tokens']:,} tokens; perplexity of the float model {first['perplexity_float']:.2f}", *lines]


def difference(result: dict, plain: dict) -> str:
    """Of the same rows, whose own differences cancel."""
    return with_error([a - b for a, b in zip(result["by_row"], plain["by_row"], strict=True)], sign="+")


def with_error(values: list[float], sign: str = "") -> str:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return f"{mean:{sign}.4f} +- {math.sqrt(variance / len(values)):.4f}"


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
