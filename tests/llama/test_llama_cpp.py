"""What llama.cpp makes of our GGUF files: loads them, cuts text alike, goes on alike. Run by `make test-llama`."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
from llama_reader import load, theirs
from references import real_model

sys.path.append(str(pathlib.Path(__file__).parent.parent / "interchange"))
from gguf_case import LLAMA, LONG, PHI3, TEXT, logits, opened, random_arrays, tokenizer

import phijax
from phijax.inference.sampling import Sampling
from phijax.interchange.gguf.open import open_gguf
from phijax.interchange.gguf.write import write_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is built from source, 10 to 25 minutes: make test-llama")

LOGITS = 1e-4  # of 4; float32 on both sides, sums in another order: measured 5e-6
GAP = 1e-3  # a choice between logits that are closer than this may fall either way

PARTIAL = dataclasses.replace(PHI3, partial_rotary_factor=0.5, tied_head=True)
MODELS = {"phi3": PHI3, "partial and tied": PARTIAL, "llama": LLAMA, "long": LONG}

TEXTS = [
    "The quick brown fox",
    " two  spaces   three",
    "\ttabs\tand\r\nlines\n\n\n",
    "naïve café — Straße, 漢字かな 🎉👩‍👩‍👧 \u200b",
    "def f(x):\n    return {'a': [x, x + 1]}",
    "12345 3.14",
    "",
    " ",
    "control \x00\x01 \x7f",
    "<|user|>\nSYS\nHI<|end|>\n<|assistant|>\n",
    "<|system|>\n You are.<|end|>\n<|user|>\n  Hi  <|end|>\n<|assistant|>\n\tYes<|end|><|endoftext|>",
    "a<|endoftext|> b<|end|>c </s> d<s>e",
    "<|user|> \t\n x",
]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Our model, and llama.cpp with our file of it. A LongRoPE model gets a context on the far side of its switch."""
    c = MODELS[request.param]
    arrays = random_arrays(c)
    path = write_gguf(opened(c, arrays), tmp_path_factory.mktemp("llama") / "m.gguf", kind="F32")
    return c, arrays, load(path, 64)


def test_logits_agree(pair):
    c, arrays, model = pair
    tokens = np.random.default_rng(0).integers(0, 380, 48).tolist()
    got, expected = logits(c, arrays, tokens, length=64), theirs(model, tokens)
    np.testing.assert_allclose(got, expected, atol=LOGITS, rtol=0)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("context", [256, 512])
def test_the_context_decides_the_list(context, tmp_path):
    """llama.cpp takes the long list where the context exceeds the original length, and rounds a context up to 256."""
    c = dataclasses.replace(
        LONG, max_position=1024, long_rope=dataclasses.replace(LONG.long_rope, original_max_position=256)
    )
    arrays = random_arrays(c)
    model = load(write_gguf(opened(c, arrays), tmp_path / "m.gguf", kind="F32"), context)
    assert model.n_ctx() == context
    tokens = np.random.default_rng(0).integers(0, 380, 40).tolist()
    expected = theirs(model, tokens)
    np.testing.assert_allclose(logits(c, arrays, tokens, length=context), expected, atol=LOGITS, rtol=0)
    assert np.abs(logits(c, arrays, tokens, length=768 - context) - expected).max() > 100 * LOGITS


def test_greedy_continuations_agree(pair):
    c, arrays, model = pair
    prompt = tokenizer().encode(TEXT)[:10]
    got = prompt[:]
    model.reset()
    model.eval(prompt)
    for _ in range(50):
        ours = logits(c, arrays, got + [0] * (64 - len(got)), length=64)[len(got) - 1]
        other = np.array(model.scores[len(got) - 1])
        second, first = np.sort(other)[-2:]
        if first - second < GAP:
            break
        assert np.argmax(ours) == np.argmax(other), f"after {len(got)} tokens"
        got.append(int(np.argmax(ours)))
        model.eval(got[-1:])  # from its cache of keys and values, in float32
    assert len(got) > len(prompt) + 5


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_cut_alike(text, vocabulary):
    """With special tokens: the rule for whitespace behind them hangs on the model's name."""
    model, mine = vocabulary, tokenizer()
    assert model.tokenize(text.encode(), add_bos=False, special=True) == mine.encode_with_specials(text)
    plain = model.tokenize(text.encode(), add_bos=False, special=False)
    assert plain == mine.encode(text)
    assert model.detokenize(plain).decode() in (text, f" {text}")  # the dummy space


