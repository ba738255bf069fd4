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
OF_GPT2 = {"position_embedding": (None, -1, True)} | {
    path: (None, -1, False)
    for path in (
        "final_norm/bias",
        "blocks/attention_norm/bias",
        "blocks/attention/q_bias",
        "blocks/attention/k_bias",
        "blocks/attention/v_bias",
        "blocks/attention/o_bias",
        "blocks/mlp_norm/bias",
        "blocks/mlp/up_bias",
        "blocks/mlp/down_bias",
    )
}


def test_what_each_leaf_declares():
    """By hand: a wrong axis would put groups of scales across inputs, a wrong kind another scheme."""
    for name, c in PRESETS.items():
        leaves, lacks = params.leaves(c), {"head"} if c.tied_head else set()
        expected = DECLARED
        if name.startswith("gpt2"):
            expected, lacks = expected | OF_GPT2, lacks | {"blocks/mlp/gate"}
        expected = {path: facts for path, facts in expected.items() if path not in lacks}
        found = {path: (leaf.kind, leaf.summed_axis, leaf.decayed) for path, leaf in leaves.items()}
        assert found == expected, name


def test_rooms_that_know_a_path_alone_are_told_the_same():
    for path, (kind, axis, _) in (DECLARED | OF_GPT2).items():
        assert (policy.kind_of(path), policy.summed_axis(path)) == (kind, axis), path
    assert policy.kind_of("blocks/attention/x") is None
    assert {kind for kind, _, _ in DECLARED.values()} - {None} == set(policy.KINDS)


def test_a_fold_scales_the_inputs_of_one_kind_and_its_inverse_makes_them():
    """down's inputs are proportional to the rows of up where these are multiplied with a gate, and only there."""
    c = PRESETS["tiny"]
    assert awq.inverses(c) == {
        "qkv": ("blocks/attention_norm/scale",),
        "gate_up": ("blocks/mlp_norm/scale",),
        "down": ("blocks/mlp/up",),
        "head": ("final_norm/scale",),
    }
    assert awq.inverses(PRESETS["gpt2"]) == {
        "qkv": ("blocks/attention_norm/bias", "blocks/attention_norm/scale"),
        "gate_up": ("blocks/mlp_norm/bias", "blocks/mlp_norm/scale"),
    }
    both = dataclasses.replace(PRESETS["tiny"], bias=True)
    assert awq.inverses(both)["down"] == ("blocks/mlp/up", "blocks/mlp/up_bias")
    for model in (c, PRESETS["gpt2"], both):
        leaves = params.leaves(model)
        for fold, paths in awq.inverses(model).items():
            size = {"down": model.ffn_dim}.get(fold, model.model_dim)
            assert {leaves[path].shape[leaves[path].result_axis] for path in paths} == {size}
            assert {leaves[path].shape[leaves[path].summed_axis] for path in policy.paths_of(model, fold)} == {size}


def test_a_leaf_starts_where_it_says(monkeypatch):
    """Zeros are a bias's start; a deviation of zero is not one."""
    monkeypatch.setattr(norm, "ONES", ZEROS)
    c = dataclasses.replace(PRESETS["tiny"], norm_eps=1.7e-5)  # declarations are kept by model
    start = jax.eval_shape(lambda: params.init(c, 0))
    assert start["final_norm"]["scale"].shape == (c.model_dim,)
    assert params.leaves(c)["final_norm/scale"].start == ZEROS
    assert not np.any(jax.jit(lambda: params.init(c, 0)["final_norm"]["scale"])())
