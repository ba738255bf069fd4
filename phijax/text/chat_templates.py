"""Renders a checkpoint's chat template, a program by a stranger: in Jinja's sandbox, with bounds of our own."""

from collections.abc import Mapping, Sequence
from typing import Any

from phijax.distribution import install_hint
from phijax.errors import UserError

LONGEST_TEMPLATE = 1 << 16  # characters; published ones have up to 10,000
_LONGEST_RESULT = 1 << 16
# What published templates use. Others can make a short template write gigabytes.
_FILTERS = ("default", "first", "items", "join", "last", "length", "list", "lower", "map", "reject", "rejectattr")
_FILTERS += ("select", "selectattr", "string", "tojson", "trim", "upper")


class Refused(Exception):
    """The template raised an error of its own, refused the conversation, or cannot be rendered here."""


def render_template(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    generation_prompt: bool,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> str:
    """The text that transformers' apply_chat_template would make.

    Raises Refused where the template does not render, UserError where the package jinja2 is missing.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise Refused(f"the template has {len(template)} characters; read are {LONGEST_TEMPLATE}")
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise UserError(
            "The checkpoint's chat template can be compared with the known formats only by rendering it, which needs "
            f"jinja2: {install_hint('tokenizers')}."
        ) from error

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%" and isinstance(left, int) and isinstance(right, int) and right:
                return left % right  # whose turn it is
            raise Refused(f"the template computes with {operator}")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    environment.globals = {"namespace": environment.globals["namespace"], "raise_exception": _refuse}
    out, length = [], 0
    try:
        variables = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        stream = environment.from_string(template).generate(
            messages=[dict(message) for message in messages], add_generation_prompt=generation_prompt, **variables
        )
        for part in stream:
            length += len(part)
            if length > _LONGEST_RESULT:
                raise Refused("the template writes without end")
            out.append(part)
    except Refused:
        raise
    except Exception as error:  # whatever a stranger's program may raise
        raise Refused(f"the template cannot be rendered: {error}") from error
    return "".join(out)


def _refuse(message: str) -> None:
    raise Refused(message)
