"""Bundles through huggingface_hub itself, in a process of its own: it reads where the hub is when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.run.trained import BUNDLE
from tests.pipeline.fake_hub import TOKEN, FakeHub, fake_hub
from tests.pipeline.runs import made_up_run

ROOT = Path(__file__).parents[2]


class Session:
    """A user's shell, with a home and a hub."""

    def __init__(self, home: Path, hub: FakeHub) -> None:
        self.home, self.hub = home, hub
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))},
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def log_in(self) -> None:
        """As `hf auth login` does."""
        (self.home / "hf").mkdir(exist_ok=True)
        (self.home / "hf" / "token").write_text(TOKEN)

    def python(self, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs code with arguments."""
        command = [sys.executable, "-c", code, *arguments]
        both = {**self.environment, **environment}
        return subprocess.run(command, capture_output=True, text=True, env=both, timeout=120, check=False)

    def musketeers(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the command."""
        return self.python("from cluster.cli import main; main()", *arguments, **environment)

    def opened(self, *places: str, **environment: str) -> list[str]:
        """What comes of opening places."""
        done = self.python(OPEN, *places, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


OPEN = """
import sys
from cluster.run.trained import open_trained, router_folder
for place in sys.argv[1:]:
    try:
        found = open_trained(place)
        print(found.name, found.step, (router_folder(place) / "router.json").is_file())
    except ValueError as error:
        print(type(error).__module__, error)
"""


@pytest.mark.slow
def test_a_bundle_goes_up_and_comes_down(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "runs")
    with fake_hub() as hub:
        session = Session(tmp_path, hub)
        export = ("export", str(run), str(tmp_path / "bundle"), "--overwrite", "--push-to", "me/trio", "--private")
        refused = session.musketeers(*export)
        assert refused.returncode == 2 and "hf auth login" in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1 and not hub.files

        session.log_in()
        (tmp_path / "bundle" / "notes.txt").write_text("mine")
        done = session.musketeers(*export)
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/me/trio" in done.stdout
        assert set(hub.files["me/trio"]) == set(BUNDLE) and hub.private["me/trio"]

        hub.files["me/other"] = {"README.md": b"# something else"}
        revision = hub.revision("me/trio")
        good, pinned, other, absent, unknown = session.opened(
            "hub:me/trio", f"hub:me/trio@{revision}", "hub:me/other", "hub:me/none", "hub:me/trio@nowhere"
        )
        assert good == pinned == "trio 4 True"
        assert "cluster.run.trained hub:me/other is neither a run's folder" in other
        assert "cluster.run.hub hub:me/none: there is no such repository, or it is private" in absent
        assert "cluster.run.hub hub:me/trio@nowhere: the repository has no such revision" in unknown

    # The hub is gone now: what was downloaded is still there, and all else is one line.
    away = {"HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    cached, absent = session.opened("hub:me/trio", "hub:me/none", **away)
    assert cached == "trio 4 True"
    assert "hub:me/none: the hub cannot be reached, and there is no copy of it here" in absent
    (absent,) = session.opened("hub:me/none", HF_HUB_OFFLINE="1")
    assert "hub:me/none: the hub cannot be reached" in absent
    failed = session.musketeers(*export)
    assert failed.returncode == 2 and "the hub cannot be reached" in failed.stderr, failed.stderr
