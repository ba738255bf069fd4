"""Attention and its gradient written out in float64 NumPy: what every attention path is compared with."""

import numpy as np


def visible_keys(segments: np.ndarray, window: int | None) -> np.ndarray:
    """(T,) -> (T, T) bool, said row by row: j is seen by i if of one segment, not later, and among the last W."""
    length = len(segments)
    seen = np.zeros((length, length), bool)
    for i in range(length):
        first = 0 if window is None else max(0, i - window + 1)
        seen[i, first : i + 1] = segments[first : i + 1] == segments[i]
    return seen


def attention_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, segment_ids: np.ndarray, d_out: np.ndarray, *, window: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Output and the gradients of sum(output * d_out), head by head.

    Args:
      q, d_out: (B, N, T, H); k, v: (B, K, T, H); segment_ids: (B, T).
    Returns: output, dq, dk, dv in float64.
    """
    q, k, v, d_out = (np.asarray(a, np.float64) for a in (q, k, v, d_out))
    out, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        seen = visible_keys(segment_ids[b], window)
        for n in range(q.shape[1]):
            m = n // group  # neighbouring query heads share one key head
            scores = np.where(seen, q[b, n] @ k[b, m].T * scale, -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            out[b, n] = p @ v[b, m]
            d_p = d_out[b, n] @ v[b, m].T
            d_s = p * (d_p - (d_p * p).sum(axis=-1, keepdims=True)) * scale
            d_q[b, n] = d_s @ k[b, m]
            d_k[b, m] += d_s.T @ q[b, n]
            d_v[b, m] += p.T @ d_out[b, n]
    return out, d_q, d_k, d_v
