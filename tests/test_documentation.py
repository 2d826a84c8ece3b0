"""Documentation that is made from code must be what the code makes."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from cluster import cli
from cluster.config import load
from experts.selfcheck import REMEDIES
from tests.hub_models import HUB_MODELS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def test_the_configuration_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))["reference"]()
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == made, "run: python scripts/config_reference.py"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_only_to_files_and_sections_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not section or section in sections(target), link


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_recipes_that_exist(page: str) -> None:
    named = set(re.findall(r"configs/[\w./-]+\.yaml", (ROOT / page).read_text(encoding="utf-8")))
    assert not [recipe for recipe in sorted(named) if not (ROOT / recipe).is_file()]


def sections(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_sizes_of_hub_models_are_what_their_shapes_make() -> None:
    text = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(tuple(f"| `{name}` |" for name in HUB_MODELS))]
    for row, model in zip(rows, HUB_MODELS.values(), strict=True):
        assert row.startswith(model.row()), model.name


def test_the_walk_through_s_commands_are_read_as_written() -> None:
    """What they do was tried by hand, with tiny models: whole runs are tested elsewhere."""
    text = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")
    block = text.partition("<!-- walk-through: start -->")[2].partition("<!-- walk-through: end -->")[0]
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("musketeers ")]
    known = set(typer.main.get_command(cli.app).commands)
    assert len(commands) >= 8 and {command[1] for command in commands} <= known
    for command in commands:
        settings = [word for word in command if word.partition("=")[1] and " " not in word]
        if command[1] == "train":
            config = load(ROOT / command[2], settings)
            assert all(model.startswith("zoo/composed/") for model in config.models().values())
        else:
            assert not settings


def test_the_dashboard_and_the_alerts_are_up_to_date() -> None:
    for name, made in runpy.run_path(str(ROOT / "scripts" / "monitoring_files.py"))["files"]().items():
        written = (ROOT / "docs" / "monitoring" / name).read_text(encoding="utf-8")
        assert written == made, "run: python scripts/monitoring_files.py"


def test_the_page_on_models_explains_every_refusal() -> None:
    """Every message of a model's error, and every reason against a policy, has its row."""
    page = " ".join((ROOT / "docs" / "models.md").read_text(encoding="utf-8").split())
    files = [*(ROOT / "experts").glob("*.py"), *(ROOT / "learner").glob("*.py")]
    for path in files:
        for said in refusals(ast.parse(path.read_text(encoding="utf-8"))):
            assert said in page, f"{path.name}: docs/models.md has no row for {said!r}"
    for name, remedy in REMEDIES.items():
        assert f"| `{name}` | {remedy} |" in page


def refusals(tree: ast.AST) -> list[str]:
    """The longest fixed part of each message, without punctuation at its ends."""
    errors = ("ModelError", "ChatError")
    raised = [n.args[0] for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") in errors]
    reasons = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("policy_refusal", "expert_refusal")
    ]
    returned = [n.value for reason in reasons for n in ast.walk(reason) if isinstance(n, ast.Return)]
    parts = [
        [part.value for part in ast.walk(message) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        for message in (*raised, *returned)
        if isinstance(message, ast.JoinedStr | ast.Constant)
    ]
    return [" ".join(max(texts, key=len).split()).strip(" :;,'()") for texts in parts if texts]
