"""The same prompt and the same conversation, asked of a run and of llama.cpp's own server over what it exported."""

import json

import numpy as np
import pytest
from absl.testing import flagsaver
from saved_run import save_run

import phijax
from phijax import export
from phijax.errors import UserError
from phijax.inference.sampling import Sampling
from phijax.model.config import ModelConfig
from phijax.text.train_tokenizer import train_tokenizer

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server comes as the wheel xllamacpp")

TEXT = "The file object has a method that reads a line. "
MODEL = ModelConfig(
    vocab_size=320, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_position=256
)
PROMPTS = ["The file", " object", "", "a method that"]
CHAT = [{"role": "user", "content": "The file?"}, {"role": "assistant", "content": "a line"}]
CHAT += [{"role": "user", "content": "A method"}]
GREEDY = Sampling(max_tokens=8, temperature=0)


@pytest.fixture(scope="module", params=["end-of-text", "nothing"])
def pair(request, tmp_path_factory):
    """A run whose documents begin so, and llama.cpp with its GGUF file."""
    folder = tmp_path_factory.mktemp("llama_server")
    tokenizer = train_tokenizer([TEXT * 20], 310)
    begin = {"begin": tokenizer.end_of_text} if request.param == "end-of-text" else {}
    run = save_run(folder / "run", MODEL, tokenizer, **begin)
    saved = flagsaver.save_flag_values(export.FLAGS)
    try:
        export.main(
            export.FLAGS(
                ["export", f"--checkpoint={run}", f"--output={folder / 'out'}", "--format=gguf", "--kind=F32"]
            )[1:]
        )
    finally:
        flagsaver.restore_flag_values(saved, export.FLAGS)
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
