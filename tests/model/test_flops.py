"""The count of FLOPs behind the plan and the reported MFU."""

import dataclasses

import jax
import numpy as np
import pytest
from references.attention import visible_keys
from small_models import SMALL, nll_sum, pack, random_documents

from phijax.model import params as parameters
from phijax.model.backend import Backend
from phijax.model.flops import attended_keys, matmul_parameters, train_flops_per_token
from phijax.model.presets import PRESETS

MATMUL = dataclasses.replace(SMALL, vocab_size=1024, model_dim=256, head_dim=32, ffn_dim=512)


@pytest.mark.parametrize("tied_head", [False, True])
def test_train_flops_equal_the_programs(tied_head):
    """XLA's count of an unrolled forward and backward pass in which attention computes the whole square."""
    length, batch = 128, 2
    c = dataclasses.replace(MATMUL, tied_head=tied_head)
    rows = pack([random_documents(c, length + 1)] * batch, length)
    step = jax.jit(jax.value_and_grad(nll_sum(c, Backend(scan_layers=False), length), has_aux=True))
    counted = step.lower(parameters.abstract(c), *rows.arrays()).cost_analysis()["flops"] / (batch * length)
    unseen = length - attended_keys(length, None)
    whole_square = train_flops_per_token(c, length) + 12 * c.num_layers * c.num_heads * c.head_dim * unseen
    # Norms, rotation, softmax and sums are counted by XLA alone: 2 % of so small a model.
    assert 1.0 <= counted / whole_square < 1.04


@pytest.mark.parametrize("length, window", [(1, None), (7, None), (7, 3), (7, 7), (7, 100), (64, 1)])
def test_attended_keys(length, window):
    seen = visible_keys(np.ones(length, np.int32), window)
    assert attended_keys(length, window) == pytest.approx(seen.sum(axis=1).mean())


def test_matmul_parameters():
    """Everything but norms, biases and what is looked up; a tied head multiplies although it is no leaf of its own."""
    for name, c in PRESETS.items():
        added = (2 * c.num_layers + 1) * c.model_dim * (2 if c.norm == "layer" else 1)
        if c.bias:  # q, k, v, o and down are as wide as the model in these
            added += c.num_layers * (5 * c.model_dim + c.ffn_dim)
        looked_up = 0 if c.tied_head else c.vocab_size * c.model_dim
        looked_up += c.max_position * c.model_dim if c.positions == "learned" else 0
        assert matmul_parameters(c) == parameters.count(c) - added - looked_up, name
