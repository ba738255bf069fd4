"""Cross entropy over a vocabulary too large for its logits to be kept: chunked over this chip's tokens.

One pass makes the loss and its gradients: logits of a chunk exist once, in float32, and are gone before the next. The
head is gathered once over `fsdp` in the compute dtype; over `tensor` the vocabulary stays cut and only row sums cross.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from phijax.errors import UserError
from phijax.model.kernels.dense import MASKED
from phijax.parallel import sharding

NLL = "nll"  # as metrics call the plain negative log-likelihood, in nats
CHUNK = 2048  # tokens at most
CHUNK_BYTES = 512 << 20  # of float32 logits at once; each chunk also reads and writes the whole gradient of the head


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Section `loss`."""

    z_loss: float = 0.0  # weight of logsumexp^2; keeps logits from drifting (1e-4 is usual). PaLM, section 5
    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary

    def __post_init__(self):
        if not 0 <= self.z_loss < math.inf or not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"loss.z_loss={self.z_loss} must be 0 or above, loss.label_smoothing={self.label_smoothing} in [0, 1)."
            )


def cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, vocab_size: int, loss: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all tokens: (loss with its extra terms, plain negative log-likelihood in nats).

    Args:
      x: (B, T, D), what the head sees, in the compute dtype.
      head: (padded V, D) float32; rows from vocab_size on stand for no token and get probability 0.
      targets: (B, T) int32; weights: (B, T) float32, 0 where nothing is to be predicted.
    Returns: two float32 scalars. Gradients flow from the first, to x and head.
    """
    fused = _fused(vocab_size, loss)
    return fused(x, head, targets, weights)


def token_logprobs(x: jax.Array, head: jax.Array, targets: jax.Array, *, vocab_size: int) -> jax.Array:
    """log p(target) of each token, (B, T) float32; differentiable, logits recomputed chunk by chunk.

    Args: as `cross_entropy`.
    """

    def local(x: jax.Array, shard: jax.Array, targets: jax.Array) -> jax.Array:
        w, columns = _gather_head(shard, x.dtype, vocab_size)
        flat, (hidden, wanted) = _chunks(w.shape[0], x.reshape(-1, x.shape[-1]), targets.reshape(-1))

        @jax.checkpoint
        def chunk(_, part):
            h, target = part
            logits = _logits(h, w, columns, vocab_size)
            logsumexp, picked = _reduce(logits, columns, target)
            return None, picked - logsumexp

        _, values = jax.lax.scan(chunk, None, (hidden, wanted))
        return values.reshape(-1)[:flat].reshape(targets.shape)

    if jax.sharding.get_abstract_mesh().empty:
        return local(x, head, targets)
    tokens = sharding.spec(("act_batch", "act_time"))
    return jax.shard_map(
        local,
        in_specs=(sharding.spec(("act_batch", "act_time", "act_embed")), sharding.spec(("vocab", "embed")), tokens),
        out_specs=tokens,
        check_vma=False,
    )(x, head, targets)


@functools.lru_cache(maxsize=32)
def _fused(vocab_size: int, loss: LossConfig):
    """The custom-gradient function for these static numbers; cached, so that equal programs are traced once."""

    @jax.custom_vjp
    def sums(x, head, targets, weights):
        return _sharded(x, head, targets, weights, vocab_size, loss, gradients=False)[:2]

    def forward(x, head, targets, weights):
        total, nll, d_x, d_head = _sharded(x, head, targets, weights, vocab_size, loss, gradients=True)
        return (total, nll), (d_x, d_head)

    def backward(saved, cotangents):
        d_x, d_head = saved
        scale = cotangents[0]
        return (d_x * scale).astype(d_x.dtype), d_head * scale, None, None

    sums.defvjp(forward, backward)
    return sums


def _sharded(x, head, targets, weights, vocab_size, loss, *, gradients):
    others = sharding.open_axes(("data", "fsdp", "context"))  # along these lie the chips that have other tokens
    local = functools.partial(_local, vocab_size=vocab_size, loss=loss, gradients=gradients, others=others)
    if jax.sharding.get_abstract_mesh().empty:
        return local(x, head, targets, weights)
    hidden, rows = sharding.spec(("act_batch", "act_time", "act_embed")), sharding.spec(("vocab", "embed"))
    tokens, scalar = sharding.spec(("act_batch", "act_time")), jax.sharding.PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(hidden, rows, tokens, tokens),
        out_specs=(scalar, scalar, *((hidden, rows) if gradients else ())),
        check_vma=False,
    )(x, head, targets, weights)


def _local(x, shard, targets, weights, *, vocab_size, loss, gradients, others):
    """On one chip: x (b, t, D), shard (rows, D). -> (loss sum, nll sum[, d_x, d_shard])."""
    w, columns = _gather_head(shard, x.dtype, vocab_size)
    flat, chunks = _chunks(w.shape[0], x.reshape(-1, x.shape[-1]), targets.reshape(-1), weights.reshape(-1))

    def step(carry, part):
        h, target, weight = part
        logits = _logits(h, w, columns, vocab_size)
        logsumexp, picked = _reduce(logits, columns, target)
        smooth, z = loss.label_smoothing, loss.z_loss
        nll = logsumexp - picked
        value = nll + z * jnp.square(logsumexp)
        if smooth:  # a pass over the logits, which a product with zero would not save
            value += smooth * (picked - _mean(logits, columns, vocab_size))
        total = carry[0] + jnp.sum(value * weight), carry[1] + jnp.sum(nll * weight)
        if not gradients:
            return total, None
        p = jnp.exp(logits - logsumexp[:, None]) * (1 + 2 * z * logsumexp[:, None])
        wanted = (1 - smooth) * (columns == target[:, None])
        if smooth:
            wanted += (smooth / vocab_size) * (columns < vocab_size)
        d_logits = ((p - wanted) * weight[:, None]).astype(h.dtype)
        d_h = jax.lax.dot_general(d_logits, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        d_w = carry[2] + jax.lax.dot_general(d_logits, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (*total, d_w), _sum(d_h, "tensor").astype(h.dtype)

    start = (jnp.float32(0), jnp.float32(0), *((jnp.zeros(w.shape, jnp.float32),) if gradients else ()))
    carry, d_x = jax.lax.scan(step, start, chunks)
    sums = _sum(carry[0], others), _sum(carry[1], others)
    if not gradients:
        return sums
    return *sums, d_x.reshape(-1, x.shape[-1])[:flat].reshape(x.shape), _scatter_head(carry[2], x.dtype, others)


def _in_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def _sum(value, axes):
    return jax.lax.psum(value, axes) if _in_mesh() else value


def _gather_head(shard, dtype, vocab_size):
    """This chip's rows of the head under `tensor`, in dtype, and the token ids they stand for, (1, rows)."""
    w = shard.astype(dtype)
    first = 0
    if _in_mesh():
        w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        first = jax.lax.axis_index("tensor") * w.shape[0]
    return w, first + jax.lax.broadcasted_iota(jnp.int32, (1, w.shape[0]), 1)


