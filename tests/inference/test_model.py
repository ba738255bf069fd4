"""phijax.load on a folder as transformers saves it, and the command that is made of it."""

import inspect
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import phijax
from phijax import generate as command_generate
from phijax.errors import UserError
from phijax.inference import model as library
from phijax.inference import programs
from phijax.inference.model import Model
from phijax.inference.sampling import Sampling
from phijax.inference.stopping import Result
from phijax.text.chat import PHI3
from phijax.text.tokenizer import Tokenizer
from phijax.text.train_tokenizer import train_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "The file object has a method that reads a line. Its name is readline, and it returns text.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 20], 310)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny Phi3 with 320 ids, its tokenizer and phi-3's chat template, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("huggingface")
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tokenizer.end_of_text,
        tie_word_embeddings=False,
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_huggingface(folder, chat_template=PHI3.template)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return phijax.load(folder)


def test_a_chat_template_without_bound_is_refused_by_its_folder(folder, model, tmp_path):
    """Where a conversation asks for it; texts are continued without."""
    odd = shutil.copytree(folder, tmp_path / "odd")
    (odd / "chat_template.jinja").write_text("{{ 'a'.ljust(4000000000) }}")
    opened = phijax.load(odd)
    with pytest.raises(UserError, match=f"chat template of {odd} .*asked for more than 256 MB"):
        opened.chat([{"role": "user", "content": "Hi"}])
    asked = {"max_tokens": 5, "temperature": 0}
    assert opened.generate("The file", **asked) == model.generate("The file", **asked)


def test_a_chat_template_that_is_no_file(folder, tmp_path):
    """A device has no length and no end."""
    odd = shutil.copytree(folder, tmp_path / "odd")
    (odd / "chat_template.jinja").unlink(missing_ok=True)
    (odd / "chat_template.jinja").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"chat_template.jinja is no regular file"):
        phijax.load(odd)


def test_generate_takes_one_text_or_several(model):
    one = model.generate("The file", max_tokens=5, temperature=0)
    ids = model.tokenizer.encode("The file")
    several = model.generate(["The file", ids], Sampling(max_tokens=5, temperature=0))
    assert several == [one, one]
    assert len(one.tokens) <= 5
    pieces = list(model.stream("The file", max_tokens=5, temperature=0))
    assert "".join(piece.text for piece in pieces) == one.text and pieces[-1].result == one


def test_texts_as_long_as_the_model_and_texts_that_are_none(folder, model):
    """This model has 128 positions; the prompt of an answer must leave room for one token of it."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 300, 129).tolist()
    for length in (127, 128):
        with torch.inference_mode():
            out = reference(torch.tensor([ids[:length]]), labels=torch.tensor([ids[:length]]))
        np.testing.assert_allclose(model.logits(ids[:length]), out.logits[0].numpy(), rtol=0, atol=1e-4)
        assert math.isclose(model.loss(ids[:length]), out.loss.item(), rel_tol=1e-5)
    with pytest.raises(UserError, match="text has 129 tokens; the model takes 128"):
        model.logits(ids)
    with pytest.raises(UserError, match="prompt has 128 tokens; with at least one of an answer the model takes 128"):
        model.generate([ids[:128]], max_tokens=1)
    for empty in ("", []):
        with pytest.raises(UserError, match="text is empty"):
            model.logits(empty)
    with pytest.raises(UserError, match="whole numbers"):
        model.generate([[1.5]], max_tokens=1)


def test_logits_and_loss_are_those_of_transformers(folder, model):
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(model.tokenizer.encode(TEXT))[None]
    with torch.inference_mode():
        out = reference(ids, labels=ids)
    logits = model.logits(TEXT)
    assert logits.dtype == np.float32 and logits.shape == (ids.shape[1], 320)
    np.testing.assert_allclose(logits, out.logits[0].numpy(), rtol=0, atol=1e-4)
    assert math.isclose(model.loss(TEXT), out.loss.item(), rel_tol=1e-5)


def test_chat_answers_what_generate_gives_for_the_rendered_conversation(model):
    messages = [{"role": "user", "content": "a line"}]
    answer = model.chat(messages, max_tokens=6, temperature=0)
    ids = model.tokenizer.encode_with_specials("<|user|>\na line<|end|>\n<|assistant|>\n")
    ends = tuple(model.tokenizer.added_tokens[name] for name in ("<|end|>", "<|endoftext|>"))
    assert answer.tokens == model.generate([ids], max_tokens=6, temperature=0, stop_ids=ends)[0].tokens
    stop = model.generate([ids], max_tokens=6, temperature=0, stop_ids=(answer.tokens[0],))[0]
    assert stop.finish_reason == "stop" and stop.text == "" and stop.tokens == answer.tokens[:1]


def test_of_a_conversation_that_goes_on_what_is_new_is_computed(model, monkeypatch):
    """Asked at once and as a stream; generate neither takes the conversation's cache nor spoils it."""
    asked, prefill = [], programs.prefill
    monkeypatch.setattr(programs, "prefill", lambda *given: asked.append(int(given[8])) or prefill(*given))
    messages = [{"role": "user", "content": TEXT + TEXT[:60]}]
    first = model.chat(messages, max_tokens=6, temperature=0)
    model.generate(TEXT, max_tokens=2)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "a line"}]
    ids, _ = model.encode_chat(messages, Sampling())
    asked.clear()
    second = "".join(piece.text for piece in model.stream_chat(messages, max_tokens=6, temperature=0))
    assert sum(asked) == len(ids) - 64, len(ids)  # its first chunk is there
    model.chat([{"role": "user", "content": "other"}], max_tokens=2)
    asked.clear()
    assert model.chat(messages, max_tokens=6, temperature=0).text == second and sum(asked) == len(ids)


