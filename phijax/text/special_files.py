"""Which special tokens a folder names: Hugging Face's files, in the order in which they overrule each other, and ours.

added_tokens.json, then tokenizer_config.json (added_tokens_decoder), then tokenizer.json (added_tokens): the last one
that speaks of an id decides its name and flags.
"""

import dataclasses
import json
import stat
from collections.abc import Mapping
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.text.specials import DummySpace, looks_like_control
from phijax.text.tokenizer_bounds import LONGEST_FILE, check_spec

ADDED_TOKENS_FILE = "added_tokens.json"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
JSON_FILE = "tokenizer.json"
OURS_FILE = "special_tokens.json"  # what `save` has to say beyond names and ids, where it is not as phi-3 has it


@dataclasses.dataclass(frozen=True)
class FolderTokens:
    """What a folder says.

    names: id -> name of every token named, the model's own too.
    strips_right: names flagged so; None where no file has flags. strips_left: likewise, empty without.
    symbols: names of tokens that are not special, which plain text becomes; whole_words, normalized: those flagged so.
    end: the name of what ends a text: ours, else eos_token.
    dummy_space: where tokenizer.json puts it.
    vocab_size: of tokenizer.json, or None.
    """

    names: Mapping[int, str]
    strips_right: frozenset[str] | None
    strips_left: frozenset[str]
    end: str | None
    dummy_space: DummySpace
    vocab_size: int | None
    symbols: frozenset[str] = frozenset()
    whole_words: frozenset[str] = frozenset()
    normalized: frozenset[str] = frozenset()

    def ids(self) -> dict[str, int]:
        return {name: i for i, name in self.names.items()}


def read_folder_tokens(folder: epath.Path) -> FolderTokens | None:
    """None where the folder says nothing at all of special tokens. Raises UserError for files that cannot be meant."""
    added = read_object(folder / ADDED_TOKENS_FILE)
    config = read_object(folder / CONFIG_FILE)
    whole = read_object(folder / JSON_FILE)
    if whole is not None:
        check_spec(whole, str(folder / JSON_FILE))
    ours = read_object(folder / OURS_FILE)
    if added is None and config is None and whole is None:
        return None
    names: dict[int, str] = {}
    flags: dict[str, dict[str, Any]] = {}
    for name, i in (added or {}).items():
        _name(names, folder / ADDED_TOKENS_FILE, name, i)
    if added and len(names) != len(added):
        i, name = next((i, name) for name, i in added.items() if names[i] != name)
        raise UserError(f"{folder / ADDED_TOKENS_FILE}: {name!r} and {names[i]!r} have the same id {i}.")
    decoder = (config or {}).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{folder / CONFIG_FILE}: added_tokens_decoder must be an object of ids.")
    for i, entry in decoder.items():
        _entry(names, flags, folder / CONFIG_FILE, int(i) if str(i).isdecimal() else i, entry)
    for entry in (whole or {}).get("added_tokens") or ():
        _entry(names, flags, folder / JSON_FILE, entry.get("id") if isinstance(entry, dict) else None, entry)
    end = _end(config or {})
    control = _named(config) | _named(read_object(folder / MAP_FILE)) | {end}
    # added_tokens.json alone has no flags: in a folder of ours all are control tokens, elsewhere none.
    unflagged: dict[str, Any] = {"special": config is None and whole is None}
    symbols = frozenset(
        name for name in names.values() if is_symbol(name, flags.get(name, unflagged)) and name not in control
    )
    right, left = _flagged(flags, "rstrip"), _flagged(flags, "lstrip")
    words, normalized = _flagged(flags, "single_word"), _flagged(flags, "normalized") & symbols
    said = bool(flags) or config is not None
    # Without tokenizer.json each segment has one: so it is in phi-3's, although its `legacy` is false.
    dummy_space = dummy_space_of(whole) if whole else "each"
    if ours is not None:
        right, said = frozenset(ours.get("strips_right", ())), True
        left = frozenset(ours.get("strips_left", ()))
        symbols, words, normalized = (frozenset(ours.get(k, ())) for k in ("symbols", "whole_words", "normalized"))
        end, dummy_space = ours.get("end_of_text", end), ours.get("dummy_space", dummy_space)
    right_said = right if said else None
    size = _vocab_size(whole)
    return FolderTokens(names, right_said, left, end, dummy_space, size, symbols, words, normalized)


