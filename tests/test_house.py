"""The house: which way imports run, how long files are, what `import phijax` may not do, one list of dependencies."""

import ast
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "phijax"

# Imports run down this list only, never along a step. Names are rooms, or files directly under phijax/.
STEPS = [
    {"__main__", "main", "prepare", "plan", "show", "generate", "export", "quantize", "preflight"},  # commands
    {"planner"},  # what `plan` is made of
    {"run", "command"},  # what commands are made of
    {"config", "planning"},
    {"tasks"},  # which objectives and rows there are
    {"training", "evaluation", "curation", "readiness"},
    {"inference"},
    {"data", "interchange"},
    {"quantization"},
    {"model"},
    {"checkpoint", "text", "parallel", "report"},
    {"storage"},
    {"errors", "distribution"},
]
IMPORT_EXCEPTIONS: dict[tuple[str, str], str] = {}  # (file, imported module): the reason

LONGEST = 400  # lines; a longer file usually holds two subjects
LENGTH_EXCEPTIONS: dict[str, str] = {}  # file: the reason

FILES = sorted(path.relative_to(REPOSITORY).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str | None:
    """phijax.data.rows -> data; phijax -> None."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(file: str) -> list[tuple[int, str]]:
    """(line, module) of every import anywhere in a file; `from phijax.data import rows` is phijax.data.rows."""
    found = []
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((node.lineno, inner if module_exists(inner) else node.module))
    return found


def module_exists(module: str) -> bool:
    path = REPOSITORY / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def own_imports(file: str) -> list[tuple[int, str]]:
    return [(line, module) for line, module in imports(file) if module.split(".")[0] == "phijax"]


def violations(files: list[str], steps: list[set[str]]) -> list[str]:
    """Every import that does not run down."""
    height = {room: number for number, rooms in enumerate(reversed(steps)) for room in rooms}
    out = []
    for file in files:
        room = room_of(module_of(file))
        for line, module in own_imports(file):
            target = room_of(module)
            if target == room or target is None or (file, module) in IMPORT_EXCEPTIONS:
                continue
            if target not in height or height[target] >= height[room]:
                out.append(f"{file}:{line} imports {module}")
    return out


def test_imports_run_down():
    assert violations(FILES, STEPS) == []


def test_every_room_has_its_step_once():
    rooms = {room_of(module_of(file)) for file in FILES} - {None}
    placed = list(itertools.chain(*STEPS))
    assert len(placed) == len(set(placed))
    assert rooms <= set(placed), f"not on any step: {rooms - set(placed)}"


def test_the_check_sees_an_upward_import_and_one_along_a_step():
    turned = [*STEPS[:5], *reversed(STEPS[5:])]
    assert any("phijax/training/program.py" in line for line in violations(FILES, turned))
    joined = [*STEPS[:6], STEPS[6] | STEPS[7], *STEPS[8:]]  # inference beside data and interchange
    assert any("phijax/inference/" in line for line in violations(FILES, joined))


def private_imports(file: str) -> list[str]:
    """Underscore names of another room (a folder of phijax/) that a file takes, by import or through a module."""
    tree, room = ast.parse((REPOSITORY / file).read_text()), pathlib.PurePath(file).parent
    others, out = {}, []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("phijax"):
            continue
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            home = pathlib.PurePath((inner if module_exists(inner) else node.module).replace(".", "/")).parent
            if home != room and alias.name.startswith("_"):
                out.append(f"{file}:{node.lineno} imports {inner}")
            elif home != room and module_exists(inner):
                others[alias.asname or alias.name] = inner
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and isinstance(node.value, ast.Name):
            if node.value.id in others:
                out.append(f"{file}:{node.lineno} takes {others[node.value.id]}.{node.attr}")
    return out


def test_no_room_takes_what_another_keeps_to_itself():
    assert [line for file in FILES for line in private_imports(file)] == []


def test_the_check_sees_an_underscore_name(tmp_path, monkeypatch):
    (tmp_path / "phijax" / "data").mkdir(parents=True)
    text = "from phijax.run.start import _flag\nfrom phijax.run import start as s\nx = s._facts\ny = s.open_start\n"
    (tmp_path / "phijax" / "data" / "one.py").write_text(text)
    (tmp_path / "phijax" / "run").mkdir()
    (tmp_path / "phijax" / "run" / "start.py").touch()
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    assert private_imports("phijax/data/one.py") == [
        "phijax/data/one.py:1 imports phijax.run.start._flag",
        "phijax/data/one.py:3 takes phijax.run.start._facts",
    ]


def test_no_import_goes_in_a_circle():
    """Between files, inside rooms too. Imports inside functions count: they only hide a circle."""
    below = {module_of(file): {module for _, module in own_imports(file)} - {module_of(file)} for file in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in below.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in below:
        visit(module, ())


def test_exceptions_are_needed_and_have_reasons():
    for (file, module), reason in IMPORT_EXCEPTIONS.items():
        assert reason and module in {name for _, name in own_imports(file)}, f"{file} no longer imports {module}"
    for file, reason in LENGTH_EXCEPTIONS.items():
        assert reason and count_lines(file) > LONGEST, f"{file} is short again"


def count_lines(file: str) -> int:
    return len((REPOSITORY / file).read_text().splitlines())


def test_files_hold_one_subject():
    tests = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "tests").rglob("*.py"))
    long = {file: count_lines(file) for file in [*FILES, *tests] if count_lines(file) > LONGEST}
    assert set(long) == set(LENGTH_EXCEPTIONS), f"past {LONGEST} lines: {long}. Name their subjects and part them."


def imported_test_modules(tests: pathlib.Path) -> list[str]:
    """Where a test module, or a child's program in its text, imports another test module, or itself."""
    found = []
    for path in sorted(tests.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.match(r"\s*(from (\w+\.)*test_\w+ import|import (\w+\.)*test_\w+)", line):
                found.append(f"{path.relative_to(tests).as_posix()}:{number}")
    return found


def test_no_test_imports_a_test():
    """Its tests would be collected twice, or its fixtures run; what several need is a module of its own beside them."""
    assert imported_test_modules(REPOSITORY / "tests") == []


def test_the_check_sees_a_test_that_imports_a_test(tmp_path):
    (tmp_path / "test_one.py").write_text('import test_two\nCHILD = """\nfrom room.test_one import CHILD\n"""\n')
    (tmp_path / "case.py").write_text("from tested import test\nimport real\n")
    assert imported_test_modules(tmp_path) == ["test_one.py:1", "test_one.py:3"]


def test_rooms_are_nouns_with_a_subject():
    names = {part for file in FILES for part in pathlib.PurePath(file).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "helpers", "misc", "base", "core"}


@pytest.mark.parametrize("file", FILES)
def test_nothing_runs_what_it_reads(file):
    """No pickle in any guise and no eval: files and messages may come from anybody."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "cPickle"}
    assert not {module.split(".")[0] for _, module in imports(file)} & forbidden
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert not (isinstance(node.func, ast.Name) and called in {"eval", "exec", "compile", "__import__"}), file
            for keyword in node.keywords:
                assert keyword.arg != "allow_pickle" or getattr(keyword.value, "value", True) is False, file
                assert keyword.arg != "shell" or getattr(keyword.value, "value", True) is False, file


def test_importing_starts_no_backend():
    """Neither `import phijax` nor any module of it: a backend that starts too early takes the wrong devices."""
    modules = [module_of(file) for file in FILES if not file.endswith("__main__.py")]
    program = f"""
import importlib, sys
import phijax
assert "jax" not in sys.modules, "import phijax imports jax"
for name in {modules}:
    importlib.import_module(name)
import jax
from jax._src import xla_bridge  # no public way to ask without starting one
assert not xla_bridge.backends_are_initialized(), "a backend was started by an import"
jax.devices()
assert xla_bridge.backends_are_initialized()
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def requirement_lines() -> list[str]:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


NOT_CALLED_AS_IMPORTED = {"llama_cpp": "llama-cpp-python"}  # where the package is not there to be asked


def distribution(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def test_requirements_are_the_one_list_of_dependencies(project):
    assert "dependencies" not in project["project"] and project["project"]["dynamic"] == ["dependencies"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    for line in requirement_lines():
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?[><=!~]=?[\w.,<>=!~]+(; python_version [<>=]+ \"3\.\d+\")?", line), line


def test_jax_and_flax_are_the_versions_of_each_python():
    """Each Python gets exactly one jax and one flax."""
    packaging = pytest.importorskip("packaging.requirements")
    requirements = [packaging.Requirement(line) for line in requirement_lines()]
    for python, jax_version, flax_version in (("3.11", "0.10.2", "0.12.8"), ("3.12", "0.11.2", "0.12.10")):
        chosen = [r for r in requirements if r.marker is None or r.marker.evaluate({"python_version": python})]
        versions = {"jax": jax_version, "flax": flax_version}
        for name, version in versions.items():
            (only,) = [r for r in chosen if r.name == name]
            assert only.specifier.contains(version)
    assert "0.11.2" not in next(r for r in requirements if "<" in str(r.marker) and r.name == "jax").specifier


def test_every_library_that_is_imported_is_required(project):
    """What phijax imports stands in requirements.txt, or in an extra when it is imported where it is needed."""
    providers = importlib.metadata.packages_distributions()
    extras = project["project"]["optional-dependencies"]
    required = {distribution(line) for line in requirement_lines()}
    ours = ("data", "tpu", "cuda", "wandb", "tokenizers", "gguf", "llama", "gcs")
    optional = {distribution(line) for name in ours for line in extras[name]}
    for file in FILES:
        at_import = {node.lineno for node in ast.parse((REPOSITORY / file).read_text()).body}
        for line, module in imports(file):
            top = module.split(".")[0]
            if top == "phijax" or top in sys.stdlib_module_names:
                continue
            names = {distribution(name) for name in providers.get(top, [NOT_CALLED_AS_IMPORTED.get(top, top)])}
            allowed = required if line in at_import else required | optional
            assert names & allowed, f"{file}:{line} imports {top} of {names}"


def test_every_requirement_is_used():
    providers = importlib.metadata.packages_distributions()
    modules = {module.split(".")[0] for file in FILES for _, module in imports(file)}
    used = {distribution(name) for module in modules for name in providers.get(module, [])}
    assert {distribution(line) for line in requirement_lines()} - used == set()
