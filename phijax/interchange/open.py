"""Opens any checkpoint, recognised by looking: a run of ours, a Hugging Face folder, a GGUF file."""

from etils import epath

from phijax.checkpoint.steps import CHECKPOINTS_FOLDER
from phijax.errors import UserError
from phijax.interchange.huggingface.safetensors import ADAPTER_FILES, INDEX_FILE, SINGLE_FILE
from phijax.interchange.huggingface.source import is_huggingface, open_huggingface
from phijax.interchange.native.source import is_native, open_native
from phijax.interchange.opened import Opened
from phijax.storage.named import named
from phijax.storage.regular_files import begins_with


def open_checkpoint(path: epath.PathLike, *, verify: bool = True) -> Opened:
    """A checkpoint of whatever kind, checked as far as can be without reading its weights.

    Args: verify: of one of ours, read every byte against its digest; without, no process waits for another.
    Raises: UserError that names what was looked for; for what is damaged, hostile, or of an unknown architecture.
    """
    path = epath.Path(named(path))
    if not path.exists():
        hub = not path.is_absolute() and len(path.parts) == 2
        raise UserError(
            f"No checkpoint at {path}: it does not exist."
            + (" phijax downloads nothing: give a folder that you have." if hub else "")
        )
    if not path.is_dir():
        if path.suffix == ".gguf" or begins_with(path, b"GGUF"):  # a blob of Ollama's has no suffix
            from phijax.interchange.gguf.open import open_gguf  # the format's package is an extra

            return open_gguf(path)
        near = " Give the folder that it is in." if path.suffix in (".safetensors", ".json", ".bin") else ""
        raise UserError(f"{path} is no checkpoint.{near} {LOOKED_FOR}")
    if is_native(path):
        _refuse_other_kind(path)
        return open_native(path, verify=verify)
    if is_huggingface(path):
        return open_huggingface(path)
    files = [file for file in path.iterdir() if file.suffix == ".gguf"]
    if len(files) == 1:  # what `phijax export --format=gguf` writes
        return open_checkpoint(files[0])
    if files:
        raise UserError(f"{path} has {len(files)} GGUF files. Give the one you mean: {min(files, key=str)}, say.")
    if any((path / name).exists() for name in ADAPTER_FILES):
        raise UserError(f"{path} is an adapter, not a model. Merge it into its model (merge_and_unload of peft) first.")
    raise UserError(f"{path} is no checkpoint: it has {_listing(path)}.\n{LOOKED_FOR}")


def _refuse_other_kind(path: epath.Path) -> None:
    """A workdir has a config.json too, but no safetensors of its own."""
    for name in (SINGLE_FILE, INDEX_FILE):
        if (path / name).exists():
            what = f"a {CHECKPOINTS_FOLDER}/ of a run" if (path / CHECKPOINTS_FOLDER).exists() else "a step of a run"
            raise UserError(f"{path} is two checkpoints: {what}, and {name}. Move one of them out of the folder.")


LOOKED_FOR = (
    "A checkpoint is: the workdir of a run (checkpoints/), the folder of one of its steps (manifest.json and state/), "
    "a Hugging Face folder (config.json and *.safetensors), or a GGUF file, or a folder with one."
)


def _listing(folder: epath.Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) if names else "no files"
