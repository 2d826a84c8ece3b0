"""The wheel that a job carries: whole, installable with nothing around it, and named after its contents."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cluster
from cluster.jobs import wheel

ROOT = Path(__file__).parents[2]


def test_it_installs_without_an_index_and_wins_over_what_is_installed(tmp_path: Path) -> None:
    made = wheel.build(tmp_path)
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    subprocess.run([*install, str(made), f"--target={target}"], check=True)
    script = (
        "import json, cluster.cli, experts, learner, rewards, rollout\n"
        "from cluster.zoo.recipe import worlds\n"
        "from importlib.metadata import version\n"
        "print(json.dumps([m.__file__ for m in (cluster.cli, experts, learner, rewards, rollout)]))\n"
        "print(worlds(), version('n-musketeers'))"
    )
    # A folder of the same name where the job starts must shadow nothing.
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "__init__.py").write_text("raise ImportError('shadowed')")
    said = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": "/usr/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    files, zoo = said.stdout.strip().splitlines()
    assert all(file.startswith(str(target)) for file in json.loads(files))
    assert "composed" in zoo and "0.1.0" in zoo


def test_it_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel.build(tmp_path)).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(wheel.PACKAGES)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "cluster").rglob("*.py")}
    assert own <= set(names)


def test_its_name_changes_with_its_contents_only(tmp_path: Path, monkeypatch) -> None:
    first, again = (wheel.build(made) for made in (tmp_path, tmp_path))
    assert first.name == again.name
    more = dict(wheel._sources()) | {"cluster/new.py": b"x = 1\n"}
    monkeypatch.setattr(wheel, "_sources", lambda: iter(more.items()))
    assert wheel.build(tmp_path).name != first.name
    assert Path(cluster.__path__[0]).is_dir()
