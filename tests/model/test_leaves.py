"""What leaves declare, and that other rooms read nothing else."""

import dataclasses

import jax
import numpy as np

from phijax.model import norm, params
from phijax.model.presets import PRESETS
from phijax.model.weights import ZEROS
from phijax.quantization import awq, policy

# path -> kind, the axis that is summed over, decayed
DECLARED = {
    "embedding": ("embedding", -1, True),
    "head": ("head", -1, True),
    "final_norm/scale": (None, -1, False),
    "blocks/attention_norm/scale": (None, -1, False),
    "blocks/attention/q": ("qkv", -1, True),
    "blocks/attention/k": ("qkv", -1, True),
    "blocks/attention/v": ("qkv", -1, True),
    "blocks/attention/o": ("o", -2, True),
    "blocks/mlp_norm/scale": (None, -1, False),
    "blocks/mlp/gate": ("gate_up", -1, True),
    "blocks/mlp/up": ("gate_up", -1, True),
    "blocks/mlp/down": ("down", -2, True),
}


def test_what_each_leaf_declares():
    """By hand: a wrong axis would put groups of scales across inputs, a wrong kind another scheme."""
    for name, c in PRESETS.items():
        leaves = params.leaves(c)
        expected = {path: facts for path, facts in DECLARED.items() if path != "head" or not c.tied_head}
        found = {path: (leaf.kind, leaf.summed_axis, leaf.decayed) for path, leaf in leaves.items()}
        assert found == expected, name


def test_rooms_that_know_a_path_alone_are_told_the_same():
    for path, (kind, axis, _) in DECLARED.items():
        assert (policy.kind_of(path), policy.summed_axis(path)) == (kind, axis), path
    assert policy.kind_of("blocks/attention/x") is None
    assert {kind for kind, _, _ in DECLARED.values()} - {None} == set(policy.KINDS)


def test_a_fold_scales_the_inputs_of_one_kind_and_its_inverse_makes_them():
    c = PRESETS["tiny"]
    inputs = {"qkv": c.model_dim, "gate_up": c.model_dim, "down": c.ffn_dim, "head": c.model_dim}
    for fold, (leaf, axis) in awq.INVERSE.items():
        assert policy.paths_of(fold)
        assert params.shapes(c)[leaf][axis] == inputs.pop(fold)
    assert not inputs


def test_a_leaf_starts_where_it_says(monkeypatch):
    """Zeros are a bias's start; a deviation of zero is not one."""
    monkeypatch.setattr(norm, "ONES", ZEROS)
    c = dataclasses.replace(PRESETS["tiny"], norm_eps=1.7e-5)  # declarations are kept by model
    start = jax.eval_shape(lambda: params.init(c, 0))
    assert start["final_norm"]["scale"].shape == (c.model_dim,)
    assert params.leaves(c)["final_norm/scale"].start == ZEROS
    assert not np.any(jax.jit(lambda: params.init(c, 0)["final_norm"]["scale"])())
