"""How often jax traces or compiles while a block of a test runs."""

import contextlib
from collections.abc import Iterator

import jax

EVENTS = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The events, as they come."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **named) -> None:
        if event in EVENTS:
            seen.append(f"{event.rsplit('/', 1)[1]} {named}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
