"""Claims about the documents: what they say about the code is what the code says."""

import re
from pathlib import Path

import pytest

from app.__main__ import parser
from app.config_table import config_table, environment_table
from app.tags import GPU_FIGURES, HOST_FIGURES

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def section(name):
    """The text of README.md between `<!-- name -->` and `<!-- /name -->`."""
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.DOTALL)
    assert found, f"README.md has no section between <!-- {name} --> and <!-- /{name} -->"
    return found[1]


def test_the_table_of_config_keys_is_the_schema_s():
    """Paste: python -c 'from app.__main__ import parser
    from app.config_table import config_table; print(config_table())'."""
    assert section("config") == config_table()


def test_the_table_of_environment_variables_is_the_code_s():
    """Paste: python -c 'from app.__main__ import parser
    from app.config_table import environment_table; print(environment_table())'."""
    assert section("environment") == environment_table()


def test_the_table_of_tags_has_every_figure_of_the_machine():
    """In the rows of `gpu/` and `host/`, and no other figure."""
    rows = re.findall(r"^\| (`(gpu|host)/.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    for group, figures in (("gpu", GPU_FIGURES), ("host", HOST_FIGURES)):
        named = [name for row, of in rows if of == group for name in re.findall(r"(\w+)`", row)]
        assert sorted(named) == sorted(figures)


def test_the_map_names_every_module():
    """Each module of the application stands in the map of files by its name."""
    words = set(re.findall(r"[A-Za-z_][\w.-]*", section("map")))
    modules = {path.stem for path in (ROOT / "app").rglob("*.py")} - {"__init__"}
    assert sorted(modules - {word.removesuffix(".py") for word in words}) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_paths_in_a_document_exist(name):
    """Scripts, configs, modules and tests that a document names."""
    text = (ROOT / name).read_text()
    paths = set(re.findall(r"\b((?:scripts|configs|app|tests|docker)/[\w/.-]*\w)", text))
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_commands_in_a_document_exist(name):
    """`python -m app COMMAND` is a command."""
    for command in re.findall(r"python -m app (\w+)", (ROOT / name).read_text()):
        with pytest.raises(SystemExit) as caught:
            parser().parse_args([command, "--help"])
        assert caught.value.code == 0, command
