"""Claims about the code as a whole: who may import whom, who reads the environment, which keys are read."""

import ast
from pathlib import Path

import pytest

from app.config import Config
from app.config_fields import keys
from app.env import Environment
from app.env_variables import VARIABLES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "app").rglob("*.py"))
PACKAGES = ("data", "physics", "model", "train", "ops")
MAY_IMPORT = {
    "base": {"base"},
    "physics": {"base", "physics"},
    "data": {"base", "physics", "data"},
    "model": {"base", "physics", "model"},
    "train": {"base", "physics", "data", "model", "train"},
    "ops": {"base", "physics", "data", "model", "ops"},
    "top": {"base", "physics", "data", "model", "train", "ops", "top"},
}
BASE = {"config", "env", "errors", "log", "tags", "workspace"}
"""Modules below all packages, with those whose names begin with `config_` or `env_`; others of `app` are on top."""


def layer(module):
    """The layer of a dotted module name below `app`."""
    name = module.split(".")[1] if "." in module else ""
    if name in PACKAGES:
        return name
    return "base" if name in BASE or name.startswith(("config_", "env_")) or not name else "top"


def module_name(path):
    """`app/data/ct.py` as `app.data.ct`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree):
    """Every module of `app` that a syntax tree imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "app")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "app":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                path = ROOT / Path(*inner.split("."))
                yield inner if path.with_suffix(".py").exists() or path.is_dir() else node.module


TREES = {path: ast.parse(path.read_text()) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    """base <- physics <- data, model <- train, ops <- the commands; data and model, train and ops apart."""
    own = layer(module_name(path))
    wrong = [module for module in imports(TREES[path]) if layer(module) not in MAY_IMPORT[own]]
    assert wrong == [], f"{module_name(path)} is of the layer {own}"


def test_only_env_reads_the_environment():
    """`os.environ` and `os.getenv` stand in one module."""
    names = {"environ", "getenv", "environb", "putenv"}
    readers = {
        module_name(path)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
    }
    assert readers == {"app.env"}


def test_only_main_exits():
    """Errors are raised everywhere and turned into exit codes in one place."""
    exits = {
        module_name(path)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "quit")
    }
    assert exits <= {"app.__main__"}


def test_weights_are_loaded_without_code():
    """Every torch.load says weights_only=True."""
    unsafe = [
        f"{module_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    ]
    assert unsafe == []


def test_every_config_key_is_read():
    """A key that nothing reads is a promise that nothing keeps."""
    read = {
        node.attr
        for path, tree in TREES.items()
        if path.name != "config.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Properties of the schema read some keys for the others.
    schema = ast.parse((ROOT / "app/config.py").read_text())
    for node in ast.walk(schema):
        if isinstance(node, ast.FunctionDef) and node.name in read:
            read |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
    assert [key.name for key in keys() if key.path[-1] not in read] == []


def test_every_config_key_has_a_meaning():
    """One sentence under each field: it is the table in the README."""
    assert [key.name for key in keys() if not key.meaning] == []


def test_every_variable_of_the_table_is_a_field_of_the_environment():
    """And the other way round."""
    fields = set(Environment.__dataclass_fields__) - {"secrets", "warnings"}
    assert {variable.name.lower() for variable in VARIABLES} == fields


def test_the_code_is_ascii_and_the_files_are_small():
    """No file of the application over 400 lines, no character outside ASCII."""
    assert [module_name(path) for path in FILES if not path.read_text().isascii()] == []
    assert [module_name(path) for path in FILES if len(path.read_text().splitlines()) > 400] == []


def test_the_schema_is_frozen():
    """A config is a value."""
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3
