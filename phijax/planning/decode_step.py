"""The programs of generation, compiled ahead of time for TPUs that are not here."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.inference import placement, programs
from phijax.model import cached
from phijax.model import params as model_params
from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.model.inference_layout import InferenceLayout
from phijax.model.params import Params
from phijax.model.quantized import Quantized
from phijax.quantization import policy
from phijax.quantization.policy import Scheme


@dataclasses.dataclass(frozen=True)
class Served:
    """What is generated with.

    schemes: kind of weight -> its scheme, as `policy.parse` gives them; other weights are bfloat16.
    mesh: over `topology.tpu_devices`; its axis `tensor` cuts heads.
    """

    model: ModelConfig
    mesh: Mesh
    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    cache_dtype: Literal["auto", "int8"] = "auto"

    @property
    def layout(self) -> InferenceLayout:
        return placement.choose_layout(self.model, CHOICES["tpu"], self.mesh, self.cache_dtype)


def lower_step(served: Served, rows: int, places: int):
    """One token of each of `rows` rows over a cache of `places` places: `programs.step` before it is compiled."""
    return trace_step(served, rows, places).lower()


def trace_step(served: Served, rows: int, places: int):
    """`lower_step`'s program before it is lowered; `.jaxpr` is what was traced."""
    layout, c = served.layout, served.model
    batch = max(rows, layout.least_rows)
    return programs.step.trace(
        c,
        layout,
        1.0,
        abstract_weights(served),
        abstract_cache(served, rows, places),
        _whole(served, (batch,), jnp.int32),
        _whole(served, (batch,), jnp.int32),
        _whole(served, (batch, c.rotary_dim // 2), jnp.float32),
        None,
    )


def lower_prefill(served: Served, tokens: int, places: int):
    """A chunk of `tokens` tokens of one prompt into a cache of `places` places: `programs.prefill`."""
    return programs.prefill.lower(
        served.model,
        served.layout,
        1.0,
        False,
        abstract_weights(served),
        abstract_cache(served, 1, places),
        _whole(served, (tokens,), jnp.int32),
        _whole(served, (), jnp.int32),
        _whole(served, (), jnp.int32),
        _whole(served, (served.model.rotary_dim // 2,), jnp.float32),
    )


def abstract_weights(served: Served) -> Params:
    """As `placement.place` lays them, without values."""
    c, mesh = served.model, served.mesh
    schemes, axes = policy.assign(c, served.schemes), model_params.axes(c)
    out = {}
    for name, shape in model_params.shapes(c).items():
        cut = placement.cut_of(c, mesh, axes[name], shape)
        if name in schemes:
            out[name] = _abstract_quantized(served, name, shape, schemes[name], cut)
        else:
            out[name] = _abstract(mesh, shape, served.layout.dtype, cut)
    return model_params.nested(out)


def _abstract_quantized(served: Served, name: str, shape, scheme: Scheme, cut):
    mesh, axis = served.mesh, policy.summed_axis(name)
    groups = scheme.scales_shape(shape, axis)
    stored = Quantized(
        jax.ShapeDtypeStruct(shape, jnp.int4 if scheme.bits == 4 else jnp.int8),
        jax.ShapeDtypeStruct(groups, jnp.float16),
    )
    placed = jax.eval_shape(lambda w: placement.for_kernel(served.model, served.layout, name, w, cut, mesh), stored)
    along = [at if n % mesh.shape["tensor"] == 0 else None for at, n in zip(cut, groups, strict=True)]
    if placed.scales.shape != tuple(groups):  # turned
        along[-1], along[-2] = along[-2], along[-1]
    return dataclasses.replace(
        placed,
        values=_abstract(mesh, shape, placed.values.dtype, cut),
        scales=_abstract(mesh, placed.scales.shape, placed.scales.dtype, along),
    )


def abstract_cache(served: Served, rows: int, places: int) -> cached.Cache:
    c, layout = served.model, served.layout
    arrays = jax.eval_shape(lambda: cached.empty_cache(c, layout, rows, programs.piece_lengths(places)))
    at = placement.cache_sharding(c, layout, served.mesh)
    at = jax.tree.map(lambda _: at, arrays) if isinstance(at, NamedSharding) else at
    return jax.tree.map(lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), arrays, at)


def bytes_read(served: Served, rows: int, places: int) -> float:
    """By one chip in a step: every weight but what is looked up, and a cache that is full: no program can be without.

    Numbers by their own bits, nothing padded.
    """
    weights = model_params.flat(abstract_weights(served))
    weights.pop("position_embedding", None)
    if not served.model.tied_head:
        weights.pop("embedding")
    return sum(_bytes(leaf) for leaf in jax.tree.leaves((weights, abstract_cache(served, rows, places))))


def _bytes(leaf: jax.ShapeDtypeStruct) -> float:
    shape = leaf.sharding.shard_shape(leaf.shape)
    bits = 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize
    size = 1
    for n in shape:
        size *= n
    return size * bits / 8


def _abstract(mesh: Mesh, shape, dtype, cut) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, PartitionSpec(*cut)))


def _whole(served: Served, shape, dtype) -> jax.ShapeDtypeStruct:
    return _abstract(served.mesh, shape, dtype, ())
