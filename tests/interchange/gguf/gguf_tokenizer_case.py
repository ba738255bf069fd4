"""Tokenizers for GGUF files, and what lies in a file, read and changed by the package gguf."""

import io
import json
from types import MappingProxyType

import pytest
import sentencepiece
from gguf_case import TEXT

from phijax.text.bpe import BpeTokenizer
from phijax.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")


def arrays(path):
    fields = gguf.GGUFReader(path).fields
    prefix = "tokenizer.ggml."
    return {key.removeprefix(prefix): field.contents() for key, field in fields.items() if key.startswith(prefix)}


def byte_level(pre="smollm", **changed):
    """A vocabulary of bytes and a few merges."""
    from phijax.text.byte_level import byte_of_character

    letters = list(byte_of_character())
    merges = ["h e", "l l", "Ġ w", "he ll", "o r", "1 2", "Ċ Ċ", "Ġ Ġ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *(merge.replace(" ", "") for merge in merges)]
    types = [3, 3, 4] + [1] * (len(tokens) - 3)
    made = BpeTokenizer.from_gguf(tokens, merges, types, pre)
    spec = json.loads(made._spec)
    spec |= changed
    return BpeTokenizer(json.dumps(spec))


def rewritten(path, kinds=MappingProxyType({}), **changed):
    """The file with other arrays, through gguf's own writer. kinds: the changed types, by gguf's names."""
    source = gguf.GGUFReader(path)
    out = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(out, "phi3")
    for key, field in source.fields.items():
        name = key.removeprefix("tokenizer.ggml.")
        if key.startswith("GGUF.") or key == "general.architecture" or changed.get(name, "") is None:
            continue
        value = changed.get(name, field.contents())
        kind = gguf.GGUFValueType[kinds[name]] if name in kinds else field.types[0]
        writer.add_key_value(key, value, kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def trained(**changed):
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 360,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    lines = (TEXT * 3).split("\n")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options | changed)
    return Tokenizer(model.getvalue())
