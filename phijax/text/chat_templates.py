"""Renders a checkpoint's chat template, a program by a stranger: in Jinja's sandbox, in a child with limits."""

import hashlib
from collections.abc import Mapping, Sequence

from phijax.distribution import install_hint
from phijax.errors import UserError
from phijax.storage.strict_json import told
from phijax.text import limited_child, limited_work
from phijax.text.limited_work import Refused

LONGEST_TEMPLATE = 1 << 16  # characters; published ones have up to 10,000
_SECONDS, _BYTES = 1, 256 << 20  # for all conversations together; one of 10,000 characters takes 0.05 s

# Published templates of which we know what they do, by sha256; they are rendered in this process.
KNOWN = frozenset(
    {
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2-Instruct
        "6b2fedcaff5489ce48d01fbbd17c7a46d4bf78001a5d05ec91d6067bf102e56f",  # phi-3-medium
        "605841622bcb6572225608f09ec2afcdfb9fb50844ef52715a12689f7b9278b1",  # the same, newlines written as they are
        "4552eefd92474b5259a00e369ebb5989535118101ca9ddeff68c11e879bbb9dd",  # phi-3-mini of April 2024
        "268b6082ceb7176dc6ed80557a2f7837f9f0339592fbee677d405a553af15f88",  # the same, newlines written as they are
    }
)


def render_template(
    template: str,
    conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]],
    *,
    where: str,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> list[str | Refused]:
    """The texts that transformers' apply_chat_template would make, Refused where it makes none.

    Args:
      conversations: each its messages, and whether an answer is asked for.
      where: what the template came with, for messages.
    Raises: UserError for a template that takes more time or memory than any needs, and where jinja2 is missing.
    """
    if len(template) > LONGEST_TEMPLATE:
        too_long = Refused(f"the template has {len(template)} characters; read are {LONGEST_TEMPLATE}")
        return [too_long for _ in conversations]
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UserError(
            "The checkpoint's chat template can be compared with the known formats only by rendering it, which needs "
            f"jinja2: {install_hint('tokenizers')}."
        ) from error
    variables = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
    arguments = {"template": template, "conversations": list(conversations), "variables": variables}
    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    if digest in KNOWN:
        answers = limited_work.render(**arguments)
    else:
        try:
            answers = limited_child.ask("render", seconds=_SECONDS, size=_BYTES, **arguments)
        except limited_child.Stopped as did:
            raise UserError(
                f"The chat template of {where} (sha256 {digest[:12]}) was stopped: {did}.\n"
                "No conversation needs that: do not trust the file. The model can continue text without it."
            ) from None
    return [answer["text"] if "text" in answer else Refused(told(answer["refused"])) for answer in answers]
