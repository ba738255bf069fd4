"""Which weight gets which bits: the schemes by name, and the table from kinds of weights to schemes."""

import dataclasses
import math
from collections.abc import Mapping

from phijax.errors import UserError, nearest_name
from phijax.model import params
from phijax.model.config import ModelConfig

SCALE_BYTES = 2  # float16: what GGUF has, one of what the others take, and 0.25 % of a weight's error at worst


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Symmetric integers of `bits`, one scale for each `group` weights along the input axis; None: for a channel."""

    bits: int
    group: int | None = None

    def scales_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Of the scales of a weight (..., rows, D) that is summed over `axis` (-1 or -2)."""
        out = list(shape)
        out[axis] = 1 if self.group is None else shape[axis] // self.group
        return tuple(out)

    def nbytes(self, shape: tuple[int, ...], axis: int) -> int:
        """Bytes of values and scales, before compression."""
        return math.prod(shape) * self.bits // 8 + math.prod(self.scales_shape(shape, axis)) * SCALE_BYTES


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(8),
    "int4": Scheme(4),
    "int4_g128": Scheme(4, 128),
    "int4_g64": Scheme(4, 64),
    "int4_g32": Scheme(4, 32),
}
AS_STORED = "as_stored"

KINDS = ("qkv", "o", "gate_up", "down", "embedding", "head")  # as leaves declare them; the columns of the table

# --scheme -> the scheme of each kind, in the order of KINDS. Norms, biases and positions are never quantised.
POLICIES: dict[str, tuple[str, ...]] = {
    #                   qkv          o            gate_up      down         embedding    head
    "int8":            ("int8",      "int8",      "int8",      "int8",      "int8",      "int8"),
    "int4":            ("int4",      "int4",      "int4",      "int4",      "int4",      "int4"),
    "int4_g128":       ("int4_g128", "int4_g128", "int4_g128", "int4_g128", "int4_g128", "int4_g128"),
    "int4_g64":        ("int4_g64",  "int4_g64",  "int4_g64",  "int4_g64",  "int4_g64",  "int4_g64"),
    "int4_g32":        ("int4_g32",  "int4_g32",  "int4_g32",  "int4_g32",  "int4_g32",  "int4_g32"),
    # down sees the products of silu, which have outliers: phi-4-mini babbles with it in four bits.
    "int4_down8":      ("int4",      "int4",      "int4",      "int8",      "int8",      "int8"),
    "int4_g128_down8": ("int4_g128", "int4_g128", "int4_g128", "int8",      "int4_g128", "int4_g128"),
    "int4_g64_down8":  ("int4_g64",  "int4_g64",  "int4_g64",  "int8",      "int4_g64",  "int4_g64"),
    "int4_g32_down8":  ("int4_g32",  "int4_g32",  "int4_g32",  "int8",      "int4_g32",  "int4_g32"),
    # Embedding and head as other tools keep them.
    "int4_g128_head8": ("int4_g128", "int4_g128", "int4_g128", "int4_g128", "int8",      "int8"),
    "int4_g64_head8":  ("int4_g64",  "int4_g64",  "int4_g64",  "int4_g64",  "int8",      "int8"),
    "int4_g32_head8":  ("int4_g32",  "int4_g32",  "int4_g32",  "int4_g32",  "int8",      "int8"),
}  # fmt: skip


def summed_axis(path: str) -> int:
    """The axis of a leaf (..., rows, D) along which groups run: the one that its products sum over, -1 or -2."""
    leaf = params.any_leaves().get(path)
    return leaf.summed_axis if leaf else -1


def kind_of(path: str) -> str | None:
    """The kind of a leaf; None for what is no matrix, and for names that are no leaf's."""
    leaf = params.any_leaves().get(path)
    return leaf.kind if leaf else None


def paths_of(c: ModelConfig, kind: str) -> tuple[str, ...]:
    """The leaves of a kind."""
    return tuple(path for path, leaf in params.leaves(c).items() if leaf.kind == kind)


def parse(text: str, *, tied_head: bool = False) -> dict[str, Scheme]:
    """ "int4_g64" or "int4_g64,down=int8,head=as_stored" -> kind -> scheme, without the kinds that stay as stored.

    Raises: UserError for a name that is not in the tables; for a head that is the embedding and was to be another.
    """
    name, *changes = (part.strip() for part in text.split(","))
    _known("--scheme", name, POLICIES)
    chosen = dict(zip(KINDS, POLICIES[name], strict=True))
    for change in changes:
        kind, _, scheme = change.partition("=")
        _known(f"--scheme={text}: kind", kind, KINDS)
        _known(f"--scheme={text}: {kind}", scheme, (*SCHEMES, AS_STORED))
        chosen[kind] = scheme
    by_hand = any(change.partition("=")[0] == "head" for change in changes)
    if tied_head and by_hand and chosen["head"] != chosen["embedding"]:
        raise UserError(
            f"--scheme={text}: this model's head is its embedding (tied), so it has no scheme of its own, and "
            f"embedding={chosen['embedding']}.\nSay embedding={chosen['head']}, which is both, and leave head out."
        )
    return {kind: SCHEMES[scheme] for kind, scheme in chosen.items() if scheme != AS_STORED}


def assign(c: ModelConfig, policy: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Leaf path -> its scheme, for the leaves of a model that are quantised.

    Raises: UserError for a leaf that the scheme's groups do not divide, with the groups that do.
    """
    assigned = {}
    for path, shape in params.shapes(c).items():
        scheme = policy.get(kind_of(path) or "")
        if scheme is None:
            continue
        axis = summed_axis(path)
        if scheme.group is not None and shape[axis] % scheme.group:
            fits = [name for name, s in SCHEMES.items() if s.group is None or shape[axis] % s.group == 0]
            raise UserError(
                f"{path} has {shape[axis]} inputs, which groups of {scheme.group} do not divide.\n"
                f"Schemes that do: {', '.join(fits)}. One kind alone is changed by --scheme=...,{kind_of(path)}=..."
            )
        if shape[-1] % 2:
            raise UserError(f"{path} has rows of {shape[-1]} weights; two go into a byte, so the number must be even.")
        assigned[path] = scheme
    return assigned


def name_of(scheme: Scheme) -> str:
    return next(name for name, known in SCHEMES.items() if known == scheme)


def _known(what: str, name: str, names) -> None:
    if name not in names:
        near = nearest_name(name, names)
        raise UserError(f"{what}={name} is not one of {', '.join(names)}." + (f" Nearest: {near}." if near else ""))
