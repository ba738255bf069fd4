"""Text from any checkpoint: python -m phijax.generate --checkpoint=ANY --prompt="Once upon"

--checkpoint is a run's workdir, a step of it, a Hugging Face folder or a GGUF file. What is said between text:
  --prompt=TEXT (may be given again: a batch), --prompt_file=FILE (.jsonl: a prompt a line, as a string)
  --chat                  a conversation; an empty line ends it, and /new begins another
  --chat --message=TEXT   one turn of it
"""

import json
import sys
from collections.abc import Iterator

from absl import flags

from phijax import command
from phijax.errors import EXIT_DONE, UserError
from phijax.parallel import hardware
from phijax.storage import strict_json
from phijax.storage.regular_files import read_stream

_LONGEST_PROMPTS = 1 << 28  # bytes of a file of prompts
FLAGS = flags.FlagValues()
command.define_path("checkpoint", "Workdir or step of a run, Hugging Face folder, GGUF file.", FLAGS)
flags.DEFINE_multi_string(
    "prompt", None, "Text to continue; none: the start of a document. Again for a batch.", flag_values=FLAGS
)
command.define_path("prompt_file", "A file that is a prompt; .jsonl: a prompt a line.", FLAGS)
flags.DEFINE_bool("chat", False, "Talk with the model.", flag_values=FLAGS)
flags.DEFINE_string("message", None, "With --chat: one message, one answer.", flag_values=FLAGS)
flags.DEFINE_string("system", None, "With --chat: the system message.", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 256, "At most this many tokens an answer; 0: none.", flag_values=FLAGS)
flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.", flag_values=FLAGS)
flags.DEFINE_integer("top_k", 0, "Only the k most likely tokens; 0: all.", flag_values=FLAGS)
flags.DEFINE_float(
    "top_p", 1.0, "Only the likeliest tokens that together reach this probability; 0: the likeliest.", flag_values=FLAGS
)
flags.DEFINE_float("min_p", 0.0, "Only tokens at least this times as likely as the likeliest.", flag_values=FLAGS)
flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens that occurred get less likely.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "stop", [], "Text that ends an answer and is not part of it. May be repeated.", flag_values=FLAGS
)
flags.DEFINE_bool("stream", True, "Print text as it comes (one prompt, no --json).", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "One JSON object an answer: prompt, text, tokens, logprobs, ...", flag_values=FLAGS)
flags.DEFINE_integer("tensor", 1, "Devices over which the weights are cut.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "auto: float32 on CPU, else bfloat16.", flag_values=FLAGS
)
flags.DEFINE_enum(
    "cache_dtype",
    "auto",
    ["auto", "int8"],
    "Of keys and values; auto: as --dtype. int8 is half of bfloat16, a quarter of float32.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "max_length", None, "Declared length of prompt and answer; none: the model's.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_enum(
    "long_rope",
    "auto",
    ["auto", "declared", "per_sequence"],
    "Which LongRoPE list: one for all, by --max_length; or transformers' rule. auto: by --max_length if it is given.",
    flag_values=FLAGS,
)


def main(arguments: list[str]) -> int:
    prompts = _check(arguments)
    hardware.prepare_cpu()
    from phijax.inference.model import load
    from phijax.inference.sampling import Sampling

    settings = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: FLAGS[name].value for name in settings}, stop=tuple(FLAGS.stop))
    model = load(
        FLAGS.checkpoint,
        max_length=FLAGS.max_length,
        dtype=FLAGS.dtype,
        tensor=FLAGS.tensor,
        long_rope=FLAGS.long_rope,
        cache_dtype=FLAGS.cache_dtype,
    )
    if FLAGS.chat:
        model.chat_format()
        _chat(model, sampling)
    elif FLAGS.json or len(prompts) > 1 or not FLAGS.stream:
        for prompt, result in zip(prompts, model.generate(prompts, sampling), strict=True):
            _print_result(prompt, result)
    else:
        pieces = model.stream(prompts[0], sampling)
        sys.stdout.write(prompts[0])
        _print_pieces(pieces)
    return EXIT_DONE


def _check(arguments: list[str]) -> list[str]:
    """The prompts, after everything was refused that can be before a model is opened."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    if not FLAGS.checkpoint:
        raise UserError("Which model? --checkpoint=WORKDIR, a Hugging Face folder or a GGUF file.")
    if FLAGS.chat and (FLAGS.prompt or FLAGS.prompt_file):
        raise UserError("--chat takes --message, not --prompt or --prompt_file.")
    for name in ("message", "system"):
        if FLAGS[name].value is not None and not FLAGS.chat:
            raise UserError(f"--{name} belongs to --chat.")
    if FLAGS.json and FLAGS.chat and FLAGS.message is None:
        raise UserError("--json with --chat needs --message: a conversation at the keyboard is not JSON.")
    prompts = list(FLAGS.prompt or [])
    if FLAGS.prompt_file:
        prompts += _read_prompts(FLAGS.prompt_file)
    for text in (*prompts, *FLAGS.stop, FLAGS.message or "", FLAGS.system or ""):
        _check_text(text)
    return prompts or [""]


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a command line in another encoding; half of a surrogate pair in JSON
        raise UserError(f"{text!r} is no text in UTF-8, at character {error.start}.") from error


def _read_prompts(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:  # a pipe is welcome here
            text = read_stream(file, f"--prompt_file={path}", _LONGEST_PROMPTS).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file={path}: {error}") from error
    if not path.endswith(".jsonl"):
        return [text]
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):  # strings of JSON may hold Unicode's other line ends
        if not line.strip():
            continue
        prompt = strict_json.parse_value(line.encode(), f"{path}:{number}")
        prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(prompt, str):
            raise UserError(f'{path}:{number}: a string, or an object with "prompt", is expected.')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"--prompt_file={path} holds no prompt.")
    return prompts


def _chat(model, sampling) -> None:
    start = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
    if FLAGS.message is not None:
        messages = [*start, {"role": "user", "content": FLAGS.message}]
        if FLAGS.json or not FLAGS.stream:
            _print_result(FLAGS.message, model.chat(messages, sampling))
        else:
            _print_pieces(model.stream_chat(messages, sampling))
        return
    messages = list(start)
    for line in _lines():
        if line == "/new":
            messages = list(start)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            _check_text(line)
            answer = _print_pieces(model.stream_chat(asked, sampling))
        except UserError as error:  # as a conversation that has become too long
            print(f"{error}\n/new begins another conversation.", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.rstrip("\n")


def _print_pieces(pieces) -> str:
    """Writes an answer while it grows; returns it."""
    text = ""
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        text += piece.text
    sys.stdout.write("\n")
    return text


def _print_result(prompt: str, result) -> None:
    if FLAGS.json:
        fields = ("text", "tokens", "logprobs", "finish_reason")
        # One write: a stop between two would cut the line off.
        sys.stdout.write(json.dumps({"prompt": prompt} | {name: getattr(result, name) for name in fields}) + "\n")
    else:
        print((result.text if FLAGS.chat else prompt + result.text) + "\n", end="")


if __name__ == "__main__":
    command.run(main, FLAGS)
