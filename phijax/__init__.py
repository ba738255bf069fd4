"""phijax: train the phi-3 family in JAX, and use any checkpoint of it."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Model = Any
    __version__: str

importlib.import_module("phijax.storage.local_paths").mend()


def load(path: Any, **options: Any) -> "Model":
    """Opens a checkpoint (a run of ours, a Hugging Face folder, a GGUF file) for use: phijax.inference.model.load.

    Nothing heavier than this function is imported before it is called, and no backend is started.
    """
    if "jax" not in sys.modules:
        importlib.import_module("phijax.parallel.hardware").prepare_cpu()
    return importlib.import_module("phijax.inference.model").load(path, **options)


def __getattr__(name: str) -> Any:
    """`__version__`, looked up when it is asked for."""
    if name == "__version__":
        return importlib.import_module("phijax.distribution").version()
    raise AttributeError(f"module 'phijax' has no attribute {name!r}")
