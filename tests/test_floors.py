"""The rules of CONTRIBUTING.md that a program can check: imports run downward, rooms do not know each other, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "intervale"
FLOORS = {"core": 0, "data": 1, "model": 2, "engine": 3, "train": 4, "evaluate": 4, "export": 4, "serve": 4, "cli": 5}
OUTSIDE = {  # what a floor may not import, in any function
    "core": {"torch", "transformers", "peft", "numpy", "PIL", "tokenizers", "safetensors"},
    "data": {"torch", "transformers", "peft", "tokenizers", "safetensors"},
}
MODULES = sorted(SRC.rglob("*.py"))
MOST_LINES, MOST_IN_FUNCTION = 400, 60


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_run_downward(path: Path) -> None:
    room = room_of(path)
    if room not in FLOORS:  # __init__.py and __main__.py of the package
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "intervale" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room:
            assert FLOORS[parts[1]] < FLOORS[room], f"{path.name} ({room}) imports {name}"
        assert parts[0] not in OUTSIDE.get(room, set()), f"{path.name} ({room}) imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    if path.name == "__init__.py":
        assert text.strip() == "" or path.parent == SRC
        return
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it promises"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_IN_FUNCTION, f"{node.name} is too long"


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nsys.argv = ['intervale', '--help']\n"
        "from intervale.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert "prepare" in done.stdout
