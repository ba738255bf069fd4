"""LongRoPE in a GGUF file: two tensors (R/2,) of factors in float32, and the factor on cos and sin.

Source: llama.cpp's conversion/phi.py; the factor as in model/rope.py.
"""

import math

import numpy as np

from phijax.errors import UserError
from phijax.interchange.gguf.keys import Keys, shortest
from phijax.model.config import LongRope, ModelConfig
from phijax.model.rope import inverse_frequencies

# Part of the model's configuration, not weights.
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def tensors_of(c: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of its lists; none of a model without."""
    if c.long_rope is None:
        return {}
    lists = {LONG_FACTORS: c.long_rope.long_factor, SHORT_FACTORS: c.long_rope.short_factor}
    return {name: np.asarray(values, np.float32) for name, values in lists.items()}


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


def read_lists(keys: Keys, rotary_dim: int) -> LongRope | None:
    """None of a file without. Raises: UserError for lists that are no two lists of positive numbers."""
    file = keys.file
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
    original = keys.size("rope.scaling.original_context_length", least=2)  # its logarithm is a divisor
    return LongRope(values[SHORT_FACTORS], values[LONG_FACTORS], original)


def check_attention_factor(keys: Keys, c: ModelConfig) -> None:
    """The factor on cos and sin follows from two lengths here; a file may state another.

    Raises: UserError for another.
    """
    ours = inverse_frequencies(c, c.max_position)[1]
    said = keys.decimal("rope.scaling.attn_factor", 1.0)
    if not math.isclose(ours, said, rel_tol=1e-5):
        raise UserError(
            f"{keys.file.path}: {keys.architecture}.rope.scaling.attn_factor is {said}, and {ours:.6f} by LongRoPE's "
            f"formula from its lengths. A factor of its own is not followed here, so the outputs would differ."
        )
