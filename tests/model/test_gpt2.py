"""GPT-2 beyond transformers' gradients (test_transformers_parity.py): packed rows, generation, four bits, refusals."""

import dataclasses

import jax
import numpy as np
import pytest
from formula_case import calibrated, called, close, evaluated, generated, needs_compiler, tiled_block, trained, weights
from formula_case import stored as in_four_bits
from gpt2_case import GPT2_SMALL, leaves_of_gpt2, transformers_gpt2
from references.weights import random_params
from small_models import assert_leaves_close, pack, random_documents, run

from phijax.errors import UserError
from phijax.inference.generator import Generator
from phijax.inference.sampling import Sampling
from phijax.model import params
from phijax.model.backend import CHOICES, Backend
from phijax.model.config import LongRope
from phijax.model.kernels import cpu_int4, cpu_int4_library
from phijax.model.kernels.rows import row_sum
from phijax.model.ops import Ops
from phijax.model.terms import Normed
from phijax.parallel.mesh import MeshConfig, make_mesh

# Groups of 32 divide all that is summed over.
GROUPS = dataclasses.replace(
    GPT2_SMALL, vocab_size=600, model_dim=96, num_layers=1, num_heads=3, num_kv_heads=3, head_dim=32, ffn_dim=160
)


@pytest.fixture(scope="module")
def theirs():
    return transformers_gpt2(GPT2_SMALL)


@pytest.fixture(scope="module")
def ours(theirs):
    return params.nested(leaves_of_gpt2(GPT2_SMALL, dict(theirs.named_parameters())))


def test_one_document_of_a_row_changes_no_other(ours):
    """Bit for bit, though all take their positions from one table."""
    first, second, other = random_documents(GPT2_SMALL, 14, 20, 20)
    results = [run(GPT2_SMALL, CHOICES["cpu"], ours, pack([[first, last]], 36)) for last in (second, other)]
    (_, logits), (_, others) = (values for values, _ in results)
    np.testing.assert_array_equal(logits[0, :13], others[0, :13])
    assert not np.array_equal(logits[0, 13:32], others[0, 13:32])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_generation_up_to_the_last_position_equals_transformers(theirs, ours, scan_layers):
    """Rows of different length in one batch; the last ends at max_position."""
    import torch

    backend = dataclasses.replace(CHOICES["cpu"], scan_layers=scan_layers)
    prompts = [list(map(int, ids)) for ids in random_documents(GPT2_SMALL, 1, 19, 33)]
    rows = [([], []) for _ in prompts]
    for piece in Generator(GPT2_SMALL, ours, backend=backend).stream(
        prompts, Sampling(temperature=0, max_tokens=7), with_logits=True
    ):
        tokens, logits = rows[piece.row]
        tokens.append(piece.token)
        logits.append(piece.logits)
    for prompt, (tokens, logits) in zip(prompts, rows, strict=True):
        text = torch.tensor([[*prompt, *tokens]])
        assert len(tokens) == 7 and text.shape[1] <= GPT2_SMALL.max_position
        expected = theirs(text).logits[0, len(prompt) - 1 : -1].detach().numpy()
        np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=1e-4)


# Heads, width and vocabulary that meshes cut evenly.
WIDE = dataclasses.replace(
    GPT2_SMALL, model_dim=48, num_layers=2, num_heads=6, num_kv_heads=6, head_dim=8, ffn_dim=80, max_position=64
)


@pytest.fixture(scope="module")
def on_one_device():
    weights = random_params(WIDE)
    rows = pack([random_documents(WIDE, 20, 9, seed=b) for b in range(4)], 32)
    return weights, rows, run(WIDE, Backend(), weights, rows)


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        ((1, 2, 2, 2), Backend(remat="save_attention")),
        pytest.param((1, 4, 1, 2), CHOICES["cpu"], marks=pytest.mark.slow),
        pytest.param((2, 2, 1, 2), Backend(remat="save_all", rope_by_matmul=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_equal_one_device(on_one_device, shape, backend):
    """Biases follow the cut of their rows, the table of positions is whole; every gradient comes back to its place."""
    weights, rows, ((loss, logits), gradients) = on_one_device
    mesh = make_mesh(MeshConfig(*shape), jax.devices())
    placed = jax.device_put(weights, params.shardings(WIDE, mesh))
    with jax.set_mesh(mesh):
        (loss_2, logits_2), gradients_2 = run(WIDE, backend, placed, rows)
    np.testing.assert_allclose(loss_2, loss, rtol=1e-5)
    np.testing.assert_allclose(logits_2, logits, rtol=0, atol=2e-5)  # float32, sums in another order
    for leaves in (gradients, gradients_2):  # of k's bias it is rounding alone
        assert np.abs(leaves.pop("blocks/attention/k_bias", 0)).max() < 1e-5
    assert_leaves_close(gradients_2, gradients, relative=1e-5)


@pytest.mark.slow
def test_generation_on_a_mesh_is_that_of_one_device(on_one_device):
    weights, *_ = on_one_device
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=1, tensor=2), jax.devices()[:2])
    prompts = [list(map(int, ids)) for ids in random_documents(WIDE, 3, 20)]
    sampling = Sampling(temperature=0, max_tokens=3)
    found = [
        [piece.logits for piece in g.stream(prompts, sampling, with_logits=True)]
        for g in (Generator(WIDE, weights), Generator(WIDE, weights, None, CHOICES["cpu"], mesh))
    ]
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


