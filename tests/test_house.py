"""Rules that the whole package keeps, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from marks import RUNTIME, SLOW, marks

from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.factorize.methods import METHODS

PACKAGE = Path(__file__).resolve().parents[1] / "mobe_gguf"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: A function longer than this, or with more parameters, says why in a comment right above it: ``# long: ...``, ``# wide: ...``.
LINES, PARAMETERS = 80, 8


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"


def narrows(test: ast.expr) -> bool:
    """``x is not None``, ``isinstance(x, T)``, or several of these: what they rule out fails in the next line anyway."""
    if isinstance(test, ast.BoolOp):
        return all(map(narrows, test.values))
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def is_checked(source: str) -> bool:
    statement = ast.parse(source).body[0]
    return isinstance(statement, ast.Assert) and not narrows(statement.test)


def test_nothing_is_checked_by_assert() -> None:
    """``python -O`` leaves asserts out: data are checked by ``raise``, asserts only tell the type checker what is known."""
    assert is_checked("assert written == n") and is_checked("assert x is not None and x > 1")
    assert not is_checked("assert x is not None and isinstance(y, int), 'why'")
    found = [
        place(path, node)
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert) and not narrows(node.test)
    ]
    assert not found


def prints(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        name = node.func if isinstance(node, ast.Call) else None
        if name is not None and ast.unparse(name) in ("print", "console.print", "click.echo"):
            yield place(path, node)


def test_only_the_command_line_prints() -> None:
    """Library code raises and returns; its progress and warnings go through ``core/progress``.

    A module that is a program of its own, of which another process reads what it prints, may print.
    """
    allowed = {
        PACKAGE / "core" / "progress.py",
        *PACKAGE.rglob("report.py"),
        *(PACKAGE / "cli").rglob("*.py"),
    }
    allowed |= {path for path in MODULES if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")}
    assert any(map(list, map(prints, allowed)))
    assert not [line for path in MODULES if path not in allowed for line in prints(path)]


def too_much(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """``long``, ``wide`` or both; a docstring is no line of code, ``self`` no parameter."""
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    named = [*node.args.posonlyargs, *node.args.args]
    own = named[1:] if named and named[0].arg in ("self", "cls") else named
    n_lines, n_parameters = (node.end_lineno or 0) - first.lineno + 1, len(own) + len(node.args.kwonlyargs)
    return ["long"] * (n_lines > LINES) + ["wide"] * (n_parameters > PARAMETERS)


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A click command's parameters are its options, of which click gives each by its name."""
    return any(ast.unparse(d).startswith("click.command") for d in node.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_short_and_narrow(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for what in too_much(node):
                if what == "wide" and is_command(node):
                    continue
                above = min([node, *node.decorator_list], key=lambda n: n.lineno).lineno - 2
                assert f"# {what}: " in lines[above], f"{place(path, node)}: {node.name} is too {what}"


def test_marks_name_tests_that_exist() -> None:
    """Every folder, file and test of ``marks``; and no test is of two kinds."""
    tests = Path(__file__).parent
    for place in (*RUNTIME, *SLOW):
        file, _, name = place.partition("::")
        assert (tests / file).exists(), place
        if name:
            found = [n.name for n in ast.walk(tree(tests / file)) if isinstance(n, ast.FunctionDef)]
            assert name in found, place
    assert marks("export/test_shards.py::test_killed") == ("runtime", "slow")
    assert marks("core/test_names.py::test_x") == ("unit",)
    assert marks("models/test_gguf_source.py::test_x") == ("runtime",)


@cache
def classes() -> dict[str, list[tuple[Path, ast.ClassDef]]]:
    """Every class of the package by its name."""
    found: dict[str, list[tuple[Path, ast.ClassDef]]] = {}
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append((path, node))
    return found


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def has_constructor(name: str, known: dict[str, list[tuple[Path, ast.ClassDef]]]) -> bool:
    """Whether a class of that name, or one that it inherits from, has a constructor of its own."""
    return any(
        constructor(node) is not None
        or any(has_constructor(b, known) for b in map(ast.unparse, node.bases) if b != name)
        for _, node in known.get(name, ())
    )


def skips(node: ast.ClassDef, known: dict[str, list[tuple[Path, ast.ClassDef]]]) -> bool:
    """Whether its constructor leaves out that of its parents."""
    own = constructor(node)
    parents = any(has_constructor(ast.unparse(base), known) for base in node.bases)
    return own is not None and parents and "super().__init__(" not in ast.unparse(own)


def test_no_class_skips_the_constructor_it_inherits() -> None:
    source = "class A:\n def __init__(self): pass\nclass B(A): pass\nclass C(B):\n def __init__(self): {}"
    for body, expected in (("pass", True), ("A.__init__(self)", True), ("super().__init__()", False)):
        nodes = ast.parse(source.format(body)).body
        known = {n.name: [(Path(), n)] for n in nodes if isinstance(n, ast.ClassDef)}
        assert skips(known["C"][0][1], known) is expected
    known = classes()
    found = [place(path, node) for pairs in known.values() for path, node in pairs if skips(node, known)]
    assert not found


def constants(node: ast.expr) -> Iterator[str]:
    """Strings that are compared with: the operand itself, or members of a tuple."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for part in getattr(node, "elts", ()):
        yield from constants(part)


def compared(source: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    for node in ast.walk(source):
        if isinstance(node, ast.Compare):
            for operand in (node.left, *node.comparators):
                yield from ((node, word) for word in constants(operand))
        elif isinstance(node, ast.MatchValue):
            yield from ((node.value, word) for word in constants(node.value))


def test_no_names_of_projections_or_methods_are_compared() -> None:
    """``core/sides``, ``models/layout`` and ``factorize/methods`` say what differs between them, as data."""
    words = {*ALL_PROJECTIONS, *METHODS} - {"mobe"}  # which is a form of file, a word in names and a key, too
    assert [w for _, w in compared(ast.parse("x == 'down' or 'gate' in y or z in ('up', 'w')")) if w in words]
    found = [place(path, node) for path in MODULES for node, word in compared(tree(path)) if word in words]
    assert not found
    rooms = [PACKAGE / "factorize", PACKAGE / "models", PACKAGE / "quant"]
    inner = [path for path in MODULES if any(room in path.parents for room in rooms)]
    assert not [place(path, node) for path in inner for node, word in compared(tree(path)) if word in METHODS]


def test_what_holds_a_model_is_not_asked_for_its_class() -> None:
    """What differs between directories, GGUF files and kinds of factors is a method or an attribute of theirs."""
    known = classes()
    kinds = {"Tensors", "GgufModel", "GgufCheckpoint"}
    while more := {
        name
        for name, pairs in known.items()
        for _, node in pairs
        if any(ast.unparse(base) in kinds for base in node.bases) and name not in kinds
    }:
        kinds |= more
    assert {"Checkpoint", "MobeCheckpoint", "WabCheckpoint", "GgufFactors"} <= kinds
    found = [
        place(path, node)
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and any(isinstance(n, ast.Name) and n.id in kinds for n in ast.walk(node.args[1]))
    ]
    assert not found


#: Verbs of their modules, which are called as ``module.verb`` or by one command each.
VERBS = {"check", "describe", "plot", "render", "resolve", "rounded", "run", "settle", "summary", "write"}


def test_a_name_has_one_meaning() -> None:
    """No two classes of the package share a name, nor two functions that other modules import by name."""
    public = {name: pairs for name, pairs in classes().items() if not name.startswith("_")}
    shared = {name: [place(*pair) for pair in pairs] for name, pairs in public.items() if len(pairs) > 1}
    assert not shared
    homes: dict[str, set[str]] = {}
    for path in MODULES:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef):
                homes.setdefault(node.name, set()).add(module)
    imported: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    if node.module in homes.get(alias.name, ()):
                        imported.setdefault(alias.name, set()).add(node.module)
    assert imported["side"] == {"mobe_gguf.core.sides"}
    found = {name: modules for name, modules in imported.items() if len(modules) > 1}
    assert set(found) <= VERBS, found
