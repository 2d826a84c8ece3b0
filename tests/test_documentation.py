"""Documentation that is made from code must be what the code makes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_configuration_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "config_reference.py"))["reference"]()
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == made, "run: python scripts/config_reference.py"


def test_the_readme_names_only_files_that_exist() -> None:
    import re

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links), links


def test_the_dashboard_and_the_alerts_are_up_to_date() -> None:
    for name, made in runpy.run_path(str(ROOT / "scripts" / "monitoring_files.py"))["files"]().items():
        written = (ROOT / "docs" / "monitoring" / name).read_text(encoding="utf-8")
        assert written == made, "run: python scripts/monitoring_files.py"
