"""The bridge between Flax modules and plain parameters: outside `model/` parameters are a nested dict of arrays."""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from phijax.errors import UserError
from phijax.model.config import ModelConfig
from phijax.model.decoder import Decoder
from phijax.model.weights import Start
from phijax.parallel import sharding

Params = dict[str, Any]
STACKED = "blocks"
_EVERY_LEAF = ModelConfig(
    vocab_size=1,
    model_dim=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    ffn_dim=1,
    max_position=1,
    positions="learned",
    norm="layer",
    bias=True,
)


class Leaf(NamedTuple):
    """What is declared of a leaf, by `weights.weight`; shape and axes of a block's with L in front."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    start: Start
    kind: str | None
    summed: Literal["d", "rows"]
    decayed: bool
    feeds: str | None

    @property
    def summed_axis(self) -> int:
        return -2 if self.summed == "rows" else -1

    @property
    def result_axis(self) -> int:
        """Along which the results of its products lie; of a leaf that is no matrix its last."""
        return -2 if self.kind is not None and self.summed == "d" else -1


@functools.lru_cache(maxsize=16)
def _declared(c: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Leaf]]:
    """The module's structure, and its leaves by path."""
    graph, state = nnx.split(Decoder(c))
    leaves = {}
    for path, variable in nnx.to_flat_state(state):
        shape, axes = tuple(variable.get_value().shape), tuple(variable.axes)
        if path[0] == STACKED:
            shape, axes = (c.num_layers, *shape), ("layers", *axes)
        v = variable
        leaves["/".join(path)] = Leaf(shape, axes, v.start, v.kind, v.summed, v.decayed, v.feeds)
    return graph, leaves


def leaves(c: ModelConfig) -> dict[str, Leaf]:
    """Leaf path -> what is declared of it."""
    return _declared(c)[1]


def any_leaves() -> dict[str, Leaf]:
    """Every leaf that a model can have, and of each what holds in models of every size: its kind, axes, summed axis."""
    return leaves(_EVERY_LEAF)


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Leaf path -> shape; they never depend on the mesh."""
    return {path: leaf.shape for path, leaf in leaves(c).items()}


def axes(c: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Leaf path -> logical axes, one a dimension."""
    return {path: leaf.axes for path, leaf in leaves(c).items()}


def nested(flat: Mapping[str, Any]) -> Params:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    out = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def shardings(c: ModelConfig, mesh: Mesh) -> Params:
    return nested({path: sharding.sharding(mesh, names) for path, names in axes(c).items()})


def abstract(c: ModelConfig, mesh: Mesh | None = None) -> Params:
    """ShapeDtypeStructs of the parameters, with shardings where a mesh is given."""
    placed = flat(shardings(c, mesh)) if mesh is not None else {}
    structs = {p: jax.ShapeDtypeStruct(s, jnp.float32, sharding=placed.get(p)) for p, s in shapes(c).items()}
    return nested(structs)


def init(c: ModelConfig, seed: int) -> Params:
    """Start values of the model's leaves, as `started` makes them."""
    return started(c, leaves(c), seed)


def started(c: ModelConfig, declared: Mapping[str, Leaf], seed: int) -> Params:
    """Start values: a leaf's key is fold_in(seed, crc32(path)), so adding a leaf moves no other.

    Call it under `jax.jit` with `out_shardings`: each device then makes its own part, the same numbers on any mesh.
    """
    key = jax.random.key(seed)
    out = {}
    for path, leaf in declared.items():
        shape, start = leaf.shape, leaf.start
        if start.std == 0.0:
            out[path] = jnp.full(shape, start.value, jnp.float32)
            continue
        values = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, jnp.float32) * start.std
        if "vocab" in leaf.axes:  # rows that stand for no token
            values = jnp.where(jnp.arange(shape[0])[:, None] < c.vocab_size, values, 0.0)
        out[path] = values
    return nested(out)


def module(c: ModelConfig, params: Params) -> Decoder:
    """The Decoder that holds these arrays."""
    return nnx.merge(_declared(c)[0], nnx.State(params))


def module_with(c: ModelConfig, leaves: Mapping[str, Any]) -> Decoder:
    """The Decoder of which only these leaves are there, by path, a stacked one as one layer's; others are abstract."""
    return module(c, nested(flat(abstract(c)) | dict(leaves)))


def count(c: ModelConfig) -> int:
    """Parameters of the model as published: without the rows that pad the vocabulary."""
    return sum(size(c, leaf) for leaf in leaves(c).values())


def size(c: ModelConfig, leaf: Leaf) -> int:
    """Numbers of a leaf, those that pad the vocabulary not counted."""
    lengths = zip(leaf.shape, leaf.axes, strict=True)
    return math.prod(c.vocab_size if name == "vocab" else length for length, name in lengths)


def check_mesh(c: ModelConfig, sizes: Mapping[str, int]) -> list[str]:
    """Refuses a mesh that does not cut the model evenly; returns warnings about rows a chip.

    Raises: UserError, before any memory is taken.
    """
    for what, heads in (("num_kv_heads", c.num_kv_heads), ("num_heads", c.num_heads)):
        if heads % sizes["tensor"]:
            fits = [n for n in range(1, heads + 1) if heads % n == 0 and c.num_heads % n == 0]
            usable = [n for n in fits if c.padded_vocab_size % n == 0]
            vocabulary = (
                f" Of them, the {c.padded_vocab_size} rows of the vocabulary allow: {', '.join(map(str, usable))}."
            )
            raise UserError(
                f"mesh.tensor={sizes['tensor']} cannot be used with model.{what}={heads}: tensor parallelism cuts at "
                f"heads.\nSizes that do: {', '.join(map(str, fits))}." + (vocabulary if usable != fits else "")
            )
    for path, leaf in leaves(c).items():
        sharding.check_divides(path, leaf.shape, leaf.axes, sizes)
    grouped = ("kv_heads",) if c.num_kv_heads < c.num_heads else ()
    laid_out = {path: (leaf.shape, leaf.axes) for path, leaf in leaves(c).items()}
    return sharding.row_warnings(laid_out, sizes, ignore=grouped)
