"""Changes of low rank to some of a model's matrices: which leaves they have, and the parameters that they are part of.

The leaves are a tree of their own beside the base's, so that either can be trained, kept or exported without the other:
an objective that trains them alone is one of `attached(frozen, params, scale)`.
"""

from collections.abc import Collection
from typing import Any

from phijax.errors import UserError, nearest_name
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.model.low_rank import LowRank, factor_axes, factor_shapes
from phijax.model.weights import ZEROS, normal


def leaves(c: ModelConfig, kinds: Collection[str], rank: int) -> dict[str, params.Leaf]:
    """PATH/a and PATH/b of each matrix PATH of these kinds that is to be a LowRank -> what is declared of them.

    What the input meets first starts at random, with the deviation of Kaiming's uniform numbers in [-1, 1] / sqrt(n)
    (PEFT's start), what comes second at zero: so the model starts as its base.

    Raises: UserError for a kind that no block has (the embedding is looked up, and the loss takes the whole head:
      neither is contracted by the two verbs), for none at all, or a rank below 1.
    """
    in_blocks = {path: leaf for path, leaf in params.leaves(c).items() if path.startswith(f"{params.STACKED}/")}
    matrices = {path: leaf for path, leaf in in_blocks.items() if leaf.kind is not None}
    known = sorted({leaf.kind for leaf in matrices.values()})
    for kind in kinds:
        if kind not in known:
            near = nearest_name(kind, known)
            raise UserError(
                f"{kind!r} is no kind of matrix that a change of low rank can be added to: {', '.join(known)}."
                + (f" Nearest: {near!r}." if near else "")
            )
    if not kinds:
        raise UserError(f"a change of low rank needs kinds of matrices that it is added to: {', '.join(known)}.")
    if rank < 1:
        raise UserError(f"a change of low rank has a rank of 1 or more, not {rank}.")
    out = {}
    for path, leaf in matrices.items():
        if leaf.kind not in kinds:
            continue
        shapes = factor_shapes(leaf.shape, rank)
        drawn = normal((3 * leaf.shape[leaf.summed_axis]) ** -0.5)
        starts = {"a": ZEROS, "b": drawn} if leaf.summed == "rows" else {"a": drawn, "b": ZEROS}
        for name, axes in factor_axes(leaf.axes).items():
            fed = leaf.feeds if name == "b" else None  # a has none of the base's rows
            out[f"{path}/{name}"] = leaf._replace(shape=shapes[name], axes=axes, start=starts[name], feeds=fed)
    return out


def attached(base: params.Params, factors: params.Params, scale: float) -> params.Params:
    """The parameters with a LowRank at each path of which `factors` has a and b: what `module` and objectives take.

    Raises: UserError where the two do not fit: a path that the base lacks or that is no matrix, other sizes.
    """
    out, known = params.flat(base), params.any_leaves()
    parts = params.flat(factors)
    for path in sorted({name.rpartition("/")[0] for name in parts}):
        a, b = (parts.pop(f"{path}/{name}", None) for name in ("a", "b"))
        if path not in out or a is None or b is None:
            raise UserError(f"{path}: a change of low rank needs its a, its b and a matrix of that name in the model.")
        if path not in known or known[path].kind is None or min(map(_dimensions, (out[path], a, b))) < 2:
            raise UserError(
                f"{path}: a change of low rank is one of a matrix, or of a stack of them, and a and b are matrices too."
            )
        rank = a.shape[-2]
        due = factor_shapes(out[path].shape, rank)
        if (a.shape, b.shape) != (due["a"], due["b"]):
            raise UserError(
                f"{path}: a {a.shape} and b {b.shape} are no change of low rank of a matrix {out[path].shape}: "
                f"with rank {rank} they would be {due['a']} and {due['b']}."
            )
        out[path] = LowRank(out[path], a, b, scale)
    if parts:
        raise UserError(f"{min(parts)}: a change of low rank has an a and a b, nothing else.")
    return params.nested(out)


def _dimensions(leaf: Any) -> int:
    return len(getattr(leaf, "shape", ()))
