"""Writes docs/configuration.md from the configuration's own models; a test keeps the two equal."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from cluster.config import RunConfig

INTRO = """# Configuration

A recipe is YAML; `key=value` behind it on the command line overrides (`learner.learning_rate=1e-4`, list items
by index: `experts.0.model=...`; the index after the last adds an item). Unknown keys are refused with the nearest
right one. `--dry-run` prints the whole resolved configuration and the plan of workers. This page is made by
`scripts/config_reference.py`.
"""


def sections(model: type[BaseModel], prefix: str) -> list[tuple[str, type[BaseModel]]]:
    """The model and every model inside it, with their places."""
    found = [(prefix, model)]
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if inspect.isclass(kind) and issubclass(kind, BaseModel):
                many = "[i]" if kind is not field.annotation and "tuple" in str(field.annotation) else ""
                found += sections(kind, f"{prefix}.{name}{many}" if prefix else f"{name}{many}")
    return found


def default_of(field: Any) -> str:
    """A field's default as YAML would show it."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "see below" if isinstance(default, BaseModel) else f"`{default!r}`"


def kind_of(field: Any) -> str:
    """A field's type, short enough for a table."""
    shown = str(field.annotation) if get_args(field.annotation) else field.annotation.__name__
    short = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", shown)
    return "`" + short.replace("|", "\\|") + "`"


def reference() -> str:
    """The page."""
    parts = [INTRO]
    for place, model in sections(RunConfig, ""):
        parts.append(f"## {'`' + place + '`' if place else 'A run'}\n")
        # A model's own words, and those of what it extends.
        for each in (model, *(base for base in model.__bases__ if base is not BaseModel)):
            parts.append(inspect.cleandoc(each.__doc__ or "") + "\n")
        rows = [f"| `{name}` | {kind_of(field)} | {default_of(field)} |" for name, field in model.model_fields.items()]
        parts.append("| key | type | default |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configuration.md").write_text(reference(), encoding="utf-8")
