"""Which tokenizer lies in a folder."""

import json

from etils import epath

from phijax.errors import UserError
from phijax.storage import strict_json
from phijax.text.bpe import BpeTokenizer
from phijax.text.special_files import JSON_FILE, control_names, read_folder_tokens
from phijax.text.tokenizer import MODEL_FILE, TextTokenizer, Tokenizer
from phijax.text.tokenizer_bounds import LONGEST_FILE
from phijax.text.vocab_and_merges import has_vocab_and_merges, spec_of_folder


def open_tokenizer(path: str | epath.PathLike) -> TextTokenizer:
    """The tokenizer in a folder: tokenizer.model where there is one, else tokenizer.json, else GPT-2's two files.

    Or one of the first two files itself.

    Raises UserError when there is none or it cannot be read.
    """
    path = epath.Path(path)
    folder = path.is_dir()
    if folder and not (path / MODEL_FILE).exists() and (path / JSON_FILE).exists():
        return _open_json(path / JSON_FILE)
    if not folder and path.name.endswith(".json") and path.exists():
        return _open_json(path)
    if folder and not (path / MODEL_FILE).exists() and has_vocab_and_merges(path):
        said = read_folder_tokens(path)
        spec = json.dumps(spec_of_folder(path), ensure_ascii=False)
        return BpeTokenizer(spec, str(path), end_of_text=said.end if said else None, control=control_names(path))
    if folder and not (path / MODEL_FILE).exists():
        raise UserError(f"No tokenizer in {path}: it has neither {MODEL_FILE} nor {JSON_FILE}.")
    return Tokenizer.open(path)


def _open_json(path: epath.Path) -> BpeTokenizer:
    said = read_folder_tokens(path.parent)
    control = control_names(path.parent)
    spec = strict_json.read_text(path, LONGEST_FILE)
    return BpeTokenizer(spec, str(path), end_of_text=said.end if said else None, control=control)
