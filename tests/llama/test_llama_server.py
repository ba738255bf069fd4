"""The same prompt and the same conversation, asked of a run and of llama.cpp's own server over what it exported."""

import json

import numpy as np
import pytest
from saved_run import CHAT, GREEDY, MODEL, PROMPTS, TEXT, exported, save_run

import phijax
from phijax.errors import UserError
from phijax.text.train_tokenizer import train_tokenizer

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server comes as the wheel xllamacpp")


@pytest.fixture(scope="module", params=["end-of-text", "nothing"])
def pair(request, tmp_path_factory):
    """A run whose documents begin so, and llama.cpp with its GGUF file."""
    folder = tmp_path_factory.mktemp("llama_server")
    tokenizer = train_tokenizer([TEXT * 20], 310)
    begin = {"begin": tokenizer.end_of_text} if request.param == "end-of-text" else {}
    run = save_run(folder / "run", MODEL, tokenizer, **begin)
    exported(run, folder / "out", "--format=gguf", "--kind=F32")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(next((folder / "out").glob("*.gguf")))
    settings.n_ctx, settings.n_parallel, settings.warmup = 512, 1, False
    settings.verbosity = -1
    return phijax.load(run), xllamacpp.Server(settings)


def asked(answer) -> dict:
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return answer["__verbose"]


ASK = {"max_tokens": 8, "temperature": 0, "return_tokens": True, "cache_prompt": False, "verbose": True}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_continued_alike(prompt, pair):
    ours, theirs = pair
    if not prompt and not ours.generator.begin:
        with pytest.raises(UserError, match="prompt is empty"):
            ours.generate(prompt, GREEDY)
        return
    got = asked(theirs.handle_completions({"prompt": prompt, **ASK}))
    assert got["tokens_evaluated"] == len(ours.generator.ids(prompt))
    assert tuple(got["tokens"]) == ours.generate(prompt, GREEDY).tokens


def test_a_conversation_is_answered_alike(pair):
    ours, theirs = pair
    ids, _ = ours.encode_chat(CHAT, GREEDY)
    got = asked(theirs.handle_chat_completions({"messages": CHAT, **ASK}))
    assert got["tokens_evaluated"] == len(ids)
    assert tuple(got["tokens"]) == ours.chat(CHAT, GREEDY).tokens
    # What begins a text is in the answer: without it another one is given.
    if ours.generator.begin:
        assert not np.array_equal(ours.generate([ids[1:]], GREEDY)[0].tokens, got["tokens"])
