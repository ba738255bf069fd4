"""Writes any checkpoint in any format: phijax export --checkpoint=ANY --format=hf --output=DIR

--checkpoint is the workdir of a run, the folder of one of its steps, a Hugging Face folder or a GGUF file. Formats:
  hf       Hugging Face, in the class that the weights came from; Phi3 or GPT-2 for those trained here
  llama    Hugging Face, LlamaForCausalLM: for runtimes that do not know Phi3
  mistral  Hugging Face, MistralForCausalLM: the same with a sliding window
  phijax   ours, weights alone: --config.init_from reads it
  gguf     for llama.cpp; --kind is of the weights that are not quantised already
Of what phijax quantize wrote, phijax and gguf get the integers (gguf as Q4_0 and Q8_0; phijax with --dtype the values
that they stand for); hf, llama and mistral get these values; and two formats are for such checkpoints alone:
  compressed_tensors  Hugging Face, pack-quantized: for transformers and vLLM
  mlx                 for mlx-lm and mlx-swift: Macs, iPhones
Weights are copied bit for bit unless --dtype says otherwise; tokenizer, chat template and stop ids go with them.
"""

import math
import re

from absl import flags

from phijax import command
from phijax.errors import EXIT_DONE, UserError, nearest_name
from phijax.parallel import hardware

FORMATS = ("hf", "llama", "mistral", "phijax", "gguf", "compressed_tensors", "mlx")
DTYPES = ("bfloat16", "float16", "float32")
GGUF_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
# Made by llama.cpp, where it is installed.
K_QUANTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")

FLAGS = flags.FlagValues()
command.define_path("checkpoint", "What to export; any kind of checkpoint.", FLAGS)
flags.DEFINE_string("format", None, f"One of {', '.join(FORMATS)}.", flag_values=FLAGS)
command.define_path("output", "The folder to write; it must not be there yet.", FLAGS)
flags.DEFINE_string("dtype", None, f"One of {', '.join(DTYPES)}; none: as stored.", flag_values=FLAGS)
flags.DEFINE_string(
    "kind",
    "BF16",
    f"Of --format=gguf: one of {', '.join(GGUF_KINDS)}, or, made by llama.cpp, {', '.join(K_QUANTS)}.",
    flag_values=FLAGS,
)
flags.DEFINE_string("max_shard_size", "5GB", "Largest safetensors file: 500MB, 5GB, 2GiB.", flag_values=FLAGS)
flags.DEFINE_boolean("dry_run", False, "Says what would be written, and writes nothing.", flag_values=FLAGS)

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: list[str]) -> int:
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    for name in ("checkpoint", "format", "output"):
        if not FLAGS[name].value and not (name == "output" and FLAGS.dry_run):
            raise UserError(f"--{name} is missing. --help lists the flags.")
    _check_choice("format", FLAGS.format, FORMATS)
    if FLAGS.dtype is not None:
        _check_choice("dtype", FLAGS.dtype, DTYPES)
    _check_choice("kind", FLAGS.kind, GGUF_KINDS + K_QUANTS)
    max_shard_bytes = parse_size(FLAGS.max_shard_size)
    if FLAGS.format == "gguf" and FLAGS.dtype is not None:
        raise UserError("--dtype is of safetensors and of phijax; for gguf say --kind=F32, F16, BF16, Q8_0 or Q4_0.")
    hardware.prepare_cpu()

    from etils import epath

    from phijax.interchange.open import open_checkpoint

    opened = open_checkpoint(FLAGS.checkpoint)
    _describe(opened)
    output = epath.Path(FLAGS.output or "(nowhere)")
    if FLAGS.format == "gguf":
        return _write_gguf(opened, output)
    return _write_weights(opened, output, max_shard_bytes)


