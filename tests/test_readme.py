"""README and docs stay true: their commands exist with these options, and both languages show the same ones."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from intervale.cli.main import app
from intervale.core.config import load_recipe
from intervale.train.recipe import TrainRecipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(path: Path) -> list[list[str]]:
    """Every `intervale ...` line of the page's bash blocks (or of a shell script), as words."""
    text = path.read_text()
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S) if path.suffix == ".md" else [text.replace("\nstep ", "\n")]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("intervale ")]


def parse(words: list[str]) -> None:
    """Let click read the words as a user's; nothing runs."""
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command, info_name="intervale")
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.make_context(context.info_name, list(words), resilient_parsing=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_exists_with_its_options(page: Path) -> None:
    for words in commands_of(page):
        parse(words)


def test_both_languages_show_the_same_commands_and_numbers() -> None:
    assert commands_of(ROOT / "README.md") == commands_of(ROOT / "README.zh.md")
    assert len(commands_of(ROOT / "README.md")) > 8
    numbers = [re.findall(r"^\d.*points.*|^fixed \d.*", (ROOT / name).read_text(), re.M) for name in ("README.md", "README.zh.md")]
    assert len(numbers[0]) == 2
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid(recipe: Path) -> None:
    load_recipe(recipe, TrainRecipe)


def test_every_recipe_key_is_documented() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text()
    for section, field in TrainRecipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for name in [f"{section}.{key}" for key in inner] if inner else [section]:
            assert f"`{name}`" in text, name


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
