"""How conversations are written for the models that answer them: as data, and from it the Jinja text for export."""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

_NAME = re.compile(r"<\|\w+\|>|<s>")

BOS = "{{ bos_token }}"  # in a template: the token that begins a text

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """What stands around each message. Names of special tokens in these texts stand for those tokens.

    before, behind: by role, the text before and behind a message's content. A role that is missing has no place in the
      format: its template drops such messages.
    reply: what asks for an answer, behind the last message.
    start: before everything. end: behind everything where no answer is asked for.
    default_system: put first where the conversation has no system message.
    end_of_turn: the token that an answer ends with; it begins behind["assistant"].
    stops: tokens at which generation ends; those that a tokenizer lacks do not count.
    """

    name: str
    before: Mapping[str, str]
    behind: Mapping[str, str]
    reply: str
    end_of_turn: str
    stops: tuple[str, ...]
    start: str = ""
    end: str = ""
    default_system: str | None = None

    def special_names(self) -> frozenset[str]:
        """The special tokens that the format is made of; <|endoftext|> and the like count if they are written."""
        texts = [self.start, self.reply, self.end, *self.before.values(), *self.behind.values()]
        return frozenset(name for text in texts for name in _NAME.findall(text))

    @functools.cached_property
    def template(self) -> str:
        """The same in Jinja, as transformers, vLLM and llama.cpp read it. What has no place is an error there too."""
        out = [_write(self.start)]
        if self.default_system is not None:
            system = self.before["system"] + self.default_system + self.behind["system"]
            out.append("{% if messages[0]['role'] != 'system' %}" + _write(system) + "{% endif %}")
        out.append("{% for message in messages %}")
        for number, (role, before) in enumerate(self.before.items()):
            content = " + ".join(filter(None, [_quote(before), "message['content']", _quote(self.behind[role])]))
            out.append(f"{{% {'elif' if number else 'if'} message['role'] == '{role}' %}}{{{{ {content} }}}}")
        out.append(
            "{% else %}{{ raise_exception('This format has no place for the role ' + message['role']) }}{% endif %}"
        )
        out.append("{% endfor %}")
        reply, end = _write(self.reply), _write(self.end)
        if reply and end:
            out.append(f"{{% if add_generation_prompt %}}{reply}{{% else %}}{end}{{% endif %}}")
        elif reply or end:
            out.append(f"{{% if {'' if reply else 'not '}add_generation_prompt %}}{reply or end}{{% endif %}}")
        return "".join(out)


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n").replace("'", "\\'")
    return f"'{escaped}'" if text else ""


def _write(text: str) -> str:
    return f"{{{{ {_quote(text)} }}}}" if text else ""


def _around(before: str, behind: str) -> dict[str, Mapping[str, str]]:
    """The same text around each role, whose name stands at ROLE."""
    return {
        "before": MappingProxyType({role: before.replace("ROLE", role) for role in ROLES}),
        "behind": MappingProxyType({role: behind for role in ROLES}),
    }


_PHI3_STOPS = ("<|end|>", "<|endoftext|>", "<|assistant|>")

# phi-3-mini since July 2024, phi-3.5-mini. Without a question the text ends, with <|endoftext|>.
PHI3 = ChatFormat(
    name="phi3",
    **_around("<|ROLE|>\n", "<|end|>\n"),
    reply="<|assistant|>\n",
    end="<|endoftext|>",
    end_of_turn="<|end|>",
    stops=_PHI3_STOPS,
)

# phi-3-medium: what asks for an answer belongs to the user's turn, and system messages have no place.
PHI3_OLD = ChatFormat(
    name="phi3_old",
    before=MappingProxyType({"user": "<|user|>\n", "assistant": ""}),
    behind=MappingProxyType({"user": "<|end|>\n<|assistant|>\n", "assistant": "<|end|>\n"}),
    reply="",
    end_of_turn="<|end|>",
    stops=_PHI3_STOPS,
)

# phi-3-mini of April 2024, which put <s> first; the model was not trained with it.
PHI3_APRIL = dataclasses.replace(PHI3_OLD, name="phi3_april", start="<s>")

# phi-4-mini: as phi-3, without newlines.
PHI4 = ChatFormat(
    name="phi4",
    **_around("<|ROLE|>", "<|end|>"),
    reply="<|assistant|>",
    end="<|endoftext|>",
    end_of_turn="<|end|>",
    stops=_PHI3_STOPS,
)

CHATML_PLAIN = ChatFormat(
    name="chatml_plain",
    **_around("<|im_start|>ROLE\n", "<|im_end|>\n"),
    reply="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    stops=("<|im_end|>", "<|endoftext|>"),
)

# SmolLM2-Instruct, which was trained with this system message wherever there was no other.
CHATML = dataclasses.replace(
    CHATML_PLAIN,
    name="chatml",
    default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)

FORMATS = (PHI3, PHI3_OLD, PHI3_APRIL, PHI4, CHATML, CHATML_PLAIN)


def stops_by_names(names: Collection[str]) -> tuple[str, ...]:
    """The tokens at which answers end in every format that these names of special tokens can write."""
    found = (stop for form in FORMATS if form.special_names() <= set(names) for stop in form.stops if stop in names)
    return tuple(dict.fromkeys(found))
