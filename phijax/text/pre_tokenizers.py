"""How byte-level vocabularies cut text before merging, by the names that GGUF files give to it.

The expressions belong to the vocabularies: GPT-2's and those that OpenAI's tiktoken publishes for its encodings, which
Llama 3, phi-4 and Qwen took over. In tokenizer.json's form.
"""

from typing import Any

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = f"(?i:{_CONTRACTIONS})"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ANY_CASE}|{_LETTERS}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_ANY_CASE}|{_LETTERS}|\p{{N}}|{_MARKS}|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ANY_CASE}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ANY_CASE}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# Each expression cuts what the ones before it left.
_EXPRESSIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "olmo", "mpt", "jais"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (r"\p{N}", _GPT2),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe"): (_LLAMA3,),
    ("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"): (_QWEN2,),
    ("gpt-4o", "llama4"): (_GPT4O,),
    # llama.cpp's own fallback, which it takes for "default" as well.
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
PRE_TOKENIZERS = {name: expressions for names, expressions in _EXPRESSIONS.items() for name in names}


def pre_tokenizer(name: str) -> dict[str, Any]:
    """tokenizer.json's `pre_tokenizer` for one of PRE_TOKENIZERS: the cuts, then bytes as GPT-2's characters."""
    cuts = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in PRE_TOKENIZERS[name]
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*cuts, to_bytes]}


def cuts_of(part: Any) -> tuple[str, ...] | None:
    """The expressions by which a tokenizer.json's `pre_tokenizer` cuts text, which it then makes GPT-2's characters.

    Publishers write one rule in several ways. None for a pre-tokenizer that does anything else.
    """
    cuts: list[str] = []
    bytes_last = False
    for step in part.get("pretokenizers", [part]) if isinstance(part, dict) else ():
        kind, bytes_last = step.get("type"), step.get("type") == "ByteLevel"
        if kind == "Digits" and step.get("individual_digits"):
            cuts.append(r"\p{N}")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            cuts.append(step["pattern"].get("Regex", ""))
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            cuts += PRE_TOKENIZERS["gpt-2"] if step.get("use_regex", True) else ()
        else:
            return None
    return tuple(cuts) if bytes_last else None
