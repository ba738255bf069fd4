"""Conversations -> token ids, and which of them the model itself wrote."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from phijax.errors import UserError, nearest_name
from phijax.text.chat_formats import (
    BOS,
    CHATML,
    CHATML_PLAIN,
    FORMATS,
    PHI3,
    PHI3_APRIL,
    PHI3_OLD,
    PHI4,
    ROLES,
    ChatFormat,
)
from phijax.text.chat_templates import Refused, render_template
from phijax.text.decoding import decode_bytes
from phijax.text.specials import WHITE_SPACE
from phijax.text.tokenizer import TextTokenizer

__all__ = [
    "CHATML",
    "CHATML_PLAIN",
    "FORMATS",
    "PHI3",
    "PHI3_APRIL",
    "PHI3_OLD",
    "PHI4",
    "ROLES",
    "ChatFormat",
    "Encoded",
    "encode_chat",
    "recognise",
    "render_chat",
    "stop_ids",
]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    tokens: the ids.
    spans: (first, behind the last) position of what the model itself wrote, one for each message of the assistant: its
      content and the token that ends its turn. Headers and newlines around it are not its own.
    notes: what was changed on the way, to be told to the user.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Part:
    """Text of the format or content of a message; only in the format's text are names special tokens."""

    text: str
    special: bool
    answer: bool


def encode_chat(
    messages: Sequence[Mapping[str, str]],
    tokenizer: TextTokenizer,
    format: ChatFormat,
    *,
    generation_prompt: bool,
    control_strings: Literal["escape", "refuse"] = "escape",
    system: Literal["refuse", "fold"] = "refuse",
) -> Encoded:
    """Tokens of a conversation, as Hugging Face's tokenizer makes them from the rendered template.

    One difference, on purpose: names of special tokens inside a message's content, as "<|end|>" in a user's text, never
    become those tokens. Nobody can end his turn, or begin another's, by what he writes.

    Args:
      messages: {"role": "system" | "user" | "assistant", "content": text}: perhaps a system message, then user and
        assistant by turns, the user first.
      generation_prompt: whether an answer is asked for; the last message is then the user's.
      control_strings: "escape": names of special tokens inside contents are encoded as the text that they are;
        "refuse": they are an error.
      system: what to do with a system message where the format has no place for it and its template would drop it
        without a word. "refuse": an error; "fold": it is put before the first user message, and `notes` says so.
    Raises UserError for a conversation that is none, and for a tokenizer without the format's special tokens.
    """
    _check_tokens(tokenizer, format)
    messages = _checked(messages, format, generation_prompt)
    if control_strings == "refuse":
        _refuse_control_strings(messages, tokenizer)
    messages, notes = _place_system(messages, format, system)
    tokens, spans = _encode(_parts(messages, format, generation_prompt), tokenizer)
    return Encoded(tokens, spans, notes)


def render_chat(
    messages: Sequence[Mapping[str, str]],
    format: ChatFormat,
    *,
    generation_prompt: bool,
    system: Literal["refuse", "fold"] = "refuse",
) -> str:
    """The conversation as text, as the format's template renders it. To look at: only `encode_chat` is safe to encode.

    Raises UserError for a conversation that is none.
    """
    messages, _ = _place_system(_checked(messages, format, generation_prompt), format, system)
    return "".join(part.text for part in _parts(messages, format, generation_prompt))


def stop_ids(tokenizer: TextTokenizer, format: ChatFormat) -> tuple[int, ...]:
    """The ids at which an answer ends."""
    return tuple(tokenizer.specials.ids[name] for name in format.stops if name in tokenizer.specials.ids)


