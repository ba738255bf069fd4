"""Where weights and cache lie during inference: whole or cut over `tensor`, resident, in the dtype of computation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from phijax.inference.fitting import fitted
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
from phijax.quantization.policy import Scheme


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
    *,
    schemes: Mapping[str, Scheme] | None = None,
    owned: bool = False,
) -> cached.Weights:
    """Parameters as the programs use them: gathered over every axis but `tensor`, once; cast; a layer an array.

    A leaf whose heads (or rows) `tensor` does not divide is whole on every chip. Of quantised leaves the integers are
    cut so; their scales too, where they have as many groups of rows. Changes of low rank are merged. Leaf by leaf:
    besides `params` and the result no more than one leaf is held.

    Args:
      form: as `matrix_format` gives it. A leaf that has it already is taken as it is.
      schemes: leaf path -> what floats there are rounded by, to the nearest.
      owned: arrays that need no change may become part of the result; else all are copied.
    """
    axes, flat = model_params.axes(c), model_params.flat(params)

    def put(array: Any, path: str, names: tuple[str, ...], cut: list[str | None], dtype: str) -> Any:
        array = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*cut)))
        if owned and not layout.unrolled and array.dtype == dtype:
            return array
        return _laid_out(layout, path, names[0] == "layers", c.num_layers, dtype, array)

    def put_quantized(w: Quantized, path: str, names: tuple[str, ...]) -> Any:
        cut = cut_of(c, mesh, names, w.shape)
        groups = [None if n % mesh.shape["tensor"] else at for at, n in zip(cut, w.scales.shape, strict=True)]
        values, scales = (put(a, path, names, at, str(a.dtype)) for a, at in ((w.values, cut), (w.scales, groups)))
        if isinstance(values, tuple):
            return tuple(map(Quantized, values, scales))
        return for_kernel(c, layout, path, Quantized(values, scales), cut, mesh)

    def put_leaf(leaf: Any, path: str, names: tuple[str, ...]) -> Any:
        if isinstance(leaf, tuple):
            return tuple(put_leaf(one, path, names[1:]) for one in leaf)
        if isinstance(leaf, Quantized) and form is not None:
            if len(leaf.shape) == 3:
                layers = (jax.tree.map(lambda a, i=i: a[i], leaf) for i in range(c.num_layers))
                return tuple(put_leaf(one, path, names[1:]) for one in layers)
            made = form(leaf)
            return put_quantized(made, path, names) if isinstance(made, Quantized) else made
        if isinstance(leaf, Quantized):
            return put_quantized(leaf, path, names)
        if isinstance(leaf, WeightFormat):
            return leaf if owned else jax.tree.map(jnp.copy, leaf)
        return put(leaf, path, names, cut_of(c, mesh, names, leaf.shape), layout.dtype)

    def put_fitted(path: str, name: str) -> Any:
        return put_leaf(fitted(path, flat[path], (schemes or {}).get(path)), name, axes[path])

    leaves = {path: put_fitted(path, path) for path in flat}
    if layout.transposed and c.tied_head:
        made = leaves["embedding"]
        of_platform = isinstance(made, WeightFormat) and not isinstance(made, Quantized)
        leaves[cached.HEAD] = made if of_platform else put_fitted("embedding", cached.HEAD)
    return cached.assembled(layout, leaves, c.num_layers)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _laid_out(layout: InferenceLayout, path: str, stacked: bool, num_layers: int, dtype: str, array: jax.Array) -> Any:
    """`cached.laid_out` of an array in dtype, `stacked` or of one layer; nothing of it is the argument itself."""
    array = jnp.copy(array.astype(dtype))
    if stacked or not path.startswith(f"{model_params.STACKED}/"):
        return cached.laid_out(layout, path, array, num_layers)
    return cached.laid_out(layout, path, (array,), num_layers)[0]


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
