"""A checkpoint as an object: `model = phijax.load("path")`, for notebooks, scripts and the command `generate`."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, overload

import jax
import numpy as np
from etils import epath

from phijax.errors import UserError
from phijax.inference.generator import Generator, Piece
from phijax.inference.placement import matrix_format
from phijax.inference.prefix_cache import PrefixCache
from phijax.inference.sampling import Sampling
from phijax.inference.stopping import Result
from phijax.interchange.load import load_params
from phijax.interchange.open import open_checkpoint
from phijax.interchange.opened import Opened
from phijax.interchange.tokenizer_files import chat_template_of
from phijax.model.backend import choose_backend
from phijax.model.config import ModelSection
from phijax.model.params import Params, axes, shapes
from phijax.parallel import sharding
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.text import chat as chats
from phijax.text.tokenizer import TextTokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]


def load(
    path: epath.PathLike,
    *,
    max_length: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    tensor: int = 1,
    long_rope: Literal["auto", "declared", "per_sequence"] = "auto",
    cache_dtype: Literal["auto", "int8"] = "auto",
    int8_activations: bool = True,
) -> "Model":
    """Opens any checkpoint for use: a run's workdir or step, a Hugging Face folder, a GGUF file.

    Args:
      max_length, long_rope, cache_dtype: as inference.Generator takes them.
      dtype: of computation, and of weights that are not quantised; "auto": float32 on CPU, bfloat16 elsewhere.
      tensor: devices over which the weights are cut.
      int8_activations: on one CPU, what quantised weights are multiplied with is rounded to int8: many times as fast,
        for about 1 % of a product's deviation. False: the weights are computed as exactly as any.
    Raises: UserError for what is no checkpoint, or cannot be cut so; for an option that means nothing.
    """
    _check_options(max_length, dtype, tensor, long_rope, cache_dtype, int8_activations)
    opened = open_checkpoint(path)
    devices = jax.devices()
    if tensor > len(devices):
        raise UserError(f"tensor={tensor}: this machine has {len(devices)} devices.")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=1, tensor=tensor), devices[:tensor])
    for name, shape in shapes(opened.model).items():
        sharding.check_divides(name, shape, axes(opened.model)[name], mesh.shape)
    platform = devices[0].platform
    attention = "dense" if platform in ("gpu", "cuda", "rocm") else "auto"  # cuDNN's refuses float32; unused here
    backend = choose_backend(ModelSection(compute_dtype=dtype, attention=attention), platform)
    if not int8_activations:
        backend = dataclasses.replace(backend, int8_activations=False)
    try:
        tokenizer = opened.tokenizer()
    except UserError as error:
        tokenizer, missing = None, error
    else:
        missing = None
    form = matrix_format(backend, mesh)
    params = load_params(opened, mesh, dtype=backend.dtype, keep_quantized=True, form=form)
    generator = Generator(
        opened.model,
        params,
        tokenizer,
        backend,
        mesh,
        max_length,
        stop_ids=_stop_ids(opened, tokenizer),
        begin=opened.begin,
        long_rope=long_rope,
        cache_dtype=cache_dtype,
        owned=True,
    )
    bos = opened.begin[0] if opened.begin else opened.facts.bos_id
    template = opened.chat_template
    if opened.kind == "phijax" and tokenizer is not None:  # a run chats as what is exported from it does
        template = chat_template_of(opened, tokenizer)
    return Model(generator, template, bos=bos, without_tokenizer=missing, where=str(opened.path))


def _check_options(max_length, dtype, tensor, long_rope, cache_dtype, int8_activations) -> None:
    """What `load` takes, before anything is opened. Raises: UserError."""
    one_of = {
        "dtype": (dtype, ("auto", "float32", "bfloat16")),
        "long_rope": (long_rope, ("auto", "declared", "per_sequence")),
        "cache_dtype": (cache_dtype, ("auto", "int8")),
        "int8_activations": (int8_activations, (True, False)),
    }
    for name, (value, known) in one_of.items():
        if not isinstance(value, type(known[0])) or value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(map(repr, known))}.")
    counts = {"tensor": tensor} if max_length is None else {"tensor": tensor, "max_length": max_length}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"{name}={value!r}: must be a whole number, 1 or above.")


class Model:
    """A model in memory, with what travels with its weights."""

    def __init__(
        self,
        generator: Generator,
        chat_template: str | None = None,
        *,
        bos: int | None = None,
        without_tokenizer: UserError | None = None,
        where: str = "the checkpoint",
    ):
        """Args: bos: the id that a chat template may ask for; texts begin as the generator says.

        where: what the model was opened from, for messages.
        """
        self.generator = generator
        self.config = generator.model
        self.tokenizer = generator.tokenizer
        self._template, self._bos, self._without_tokenizer = chat_template, bos, without_tokenizer
        self._where = where
        self._format: chats.ChatFormat | None = None
        self._kept = PrefixCache()

    def with_params(self, params: Params) -> "Model":
        """The same model with other weights, as `Generator.with_params`: nothing is compiled anew.

        The weights are a copy, and this model keeps its own. What was kept of a conversation's cache stays here.
        """
        other = copy.copy(self)
        other.generator, other._kept = self.generator.with_params(params), PrefixCache()
        return other

    @overload
    def generate(self, prompts: str, sampling: Sampling | None = None, **settings) -> Result: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, **settings
    ) -> list[Result]: ...

    def generate(self, prompts, sampling=None, **settings):
        """Continues one text (-> Result) or a list of texts or lists of ids (-> list of Results).

        Args:
          sampling: for all, whose draws then differ by their place in the list; or one for each: an answer is then the
            one that its prompt gets alone.
          settings: fields of Sampling, in place of one: `model.generate("Once", max_tokens=20, temperature=0)`.
        """
        if isinstance(sampling, Sequence) and not isinstance(prompts, str) and not settings:
            sampling = [_sampling(one, {}) for one in sampling]
        else:
            sampling = _sampling(sampling, settings)
        self._need_tokenizer(isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts))
        results = self.generator.generate([prompts] if isinstance(prompts, str) else prompts, sampling)
        return results[0] if isinstance(prompts, str) else results

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, **settings) -> Iterator[Piece]:
        """Continues one text token by token; a piece's `text` may be printed as it comes."""
        self._need_tokenizer(isinstance(prompt, str))
        return self.generator.stream([prompt], _sampling(sampling, settings))

    def chat(self, messages: Messages, sampling: Sampling | None = None, **settings) -> Result:
        """The answer to a conversation, [{"role": "user", "content": "..."}, ...].

        The cache of the last one is kept: of a conversation that goes on only what is new is computed.
        """
        prompt, sampling = self.encode_chat(messages, _sampling(sampling, settings))
        return self.generator.generate([prompt], sampling, kept=self._kept)[0]

    def stream_chat(self, messages: Messages, sampling: Sampling | None = None, **settings) -> Iterator[Piece]:
        """As `chat`, token by token."""
        prompt, sampling = self.encode_chat(messages, _sampling(sampling, settings))
        return self.generator.stream([prompt], sampling, kept=self._kept)

    def encode_chat(self, messages: Messages, sampling: Sampling) -> tuple[list[int], Sampling]:
        """The conversation as ids, and the settings with the ids that end an answer.

        Raises: UserError for a conversation that is none, or a model whose chat format is not known.
        """
        self._need_tokenizer(True)
        form = self.chat_format()
        encoded = chats.encode_chat(messages, self.tokenizer, form, generation_prompt=True)
        ends = (*sampling.stop_ids, *chats.stop_ids(self.tokenizer, form))
        return encoded.tokens, dataclasses.replace(sampling, stop_ids=ends)

    def chat_format(self) -> chats.ChatFormat:
        """Raises: UserError where the checkpoint has no chat template, or one that is not known."""
        if self._format is None:
            self._need_tokenizer(True)
            self._format = chats.recognise(self._template, self.tokenizer, self._bos, self._where)
        if self._format is None:
            known = ", ".join(form.name for form in chats.FORMATS)
            what = "has no chat template" if self._template is None else "has a chat template that is none of ours"
            raise UserError(f"This checkpoint {what} ({known}): it can continue text, but not chat.")
        return self._format

    def logits(self, text: Prompt) -> np.ndarray:
        """(T, V) float32; row t is what the model says of the token behind token t. Text begins as prompts do."""
        return self.generator.logits(self._ids(text))

    def loss(self, text: Prompt) -> float:
        """Mean negative log-likelihood of a text's tokens, in nats a token; the first only where a token begins texts.

        Raises: UserError for a text of fewer than two tokens.
        """
        ids = self._ids(text)
        if len(ids) < 2:
            raise UserError("A loss needs a text of at least two tokens.")
        logits = self.generator.logits(ids)[:-1].astype(np.float64)
        highest = logits.max(axis=-1)
        normaliser = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
        loss = float(np.mean(normaliser - logits[np.arange(len(ids) - 1), ids[1:]]))
        assert math.isfinite(loss)
        return loss

    def _ids(self, text: Prompt) -> list[int]:
        self._need_tokenizer(isinstance(text, str))
        if isinstance(text, str):
            return [*self.generator.begin, *self.tokenizer.encode(text)]
        return self.generator.known(text, "text")

    def _need_tokenizer(self, needed: bool) -> None:
        if needed and self.tokenizer is None:
            raise self._without_tokenizer or UserError("This model has no tokenizer: give ids.")


def _sampling(sampling: Sampling | None, settings: dict) -> Sampling:
    if sampling is not None and settings:
        raise UserError(f"Give either a Sampling or its fields, not both: {', '.join(settings)}.")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise UserError(f"sampling={sampling!r}: must be a Sampling, or its fields by name.")
    try:
        return sampling or Sampling(**settings)
    except TypeError as error:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise UserError(f"{error}. Settings are: {known}.") from error


def _stop_ids(opened: Opened, tokenizer: TextTokenizer | None) -> tuple[int, ...]:
    """What the checkpoint says; a run of ours says nothing and ends texts as its data does."""
    return opened.stop_ids or (() if tokenizer is None else (tokenizer.end_of_text,))
