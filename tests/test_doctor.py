"""The doctor's findings, on real folders, sockets and package metadata."""

from __future__ import annotations

import io
import os
import socket
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.jobs import doctor
from cluster.jobs.doctor import Check, checks, report
from learner import compiled
from learner.compiled import drop_stale_lock, stale_lock
from learner.engine import import_deepspeed


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs the metadata of a distribution `declared` with the given requirements."""

    def install(*requirements: str, python: str = ">=3.11") -> None:
        folder = tmp_path / "site" / "declared-1.0.dist-info"
        folder.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", "Name: declared", "Version: 1.0", f"Requires-Python: {python}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(folder.parent)

    return install


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where torch would keep the op, with ninja and a compiler at hand and no GPU."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "_compiler", lambda: Check("compiler", True, "c++"))
    folder = doctor.op_folder()
    folder.mkdir(parents=True)
    return folder


def examine(folder: Path, distribution: str = "declared", address: str | None = None) -> dict[str, Check]:
    found = checks(runs=folder / "runs", zoo=folder / "zoo", address=address, distribution=distribution)
    return {check.name: check for check in found}


def show(found: list[Check]) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    return report(found, console), console.file.getvalue()


def test_versions_inside_and_outside_their_range(tmp_path, declare):
    declare("pytest>=1", "packaging<1", "no-such-package>=2", 'absent; extra == "gpu"')
    found = examine(tmp_path)
    assert found["pytest"].ok
    assert not found["packaging"].ok and found["packaging"].remedy == 'pip install "packaging<1"'
    assert not found["no-such-package"].ok and "not installed" in found["no-such-package"].detail
    assert "absent" not in found


def test_a_local_version_is_inside_the_range_of_its_release(declare, tmp_path):
    import torch

    release = torch.__version__.split("+")[0]
    declare(f"torch>={release},<={release}")
    assert examine(tmp_path)["torch"].ok


def test_unsupported_python(tmp_path, declare):
    declare(python=">=3.99")
    assert not examine(tmp_path)["Python"].ok


def test_a_distribution_that_is_not_installed_is_a_finding(tmp_path):
    found = examine(tmp_path, distribution="never-installed")
    assert not found["never-installed"].ok and found["never-installed"].remedy == "make install"


def test_folders_that_can_be_made_pass_and_nothing_is_left_behind(tmp_path, declare):
    declare()
    found = examine(tmp_path / "deep" / "deeper")
    assert found["runs folder"].ok and found["zoo cache"].ok
    assert not (tmp_path / "deep").exists()


def test_a_folder_below_a_file_fails(tmp_path, declare):
    declare()
    (tmp_path / "file").write_text("")
    found = examine(tmp_path / "file")
    assert not found["runs folder"].ok and not found["zoo cache"].ok


def test_too_little_memory_and_disk(tmp_path, declare, monkeypatch):
    declare()
    monkeypatch.setattr(doctor, "MIN_MEMORY_GIB", 1e9)
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    found = examine(tmp_path)
    assert not found["memory"].ok and not found["disk"].ok


def test_no_compiler_names_the_package(tmp_path, declare, monkeypatch):
    declare()
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = examine(tmp_path)["compiler"]
    assert not found.ok and "g++" in found.remedy


@pytest.mark.parametrize("form", ["{host}:{port}", "ray://{host}:{port}", "http://{host}:{port}"])
def test_ray_address_that_answers_and_the_same_one_closed(tmp_path, declare, form):
    declare()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(host="127.0.0.1", port=server.getsockname()[1])
        assert examine(tmp_path, address=address)["Ray"].ok
    assert not examine(tmp_path, address=address)["Ray"].ok


@pytest.mark.parametrize("address", ["nonsense", "host:port", "auto"])
def test_ray_addresses_that_lead_nowhere(tmp_path, declare, monkeypatch, address):
    declare()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    found = examine(tmp_path, address=address)["Ray"]
    assert not found.ok and "ray start" in found.remedy


def test_ray_is_left_out_without_an_address_and_taken_from_the_environment(tmp_path, declare, monkeypatch):
    declare()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "Ray" not in examine(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert "Ray" in examine(tmp_path)


def test_auto_is_read_from_rays_own_file(tmp_path, declare, monkeypatch):
    declare()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{server.getsockname()[1]}\n")
        assert examine(tmp_path, address="auto")["Ray"].ok


def test_a_lock_is_stale_only_when_nobody_holds_it(tmp_path):
    assert stale_lock(tmp_path) is None
    lock = tmp_path / "lock"
    with lock.open("x"):
        assert stale_lock(tmp_path) is None
    assert stale_lock(tmp_path) == lock


def test_a_killed_build_s_lock_is_dropped_before_a_learner_starts_and_a_living_one_s_is_not(built):
    lock = built / "lock"
    with lock.open("x"):
        import_deepspeed()
        assert lock.exists()
    os.utime(lock, (0, 0))
    import_deepspeed()
    assert not lock.exists()
    assert drop_stale_lock() is None


def test_a_young_lock_may_be_another_machine_s_and_is_waited_for(built, monkeypatch):
    monkeypatch.setattr(compiled, "LONGEST_BUILD_S", 1.5)
    lock = built / "lock"
    lock.touch()
    began = time.monotonic()
    assert drop_stale_lock() == lock.resolve()
    assert time.monotonic() - began > 1.0


def test_a_stale_lock_fails_the_op(built):
    (built / "lock").touch()
    found = doctor._deepspeed_op()
    assert not found.ok and "prebuild_deepspeed" in found.remedy


def test_the_op_counts_as_prebuilt_only_when_built_from_this_environment(built):
    import deepspeed.ops  # noqa: F401 - fails here rather than below where DeepSpeed is missing

    own = Path(sys.modules["deepspeed"].__file__).parent
    (built / f"{doctor.OP}.so").touch()
    for source, answer in ((own, "prebuilt"), (Path("/elsewhere/deepspeed"), "not built")):
        (built / "build.ninja").write_text(f"build shm.o: compile {source}/ops/csrc/cpu/comm/shm.cpp\n")
        found = doctor._deepspeed_op()
        assert found.ok and found.detail.startswith(answer)


def test_the_op_cannot_be_built_without_a_compiler(built, monkeypatch):
    monkeypatch.setattr(doctor, "_compiler", lambda: Check("compiler", False, "none"))
    assert not doctor._deepspeed_op().ok


def test_op_folder_is_where_torch_builds(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = doctor.op_folder()
    assert folder.is_relative_to(tmp_path)
    assert folder == Path(_get_build_directory(doctor.OP, verbose=False))


def test_an_exception_inside_a_check_becomes_a_finding(tmp_path, declare, monkeypatch):
    declare()
    monkeypatch.setattr(doctor, "_gpus", lambda: 1 / 0)
    found = examine(tmp_path)
    assert not found["GPUs"].ok and "ZeroDivisionError" in found["GPUs"].detail
    assert found["memory"].detail


def test_report_exits_with_0_only_when_all_passed_and_shows_the_remedies_of_failures():
    fine = Check("ray[default]", True, "2.60", "unneeded")
    broken = Check("g++", False, "missing", "apt-get install g++")
    status, text = show([fine])
    assert status == 0 and "ray[default]" in text and "unneeded" not in text
    status, text = show([fine, broken])
    assert status == 1 and "apt-get install g++" in text and "1 of 2 checks failed" in text
