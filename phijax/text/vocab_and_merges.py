"""vocab.json and merges.txt, GPT-2's own files, as the tokenizer.json that they stand for.

They say what is merged, not how text is cut before that: Qwen's, RoBERTa's and CLIP's files have the same names and
other rules. So they are read where the folder says that they are GPT-2's. transformers 5.24,
models/gpt2/tokenization_gpt2.py.
"""

from typing import Any

from etils import epath

from phijax.errors import UserError
from phijax.storage import strict_json
from phijax.storage.strict_json import named, shown
from phijax.text.special_files import CONFIG_FILE, control_names, read_folder_tokens
from phijax.text.tokenizer import END_OF_TEXT
from phijax.text.tokenizer_bounds import LONGEST_FILE

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
_MODEL_FILE = "config.json"
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


def has_vocab_and_merges(folder: epath.Path) -> bool:
    return (folder / VOCAB_FILE).exists() and (folder / MERGES_FILE).exists()


def spec_of_folder(folder: epath.Path) -> dict[str, Any]:
    """The tokenizer.json. Raises: UserError for files that are another class's, or cannot be read."""
    config = strict_json.read_if_there(folder / CONFIG_FILE)
    _check_class(folder, config.text("tokenizer_class", None))
    fields = strict_json.read(folder / VOCAB_FILE, LONGEST_FILE)
    vocab = {token: fields.integer(token) for token in fields.values}
    _refuse_shared_ids(vocab, fields.file)
    by_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": config.boolean("add_prefix_space", False),
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(folder, vocab),
        "normalizer": None,
        "pre_tokenizer": by_bytes,
        "post_processor": None,
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(folder / MERGES_FILE),
        },
    }


def _check_class(folder: epath.Path, tokenizer: str | None) -> None:
    model = strict_json.read_if_there(folder / _MODEL_FILE).text("model_type", None)
    if tokenizer in _CLASSES or (tokenizer is None and model == "gpt2"):
        return
    said = "nothing of their class"
    if tokenizer or model:
        said = f"tokenizer_class {named(tokenizer)}" if tokenizer else f"model_type {named(model)}"
    raise UserError(
        f"{folder}: {VOCAB_FILE} and {MERGES_FILE} do not say how text is cut, and the folder says {said}; they are "
        f"read as GPT-2's alone. Write a tokenizer.json: in Python, with transformers installed,\n"
        f"  AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _refuse_shared_ids(vocab: dict[str, int], file: str) -> None:
    names = {i: token for token, i in vocab.items()}
    for token, i in vocab.items():
        if names[i] != token:
            raise UserError(f"{file}: {shown(token)} and {shown(names[i])} have the same id {i}.")


def _merges(path: epath.Path) -> list[str]:
    lines = strict_json.read_text(path, LONGEST_FILE).split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    if wrong := next((merge for merge in merges if len(merge.split(" ")) != 2), None):
        raise UserError(f"{path}: {shown(wrong)} must be two tokens, with one space between them.")
    return merges


def _added(folder: epath.Path, vocab: dict[str, int]) -> list[dict[str, Any]]:
    """Tokens that the folder names; of the vocabulary's own, those that it calls eos and the like."""
    said, control = read_folder_tokens(folder), control_names(folder) | {END_OF_TEXT}
    names = {vocab[name]: name for name in control if name in vocab}
    names |= said.names if said else {}
    return [
        {
            "id": i,
            "content": name,
            "single_word": bool(said) and name in said.whole_words,
            "lstrip": bool(said) and name in said.strips_left,
            "rstrip": bool(said) and name in (said.strips_right or ()),
            "normalized": bool(said) and name in said.normalized,
            "special": not said or name not in said.symbols,
        }
        for i, name in sorted(names.items())
    ]
