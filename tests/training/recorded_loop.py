"""The training loop, with everything that it talks to replaced by what writes down the order of events."""

import contextlib

import jax.numpy as jnp

from phijax.training.loop import Pace, train
from phijax.training.state import TrainState

PACE = Pace(total_steps=6, evaluate_every=2, save_every=3, max_skipped=3)


class Recorded:
    """report, checkpoints, gate, stop and watchdog in one; `events` is what happened, in order."""

    def __init__(self, stop_at: int | None = None, in_a_row: dict[int, int] | None = None, fail_in: str = ""):
        self.events: list[str] = []
        self.said: list[str] = []
        self.extras: dict[int, dict] = {}
        self._stop_at, self._in_a_row, self._fail_in = stop_at, in_a_row or {}, fail_in
        self._newest: tuple[int, dict] | None = None

    def _happened(self, event: str) -> None:
        self.events.append(event)
        if self._fail_in and event.startswith(self._fail_in):
            raise OSError(f"{event} failed")

    def batch_of(self, step, state):
        assert int(state.step) == step
        return f"batch {step}"

    def program_of(self, step):
        def program(state, batch):
            assert batch == f"batch {step}" and int(state.step) == step
            self._happened(f"step {step}")
            in_a_row = jnp.int32(self._in_a_row.get(step, 0))
            state = state.replace(step=state.step + 1, skipped_in_a_row=in_a_row)
            return state, {"loss": jnp.float32(step), "weight": 7, "skipped": 1, "skipped_in_a_row": in_a_row}

        return program

    def add(self, step, metrics):
        self._happened(f"add {step} {' '.join(metrics)}")
        if self._newest is not None and self._newest[0] == step:
            return None
        previous, self._newest = self._newest, (step, dict(metrics))
        return previous

    @contextlib.contextmanager
    def pause(self):
        self.events.append("pause")
        yield
        self.events.append("go on")

    def flush(self):
        self._happened("flush")

    def event(self, name, **fields):
        self._happened(f"event {name} {fields}")

    def say(self, text):
        self.said.append(text)

    def save(self, step, tree, extra=None):
        assert int(tree.step) == step  # the state after the step
        self.extras[step] = extra
        self._happened(f"save {step}")

    def before_step(self, step):
        self._happened(f"before step {step}")

    def before_save(self, step):
        self._happened(f"before save {step}")

    def poll(self):
        self._happened("poll")

    def wait(self):
        self.events.append("wait")

    def agreed(self, step):
        self._happened(f"agreed {step}")
        return step == self._stop_at

    def beat(self, step):
        self.events.append(f"beat {step}")

    def evaluator(self, params, frozen):
        assert (params, frozen) == ("params", "frozen")
        self._happened("evaluate")
        return {"heldout_loss": 1.0}


def run(recorded: Recorded, pace: Pace = PACE, first: int = 0, evaluators: int = 1, counted: str = "predicted_tokens"):
    zero = jnp.int32(0)
    state = TrainState(jnp.int32(first), "params", "frozen", "opt_state", zero, zero)
    return train(
        state,
        recorded.batch_of,
        recorded.program_of,
        pace,
        counted=counted,
        evaluators=[recorded.evaluator] * evaluators,
        report=recorded,
        checkpoints=recorded,
        gate=recorded,
        stop=recorded,
        watchdog=recorded,
    )
