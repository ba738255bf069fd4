"""Where weights and cache lie during inference: whole or cut over `tensor`, resident, in the dtype of computation."""

from collections.abc import Callable
from typing import Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.model import cached
from phijax.model import params as model_params
from phijax.model.backend import Backend
from phijax.model.config import ModelConfig
from phijax.model.inference_layout import InferenceLayout
from phijax.model.kernels import cpu_int4, cpu_int4_library, integers_tpu
from phijax.model.kernels.decode_tpu import StackedCache
from phijax.model.params import Params
from phijax.model.quantized import Quantized
from phijax.model.weights import WeightFormat
from phijax.parallel import sharding


def choose_layout(
    c: ModelConfig, backend: Backend, mesh: Mesh, cache_dtype: Literal["auto", "int8"] = "auto"
) -> InferenceLayout:
    """The static choices that belong to a backend and a mesh. cache_dtype: "auto": that of computation."""
    tensor = mesh.shape["tensor"]
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return InferenceLayout(
        unrolled=not backend.scan_layers,
        transposed=not backend.scan_layers and tensor == 1,
        dtype=backend.compute_dtype,
        rope_by_matmul=backend.rope_by_matmul,
        cut_by_time=mesh if tensor > 1 and c.num_kv_heads % tensor else None,
        stacked=on_tpu and backend.scan_layers and c.num_kv_heads % tensor == 0,
        cache_dtype=cache_dtype,
        least_rows=8 if on_tpu else 2,
        mesh=mesh if on_tpu and mesh.size > 1 else None,
    )


def matrix_format(backend: Backend, mesh: Mesh) -> Callable[[Quantized], WeightFormat] | None:
    """What becomes of each matrix that is stored in few bits: the format of one CPU's kernel; None: it stays so.

    The kernel is built, or said to be missing, when the first matrix comes.
    """
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    if not (backend.int8_activations and one_cpu and not backend.scan_layers):
        return None

    def form(w: Quantized) -> WeightFormat:
        path = cpu_int4_library.path() if cpu_int4.fits(w) else None
        return w if path is None else cpu_int4.tiled(w, path)

    return form


def place(
    c: ModelConfig,
    layout: InferenceLayout,
    params: Params,
    mesh: Mesh,
    form: Callable[[Quantized], WeightFormat] | None = None,
) -> cached.Weights:
    """Parameters as the programs use them: gathered over every axis but `tensor`, once; cast; a layer an array.

    A leaf whose heads (or rows) `tensor` does not divide is whole on every chip. Of quantised leaves the integers are
    cut so; their scales too, where they have as many groups of rows.

    Args: form: as `matrix_format` gives it.
    """

    def put(array: jax.Array, cut: list[str | None]) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*cut)))

    def put_leaf(name: str, leaf, axes: tuple[str, ...]):
        if isinstance(leaf, tuple):
            return tuple(put_leaf(name, layer, axes[1:]) for layer in leaf)
        if isinstance(leaf, Quantized) and form is not None:
            if len(leaf.shape) == 3:
                return tuple(
                    put_leaf(name, jax.tree.map(lambda a, i=i: a[i], leaf), axes[1:]) for i in range(c.num_layers)
                )
            leaf = form(leaf)
        cut = cut_of(c, mesh, axes, leaf.shape)
        if isinstance(leaf, Quantized):
            groups = [None if n % mesh.shape["tensor"] else at for at, n in zip(cut, leaf.scales.shape, strict=True)]
            return for_kernel(c, layout, name, Quantized(put(leaf.values, cut), put(leaf.scales, groups)), cut, mesh)
        return leaf if isinstance(leaf, WeightFormat) else put(leaf, cut).astype(layout.dtype)

    axes = model_params.axes(c)
    weights = model_params.nested(
        {name: put_leaf(name, leaf, axes[name]) for name, leaf in model_params.flat(params).items()}
    )
    if layout.unrolled:
        weights = cached.layered(weights, c.num_layers)
    return cached.transposed(weights) if layout.transposed else weights


def cut_of(c: ModelConfig, mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> list[str | None]:
    """The mesh axis of each dimension of a leaf: `tensor` or None."""
    heads = {"heads": c.num_heads, "kv_heads": c.num_kv_heads}

    def of(axis: str, length: int) -> str | None:
        if "tensor" not in (sharding.RULES.get(axis) or ()):
            return None
        return "tensor" if heads.get(axis, length) % mesh.shape["tensor"] == 0 else None

    return [of(axis, length) for axis, length in zip(axes, shape, strict=True)]


def for_kernel(
    c: ModelConfig, layout: InferenceLayout, name: str, w: Quantized, cut: list[str | None], mesh: Mesh
) -> WeightFormat:
    """The weight in the order of the TPU's kernel, where that is used and takes it; an embedding is only looked up."""
    parts = mesh.shape["tensor"] if "tensor" in cut else 1
    if not layout.stacked or (name == "embedding" and not c.tied_head) or not integers_tpu.fits(w, parts):
        return w
    return integers_tpu.from_quantized(w, layout.mesh, cut=parts > 1, interpret=layout.interpret)


def cache_sharding(c: ModelConfig, layout: InferenceLayout, mesh: Mesh) -> NamedSharding | StackedCache:
    """Of each array of the cache: by kv head where `tensor` divides them, else by time."""

    def cut(*spec: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*spec))

    if layout.stacked:
        lines, scales = cut(None, None, None, "tensor"), cut(None, None, "tensor", None)
        return StackedCache(lines, lines, *[scales] * (2 * (layout.cache_dtype == "int8")))
    spec = (None, None, "tensor", None) if layout.cut_by_time is not None else (None, "tensor", None, None)
    return cut(*spec if layout.unrolled else (None, *spec))
