"""Small weights: phijax quantize --checkpoint=ANY --scheme=int4_g128 --output=DIR [--held_out=SHARDS|FILE.txt]

--checkpoint is the workdir of a run, the folder of one of its steps, a Hugging Face folder or a GGUF file. Schemes:
  int8, int4                         one scale for each output channel
  int4_g128, int4_g64, int4_g32      one scale for each 128, 64 or 32 weights along the input
  ..._down8, ..._head8               the same, with down, or embedding and head, in int8
  int4_g64,down=int8,head=as_stored  any of them, kinds changed singly: qkv, o, gate_up, down, embedding, head
The result is a checkpoint of ours: phijax generate and phijax.load take it as any other, phijax export writes its
integers (gguf, mlx, compressed_tensors) or what they stand for. With --held_out it is compared with the float model:
KL, perplexity, top-1; quality.json and error_by_layer.png lie beside the weights. Killed, the same command goes on
where it was.
"""

import dataclasses
import math
import time
import zlib

from absl import flags

from phijax import command
from phijax.errors import EXIT_DONE, UserError, nearest_name
from phijax.parallel import hardware

METHODS = ("rtn", "awq", "gptq")

FLAGS = flags.FlagValues()
command.define_path("checkpoint", "What to quantise; any kind of checkpoint.", FLAGS)
flags.DEFINE_string("scheme", None, "As above: int8, int4, int4_g128, int4_g64, ...", flag_values=FLAGS)
command.define_path("output", "The folder to write; it must not be there yet.", FLAGS)
flags.DEFINE_string(
    "method",
    "rtn",
    "rtn: round to nearest, with the scale of least squared error. awq: the same, after inputs that matter are scaled. "
    "gptq: input after input, each making up for the errors before it.",
    flag_values=FLAGS,
)
command.define_path("calibration", "Of --method=awq and gptq: token shards or a text file.", FLAGS)
flags.DEFINE_integer("calibration_rows", 16, "Rows of --calibration.", lower_bound=1, flag_values=FLAGS)
command.define_path("held_out", "A folder of token shards, or a text file, to compare on.", FLAGS)
flags.DEFINE_integer("rows", 16, "Held-out rows.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("row_length", 512, "Tokens of a row, of a text file.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_boolean("dry_run", False, "Says what would be written, and writes nothing.", flag_values=FLAGS)


def main(arguments: list[str]) -> int:
    _check(arguments)
    hardware.prepare_cpu()

    from etils import epath

    from phijax.checkpoint import manifest
    from phijax.interchange.native import quantize as native_quantize
    from phijax.interchange.native.source import QUALITY_FILE
    from phijax.interchange.open import open_checkpoint
    from phijax.parallel.mesh import check_32_bits
    from phijax.quantization import policy, report
    from phijax.storage import staging

    check_32_bits()
    opened = open_checkpoint(FLAGS.checkpoint)
    native_quantize.refuse_quantized(opened)
    assigned = policy.assign(opened.model, policy.parse(FLAGS.scheme, tied_head=opened.model.tied_head))
    shapes, nbytes = opened.weights.shapes(), native_quantize.nbytes(opened, assigned)
    print(f"{opened.path}: a {opened.kind} checkpoint, to {FLAGS.scheme} by {FLAGS.method}")
    print("\n".join(report.size_table(shapes, assigned, nbytes)))
    if opened.model.tied_head:
        print("  the head is the embedding (tied): what is said of that is of both")
    output = epath.Path(FLAGS.output or "(nowhere)")
    unmeasured = (output / manifest.MANIFEST_FILE).exists() and not (output / QUALITY_FILE).exists()
    if FLAGS.output and not unmeasured:
        staging.check_output(output, sum(nbytes.values()))
    rows = _rows(opened, FLAGS.held_out, FLAGS.rows)  # before hours are spent
    calibration = _rows(opened, FLAGS.calibration, FLAGS.calibration_rows)
    inputs = _inputs(calibration) if calibration else None
    errors = native_quantize.errors_of(output, opened, assigned, _described(inputs)) if unmeasured else None
    if unmeasured and errors is None:
        staging.check_output(output, 0)  # refuses it: another command's
    if FLAGS.dry_run:
        print(f"would {'write' if errors is None else 'measure'} {output}")
        return EXIT_DONE
    if errors is None:
        errors = _write(opened, output, assigned, inputs)
    else:
        print(f"{output} is written already, by the same command; goes on with measuring")
    _tell(opened, output, shapes, nbytes, errors, rows)
    return EXIT_DONE


def _tell(opened, output, shapes, nbytes, errors, rows) -> None:
    """Measures what was lost, and writes it beside the weights."""
    from phijax.checkpoint import manifest
    from phijax.interchange.native.source import PLOT_FILE, QUALITY_FILE
    from phijax.quantization import report
    from phijax.storage import atomic, durable

    size = durable.bytes_below(output / manifest.STATE_FOLDER)
    facts = {
        "scheme": FLAGS.scheme,
        "method": FLAGS.method,
        "bytes_on_disk": size,
        "bytes_before_compression": sum(nbytes.values()),
        "bits_per_weight": 8 * sum(nbytes.values()) / sum(math.prod(shape) for shape in shapes.values()),
        "relative_error": errors,
    }
    print(f"wrote {output}: {size / 1e9:.3f} GB ({size / 2**30:.3f} GiB) of weights on disk")
    if rows:
        quality = _measure(opened.path, output, rows)
        facts["quality"] = dataclasses.asdict(quality) | {"held_out": FLAGS.held_out}
        print("\n".join(quality.lines()))
    else:
        print("NOT MEASURED: what this cost in quality. Give --held_out=SHARDS or a text file.")
    try:
        report.plot_errors(errors, output / PLOT_FILE)
        atomic.write_json(output / QUALITY_FILE, facts)
    except OSError as error:
        for name in (PLOT_FILE, QUALITY_FILE):
            (output / name).unlink(missing_ok=True)
        raise UserError(
            f"{PLOT_FILE} and {QUALITY_FILE} could not be written into {output}: {error}.\n"
            "The checkpoint itself is whole and can be used; the same command measures it again."
        ) from error
    print(f"  relative error of the weights, by layer: {output / PLOT_FILE}")


def _write(opened, output, assigned, inputs):
    from phijax.interchange.native import methods as quantization_methods
    from phijax.interchange.native import quantize as native_quantize

    source, rounding = quantization_methods.prepare(
        opened, assigned, FLAGS.method, inputs, on_layer=_progress("layers scaled")
    )
    return native_quantize.write(
        source,
        output,
        assigned,
        method=_described(inputs),
        rounding=rounding,
        say=print,
        on_piece=_progress("matrices"),
    )


def _check(arguments: list[str]) -> None:
    """Refuses what can be refused before anything is opened."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag. --help lists them.")
    for name in ("checkpoint", "scheme", "output"):
        if not FLAGS[name].value and not (name == "output" and FLAGS.dry_run):
            raise UserError(f"--{name} is missing. --help lists the flags.")
    if FLAGS.method not in METHODS:
        near = nearest_name(FLAGS.method, METHODS)
        nearest = f" Nearest: {near}." if near else ""
        raise UserError(f"--method={FLAGS.method} is not one of {', '.join(METHODS)}.{nearest}")
    if (FLAGS.method != "rtn") != bool(FLAGS.calibration):
        raise UserError("--calibration=SHARDS or a text file belongs to --method=awq and gptq, which need it.")
    if FLAGS.calibration and FLAGS.calibration == FLAGS.held_out:
        raise UserError("--held_out is what --calibration was chosen on: it would flatter the result. Give other text.")


def _rows(opened, path: str | None, count: int) -> list:
    if not path:
        return []
    from phijax.evaluation.fixed_rows import read_fixed_rows

    longest = opened.model.max_position - 2
    length = min(FLAGS.row_length, longest)
    rows = read_fixed_rows(path, opened.tokenizer(), count=count, length=length, vocab_size=opened.model.vocab_size)
    return [row[: longest + 1] for row in rows]  # those of shards are as long as their records


def _inputs(rows):
    import numpy as np

    return np.stack([row[:-1] for row in rows])


def _described(inputs) -> str:
    """The method, with a digest of the tokens (B, T) that it looked at: another set is another result."""
    if inputs is None:
        return FLAGS.method
    count, length = inputs.shape
    return f"{FLAGS.method} on {count} rows of {length} tokens, {zlib.crc32(inputs.tobytes()):08x}"


def _measure(source, output, rows):
    """One model in memory at a time; the float model's logits wait on disk."""
    from phijax.inference.model import load
    from phijax.quantization import report

    length = max(len(row) for row in rows) + 1

    def logits_of(checkpoint):
        # Of the weights alone: how a device rounds activations is no property of the file.
        return load(checkpoint, max_length=length, int8_activations=False).generator.logits

    return report.measure(rows, lambda: logits_of(source), lambda: logits_of(output), say=print)


def _progress(what: str):
    """Says every ten seconds how far it is."""
    begin = said = time.monotonic()

    def on_piece(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > 10 or done == total:
            said = now
            print(f"  {done} of {total} {what}, {(now - begin) / done * (total - done):.0f} s left", flush=True)

    return on_piece


if __name__ == "__main__":
    command.run(main, FLAGS)
