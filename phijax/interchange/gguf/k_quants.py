"""GGUF's K-quants, made by llama.cpp itself out of a file without loss: `llama_model_quantize`."""

import ctypes
import os
from collections.abc import Callable
from types import ModuleType

import jax.numpy as jnp
import numpy as np
from etils import epath

from phijax.distribution import install_hint
from phijax.errors import UserError
from phijax.interchange.gguf.write import output_path, write_gguf
from phijax.interchange.opened import Opened
from phijax.storage import signals, staging

KINDS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
_ERROR = 3  # ggml.h: GGML_LOG_LEVEL_ERROR


def write_k_quants(
    opened: Opened,
    output: epath.PathLike,
    *,
    kind: str,
    say: Callable[[str], None] = lambda line: None,
) -> epath.Path:
    """Writes `opened` as one GGUF file of `kind`, by way of a temporary one beside it that rounds nothing.

    Returns: the path, as `write_gguf`. Raises: UserError where llama.cpp is not installed, as `write_gguf`, and with
      llama.cpp's own words where it fails; nothing is left behind then.
    """
    library = _llama_cpp()
    if opened.weights.schemes:
        say(f"warning: {opened.path} is quantised already; {kind} rounds a second time")
    path = output_path(epath.Path(output), opened, kind, overwrite=False)
    exact = path.parent / f".{path.name}.exact-{os.getpid()}.gguf"
    with staging.staged_file(path) as temporary:
        try:
            with signals.tidied(lambda: exact.unlink(missing_ok=True)):
                write_gguf(opened, exact, kind=_without_loss(opened), keep_integers=False, say=say)
                _quantize(library, exact, temporary, kind)
        finally:
            exact.unlink(missing_ok=True)
    return path


def _llama_cpp() -> ModuleType:
    try:
        import llama_cpp
    except ImportError as error:
        raise UserError(
            f"K-quants are made by llama.cpp, which is not installed: {install_hint('llama')} builds it from source "
            "in 10 to 25 minutes. --kind=Q4_0 and Q8_0 do without."
        ) from error
    return llama_cpp


def _without_loss(opened: Opened) -> str:
    """The narrowest kind that holds every weight as it is."""
    kinds = {np.dtype(jnp.bfloat16): "BF16", np.dtype(np.float16): "F16"}
    found = {opened.weights.dtype(path) for path, shape in opened.weights.shapes().items() if shape[1:]}
    return kinds.get(found.pop(), "F32") if len(found) == 1 else "F32"


def _quantize(library: ModuleType, source: epath.Path, target: epath.Path, kind: str) -> None:
    said: list[str] = []

    @library.llama_log_callback
    def listen(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        if level == _ERROR:
            said.append(text.decode("utf-8", "replace").strip())

    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    library.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        failed = library.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings))
    finally:
        library.llama_log_set(library._logger.llama_log_callback, ctypes.c_void_p(0))
    if failed:
        raise UserError(f"llama.cpp could not make {kind} of it: {' '.join(said[-3:]) or 'it says no reason'}")
