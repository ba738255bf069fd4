"""What the published models weigh in few bits, by file: python benchmarks/model_sizes.py

The writers' own plans of the files, asked without any weights: the tables of docs/small_devices.md, which
tests/quantization/test_model_sizes.py compares with this. Ours is before compression, some 8 % more than on disk.
"""

import functools
import math
import sys

import jax.numpy as jnp
import numpy as np
from etils import epath

from phijax.interchange.gguf import integers as gguf_integers
from phijax.interchange.gguf.families import FAMILIES as GGUF_FAMILIES
from phijax.interchange.gguf.file import gguf_library
from phijax.interchange.huggingface import compressed_tensors as compressed_tensors_export
from phijax.interchange.huggingface import mlx as mlx_export
from phijax.interchange.huggingface.families import FAMILIES as HF_FAMILIES
from phijax.interchange.native import quantize as native_quantize
from phijax.interchange.native.source import NativeSource
from phijax.interchange.opened import Opened
from phijax.interchange.tensors import Tensor, tensors
from phijax.interchange.weight_source import model_shapes
from phijax.model.config import ModelConfig
from phijax.model.presets import PRESETS
from phijax.quantization import policy

MODELS = ("phi3_mini", "phi3_medium")
SCHEMES = ("int8", "int4", "int4_g128", "int4_g128_head8", "int4_g64", "int4_g32", "int4_g32_head8")


class Planned(NativeSource):
    """A quantised checkpoint of ours as the writers see it, without weights."""

    def __init__(self, c: ModelConfig, schemes: dict[str, policy.Scheme]):
        self.shapes, self.schemes = functools.partial(model_shapes, c), schemes

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(np.float32 if path in self.schemes else jnp.bfloat16)


def sizes(c: ModelConfig, scheme: str) -> dict[str, int]:
    """Format -> bytes of its tensors."""
    assigned = policy.assign(c, policy.parse(scheme))
    opened = Opened(epath.Path("/none"), "phijax", c, Planned(c, assigned), lambda: None)

    def of_folder(export) -> int:
        return sum(tensor.nbytes for tensor in export.folder(opened, HF_FAMILIES["phi3"], None).tensors)

    return {
        "ours": sum(native_quantize.nbytes(opened, assigned).values()),
        "GGUF": sum(of_gguf(tensor, assigned) for tensor in tensors(c, GGUF_FAMILIES["phi3"].rows)),
        "MLX": of_folder(mlx_export),
        "compressed-tensors": of_folder(compressed_tensors_export),
    }


def of_gguf(tensor: Tensor, assigned: dict[str, policy.Scheme]) -> int:
    library, kind = gguf_library(), gguf_integers.kind_of(assigned, tensor) or "F32"  # norms
    per_block, block = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    return math.prod(tensor.shape) // per_block * block


def table(c: ModelConfig) -> list[str]:
    count = sum(math.prod(shape) for shape in model_shapes(c).values())
    found = {scheme: sizes(c, scheme) for scheme in SCHEMES}
    formats = list(next(iter(found.values())))
    lines = [f"| scheme | bits a weight | {' | '.join(formats)} |", "|---" * (2 + len(formats)) + "|"]
    dense = f"{2 * count / 1e9:.2f} GB ({2 * count / 2**30:.2f} GiB)"
    lines.append(f"| bfloat16 | 16 | {' | '.join([dense] * len(formats))} |")
    for scheme, by_format in found.items():
        cells = " | ".join(f"{size / 1e9:.2f} GB ({size / 2**30:.2f} GiB)" for size in by_format.values())
        lines.append(f"| {scheme} | {8 * by_format['ours'] / count:.2f} | {cells} |")
    return lines


def main() -> int:
    for name in MODELS:
        print("\n".join([name, *table(PRESETS[name]), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
