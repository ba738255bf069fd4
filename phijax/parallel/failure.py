"""What fails in one process before the processes meet is heard by all, who would wait for it otherwise."""

import contextlib
import os
import traceback
from collections.abc import Iterator, Mapping

from phijax.errors import EXIT_CRASH, EXIT_USER_ERROR, UserError
from phijax.parallel import processes, rendezvous
from phijax.parallel.rendezvous import ProcessFailure


@contextlib.contextmanager
def told_to_all(
    coordinator_address: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    timeout: float = processes.ProcessConfig.initialization_timeout,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[None]:
    """Around what comes before `start`, whose arguments these are: the others wait for this process there.

    An exception inside is said at once, then told to all when they are here, and ends this process with its code; alone
    it goes on as it is.
    """
    try:
        yield
    except Exception as error:
        try:
            address, count, index, _ = processes._settings(
                coordinator_address, process_count, process_id, environment, timeout
            )
        except UserError:
            raise error from None
        if count == 1:
            raise
        user = isinstance(error, UserError)
        text, code = (str(error), EXIT_USER_ERROR) if user else (f"{type(error).__name__}: {error}", EXIT_CRASH)
        processes.to_stderr(
            f"error: process {index} of {count}: {text if user else traceback.format_exc()}\n"
            f"process {index} stays until the others have heard of it, {timeout:g} s at most"
        )
        with contextlib.suppress(UserError, ProcessFailure):
            rendezvous.gather(address, count, index, timeout, processes.to_stderr, rendezvous.Failed(text, code))
        raise SystemExit(code) from error