def test_no_token_at_most_answers_with_nothing_to_any_prompt_that_there_may_be(model):
    """Also where the prompt takes every position, which leaves no room for a token."""
    nothing = Result("", (), (), "length")
    assert model.generate("The file", max_tokens=0) == nothing
    assert model.generate(["a", [7] * 128], Sampling(max_tokens=0, temperature=0)) == [nothing, nothing]
    assert model.chat([{"role": "user", "content": "a line"}], max_tokens=0) == nothing
    assert list(model.stream("The file", max_tokens=0)) == []
    for wrong in ([[7] * 129], [[320]], [[]]):
        with pytest.raises(UserError):
            model.generate(wrong, max_tokens=0)


def test_one_stop_text_needs_no_list(model):
    whole = model.generate("The file", max_tokens=8, temperature=0).text
    stop = whole[2:4]
    cut = model.generate("The file", max_tokens=8, temperature=0, stop=stop)
    assert cut == model.generate("The file", max_tokens=8, temperature=0, stop=[stop])
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("line " * 300), "takes 128"),
        (lambda m: m.generate([[]]), "empty"),
        (lambda m: m.generate([[320]]), "0 to 319"),
        (lambda m: m.generate("a", temprature=1), "temperature"),
        (lambda m: m.generate("a", {"temperature": 1}), "must be a Sampling"),
        (lambda m: m.stream("a", temperature="hot"), "temperature='hot': must be a number"),
        (lambda m: m.chat([{"role": "user", "content": "a"}], stop_ids=0.5), "stop_ids=0.5"),
        (lambda m: m.logits([1.5, 2]), "whole numbers"),
        (lambda m: m.loss(["1", "2"]), "whole numbers"),
        (lambda m: m.loss("") if m.generator.begin else m.loss([1]), "two tokens"),
        (lambda m: Model(m.generator, None).chat([{"role": "user", "content": "a"}]), "no chat template"),
        (lambda m: Model(m.generator, "{{ 1 }}").chat([{"role": "user", "content": "a"}]), "none of ours"),
    ],
)
def test_errors_say_what_to_do(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_load_that_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        phijax.load(tmp_path / "none")
    with pytest.raises(UserError, match="over 3 chips"):
        phijax.load(folder, tensor=3)
    with pytest.raises(UserError, match="positions end at 128"):
        phijax.load(folder, max_length=129)


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": "int3"}, {"dtype": None}, {"dtype": ["float32"]}, {"dtype": np.float32}, {"long_rope": "always"}]
    + [{"cache_dtype": "int4"}, {"tensor": 0}, {"tensor": True}, {"tensor": "2"}, {"max_length": 0}]
    + [{"max_length": 2.5}, {"max_length": -1}, {"int8_activations": "no"}, {"int8_activations": 1}],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_opened(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=re.escape(f"{name}={value!r}: must be")):
        phijax.load("/nowhere", **wrong)


def test_help_shows_the_options_that_there_are():
    ours, theirs = inspect.signature(phijax.load), inspect.signature(library.load)
    assert list(ours.parameters) == list(theirs.parameters)
    for name, parameter in ours.parameters.items():
        assert parameter.default == theirs.parameters[name].default
        assert name == "path" or f"{name}:" in phijax.load.__doc__


def run(capsys, *arguments: str) -> str:
    command_generate.FLAGS.unparse_flags()
    for name in command_generate.FLAGS:
        command_generate.FLAGS[name].unparse()
    rest = command_generate.FLAGS(["generate", *arguments])[1:]
    command_generate.main(rest)
    return capsys.readouterr().out


def test_the_command_prints_what_the_library_gives(capsys, folder, model):
    common = (f"--checkpoint={folder}", "--max_tokens=5", "--temperature=0")
    expected = model.generate("The file", max_tokens=5, temperature=0)
    assert run(capsys, *common, "--prompt=The file") == "The file" + expected.text + "\n"
    assert run(capsys, f"--checkpoint={folder}", "--max_tokens=0", "--prompt=The file") == "The file\n"
    lines = run(capsys, *common, "--prompt=The file", "--prompt=a", "--json").splitlines()
    assert json.loads(lines[0])["tokens"] == list(expected.tokens) and len(lines) == 2
    chat = run(capsys, *common, "--chat", "--message=a line", "--json")
    answer = model.chat([{"role": "user", "content": "a line"}], max_tokens=5, temperature=0)
    assert json.loads(chat)["text"] == answer.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint"),
        (["--checkpoint=x", "--message=a"], "belongs to --chat"),
        (["--checkpoint=x", "--chat", "--prompt=a"], "--chat takes --message"),
        (["--checkpoint=x", "--chat", "--json"], "needs --message"),
        (["--checkpoint=x", "--prompt_file=/nowhere"], "prompt_file=/nowhere"),
        (["--checkpoint=x", "--temperature=-1"], "temperature=-1"),
        (["--checkpoint=x", "stray"], "stray"),
    ],
)
def test_wrong_flags_are_one_message(capsys, arguments, message):
    with pytest.raises(UserError, match=message):
        run(capsys, *arguments)


def test_importing_phijax_imports_nothing_heavy():
    program = "import sys, phijax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules); print(phijax.load.__doc__)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0 and "GGUF" in ended.stdout, ended.stderr