@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>user\nHi 123<|im_end|>\n", "I'll DON'T it's 2024's"])
def test_bytes_are_cut_alike(text, byte_level):
    """A byte-level vocabulary, SmolLM2's, read from its GGUF file and written again."""
    mine, model = byte_level
    assert model.tokenize(text.encode(), add_bos=False, special=False) == mine.encode(text)
    assert model.tokenize(text.encode(), add_bos=False, special=True) == mine.encode_with_specials(text)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    mine = open_gguf(real_model.find_or_skip()).tokenizer()
    c = dataclasses.replace(LLAMA, vocab_size=49152, model_dim=32, num_layers=1, ffn_dim=32)
    path = write_gguf(opened(c, tokenizer=lambda: mine), tmp_path_factory.mktemp("bytes") / "m.gguf", kind="Q4_0")
    return mine, llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = write_gguf(opened(PHI3), tmp_path_factory.mktemp("vocabulary") / "m.gguf", kind="Q8_0")
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def test_an_answer_ends_where_the_file_says(vocabulary):
    names = tokenizer().added_tokens
    theirs = llama_cpp.llama_model_get_vocab(vocabulary._model.model)
    assert llama_cpp.llama_vocab_eot(theirs) == names["<|end|>"]
    assert llama_cpp.llama_vocab_eos(theirs) == names["<|endoftext|>"]
    assert llama_cpp.llama_vocab_is_eog(theirs, names["<|end|>"])
    assert not llama_cpp.llama_vocab_get_add_bos(theirs)
    assert vocabulary.tokenize(b"a") == tokenizer().encode("a")  # asked to put bos in front where the model wants it


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_kinds_load_and_are_near(kind, tmp_path):
    """Its products of quantised weights quantise the activations too: near, not equal."""
    arrays = random_arrays(PHI3)
    path = write_gguf(opened(PHI3, arrays), tmp_path / "m.gguf", kind=kind)
    tokens = np.random.default_rng(0).integers(0, 380, 32).tolist()
    source = open_gguf(path).weights
    read = {p: source.read(p, tuple(slice(0, n) for n in s)).astype(np.float32) for p, s in source.shapes().items()}
    got, expected = logits(PHI3, read, tokens, length=64), theirs(load(path, 64), tokens)
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert error < {"F16": 0.01, "BF16": 0.02}.get(kind, 0.1), error


@pytest.mark.slow  # half a gigabyte
def test_a_real_model_in_float32(tmp_path):
    """SmolLM2's published Q4_1 as our F32. (In Q4_1 and Q8_0 llama.cpp quantises activations too, and its answer to
    this question is another, from the published file as from ours.)"""
    source = open_gguf(real_model.find_or_skip())
    path = write_gguf(source, tmp_path / "m.gguf", kind="F32")
    model = load(path, 512)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ours = phijax.load(path, max_length=512)
    tokens, _ = ours.encode_chat(messages, Sampling())
    got, expected = ours.logits(tokens), theirs(model, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)  # of 38; measured 7e-5
    answer = model.create_chat_completion(messages, temperature=0, max_tokens=32)["choices"][0]
    mine = ours.chat(messages, temperature=0, max_tokens=32)
    assert answer["message"]["content"] == mine.text and "Paris" in mine.text
    assert answer["finish_reason"] == mine.finish_reason == "stop"
