"""Which tokenizer lies in a folder."""

import json

from etils import epath

from phijax.errors import UserError
from phijax.text.bpe import JSON_FILE, BpeTokenizer
from phijax.text.tokenizer import MODEL_FILE, TextTokenizer, Tokenizer


def open_tokenizer(path: str | epath.PathLike) -> TextTokenizer:
    """The tokenizer in a folder: tokenizer.model where there is one, else tokenizer.json; or one such file.

    Raises UserError when there is none or it cannot be read.
    """
    path = epath.Path(path)
    folder = path.is_dir()
    if folder and not (path / MODEL_FILE).exists() and (path / JSON_FILE).exists():
        return _open_json(path / JSON_FILE)
    if not folder and path.name.endswith(".json") and path.exists():
        return _open_json(path)
    if folder and not (path / MODEL_FILE).exists():
        raise UserError(f"No tokenizer in {path}: it has neither {MODEL_FILE} nor {JSON_FILE}.")
    return Tokenizer.open(path)


def _open_json(path: epath.Path) -> BpeTokenizer:
    config = path.parent / "tokenizer_config.json"
    end = json.loads(config.read_text()).get("eos_token") if config.exists() else None
    end = end.get("content") if isinstance(end, dict) else end
    spec = path.read_text()
    return BpeTokenizer(spec, str(path), end_of_text=end)
