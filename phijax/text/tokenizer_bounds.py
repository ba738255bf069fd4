"""What a tokenizer.json may be before a library builds anything from it: sizes, counts, patterns, growth of texts."""

import base64
import re
from collections.abc import Mapping
from typing import Any

from phijax.errors import UserError
from phijax.storage.strict_json import shown

LONGEST_FILE = 64 << 20  # bytes; Gemma 3's, of 262,144 tokens, has 33 million
_MOST_TOKENS = 1 << 21
_MOST_ADDED = 1 << 17
_MOST_STEPS, _DEEPEST = 64, 8  # of normalizer, pre-tokenizer and decoder; published ones have up to 10, in 2 levels
_LONGEST_PATTERN = 1 << 16  # characters; one of ours lists all symbols of a SentencePiece model
_LONGEST_ADDITION = 1 << 10  # what is put before a text
_MOST_GROWTH = 64  # times as long; Unicode's own NFKC makes 18 characters of one
_CONSUMES = re.compile(
    r"(?:\\[pP]\{\^?\w+\}|\\[sSdDwWnrtfv]|\{[1-9]\d*,?\d*\}|[^\\*?{|()^$])+"
)  # what surely takes a character
_INNER = ("normalizers", "pretokenizers", "decoders")
_TEXTS = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")


def check_spec(spec: Mapping[str, Any], where: str) -> None:
    """Of any kind of model: steps, their patterns, added tokens. Raises: UserError, naming `where`."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for step in _steps(spec.get(part), part, where):
            _check_pattern(step, part, where)
            growth *= _growth(step, where) if part == "normalizer" else 1
            check_growth(growth, where)
    added = spec.get("added_tokens")
    if added is not None and (not isinstance(added, list) or not all(isinstance(token, dict) for token in added)):
        raise UserError(f"{where}: added_tokens must be a list of objects.")
    if added and len(added) > _MOST_ADDED:
        raise UserError(f"{where} has {len(added):,} added tokens; read are up to {_MOST_ADDED:,}.")


def check_growth(growth: float, where: str) -> None:
    """Raises: UserError, naming `where`, for a normalizer that can make a text so many times as long."""
    if growth > _MOST_GROWTH:
        raise UserError(
            f"{where}: its normalizer can make a text {growth:,.0f} times as long; {_MOST_GROWTH} are allowed."
        )


def check_model(model: Mapping[str, Any], where: str) -> None:
    """Of a vocabulary (text -> id) with merges. Raises: UserError, naming `where`."""
    vocab, merges = model["vocab"], model["merges"]
    if not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise UserError(f"{where}: ids in the vocabulary must be whole numbers from 0.")
    if len(vocab) > _MOST_TOKENS:
        raise UserError(f"{where} has {len(vocab):,} tokens; read are up to {_MOST_TOKENS:,}.")
    highest = max(vocab.values(), default=0)
    if highest > 4 * len(vocab) + (1 << 16):
        raise UserError(f"{where}: its vocabulary has {len(vocab):,} tokens, but one has the id {highest:,}.")
    if not isinstance(merges, list):
        raise UserError(f"{where}: merges must be a list.")
    # Each merge parts a token in two at another place, so that there are no more than characters.
    if len(merges) > (possible := sum(map(len, vocab))):
        raise UserError(f"{where} has {len(merges):,} merges; its vocabulary has room for {possible:,} at most.")
    for key in _TEXTS:
        if not isinstance(model.get(key), str | None) or len(model.get(key) or "") > _LONGEST_ADDITION:
            raise UserError(f"{where}: {key} must be a short text or null, but is {shown(model[key])}.")


def _steps(whole: Any, part: str, where: str) -> list[Mapping[str, Any]]:
    """All steps, sequences opened, in order."""
    steps, waiting = [], [(whole, 0)] if whole is not None else []
    while waiting:
        step, depth = waiting.pop()
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise UserError(f'{where}: a step of its {part} must be an object with "type", not {shown(step)}.')
        for key in _INNER:
            inner = step.get(key, [])
            if not isinstance(inner, list):
                raise UserError(f"{where}: {key} must be a list, not {shown(inner)}.")
            waiting += [(each, depth + 1) for each in reversed(inner)]
        steps.append(step)
        if len(steps) + len(waiting) > _MOST_STEPS or depth > _DEEPEST:
            raise UserError(
                f"{where}: its {part} has more than {_MOST_STEPS} steps, or more than {_DEEPEST} inside each other."
            )
    return steps


def _check_pattern(step: Mapping[str, Any], part: str, where: str) -> None:
    for text in _pattern_texts(step):
        if not isinstance(text, str) or len(text) > _LONGEST_PATTERN:
            raise UserError(
                f"{where}: a pattern of its {part} must be text of up to {_LONGEST_PATTERN:,} characters, but is "
                f"{f'one of {len(text):,}' if isinstance(text, str) else shown(text)}."
            )


def _pattern_texts(step: Mapping[str, Any]) -> list[Any]:
    pattern = step.get("pattern")
    return list(pattern.values()) if isinstance(pattern, dict) else [] if pattern is None else [pattern]


def patterns_of(spec: Mapping[str, Any]) -> list[str]:
    """Every pattern of a spec that was checked."""
    parts = ("normalizer", "pre_tokenizer")
    return [text for part in parts for step in _steps(spec.get(part), part, "") for text in _pattern_texts(step)]


def _growth(step: Mapping[str, Any], where: str) -> float:
    """How many times as long, in characters, a step of a normalizer can make a text."""
    kind = step["type"]
    if kind == "Replace":
        content, pattern = step.get("content"), step.get("pattern")
        if not isinstance(content, str):
            raise UserError(f"{where}: content of a Replace must be text, not {shown(content)}.")
        if isinstance(pattern, dict) and pattern.get("String"):
            return max(1.0, len(content) / len(pattern["String"]))
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        # A place between two characters may be found too, and both stay.
        between = not (isinstance(regex, str) and _CONSUMES.fullmatch(regex))
        return max(1.0, len(content) + between)
    if kind == "Prepend" and len(str(step.get("prepend"))) > _LONGEST_ADDITION:
        raise UserError(f"{where}: its normalizer puts more than {_LONGEST_ADDITION:,} characters before a text.")
    if kind != "Precompiled":
        return 1.0
    try:
        return charsmap_growth(base64.b64decode(step.get("precompiled_charsmap") or "", validate=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: precompiled_charsmap is no base64: {error}.") from error


def charsmap_growth(charsmap: bytes) -> float:
    """How many times as long SentencePiece's table of characters can make a text.

    It holds the bytes of a trie, behind their number, then texts with a zero behind each.
    """
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(1.0, *(len(text.decode(errors="replace")) for text in texts.split(b"\0")))
