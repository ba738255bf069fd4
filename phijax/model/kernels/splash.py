"""Attention on TPU: jax's Pallas splash kernel under the mesh."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from phijax.model.kernels.sums import sums_as_additions
from phijax.model.mask import Mask, causal_window
from phijax.parallel import dealing, sharding

BLOCK = 1024
BLOCK_COMPUTE = 512  # inner step over keys: bounds the scores held in VMEM
# The backward kernel leaves a dq for every block of keys, as large as the queries each: in blocks of 1024 of 131072
# keys 128 of them, 17 GB of a chip and 1.8 of 10.7 s by the compiler's count. Longer blocks keep their number down.
MOST_BLOCKS_OF_KEYS = 32
LONGEST_BLOCK = 2048  # of keys, values and their gradients; 4096 are more than the VMEM that a kernel may use

# Under this name remat policies keep the kernel's output and log-sum-exp, without which its forward runs twice.
RESIDUALS = "attention_residuals"


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    mask: Mask,
    interpret: bool = False,
) -> jax.Array:
    """The same function as `dense_attention`: q (B, N, T, H), k and v (B, K, T, H) -> (B, N, T, H).

    Under `context` rows come dealt (parallel/dealing.py), or the last chip would see nearly all keys. The queries stay
    where they are and keys and values are gathered along it: at 128K that is one all-gather over one torus axis, and it
    fits. `interpret` runs the kernel's body on any backend, for tests.
    """
    n, t = q.shape[1], q.shape[2]
    sizes = sharding.mesh_sizes()
    window = causal_window(mask, "splash")
    seen = masks.CausalMask((t, t), shard_count=sizes["context"])
    if window is not None and window < t:
        seen = masks.LocalMask((t, t), (window - 1, 0), 0, shard_count=sizes["context"])
    if sizes["context"] > 1:
        _deal(seen, t, sizes["context"])
    splash = kernel.make_splash_mha(
        masks.MultiHeadMask([seen] * (n // sizes["tensor"])),
        block_sizes=_block_sizes(t, part_length(t, sizes["context"])),
        head_shards=1,
        q_seq_shards=sizes["context"],
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    if jax.sharding.get_abstract_mesh().empty:
        return _attend(splash, q, k, v, segment_ids, segment_ids)
    return _under_mesh(splash, sizes)(splash, q, k, v, segment_ids, segment_ids)


def _deal(mask, length: int, chips: int) -> None:
    """Makes a computed mask one of dealt rows: queries are told by table, keys stay in the order they are gathered in.

    Gathered keys are a dealt row too. Moving them back would be a copy of each layer's keys and values, 1 s of 10 at
    128K by the compiler's count. A block of keys lies within one block of the deal, so that one scalar says how far all
    of it lies from its place, and the queries of the mask are moved by that instead.
    """
    in_order = mask.mask_function

    def visible(q_ids, kv_ids):
        return in_order(q_ids - dealing.behind(kv_ids[0, 0], length, chips), kv_ids)

    mask.mask_function = visible
    mask.q_sequence = dealing.order(length, chips)


def part_length(length: int, context: int) -> int:
    """Tokens that lie together: the row, or one block of the deal."""
    return length if context == 1 else length // (2 * context)


def _under_mesh(splash, sizes):
    """The kernel in a shard_map: batch over data and fsdp, heads over tensor, queries over context."""
    heads = sharding.spec(("act_batch", "act_heads", "act_time", None))
    segments = sharding.spec(("act_batch", "act_time"))
    # Only its sizes are read; the mesh in context may be partly manual, for which jax computes no shard shape.
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    manual = splash.manual_sharding_spec(jax.sharding.NamedSharding(mesh, PartitionSpec(None, "context")))

    def local(splash, q, k, v, q_segments, kv_segments):
        if sizes["context"] > 1:
            k, v = _gather_time(k), _gather_time(v)
            kv_segments = jax.lax.all_gather(kv_segments, "context", axis=1, tiled=True)
        return _attend(splash, q, k, v, q_segments, kv_segments)

    return jax.shard_map(
        local, in_specs=(manual, heads, heads, heads, segments, segments), out_specs=heads, check_vma=False
    )


@jax.custom_vjp
def _gather_time(x: jax.Array) -> jax.Array:
    """(B, K, t, H) of every chip along `context` -> (B, K, T, H)."""
    return jax.lax.all_gather(x, "context", axis=2, tiled=True)


def _scatter_time(_, whole: jax.Array) -> tuple[jax.Array]:
    # With the chips in front: along an inner dimension the TPU compiler sums the whole array on every chip instead.
    b, k, _, h = whole.shape
    parts = whole.reshape(b, k, jax.lax.axis_size("context"), -1, h)
    return (jax.lax.psum_scatter(jnp.moveaxis(parts, 2, 0), "context", scatter_dimension=0),)


_gather_time.defvjp(lambda x: (_gather_time(x), None), _scatter_time)


@jax.custom_vjp
def _attend(splash, q, k, v, q_segments, kv_segments):
    """The kernel over a batch; its backward pass as jax wrote it but for one sum (`sums_as_additions`)."""
    return jax.vmap(splash)(q, k, v, kernel.SegmentIds(q_segments, kv_segments))


def _forward(splash, q, k, v, q_segments, kv_segments):
    segments = kernel.SegmentIds(q_segments, kv_segments)
    return jax.vjp(lambda q, k, v: jax.vmap(splash)(q, k, v, segments), q, k, v)


def _backward(pull, d_out):
    # The fused backward kernel leaves one dq for each block of keys, to be summed. As a reduction the TPU compiler
    # leaves that sum by itself, 4 % of mini's step by its own count; as additions it becomes part of what follows.
    return None, *sums_as_additions(pull)(d_out), None, None


_attend.defvjp(_forward, _backward)


def _block_sizes(length: int, part: int) -> kernel.BlockSizes:
    block, inner = min(BLOCK, part), min(BLOCK_COMPUTE, part)
    return kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=inner,
        block_q_dkv=block,
        block_kv_dkv=backward_block(length, part),
        block_kv_dkv_compute=inner,
        use_fused_bwd_kernel=True,
    )


def backward_block(length: int, part: int) -> int:
    """Keys that the backward kernel takes at once."""
    block = min(BLOCK, part)
    while length // block > MOST_BLOCKS_OF_KEYS and block < LONGEST_BLOCK and part % (2 * block) == 0:
        block *= 2
    return block


def check_splash(length: int, context: int) -> str | None:
    """Why these lengths cannot run in the kernel, or None."""
    part = part_length(length, context)
    if (
        part * (2 * context if context > 1 else 1) != length
        or part % min(BLOCK, max(part, 1))
        or part % 128
        or not part
    ):
        what = "T" if context == 1 else "T / (2 x context)"
        return (
            f"splash attention needs {what} to be a multiple of 128, and of {BLOCK} above it: T={length}, "
            f"context={context}"
        )
    return None
