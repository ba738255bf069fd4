"""What is done with a stranger's files: templates rendered, tokenizers tried; as a script, in a child with limits.

The child (`limited_child.py` is its parent's side) reads a line of JSON and answers with one, until its input ends:
{"work": name, "arguments": {...}, "seconds": of processor time, "bytes": of memory beyond what it has} ->
{"answer": ...} or {"failed": what}. It starts in 0.1 s because nothing else of phijax is imported here.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OUT_OF_MEMORY = "memory"
LONGEST_RESULT = 1 << 16  # characters of a rendered conversation
# What published templates use. Others can make a short template write gigabytes.
_FILTERS = ("default", "first", "items", "join", "last", "length", "list", "lower", "map", "reject", "rejectattr")
_FILTERS += ("select", "selectattr", "string", "tojson", "trim", "upper")
_LOOK_FOR_PARENT = 5  # seconds


class Refused(Exception):
    """The template raised an error of its own, refused the conversation, or cannot be rendered here."""


def render(
    template: str, conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]], variables: Mapping[str, str]
) -> list[dict[str, str]]:
    """{"text": ...} or {"refused": why} for each conversation: its messages, and whether an answer is asked for."""
    try:
        compiled = _environment().from_string(template)
    except MemoryError:
        raise
    except Exception as error:
        return [{"refused": f"the template cannot be read: {error}"} for _ in conversations]
    return [_rendered(compiled, messages, prompt, variables) for messages, prompt in conversations]


def _rendered(
    compiled: Any, messages: Sequence[Mapping[str, str]], prompt: bool, variables: Mapping[str, str]
) -> dict[str, str]:
    out, length = [], 0
    try:
        given = [dict(message) for message in messages]
        for part in compiled.generate(messages=given, add_generation_prompt=prompt, **variables):
            length += len(part)
            if length > LONGEST_RESULT:
                raise Refused("the template writes without end")
            out.append(part)
    except MemoryError:
        raise  # it is told as what it is
    except Refused as why:
        return {"refused": str(why)}
    except Exception as error:  # whatever a stranger's program may raise
        return {"refused": f"the template cannot be rendered: {error}"}
    return {"text": "".join(out)}


def _environment() -> Any:
    import jinja2.sandbox

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%" and isinstance(left, int) and isinstance(right, int) and right:
                return left % right  # whose turn it is
            raise Refused(f"the template computes with {operator}")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    environment.globals = {"namespace": environment.globals["namespace"], "raise_exception": _refuse}
    return environment


def _refuse(message: str) -> None:
    raise Refused(message)


def try_tokenizer(spec: str, texts: Sequence[str]) -> dict[str, str]:
    """Reads a tokenizer.json and encodes texts. {"refused": why} for what the library refuses in an orderly way."""
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(spec)
    except MemoryError:
        raise
    except Exception as error:  # the package raises Exception itself
        return {"refused": str(error)}
    for text in texts:
        try:
            made.encode(text, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception:  # as for a character that it has no token for: that harms nobody
            continue
    return {}


_WORKS = {"render": (render, "jinja2.sandbox"), "try_tokenizer": (try_tokenizer, "tokenizers")}


def main() -> None:
    """Answers until the parent is gone or wants no more."""
    import resource

    # Libraries of the parent's may block or ignore it, which a child takes over, and then no time would be a limit.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group: the parent hears them and decides
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in _lines(0):
        request = json.loads(line)
        work, library = _WORKS[request["work"]]
        importlib.import_module(library)  # before the limits: its own size and time are not the stranger's doing
        _limit(request["seconds"], request["bytes"])
        try:
            answer = {"answer": work(**request["arguments"])}
        except MemoryError:
            answer = {"failed": OUT_OF_MEMORY}
        except BaseException as error:  # a panic of Rust's is no Exception
            answer = {"failed": str(error) or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _lines(descriptor: int) -> Iterator[bytes]:
    """Lines of a pipe. A parent that was killed may leave the pipe open in processes that it forked."""
    parent, left = os.getppid(), b""
    pieces: list[bytes] = []
    while True:
        while not select.select([descriptor], [], [], _LOOK_FOR_PARENT)[0]:
            if os.getppid() != parent:
                return
        piece = os.read(descriptor, 1 << 20)
        if not piece:
            return
        whole, newline, left = piece.partition(b"\n")  # the next request comes after this one's answer
        pieces.append(whole)
        if newline:
            yield b"".join(pieces)
            pieces = [left]


def _limit(seconds: float, size: int) -> None:
    """Limits from here on. Where a system knows no limit of memory, as macOS, the one of time remains."""
    import resource

    signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time; its signal ends the process
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(ValueError, OSError), open("/proc/self/statm") as file:
        soft = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + size
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
    sys.exit(0)
