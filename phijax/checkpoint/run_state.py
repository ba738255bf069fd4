"""Saves and restores the state of a run: any pytree of arrays, from any mesh to any other, bit for bit.

Orbax writes and reads the arrays; which steps exist, whether they are whole and which are kept is decided here, by
our manifest (manifest.py), because a step is only what can be restored.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from phijax.checkpoint import going_back, host_memory, manifest, orbax_log, reading, steps, upkeep
from phijax.checkpoint.agreement import any_process, from_process_zero
from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.manifest import Leaves
from phijax.errors import RunFailure, UserError
from phijax.storage import durable

# Stacked weights are stored layer by layer and nothing in larger pieces, so that a reader need not decode a whole
# array for one layer: on one device it would be one piece, 3.2 GB for an MLP matrix of mini.
CHUNK_BYTES = 64 << 20


class SaveFailed(RunFailure):
    """A checkpoint could not be written. Steps saved before it are as they were."""


@dataclasses.dataclass
class _Saving:
    """A save under way. The thread fills `lines` and `error`; they are read after it has ended."""

    step: int
    started: float
    thread: threading.Thread | None = None
    lines: list[str] = dataclasses.field(default_factory=list)
    error: BaseException | None = None


class RunCheckpoints:
    """The checkpoints of one run, directory/<step>/, written by the run that holds `lock` and by no other.

    Constructor, `latest_verified`, `go_on_from`, `restore` and `save` are collective: all processes call them at the
    same points. `poll`, `wait`, `close` and `after_divergence` are not, so that one process can leave by an exception
    without waiting for another.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig,
        *,
        identity: dict,
        version: int,
        lock: WriterLock,
        log: Callable[[str], None],
    ):
        """Removes what dead saves left and names what is not ours.

        Args:
          directory: created if missing.
          identity: what the checkpoints belong to (model config, tokenizer hash, data fingerprint); JSON, stored in
            every manifest, compared by the caller.
          version: of the manifests' format, as manifest.write takes it.
          lock: held, for `directory` or a folder above it.
        Raises: UserError if `directory` cannot be written, or has a name that Orbax would take for another.
        """
        if not lock.held:
            raise ValueError("RunCheckpoints removes leftovers and needs a WriterLock that is held")
        self._directory = durable.absolute(directory)
        durable.check_name(self._directory, orbax=True)
        self._config = config
        self._identity = json.loads(json.dumps(identity))
        self._version = version
        self._lock = lock
        self._log = log
        self._saving: _Saving | None = None
        self._failure: SaveFailed | None = None
        self._memory_checked = False
        self._asked = False  # whether restore_step chose where to go on
        self._verified: set[int] = set()
        self._attempts = 0
        self.failed_saves = 0
        for line in from_process_zero(lambda: upkeep.tidy(self._directory)):
            self._log(line)

    def steps(self) -> list[int]:
        """Saved steps, ascending; not verified."""
        return steps.list_folders(self._directory).steps

    def latest_verified(
        self, total_steps: int | None = None, repeated: Callable[[], bool] = lambda: True
    ) -> int | None:
        """The newest good step whose every byte is as it was written; None if nothing was ever saved here.

        Or config.restore_step, if the run has not gone back to it yet. A newer step that is damaged is named in the
        log, file by file, and set aside so that it can be saved again.
        Args:
          total_steps: a step of this number ends the run: it is taken even if it is not good.
          repeated: whether the config is that of the start before; asked on process 0, of restore_step alone.
        Raises: UserError if there are steps but none is whole: a run must not start from scratch beside them; for
          restore_step as going_back.step_to_restore.
        """

        def choose():
            lines, wanted = [], self._config.restore_step
            if wanted is not None:
                step, lines = going_back.step_to_restore(self._directory, wanted, repeated())
                if step is not None:
                    return step, True, lines
            step, more = upkeep.newest_whole(self._directory, total_steps)
            return step, False, lines + more

        step, self._asked, lines = from_process_zero(choose)
        for line in lines:
            self._log(line)
        if step is not None:
            self._verified.add(step)
        return step

    def go_on_from(self, step: int, note: Callable[[dict], None]) -> None:
        """Sets aside what was saved after `step`, the answer of `latest_verified`.

        Args: note: called on process 0, if there is any, before it is moved: {"went_back_to", "set_aside", "asked"}.
        """
        asked = self._asked
        for line in from_process_zero(lambda: going_back.set_aside_later(self._directory, step, asked, note)):
            self._log(line)

    def after_divergence(self, last_good: int | None) -> tuple[int | None, bool]:
        """The saved step to go back to, and whether it is known to be good: see there. On process 0 alone."""
        step, known, lines = going_back.after_divergence(self._directory, last_good)
        for line in lines:
            self._log(line)
        return step, known

    def manifest(self, step: int) -> dict:
        """The manifest of a saved step, with `identity` and `extra`. Raises UserError if it cannot be read."""
        return reading.read_manifest(self._directory / str(step))

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step`, verified, in the structure and the shardings of `like`.

        Args:
          like: pytree of jax.ShapeDtypeStruct with shardings, on any mesh.
        Raises: UserError, before device memory is taken: the step is damaged (file named), or is of another model
          (first differences of paths, shapes and dtypes named).
        """
        folder = self._directory / str(step)
        if step not in self._verified:
            problems = from_process_zero(lambda: manifest.verify(folder))
            if problems:
                raise UserError(manifest.damage(folder, problems))
            self._verified.add(step)
        return reading.restore_arrays(folder, like)

    def check_host_memory(self, tree: Any) -> None:
        """Asked once, before the first save or earlier. Raises UserError if a save cannot fit in host memory.

        Args:
          tree: arrays, or jax.ShapeDtypeStruct with shardings.
        """
        error = None
        try:
            asynchronous, available = self._config.asynchronous, host_memory.available_bytes()
            warning = host_memory.check(tree, asynchronous=asynchronous, available=available)
            if warning:
                self._log(warning)
        except UserError as own:
            error = own
        if any_process(error is not None):
            raise error or UserError("A save of the run's state does not fit in the host memory of another process.")
        self._memory_checked = True

    def save(self, step: int, tree: Any, extra: dict | None = None, *, overwrite: bool = False) -> None:
        """Copies `tree` to the host and starts writing it; "saved" is said, by `poll` or `wait`, when it is durable.

        The caller may donate `tree` as soon as this returns. Waits for the save before it, if that still runs.
        Args:
          tree: pytree of jax.Array.
          extra: JSON, stored in the manifest (where the data stand, say).
          overwrite: replaces a step that is saved already. The old one is removed first: until the new one is
            written, only steps before it exist.
        Raises: UserError if `step` or a newer one is saved already, if host memory is too small, or if another run
          has taken the directory. SaveFailed if this save or the one before failed and the config says stop.
        """
        leaves = manifest.flatten(tree)
        _refuse_what_is_no_array(leaves)
        if not self._memory_checked:
            self.check_host_memory(tree)
        if not self._collect_previous():
            self._log(f"ERROR: step {step} is not saved: the save before it is still stuck")
            return
        try:
            for line in from_process_zero(lambda: upkeep.make_room(self._directory, self._lock, step, overwrite)):
                self._log(line)
            self._verified.discard(step)
            restored = {} if self._config.restore_step is None else {"restore_step": self._config.restore_step}
            self._start(step, leaves, json.loads(json.dumps({**(extra or {}), **restored})))
        except UserError:
            raise
        except Exception as error:
            self._fail(step, error, writing_ended=False)
            self._raise_if_stopping()
            return
        if not self._config.asynchronous:
            self._join()
            self._raise_if_stopping()

    def poll(self) -> None:
        """Once a step, never waits: reports a background save that has ended. Raises SaveFailed if config says stop."""
        if self._saving is not None and not self._saving.thread.is_alive():
            self._join()
        self._raise_if_stopping()

    def wait(self) -> None:
        """Waits for the save under way; call it in `finally`. Raises SaveFailed if that save, or the last, failed.

        Even where the config says continue: nothing comes after that could make up for it.
        """
        self._join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """The same as `wait`; the lock is its owner's to release."""
        self.wait()

    def _collect_previous(self) -> bool:
        """Reports the save before this one, alike on all processes. False if it still runs past its time limit."""
        self._join()
        failed, stuck = any_process(self._failure is not None), any_process(self._saving is not None)
        if failed and self._config.on_save_failure == "stop":
            raise self._failure or SaveFailed("The save before this one failed on another process; see its log.")
        return not stuck

    def _start(self, step: int, leaves: Leaves, extra: dict) -> None:
        # A new checkpointer for each save: its barriers carry the attempt in their names, so that a process that is
        # late for one save can never be taken for one that is early for the next.
        self._attempts += 1
        orbax_log.without_tracebacks()
        attempt = f"phijax_{step}_{self._attempts}"
        checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(
                save_device_host_concurrent_gb=None if self._config.asynchronous else host_memory.SYNCHRONOUS_LIMIT_GB
            ),
            timeout_secs=max(1, int(self._config.timeout_seconds)),
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=attempt),
        )
        folder = self._directory / str(step)
        saving = _Saving(step, time.monotonic())
        described = manifest.describe_leaves(leaves)

        def finish():
            try:
                checkpointer.close()  # waits until Orbax has committed, on all processes
                if jax.process_index() == 0:
                    manifest.write(
                        folder, step=step, leaves=described, identity=self._identity, extra=extra, version=self._version
                    )
                    steps.finish(folder)
                    saving.lines = upkeep.after_save(self._directory, self._config)
            except BaseException as error:
                saving.error = error
            # No process may think itself done, and leave, while process 0 still writes the manifest.
            self._meet(attempt, saving)

        checkpointer.save(
            folder / manifest.STATE_FOLDER, args=ocp.args.PyTreeSave(leaves, save_args=_in_chunks(leaves))
        )
        saving.thread = threading.Thread(target=finish, name=f"save of step {step}")
        saving.thread.start()
        self._saving = saving

    def _meet(self, attempt: str, saving: _Saving) -> None:
        try:
            barrier = ocp.multihost.get_barrier_sync_fn()
            barrier(key=f"{attempt}_manifest", timeout_ms=int(self._config.timeout_seconds * 1000))
        except Exception as error:
            saving.lines.append(f"WARNING: a process did not arrive after the save of step {saving.step}: {error}")

    def _join(self) -> None:
        """Waits for the save under way, within the time limit, and says how it ended."""
        saving = self._saving
        if saving is None:
            return
        # Orbax keeps the limit for the writing; as much again is for digests, manifest and old steps.
        limit = 2 * self._config.timeout_seconds
        saving.thread.join(timeout=max(0.0, saving.started + limit - time.monotonic()))
        if saving.thread.is_alive():
            error = TimeoutError(f"not finished after {limit:.0f} s; the file system of {self._directory} is stuck")
            self._fail(saving.step, error, writing_ended=False)
            return
        self._saving = None
        if saving.error is not None:
            self._fail(saving.step, saving.error, writing_ended=True)
            return
        self._failure = None
        self._verified.add(saving.step)
        self._log(f"saved step {saving.step} ({time.monotonic() - saving.started:.1f} s)")
        for line in saving.lines:
            self._log(line)

    def _fail(self, step: int, error: BaseException, *, writing_ended: bool) -> None:
        self.failed_saves += 1
        kept = []
        if jax.process_index() == 0:
            try:
                folder = self._directory / str(step)
                if writing_ended and not (folder / manifest.MANIFEST_FILE).exists():
                    steps.delete(folder)  # on a full disk its bytes are what the next save needs
                kept = self.steps()
            except OSError as also:
                self._log(f"WARNING: what the failed save left cannot be removed now: {also}")
        self._failure = SaveFailed(
            f"The save of step {step} to {self._directory} failed: {type(error).__name__}: {error}\n"
            f"Saved steps are untouched: {kept or 'none'}. Failed saves of this run: {self.failed_saves}."
        )
        self._failure.__cause__ = error
        self._log(f"ERROR: {self._failure}")

    def _raise_if_stopping(self) -> None:
        if self._failure is not None and self._config.on_save_failure == "stop":
            raise self._failure


def _in_chunks(leaves: Leaves) -> dict[str, ocp.SaveArgs]:
    return {
        path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())
        for path, leaf in leaves.items()
    }


def _refuse_what_is_no_array(leaves: Leaves) -> None:
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{path} is a {type(leaf).__name__}; a checkpoint holds jax.Arrays, numbers go to `extra`")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{path} is {leaf.dtype}; save jax.random.key_data of it")
