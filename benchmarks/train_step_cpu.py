"""A train step here and in transformers on torch, interleaved in one run: python benchmarks/train_step_cpu.py

The 34M model: 8 layers, 512 wide, 8192 vocabulary, batch 8 x 512, float32, AdamW and clipping on both sides, the same
weights and batch. Prints both times a round, their ratio, and the losses, which must agree in the first steps.
"""

import statistics
import time

from absl import app, flags

from phijax.parallel import hardware

hardware.prepare_cpu()

import jax
import numpy as np

from phijax.model import params
from phijax.model.backend import CHOICES
from phijax.model.config import ModelConfig
from phijax.model.cross_entropy import LossConfig
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.training.optimizer import OptimizerConfig
from phijax.training.program import Recipe, initial_state, lower_train_step

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch_size", 8, "Rows a step.")
flags.DEFINE_integer("length", 512, "Tokens a row.")
flags.DEFINE_integer("rounds", 5, "Timed steps on each side.")
flags.DEFINE_integer("warm_up", 4, "Steps before: until malloc holds all that a step takes.")

MODEL = ModelConfig(
    vocab_size=8192,
    model_dim=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ffn_dim=1408,
    max_position=512,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.1)


def make_batch(batch_size: int, length: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    text = draw.integers(0, MODEL.vocab_size, (1, batch_size, length + 1)).astype(np.int32)
    return {
        "tokens": text[..., :-1],
        "targets": text[..., 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (1, batch_size, length)),
        "segment_ids": np.ones((1, batch_size, length), np.int32),
        "weights": np.ones((1, batch_size, length), np.float32),
    }


class Ours:
    def __init__(self, batch: dict[str, np.ndarray]):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        recipe = Recipe(MODEL, CHOICES["cpu"], OPTIMIZER, LossConfig(), total_steps=1000, seed=0)
        self.state = initial_state(recipe, mesh)
        self.start = jax.tree.map(np.asarray, self.state.params)
        self._program = lower_train_step(recipe, mesh, batch["tokens"].shape).compile()
        self._batch = jax.device_put(batch)

    def step(self) -> float:
        self.state, metrics = self._program(self.state, self._batch)
        return float(metrics["loss"])


class Theirs:
    def __init__(self, batch: dict[str, np.ndarray], start: dict):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        c = MODEL
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
            use_cache=False,
            attn_implementation="sdpa",
        )
        self._torch, self._model = torch, LlamaForCausalLM(config)
        self._copy(params.flat(start))
        matrices = [p for p in self._model.parameters() if p.ndim == 2]
        norms = [p for p in self._model.parameters() if p.ndim == 1]
        o = OPTIMIZER
        groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": norms, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, fused=True)
        self._tokens = torch.from_numpy(batch["tokens"][0].astype(np.int64))
        self._targets = torch.from_numpy(batch["targets"][0].astype(np.int64))

    def _copy(self, start: dict[str, np.ndarray]) -> None:
        names = {f"self_attn.{x}_proj": f"attention/{x}" for x in "qkvo"}
        names |= {f"mlp.{x}_proj": f"mlp/{x}" for x in ("gate", "up", "down")}
        state = self._model.state_dict()
        with self._torch.no_grad():
            state["model.embed_tokens.weight"].copy_(self._torch.from_numpy(start["embedding"].copy()))
            state["lm_head.weight"].copy_(self._torch.from_numpy(start["head"].copy()))
            for layer in range(MODEL.num_layers):
                for theirs, ours in names.items():
                    value = start[f"blocks/{ours}"][layer]
                    value = value.T if ours in ("attention/o", "mlp/down") else value
                    state[f"model.layers.{layer}.{theirs}.weight"].copy_(self._torch.from_numpy(value.copy()))

    def step(self) -> float:
        logits = self._model(input_ids=self._tokens).logits
        loss = self._torch.nn.functional.cross_entropy(logits.view(-1, MODEL.vocab_size), self._targets.view(-1))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip_norm)
        self._optimizer.step()
        return float(loss.detach())


def timed(side) -> tuple[float, float]:
    start = time.perf_counter()
    loss = side.step()
    return time.perf_counter() - start, loss


def main(_) -> None:
    batch = make_batch(FLAGS.batch_size, FLAGS.length)
    ours = Ours(batch)
    theirs = Theirs(batch, ours.start)
    del ours.start
    tokens = FLAGS.batch_size * FLAGS.length
    print(f"{params.count(MODEL):,} parameters, {FLAGS.batch_size} x {FLAGS.length} tokens a step, float32", flush=True)
    times: dict[str, list[float]] = {"phijax": [], "torch": []}
    for number in range(-FLAGS.warm_up, FLAGS.rounds):
        (a, loss_a), (b, loss_b) = timed(ours), timed(theirs)
        what = "warm-up" if number < 0 else f"round {number + 1}"
        print(
            f"{what}: phijax {a:6.2f} s, torch {b:6.2f} s, ratio {b / a:.2f}; losses {loss_a:.5f} {loss_b:.5f}",
            flush=True,
        )
        if number < 3 - FLAGS.warm_up:  # later, rounding has grown: this run learns one batch by heart
            assert abs(loss_a - loss_b) < 1e-3, "the two sides do not compute the same thing"
        if number >= 0:
            times["phijax"].append(a)
            times["torch"].append(b)
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name}: median {middle:.2f} s, fastest {min(values):.2f} s, {tokens / middle:,.0f} tokens/s")
    by_round = statistics.median(b / a for a, b in zip(times["phijax"], times["torch"], strict=True))
    middle = statistics.median(times["torch"]) / statistics.median(times["phijax"])
    fastest = min(times["torch"]) / min(times["phijax"])
    print(f"phijax is {by_round:.2f}x as fast by round, {middle:.2f}x by median, {fastest:.2f}x by the fastest round")


if __name__ == "__main__":
    app.run(main)
