"""Schedules against formulas in NumPy, AdamW against torch's, and what is decayed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from phijax.errors import UserError
from phijax.model import params
from phijax.model.presets import PRESETS
from phijax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer

TOTAL, WARMUP, PEAK, FINAL = 1000, 100, 3e-4, 0.1
LAST = TOTAL - 1


def config(**changes) -> OptimizerConfig:
    numbers = {"learning_rate": PEAK, "warmup_steps": WARMUP, "final_fraction": FINAL} | changes
    return OptimizerConfig(**numbers)


def rates(c: OptimizerConfig, steps: np.ndarray, total: int = TOTAL) -> np.ndarray:
    return np.asarray(jax.jit(lambda s: learning_rate(c, s, total))(jnp.asarray(steps, jnp.int32)))


def warmed(rate):
    """`rate` (a function of the step, float64) behind a linear warmup that reaches the peak at step WARMUP."""
    return lambda s: np.where(s < WARMUP, PEAK * (s + 1) / (WARMUP + 1), rate(s))


EXPECTED = {
    "cosine": warmed(lambda s: PEAK * (FINAL + (1 - FINAL) * (1 + np.cos(np.pi * (s - WARMUP) / (LAST - WARMUP))) / 2)),
    "linear": warmed(lambda s: np.interp(s, [WARMUP, LAST], [PEAK, FINAL * PEAK])),
    "constant": warmed(lambda s: np.full(s.shape, PEAK)),
    # Flat until a fifth of all steps is left, then straight down.
    "wsd": warmed(lambda s: np.interp(s, [WARMUP, LAST - TOTAL // 5, LAST], [PEAK, PEAK, FINAL * PEAK])),
}


@pytest.mark.parametrize("schedule", EXPECTED)
def test_schedules(schedule):
    steps = np.arange(TOTAL)
    got = rates(config(schedule=schedule, decay_fraction=0.2), steps)
    # float32 rates: some 2^-24 of the peak each.
    np.testing.assert_allclose(got, EXPECTED[schedule](steps.astype(np.float64)), rtol=0, atol=3e-7 * PEAK)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_first_peak_and_last_step(schedule, final):
    got = rates(config(schedule=schedule, final_fraction=final), np.array([0, WARMUP, LAST, LAST + 50]))
    peak = np.float32(PEAK)
    assert got[0] == pytest.approx(PEAK / (WARMUP + 1), rel=1e-6) and got[0] > 0
    assert got[1] == peak
    assert got[2] == got[3] == peak * np.float32(final)  # exactly, also for a step too many


@pytest.mark.parametrize("total", [1, 2])
def test_runs_of_a_step_or_two_have_finite_rates(total):
    got = rates(config(warmup_steps=0), np.arange(total), total)
    assert got[0] == np.float32(PEAK) and np.all(np.isfinite(got))


def test_schedules_that_are_none_are_refused():
    config().check(TOTAL)
    with pytest.raises(UserError, match=r"warmup_steps=100 .* the 50 steps .*warmup_steps=1"):
        config().check(50)
    for wrong in (
        {"decay_fraction": 0.0},
        {"final_fraction": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"b2": 1.0},
        {"eps": 0.0},
        {"clip_norm": -1.0},
        {"weight_decay": -0.1},
        {"max_skipped_steps": 0},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            config(**wrong).check(TOTAL)


DECAYED = {"blocks": {"norm": {"scale": False}, "up": True}, "head": True, "final_norm": {"scale": False}}
SHAPES = {"blocks": {"norm": {"scale": (3, 5)}, "up": (3, 7, 5)}, "head": (11, 5), "final_norm": {"scale": (5,)}}


def drawn(rng: np.random.Generator, size: float):
    return jax.tree.map(
        lambda s: size * rng.standard_normal(s).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.mark.parametrize("clip", [None, 1.0])
def test_updates_equal_torch(clip):
    """eps and decay are large, so that their place in the formula shows; every second gradient is above the clip."""
    c = config(warmup_steps=3, learning_rate=0.05, eps=1e-2, weight_decay=0.3, b1=0.8, b2=0.9, clip_norm=clip)
    total, rng = 12, np.random.default_rng(0)
    ours = drawn(rng, 1.0)
    optimizer = make_optimizer(c, DECAYED, total)
    state = optimizer.init(ours)

    @jax.jit
    def update(gradients, state, ours, step):
        updates, state = optimizer.update(gradients, state, ours, step=step, grad_norm=optax.tree.norm(gradients))
        return optax.apply_updates(ours, updates), state

    theirs = {path: torch.tensor(np.float64(v), requires_grad=True) for path, v in params.flat(ours).items()}
    norms = [v for path, v in theirs.items() if path.endswith("scale")]
    matrices = [v for path, v in theirs.items() if not path.endswith("scale")]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(c.b1, c.b2), eps=c.eps)

    norms_seen, scheduled = [], rates(c, np.arange(total), total)
    for step in range(total):
        gradients = drawn(rng, 1.0 if step % 2 else 0.02)
        norms_seen.append(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients))))
        ours, state = update(gradients, state, ours, jnp.int32(step))
        for path, value in params.flat(gradients).items():
            theirs[path].grad = torch.tensor(np.float64(value))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        for group in reference.param_groups:
            group["lr"] = float(scheduled[step])
        reference.step()
        # float32 against float64 at weights near 1: 12 steps of rounding; torch adds 1e-6 to the norm it divides by.
        for path, value in params.flat(ours).items():
            np.testing.assert_allclose(value, theirs[path].detach().numpy(), rtol=0, atol=3e-6, err_msg=path)
    assert min(norms_seen) < 1.0 < max(norms_seen)


def moments_after(optimizer, gradients, **extra):
    zeros = jax.tree.map(np.zeros_like, gradients)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p, step=jnp.int32(0), **extra))
    return optax.tree.get(update(gradients, zeros)[1], "mu")


def test_clipping_is_by_the_norm_of_all_leaves():
    """Adam hides the size of a gradient: here only its first moment is looked at."""
    optimizer = make_optimizer(config(clip_norm=0.5, b1=0.0), DECAYED, TOTAL)
    gradients = drawn(np.random.default_rng(2), 1.0)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(gradients)))
    mu = moments_after(optimizer, gradients, grad_norm=np.float32(norm))
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, g * 0.5 / norm, rtol=1e-5), mu, gradients)
    # A part of the tree by itself is clipped by the whole's.
    for branch in gradients:
        part = {branch: gradients[branch]}
        got = moments_after(optimizer, part, grad_norm=np.float32(norm))
        jax.tree.map(np.testing.assert_array_equal, got, {branch: mu[branch]})


@pytest.mark.parametrize("preset", ["phi3_mini", "phi4_mini", "llama2_7b", "tiny"])
def test_every_matrix_is_decayed_and_no_norm(preset):
    shapes = params.shapes(PRESETS[preset])
    mask = {path: leaf.decayed for path, leaf in params.leaves(PRESETS[preset]).items()}
    assert mask == {path: not path.endswith("scale") for path in shapes}
    kept_out = [shapes[path] for path, decayed in mask.items() if not decayed]
    assert any(len(shape) == 2 for shape in kept_out)  # stacked norms: by their dimensions they would be matrices
    assert sum(mask.values()) == 7 + 1 + (not PRESETS[preset].tied_head)
