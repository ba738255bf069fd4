"""A GGUF file's keys <-> ModelConfig. A key that changes the mathematics and that we do not follow is refused by name.

Sources of the keys: llama.cpp's docs and conversion/phi.py; LongRoPE's attention factor as in model/rope.py.
"""

import math
from typing import Any

import numpy as np

from phijax.errors import UserError, nearest_name
from phijax.interchange.gguf.file import GgufFile
from phijax.interchange.gguf.names import LLAMA, LONG_FACTORS, PHI3, SHORT_FACTORS, TABLE
from phijax.interchange.weight_source import LEAST_OF_A_LAYER
from phijax.model.config import LongRope, ModelConfig
from phijax.model.rope import inverse_frequencies

_MOST = 1 << 31  # no size of a model reaches it

# Keys (behind the architecture's name) that decide what is computed, and that `model_of` follows.
_FOLLOWED = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
}
# Keys that change the mathematics unless they say that they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "longrope"),  # longrope: the lists say it already
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.finetuned": (False, True),  # a remark
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "tensor_data_layout": ("", "Meta AI original pth"),  # a remark of 2023
}


def architecture_of(file: GgufFile) -> str:
    """Raises: UserError for an architecture that is not ours."""
    # First of all: only the first part of several has the other keys.
    parts, number = (file.metadata.get(f"split.{name}", 0) for name in ("count", "no"))
    if parts not in (0, 1):
        part = f"part {number + 1} of {parts}" if type(number) is int else f"one of {parts} parts"
        raise UserError(
            f"{file.path} is {part}. Join all parts into one file first: llama-gguf-split --merge FIRST_PART OUTPUT."
        )
    architecture = file.metadata.get("general.architecture")
    if architecture is None:
        raise UserError(f"{file.path} is no model: it has no general.architecture.")
    if file.metadata.get("general.type", "model") != "model":
        raise UserError(f"{file.path} holds a {file.metadata['general.type']!r}, not a model.")
    if architecture not in TABLE:
        raise UserError(
            f"{file.path} is a model of architecture {architecture!r}; read are {', '.join(map(repr, TABLE))}."
        )
    return architecture