def recognise(
    template: str | None, tokenizer: TextTokenizer, bos: int | None = None, where: str = "the checkpoint"
) -> ChatFormat | None:
    """Which of FORMATS a checkpoint's template is: the one that renders every probe conversation to the same text.

    Where a template also puts `bos` first, that token is the format's `start`.

    Args:
      bos: the checkpoint's; None: <s>, where the tokenizer has it.
      where: the checkpoint's path, for messages.
    None where there is no template, or where it differs from all of them anywhere: then say so and do not guess.
    Raises UserError where the package jinja2 is missing and the template is none of ours, and for a template that takes
    more time or memory than any needs.
    """
    if template is None:
        return None
    names = tokenizer.specials.names
    begin = names.get(bos, "<s>" if "<s>" in tokenizer.specials.ids else None)
    beginning = {f.name: dataclasses.replace(f, start=begin) for f in FORMATS if begin and not f.start}
    for format in FORMATS:
        if template == format.template:
            return format
        if template == BOS + format.template and not (begin and format.start):
            return beginning.get(format.name, format)  # nothing is put first where there is no such token
    able = [f for f in (*FORMATS, *beginning.values()) if f.special_names() <= set(tokenizer.specials.ids)]
    if not able:
        return None
    end = names[tokenizer.end_of_text]
    theirs = render_template(template, _PROBES, where=where, bos_token=begin, eos_token=end)
    return next((f for f in able if all(map(functools.partial(_writes, f), _PROBES, theirs))), None)


# Whitespace around and inside, characters of many kinds, several turns; a question last, and an answer last.
_ASK, _ANSWER = {"role": "user", "content": " 1 < 2?\n\n é "}, {"role": "assistant", "content": "\n yes \n"}
_SYSTEM, _AGAIN = {"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "'{{ a }}' \\n"}
_CONVERSATIONS = ([_ASK], [_ASK, _ANSWER, _AGAIN], [_ASK, _ANSWER], [_ASK, _ANSWER, _AGAIN, _ANSWER])
_PROBES = [
    (messages, generation_prompt)
    for start in ([], [_SYSTEM])
    for messages in ([*start, *conversation] for conversation in _CONVERSATIONS)
    for generation_prompt in (False, True)
    if not (generation_prompt and messages[-1]["role"] == "assistant")
]


def _writes(format: ChatFormat, probe: tuple[list[dict[str, str]], bool], theirs: str | Refused) -> bool:
    """Whether the format writes what a template did.

    A format without place for a system message is told by templates that drop it, and by those that refuse it.
    """
    messages, prompt = probe
    if messages[0]["role"] == "system" and "system" not in format.before:
        return isinstance(theirs, Refused) or theirs == render_chat(messages[1:], format, generation_prompt=prompt)
    return theirs == render_chat(messages, format, generation_prompt=prompt)


def _check_tokens(tokenizer: TextTokenizer, format: ChatFormat) -> None:
    for name in sorted(format.special_names()):
        if name not in tokenizer.specials.ids:
            known = ", ".join(tokenizer.specials.ids) or "none"
            raise UserError(
                f"The chat format {format.name} needs the token {name}, which the tokenizer lacks: {known}."
            )


def _checked(messages: Any, format: ChatFormat, generation_prompt: bool) -> list[tuple[str, str]]:
    """(role, content) of each message."""
    out: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role, content = _fields(message, where)
        if role not in ROLES:
            near = nearest_name(role, ROLES)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UserError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}.{hint}")
        if role == "system" and number > 0:
            raise UserError(f"{where} is a system message; only the first message can be one.")
        if role == "system" and not content.strip():
            raise UserError(f"{where} is an empty system message. Leave it out.")
        if role == "assistant" and (not out or out[-1][0] != "user"):
            raise UserError(f"{where} is the assistant's, but there is no user message before it to be answered.")
        if role == "user" and out and out[-1][0] == "user":
            raise UserError(
                f"{where} is the user's, and so is the message before it. Join the two, or put an answer between."
            )
        out.append((role, content))
    if not any(role == "user" for role, _ in out):
        raise UserError("A conversation needs at least one user message." if out else "The conversation is empty.")
    if generation_prompt and out[-1][0] == "assistant":
        raise UserError("The conversation ends with an answer: there is nothing to answer. Add a user message.")
    return out


