"""What travels with weights: tokenizer, chat template, the ids that begin and end a text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.interchange.opened import Opened
from phijax.storage import atomic, strict_json
from phijax.storage.regular_files import read_bounded
from phijax.text.beginning import read_beginning, write_beginning
from phijax.text.chat_formats import BOS, PHI3, stops_by_names
from phijax.text.huggingface_files import take_as_it_is
from phijax.text.open import open_tokenizer
from phijax.text.pieces import load_pieces
from phijax.text.special_files import JSON_FILE, read_folder_tokens
from phijax.text.tokenizer import ADDED_TOKENS_FILE, MODEL_FILE, TextTokenizer
from phijax.text.tokenizer_bounds import LONGEST_FILE

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_TEXTS = ("merges.txt", "chat_template.jinja")
# All files by which some tokenizer of transformers is described; copied as they are, whatever is in them.
FILES = (
    MODEL_FILE,
    ADDED_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    JSON_FILE,
    "special_tokens_map.json",
    "vocab.json",
    *_TEXTS,
    GENERATION_FILE,
    # Not of the tokenizer, but whoever passes weights on passes these on.
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)


@dataclasses.dataclass(frozen=True)
class Ids:
    """Token ids of a model; None where there is none."""

    bos: int | None
    eos: int | None
    pad: int | None
    stops: tuple[int, ...]

    def in_config(self) -> dict[str, int | None]:
        """For config.json. null where there is none: without the key transformers takes an id of another vocabulary."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}

    def in_generation_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """For generation_config.json, without nulls; empty if nothing is known. `settings`: the rest of it."""
        stops: int | list[int] | None = list(self.stops) if len(self.stops) > 1 else next(iter(self.stops), None)
        ids = {"bos_token_id": self.bos, "eos_token_id": stops, "pad_token_id": self.pad}
        known = {name: value for name, value in ids.items() if value is not None}
        return {**settings, **known} if settings else {"_from_model_config": True, **known} if known else {}


def ids_of(opened: Opened, tokenizer: TextTokenizer | None) -> Ids:
    """As the checkpoint says; of one of ours, as its tokenizer's names say."""
    bos, eos, pad = opened.facts.bos_id, opened.facts.eos_id, opened.facts.pad_id
    bos = opened.begin[0] if opened.begin else bos
    stops = opened.stop_ids
    if tokenizer is not None:
        eos = tokenizer.end_of_text if eos is None else eos
        names = tokenizer.specials.ids
        named = tuple(names[name] for name in stops_by_names(names))
        stops = stops or named or (eos,)
        pad = eos if pad is None else pad
        bos = tokenizer.specials.ids.get("<s>") if bos is None else bos  # named, as in phi-3; no text begins with it
    return Ids(bos, eos, pad, stops)


def has_huggingface_files(folder: epath.Path | None) -> bool:
    """Whether a tokenizer's folder is as transformers writes one, to be copied; ours holds two files alone."""
    return folder is not None and (folder / TOKENIZER_CONFIG_FILE).exists()


def check(opened: Opened) -> None:
    """Opens what would be copied, before anything is written. Raises: UserError naming the file that is damaged.

    A tokenizer of a kind that is not read here is none: others read it.
    """
    folder = opened.facts.tokenizer_folder
    if not has_huggingface_files(folder):
        return
    read_folder_tokens(folder)
    read_beginning(folder, opened.facts.bos_id)
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        if name.endswith(".json"):
            strict_json.read(path, LONGEST_FILE)
        elif name in _TEXTS:
            strict_json.read_text(path, LONGEST_FILE)
        else:
            data = read_bounded(path, LONGEST_FILE)
            if name == MODEL_FILE:
                load_pieces(data, str(path))
    if (folder / JSON_FILE).exists():
        strict_json.read(folder / JSON_FILE, LONGEST_FILE).object("model")


def copy(folder: epath.Path, output: epath.Path) -> list[str]:
    """Copies the tokenizer's files that there are, byte for byte; returns their names."""
    output.mkdir(parents=True, exist_ok=True)
    copied = [name for name in FILES if (folder / name).exists()]
    for name in copied:
        (output / name).write_bytes((folder / name).read_bytes())
    return copied


def open_or_none(opened: Opened, say: Callable[[str], None]) -> TextTokenizer | None:
    """The tokenizer, or None, said, where the checkpoint has none that can be read."""
    try:
        return opened.tokenizer()
    except UserError as error:
        say(f"warning: without a tokenizer: {error}")
        return None


@dataclasses.dataclass(frozen=True)
class Written:
    """tokenizer: what the files are of, or None. ours: whether tokenizer.json is as we say, not only copied."""

    ids: Ids
    tokenizer: TextTokenizer | None
    ours: bool


def write_huggingface(opened: Opened, output: epath.Path, say: Callable[[str], None]) -> Written:
    """Writes what AutoTokenizer reads and generation_config.json, by copying where the source has such files.

    tokenizer.json is always there and gives our ids, under the class that takes it as it is: transformers reads the
    files of other classes otherwise from version to version, and beside weights of another class.
    """
    folder = opened.facts.tokenizer_folder
    tokenizer, ours = open_or_none(opened, say), True
    if has_huggingface_files(folder):
        copied = copy(folder, output)
        say(f"copied {', '.join(copied)}")
        spec = None if tokenizer is None else tokenizer.huggingface_json()
        ours = spec is not None
        if changed := take_as_it_is(output, spec):
            say(f"{' and '.join(changed)}: changed, so that transformers takes tokenizer.json as it is")
        ids = ids_of(opened, None)
    else:
        ids = ids_of(opened, tokenizer)
        if tokenizer is not None:
            tokenizer.save_huggingface(output, chat_template=chat_template_of(opened, tokenizer), eos=ids.eos)
    if read_beginning(output, ids.bos) != opened.begin:
        write_beginning(output, opened.begin)
    generation = ids.in_generation_config(opened.facts.generation or {})
    if generation and not (output / GENERATION_FILE).exists():
        atomic.write_json(output / GENERATION_FILE, generation)
    return Written(ids, tokenizer, ours)


def chat_template_of(opened: Opened, tokenizer: TextTokenizer) -> str | None:
    """The checkpoint's own, else phi-3's for a tokenizer with its names, as every tokenizer trained here has them.

    Ours begins as texts do: a segment of training begins with that token, whatever stands in it.
    """
    if opened.chat_template or not PHI3.special_names() <= set(tokenizer.added_tokens):
        return opened.chat_template
    return (BOS if opened.begin else "") + PHI3.template


def write_native(opened: Opened, output: epath.Path, say: Callable[[str], None]) -> str | None:
    """The same for a checkpoint of ours: files of transformers as they are, else ours.

    Returns: the fingerprint of the tokenizer in `output`; None, said, where there is none that is read here.
    """
    folder = opened.facts.tokenizer_folder
    copied = copy(folder, output) if has_huggingface_files(folder) else []
    if not {MODEL_FILE, JSON_FILE}.intersection(copied):
        # Beside vocab.json and merges.txt too: config.json, which may alone say whose they are, stays behind.
        tokenizer = open_or_none(opened, say)
        if tokenizer is None:
            return None
        tokenizer.save(output)
    try:
        return open_tokenizer(output).fingerprint
    except UserError as error:
        say(f"warning: the tokenizer is copied unread: {error}")
        return None
