"""The house rules of the README: which file imports which, and how wide a line may be."""

import ast
import graphlib
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("experiments/*.py"))
OURS = {path.stem for path in FILES}


def first_parts(module):
    """What `import module` imports of ours: `a.b` is "a", but `experiments.b` is also "b"."""
    parts = module.split(".")
    return parts[:2] if parts[0] == "experiments" else parts[:1]


def imported_names(tree):
    """The names of all modules that are imported anywhere in a file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.update(first_parts(alias.name))
        elif isinstance(node, ast.ImportFrom):
            names.update(first_parts(node.module))
            if node.module == "experiments":
                names.update(alias.name for alias in node.names)
    return names


IMPORTS = {
    path.stem: (imported_names(ast.parse(path.read_text(encoding="utf-8"))) & OURS) - {path.stem}
    for path in FILES
}


def reaches(module):
    """All of our modules that a module imports, directly or through others."""
    seen = set()
    waiting = [module]
    while waiting:
        for name in IMPORTS[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def test_imports_have_no_circle():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError


def test_the_losses_import_nothing_of_ours():
    assert IMPORTS["losses"] == set()


def test_the_backbones_know_nothing_of_the_method():
    """The DiT does not know that a reference branch exists."""
    method = {"rvedit", "losses", "train", "sample", "mllm", "convert", "weights"}
    for backbone in ("model", "vae", "qwen"):
        assert not reaches(backbone) & method


def test_weights_come_in_one_direction():
    """rvedit opens public layouts by convert, convert opens files by weights; none looks back."""
    assert "convert" in IMPORTS["rvedit"]
    assert "weights" in IMPORTS["convert"]
    assert not reaches("convert") & {"rvedit", "mllm", "train", "sample"}
    assert reaches("weights") <= {"cli"}


def test_nothing_at_the_top_level_needs_the_experiments():
    experiments = {path.stem for path in ROOT.glob("experiments/*.py")} | {"experiments"}
    for path in ROOT.glob("*.py"):
        assert not IMPORTS[path.stem] & experiments, path.name


def test_no_line_is_wider_than_100_columns():
    """ruff says so too, but lets lines pass that end in a long word."""
    wide = []
    for path in FILES + sorted(ROOT.glob("tests/**/*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if len(line) > 100:
                wide.append(f"{path.relative_to(ROOT)}:{number}")
    assert wide == []


def test_an_editable_installation_has_every_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    modules = project["tool"]["setuptools"]["py-modules"]
    assert modules == sorted(path.stem for path in ROOT.glob("*.py"))


def test_the_readme_lists_every_file():
    """In its tree, with a line on what each is for."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("```")
    listed = {line.split()[0] for block in tree for line in block.splitlines() if line.strip()}
    missing = [path.name for path in ROOT.glob("*.py") if path.name not in listed]
    assert missing == []


def defined_names(path):
    """What a file has at its top level, and the methods and fields of its classes."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_what_the_readme_names_beside_the_paper_is_there():
    """`file.name` or `file.Class.name`, in the tables that a reader of the paper follows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.split("## Read it with the paper")[1].split("## Edit")[0]
    files = {path.stem: defined_names(path) for path in FILES}
    lost, found = [], 0
    for reference in re.findall(r"`(?:experiments\.)?(\w+(?:\.\w+)+)`", part):
        module, *names = reference.split(".")
        if module in files and names != ["py"]:
            found += 1
            lost += [reference for name in names if name not in files[module]]
    assert not lost
    assert found > 20
