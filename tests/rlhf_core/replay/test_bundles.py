"""Bundles: equal content, equal bytes; and whatever somebody else may have put into one is refused."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from rlhf_core.contracts.errors import IntegrityError, RlhfError, UserError
from rlhf_core.contracts.records import seal
from rlhf_core.replay.bundles import (
    FORMAT,
    RECORD,
    BundleRecord,
    File,
    read_bundle_record,
    unpack_bundle,
    write_bundle,
)

EMPTY = BundleRecord(
    format=FORMAT, run="mine", iteration=7, vocab_size=10, with_models=False, models={}, templates={}, prompt_rows=(),
    num_prompts=0, files={},
)  # fmt: skip
NAMES = {"run/run.json": b"{}\n", "run/iterations/000007/01_prompts.arrow": bytes(range(256)) * 40}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return made(tmp_path, tmp_path / "a.rlhf.zip")


def made(folder: Path, out: Path) -> Path:
    sources: dict[str, Path] = {}
    for index, (name, data) in enumerate(NAMES.items()):
        sources[name] = folder / f"source{index}"
        sources[name].write_bytes(data)
    write_bundle(out, sources, EMPTY)
    return out


def unpacked(bundle: Path) -> dict[str, bytes]:
    folder = bundle.parent / "unpacked"
    folder.mkdir()
    unpack_bundle(bundle, folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestRoundTrip:
    def test_everything_comes_back(self, bundle: Path) -> None:
        assert unpacked(bundle) == NAMES
        record = read_bundle_record(bundle)
        assert (record.run, record.iteration, record.num_bytes) == ("mine", 7, 3 + 256 * 40)
        assert record.contents() == [
            {"part": "run/iterations/000007", "files": 1, "bytes": 256 * 40},
            {"part": "run", "files": 1, "bytes": 3},
        ]

    def test_equal_content_equal_bytes(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        assert made(tmp_path / "other", tmp_path / "b.rlhf.zip").read_bytes() == bundle.read_bytes()

    def test_any_zip_program_opens_it(self, bundle: Path) -> None:
        with zipfile.ZipFile(bundle) as archive:
            assert archive.testzip() is None
            assert sorted(archive.namelist()) == sorted([RECORD, *NAMES])

    def test_a_file_of_that_name_stays(self, bundle: Path, tmp_path: Path) -> None:
        before = bundle.read_bytes()
        with pytest.raises(UserError, match="is there already; choose another name"):
            made(tmp_path, bundle)
        assert bundle.read_bytes() == before

    def test_nothing_is_left_where_packing_fails(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"1")
        with pytest.raises(UserError, match="has a name that a bundle does not hold"):
            write_bundle(tmp_path / "out" / "a.zip", {"run/../x": tmp_path / "x"}, EMPTY)
        assert [p.name for p in tmp_path.rglob("*")] == ["x"]


def rewritten(bundle: Path, change: Callable[[zipfile.ZipFile, Mapping[str, bytes]], None]) -> Path:
    """The bundle as somebody else has packed it: ``change`` writes the entries."""
    with zipfile.ZipFile(bundle) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    bundle.unlink()
    with zipfile.ZipFile(bundle, "w") as archive:
        change(archive, entries)
    return bundle


def all_of(archive: zipfile.ZipFile, entries: Mapping[str, bytes], **changes: bytes) -> None:
    for name, data in {**entries, **changes}.items():
        archive.writestr(name, data)


def named(name: str, data: bytes = b"evil") -> Callable[[zipfile.ZipFile, Mapping[str, bytes]], None]:
    def change(archive: zipfile.ZipFile, entries: Mapping[str, bytes]) -> None:
        all_of(archive, entries)
        archive.writestr(name, data)

    return change


def link(archive: zipfile.ZipFile, entries: Mapping[str, bytes]) -> None:
    all_of(archive, entries)
    entry = zipfile.ZipInfo("run/passwords.json")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


def bomb(archive: zipfile.ZipFile, entries: Mapping[str, bytes]) -> None:
    all_of(archive, entries)
    archive.writestr("run/zeros.json", bytes(10_000_000), compress_type=zipfile.ZIP_DEFLATED)


def twice(archive: zipfile.ZipFile, entries: Mapping[str, bytes]) -> None:
    all_of(archive, entries)
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("run/run.json", b"[]\n")


def without(name: str) -> Callable[[zipfile.ZipFile, Mapping[str, bytes]], None]:
    return lambda archive, entries: all_of(archive, {k: v for k, v in entries.items() if k != name})


def altered(archive: zipfile.ZipFile, entries: Mapping[str, bytes]) -> None:
    all_of(archive, {**entries, "run/run.json": b"[]\n"})


def resealed(**changes: object) -> Callable[[zipfile.ZipFile, Mapping[str, bytes]], None]:
    """A record of somebody who can seal."""

    def change(archive: zipfile.ZipFile, entries: Mapping[str, bytes]) -> None:
        files = {name: asdict(File("0" * 64, len(data))) for name, data in NAMES.items()}
        all_of(archive, {**entries, RECORD: seal({**asdict(EMPTY), "files": files, **changes})})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (named("../evil"), "holds an entry named '../evil', which no bundle has; nothing was unpacked"),
        (named("run/../../evil"), "holds an entry named 'run/../../evil'"),
        (named("/etc/evil"), "holds an entry named '/etc/evil'"),
        (named("run\\..\\evil"), "holds an entry named"),
        (named("run/.hidden"), "holds an entry named 'run/.hidden'"),
        (named("run/code.json/"), "holds an entry named 'run/code.json/'"),
        (named("run/surplus.json"), "holds run/surplus.json, which its manifest does not name"),
        (link, "holds run/passwords.json, which is a link or a device and no file; nothing was unpacked"),
        (bomb, "holds run/zeros.json compressed or encrypted"),
        (twice, "holds run/run.json twice"),
        (without("run/run.json"), "is damaged: run/run.json is missing"),
        (without(RECORD), "is no bundle: it has no manifest.json"),
        (altered, "is damaged: the sha256 of run/run.json is not the one in its manifest"),
        (resealed(), "is damaged: the sha256 of run/iterations/000007/01_prompts.arrow is not the one"),
        (resealed(format="rlhf-bundle/9"), "has the format 'rlhf-bundle/9'; this release reads rlhf-bundle/1"),
        (resealed(models={"policy.model": "../../etc"}), "it names what no bundle holds"),
        (resealed(num_prompts=10**12), "it names what no bundle holds"),
        (resealed(run="\x1b[31mmine"), "it names what no bundle holds"),
        (resealed(surprise=1), "has the unknown key 'surprise'"),
        (resealed(prompt_rows=["x"]), "which is not int"),
    ],
)  # fmt: skip
def test_what_no_bundle_holds(
    bundle: Path, change: Callable[[zipfile.ZipFile, Mapping[str, bytes]], None], said: str
) -> None:
    with pytest.raises(RlhfError) as refused:
        unpacked(rewritten(bundle, change))
    assert said in str(refused.value)
    assert not (bundle.parent.parent / "evil").exists()


class TestDamage:
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
    def test_cut_off(self, bundle: Path, share: float) -> None:
        data = bundle.read_bytes()
        bundle.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(IntegrityError, match="is damaged, cut off, or no bundle"):
            unpacked(bundle)

    def test_every_flipped_byte_is_seen(self, bundle: Path) -> None:
        """All but a few that no reader looks at: clocks and versions of the zip itself."""
        data, unseen = bundle.read_bytes(), 0
        folder = bundle.parent / "again"
        for position in range(0, len(data), 61):
            flipped = bytearray(data)
            flipped[position] ^= 0x40
            bundle.write_bytes(flipped)
            folder.mkdir()
            try:
                unpack_bundle(bundle, folder)
                unseen += 1
                assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == NAMES
            except RlhfError:
                pass
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
        assert unseen < 10

    def test_something_else(self, tmp_path: Path) -> None:
        other = tmp_path / "notes.txt"
        for content in (b"", b"Dear all", b"PK\x05\x06" + bytes(18)):
            other.write_bytes(content)
            with pytest.raises(UserError, match="is neither a run folder nor a bundle"):
                read_bundle_record(other)

    def test_another_zip(self, tmp_path: Path) -> None:
        other = tmp_path / "letter.docx"
        with zipfile.ZipFile(other, "w") as archive:
            archive.writestr("word/document.xml", "<x/>")
        with pytest.raises(UserError, match=r"is no bundle: it has no manifest\.json"):
            read_bundle_record(other)

    def test_entries_that_claim_more_than_the_file_has(self, bundle: Path) -> None:
        """Entries that share their bytes: quadratic, without any compression."""
        data = bytearray(bundle.read_bytes())
        entry = data.rindex(b"PK\x01\x02")
        data[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2
        bundle.write_bytes(data)
        with pytest.raises(UserError, match=r"claims to hold 1073\d+; nothing was unpacked"):
            unpacked(bundle)

    def test_a_disk_that_is_too_small(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
        with pytest.raises(UserError, match="free some, or let TMPDIR name a folder on another disk"):
            unpacked(bundle)
