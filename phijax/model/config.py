"""What a model is (ModelConfig), what a user may say about it (ModelSection), and how the two meet."""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from etils import epath

from phijax.errors import UserError, nearest_name
from phijax.model.mask import Mask
from phijax.storage import strict_json
from phijax.storage.strict_json import Fields, shown

VOCAB_MULTIPLE = 1024  # 8 rows on each of 128 chips; fixed, so that shapes never depend on the mesh
CHECKPOINT = "checkpoint"  # the preset that is the model of the run's start weights

Positions = Literal["rotary", "learned"]
Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE, arXiv:2402.13753: each rotary frequency divided by its entry of one of two lists.

    short_factor, long_factor: (R/2,) with R the rotated dimensions of a head.
    original_max_position: tokens up to which the short list holds.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Two models with equal ModelConfigs have the same parameter tree and the same outputs."""

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_position: int
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # share of each head's dimensions that rotate
    sliding_window: int | None = None  # W: a query sees W keys, itself included
    tied_head: bool = False
    norm_eps: float = 1e-5
    long_rope: LongRope | None = None
    requires_long_rope: bool = False  # a 128K preset whose lists come with its checkpoint
    positions: Positions = "rotary"  # learned: a table of max_position rows, added to the embedding
    norm: Norm = "rms"
    bias: bool = False  # of every projection of a block; the head has none
    activation: Activation = "silu"
    gated: bool = True  # f(x gate) * (x up); without: f(x up)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: vocab_size rounded up; the surplus is masked in the loss and cut at export."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rotary_dim(self) -> int:
        """R: dimensions of a head that rotate."""
        return 0 if self.positions == "learned" else int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_scale(self) -> float:
        """The softmax's factor: 1 / sqrt(H)."""
        return self.head_dim**-0.5

    @property
    def mask(self) -> Mask:
        """What a query sees in every layer."""
        return Mask(window=self.sliding_window)

    def residual_std(self, fan_in: int) -> float:
        """Start of what writes into the residual stream: the sum over 2L writers keeps the variance of one."""
        return fan_in**-0.5 / math.sqrt(2 * self.num_layers)

    def check(self) -> None:
        """Raises: UserError for numbers that describe no model."""
        for name in ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1.")
        for name, known in (("positions", Positions), ("norm", Norm), ("activation", Activation)):
            if getattr(self, name) not in typing.get_args(known):
                raise UserError(f"model.{name}={getattr(self, name)!r} must be {' or '.join(typing.get_args(known))}.")
        if self.num_heads % self.num_kv_heads:
            most = min(self.num_heads, 1 << 10)  # of a file's two billion heads the divisors are not looked for
            fits = [n for n in range(1, most + 1) if self.num_heads % n == 0]
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}. "
                f"Sizes that do: {', '.join(map(str, fits))}."
            )
        for name in ("rope_theta", "norm_eps", "partial_rotary_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)} must be a number above 0.")
        if self.positions == "learned" and self.long_rope:
            raise UserError(
                "model.positions=learned: nothing rotates, so there is nothing that LongRoPE's lists would change.\n"
                "Leave long_rope_from out, or take rotary positions."
            )
        if self.positions == "rotary" and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise UserError(
                f"model: {self.rotary_dim} rotated dimensions of {self.head_dim}: must be even, > 0, no more."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"model.sliding_window={self.sliding_window}: at least 1 key (itself), or None.")
        if self.long_rope:
            for name in ("short_factor", "long_factor"):
                count = len(getattr(self.long_rope, name))
                if count != self.rotary_dim // 2:
                    raise UserError(
                        f"model.long_rope.{name} has {count} entries; rotary_dim / 2 = {self.rotary_dim // 2}."
                    )


