"""The command phijax export: from a run to folders that transformers opens unedited, and what it refuses."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from quick_compilation import QUICK
from references import real_model

from phijax import export
from phijax.checkpoint.config import CheckpointConfig
from phijax.checkpoint.lock import WriterLock
from phijax.checkpoint.run_state import RunCheckpoints
from phijax.errors import UserError
from phijax.interchange.load import load_params
from phijax.interchange.open import open_checkpoint
from phijax.model import params
from phijax.model.backend import Backend
from phijax.model.config import LongRope, ModelConfig
from phijax.parallel.mesh import MeshConfig, make_mesh
from phijax.text.train_tokenizer import train_tokenizer

VOCABULARY = 700
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    model_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_position=64,
    long_rope=LongRope((1.0, 1.1, 1.2, 1.3), (1.5, 2.0, 4.0, 8.0), original_max_position=16),
)
TEXTS = [
    "Hello  world,\tthis is\r\n   text.\n\n    indented = [1, 22, 333]  ",
    "Grüße, żółw, 日本語 и кириллица 🦊👩‍👩‍👧 \u00a0 x",
    "<|user|>\nSYS\nHI<|end|>\n<|assistant|>\n",
    "<|user|> a<|end|>b<|endoftext|>c\n",
    "",
]


def on_one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """As a run leaves it: one step, its tokenizer, its losses."""
    folder = tmp_path_factory.mktemp("run") / "my_run"
    text = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    tokenizer = train_tokenizer([text, *TEXTS], VOCABULARY)
    tokenizer.save(folder / "tokenizer")
    mixture = [{"path": "shards/prose", "weight": 1, "digest": "abcdef0123456789"}]
    phase = {"steps": 9, "sequence_length": 64, "global_batch_size": 8, "mixture": mixture}
    data = {"seed": 4, "tokenizer": tokenizer.fingerprint, "phases": [phase]}
    identity = {"model": dataclasses.asdict(MODEL), "data": data}
    lines = [{"step": 7, "loss": 3.5}, {"step": 8, "loss": 3.25, "heldout_loss/prose": 3.125}, {"step": 9, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with WriterLock(folder, break_lock=False, log=print) as lock:
        config = dataclasses.replace(CheckpointConfig(), asynchronous=False)
        checkpoints = RunCheckpoints(folder / "checkpoints", config, identity=identity, version=1, lock=lock, log=print)
        weights = jax.jit(lambda: params.init(MODEL, 3), compiler_options=QUICK)()
        checkpoints.save(9, {"params": weights})
        checkpoints.wait()
    return folder


def run(*arguments: str) -> int:
    """The command, in this process."""
    saved = flagsaver.save_flag_values(export.FLAGS)
    try:
        return export.main(export.FLAGS(["export", *arguments])[1:])
    finally:
        flagsaver.restore_flag_values(saved, export.FLAGS)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert run(f"--checkpoint={workdir}", "--format=hf", f"--output={folder}", "--max_shard_size=30KB") == 0
    return folder


def test_transformers_opens_the_folder_unedited_and_gives_our_logits(workdir, exported):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(theirs).__name__ == "Phi3ForCausalLM" and theirs.dtype == torch.float32
    opened = open_checkpoint(workdir)
    weights = load_params(opened, on_one_device())
    for length in (16, 40):  # below and above the switch of LongRoPE
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, length), dtype=np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)

        def forward(weights, tokens=tokens, positions=positions, length=length):
            model = params.module(MODEL, weights)
            return model.logits(model.hidden(tokens, positions, np.ones_like(tokens), Backend(), length=length))

        ours = jax.jit(forward, compiler_options=QUICK)(weights)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=1e-4)


def test_auto_tokenizer_gives_our_ids_and_the_template_comes_along(workdir, exported):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = open_checkpoint(workdir).tokenizer()
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode_with_specials(text), text
    chat = [{"role": "user", "content": "Hi"}]
    shown = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert theirs.eos_token_id == ours.end_of_text == theirs.pad_token_id


def test_config_holds_no_key_of_ours_and_all_stop_ids(workdir, exported):
    transformers = pytest.importorskip("transformers")
    config = json.loads((exported / "config.json").read_text())
    known = set(transformers.Phi3Config().to_dict()) | {"torch_dtype", "rope_theta", "rope_scaling"}
    assert set(config) <= known and None not in config.values()
    assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    names = open_checkpoint(workdir).tokenizer().added_tokens
    generation = transformers.GenerationConfig.from_pretrained(exported)
    assert set(generation.eos_token_id) == {names[n] for n in ("<|end|>", "<|assistant|>", "<|endoftext|>")}
    assert open_checkpoint(exported).stop_ids == tuple(generation.eos_token_id)


def test_the_card_tells_data_and_scores(exported):
    card = (exported / "README.md").read_text()
    assert "# my_run" in card and "| step | 9 |" in card
    assert "9 steps of 8 rows of 64 tokens, 4,608 tokens in all; prose x 1 (digest abcdef012345)" in card
    assert "| held out, prose | 8 | 3.1250 |" in card and "| training | 8 | 3.2500 |" in card


def test_weights_alone_keep_data_and_scores_for_the_card(workdir, exported, tmp_path):
    """By way of a checkpoint of ours the card says the same."""
    assert run(f"--checkpoint={workdir}", "--format=phijax", f"--output={tmp_path / 'my_run'}") == 0
    assert run(f"--checkpoint={tmp_path / 'my_run'}", "--format=hf", f"--output={tmp_path / 'hf'}") == 0
    assert (tmp_path / "hf" / "README.md").read_text() == (exported / "README.md").read_text()


def test_ours_out_of_that_folder_keeps_tokenizer_template_and_stops(exported, tmp_path):
    """And once more through Hugging Face: files that came from there are copied byte for byte."""
    assert run(f"--checkpoint={exported}", "--format=phijax", f"--output={tmp_path / 'ours'}") == 0
    assert run(f"--checkpoint={tmp_path / 'ours'}", "--format=hf", f"--output={tmp_path / 'back'}") == 0
    ours, first = open_checkpoint(tmp_path / "ours"), open_checkpoint(exported)
    assert ours.stop_ids == first.stop_ids and ours.chat_template == first.chat_template is not None
    assert ours.tokenizer().fingerprint == first.tokenizer().fingerprint
    copied = [
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "generation_config.json",
    ]
    for name in [*copied, "special_tokens_map.json", "config.json"]:
        assert (tmp_path / "back" / name).read_bytes() == (exported / name).read_bytes(), name


@pytest.mark.parametrize("format", ["hf", "phijax"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("added_tokens.json", b'{"<|a|>": "1"}'),
        ("special_tokens_map.json", b'{"eos_token": 1, "eos_token": 2}'),
        ("vocab.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
        ("tokenizer.model", b"no model"),
    ],
)
def test_what_is_copied_is_opened_first(exported, tmp_path, format, name, content):
    folder = shutil.copytree(exported, tmp_path / "source")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(name)):
        run(f"--checkpoint={folder}", f"--format={format}", f"--output={tmp_path / 'new' / 'out'}")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format, expected", [("hf", r"4 tensors|15 tensors"), ("phijax", "before compression")])
def test_dry_run_says_what_and_writes_nothing(workdir, tmp_path, capsys, format, expected):
    arguments = [f"--checkpoint={workdir}", f"--format={format}", f"--output={tmp_path / 'out'}", "--dry_run"]
    assert run(*arguments, "--dtype=bfloat16") == 0
    printed = capsys.readouterr().out
    assert re.search(r"(?s)a phijax checkpoint, [\d,]+ weights, float32.*rounds the weights.*would write", printed)
    assert re.search(expected, printed), printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format=hf", "--output=o"], "--checkpoint is missing"),
        (["--checkpoint=c", "--output=o"], "--format is missing"),
        (["--checkpoint=c", "--format=hf"], "--output is missing"),
        (["--checkpoint=c", "--format=lama", "--output=o"], "Nearest: llama"),
        (["--checkpoint=c", "--format=hf", "--output=o", "--dtype=int8"], "--dtype=int8 is not one of"),
        (["--checkpoint=c", "--format=gguf", "--output=o", "--dtype=float16"], "--kind=F32"),
        (["--checkpoint=c", "--format=hf", "--output=o", "--max_shard_size=big"], "--max_shard_size=big"),
        (["--checkpoint=c", "--format=hf", "--output=o", "--max_shard_size=0GB"], "--max_shard_size=0GB"),
        (["--checkpoint=c", "--format=hf", "--output=o", "more"], "'more' is not a flag"),
        (["--checkpoint=/nowhere/c", "--format=hf", "--output=o"], "No checkpoint at /nowhere/c"),
        (["--checkpoint=c", "--format=gguf", "--kind=Q3", "--output=o"], "--kind=Q3 is not one of"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("1.5 mb", 1_500_000), ("300KB", 300_000)]
)
def test_sizes(text, size):
    assert export.parse_size(text) == size


def test_the_command_ends_with_two_and_one_message():
    command = [sys.executable, "-m", "phijax", "export"]
    ended = subprocess.run(
        [*command, "--checkpoint=/nowhere", "--format=hf", "--output=o"], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (2, "error: No checkpoint at /nowhere: it does not exist.\n")
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--max_shard_size" in helped.stdout and "mistral" in helped.stdout


@pytest.mark.slow
def test_a_real_model_out_of_gguf_answers_in_transformers(tmp_path):
    """SmolLM2-135M, a quarter of a minute: weights as transformers dequantises them, template and stop ids at work."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    file = real_model.find_or_skip()
    assert run(f"--checkpoint={file}", "--format=hf", f"--output={tmp_path / 'hf'}") == 0
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(ours.generate(**prompt, max_new_tokens=40, do_sample=False)[0])
    assert answer.endswith("The capital of France is Paris.<|im_end|>")
