"""Text <-> token ids with a merge table from tokenizer.json or GGUF, through the `tokenizers` package (an extra)."""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath

from phijax.distribution import install_hint
from phijax.errors import UserError
from phijax.storage import strict_json
from phijax.storage.strict_json import Fields, named, shown, told
from phijax.text import tokenizer_trial
from phijax.text.bpe_arrays import spec_of_arrays
from phijax.text.byte_level import bytes_of_token
from phijax.text.decoding import decode_text
from phijax.text.huggingface_files import name_of_special, write_names
from phijax.text.pre_tokenizers import cuts_of
from phijax.text.special_files import JSON_FILE, OURS_FILE, dummy_space_of, is_symbol, parts_of
from phijax.text.specials import SPACE_MARK, Specials
from phijax.text.tokenizer import TextTokenizer
from phijax.text.tokenizer_bounds import LONGEST_FILE, check_model, check_spec

# What ends a document, by the names that published vocabularies give to it; the first that a vocabulary has.
_END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")
# Keys of a model in tokenizer.json that decide ids, beside its vocabulary and merges.
_DECIDING = (
    "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges".split()
)


class BpeTokenizer:
    """A vocabulary with merges: byte-level (GPT-2, SmolLM2, Llama 3, phi-4) or Llama's with byte fallback. Immutable.

    Encoding then decoding gives the same text, byte for byte, unless the file has a normalizer that changes text.
    """

    def __init__(
        self,
        spec: str,
        where: str = "the tokenizer",
        *,
        end_of_text: str | None = None,
        control: Collection[str] = (),
    ):
        """Raises UserError, naming `where`, for what is no tokenizer of these kinds.

        Args:
          spec: the text of a tokenizer.json.
          end_of_text: the name of the token that ends every document, where the vocabulary has neither <|endoftext|>
            nor what other publishers call it. (A chat model's eos_token ends a turn.)
          control: names of added tokens that are special, whatever their flags say.
        """
        self._where = where
        parsed = _parse(spec, where)
        for token in parsed.get("added_tokens") or ():
            if token.get("content") in control:
                token["special"] = True
        self._spec = _canonical(parsed)
        self._byte_level = _is_byte_level(parsed, where)
        self._dummy_space = "never" if self._byte_level else dummy_space_of(parsed)
        self.specials, self.symbols = _added(parsed, where, end_of_text)
        self.strips_right: frozenset[str] = self.specials.strips_right
        self.added_tokens: Mapping[str, int] = MappingProxyType({**self.specials.ids, **self.symbols.ids})
        # Without its special tokens: their names in plain text are text.
        self._symbols = [token for token in parsed.get("added_tokens") or () if token["content"] in self.symbols.ids]
        self._plain = _load(parsed | {"added_tokens": self._symbols, "post_processor": None}, where)
        self._tokens: dict[int, str] = {i: token for token, i in parsed["model"]["vocab"].items()}
        self.vocab_size: int = 1 + max(*self._tokens, *self.added_tokens.values(), -1)
        self._renumbered = self._renumbering(where)
        self._end_of_text = next((name for name in _END_OF_TEXT_NAMES if name in self.specials.ids), end_of_text)
        if self._end_of_text not in self.specials.ids:
            raise UserError(
                f"{where} has no token {named(end_of_text or 'that ends a document')} among its special tokens: "
                f"{', '.join(map(named, self.specials.ids)) or 'it has none'}.\n"
                "Set eos_token in tokenizer_config.json beside it."
            )
        self.end_of_text: int = self.specials.ids[self._end_of_text]
        unknown = parsed["model"].get("unk_token")
        self.unknown: int | None = parsed["model"]["vocab"].get(unknown) if unknown else None
        found = json.dumps(sorted(self.symbols.ids)) if self.symbols.ids else ""
        self.fingerprint: str = hashlib.sha256((self._spec + found).encode()).hexdigest()

    @classmethod
    def from_gguf(
        cls,
        tokens: Sequence[str],
        merges: Sequence[str],
        types: Sequence[int],
        pre: str,
        where: str = "the GGUF file",
        *,
        end_of_text: str | None = None,
    ) -> "BpeTokenizer":
        """From the arrays of a GGUF file whose tokenizer.ggml.model is "gpt2".

        Args:
          tokens, merges, types, pre: as `bpe_arrays.spec_of_arrays` takes them.
          end_of_text: as for the class.
        Raises UserError where the arrays do not belong together or `pre` is a rule that is not known here.
        """
        return cls(spec_of_arrays(tokens, merges, types, pre, where), where, end_of_text=end_of_text)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: names of special tokens inside it are text as any other; nothing is put around it.

        Symbols are found in it. Raises ValueError for a lone surrogate, which is no text in UTF-8.
        """
        return self._encode(self._plain, text)

    def _encode(self, plain: Any, text: str) -> list[int]:
        _check_text(text)
        ids = self._ids(plain, text)
        if self._control_ids.isdisjoint(ids):
            return ids
        # Only where a whole word may be a token without merges: part each name, so that it is no word.
        runs = [""]
        for part in self.specials.parts(text):
            if isinstance(part, str):
                runs[-1] += part
            else:
                name = self.specials.names[part]
                runs[-1] += name[0]
                runs.append(name[1:])
        ids = [i for run in runs for i in self._ids(plain, run)]
        if not self._control_ids.isdisjoint(ids):
            raise ValueError(f"{self._where} makes a special token of plain text that does not name it: {text[:80]!r}")
        return ids

    def _ids(self, plain: Any, text: str) -> list[int]:
        ids = self._library_ids(plain, text)
        return [self._renumbered.get(i, i) for i in ids] if self._renumbered else ids

    def _library_ids(self, made: Any, text: str) -> list[int]:
        """Raises: UserError where the library fails over the text, as by a pattern that never comes to an end."""
        try:
            return made.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if (told := tokenizer_trial.failure(error, self._where, text)) is None:
                raise
            raise told from None

    def _renumbering(self, where: str) -> dict[int, int]:
        """Ids that the library gives to symbols where the special tokens before them are missing -> their own."""
        given = {self._plain.token_to_id(name): i for name, i in self.symbols.ids.items()}
        changed = {theirs: i for theirs, i in given.items() if theirs != i}
        if clash := [i for theirs, i in changed.items() if theirs in self._tokens]:
            raise UserError(
                f"{where}: the added token {shown(self.symbols.names[clash[0]])} cannot have the id {clash[0]}."
            )
        return changed

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of text in which names of special tokens stand for those tokens. Never give it text of strangers."""
        _check_text(text)
        return self._library_ids(self._full, text)

    def encode_segment(self, text: str, first: bool) -> list[int]:
        """Ids of the plain text between two special tokens; `first`: nothing is before it."""
        return self._encode(self._plain if first or self._dummy_space != "first" else self._inside, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens show as their names. Raises ValueError for an id that is no token."""
        return decode_text(self, ids)

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """What `id` adds to the text; `first`: without the dummy space. Raises ValueError for what is no token."""
        if id in self.symbols.names:
            space = b" " * (self._swallows_space(id) and not first)
            return space + self.symbols.names[id].encode()
        name = self.specials.names.get(id)
        if name is not None:
            return name.encode()
        token = self._tokens.get(id)
        if token is None:
            raise ValueError(f"token id {id} is not in the tokenizer, which has {self.vocab_size} ids")
        if self._byte_level:
            return bytes_of_token(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        text = token.replace(SPACE_MARK, " ").encode()
        return text[1:] if first and text[:1] == b" " else text

    def begins_behind(self, previous: int | None) -> bool:
        """Whether the id behind `previous` is the first of a segment, whose leading space is a dummy."""
        if self._dummy_space == "never":
            return False
        if previous is None or self._dummy_space == "first":
            return previous is None
        symbol = previous in self.symbols.names and not self._swallows_space(previous)
        return symbol or previous in self.specials.names

    def _swallows_space(self, id: int) -> bool:
        """Whether the space before a symbol, which may be the dummy, is part of it."""
        return self._dummy_space == "each" and self.symbols.names.get(id) in self.symbols.normalized

    def same_ids(self, other: TextTokenizer) -> bool:
        """Whether every text, chats too, is known to get the same ids."""
        if self.fingerprint == other.fingerprint:
            return True
        return isinstance(other, BpeTokenizer) and self._decides == other._decides

    def save(self, folder: str | epath.PathLike) -> None:
        """Writes tokenizer.json, and special_tokens.json where nothing in it tells what ends a text."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_FILE).write_text(self._spec)
        if self._end_of_text not in _END_OF_TEXT_NAMES:
            (folder / OURS_FILE).write_text(json.dumps({"end_of_text": self._end_of_text}) + "\n")

    def huggingface_json(self) -> dict[str, Any] | None:
        """The file that was opened, without what cuts a text short or draws lots."""
        return json.loads(self._spec)

    def save_huggingface(
        self, folder: str | epath.PathLike, *, chat_template: str | None = None, eos: int | None = None
    ) -> None:
        """Writes tokenizer.json and the names beside it, so that AutoTokenizer gives our ids.

        Args:
          chat_template: Jinja text that goes with it.
          eos: the id that generation stops at; None: that of the end of text.
        Raises UserError where `eos` is no special token.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_FILE).write_text(self._spec)
        eos_name = name_of_special(self.specials, self.end_of_text if eos is None else eos)
        names = {"eos_token": eos_name, "pad_token": self._end_of_text}
        write_names(folder, names, self.specials, self.symbols, chat_template)

    def __reduce__(self):
        return _rebuild, (self._spec, self._where, self._end_of_text, tokenizer_trial.survived())

    @functools.cached_property
    def _decides(self) -> dict[str, Any]:
        """What of tokenizer.json decides ids. The rest differs between publishers, versions of the file, and GGUF."""
        parsed = json.loads(self._spec)
        model, added, cuts = parsed["model"], parsed.get("added_tokens") or (), parsed.get("pre_tokenizer")
        names = {token["content"] for token in added}
        flags = ("id", "content", "single_word", "lstrip", "rstrip", "normalized")
        return {
            "vocab": {token: i for token, i in model["vocab"].items() if token not in names},
            "merges": [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]],
            "model": [model.get(key) or None for key in _DECIDING],
            "added": sorted([[token.get(flag) or False for flag in flags] for token in added]),
            "normalizer": parts_of(parsed.get("normalizer")),
            # Offsets are no ids.
            "cuts": cuts_of(cuts) or [{**part, "trim_offsets": None} for part in parts_of(cuts)],
        }

    @functools.cached_property
    def _full(self) -> Any:
        full = _load(json.loads(self._spec), self._where)
        for name, i in self.added_tokens.items():
            if full.token_to_id(name) != i:
                raise UserError(
                    f"{self._where}: the special token {shown(name)} has id {i}, but ids before it are missing."
                )
        return full

    @functools.cached_property
    def _inside(self) -> Any:
        """As `_plain`, for text that something stands before: without the dummy space."""
        spec = json.loads(self._spec)
        for part in parts_of(spec["pre_tokenizer"]):
            if part.get("type") == "Metaspace":
                part |= {"prepend_scheme": "never", "add_prefix_space": False}
        return _load(spec | {"added_tokens": self._symbols, "post_processor": None}, self._where)

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.specials.names)


def _rebuild(spec: str, where: str, end_of_text: str, survived: Collection[str]) -> BpeTokenizer:
    tokenizer_trial.remember(survived)
    return BpeTokenizer(spec, where, end_of_text=end_of_text)


def _canonical(parsed: dict[str, Any]) -> str:
    return json.dumps(parsed, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _check_text(text: str) -> None:
    if not text.isascii():
        text.encode()


def _parse(spec: str, where: str) -> dict[str, Any]:
    if len(spec) > LONGEST_FILE:
        raise UserError(f"{where} has {len(spec):,} characters; read are tokenizers of up to {LONGEST_FILE:,}.")
    parsed = dict(strict_json.parse(spec.encode(errors="surrogatepass"), where).values)
    model = parsed.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        kind = model.get("type") if isinstance(model, dict) else None
        raise UserError(
            f"{where} holds {f'a {kind} model' if kind else 'no model'}, not a vocabulary with merges (BPE).\n"
            "phi-3, phi-4, Llama and SmolLM2 come with one that has."
        )
    check_spec(parsed, where)
    check_model(model, where)
    # What cuts a text short, fills it up or draws lots (BPE-dropout) is of training: ids are those of the whole text.
    model |= {"dropout": None} if model.get("dropout") else {}
    return parsed | {"truncation": None, "padding": None}


def _is_byte_level(parsed: dict[str, Any], where: str) -> bool:
    kinds = {str(part.get("type")) for part in parts_of(parsed.get("decoder"))}
    if "ByteLevel" in kinds:
        return True
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return False
    raise UserError(
        f"{where} decodes with {', '.join(map(named, sorted(kinds))) or 'nothing'}: only byte-level vocabularies "
        "(ByteLevel) and "
        "Llama's kind (ByteFallback or Metaspace) can be read."
    )


def _added(parsed: dict[str, Any], where: str, end_of_text: str | None) -> tuple[Specials, Specials]:
    """Special tokens, and symbols."""
    ids: dict[str, int] = {}
    flagged: dict[str, set[str]] = {flag: set() for flag in ("rstrip", "lstrip", "single_word", "normalized")}
    symbols, taken = set(), set()
    for token in Fields(parsed, where).objects("added_tokens", []):
        name, i = token.text("content"), token.integer("id")
        if not name:
            raise token.refusal("content", "the token's text")
        if name in ids or i in taken:
            raise UserError(f"{where}: the added token {shown(name)} or its id {i} is there twice.")
        ids[name] = i
        taken.add(i)
        special = {"special": token.boolean("special", False)}
        symbols |= {name} if is_symbol(name, special) and name != end_of_text else set()
        for flag, names in flagged.items():
            names |= {name} if token.boolean(flag, False) else set()
    both = Specials(MappingProxyType(ids), *map(frozenset, flagged.values()))
    special, found = ({name: name for name in ids if (name in symbols) == which} for which in (False, True))
    return both.renamed(special), both.renamed(found)


def _load(spec: dict[str, Any], where: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"{where} needs the package tokenizers: {install_hint('tokenizers')}.\n"
            "phi-3 and Llama-2 do without it where a tokenizer.model lies in the folder."
        ) from error
    text = _canonical(spec)
    tokenizer_trial.require_harmless(text, spec, where)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"{where} is no tokenizer that the package tokenizers can read: {told(error)}") from error
