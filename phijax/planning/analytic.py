"""Memory and seconds of a train step from shapes alone: for searching, and where there is no compiler.

The same parts as the compiled estimate has. What is counted: matrix products with heads padded as the unit pads them,
the blocks that attention computes, bytes of stacks and collectives. What is fitted: the rates in `FITTED`, to compiled
programs (benchmarks/plan_accuracy.py prints how well they hold).
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from phijax.model import cross_entropy, params
from phijax.model.config import ModelConfig
from phijax.model.decoder import SAVEABLE, remat_names
from phijax.model.kernels.splash import BLOCK, backward_block, part_length
from phijax.parallel import sharding
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.planning import interconnect
from phijax.planning.assumptions import ATTENTION_EFFICIENCY, Chip, chip_of
from phijax.planning.estimator import Estimate
from phijax.planning.interconnect import Torus
from phijax.planning.kernels import BACKWARD_BLOCK, BACKWARD_PRODUCTS, seen_share
from phijax.planning.topology import imaginary_devices, torus_of
from phijax.training.program import BatchShape, Recipe

RAGGED = 1.2  # products take this much longer where gathered weights are laid out anew: measured on the compiler
LOGITS_PASSES = 1.5  # over float32 logits outside of the products' own fusions
GATHERED, SCATTERED = "gathered weights", "scattered gradients"  # of the layers, over fsdp
OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_all_gather"  # of compiler.profile=sparse_core
AGAIN = 0.75  # bytes moved for each byte made again in the backward pass, as a share of `Fitted.elementwise`
# Of model.mlp_products=int8, bytes moved for each byte of what its products read: scales, rounding, rescaled gradients.
ROUNDING = 6.0
LANES = 128  # a head's dimensions lie in rows of as many


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Rates read off compiled programs of a chip.

    matrix: share of the peak that padded products reach. stacks: share of HBM's rate in writing and reading saved
    activations. sums: vector cycles for each number of a layer's vectors and heads, forward and backward.
    partial_sums: for each number of attention's partial dq, of which every block of keys leaves one to be added up.
    elementwise: bytes moved for each byte of the residual stream and the heads. hides_gathers: whether gathers run
    beside the core's work, as they do by default on this chip.
    """

    matrix: float
    stacks: float
    sums: float
    partial_sums: float
    elementwise: float
    hides_gathers: bool


