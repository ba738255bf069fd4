"""How a model is computed on a backend: the one place where CPU, GPU and TPU part ways."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from phijax.errors import UserError
from phijax.model.config import ModelSection
from phijax.model.kernels.blocked import blocked_attention
from phijax.model.kernels.cudnn import cudnn_attention
from phijax.model.kernels.dense import dense_attention
from phijax.model.kernels.splash import splash_attention

ATTENTION: dict[str, Callable[..., jax.Array]] = {
    "dense": dense_attention,
    "blocked": blocked_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}


@dataclasses.dataclass(frozen=True)
class Backend:
    """Static choices of a compiled program. The defaults are the plainest: what tests compare with."""

    attention: str = "dense"
    scan_layers: bool = True
    rope_by_matmul: bool = False
    flat_tokens: bool = False  # projections see (B T, D)
    remat: str = "none"
    compute_dtype: str = "float32"
    mlp_products: str = "float"  # in training; "int8" rounds both factors
    int8_activations: bool = False  # what weights in few bits are multiplied with, where there is a kernel for it

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)


CHOICES = {
    # Unrolled layers are 1.2x faster than scanned ones on CPU and cost seconds of compilation; bfloat16 is no faster
    # there. Rows of queries in blocks: 1.2x of a step. Of (B, T, D) the gradient of a weight is a product behind two
    # transposed copies, of (B T, D) it is a product: 340 ms a layer of the 34M model against 456.
    "cpu": Backend("blocked", scan_layers=False, flat_tokens=True, remat="none", int8_activations=True),
    "tpu": Backend("splash", scan_layers=True, rope_by_matmul=True, remat="save_all", compute_dtype="bfloat16"),
    "gpu": Backend("cudnn", scan_layers=True, rope_by_matmul=False, remat="save_all", compute_dtype="bfloat16"),
}


_KERNEL_OF = {"splash": "tpu", "cudnn": "gpu"}


def choose_backend(section: ModelSection, platform: str, *, context: int = 1) -> Backend:
    """The platform's choices with what the user overrides in section `model`.

    Args:
      platform: of the mesh's devices ("cpu", "gpu", "cuda", "tpu"): not of this process, which may only compile.
      context: size of that mesh axis.
    Raises: UserError for an attention that the platform does not have, or not in this dtype.
    """
    kind = "gpu" if platform in ("cuda", "rocm") else platform
    choice = CHOICES[kind]
    if choice.attention in ("blocked", "cudnn") and context > 1:
        choice = dataclasses.replace(choice, attention="dense")  # their row blocks would cross chips
    asked = {
        "attention": section.attention,
        "remat": section.remat,
        "compute_dtype": section.compute_dtype,
        "mlp_products": section.mlp_products,
        "scan_layers": "auto" if section.layers == "auto" else section.layers == "scan",
    }
    choice = dataclasses.replace(choice, **{k: v for k, v in asked.items() if v != "auto"})
    if _KERNEL_OF.get(choice.attention, kind) != kind:
        raise UserError(
            f"model.attention={choice.attention} is a kernel of {_KERNEL_OF[choice.attention].upper()}s; these devices "
            f"are {kind}. Try --config.model.attention=auto"
        )
    if choice.attention == "cudnn" and choice.compute_dtype == "float32":
        raise UserError("model.attention=cudnn runs in bfloat16 only. Set model.attention=dense for float32.")
    return choice
