"""Small models to write as GGUF, and GGUF files put together by hand, byte by byte."""

import dataclasses
import functools
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from quick_compilation import QUICK

from phijax.interchange.opened import Opened
from phijax.interchange.weight_source import NOT_QUANTIZED, Index, model_shapes
from phijax.model import params as parameters
from phijax.model.backend import Backend
from phijax.model.config import LongRope, ModelConfig
from phijax.text.train_tokenizer import train_tokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog; 1234 and 5678 are numbers. Straße, naïve café, 漢字 と かな.\n"
    "def f(x):\n\treturn {'a': [x, x + 1]}  # code\n"
)

# Every matrix has rows of a multiple of 32. 288 rows of q over 96 columns: more than one head, none of them square.
PHI3 = ModelConfig(
    vocab_size=400,
    model_dim=96,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=48,
    ffn_dim=160,
    max_position=256,
)
LONG = dataclasses.replace(
    PHI3,
    max_position=64,
    long_rope=LongRope(
        short_factor=tuple(1.0 + 0.05 * i for i in range(24)),
        long_factor=tuple(1.5 + 0.9 * i for i in range(24)),
        original_max_position=16,
    ),
)
PARTIAL = dataclasses.replace(PHI3, partial_rotary_factor=0.75, tied_head=True, sliding_window=7)
GPT2 = ModelConfig(
    vocab_size=400,
    model_dim=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=6,
    head_dim=16,
    ffn_dim=224,
    max_position=64,
    tied_head=True,
    norm_eps=2e-5,
    positions="learned",
    norm="layer",
    bias=True,
    activation="gelu_tanh",
    gated=False,
)
LLAMA = dataclasses.replace(PHI3, num_heads=4, num_kv_heads=2, head_dim=16, tied_head=True, norm_eps=1e-6)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A WeightSource over arrays in memory."""

    schemes = NOT_QUANTIZED

    arrays: Mapping[str, np.ndarray]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: array.shape for path, array in self.arrays.items()}

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype

    def read(self, path: str, index: Index) -> np.ndarray:
        return self.arrays[path][index]


def random_arrays(c: ModelConfig, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, shape in model_shapes(c).items():
        noise = rng.standard_normal(shape, np.float32)
        # Norms around one; matrices of unit gain, so that no weight is too small to matter.
        arrays[path] = (1 + 0.2 * noise if path.endswith("scale") else noise * c.model_dim**-0.5).astype(dtype)
    return arrays


@functools.cache
def tokenizer():
    """389 ids and phi-3's eleven."""
    return train_tokenizer([TEXT * 3], 380)


def opened(c: ModelConfig, arrays: Mapping[str, np.ndarray] | None = None, **changed: Any) -> Opened:
    facts = {
        "path": epath.Path("in-memory"),
        "kind": "phijax",
        "model": c,
        "weights": Arrays(arrays if arrays is not None else random_arrays(c)),
        "tokenizer": tokenizer,
    }
    return Opened(**facts | changed)


def everything(source: Any) -> dict[str, np.ndarray]:
    return {path: source.read(path, tuple(slice(0, n) for n in shape)) for path, shape in source.shapes().items()}


def logits(c: ModelConfig, arrays: Mapping[str, np.ndarray], tokens: Sequence[int], length: int = 0) -> np.ndarray:
    """(T, V) float32, of one text; declared for `length` tokens."""
    surplus = {path: ((0, c.padded_vocab_size - c.vocab_size), (0, 0)) for path in ("embedding", "head")}
    padded = {path: np.pad(array, surplus[path]) if path in surplus else array for path, array in arrays.items()}
    return np.asarray(
        _program(c, length or len(tokens))(parameters.nested(padded), jnp.asarray([tokens], jnp.int32))[0]
    )


@functools.lru_cache(maxsize=16)
def _program(c: ModelConfig, length: int):
    def run(params, tokens):
        model = parameters.module(c, params)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return model.logits(model.hidden(tokens, positions, jnp.ones_like(positions), Backend(), length=length))

    return jax.jit(run, compiler_options=QUICK)


# By hand: what no writer would write.

TYPES = {"u8": (0, "<B"), "u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}
STRING, ARRAY = 8, 9
F32, Q4_0 = 0, 2


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: str, value: Any) -> bytes:
    if kind == "str":
        return text(name) + struct.pack("<I", STRING) + text(value)
    code, form = TYPES[kind]
    return text(name) + struct.pack("<I", code) + struct.pack(form, value)


def tensor(name: str | bytes, dims: Sequence[int], offset: int = 0, kind: int = F32) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data
