"""Asks `phijax.plan` in this process."""

import pathlib

from phijax import plan

CONFIG = str(pathlib.Path(__file__).with_name("tiny_plan.py"))
MINI = str(pathlib.Path(__file__).parents[2] / "experiments" / "mini.py")


def ask(capsys, *arguments, overrides=(), config=CONFIG) -> tuple[int, str, str]:
    plan.FLAGS.unparse_flags()
    for name in plan.FLAGS:
        plan.FLAGS[name].unparse()
    plan.FLAGS(["plan", f"--config={config}", *arguments])
    code = plan.main([], list(overrides))
    printed = capsys.readouterr()
    return code, printed.out, printed.err
