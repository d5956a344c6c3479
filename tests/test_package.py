"""What holds for the whole package: cheap imports, no second copies, nothing that runs code from files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hotcold
from hotcold.cli import COMMANDS

ROOT = Path(__file__).parents[1]
FOLDERS = ("model", "predictor", "runtime", "convert", "eval", "sparsify")
SOURCES = sorted(
    [*(ROOT / "src/hotcold").rglob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))]
)
HEAVY = ("torch", "transformers", "numpy", "sklearn", "llama_cpp")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds once `code` has run there."""
    report = "\nimport sys; print('MODULES', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in result.stdout.split("MODULES", 1)[1].split()}


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import hotcold, hotcold.cli").intersection(HEAVY)


@pytest.mark.parametrize("folder", FOLDERS)
def test_importing_a_folder_loads_no_torch(folder):
    assert not modules_after(f"import hotcold.{folder}").intersection(("torch", "transformers"))


@pytest.mark.parametrize("name", ["runtime", "convert"])
def test_runtime_and_convert_need_no_torch(name):
    """Every module of theirs but those of devices, and the reference engine, which is to be plain torch."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / name).rglob("*.py")]
    pickles = "convert/powerinfer/pickle_child"
    with_torch = ("runtime/gpu/", "runtime/triton/", "runtime/reference", "runtime/placement/costs", pickles)
    modules = [path.as_posix() for path in paths if path.name != "__init__"]
    modules = [module for module in modules if not module.startswith(with_torch)]
    imports = "\n".join(f"import hotcold.{module.replace('/', '.')}" for module in modules)
    assert not modules_after(imports).intersection(("torch", "transformers"))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_no_torch(arguments):
    call = f"try: main({arguments})\nexcept SystemExit as end: assert end.code == 0"
    assert not modules_after(f"from hotcold.cli import main\n{call}").intersection(HEAVY)


def test_the_folders_are_no_top_level_modules():
    """`import runtime` would make a second copy of `hotcold.runtime`, with classes of its own."""
    code = "".join(f"import hotcold.{folder}\n" for folder in FOLDERS)
    assert not modules_after(code).intersection(FOLDERS)
    assert not set(FOLDERS).intersection(sys.modules)


def test_what_the_package_offers_is_imported_when_it_is_asked_for():
    assert not modules_after("import hotcold; dir(hotcold)").intersection(HEAVY)
    from hotcold import Engine, load_bundle
    from hotcold.runtime.backends import load_bundle as where_it_is
    from hotcold.runtime.engine import Engine as contract

    assert (Engine, load_bundle) == (contract, where_it_is)
    with pytest.raises(ImportError, match="cannot import name 'Model'"):
        from hotcold import Model  # noqa: F401
    assert not modules_after("from hotcold import Engine, load_bundle").intersection(
        ("torch", "transformers")
    )


def test_type_checkers_find_every_module():
    """Editors and checkers see the package through `typings/`, where each module of it is a link."""
    links = {path.name: path.resolve() for path in (ROOT / "typings/hotcold").iterdir()}
    modules = {path.name: path for path in (ROOT / "src/hotcold").glob("*.py")}
    modules |= {path.parent.name: path.parent for path in (ROOT / "src/hotcold").glob("*/__init__.py")}
    assert links == modules | {folder: ROOT / folder for folder in FOLDERS}


def test_version_is_that_of_the_distribution():
    assert hotcold.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


UNPICKLING = ("torch.load(path, map_location='cpu', weights_only=True)",)
SANDBOX = ROOT / "convert/powerinfer/pickle_child.py"  # a process of its own; none but it may unpickle


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_can_run_code(path):
    """Pickles, `eval` and remote code are how model files attack their readers; none of it is ever called."""
    forbidden = re.compile(
        r"(eval|exec|compile|__import__|(torch|joblib|yaml|marshal|shelve|dill)\.(load|unsafe_load)"
        r"|(_|c)?[pP]ickle\..*|os\.system|pd\.read_pickle)"
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            allowed = path == SANDBOX and ast.unparse(node) in UNPICKLING
            assert allowed or not forbidden.fullmatch(_called(node)), f"line {node.lineno}: {_called(node)}"
            for keyword in node.keywords:
                risky = keyword.arg in ("allow_pickle", "trust_remote_code", "shell")
                assert not risky or ast.unparse(keyword.value) == "False", (
                    f"line {node.lineno}: {keyword.arg}"
                )
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}.intersection(names)


def test_the_sandbox_is_a_script_that_nothing_calls():
    """It is imported for its path alone, and what it imports is neither hotcold nor a way to a network."""
    tree = ast.parse(SANDBOX.read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {
        "__future__",
        "pathlib",
        "re",
        "resource",
        "safetensors.torch",
        "sys",
        "torch",
        "typing",
    }
    users = [path for path in SOURCES if "pickle_child" in path.read_text() and path != SANDBOX]
    assert users == [ROOT / "convert/powerinfer/pickles.py"]
    uses = [n for n in ast.walk(ast.parse(users[0].read_text())) if isinstance(n, ast.Attribute)]
    assert {ast.unparse(n) for n in uses if ast.unparse(n).startswith("pickle_child")} == {
        "pickle_child.__file__"
    }


def test_the_grep_above_would_find_something(tmp_path):
    for number, line in enumerate(
        ["import pickle", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval(x)"]
    ):
        path = tmp_path / f"{number}.py"
        path.write_text(line)
        with pytest.raises(AssertionError):
            test_no_file_can_run_code(path)


STAIRS = ("src", "model", "predictor sparsify", "convert", "runtime", "eval")  # from the lowest floor up


def floor_of(folder: str) -> int:
    return next(floor for floor, rooms in enumerate(STAIRS) if folder in rooms.split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_one_staircase(path):
    """eval → runtime → convert → predictor, sparsify → model → src/hotcold; rooms of one floor know nothing
    of each other. `cli` names its commands by text, and is above all; so does `hotcold` what it offers, but
    for type checkers."""
    folder, tree = path.relative_to(ROOT).parts[0], ast.parse(path.read_text())
    if path == ROOT / "src/hotcold/__init__.py":
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hotcold"):
            modules = [node.module] if "." in node.module else [f"hotcold.{a.name}" for a in node.names]
            for module in modules:
                other = module.split(".")[1]
                lower = other not in FOLDERS or other == folder or floor_of(other) < floor_of(folder)
                assert lower, f"line {node.lineno}: from {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_gguf_enters_through_one_reader(path):
    """The `gguf` package's reader and transformers' use of it trust the file; `files/gguf.py` does not."""
    text = path.read_text()
    assert not re.search(r"GGUFReader|gguf_file|gguf_reader", text)
    if path.relative_to(ROOT).parts[0] != "convert" and path.parent != ROOT / "src/hotcold/files":
        assert not re.search(r"^\s*(import gguf|from gguf)\b", text, re.MULTILINE)


def test_no_path_of_the_machine_it_was_written_on():
    """A checkout elsewhere does not notice; where a path slipped in, it is found."""
    places = [f"{ROOT.parent}/", f"{Path.home()}/", "/tmp/", "/home/", "/Users/"]
    for path in [*SOURCES, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]:
        text = path.read_text()
        assert not [place for place in places if len(place) > 2 and place in text], path
