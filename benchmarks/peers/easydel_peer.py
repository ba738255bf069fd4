"""EasyDeL's logits: python easydel_peer.py FOLDER, in its own environment (see exchange.py for the folder).

Loaded as its README says, with what makes it most exact: float32 throughout, the highest precision, plain attention.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import easydel
import jax
import jax.numpy as jnp
import numpy as np
import torch
from ejkernel.types import MaskInfo
from exchange import Case, serve
from transformers import GenerationConfig


def load(folder: str):
    return easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        folder,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        torch_dtype=torch.float32,  # else it reads the weights as float16
        config_kwargs=easydel.EasyDeLBaseConfigDict(
            attn_mechanism=easydel.AttentionMechanisms.VANILLA,
            attn_dtype=jnp.float32,
            attn_softmax_dtype=jnp.float32,
            kvdtype=jnp.float32,
        ),
    )


def text(model, case: Case) -> np.ndarray:
    with model.mesh:
        return np.asarray(model(input_ids=jnp.asarray(case.ids())).logits[0])


def row(model, case: Case) -> np.ndarray:
    with model.mesh:
        mask = MaskInfo.from_segments(jnp.asarray(case.segments()))
        ids, positions = jnp.asarray(case.ids()), jnp.asarray(case.positions())
        return np.asarray(model(input_ids=ids, mask_info=mask, position_ids=positions).logits[0])


def decode(model, case: Case) -> np.ndarray:
    """Its own `generate`; a logits processor writes the logits down and puts the given token in the first place."""
    seen = []

    def note(_, logits, length):
        seen.append(np.asarray(logits[0]))
        return jax.nn.one_hot(jnp.full(1, case.tokens[int(length)]), logits.shape[-1])

    settings = GenerationConfig(max_length=len(case.tokens), do_sample=False, pad_token_id=-1, eos_token_id=None)
    with model.mesh:
        prompt = jnp.asarray(case.ids()[:, : case.start])
        processors = easydel.inference.logits_process.LogitsProcessorList([note])
        model.generate(prompt, generation_config=settings, logits_processor=processors, trace=False)
    return np.stack(seen)


serve(load, {"text": text, "row": row, "decode": decode})
