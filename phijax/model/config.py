"""What a model is (ModelConfig), what a user may say about it (ModelSection), and how the two meet."""

import dataclasses
import json
import math
from typing import Literal

from etils import epath

from phijax.errors import UserError, nearest_name
from phijax.model.mask import Mask

VOCAB_MULTIPLE = 1024  # 8 rows on each of 128 chips; fixed, so that shapes never depend on the mesh


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

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: vocab_size rounded up; the surplus is masked in the loss and cut at export."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

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
        if self.num_heads % self.num_kv_heads:
            fits = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}. "
                f"Sizes that do: {', '.join(map(str, fits))}."
            )
        for name in ("rope_theta", "norm_eps", "partial_rotary_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)} must be a number above 0.")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
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


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Section `model`: a preset, what differs from it ("preset" keeps its number), and how it is computed."""

    preset: str = "tiny"
    vocab_size: int | Preset = "preset"
    model_dim: int | Preset = "preset"
    num_layers: int | Preset = "preset"
    num_heads: int | Preset = "preset"
    num_kv_heads: int | Preset = "preset"
    head_dim: int | Preset = "preset"
    ffn_dim: int | Preset = "preset"
    max_position: int | Preset = "preset"
    rope_theta: float | Preset = "preset"
    partial_rotary_factor: float | Preset = "preset"
    sliding_window: int | Preset | None = "preset"
    tied_head: bool | Preset = "preset"
    norm_eps: float | Preset = "preset"
    long_rope_from: str | None = None  # a Hugging Face config.json whose rope_scaling lists are taken
    attention: Literal["auto", "dense", "blocked", "splash", "cudnn"] = "auto"
    remat: str = "auto"  # what the backward pass finds saved: model/decoder.py REMAT_POLICIES
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    mlp_products: Literal["float", "int8"] = "float"  # model/int8_products.py
    layers: Literal["auto", "scan", "unroll"] = "auto"


def resolve_model(section: ModelSection, presets: dict[str, ModelConfig]) -> ModelConfig:
    """The ModelConfig that a section describes.

    Raises: UserError for an unknown preset, numbers that fit no model, or LongRoPE lists that are missing.
    """
    if section.preset not in presets:
        near = nearest_name(section.preset, presets)
        raise UserError(
            f"model.preset={section.preset!r} is not known. "
            + (f"Nearest: {near!r}. " if near else "")
            + f"There are: {', '.join(presets)}."
        )
    config = presets[section.preset]
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    changed = {k: v for k, v in dataclasses.asdict(section).items() if k in names and v != "preset"}
    if section.long_rope_from:
        changed["long_rope"] = read_long_rope(section.long_rope_from)
    config = dataclasses.replace(config, **changed)
    if config.requires_long_rope and config.long_rope is None:
        raise UserError(
            f"model.preset={section.preset!r}: its LongRoPE lists are published only inside its checkpoint.\n"
            f"Point --config.model.long_rope_from at that checkpoint's config.json."
        )
    config.check()
    return config


def read_long_rope(path: str) -> LongRope:
    """LongRoPE lists out of a Hugging Face config.json, under either spelling (`rope_scaling`, `rope_parameters`)."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"model.long_rope_from={path}: no such file.")
    try:
        data = json.loads(file.read_text())
        rope = data.get("rope_scaling") or data["rope_parameters"]
        original = data.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
        return LongRope(tuple(rope["short_factor"]), tuple(rope["long_factor"]), int(original))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.long_rope_from={path}: no LongRoPE lists found in it ({error!r}).") from error


def model_from_dict(data: dict) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, also after a way through JSON."""
    rope = data["long_rope"]
    if rope is not None:
        lists = {name: tuple(rope[name]) for name in ("short_factor", "long_factor")}
        rope = LongRope(**lists, original_max_position=rope["original_max_position"])
    return ModelConfig(**{**data, "long_rope": rope})