Preset = Literal["preset"]
# What the first version's files say of a model. A later field stands in a file only where it is not at its default,
# since older code would read that file as another model.
FIRST_FIELDS = frozenset(
    "vocab_size model_dim num_layers num_heads num_kv_heads head_dim ffn_dim max_position rope_theta "
    "partial_rotary_factor sliding_window tied_head norm_eps long_rope requires_long_rope".split()
)
FIRST_LONG_ROPE_FIELDS = frozenset(("short_factor", "long_factor", "original_max_position"))


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Section `model`: a preset, what differs from it ("preset" keeps its number), and how it is computed."""

    preset: str = "tiny"  # a name of model/presets.py, or "checkpoint": the model of init_from
    vocab_size: int | Preset = "preset"  # V; weights are padded to a multiple of 1024
    model_dim: int | Preset = "preset"  # D
    num_layers: int | Preset = "preset"  # L
    num_heads: int | Preset = "preset"  # N, query heads
    num_kv_heads: int | Preset = "preset"  # K, heads of keys and values; divides N
    head_dim: int | Preset = "preset"  # H
    ffn_dim: int | Preset = "preset"  # F, width of the feed-forward layer
    max_position: int | Preset = "preset"  # longest text that the model is made for, in tokens
    rope_theta: float | Preset = "preset"  # base of the rotary frequencies
    partial_rotary_factor: float | Preset = "preset"  # share of each head's dimensions that rotate
    sliding_window: int | Preset | None = "preset"  # W: a query sees W keys, itself included; None: all before it
    tied_head: bool | Preset = "preset"  # whether the head is the embedding
    norm_eps: float | Preset = "preset"  # added to the mean square in each norm
    positions: Positions | Preset = "preset"  # rotary, or learned: a table of max_position rows
    norm: Norm | Preset = "preset"  # rms, or layer: LayerNorm with factors and biases
    bias: bool | Preset = "preset"  # whether each projection of a block has one
    activation: Activation | Preset = "preset"  # of the feed-forward layer
    gated: bool | Preset = "preset"  # f(x gate) * (x up), else f(x up)
    long_rope_from: str | None = None  # a preset, or a Hugging Face config.json, whose LongRoPE lists are taken
    # The path that computes attention; auto: splash on TPU, cudnn on GPU where it can, blocked on CPU.
    attention: Literal["auto", "dense", "blocked", "splash", "cudnn"] = "auto"
    remat: str = "auto"  # what the backward pass finds saved: a name of decoder.REMAT_POLICIES, or names joined by "+"
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: float32 on CPU, else bfloat16
    mlp_products: Literal["float", "int8"] = "float"  # of the feed-forward layers in training
    layers: Literal["auto", "scan", "unroll"] = "auto"  # auto: unrolled on CPU, else one loop


def resolve_model(section: ModelSection, presets: Mapping[str, ModelConfig]) -> ModelConfig:
    """The ModelConfig that a section describes.

    Args:
      presets: the known ones; with CHECKPOINT among them where the start weights' model is known.
    Raises: UserError for an unknown preset, numbers that fit no model, or LongRoPE lists that are missing.
    """
    if section.preset not in presets:
        known = [*presets, CHECKPOINT]
        near = nearest_name(section.preset, known)
        raise UserError(
            f"model.preset={section.preset!r} is not known. "
            + (f"Nearest: {near!r}. " if near else "")
            + f"There are: {', '.join(presets)}; and {CHECKPOINT}, the model of init_from."
        )
    config = presets[section.preset]
    changed = by_hand(section)
    if section.long_rope_from:
        changed["long_rope"] = _long_rope_from(section.long_rope_from, presets)
    config = dataclasses.replace(config, **changed)
    if config.requires_long_rope and config.long_rope is None:
        raise UserError(
            f"model.preset={section.preset!r}: its LongRoPE lists are published only inside its checkpoint.\n"
            f"Point --config.model.long_rope_from at that checkpoint's config.json."
        )
    config.check()
    return config


def by_hand(section: ModelSection) -> dict[str, Any]:
    """Fields of ModelConfig that the user set, not the preset; of LongRoPE that it was set, its path."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    given = {name: value for name, value in dataclasses.asdict(section).items() if name in names and value != "preset"}
    return given | ({"long_rope": section.long_rope_from} if section.long_rope_from else {})


def _long_rope_from(name: str, presets: Mapping[str, ModelConfig]) -> LongRope:
    if name not in presets:
        return read_long_rope(name)
    rope = presets[name].long_rope
    if rope is None:
        raise UserError(f"model.long_rope_from={name}: this preset has no LongRoPE lists.")
    return rope


def read_long_rope(path: str) -> LongRope:
    """LongRoPE lists out of a Hugging Face config.json, under either spelling (`rope_scaling`, `rope_parameters`)."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"model.long_rope_from={path}: no such file, and no preset.")
    data = strict_json.read(file)
    rope = data.object("rope_scaling", None) or data.object("rope_parameters")
    beside = data.has("original_max_position_embeddings")
    original = (data if beside else rope).integer("original_max_position_embeddings", least=2)
    lists = [tuple(rope.numbers(name, above=0)) for name in ("short_factor", "long_factor")]
    return LongRope(*lists, original_max_position=original)


def model_to_dict(model: ModelConfig) -> dict[str, Any]:
    """A model as files hold it: the first version's fields, and later ones that are not at their defaults."""
    later = {field.name: field.default for field in dataclasses.fields(model) if field.name not in FIRST_FIELDS}
    return {
        name: value
        for name, value in dataclasses.asdict(model).items()
        if name not in later or getattr(model, name) != later[name]
    }


def fields_version(data: Mapping[str, Any]) -> int:
    """The first version of files whose readers understand all that `data`, as of `model_to_dict`, says: 1 or 2."""
    rope = data.get("long_rope") or {}
    return 1 if set(data) <= FIRST_FIELDS and set(rope) <= FIRST_LONG_ROPE_FIELDS else 2


def model_from_dict(data: Mapping[str, Any], file: str = "the model") -> ModelConfig:
    """The inverse of `model_to_dict`, also after a way through JSON. What an older file does not say is at its default.

    Args: file: what messages call the file that it stands in.
    Raises: UserError naming fields that are not known here, are missing, of another type, or describe no model.
    """
    model = _read(ModelConfig, Fields(data, file, "model"))
    try:
        model.check()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return model


def _read(kind: type, fields: Fields) -> Any:
    """A dataclass of the types that the fields of one are declared with."""
    hints, declared = typing.get_type_hints(kind), dataclasses.fields(kind)
    if unknown := [name for name in fields.values if name not in hints]:
        what = f"{fields.place}.{strict_json.named(unknown[0])}={shown(fields.values[unknown[0]])}"
        raise UserError(
            f"{fields.file}: {what} is not known to this version of phijax, which would compute something else. "
            "A newer one wrote it: take that."
        )
    given = [field for field in declared if fields.has(field.name) or field.default is dataclasses.MISSING]
    return kind(**{field.name: _field(hints[field.name], fields, field.name) for field in given})


def _field(hint: Any, fields: Fields, name: str) -> Any:
    if typing.get_origin(hint) is Literal:
        if fields.text(name) not in typing.get_args(hint):
            raise fields.refusal(name, f"one of {', '.join(typing.get_args(hint))}")
        return fields.values[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    readers: dict[Any, Callable[[], Any]] = {
        int: lambda: fields.integer(name, least=1),
        float: lambda: fields.number(name, above=0),
        bool: lambda: fields.boolean(name),
        LongRope: lambda: _read(LongRope, fields.object(name)),
    }
    if typing.get_origin(hint) is tuple:
        return tuple(fields.numbers(name, above=0))
    return readers[kinds[0]]()
