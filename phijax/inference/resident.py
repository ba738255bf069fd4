"""Where weights and cache lie during inference: whole or cut over `tensor`, resident, in the dtype of computation."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.model import cached
from phijax.model import params as model_params
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.params import Params
from phijax.model.quantized import Quantized
from phijax.parallel import sharding


def choose_path(c: ModelConfig, backend: Backend, mesh: Mesh) -> cached.Path:
    """The static choices that belong to a backend and a mesh."""
    tensor = mesh.shape["tensor"]
    return cached.Path(
        unrolled=not backend.scan_layers,
        transposed=not backend.scan_layers and tensor == 1,
        dtype=backend.compute_dtype,
        rope_by_matmul=backend.rope_by_matmul,
        cut_by_time=mesh if tensor > 1 and c.num_kv_heads % tensor else None,
    )


def place(c: ModelConfig, path: cached.Path, params: Params, mesh: Mesh) -> cached.Weights:
    """Parameters as the programs use them: gathered over every axis but `tensor`, once; cast; a layer an array.

    A leaf whose heads (or rows) `tensor` does not divide is whole on every chip. Of quantised leaves the integers are
    cut so; their scales too, where they have as many groups of rows.
    """
    heads = {"heads": c.num_heads, "kv_heads": c.num_kv_heads}

    def rows(axis: str | None, length: int) -> str | None:
        if "tensor" not in (sharding.RULES.get(axis) or ()):
            return None
        return "tensor" if heads.get(axis, length) % mesh.shape["tensor"] == 0 else None

    def put(array: jax.Array, cut: list[str | None]) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*cut)))

    placed = {}
    for name, leaf in model_params.flat(params).items():
        axes = model_params.axes(c)[name]
        cut = [rows(axis, length) for axis, length in zip(axes, leaf.shape, strict=True)]
        if isinstance(leaf, Quantized):
            groups = [None if n % mesh.shape["tensor"] else at for at, n in zip(cut, leaf.scales.shape, strict=True)]
            placed[name] = Quantized(put(leaf.values, cut), put(leaf.scales, groups))
        else:
            placed[name] = put(leaf, cut).astype(path.dtype)
    weights = model_params.nested(placed)
    if path.unrolled:
        weights = cached.layered(weights, c.num_layers)
    return cached.transposed(weights) if path.transposed else weights


def cache_sharding(c: ModelConfig, path: cached.Path, mesh: Mesh) -> NamedSharding:
    """Of each array of the cache: by kv head where `tensor` divides them, else by time."""
    spec = (None, None, "tensor", None) if path.cut_by_time is not None else (None, "tensor", None, None)
    return NamedSharding(mesh, PartitionSpec(*spec if path.unrolled else (None, *spec)))