def _scatter_head(d_w, dtype, others):
    """Sums over the chips that share rows, once, in the dtype of the gather; each keeps its own rows, float32."""
    if not _in_mesh():
        return d_w
    d_w = jax.lax.psum_scatter(d_w.astype(dtype), "fsdp", scatter_dimension=0, tiled=True)
    return jax.lax.psum(d_w, tuple(axis for axis in others if axis != "fsdp")).astype(jnp.float32)


def chunk_tokens(tokens: int, rows: int) -> int:
    """Tokens whose logits over `rows` rows of the head exist at once, of so many on a chip."""
    largest = max(1, min(CHUNK, CHUNK_BYTES // (4 * rows)))
    return -(-tokens // -(-tokens // largest))


def _chunks(rows: int, *arrays):
    """Cuts (tokens, ...) into equal chunks, filled up with zeros (weight 0). -> (tokens, (chunks, chunk, ...) each)."""
    tokens = arrays[0].shape[0]
    size = chunk_tokens(tokens, rows)
    count = -(-tokens // size)
    surplus = count * size - tokens

    def cut(a):
        a = jnp.pad(a, [(0, surplus)] + [(0, 0)] * (a.ndim - 1)) if surplus else a
        return a.reshape(count, size, *a.shape[1:])

    return tokens, tuple(cut(a) for a in arrays)


def _logits(h, w, columns, vocab_size):
    """(tokens, D) x (rows, D) -> (tokens, rows) float32, rows that stand for no token masked."""
    logits = jax.lax.dot_general(h, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    rows = w.shape[0] * (jax.lax.axis_size("tensor") if _in_mesh() else 1)
    return logits if rows == vocab_size else jnp.where(columns < vocab_size, logits, MASKED)


def _reduce(logits, columns, target):
    """Over the whole vocabulary, cut over `tensor` or not: logsumexp and the target's logit."""
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    if _in_mesh():
        highest = jax.lax.pmax(highest, "tensor")
    total = _sum(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1), "tensor")
    picked = _sum(jnp.sum(jnp.where(columns == target[:, None], logits, 0.0), axis=-1), "tensor")
    return highest + jnp.log(total), picked


def _mean(logits, columns, vocab_size):
    """The mean logit of all tokens there are."""
    return _sum(jnp.sum(jnp.where(columns < vocab_size, logits, 0.0), axis=-1), "tensor") / vocab_size
