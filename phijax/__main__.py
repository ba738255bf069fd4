"""phijax VERB [--flags]: train the phi-3 family in JAX.

`phijax --version` says which. Verbs (`phijax VERB --help` lists the flags of one):
  main     train: --config=experiments/tiny.py --workdir=DIR
  prepare  raw text -> token shards: --input=GLOB --output=DIR
  generate text from any checkpoint: --checkpoint=ANY --prompt=TEXT
  export   any checkpoint -> Hugging Face, GGUF, ours: --checkpoint=ANY --format=hf --output=DIR
  quantize weights in four or eight bits: --checkpoint=ANY --scheme=int4_g128 --output=DIR
  plan     what a run needs and costs on TPUs, before renting: --config=FILE --topology=v5p:4x4x8
  preflight  whether machines and storage are fit for a run: --workdir=DIR --config=FILE, on every worker
  show     print the manifest of shards or of checkpoints: DIR
"""

import runpy
import sys
from typing import NoReturn

from phijax.errors import UserError, nearest_name
from phijax.report import streams
from phijax.storage import signals

VERBS = ("main", "prepare", "generate", "export", "quantize", "plan", "preflight", "show")


def main() -> NoReturn:
    """The console entry: `phijax prepare ...` is `python -m phijax.prepare ...`."""
    streams.mend()  # first: what is opened must not get the number of a closed stream
    with signals.at_once():  # imports take a moment too
        _main()


def _main() -> NoReturn:
    if len(sys.argv) > 1 and sys.argv[1] in VERBS:
        verb = sys.argv.pop(1)
        # As `python -m` would: the same exit codes, and worker processes that are spawned find the command's module.
        runpy.run_module(f"phijax.{verb}", run_name="__main__", alter_sys=True)
        sys.exit(0)
    from phijax import command

    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        del sys.argv[2:]  # flags of a verb that does not exist are not the mistake to report
    command.run(_without_verb)


def _without_verb(arguments: list[str]) -> None:
    if not arguments:
        print(__doc__.strip())
        return
    nearest = nearest_name(arguments[0], VERBS)
    meant = f" Did you mean `phijax {nearest}`?" if nearest else ""
    raise UserError(f"phijax has no verb {arguments[0]!r}.{meant} Verbs: {', '.join(VERBS)}.")


if __name__ == "__main__":
    main()
