"""phijax: train the phi-3 family in JAX, and use any checkpoint of it."""

import importlib
import sys
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    Model = Any
    __version__: str

importlib.import_module("phijax.storage.local_paths").mend()


def load(
    path: Any,
    *,
    max_length: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    tensor: int = 1,
    long_rope: Literal["auto", "declared", "per_sequence"] = "auto",
    cache_dtype: Literal["auto", "int8"] = "auto",
    int8_activations: bool = True,
) -> "Model":
    """Opens a checkpoint (a run of ours, a Hugging Face folder, a GGUF file) for use.

    Args:
      max_length: declared length of prompt and answer together; None: the model's.
      dtype: of computation, and of weights that are not quantised; "auto": float32 on CPU, bfloat16 elsewhere.
      tensor: devices over which the weights are cut.
      long_rope: which LongRoPE list: one for all, by max_length, or transformers' rule; "auto": by max_length if given.
      cache_dtype: of keys and values; "auto": as dtype.
      int8_activations: on one CPU, what quantised weights are multiplied with is rounded to int8.
    Raises: phijax.errors.UserError for what is no checkpoint, or an option that means nothing.

    It is phijax.inference.model.load: nothing heavier than this function is imported before it is called.
    """
    if "jax" not in sys.modules:
        importlib.import_module("phijax.parallel.hardware").prepare_cpu()
    return importlib.import_module("phijax.inference.model").load(
        path,
        max_length=max_length,
        dtype=dtype,
        tensor=tensor,
        long_rope=long_rope,
        cache_dtype=cache_dtype,
        int8_activations=int8_activations,
    )


def __getattr__(name: str) -> Any:
    """`__version__`, looked up when it is asked for."""
    if name == "__version__":
        return importlib.import_module("phijax.distribution").version()
    raise AttributeError(f"module 'phijax' has no attribute {name!r}")
