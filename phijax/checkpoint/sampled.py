"""Whether two hosts have the same checkpoint, told in milliseconds: the weights themselves are read in places only."""

import hashlib

from etils import epath

from phijax.checkpoint import manifest, steps
from phijax.checkpoint.steps import CHECKPOINTS_FOLDER
from phijax.errors import UserError
from phijax.storage import durable

BLOCK_BYTES = 4096
BLOCKS = 16  # of each file, evenly spaced, its first and last bytes among them


def sampled_digest(path: epath.PathLike) -> str:
    """Twelve hex digits over what lies at `path`, a checkpoint of any kind; not over its name.

    Of our own kind the manifests, which hold a CRC of every byte; of others sizes and blocks of config and weights, of
    a bucket, which is the same for all hosts, names and sizes.
    Raises: UserError where there is nothing.
    """
    path, digest = epath.Path(path), hashlib.sha256()
    if not path.exists():
        raise UserError(f"No checkpoint at {path}: it does not exist.")
    for name, file in _deciding(path):
        size = file.stat().length
        digest.update(f"{name} {size}\n".encode())
        if durable.is_local(file):
            with file.open("rb") as opened:
                for number in range(BLOCKS):
                    opened.seek(max(0, size - BLOCK_BYTES) * number // (BLOCKS - 1))
                    digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()[:12]


def _deciding(path: epath.Path) -> list[tuple[str, epath.Path]]:
    """(name, file) of what decides the weights: of a file alone its name does not count."""
    if not path.is_dir():
        return [("", path)]
    if (path / manifest.MANIFEST_FILE).exists():
        return [("", path / manifest.MANIFEST_FILE)]
    if (path / CHECKPOINTS_FOLDER).exists():
        folder = path / CHECKPOINTS_FOLDER
        return [(str(step), folder / str(step) / manifest.MANIFEST_FILE) for step in steps.list_folders(folder).steps]
    files = [file for file in path.iterdir() if file.name == "config.json" or file.suffix in (".safetensors", ".gguf")]
    return sorted((file.name, file) for file in files)
