"""A tokenizer of ours -> the arrays and ids of a GGUF file, or a refusal where llama.cpp would make other ids."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.interchange.facts import Facts
from phijax.interchange.gguf.tokenizer import END_OF_TURN
from phijax.storage import signals
from phijax.text.pre_tokenizers import PRE_TOKENIZERS, cuts_of
from phijax.text.sentencepiece_model import PieceKind, take_apart
from phijax.text.special_files import is_symbol
from phijax.text.tokenizer import END_OF_TEXT, MODEL_FILE, TextTokenizer

_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter gives them


def vocabulary(
    tokenizer: TextTokenizer,
    rows: int,
    facts: Facts,
    *,
    begin: Sequence[int] = (),
    stops: Sequence[int] = (),
    phi3: bool = False,
) -> dict[str, Any]:
    """Keys behind "tokenizer.ggml." -> values; lists of float are float32, of int are int32.

    Args:
      rows: of the embedding; ids without a token become unused ones.
      facts: of the checkpoint, for its ids.
      begin: ids that stand before every text. stops: every id that ends one.
      phi3: whether the model's name is phi-3's, by which llama.cpp strips the whitespace behind added tokens.
    Raises: UserError for a tokenizer that a GGUF file cannot hold, with the reason.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} ids, the model {rows} rows. They do not belong together."
        )
    with tempfile.TemporaryDirectory() as folder, signals.tidied(lambda: shutil.rmtree(folder)):
        tokenizer.save(folder)  # the one form that both backends have
        saved = epath.Path(folder)
        if (saved / MODEL_FILE).exists():
            arrays = _of_sentencepiece((saved / MODEL_FILE).read_bytes(), tokenizer, rows, phi3)
        else:
            arrays = _of_json(json.loads((saved / "tokenizer.json").read_text()), rows)
    return arrays | _ids(tokenizer, facts, begin, stops)


def _of_sentencepiece(model: bytes, tokenizer: TextTokenizer, rows: int, phi3: bool) -> dict[str, Any]:
    parsed, symbols = take_apart(model), tokenizer.symbols
    kinds = [
        PieceKind.CONTROL
        if piece.kind == PieceKind.USER_DEFINED and piece.text in tokenizer.specials.ids
        else piece.kind
        for piece in parsed.pieces
    ]
    whole = {p.text for p, kind in zip(parsed.pieces, kinds, strict=True) if kind == PieceKind.USER_DEFINED}
    lacks = {
        "puts no space behind pieces that it takes out whole": parsed.dummy_space and bool(whole - symbols.ids.keys()),
        "has added tokens that are found only as whole words": bool(symbols.whole_words),
        "has added tokens that swallow the space before them": bool(symbols.strips_left)
        or (parsed.dummy_space and bool(symbols.normalized)),
        f"has added tokens that {'keep' if phi3 else 'swallow'} the space behind them": symbols.strips_right
        != (frozenset(symbols.ids) if phi3 else frozenset()),
        "is no BPE model (unigram)": not parsed.joins,
        "has no pieces for bytes": PieceKind.BYTE not in kinds,
        "rewrites text before it cuts (a normalizer)": parsed.changes_text,
    }
    if reasons := [what for what, is_so in lacks.items() if is_so]:
        raise UserError(f"The SentencePiece model {' and '.join(reasons)}: llama.cpp would cut text otherwise.")
    surplus = range(len(kinds), rows)
    tokens = [*(piece.text for piece in parsed.pieces), *(f"[PAD{i}]" for i in surplus)]
    scores = [*(piece.score for piece in parsed.pieces), *(_PADDING_SCORE for _ in surplus)]
    types = [*map(int, kinds), *(int(PieceKind.UNUSED) for _ in surplus)]
    for name, i in tokenizer.added_tokens.items():
        kind = PieceKind.USER_DEFINED if name in symbols.ids else PieceKind.CONTROL
        tokens[i], scores[i], types[i] = name, _ADDED_SCORE, int(kind)
    out = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types}
    return out | {"add_space_prefix": parsed.dummy_space}


def _of_json(spec: dict[str, Any], rows: int) -> dict[str, Any]:
    model = spec["model"]
    pre = _pre_name(spec.get("pre_tokenizer"))
    lacks = {
        "cuts text by a rule that has no name there": pre is None,
        "rewrites text before it cuts (a normalizer)": bool(spec.get("normalizer")),
        "has pieces for bytes": bool(model.get("byte_fallback")),
        "marks continued words": bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
        "takes words that are tokens as they are": bool(model.get("ignore_merges")) and pre != "llama-bpe",
        "strips whitespace beside special tokens": any(
            t.get("rstrip") or t.get("lstrip") for t in spec["added_tokens"]
        ),
        "has added tokens that are found only as whole words": any(t.get("single_word") for t in spec["added_tokens"]),
    }
    if reasons := [what for what, is_so in lacks.items() if is_so]:
        raise UserError(f"The tokenizer {' and '.join(reasons)}: a GGUF file cannot say so.")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [int(PieceKind.UNUSED)] * rows
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(PieceKind.NORMAL)
    for token in spec["added_tokens"]:
        tokens[token["id"]] = token["content"]
        symbol = is_symbol(token["content"], token)
        types[token["id"]] = int(PieceKind.USER_DEFINED if symbol else PieceKind.CONTROL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    out = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    return out | {"add_space_prefix": False}


def _pre_name(part: Any) -> str | None:
    """The name of a tokenizer.json's rule: its cuts, one after the other, are those of the name."""
    cuts = cuts_of(part)
    return next((name for name, expressions in PRE_TOKENIZERS.items() if expressions == cuts), None)


def _ids(tokenizer: TextTokenizer, facts: Facts, begin: Sequence[int], stops: Sequence[int]) -> dict[str, Any]:
    if len(begin) > 1:
        raise UserError(f"Its texts begin with {len(begin)} tokens, {list(begin)}; a GGUF file can name one.")
    names, end = tokenizer.specials.ids, tokenizer.end_of_text
    bos, eos, pad = facts.bos_id, facts.eos_id, facts.pad_id
    bos = begin[0] if begin else bos
    eos = end if eos is None else eos
    # Without it llama.cpp takes <|end|> by its name, with a warning, and others not at all.
    eot = next((names[name] for name in END_OF_TURN if name in names), None)
    others = [i for i in stops if i not in (eos, eot)]
    if eot is None and others:
        eot = others.pop(0)
    # A third one: llama.cpp ends a text there too. What it knows by name needs no key.
    others.sort(key=lambda i: names.get(END_OF_TEXT) == i)
    out: dict[str, Any] = {
        "bos_token_id": names.get("<s>") if bos is None else bos,
        "eos_token_id": eos,
        "unknown_token_id": tokenizer.unknown,
        "padding_token_id": end if pad is None else pad,
        "eot_token_id": eot,
        "eom_token_id": next(iter(others), None),
        # Said even where it is false: llama.cpp would put bos before SentencePiece's.
        "add_bos_token": bool(begin),
        "add_eos_token": False,
    }
    return {key: value for key, value in out.items() if value is not None}
