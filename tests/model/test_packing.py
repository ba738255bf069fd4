"""Documents of one packed row do not know of each other: values and gradients, on every attention path."""

import functools

import jax
import numpy as np
import pytest
import small_models
from quick_compilation import QUICK
from references.attention import visible_keys
from references.weights import random_params
from small_models import SMALL, assert_leaves_close, pack, random_documents

from phijax.model import params as parameters
from phijax.model.backend import ATTENTION, CHOICES, Backend
from phijax.model.kernels import splash
from phijax.model.kernels.cudnn import cudnn_attention
from phijax.model.mask import Mask

LENGTH = 128  # two blocks of `blocked`, one of splash
PATHS = ["dense", "blocked", "splash", "cudnn"]
SIZES = (
    38,
    1 + 31,
    1 + 50,
)  # tokens of three documents; the second crosses the border of a block, 10 places stay empty
SPANS = [slice(0, 37), slice(37, 68), slice(68, 118)]


@pytest.fixture(scope="module")
def on_cpu():
    """The kernels of other backends in the form that runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTENTION, "splash", functools.partial(splash.splash_attention, interpret=True))
        patch.setitem(ATTENTION, "cudnn", functools.partial(cudnn_attention, implementation="xla"))
        yield


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@pytest.fixture(scope="module", params=PATHS)
def program(request, on_cpu):
    """Compiled once a path: (params, rows) -> (loss, logits), gradients."""
    return small_models.program(SMALL, CHOICES["cpu"] if request.param == "blocked" else Backend(request.param), LENGTH)


def test_changing_a_document_changes_no_other(program, params):
    """Bit for bit: logits of the others, and gradients of the others' loss with respect to every weight."""
    documents = random_documents(SMALL, *SIZES)
    for changed in range(3):
        others = [i for i in range(3) if i != changed]
        results = []
        for seed in (1, 2):
            replaced = list(documents)
            replaced[changed] = random_documents(SMALL, SIZES[changed], seed=seed)[0]
            rows = pack([replaced, [], []], LENGTH)
            rows.weights[0, SPANS[changed]] = 0.0  # the loss of the others alone
            results.append(program(params, *rows.arrays()))
        ((loss, logits), gradients), ((loss_2, logits_2), gradients_2) = results
        assert loss == loss_2
        for i in others:
            np.testing.assert_array_equal(logits[0, SPANS[i]], logits_2[0, SPANS[i]])
        assert not np.array_equal(logits[0, SPANS[changed]], logits_2[0, SPANS[changed]])  # it did change
        gradients, gradients_2 = parameters.flat(gradients), parameters.flat(gradients_2)
        for path, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, gradients_2[path], err_msg=path)
            assert np.abs(gradient).max() > 0, path


def test_padding_is_nobodys_context(program, params):
    """Tokens in the padding change no logit of a document; no row is NaN, one of padding alone included."""
    rows = pack([random_documents(SMALL, *SIZES), [], []], LENGTH)
    (loss, logits), _ = program(params, *rows.arrays())
    rows.tokens[rows.segment_ids == 0] = 7
    (loss_2, logits_2), gradients = program(params, *rows.arrays())
    assert loss == loss_2
    np.testing.assert_array_equal(logits[0, : SPANS[-1].stop], logits_2[0, : SPANS[-1].stop])
    assert np.isfinite(logits_2).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_packed_equals_unpacked(program, params):
    """One row of three documents against three rows of one: logits, loss, gradients."""
    documents = random_documents(SMALL, *SIZES)
    packed = pack([documents, [], []], LENGTH)
    single = pack([[document] for document in documents], LENGTH)
    (loss, logits), gradients = program(params, *packed.arrays())
    (loss_2, logits_2), gradients_2 = program(params, *single.arrays())
    # float32: the same sums in another order, a few 1e-6 of logits of about 3.
    for row, span in enumerate(SPANS):
        np.testing.assert_allclose(logits[0, span], logits_2[row, : span.stop - span.start], rtol=0, atol=2e-5)
    np.testing.assert_allclose(loss, loss_2, rtol=1e-6)
    assert_leaves_close(parameters.flat(gradients), parameters.flat(gradients_2), relative=1e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("window", [None, 100])
def test_no_gradient_reaches_unseen_keys(on_cpu, monkeypatch, name, window):
    """Exactly zero, not small: the gradient of a query's output with respect to keys and values it does not see."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "BLOCK_COMPUTE", 128)
    length = 256 if name == "splash" else 150
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, length, 16), np.float32) for _ in range(3))
    segments = np.repeat(np.array([1, 2, 3, 0], np.int32), [20, 115, 5, length - 140])[None]
    seen = visible_keys(segments[0], window)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def pull(query, k, v):
        def of_query(k, v):
            return ATTENTION[name](q, k, v, segments, mask=Mask(window=window))[0, :, query].sum()

        return jax.grad(of_query, argnums=(0, 1))(k, v)

    for query in (0, 19, 20, 125, 134, 139, length - 1):
        for gradient in pull(query, k, v):
            reached = np.abs(np.asarray(gradient)).max(axis=(0, 1, 3)) > 0
            # A lone visible key has weight one whatever it is: its gradient is zero too.
            assert not (reached & ~seen[query]).any(), query
        np.testing.assert_array_equal(reached, seen[query])  # of the values
