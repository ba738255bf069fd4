"""The tokenizer files of a Hugging Face folder, written so that AutoTokenizer gives our ids."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.storage.strict_json import named
from phijax.text.sentencepiece_model import Piece, PieceKind, take_apart
from phijax.text.special_files import CONFIG_FILE, JSON_FILE, read_object
from phijax.text.specials import SPACE_MARK, DummySpace, Specials

_NONE = Specials({})
# What has transformers make a tokenizer of its own, or one that takes names of special tokens for text.
_REMAKES = ("auto_map", "from_slow", "tokenizer_file", "split_special_tokens", "fix_mistral_regex")
_GENERIC = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is; LlamaTokenizer of transformers 5 remakes parts


def write_sentencepiece(
    folder: epath.Path,
    *,
    model: bytes,
    added_tokens: Mapping[str, int],
    specials: Specials,
    symbols: Specials,
    dummy_space: DummySpace,
    eos: str,
    pad: str,
    chat_template: str | None,
) -> None:
    """tokenizer.model, added_tokens.json, tokenizer.json and the two files of names beside them.

    Raises UserError, before anything is written, for a model that merges cannot stand for: unigram, or one that folds
    characters. transformers would convert it by itself and give other ids for some texts.
    """
    parts = take_apart(model)
    spec = spec_of_model(model, specials, symbols, dummy_space)
    if spec is None:
        raise UserError(
            f"The SentencePiece model {'folds characters or spaces' if parts.joins else 'is no BPE model (unigram)'}, "
            "so that no tokenizer.json gives its ids. phi-3's, Llama's and those trained here are BPE and fold nothing."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    _write(folder / "added_tokens.json", dict(added_tokens))
    (folder / JSON_FILE).write_text(_as_text(spec))
    kinds = {PieceKind.UNKNOWN: "unk_token", PieceKind.CONTROL: "bos_token"}
    names = {kinds[p.kind]: p.text for p in parts.pieces if p.text in ("<unk>", "<s>") and p.kind in kinds}
    names |= {"eos_token": eos, "pad_token": pad}
    write_names(folder, names, specials, symbols, chat_template)


def spec_of_model(
    model: bytes, specials: Specials, symbols: Specials, dummy_space: DummySpace
) -> dict[str, Any] | None:
    """tokenizer.json of a SentencePiece model; None for one that merges cannot stand for."""
    parts = take_apart(model)
    if not parts.joins or parts.changes_text:
        return None
    return sentencepiece_json(parts.pieces, specials, dummy_space if parts.dummy_space else "never", symbols)


def take_as_it_is(folder: str | epath.PathLike, spec: Mapping[str, Any] | None) -> list[str]:
    """Makes transformers read a copied folder's tokenizer.json as it is; returns the files that had to be changed.

    phi-3's and Llama's files name LlamaTokenizer, of which transformers 5 remakes parts: other ids behind special
    tokens and before spaces. Without tokenizer.json it makes one by rules of its own.

    Args:
      spec: the tokenizer.json that gives our ids; what stands around a text stays as the folder's own says. None: the
        folder's own, if it has one.
    """
    folder, changed = epath.Path(folder), []
    path, whole = folder / CONFIG_FILE, folder / JSON_FILE
    there = read_object(whole)
    if spec is not None:
        spec = {**spec, "post_processor": (there or {}).get("post_processor")}
        if spec != there:
            whole.write_text(_as_text(spec))
            changed.append(JSON_FILE)
    elif there is None:
        return []
    config = read_object(path) or {}
    new = {key: value for key, value in config.items() if key not in _REMAKES} | {"tokenizer_class": _GENERIC}
    if spec is not None:
        entries = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in spec["added_tokens"]}
        new |= {"added_tokens_decoder": entries} if entries or "added_tokens_decoder" in new else {}
    if new != config:
        _write(path, new)
        changed.append(CONFIG_FILE)
    return changed


def write_names(
    folder: epath.Path,
    names: Mapping[str, str],
    specials: Specials,
    symbols: Specials,
    chat_template: str | None,
) -> None:
    """tokenizer_config.json and special_tokens_map.json. `names`: bos_token and the like -> the token."""
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): entry for i, entry in token_entries(specials, symbols).items()},
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # prompts of a batch end together
        **names,
        "tokenizer_class": _GENERIC,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    _write(folder / CONFIG_FILE, config)
    entries = {kind: token_entry(name, specials) for kind, name in names.items()}
    _write(
        folder / "special_tokens_map.json",
        {k: {f: v for f, v in e.items() if f != "special"} for k, e in entries.items()},
    )


def name_of_special(specials: Specials, i: int) -> str:
    """Raises UserError where `i` is no special token."""
    if i not in specials.names:
        known = ", ".join(f"{i} {named(name)}" for name, i in _in_order(specials))
        raise UserError(f"Id {i} is no special token of the tokenizer, so no text can end with it. It has: {known}.")
    return specials.names[i]


def _in_order(specials: Specials) -> list[tuple[str, int]]:
    return sorted(specials.ids.items(), key=lambda entry: entry[1])


def _as_text(spec: Mapping[str, Any]) -> str:
    return json.dumps(spec, ensure_ascii=False, indent=1) + "\n"


def _write(path: epath.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def token_entry(name: str, found: Specials, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    return {
        "content": name,
        "lstrip": name in found.strips_left,
        "normalized": not special and name in found.normalized,
        "rstrip": name in found.strips_right,
        "single_word": name in found.whole_words,
        "special": special,
    }


def token_entries(specials: Specials, symbols: Specials) -> dict[int, dict[str, Any]]:
    """Id -> entry of every added token, in order."""
    entries = {i: token_entry(name, specials) for name, i in specials.ids.items()}
    entries |= {i: token_entry(name, symbols, special=False) for name, i in symbols.ids.items()}
    return dict(sorted(entries.items()))


def sentencepiece_json(
    pieces: Sequence[Piece], specials: Specials, dummy_space: DummySpace, symbols: Specials = _NONE
) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE model: the same ids, computed from merges instead of scores.

    As Hugging Face publishes Llama's and phi-3's. Pieces that the model itself takes out of text whole are words there,
    which are looked up before anything is merged.
    """
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    from_mark = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    unknown = next((piece.text for piece in pieces if piece.kind == PieceKind.UNKNOWN), None)
    bytes_known = any(piece.kind == PieceKind.BYTE for piece in pieces)
    dummy = [{"type": "Prepend", "prepend": SPACE_MARK}] if dummy_space == "each" else []
    added = specials.ids.keys() | symbols.ids.keys()
    whole = [piece.text for piece in pieces if piece.kind == PieceKind.USER_DEFINED and piece.text not in added]
    whole.sort(key=len, reverse=True)
    pattern = {"Regex": "|".join(map(re.escape, whole))}
    split = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}] if whole else []
    metaspace = {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": dummy_space, "split": False}
    undummy = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dummy_space != "never" else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **entry} for i, entry in token_entries(specials, symbols).items()],
        "normalizer": {"type": "Sequence", "normalizers": [*dummy, to_mark]},
        "pre_tokenizer": _sequence([*([metaspace] if dummy_space in ("always", "first") else []), *split]),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [from_mark, {"type": "ByteFallback"}, {"type": "Fuse"}, *undummy],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bytes_known,
            "ignore_merges": bool(whole),
            "vocab": vocab,
            "merges": merges_of(pieces),
        },
    }


def _sequence(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else next(iter(steps), None)


def merges_of(pieces: Sequence[Piece]) -> list[str]:
    """SentencePiece joins the neighbours whose piece has the highest score: as a list, the best score first.

    Every way to part a piece into two is in it, since either may come up.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.kind == PieceKind.NORMAL}
    ranked = []
    for number, (text, score) in enumerate(normal.items()):
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                ranked.append((-score, number, cut, f"{text[:cut]} {text[cut:]}"))
    ranked.sort()
    return [merge for *_, merge in ranked]