def is_symbol(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether an added token is found in plain text: flagged as not special, and not for control all the same."""
    return not entry.get("special") and not looks_like_control(name)


def _flagged(flags: Mapping[str, Mapping[str, Any]], flag: str) -> frozenset[str]:
    return frozenset(name for name, entry in flags.items() if entry.get(flag) is True)


_KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def control_names(folder: epath.Path) -> frozenset[str]:
    """Tokens that a folder's settings name, as eos_token: transformers makes them special, whatever their flags."""
    return _named(read_object(folder / CONFIG_FILE)) | _named(read_object(folder / MAP_FILE))


def _named(settings: Mapping[str, Any] | None) -> frozenset[str]:
    found = [(settings or {}).get(kind) for kind in _KINDS]
    for kind in ("additional_special_tokens", "extra_special_tokens"):
        more = (settings or {}).get(kind) or ()
        found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in found)
    return frozenset(text for text in texts if isinstance(text, str))


def read_object(path: epath.Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises: UserError for what is not one object of JSON."""
    if not path.exists():
        return None
    try:
        parsed = json.loads(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} must hold one object of names and values.")
    return parsed


def size_of(path: epath.Path) -> int:
    """Bytes of a file. Raises: UserError for what is no regular file, as a pipe, or a device without end."""
    found = path.stat()
    if found.is_directory or (found.mode is not None and not stat.S_ISREG(found.mode)):
        raise UserError(f"{path} is no regular file.")
    return found.length


def read_bounded(path: epath.Path) -> bytes:
    """Raises: UserError as `size_of`, and for a file that is larger than any need be."""
    if (size := size_of(path)) > LONGEST_FILE:
        raise UserError(f"{path} has {size:,} bytes; read are tokenizer files of up to {LONGEST_FILE:,}.")
    return path.read_bytes()


def _name(names: dict[int, str], path: epath.Path, name: Any, i: Any) -> None:
    if not isinstance(name, str) or not name or type(i) is not int or i < 0:
        raise UserError(f'{path} must give names and ids, as {{"<|endoftext|>": 32000}}, but has {name!r}: {i!r}.')
    names[i] = name


def _entry(names: dict[int, str], flags: dict[str, dict[str, Any]], path: epath.Path, i: Any, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: the added token {i!r} must be an object with its content, but is {entry!r}.")
    name = entry.get("content")
    _name(names, path, name, i)
    flags[name] = entry


def _end(config: dict[str, Any]) -> str | None:
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else None


def dummy_space_of(spec: dict[str, Any]) -> DummySpace:
    """Where a tokenizer.json puts the dummy space: by its normalizer (Prepend), or by its pre-tokenizer (Metaspace)."""
    if any(part.get("type") == "Prepend" for part in parts_of(spec.get("normalizer"))):
        return "each"
    for part in parts_of(spec.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            old = "always" if part.get("add_prefix_space", True) else "never"  # before tokenizers 0.15
            scheme = part.get("prepend_scheme", old)
            return scheme if scheme in ("always", "first") else "never"
    return "never"


def parts_of(step: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder of tokenizer.json, sequences opened."""
    if not isinstance(step, dict):
        return []
    inner = next((step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step), None)
    return [step] if inner is None else [part for each in inner for part in parts_of(each)]


def _vocab_size(whole: dict[str, Any] | None) -> int | None:
    """None where there is no vocabulary with ids, which is for its reader to judge."""
    model = (whole or {}).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not vocab or not all(type(i) is int for i in vocab.values()):
        return None
    return 1 + max(*vocab.values(), *(entry["id"] for entry in whole.get("added_tokens") or ()), -1)
