"""Files of the users of the app: harmless names, bounds, privacy, and that nothing stays."""

import os
import stat
import time

import pytest

from unmurk.cli.app.sessions import Limits, Sessions, harmless
from unmurk.errors import InputError
from unmurk.io.atomic import NoLocksError


@pytest.fixture
def sessions(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = Sessions(Limits(files=3, size=1000, hours=1.0))
    yield held
    held.close()


def arrive(sessions, name, size=10):
    """A file as an upload leaves it."""
    folder = sessions.uploads / f"upload-{len(list(sessions.uploads.iterdir()))}"
    folder.mkdir()
    (folder / name).write_bytes(b"x" * size)
    return folder / name


def left(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("a.tif", "a.tif"),
        ("zwei Zellen.ome.tif", "zwei Zellen.ome.tif"),
        ("größe.png", "größe.png"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("..", "file"),
        ("", "file"),
        (".hidden.tif", "hidden.tif"),
        ("--out.tif", "out.tif"),
        ("night[SCI].fits", "night_SCI_.fits"),
        ("scan.h5:name", "scan.h5_name"),
        ("a\x00b\n\x1b[31m.png", "a_b___31m.png"),
        ("<img src=x onerror=alert(1)>.png", "_img src=x onerror=alert(1)_.png"),
        ("a\u202egnp.exe", "a_gnp.exe"),
    ],
)
def test_names_become_harmless(name, wanted):
    assert harmless(name) == wanted


def test_long_names_keep_their_suffix():
    name = harmless("a" * 5000 + ".ome.tif")
    assert len(name) <= 100 and name.endswith(".ome.tif")
    assert len(harmless("a." + "b" * 5000)) <= 100


def test_one_file_stays_one_and_several_share_a_folder(sessions):
    session = sessions.of("A" * 32)
    one = session.keep([arrive(sessions, "a.tif")])
    assert one.name == "a.tif" and one.read_bytes() == b"x" * 10
    folder = session.keep([arrive(sessions, "b.tif"), arrive(sessions, "B.TIF")])
    assert sorted(path.name for path in folder.iterdir()) == ["B-2.TIF", "b.tif"]
    assert not left(sessions.uploads)
    for path in (sessions.folder, session.folder, folder, one.parent, sessions.uploads):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_uploads_are_bounded_and_gone_when_refused(sessions):
    session = sessions.of("A" * 32)
    for count, size, part in (
        (4, 10, "at most 3"),
        (2, 600, "at most 1e\\+03 bytes"),
        (0, 0, "no"),
    ):
        files = [arrive(sessions, f"{i}.tif", size) for i in range(count)]
        with pytest.raises(InputError, match=part):
            session.keep(files)
        assert not left(sessions.folder)


def test_two_users_are_apart(sessions):
    mine, other = sessions.of("A" * 32), sessions.of("B" * 32)
    file = mine.keep([arrive(sessions, "secret.tif")])
    key = mine.offer({"secret.tif": file})
    assert mine.find(key, "secret.tif") == file
    assert other.find(key, "secret.tif") is None
    for name in ("../secret.tif", "other.tif", str(file), ""):
        assert mine.find(key, name) is None
    assert mine.find("", "secret.tif") is None
    assert mine is sessions.of("A" * 32) and mine.folder != other.folder
    assert "A" * 32 not in str(mine.folder)
    other.keep([arrive(sessions, "own.tif")])
    other.close()
    assert file.exists() and not other.folder.exists()


def test_idle_sessions_and_forgotten_uploads_are_removed(sessions):
    idle, busy = sessions.of("A" * 32), sessions.of("B" * 32)
    for session in (idle, busy):
        session.keep([arrive(sessions, "a.tif")])
    old, new = arrive(sessions, "old.tif"), arrive(sessions, "new.tif")
    os.utime(old, (time.time() - 4000,) * 2)
    busy.used = time.monotonic() + 1800
    sessions.tidy(now=time.monotonic() + 3601)
    assert not idle.folder.exists() and busy.folder.exists()
    assert left(sessions.uploads) == [new]


def test_nothing_stays_at_the_end(sessions):
    sessions.of("A" * 32).keep([arrive(sessions, "a.tif")])
    arrive(sessions, "b.tif")
    sessions.close()
    assert not sessions.folder.exists()


def test_what_a_killed_app_left_is_removed_by_the_next(sessions, tmp_path):
    killed = tmp_path / "unmurk-app-killed"
    killed.mkdir()
    (killed / "a.tif").write_bytes(b"x")
    (tmp_path / "unmurk-app-link").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    Sessions().close()
    assert not killed.exists() and sessions.uploads.exists() and (tmp_path / "other").exists()


def test_where_there_are_no_locks_nothing_of_others_is_removed(tmp_path, monkeypatch):
    """Without locks nobody can say whether another app is alive."""

    def no_locks(*_):
        raise NoLocksError("no locks")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("unmurk.cli.app.sessions.try_lock", no_locks)
    first = Sessions(Limits())
    second = Sessions(Limits())
    assert first.folder.is_dir() and second.folder.is_dir()
    for held in (first, second):
        held.close()
    assert not left(tmp_path)


def test_the_disk_is_bounded(sessions):
    assert sessions.room()
    arrive(sessions, "a.tif", 9001)
    assert not sessions.room()


def test_messages_do_not_name_folders(sessions):
    session = sessions.of("A" * 32)
    file = session.keep([arrive(sessions, "a b.tif")])
    assert session.said(f"cannot read {file}: it is damaged") == (
        "cannot read a b.tif: it is damaged"
    )
    assert session.said(f"{session.folder} is full") == " is full"


def test_a_request_without_a_session_is_refused(sessions):
    with pytest.raises(InputError, match="no session"):
        sessions.of("")