FITTED = {
    "v5e": Fitted(matrix=0.89, stacks=0.55, sums=0.030, partial_sums=0.002, elementwise=10.0, hides_gathers=True),
    "v5p": Fitted(matrix=0.76, stacks=0.65, sums=0.014, partial_sums=0.005, elementwise=4.0, hides_gathers=False),
    "v6e": Fitted(matrix=0.55, stacks=0.22, sums=0.018, partial_sums=0.002, elementwise=7.0, hides_gathers=False),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A mesh on a torus. groups: mesh axes -> the partitions of chip 0's group along them."""

    chip: Chip
    torus: Torus
    sizes: Mapping[str, int]
    groups: Mapping[str, tuple[int, ...]]

    def seconds(self, kind: str, size: float, axes: str) -> float:
        """One collective of `size` bytes along mesh axes ("fsdp", "data+fsdp"); nothing where they are one chip."""
        group = self.groups[axes]
        return interconnect.seconds(kind, size, group, self.torus, self.chip) if len(group) > 1 else 0.0


def make_slice(topology: str, mesh: MeshConfig) -> Slice:
    """Raises: UserError as `make_mesh`."""
    laid = make_mesh(mesh, imaginary_devices(topology, mesh.slices)).devices
    torus = torus_of(topology, laid.flat)
    ids = np.arange(laid.size).reshape(laid.shape)
    axes = dict(zip(sharding.MESH_AXES, range(4), strict=True))
    groups = {}
    for names in (*sharding.MESH_AXES, "data+fsdp"):
        index = tuple(slice(None) if axis in names.split("+") else 0 for axis in axes)
        groups[names] = tuple(int(i) for i in ids[index].ravel())
    return Slice(chip_of(topology), torus, dict(zip(sharding.MESH_AXES, laid.shape, strict=True)), groups)


def estimate(recipe: Recipe, where: Slice, shape: BatchShape) -> Estimate:
    """Seconds of a step of (A, B, T)."""
    local = _Local(recipe, where.sizes, shape)
    found = Estimate(
        matrix=_matrix(recipe, where, local, shape),
        attention=_attention(recipe, where, local, shape),
        vector=_vector(recipe, where, local, shape),
    )
    _communicate(found, local, where, shape[0], recipe.model.num_layers)
    if recipe.optimizer.moments_on_host:  # in and out at once, layer by layer, with next to nothing beside it
        found.host = 2 * local.shard_bytes / where.chip.host_bandwidth
    core = found.matrix + found.vector + found.attention
    hidden = sum(found.collectives[kind].seconds for kind in _beside(recipe, where) if kind in found.collectives)
    found.overlapped = min(core, hidden)
    found.exposed = sum(t.seconds for t in found.collectives.values()) - found.overlapped
    found.step = core + found.exposed + found.host
    return found


def _beside(recipe: Recipe, where: Slice) -> tuple[str, ...]:
    """The collectives that run beside the core's work."""
    # By SparseCores where axes are rings, and in a plane without; on 2 x 2 x 4 chips the compiler was seen to pass
    # pieces on and wait for them.
    hidden = where.chip.axes == 2 or where.torus.wraps(where.groups["fsdp"], where.chip)
    if dict(recipe.compiler_options).get(OFFLOAD) == "true" and hidden:
        return GATHERED, SCATTERED
    return (GATHERED,) if FITTED[where.chip.name].hides_gathers else ()


def _matrix(recipe: Recipe, where: Slice, local: "_Local", shape: BatchShape) -> float:
    """Forward, twice that backward, and what is made again."""
    c, chip = recipe.model, where.chip
    layer = 3 * (local.attention_flops + local.mlp_flops) + local.recomputed_flops
    layer -= local.int8_flops * (1 - 1 / chip.int8_speedup)
    head = 3 * 2 * local.vocab * c.model_dim
    flops = shape[0] * local.tokens * (c.num_layers * layer + head)
    ragged = RAGGED if params.check_mesh(c, where.sizes) else 1.0
    return ragged * flops / (chip.peak_flops * FITTED[chip.name].matrix)


def _attention(recipe: Recipe, where: Slice, local: "_Local", shape: BatchShape) -> float:
    """The blocks that the kernels compute, as `kernels.seconds` counts them."""
    c, chip, keys = recipe.model, where.chip, shape[2]
    forward, backward = (
        seen_share(keys, min(block, keys), window=c.sliding_window) for block in (BLOCK, BACKWARD_BLOCK)
    )
    products = (2 + 2 * local.attention_again) * forward + BACKWARD_PRODUCTS * backward
    width = -(-c.head_dim // chip.matrix_side) * chip.matrix_side
    flops = shape[0] * local.tokens * c.num_layers * products * 2 * local.heads * width * keys
    return flops / chip.peak_flops / ATTENTION_EFFICIENCY


def _vector(recipe: Recipe, where: Slice, local: "_Local", shape: BatchShape) -> float:
    """Bytes of stacks, of the residual stream and the heads, of the logits, of the optimizer; cycles of sums."""
    c, chip, micro = recipe.model, where.chip, shape[0]
    fitted = FITTED[chip.name]
    numbers = local.heads * local.head_width + 2 * c.model_dim
    moved = fitted.elementwise * (numbers * local.compute + AGAIN * sum(local.again.values()))
    moved += ROUNDING * local.rounded_bytes
    sums = local.heads * local.head_width + local.vectors  # a vector's gradient is a sum over tokens
    cycles = sums * fitted.sums + local.blocks_of_keys * local.heads * local.head_width * fitted.partial_sums
    layer = (2 * local.saved / fitted.stacks + moved) / chip.hbm_bandwidth + cycles / chip.clock
    logits = LOGITS_PASSES * 4 * local.vocab / chip.hbm_bandwidth
    # Float32: parameters and moments read and written, gradients read and clipped; each further micro-batch adds up.
    update = (10 + 3 * (micro - 1)) * local.shard_bytes / chip.hbm_bandwidth
    return micro * local.tokens * (c.num_layers * layer + logits) + update


def _communicate(found: Estimate, local: "_Local", where: Slice, micro: int, layers: int) -> None:
    def add(name: str, kind: str, size: float, axes: str, count: int) -> None:
        took = where.seconds(kind, size, axes)
        if took:
            traffic = found.collectives[name]
            traffic.count += count
            traffic.bytes += size * count
            traffic.seconds += took * count

    add(GATHERED, "all-gather", local.gathered_bytes, "fsdp", 2 * layers * micro)
    add("gathered embedding and head", "all-gather", local.head_bytes, "fsdp", 2 * micro)
    add(SCATTERED, "reduce-scatter", local.layer_bytes, "fsdp", layers * micro)
    add("scattered gradients of embedding and head", "reduce-scatter", local.head_bytes, "fsdp", 2 * micro)
    # Of several micro-batches the float32 sums cross once; of one, each layer's gradients in the compute type.
    rounds, size = (1, local.shard_bytes) if micro > 1 else (layers, local.shard_bytes * local.compute / 4)
    add("gradients over data", "all-reduce", size / rounds, "data", rounds)
    if where.sizes["context"] > 1:
        add("keys and values over context", "all-gather", 2 * local.kv_bytes, "context", 2 * layers * micro)
        add("their gradients", "reduce-scatter", 2 * local.kv_bytes, "context", layers * micro)
        add("gradients over context", "all-reduce", local.layer_bytes, "context", layers * micro)
    add("activations over tensor", "all-reduce", local.residual_bytes, "tensor", 4 * layers * micro)


def memory(recipe: Recipe, sizes: Mapping[str, int], shape: BatchShape) -> dict[str, float]:
    """Part -> bytes of one chip at the worse of two moments: the loss, or the last layer's backward pass."""
    c = recipe.model
    local = _Local(recipe, sizes, shape)
    blocks = local.block_bytes
    head_shards = local.shard_bytes - blocks
    loss_side = local.head_elements * (local.compute + 4) + local.chunk_logits
    layer_side = local.head_elements * 4
    workspace = local.tokens * local.backward_bytes
    at_loss = loss_side + 2 * local.residual_bytes > layer_side + workspace
    return {
        "parameters": local.shard_bytes,
        "optimizer": 0.0 if recipe.optimizer.moments_on_host else 2 * local.shard_bytes,
        "gradients": blocks + (local.shard_bytes if shape[0] > 1 else 0) + (0 if at_loss else head_shards / 2),
        "saved activations": c.num_layers * local.tokens * local.saved,
        "weights in the compute type": blocks * local.compute / 4 + (0 if at_loss else 1.5 * local.layer_bytes),
        "logits and head": loss_side if at_loss else layer_side,
        "batch": 5 * 4 * shape[0] * local.tokens,
        "workspace": 2 * local.residual_bytes if at_loss else workspace,
    }


def state_bytes(recipe: Recipe, sizes: Mapping[str, int]) -> float:
    """Parameters and both moments of one chip, wherever they lie."""
    return 3 * _weights(recipe.model, sizes, recipe.backend.dtype.itemsize).shards


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Bytes of one chip. shards, blocks: of all and of the blocks' weights in float32; layer: of one, gathered."""

    shards: float
    blocks: float
    layer: float


def _weights(c: ModelConfig, sizes: Mapping[str, int], compute: int) -> _Weights:
    """Args: compute: bytes of a gathered number."""
    shards, blocks, layer = 0.0, 0.0, 0.0
    for path, dims in params.shapes(c).items():
        names = params.axes(c)[path]
        cut = 4 * math.prod(n // sharding.parts(a, sizes) for n, a in zip(dims, names, strict=True))
        shards += cut
        if path.startswith(f"{params.STACKED}/"):
            blocks += cut
            whole = math.prod(n // sharding.parts(a, sizes, gathered=True) for n, a in zip(dims, names, strict=True))
            layer += whole / c.num_layers * compute
    return _Weights(shards, blocks, layer)


class _Local:
    """Numbers of one chip: of a micro-batch, a layer, a token."""

    def __init__(self, recipe: Recipe, sizes: Mapping[str, int], shape: BatchShape):
        c, tensor = recipe.model, sizes["tensor"]
        self.compute = recipe.backend.dtype.itemsize
        self.tokens = shape[1] * shape[2] // (sizes["data"] * sizes["fsdp"] * sizes["context"])
        self.heads, self.kv_heads = c.num_heads // tensor, c.num_kv_heads // tensor
        self.head_width = -(-c.head_dim // LANES) * LANES
        self.ffn, self.vocab = c.ffn_dim // tensor, c.padded_vocab_size // tensor
        held = _weights(c, sizes, self.compute)
        self.shard_bytes, self.block_bytes, self.layer_bytes = held.shards, held.blocks, held.layer
        # Integers and a float32 scale a row are gathered where the feed-forward layers' products are of int8.
        self.int8 = recipe.backend.mlp_products == "int8"
        rounded = (self.compute - 1) * c.model_dim - 4 if self.int8 else 0  # bytes less in each row
        matrices = sum(leaf.kind in ("gate_up", "down") for leaf in params.leaves(c).values())
        self.gathered_bytes = self.layer_bytes - matrices * self.ffn * rounded
        # Numbers of a layer's factors and biases.
        self.vectors = sum(
            leaf.shape[-1] // sharding.parts(leaf.axes[-1], sizes, gathered=True)
            for leaf in params.leaves(c).values()
            if leaf.axes[0] == "layers" and leaf.kind is None
        )
        self.head_elements = self.vocab * c.model_dim
        self.head_bytes = self.head_elements * self.compute
        self.chunk_logits = cross_entropy.chunk_tokens(self.tokens, self.vocab) * self.vocab * 4
        # Activations, bytes a token and layer. Heads lie in whole rows of lanes.
        heads, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        sizes_of = {
            **{"query": heads, "key": kv, "value": kv, "attention": heads, "mid": c.model_dim},
            **{"gate": self.ffn if c.gated else 0, "up": self.ffn, "activation": self.ffn},
        }
        names = remat_names(recipe.backend.remat)
        kept = set(SAVEABLE) if names is None else set(names)
        if "attention_residuals" in kept or "attention" in kept:
            kept.add("attention")
        self.attention_again = "attention" not in kept
        self.saved = self.compute * (c.model_dim + sum(n for name, n in sizes_of.items() if name in kept))
        self.again = {name: 0 if name in kept else self.compute * n for name, n in sizes_of.items()}
        self.residual_bytes = self.tokens * c.model_dim * self.compute
        self.kv_bytes = self.tokens * sizes["context"] * self.kv_heads * c.head_dim * self.compute
        # The backward pass of a layer: partial dq of every block of keys, gate and up and their gradients, heads.
        length = shape[2]
        self.blocks_of_keys = -(-length // backward_block(length, part_length(length, sizes["context"])))
        gathered = 2 * kv * sizes["context"] if sizes["context"] > 1 else 0
        self.backward_bytes = self.compute * (
            gathered + self.blocks_of_keys * heads + (matrices - 1) * self.ffn + 3 * heads + 2 * kv + 3 * c.model_dim
        )
        # Products, FLOP a token and layer forward. The unit's output rows are lanes: a head of 96 takes 128.
        d = c.model_dim
        self.attention_flops = 2 * d * (2 * heads + 2 * kv)
        self.mlp_flops = 2 * matrices * self.ffn * d
        again = 0
        again += 2 * d * (heads * self.attention_again)  # o is needed for what follows it
        for name, width in (("query", heads), ("key", kv), ("value", kv)):
            again += 2 * d * width if name not in kept else 0
        if "mid" not in kept:
            again += 2 * d * heads * (not self.attention_again)
        mlp_again = sum(2 * d * sizes_of[name] for name in ("gate", "up") if name not in kept)
        self.recomputed_flops = again + mlp_again
        # Forward products alone are rounded, those made again too.
        self.int8_flops = self.mlp_flops + mlp_again if self.int8 else 0
        self.rounded_bytes = self.compute * (d + self.ffn) if self.int8 else 0
