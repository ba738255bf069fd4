"""The tokenizer that --tokenizer names: of a folder, of one of its files, of a GGUF file."""

from etils import epath

from phijax.storage.regular_files import begins_with
from phijax.text.open import open_tokenizer
from phijax.text.tokenizer import TextTokenizer


def open_given(path: epath.PathLike) -> TextTokenizer:
    """Raises: UserError where there is none, or it cannot be read."""
    from phijax.interchange.open import open_checkpoint  # it imports jax, which `prepare --help` does without

    path = epath.Path(path)
    if path.is_file() and (path.suffix == ".gguf" or begins_with(path, b"GGUF")):
        return open_checkpoint(path).tokenizer()
    if path.is_dir() and (files := [file for file in path.iterdir() if file.suffix == ".gguf"]):
        if not any((path / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
            return open_checkpoint(files[0] if len(files) == 1 else path).tokenizer()
    return open_tokenizer(path)
