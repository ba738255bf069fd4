"""Our weights by their Hugging Face names: one table, a row a weight, read in both directions.

transformers 5.24: models/phi3/modeling_phi3.py, models/llama/modeling_llama.py, models/mistral/modeling_mistral.py.
A linear layer is stored [out, in] there, which is our [rows, D] but for o and down, whose rows are its inputs.
"""

import dataclasses
from typing import Literal, NamedTuple

from phijax.interchange.weight_source import model_shapes
from phijax.model.config import ModelConfig

Layout = Literal["phi3", "llama", "mistral"]


class Weight(NamedTuple):
    """A leaf and its tensor. Leaves that share a tensor lie in it one behind the other, by rows, in this order."""

    leaf: str
    split: str  # Llama and Mistral
    fused: str  # Phi3
    transposed: bool = False


LAYER = "model.layers.{}."
WEIGHTS = (
    Weight("embedding", "model.embed_tokens", "model.embed_tokens"),
    Weight("blocks/attention_norm/scale", LAYER + "input_layernorm", LAYER + "input_layernorm"),
    Weight("blocks/attention/q", LAYER + "self_attn.q_proj", LAYER + "self_attn.qkv_proj"),
    Weight("blocks/attention/k", LAYER + "self_attn.k_proj", LAYER + "self_attn.qkv_proj"),
    Weight("blocks/attention/v", LAYER + "self_attn.v_proj", LAYER + "self_attn.qkv_proj"),
    Weight("blocks/attention/o", LAYER + "self_attn.o_proj", LAYER + "self_attn.o_proj", transposed=True),
    Weight("blocks/mlp_norm/scale", LAYER + "post_attention_layernorm", LAYER + "post_attention_layernorm"),
    Weight("blocks/mlp/gate", LAYER + "mlp.gate_proj", LAYER + "mlp.gate_up_proj"),
    Weight("blocks/mlp/up", LAYER + "mlp.up_proj", LAYER + "mlp.gate_up_proj"),
    Weight("blocks/mlp/down", LAYER + "mlp.down_proj", LAYER + "mlp.down_proj", transposed=True),
    Weight("final_norm/scale", "model.norm", "model.norm"),
    Weight("head", "lm_head", "lm_head"),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one layer of a leaf lies in a tensor: `rows` rows from `start`; all of it when transposed."""

    leaf: str
    layer: int | None
    start: int
    rows: int
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file and the parts it is made of, first row first."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def tensors(c: ModelConfig, layout: Layout) -> list[Tensor]:
    """Every tensor of the model in that layout, in the order in which transformers declares them: layer by layer."""
    shapes = model_shapes(c)
    present = [weight for weight in WEIGHTS if weight.leaf in shapes]
    assert {weight.leaf for weight in present} == set(shapes), "a leaf without a name"
    stacked = [weight for weight in present if "{}" in weight.split]
    first, *last = [weight for weight in present if "{}" not in weight.split]
    found = _grouped([first], None, shapes, layout)
    for layer in range(c.num_layers):
        found += _grouped(stacked, layer, shapes, layout)
    return found + _grouped(last, None, shapes, layout)


def _grouped(weights: list[Weight], layer: int | None, shapes: dict, layout: Layout) -> list[Tensor]:
    parts: dict[str, list[Part]] = {}
    widths = {}
    for weight in weights:
        name = f"{weight.fused if layout == 'phi3' else weight.split}.weight".replace("{}", str(layer))
        shape = shapes[weight.leaf] if layer is None else shapes[weight.leaf][1:]
        shape = shape[::-1] if weight.transposed else shape
        before = parts.setdefault(name, [])
        start = sum(part.rows for part in before)
        before.append(Part(weight.leaf, layer, start, shape[0], weight.transposed))
        widths[name] = shape[1:]
    return [
        Tensor(name, (sum(part.rows for part in of_tensor), *widths[name]), tuple(of_tensor))
        for name, of_tensor in parts.items()
    ]
