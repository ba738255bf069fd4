"""The arrays by which a GGUF file holds a byte-level vocabulary ("gpt2") -> the text of a tokenizer.json."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from phijax.errors import UserError, nearest_name
from phijax.text.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from phijax.text.sentencepiece_model import PieceKind
from phijax.text.special_files import JSON_FILE


def spec_of_arrays(tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], pre: str, where: str) -> str:
    """A tokenizer.json that gives the ids which llama.cpp gives.

    Args:
      tokens: the vocabulary, in GPT-2's characters for bytes, control tokens by name.
      merges: "left right", the first is merged first.
      types: of the tokens, as PieceKind counts them; unused ones pad the matrix.
      pre: tokenizer.ggml.pre, the name of the rule that cuts text before merging.
    Raises: UserError, naming `where`, for arrays that do not belong together or a rule that is not known here.
    """
    if pre not in PRE_TOKENIZERS:
        near = nearest_name(pre, PRE_TOKENIZERS)
        raise UserError(
            f"{where} cuts text by the rule {pre!r} (tokenizer.ggml.pre), which is not known here"
            f"{f'; did it mean {near!r}?' if near else '.'}\nKnown: {', '.join(PRE_TOKENIZERS)}.\n"
            f"A folder with the model's {JSON_FILE} says the rule itself: open that."
        )
    if len(types) != len(tokens):
        raise UserError(f"{where} has {len(tokens)} tokens but {len(types)} token types. The file is damaged.")
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(pre),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # Llama 3 takes a word that is a token as it is, whatever the merges would make of it.
            "ignore_merges": pre in ("llama-bpe", "llama3", "llama-v3"),
            "vocab": _vocabulary(tokens, types, where),
            "merges": _checked(merges, where),
        },
    }
    return json.dumps(spec)


def _vocabulary(tokens: Sequence[str], types: Sequence[int], where: str) -> Mapping[str, int]:
    vocabulary: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != PieceKind.UNUSED and vocabulary.setdefault(token, i) != i:
            raise UserError(f"{where} has the token {token!r} twice. The file is damaged.")
    return vocabulary


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **flags, "special": kind == PieceKind.CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED)
    ]


def _checked(merges: Sequence[str], where: str) -> list[str]:
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"{where}: the merge {merge[:80]!r} is no pair of tokens. The file is damaged.")
    return list(merges)