def test_a_row_has_its_bits_out_of_layer_norm():
    """In any batch, with sums in an order of their own: as the compiler likes, rows of this width differ by batch."""
    c = dataclasses.replace(GPT2_SMALL, model_dim=768)
    rng = np.random.default_rng(0)
    rows = 0.3 + rng.standard_normal((16, 1, 768), np.float32)
    leaves = {f"final_norm/{name}": rng.standard_normal(768, np.float32) for name in ("scale", "bias")}
    norm = jax.jit(lambda x: params.module_with(c, leaves).final_norm(1.0 * x, row_sum))
    whole = norm(rows)
    for count in (2, 3, 5, 7, 8, 13):
        np.testing.assert_array_equal(norm(rows[:count]), whole[:count])


def test_a_text_without_room_in_the_table_is_refused(ours):
    """Before anything is compiled: places beyond the table would silently be its last."""
    tokens = np.zeros((1, 41), np.int32)
    with pytest.raises(UserError, match=r"rows of 41 tokens.*40 positions \(model\.max_position\)"):
        params.module(GPT2_SMALL, ours).hidden(tokens, tokens, tokens, Backend(), length=41)
    with pytest.raises(UserError, match="the model takes 40"):
        Generator(GPT2_SMALL, ours).logits(tokens[0].tolist())


def test_longrope_has_nothing_to_rotate():
    with pytest.raises(UserError, match="learned: nothing rotates"):
        dataclasses.replace(GPT2_SMALL, long_rope=LongRope((1.0,) * 6, (2.0,) * 6, 16)).check()


def test_every_path_computes_the_same():
    expected = evaluated(GROUPS, weights(GROUPS))
    for got, reference in [(trained(GROUPS), expected), (calibrated(GROUPS), expected)]:
        np.testing.assert_allclose(got, reference, rtol=0, atol=1e-4)


# --- four bits on a CPU ---------------------------------------------------------------------------------------------

X = np.random.default_rng(4).standard_normal((4, 1, GROUPS.model_dim)).astype(np.float32)


@needs_compiler
def test_what_the_kernel_does_not_fuse_is_products_in_four_bits(monkeypatch):
    block, ops, cache = tiled_block(GROUPS)

    def layer(x):
        return ops.add(x, block.mlp(Normed(x, block.mlp_norm)))

    assert called(layer, X) == {cpu_int4_library.PRODUCT}
    close(layer(X), X + Ops.value(ops, block.mlp(Normed(X, block.mlp_norm))))
    # LayerNorm and biases are computed around the products, and attention without a rotation is the kernel's.
    whole = lambda x, cache: block(x, cache, ops)  # noqa: E731
    assert called(whole, X, cache) == {cpu_int4_library.PRODUCT, cpu_int4_library.ATTEND}
    got, written = whole(X, cache)
    monkeypatch.setattr(cpu_int4, "attends", lambda *_: False)
    assert called(lambda *a: whole(*a), X, cache) == {cpu_int4_library.PRODUCT}
    expected, rewritten = whole(X, cache)
    close(got, expected)
    for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(rewritten), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@needs_compiler
def test_generation_in_four_bits():
    got, expected = generated(GROUPS, in_four_bits(GROUPS))
    # Activations are rounded to eight bits, see test_one_formula.py.
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.05 * expected.std()


@needs_compiler
def test_a_row_in_four_bits_has_its_bits_in_any_batch():
    generator, sampling = Generator(GROUPS, params.nested(in_four_bits(GROUPS))), Sampling(temperature=0, max_tokens=3)
    batch = [list(map(int, ids)) for ids in random_documents(GROUPS, 3, 17, 36)]
    together = generator.generate(batch, sampling)
    for prompt, expected in zip(batch, together, strict=True):
        assert generator.generate([prompt], sampling) == [expected]  # log-probabilities too
