"""Which special tokens a folder names: Hugging Face's files, in the order in which they overrule each other, and ours.

added_tokens.json, then tokenizer_config.json (added_tokens_decoder), then tokenizer.json (added_tokens): the last one
that speaks of an id decides its name and flags.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from etils import epath

from phijax.errors import UserError
from phijax.storage import strict_json
from phijax.storage.strict_json import Fields, shown
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
    added, config = _fields(folder / ADDED_TOKENS_FILE), _fields(folder / CONFIG_FILE)
    whole, ours = _fields(folder / JSON_FILE), _fields(folder / OURS_FILE)
    if whole is not None:
        check_spec(whole.values, whole.file)
    if added is None and config is None and whole is None:
        return None
    names, flags = _added(added) if added is not None else {}, {}
    for i, entry in [*_decoder(config), *((entry.integer("id"), entry) for entry in _tokens(whole))]:
        names[i] = _content(entry)
        flags[names[i]] = {flag: entry.boolean(flag, False) for flag in _FLAGS}
    end = _token(config, "eos_token")
    control = _named(config) | _named(_fields(folder / MAP_FILE)) | {end}
    # added_tokens.json alone has no flags: in a folder of ours all are control tokens, elsewhere none.
    unflagged: dict[str, Any] = {"special": config is None and whole is None}
    symbols = frozenset(
        name for name in names.values() if is_symbol(name, flags.get(name, unflagged)) and name not in control
    )
    right, left = _flagged(flags, "rstrip"), _flagged(flags, "lstrip")
    words, normalized = _flagged(flags, "single_word"), _flagged(flags, "normalized") & symbols
    said = bool(flags) or config is not None
    # Without tokenizer.json each segment has one: so it is in phi-3's, although its `legacy` is false.
    dummy_space = dummy_space_of(whole.values) if whole else "each"
    if ours is not None:
        right, said = frozenset(ours.texts("strips_right", [])), True
        left = frozenset(ours.texts("strips_left", []))
        symbols, words, normalized = (frozenset(ours.texts(k, [])) for k in ("symbols", "whole_words", "normalized"))
        end, dummy_space = ours.text("end_of_text", end), ours.text("dummy_space", dummy_space)
        if dummy_space not in get_args(DummySpace):
            raise ours.refusal("dummy_space", f"one of {', '.join(get_args(DummySpace))}")
    right_said = right if said else None
    size = _vocab_size(whole.values if whole else None)
    return FolderTokens(names, right_said, left, end, dummy_space, size, symbols, words, normalized)


def _fields(path: epath.Path) -> Fields | None:
    return strict_json.read(path, LONGEST_FILE) if path.exists() else None


def _added(added: Fields) -> dict[int, str]:
    """Id -> name, of added_tokens.json."""
    names: dict[int, str] = {}
    for name in added.values:
        i = added.integer(name)
        if i in names:
            raise UserError(f"{added.file}: {shown(name)} and {shown(names[i])} have the same id {i}.")
        names[i] = name
    return names


def _decoder(config: Fields | None) -> Iterator[tuple[int, Fields]]:
    """Id and entry of each added token that tokenizer_config.json names."""
    decoder = config.object("added_tokens_decoder", None) if config is not None else None
    for i in decoder.values if decoder is not None else ():
        if not re.fullmatch("[0-9]{1,9}", i):
            raise UserError(f"{config.file}: added_tokens_decoder must be an object of ids, not {shown(i)}.")
        yield int(i), decoder.object(i)


def _tokens(whole: Fields | None) -> list[Fields]:
    return whole.objects("added_tokens", []) if whole is not None else []


def _content(token: Fields) -> str:
    if not (name := token.text("content")):
        raise token.refusal("content", "the token's text")
    return name


def is_symbol(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether an added token is found in plain text: flagged as not special, and not for control all the same."""
    return not entry.get("special") and not looks_like_control(name)


def _flagged(flags: Mapping[str, Mapping[str, Any]], flag: str) -> frozenset[str]:
    return frozenset(name for name, entry in flags.items() if entry[flag])


_FLAGS = ("special", "rstrip", "lstrip", "single_word", "normalized")
_KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def control_names(folder: epath.Path) -> frozenset[str]:
    """Tokens that a folder's settings name, as eos_token: transformers makes them special, whatever their flags."""
    return _named(_fields(folder / CONFIG_FILE)) | _named(_fields(folder / MAP_FILE))


def _named(settings: Fields | None) -> frozenset[str]:
    if settings is None:
        return frozenset()
    found = [_token(settings, kind) for kind in _KINDS]
    for kind in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.values.get(kind)  # a list, or an object whose names are ours to choose
        listed = more if isinstance(more, list) else list(settings.object(kind, Fields({}, "")).values.values())
        entries = Fields({f"{kind}[{i}]": entry for i, entry in enumerate(listed)}, settings.file)
        found += [_token(entries, name) for name in entries.values]
    return frozenset(name for name in found if name is not None)


def _token(settings: Fields | None, name: str) -> str | None:
    """A token that stands as text, or as an object with its flags; None where there is none."""
    if settings is None or not isinstance(settings.values.get(name), Mapping):
        return settings.text(name, None) if settings is not None else None
    return settings.object(name).text("content")


def read_object(path: epath.Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises: UserError for what is not one object of JSON."""
    return dict(strict_json.read(path, LONGEST_FILE).values) if path.exists() else None


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
