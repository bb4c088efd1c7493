"""The layout's promises, read off the source: who imports whom, what is public, what must not be in a file."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ARROWS = {
    "models_zoo": set(),
    "train_torch": {"models_zoo"},
    "export": {"train_torch", "models_zoo"},
    "infer_tf": {"models_zoo"},
    "parity_tests": {"export", "train_torch", "models_zoo", "infer_tf"},
}
"""Folder -> folders of ours it may import, itself aside."""

PRODUCTION = {
    "models_zoo": {"numpy", "scipy", "soundfile", "soxr", "pydantic", "tqdm", "PIL", "av", "pandas", "sed_scores_eval"},
    "infer_tf": {
        "numpy",
        "soundfile",
        "tensorflow",
        "onnxruntime",
        "onnx",
        "pydantic",
        "tqdm",
        "matplotlib",
        "faiss",
        "PIL",
    },
}
"""Folder of the wheel -> libraries it may import; each comes with the wheel or one of its extras."""

BANNED = {"train_torch": {"tensorflow", "keras"}, "export": {"tensorflow", "keras"}}


def sources(*folders: str) -> list[Path]:
    """Return every Python file below ``folders`` of the checkout."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files in {folders}"
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_packages(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (top-level package, line) of every import, also inside functions and through import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; say the package's name"
            assert node.module is not None
            yield node.module.partition(".")[0], node.lineno
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0] if node.args else None
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value).partition(".")[0], node.lineno


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_point_one_way(folder):
    wrong = []
    for path in sources(folder):
        for package, line in imported_packages(ast.parse(path.read_text(encoding="utf-8"))):
            ours = package in ARROWS or package == "benchmarks"
            if (ours and package != folder and package not in ARROWS[folder]) or package in BANNED.get(folder, ()):
                wrong.append(f"{name_of(path)}:{line} imports {package}")
            if folder in PRODUCTION and not ours and package not in PRODUCTION[folder] | sys.stdlib_module_names:
                wrong.append(f"{name_of(path)}:{line} imports {package}, which no production extra brings")
    assert not wrong, "\n".join(wrong)


def test_the_import_reader_sees_every_form():
    code = "import a.b\nfrom c.d import e\ndef f():\n    import g\n    x.import_module('h.i')\n    __import__('j')\n"
    assert [package for package, _ in imported_packages(ast.parse(code))] == ["a", "c", "g", "h", "j"]


def test_matplotlib_waits_for_a_plot():
    for path in sources(*PRODUCTION):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            packages = (
                {package for package, _ in imported_packages(node)}
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else set()
            )
            assert "matplotlib" not in packages, f"{name_of(path)}:{node.lineno} imports matplotlib at module level"


def test_no_module_is_named_after_a_library():
    libraries = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    libraries -= {*ARROWS, "benchmarks"}
    wrong = [name_of(path) for path in sources(*ARROWS, "benchmarks") if path.stem in libraries]
    assert not wrong, f"these hide a library when their folder comes first on the path: {wrong}"


def library_modules() -> list[str]:
    """Return the dotted names of the modules that others import: not tests, not scripts."""
    names = []
    for path in sources("models_zoo", "infer_tf", "train_torch", "export"):
        script = 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
        if path.name not in ("__init__.py", "__main__.py") and not script:
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return names


@pytest.mark.parametrize("name", library_modules())
def test_public_names_are_declared(name):
    module = importlib.import_module(name)
    declared = getattr(module, "__all__", None)
    assert declared is not None, f"{name} has no __all__"
    assert sorted(set(declared)) == sorted(declared), f"{name}.__all__ repeats a name"
    assert [entry for entry in declared if not hasattr(module, entry)] == []
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    public = {entry for entry in defined if not entry.startswith("_")}
    assert public <= set(declared), f"{name}: public but not in __all__: {sorted(public - set(declared))}"


@pytest.mark.parametrize("package", ["models_zoo", "infer_tf", "train_torch", "export"])
def test_package_surface(package):
    module = importlib.import_module(package)
    assert [entry for entry in getattr(module, "__all__", ()) if not hasattr(module, entry)] == []


def undocumented(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """Yield the public functions, classes and methods below ``node`` that have no docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and child.name[0] != "_":
            marks = {getattr(mark, "attr", getattr(mark, "id", "")) for mark in child.decorator_list}
            if ast.get_docstring(child) is None and not marks & {"setter", "overload"}:
                yield f"{prefix}{child.name} (line {child.lineno})"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}{child.name}.")


def test_everything_public_has_a_docstring():
    missing = []
    for path in sources("models_zoo", "infer_tf", "train_torch", "export", "benchmarks"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.read_text(encoding="utf-8").strip() and ast.get_docstring(tree) is None:
            missing.append(f"{name_of(path)} (module)")
        missing += [f"{name_of(path)}: {entry}" for entry in undocumented(tree)]
    assert not missing, "\n".join(missing)


def test_production_checks_input_with_errors_not_asserts():
    """``python -O`` removes asserts. ``assert x is not None``, which narrows a type for mypy, checks no input."""
    wrong = []
    for path in sources("models_zoo", "infer_tf", "export", "train_torch"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                test = node.test
                narrows = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot) and len(test.ops) == 1
                if not narrows:
                    wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong, f"asserts in library code: {wrong}"


# Written with classes of one letter so that this file does not match itself.
FORBIDDEN = {
    "a path of somebody's machine": re.compile(rb"/(wor[k]|hom[e]|User[s]|tm[p]|roo[t]|mn[t])/[A-Za-z.]"),
    "the address of a package index": re.compile(rb"pypi\.or[g]/simple|pythonhoste[d]|download\.pytorc[h]", re.I),
    "a merge conflict": re.compile(rb"^(<<<<<<[<] |>>>>>>[>] )", re.M),
}


def shipped_files() -> list[Path]:
    """Return the files that belong to the project: tracked ones, or all of an unpacked sdist."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [Path(folder, name) for folder, _, names in os.walk(ROOT) for name in names]
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    """Also inside binary files: exported graphs can carry the paths of the machine that traced them."""
    wrong = []
    for path in shipped_files():
        match = FORBIDDEN[what].search(path.read_bytes())
        if match:
            wrong.append(f"{name_of(path)}: {match[0]!r}")
    assert not wrong, f"{what}: {wrong}"


def test_weights_stay_small():
    sizes = {path: path.stat().st_size for path in shipped_files()}
    weights = sum(size for path, size in sizes.items() if "weights" in path.parts)
    assert weights < 40e6, f"shipped weights are {weights / 1e6:.1f} MB; together they stay under 40 MB"
    others = {path: size for path, size in sizes.items() if "weights" not in path.parts}
    big = [f"{name_of(path)} {size / 1e6:.1f} MB" for path, size in others.items() if size > 4 << 20]
    assert not big, f"large files outside models_zoo/weights: {big}"
    audio = [name_of(path) for path in sizes if path.suffix.lower() in (".wav", ".flac", ".mp3", ".ogg")]
    assert not audio, f"recordings do not belong in the project: {audio}"
