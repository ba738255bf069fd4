"""A prompt in a batch gives what it gives alone: bit for bit on one CPU, within 1e-5 on meshes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from batch_models import GPT2, GROUPED, ONE_HEAD, weights
from jax.sharding import Mesh

from phijax.errors import UserError
from phijax.inference import programs
from phijax.inference.generator import Generator
from phijax.inference.sampling import Sampling
from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.parallel.mesh import MeshConfig, make_mesh

LENGTHS = (3, 40, 17, 90, 1, 300, 5, 64, 20)


@functools.lru_cache(maxsize=4)
def generator(c: ModelConfig) -> Generator:
    return Generator(c, weights(c))


def prompts(c: ModelConfig, lengths=LENGTHS) -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, c.vocab_size, n).tolist() for n in lengths]


def logits_of(g: Generator, batch: list[list[int]], count: int) -> list[np.ndarray]:
    """Of every row: (count, V), what each of its tokens was chosen from."""
    rows: list[list[np.ndarray]] = [[] for _ in batch]
    for piece in g.stream(batch, Sampling(temperature=0, max_tokens=count), with_logits=True):
        rows[piece.row].append(piece.logits)
    return [np.stack(row) for row in rows]


@pytest.mark.parametrize(
    "c",
    [
        pytest.param(GROUPED, id="grouped"),
        pytest.param(ONE_HEAD, id="one kv head, window, tied"),
        pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow),
    ],
)
def test_a_row_of_a_batch_has_the_bits_that_it_has_alone(c):
    """Nine rows, so that some stand where a vector of eight ends; caches of other lengths alone than together."""
    g = generator(c)
    together = logits_of(g, prompts(c), 8)
    for prompt, expected in zip(prompts(c), together, strict=True):
        (alone,) = logits_of(g, [prompt], 8)
        np.testing.assert_array_equal(alone, expected)
    for number, again in enumerate(logits_of(g, prompts(c)[:3], 8)):
        np.testing.assert_array_equal(again, together[number])


def test_draws_depend_on_seed_and_the_rows_own_number_alone():
    g = generator(GROUPED)
    sampling = Sampling(max_tokens=8, temperature=1, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    together = g.generate(prompts(GROUPED)[:3], sampling)
    alone = [g.generate([prompt], sampling, names=[i])[0] for i, prompt in enumerate(prompts(GROUPED)[:3])]
    assert together == alone
    other_seed = g.generate(prompts(GROUPED)[:3], dataclasses.replace(sampling, seed=1))
    assert all(a.tokens != b.tokens for a, b in zip(together, other_seed, strict=True))
    same_prompt = g.generate([prompts(GROUPED)[1]] * 2, sampling)
    assert same_prompt[0].tokens != same_prompt[1].tokens


@pytest.mark.parametrize("name", [-1, 2**31, 2**40, 0.5, "1", None])
def test_what_is_no_number_of_a_row_is_refused(name):
    """Cut to 31 bits it would be another row's, and the two would draw alike."""
    with pytest.raises(UserError, match=r"names has .*: the number of a row is a whole number from 0 to 2147483647"):
        generator(GROUPED).stream([[1, 2]] * 2, Sampling(max_tokens=1), names=[np.int64(2**31 - 1), name])


def test_decoding_gives_the_logits_of_one_pass_over_the_whole():
    g = generator(GROUPED)
    for prompt in prompts(GROUPED)[:4]:
        (steps,) = logits_of(g, [prompt], 6)
        tokens = [int(np.argmax(row)) for row in steps]
        whole = g.logits([*prompt, *tokens])
        np.testing.assert_allclose(steps, whole[len(prompt) - 1 : -1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_mesh_agrees_with_one_device(tensor):
    """Two kv heads: cut by head over 2 devices, by time over 4 and 8 (a text spans several chips' parts)."""
    c = dataclasses.replace(GROUPED, num_heads=8, head_dim=12)
    mesh = make_mesh(MeshConfig(data=8 // tensor, fsdp=1, context=1, tensor=tensor), jax.devices())
    cut = Generator(c, weights(c), None, CHOICES["cpu"], mesh)
    assert (cut._layout.cut_by_time is not None) == (tensor > 2)
    alone = Generator(c, weights(c))
    batch = prompts(c, (3, 300, 40))
    for got, expected in zip(logits_of(cut, batch, 6), logits_of(alone, batch, 6), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    gate = cut._weights["blocks"][0]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.shape == (c.ffn_dim // tensor, c.model_dim)


def test_weights_are_not_gathered_for_a_token():
    """The compiled step of a tensor mesh moves activations alone: no collective is as large as a matrix."""
    c = dataclasses.replace(GROUPED, model_dim=512, ffn_dim=512)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 1, 2), ("data", "fsdp", "context", "tensor"))
    g = Generator(c, weights(c), None, CHOICES["cpu"], mesh)
    given = (np.zeros(2, np.int32), np.ones(2, np.int32), np.stack([g._frequencies(2)] * 2), None)
    lowered = programs.step.lower(c, g._layout, g._attention_factor, g._weights, g._empty_cache(2, 100), *given)
    text = lowered.compile().as_text()
    collectives = [line for line in text.splitlines() if " all-gather(" in line or " all-reduce(" in line]
    assert collectives
    for line in collectives:
        sizes = [int(n) for n in line.split("[", 1)[1].split("]", 1)[0].split(",") if n]
        assert np.prod(sizes, dtype=np.int64) < c.ffn_dim * c.model_dim // 8, line


def test_chunks_cover_a_prompt_with_little_padding():
    for length in range(1, 1200):
        pieces = programs.chunks(length)
        assert [start for start, _, _ in pieces] == list(np.cumsum([0] + [size for _, _, size in pieces[:-1]]))
        assert sum(count for _, count, _ in pieces) == length
        assert all(0 < count <= size and size in programs.CHUNKS for _, count, size in pieces)
        assert all(count == size for _, count, size in pieces[:-1])
        assert sum(size for _, _, size in pieces) <= length + max(15, length * 0.43)