def model_of(file: GgufFile, architecture: str) -> ModelConfig:
    """Raises: UserError for a key that is missing, no number that describes a model, or asks for other mathematics."""
    keys = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    _refuse_other_mathematics(file, architecture, keys)
    read = _Numbers(file, architecture, keys)
    model_dim, num_layers = read.size("embedding_length"), read.size("block_count")
    if num_layers * LEAST_OF_A_LAYER > len(file.tensors):
        raise UserError(f"{file.path}: {architecture}.block_count={num_layers}, with {len(file.tensors)} tensors.")
    num_heads = read.size("attention.head_count")
    head_dim = read.size("attention.key_length", model_dim // num_heads)
    if (value_dim := read.size("attention.value_length", head_dim)) != head_dim:
        raise UserError(f"{file.path}: heads of {head_dim} for keys and {value_dim} for values; one size is read.")
    rotary_dim = read.size("rope.dimension_count", head_dim)
    if rotary_dim > head_dim or (architecture == LLAMA and rotary_dim != head_dim):
        raise UserError(
            f"{file.path}: {architecture}.rope.dimension_count={rotary_dim} of {head_dim} is not read"
            + ("." if rotary_dim > head_dim else f" for this architecture, only for {PHI3!r}.")
        )
    config = ModelConfig(
        vocab_size=_vocabulary(file, read, architecture),
        model_dim=model_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=read.size("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_dim=read.size("feed_forward_length"),
        max_position=read.size("context_length"),
        rope_theta=read.decimal("rope.freq_base", 10000.0),
        partial_rotary_factor=_share(rotary_dim, head_dim),
        sliding_window=read.size("attention.sliding_window", 0, least=0) or None,
        tied_head="output.weight" not in file.tensors,
        norm_eps=read.decimal("attention.layer_norm_rms_epsilon"),
        long_rope=_long_rope(file, read, rotary_dim),
    )
    config.check()
    _check_attention_factor(file, architecture, read, config)
    return config


def keys_of(c: ModelConfig, architecture: str) -> dict[str, int | float]:
    """Keys behind the architecture's name -> values; whole numbers are written as uint32, others as float32.

    Raises: UserError with the reason where llama.cpp computes something else than this model.
    """
    if reason := lacks(c, architecture):
        other = next(name for name in TABLE if name != architecture)
        advice = f" Write it as {other!r}." if lacks(c, other) is None else ""
        raise UserError(f"A GGUF file of architecture {architecture!r} cannot hold this model: {reason}.{advice}")
    keys: dict[str, int | float] = {
        "context_length": c.max_position,
        "embedding_length": c.model_dim,
        "block_count": c.num_layers,
        "feed_forward_length": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(c.rope_theta),
    }
    if architecture == LLAMA:
        return keys | {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    original = c.long_rope.original_max_position if c.long_rope else c.max_position
    keys["rope.scaling.original_context_length"] = original
    keys["attention.sliding_window"] = c.sliding_window or 0
    if c.long_rope:
        keys["rope.scaling.attn_factor"] = inverse_frequencies(c, c.max_position)[1]
    return keys


def lacks(c: ModelConfig, architecture: str) -> str | None:
    """Why a file of this architecture cannot hold the model, if so: what llama.cpp would compute otherwise."""
    if architecture == LLAMA:
        missing = {
            "a sliding window": c.sliding_window is not None,
            "LongRoPE's two lists": c.long_rope is not None,
            "heads that rotate in part": c.rotary_dim != c.head_dim,
        }
        named = [name for name, needed in missing.items() if needed]
        return f"it has {' and '.join(named)}" if named else None
    if c.num_heads * c.head_dim != c.model_dim:
        return (
            f"it has {c.num_heads} heads of {c.head_dim} = {c.num_heads * c.head_dim} and a width of {c.model_dim}, "
            "which must be equal there"
        )
    return None


def _refuse_other_mathematics(file: GgufFile, architecture: str, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if key in _FOLLOWED or (not isinstance(value, np.ndarray | list) and value in _NEUTRAL.get(key, ())):
            continue
        near = nearest_name(key, _FOLLOWED)
        raise UserError(
            f"{file.path}: {architecture}.{key}={_shown(value)} is not followed here, so the outputs would differ."
            + (f" Near to it: {architecture}.{near}." if near and key not in _NEUTRAL else "")
        )


class _Numbers:
    """Reads keys as the numbers that they must be."""

    def __init__(self, file: GgufFile, architecture: str, keys: dict[str, Any]):
        self.file, self.architecture, self.keys = file, architecture, keys

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(key, default)
        if type(value) is not int or not least <= value < _MOST:
            raise UserError(
                f"{self.file.path}: {self.architecture}.{key}={_shown(value)} must be a whole number >= {least}."
            )
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A positive number. The file has it in float32: what comes back is the shortest decimal that rounds to it."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{self.file.path}: {self.architecture}.{key}={_shown(value)} must be a positive number.")
        return shortest(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.keys.get(key, default)
        if value is None:
            raise UserError(f"{self.file.path} has no {self.architecture}.{key}, so it is not known which model it is.")
        return value


def shortest(value: float) -> float:
    """1e-5 for the float32 9.99999974e-06: what was written, as far as float32 tells."""
    return float(str(np.float32(value)))


def _share(rotary_dim: int, head_dim: int) -> float:
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, 1.0)


def _vocabulary(file: GgufFile, read: _Numbers, architecture: str) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{file.path} has no token_embd.weight of two dimensions.")
    if (said := read.size("vocab_size", embedding.shape[0])) != embedding.shape[0]:
        raise UserError(
            f"{file.path}: {architecture}.vocab_size={said}, but token_embd.weight has {embedding.shape[0]} rows."
        )
    return embedding.shape[0]


def exact_lists(c: ModelConfig) -> dict[str, list[float]]:
    """Keys of our own with LongRoPE's lists in float64, where float32 does not give the published digits back.

    The tensors are float32, as llama.cpp wants them; 1.3000000000000003, which phi-3-mini-128k has, is 1.3 in them.
    """
    if c.long_rope is None:
        return {}
    lists = {LONG_FACTORS: c.long_rope.long_factor, SHORT_FACTORS: c.long_rope.short_factor}
    return {
        _exact_key(name): list(values) for name, values in lists.items() if list(map(shortest, values)) != list(values)
    }


def _exact_key(name: str) -> str:
    return f"phijax.{name.removesuffix('.weight')}"


def _long_rope(file: GgufFile, read: _Numbers, rotary_dim: int) -> LongRope | None:
    lists = {name: file.tensors[name] for name in (LONG_FACTORS, SHORT_FACTORS) if name in file.tensors}
    if not lists:
        return None
    if len(lists) == 1:
        raise UserError(f"{file.path} has {next(iter(lists))} alone; LongRoPE needs both lists.")
    values = {}
    for name, stored in lists.items():
        if stored.shape != (rotary_dim // 2,) or stored.kind.name != "F32":
            raise UserError(f"{file.path}: {name} must be {rotary_dim // 2} numbers in F32.")
        raw = file.data[stored.offset : stored.offset + stored.size].view(np.float32)
        if not (np.isfinite(raw) & (raw > 0)).all():
            raise UserError(f"{file.path}: {name} must hold positive numbers.")
        exact = file.metadata.get(_exact_key(name))
        if exact is None:
            values[name] = tuple(map(shortest, raw))
            continue
        with np.errstate(all="ignore"):
            same = isinstance(exact, np.ndarray) and np.array_equal(exact.astype(np.float32), raw)
        if not same:
            raise UserError(f"{file.path}: {_exact_key(name)} and {name} are not the same numbers.")
        values[name] = tuple(exact.tolist())
    original = read.size("rope.scaling.original_context_length", least=2)  # its logarithm is a divisor
    return LongRope(values[SHORT_FACTORS], values[LONG_FACTORS], original)


def _check_attention_factor(file: GgufFile, architecture: str, read: _Numbers, c: ModelConfig) -> None:
    """The factor on cos and sin follows from two lengths here; a file may state another."""
    ours = inverse_frequencies(c, c.max_position)[1]
    said = read.decimal("rope.scaling.attn_factor", 1.0)
    if not math.isclose(ours, said, rel_tol=1e-5):
        raise UserError(
            f"{file.path}: {architecture}.rope.scaling.attn_factor is {said}, and {ours:.6f} by LongRoPE's formula "
            f"from its lengths. A factor of its own is not followed here, so the outputs would differ."
        )


def _shown(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) and value.size < 100 else value)
    return text if len(text) < 80 else text[:77] + "..."
