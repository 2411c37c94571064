"""The house: who may import whom, what stands at the top of a file, who names a variant, and how long files may be."""

import ast
import re

import pytest

from tests.common import HERE


def module_of(file):
    return ".".join(file.relative_to(HERE).with_suffix("").parts)


# from the bottom up: a file imports from rooms below its own, and within its room without a circle
ROOMS = [
    {"irepa", "fid", "plumbing.files", "plumbing.processes", "plumbing.flags", "plumbing.methods"},
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
FILES = [
    file
    for file in sorted(HERE.rglob("*.py"))
    if not any(part in NOT_OURS or part.startswith(".") for part in file.relative_to(HERE).parts)
]
CODE = [file for file in FILES if not module_of(file).startswith(("tests.", "test_irepa"))]
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
    kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body[1:]]  # behind the docstring
    assert ast.get_docstring(tree) and kinds == sorted(kinds, reverse=True)
    assert file.name != "__init__.py"  # folders of modules, no packages


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