def _fields(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, Mapping) or set(message) - {"role", "content"}:
        raise UserError(f'{where} must have "role" and "content" and nothing else, but is {str(message)[:200]}.')
    for field in ("role", "content"):
        if not isinstance(message.get(field), str):
            raise UserError(f"{where}: {field!r} must be text, but is {str(message.get(field))[:200]}.")
    return message["role"], message["content"]


def _refuse_control_strings(messages: list[tuple[str, str]], tokenizer: TextTokenizer) -> None:
    for number, (role, content) in enumerate(messages):
        if name := tokenizer.specials.find(content):
            raise UserError(f"messages[{number}] ({role}) holds {name}, the name of a control token. Remove it.")


def _place_system(
    messages: list[tuple[str, str]], format: ChatFormat, system: str
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    if messages[0][0] != "system":
        if format.default_system is not None:
            messages = [("system", format.default_system), *messages]
        return messages, ()
    if "system" in format.before:
        return messages, ()
    if system == "refuse":
        raise UserError(
            f"The chat format {format.name} has no place for a system message: its template would drop it.\n"
            "Put it into the first user message, or ask for that with system='fold'."
        )
    (_, text), (_, first), *others = messages
    note = f"the format {format.name} has no place for a system message: it was put before the first user message"
    return [("user", f"{text}\n\n{first}"), *others], (note,)


def _parts(messages: list[tuple[str, str]], format: ChatFormat, generation_prompt: bool) -> list[_Part]:
    parts = [_Part(format.start, True, False)]
    for role, content in messages:
        answer = role == "assistant"
        behind = format.behind[role]
        end = len(format.end_of_turn) if answer else 0
        parts += [
            _Part(format.before[role], True, False),
            _Part(content, False, answer),
            _Part(behind[:end], True, answer),
            _Part(behind[end:], True, False),
        ]
    return [*parts, _Part(format.reply if generation_prompt else format.end, True, False)]


def _encode(parts: list[_Part], tokenizer: TextTokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the parts and spans of the answers. Text between two special tokens is encoded in one piece."""
    specials = tokenizer.specials
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    segment: list[_Part] = []
    swallowing = False  # the token before swallows whitespace, and so far nothing else came
    for part in parts:
        for piece in specials.parts(part.text) if part.special else [part.text]:
            if isinstance(piece, str):
                text = piece.lstrip(WHITE_SPACE) if swallowing else piece
                swallowing = swallowing and not text
                segment += [dataclasses.replace(part, text=text)] if text else []
                continue
            name = specials.names[piece]
            if name in specials.strips_left:
                segment = _without_trailing_space(segment)
            start = _add_segment(tokens, segment, tokenizer)
            segment = []
            if part.answer:
                spans.append((len(tokens) if start is None else start, len(tokens) + 1))
            tokens.append(piece)
            swallowing = name in specials.strips_right
    _add_segment(tokens, segment, tokenizer)
    return tokens, spans


def _without_trailing_space(segment: list[_Part]) -> list[_Part]:
    out = list(segment)
    while out:
        last = out.pop()
        if text := last.text.rstrip(WHITE_SPACE):
            return [*out, dataclasses.replace(last, text=text)]
    return out


def _add_segment(tokens: list[int], segment: list[_Part], tokenizer: TextTokenizer) -> int | None:
    """Appends the segment's ids to `tokens`; the position of the first that holds nothing but answer, or None.

    An answer stands at a segment's end. A token that holds the header's last characters too is no token of the model's:
    when it answers, the header is there before.
    """
    text = "".join(part.text for part in segment)
    if not text:
        return None
    previous = tokens[-1] if tokens else None
    ids = tokenizer.encode_segment(text, first=previous is None)
    start = len(tokens)
    tokens += ids
    header = "".join(part.text for part in segment if not part.answer).encode()
    if not segment[-1].answer:
        return None
    if not header:
        return start
    written = 0
    for position, i in enumerate(ids):
        if written >= len(header):
            return start + position
        written += len(decode_bytes(tokenizer, [i], previous))
        previous = i
    return None
