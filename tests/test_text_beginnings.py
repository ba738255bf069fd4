"""What stands before a text: the same for a run and for all that is exported from it, by our readers and by theirs."""

import dataclasses
import json

import pytest
from saved_run import CHAT, GREEDY, MODEL, PROMPTS, TEXT, exported, save_run
from synthetic_shards import small_tokenizer, write_synthetic

import phijax
from phijax.data.loader import check_resume
from phijax.data.mixture import Phase, Source
from phijax.data.rows import ShardRows
from phijax.data.shards import Shards
from phijax.errors import UserError
from phijax.interchange.open import open_checkpoint
from phijax.run.resume import begin_of
from phijax.text.beginning import write_beginning
from phijax.text.chat import PHI3
from phijax.text.train_tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

FORMATS = {
    "hf": ["--format=hf"],
    "llama": ["--format=llama"],
    "gguf": ["--format=gguf", "--kind=F32"],
    "phijax": ["--format=phijax"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 310)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("run") / "new"
    return save_run(folder, MODEL, tokenizer, begin=tokenizer.end_of_text)


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    for name, arguments in FORMATS.items():
        exported(run, root / name, *arguments)
    exported(root / "hf", root / "hf to gguf", *FORMATS["gguf"])
    exported(root / "gguf", root / "gguf to hf", *FORMATS["hf"])
    exported(root / "phijax", root / "phijax to hf", *FORMATS["hf"])
    return root


ALL = [*FORMATS, "hf to gguf", "gguf to hf", "phijax to hf"]


@pytest.fixture(scope="module")
def expected(run):
    """Greedy tokens of each prompt, and the ids of a chat; the model as the run has it."""
    model = phijax.load(run)
    assert model.generator.begin == (model.tokenizer.end_of_text,)
    return [result.tokens for result in model.generate(PROMPTS, GREEDY)], model.encode_chat(CHAT, GREEDY)[0]


@pytest.mark.parametrize("name", ALL)
def test_an_export_answers_as_the_run_does(name, exports, expected, tokenizer):
    model = phijax.load(exports / name)
    assert model.generator.begin == (tokenizer.end_of_text,)
    assert [result.tokens for result in model.generate(PROMPTS, GREEDY)] == expected[0]
    ids, _ = model.encode_chat(CHAT, GREEDY)
    assert ids == expected[1]
    assert ids[0] == tokenizer.end_of_text and ids.count(tokenizer.end_of_text) == 1
    assert ids[1] == tokenizer.added_tokens["<|user|>"]


@pytest.mark.parametrize("name", ["hf", "llama", "gguf to hf", "phijax to hf"])
def test_transformers_answers_as_the_run_does(name, exports, expected, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(exports / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(exports / name).eval()
    for prompt, tokens in zip(PROMPTS, expected[0], strict=True):
        inputs = theirs(prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert tuple(new[: len(tokens)]) == tokens
    assert theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == expected[1]
    assert model.config.bos_token_id == theirs.bos_token_id == tokenizer.end_of_text


def test_a_run_from_before_the_rule_begins_with_nothing_everywhere(tokenizer, tmp_path):
    """Its documents' first tokens had nothing before them."""
    old = save_run(tmp_path / "old", MODEL, tokenizer)
    folder, file = exported(old, tmp_path / "hf", "--format=hf"), exported(old, tmp_path / "gguf", *FORMATS["gguf"])
    for path in (old, folder, file):
        assert open_checkpoint(path).begin == ()
    assert transformers.AutoTokenizer.from_pretrained(folder)("The")["input_ids"] == tokenizer.encode("The")
    ids, _ = phijax.load(folder).encode_chat(CHAT, GREEDY)
    assert ids[0] == tokenizer.added_tokens["<|user|>"]
    with pytest.raises(UserError, match="prompt is empty"):
        phijax.load(old).generate("", GREEDY)


def test_an_imported_model_keeps_what_it_begins_with(exports, tokenizer, tmp_path):
    """A Llama that begins with <s>; a template that asks for bos, one that does not."""
    for number, (begin, template) in enumerate(
        [((1,), "{{ bos_token }}" + PHI3.template), ((1,), PHI3.template), ((), PHI3.template)]
    ):
        folder = exported(exports / "hf", tmp_path / f"{number}", "--format=llama")
        write_beginning(folder, begin)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        model, theirs = phijax.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert model.generator.begin == begin
        assert theirs("The file")["input_ids"] == model.generator.ids("The file")
        ours, _ = model.encode_chat(CHAT, GREEDY)
        assert theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == ours
        again = exported(folder, tmp_path / f"{number} again", *FORMATS["gguf"])
        assert open_checkpoint(again).begin == begin
        if template == PHI3.template:
            assert ours[0] == tokenizer.added_tokens["<|user|>"]


def test_what_segments_begin_with_is_decided_once(run, tmp_path):
    """By the run's own steps, else by the weights that it starts from, else by the data's end-of-text."""
    folder, end = str(write_synthetic(tmp_path / "shards")), small_tokenizer().end_of_text
    phase = Phase(steps=1, sequence_length=32, global_batch_size=1, mixture=(Source(folder),))
    plan = ShardRows([phase], {folder: Shards.open(folder)}, seed=0, begin=end)
    assert plan.fingerprint()["begin"] == end
    other = dataclasses.replace(open_checkpoint(run), begin=(1,))
    alike = dataclasses.replace(other, tokenizer=small_tokenizer)
    assert begin_of(plan, None, alike) == 1
    assert begin_of(plan, None, dataclasses.replace(alike, begin=())) == begin_of(plan, None, None) == end
    assert begin_of(plan, None, other) == end, "its ids mean something else"
    assert begin_of(plan, {"data": {"begin": end}}, alike) == end
    old = plan.beginning_with(begin_of(plan, {"data": {}}, alike))
    assert old.begin is None and "begin" not in old.fingerprint()
    with pytest.raises(UserError, match="another begin"):
        check_resume(old.fingerprint(), plan.fingerprint(), 1)