def _write_weights(opened, output, max_shard_bytes: int) -> int:
    from phijax.interchange import small_matrices
    from phijax.interchange.huggingface import compressed_tensors as compressed_tensors_export
    from phijax.interchange.huggingface import export as huggingface_export
    from phijax.interchange.huggingface import folder as huggingface_folder
    from phijax.interchange.huggingface import mlx as mlx_export
    from phijax.interchange.native import write as native_write

    dtype, small = huggingface_export.DTYPES[FLAGS.dtype] if FLAGS.dtype else None, opened.weights.schemes
    if FLAGS.format == "phijax":
        for line in [*_changes(opened, dtype, ()), *_widened(small if dtype is not None else {}, dtype)]:
            print(line)
        size = native_write.nbytes(opened, dtype)
        _check_output(output, size)
        if not FLAGS.dry_run:
            native_write.write(opened, output, dtype=dtype)
        print(f"{_done()} {output}: weights of {_bytes(size)}, before compression")
        return EXIT_DONE
    small_formats = {compressed_tensors_export.FORMAT: compressed_tensors_export, mlx_export.FORMAT: mlx_export}
    keeps = FLAGS.format in small_formats
    integers = small_matrices.require_quantized(opened, FLAGS.format) if keeps else ()
    family = huggingface_export.choose_family(opened, "hf" if keeps else FLAGS.format)
    folder = small_formats.get(FLAGS.format, huggingface_export).folder(opened, family, dtype)
    files = folder.files(max_shard_bytes)
    for line in [*_changes(opened, dtype, integers), *_widened({} if keeps else small, dtype), *folder.notes]:
        print(line)
    _check_output(output, sum(tensor.nbytes for tensor in folder.tensors))
    if not FLAGS.dry_run:
        huggingface_folder.write(opened, output, folder, max_shard_bytes=max_shard_bytes, say=_say_warnings)
    print(f"{_done()} {output}, {family.model_type} layout:")
    for name, tensors in files.items():
        kinds = ", ".join(sorted({tensor.dtype.name for tensor in tensors}))
        print(f"  {name}: {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors):,} bytes, {kinds}")
    print(f"  {_size(opened, sum(tensor.nbytes for tensor in folder.tensors))}")
    return EXIT_DONE


def _check_output(output, nbytes: int) -> None:
    """A dry run without --output asks for no place."""
    from phijax.storage import staging

    if FLAGS.output:
        staging.check_output(output, nbytes)


def _write_gguf(opened, output) -> int:
    if FLAGS.dry_run:
        from phijax.interchange.gguf.write import planned_path

        if FLAGS.output:
            planned_path(opened, output, FLAGS.kind)
        keeps = opened.weights.schemes and FLAGS.kind not in K_QUANTS
        kept = "quantised weights as Q4_0 and Q8_0, others as " if keeps else ""
        print(f"would write {output} as GGUF, {kept}{FLAGS.kind}: {_count(opened):,} weights")
        return EXIT_DONE
    from phijax.interchange.gguf.write import write_card, write_gguf  # the format's package is an extra

    if FLAGS.kind in K_QUANTS:
        from phijax.interchange.gguf.k_quants import write_k_quants

        path = write_k_quants(opened, output, kind=FLAGS.kind, say=print)
    else:
        path = write_gguf(opened, output, kind=FLAGS.kind, say=print)
    write_card(opened, output)
    print(f"wrote {path}: {_size(opened, path.stat().length)}, the tokenizer's among them")
    return EXIT_DONE


def _size(opened, nbytes: int) -> str:
    return f"{_bytes(nbytes)}, {8 * nbytes / _count(opened):.3f} bits a weight"


def _bytes(number: int) -> str:
    return f"{number:,} bytes ({number / 1e9:.3f} GB, {number / 2**30:.3f} GiB)"


def _describe(opened) -> None:
    from phijax.quantization.policy import name_of

    small, weights = opened.weights.schemes, opened.weights
    stored = {name_of(small[path]) if path in small else weights.dtype(path).name for path in weights.shapes()}
    print(f"{opened.path}: a {opened.kind} checkpoint, {_count(opened):,} weights, {', '.join(sorted(stored))}")


def _count(opened) -> int:
    return sum(math.prod(shape) for shape in opened.weights.shapes().values())


def _changes(opened, dtype, integers) -> list[str]:
    """A line for each dtype whose values --dtype rounds. `integers`: paths that it is not of."""
    import jax.numpy as jnp

    stored = {opened.weights.dtype(path) for path in opened.weights.shapes() if path not in integers}
    return [
        f"warning: {kind.name} -> {dtype.name} rounds the weights; without --dtype they are copied bit for bit"
        for kind in sorted(stored, key=str)
        if dtype is not None and jnp.promote_types(kind, dtype) != dtype
    ]


def _widened(small, dtype) -> list[str]:
    """A line where weights that are stored in few bits are not written so."""
    if not small:
        return []
    dense = "float32" if dtype is None else dtype.name
    return [
        f"what is stored in few bits is written as the {dense} that it stands for; the integers go into "
        "--format=gguf, mlx, compressed_tensors, and phijax without --dtype"
    ]


def _say_warnings(line: str) -> None:
    if line.startswith("warning"):
        print(line)


def _done() -> str:
    return "would write" if FLAGS.dry_run else "wrote"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = nearest_name(value, choices)
        nearest = f" Nearest: {near}." if near else ""
        raise UserError(f"--{name}={value} is not one of {', '.join(choices)}.{nearest}")


def parse_size(text: str) -> int:
    """ "5GB" -> 5,000,000,000. Raises: UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmg]i?b)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max_shard_size={text} must be a number with KB, MB, GB, KiB, MiB or GiB, as 5GB.")
    return size


if __name__ == "__main__":
    command.run(main, FLAGS)
