"""The house: who may import whom, what stands at the top of a file, who names a variant, and how long files may be."""

import ast
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.common import HERE


def module_of(file):
    return ".".join(file.relative_to(HERE).with_suffix("").parts)


# from the bottom up: a file imports from rooms below its own, and within its room without a circle
ROOMS = [
    {"irepa", "fid", "plumbing.files", "plumbing.processes", "plumbing.flags", "plumbing.methods"}
    | {"plumbing.interrupts"},
    {"inputs"},
    {"variants"},
    {"plumbing"},
    {"sample"},
    {"train"},
    {"experiments"},
]
LINES = {
    "irepa.py": 450,
    "train.py": 350,
    "sample.py": 320,
    "fid.py": 615,
    "test_irepa.py": 600,
    "variants/repa_e.py": 300,
    "README.md": 260,
}
OTHER_CODE = {"experiments.benchmark_official", "tests.processes"}  # import the official code, and copies of the tree
NOT_OURS = {"runs", "data", "venv", "site-packages"}
FIRST = """
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
"""
FILES = [
    file
    for file in sorted(HERE.rglob("*.py"))
    if not any(part in NOT_OURS or part.startswith(".") for part in file.relative_to(HERE).parts)
]
CODE = [file for file in FILES if not module_of(file).startswith(("tests.", "test_irepa"))]
PROGRAMS = [file for file in CODE if '\nif __name__ == "__main__":\n' in file.read_text()]
NAMELESS = [file for file in FILES if file.relative_to(HERE).parts[0] not in ("variants", "tests")]


def room_of(module):
    """The lowest room that names the module, or its folder."""
    return next(i for i, room in enumerate(ROOMS) if module in room or module.split(".")[0] in room)


def imports_of(file):
    """-> ({modules of ours at the top of the file}, {modules of ours inside of functions})."""
    tree, ours = ast.parse(file.read_text()), {module_of(f) for f in FILES}
    at_top = {id(node) for node in tree.body}
    top, late = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name} has a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        (top if id(node) in at_top else late).update(ours.intersection(names))
    return top, late


@pytest.mark.parametrize("file", CODE, ids=module_of)
def test_imports_go_one_way(file):
    top, late = imports_of(file)
    own = module_of(file)
    assert not late, f"{own} imports {late} inside a function"
    above = {other for other in top if room_of(other) > room_of(own)}
    assert not above, f"{own} imports {above}, which stand above it"
    if own in ("irepa", "fid"):
        assert not top
    if "importlib" in file.read_text():
        assert own == "plumbing.methods"  # which finds a method by its name


def test_no_circle():
    graph = {module_of(file): set.union(*imports_of(file)) for file in CODE}
    while leaves := [name for name, below in graph.items() if not below]:
        for name in leaves:
            del graph[name]
        graph = {name: below.difference(leaves) for name, below in graph.items()}
    assert not graph, f"a circle among {sorted(graph)}"


def test_test_irepa_needs_nothing_but_irepa():
    assert imports_of(HERE / "test_irepa.py") == ({"irepa"}, set())


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_stand_at_the_top(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert not re.search(r"#\s*noqa", text)
    tricks = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"]
    assert not tricks or module_of(file) in OTHER_CODE
    guards = ast.parse(FIRST).body if file.name == "fid.py" else []  # which stands alone
    nodes = [node for node in tree.body[1:] if ast.dump(node) not in map(ast.dump, guards)]  # behind the docstring
    kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes]
    assert ast.get_docstring(tree) and kinds == sorted(kinds, reverse=True)
    assert file.name != "__init__.py"  # folders of modules, no packages


@pytest.mark.parametrize("file", PROGRAMS, ids=module_of)
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(file, tmp_path):
    (tmp_path / "torch.py").write_text(f"import os, time; os.kill(os.getpid(), {signal.SIGINT:d}); time.sleep(9)")
    command = [sys.executable, "-m", module_of(file)]
    how = dict(env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=HERE, capture_output=True)
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a script may have it ignored
    ended = subprocess.run(command, **how)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def test_whoever_imports_a_program_sees_their_own_ctrl_c(tmp_path):
    (tmp_path / "mine.py").write_text("import sample, train, fid\nraise KeyboardInterrupt")
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    ended = subprocess.run([sys.executable, tmp_path / "mine.py"], env=env, capture_output=True, text=True)
    assert ended.stderr.startswith("Traceback") and ended.returncode == -signal.SIGINT


@pytest.mark.parametrize("file", NAMELESS, ids=module_of)
def test_no_other_file_names_a_variant(file):
    names = [f.stem.replace("_", "[-_ ]?") for f in (HERE / "variants").glob("*.py")]
    assert len(names) >= 3 and not re.findall(rf"(?i)\b(?:{'|'.join(names)})\b", file.read_text())


@pytest.mark.parametrize("name", LINES)
def test_files_for_reading_stay_short(name):
    assert len((HERE / name).read_text().splitlines()) <= LINES[name]


def test_the_loop_fits_on_a_page():
    loop = next(n for n in ast.parse((HERE / "train.py").read_text()).body if getattr(n, "name", "") == "train")
    assert loop.end_lineno - loop.lineno < 90
