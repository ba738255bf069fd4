"""SmolLM2-135M-Instruct in Q4_1, as others publish it, against transformers' reading of the same file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_case import everything
from gguf_real_texts import TEXTS
from references import real_model

import phijax
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf
from phijax.model import params as parameters
from phijax.model.backend import Backend

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

LOGITS = 1e-3  # the promise; float32 on both sides, 30 layers, logits up to 30
GAP = 1e-3  # a choice between two logits that are closer than this may fall either way

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Die Hauptstadt von Deutschland ist Berlin. 東京は日本の首都です。 1 2 3",
]


@pytest.fixture(scope="module")
def opened():
    return open_gguf(real_model.find_or_skip())


@pytest.fixture(scope="module")
def theirs(opened):
    return transformers.AutoModelForCausalLM.from_pretrained(
        opened.path.parent, gguf_file=opened.path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def their_tokenizer(opened):
    return transformers.AutoTokenizer.from_pretrained(opened.path.parent, gguf_file=opened.path.name)


@pytest.fixture(scope="module")
def params(opened):
    surplus = opened.model.padded_vocab_size - opened.model.vocab_size
    assert surplus == 0
    return parameters.nested({path: jnp.asarray(array) for path, array in everything(opened.weights).items()})


@functools.lru_cache(maxsize=4)
def program(c, length):
    def run(params, tokens):
        model = parameters.module(c, params)
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        return model.logits(model.hidden(tokens, positions, jnp.ones_like(positions), Backend(), length=length))[0]

    return jax.jit(run)


def logits(c, params, tokens, length):
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(program(c, length)(params, padded))[: len(tokens)]


def test_the_file_is_opened(opened):
    assert parameters.count(opened.model) == 134_515_008
    assert opened.model.tied_head and opened.model.norm_eps == 1e-5 and opened.model.rope_theta == 100_000
    assert opened.facts.gguf_kinds == ("Q4_1", "Q8_0") and opened.stop_ids == (2, 0)
    assert "im_start" in opened.chat_template


def test_ids_are_those_of_transformers(opened, their_tokenizer):
    mine = opened.tokenizer()
    for text in (*TEXTS, *PROMPTS, real_text(20_000)):
        ids = mine.encode(text)
        if "<|user|>" not in text and "</s>" not in text:  # names that are text to us and to it: none is a token here
            assert ids == their_tokenizer.encode(text, add_special_tokens=False), text
        assert mine.decode(ids) == text
    chat = "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    assert mine.encode_with_specials(chat) == their_tokenizer.encode(chat, add_special_tokens=False)


def real_text(characters, start=0):
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics.values())[start : start + characters]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_are_those_of_transformers(prompt, opened, params, theirs):
    tokens = opened.tokenizer().encode(prompt)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    got = logits(opened.model, params, tokens, 64)
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(got, expected, atol=LOGITS, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_continuations_are_those_of_transformers(prompt, opened, params, theirs):
    """64 tokens, or until transformers itself is undecided."""
    tokens = opened.tokenizer().encode(prompt)
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([tokens]),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = out.sequences[0].tolist()[len(tokens) :]
    gaps = [float(np.diff(np.sort(step[0].numpy())[-2:])[0]) for step in out.logits]
    count = next((number for number, gap in enumerate(gaps) if gap < GAP), len(gaps))
    assert count >= 16
    # As long as all choices were the same, what we would choose next follows from one pass over theirs.
    got = np.argmax(logits(opened.model, params, tokens + expected[: count - 1], 128), axis=-1)[len(tokens) - 1 :]
    assert got.tolist() == expected[:count]
    model = phijax.load(opened.path, max_length=512)
    model.generator.stop_ids = ()  # a continuation, whatever ends an answer
    cached = model.generate([tokens], max_tokens=count, temperature=0)[0]
    assert list(cached.tokens) == expected[:count]


@pytest.mark.slow
def test_a_chat_knows_the_capital_of_france(opened):
    """The whole way: recognised chat format, cached decoding, the ids that end an answer."""
    model = phijax.load(opened.path, max_length=512)
    result = model.chat([{"role": "user", "content": "What is the capital of France?"}], max_tokens=32, temperature=0)
    assert "Paris" in result.text and result.finish_reason == "stop"


@pytest.mark.slow
def test_training_goes_on_from_it(opened, params):
    """20 steps of AdamW on the language reference of Python lower its loss there, on text that it did not see."""
    import optax

    c, length, batch = opened.model, 128, 2
    tokens = np.asarray(opened.tokenizer().encode(real_text(60_000)), np.int32)
    rows = tokens[: len(tokens) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    held_out, rows = rows[-4:], rows[:-4]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))

    def loss(params, row):
        model = parameters.module(c, params)
        hidden = model.hidden(row[:, :-1], positions, jnp.ones_like(positions), Backend(), length=length)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), row[:, 1:]))

    optimizer = optax.adamw(3e-5, weight_decay=0.0)

    @jax.jit
    def step(params, state, row):
        value, gradients = jax.value_and_grad(loss)(params, row)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    measure = jax.jit(loss)
    before = np.mean([measure(params, held_out[i : i + batch]) for i in (0, 2)])
    state = optimizer.init(params)
    for number in range(20):
        params, state, _ = step(params, state, rows[number * batch : (number + 1) * batch])
    after = np.mean([measure(params, held_out[i : i + batch]) for i in (0, 2)])
    assert before < 5  # it is a model of English
    assert after < before - 0.05, (before, after)


@pytest.mark.slow
def test_it_goes_out_and_comes_back(opened, tmp_path):
    """Q4_1 -> GGUF F32 -> ours: the weights that the file stands for, bit for bit; its tokenizer and template too."""
    back = open_gguf(write_gguf(opened, tmp_path / "m.gguf", kind="F32"))
    assert back.model == opened.model and back.stop_ids == opened.stop_ids
    assert back.chat_template == opened.chat_template
    for path, array in everything(back.weights).items():
        whole = tuple(slice(0, n) for n in array.shape)
        np.testing.assert_array_equal(array, opened.weights.read(path, whole), err_msg=path)
    text = real_text(20_000)
    assert back.tokenizer().encode(text) == opened.tokenizer().encode(text)
