"""What the buttons do: the commands, their files bit for bit, and what clients may not ask for."""

import json
import os
import time
import zipfile

import numpy as np
import pytest
import tifffile

import unmurk
from tests.cli.app.processes import Popen
from unmurk.cli.app.actions import Desk
from unmurk.cli.app.jobs import Job, shown
from unmurk.cli.app.records import Estimate, Images
from unmurk.cli.main import main
from unmurk.errors import InputError

OPTIONS = "--std --samples 16 --noise"


@pytest.fixture
def process():
    return Popen


@pytest.fixture
def remote(desk):
    return Desk(desk.sessions, desk.root, local=False)


@pytest.fixture
def session(desk):
    return desk.session("A" * 32)


def last(steps):
    """The result of an action, and the lines that it has told."""
    lines = []
    try:
        while True:
            lines.append(next(steps))
    except StopIteration as end:
        return end.value, lines


def noisy(count=2):
    clean = unmurk.load_images("digits:test", limit=count).images
    return unmurk.Problem("identity", 0.3).simulate(clean)[:, 0].numpy()


def uploaded(desk, session, write, name):
    folder = desk.sessions.uploads / f"u{time.monotonic_ns()}"
    folder.mkdir()
    write(folder / name)
    return desk.upload(session, [folder / name])


def sixteen_bits(path):
    """Noisy digits as a camera writes them: 16 bits, black 1000, white 40000."""
    pixels = (1000 + 39000 * noisy()).clip(0, 65535).round().astype(np.uint16)
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": "ZYX"})


@pytest.mark.slow
def test_restored_files_are_those_of_the_command_line_bit_for_bit(desk, session, tmp_path):
    images = uploaded(desk, session, sixteen_bits, "digits.tif")
    images = Images(images.data, images.label, True, (1000.0, 40000.0))
    outcome, lines = last(desk.restore(session, images, "digits"))
    assert outcome.command == (
        "unmurk restore digits.tif --prior digits --out restored --std --samples 16 "
        "--range 1000 40000"
    )
    assert outcome.files == ["all-files.zip", "digits-std.tif", "digits.tif"]
    assert lines[0].startswith("Working on digits.tif")
    # the command that the page shows, in a folder with the user's file
    sixteen_bits(tmp_path / "digits.tif")
    assert main(outcome.command.split()[1:]) == 0
    for name in ("digits.tif", "digits-std.tif"):
        wanted = tifffile.imread(tmp_path / "restored" / name)
        found = tifffile.imread(session.find(outcome.key, name))
        assert found.dtype == wanted.dtype and np.array_equal(found, wanted), name
    with zipfile.ZipFile(session.find(outcome.key, "all-files.zip")) as whole:
        data = session.find(outcome.key, "digits.tif").read_bytes()
        assert whole.read("digits.tif") == data and len(whole.namelist()) == 2
    page = session.find(outcome.key, "page.html").read_text()
    for part in (
        "digits.tif, page 1",
        "digits.tif, restored",
        "Can this be trusted?",
        "standard deviation",
        "drag",
    ):
        assert part in page, part
    assert str(session.folder) not in page and "://" not in page
    # neither another user nor another name has them
    assert desk.session("B" * 32).find(outcome.key, "digits.tif") is None
    assert session.find(outcome.key, "unmurk.jsonl") is None


def test_the_noise_is_that_of_the_command_line(desk, session, tmp_path, capsys):
    images = uploaded(desk, session, lambda path: np.save(path, noisy(8)), "digits.npy")
    found, _ = last(desk.measure(session, images))
    np.save(tmp_path / "digits.npy", noisy(8))
    assert found.command == "unmurk noise digits.npy"
    assert main([*found.command.split()[1:], "--json"]) == 0
    assert found.figures == json.loads(capsys.readouterr().out)
    text = " ".join(found.lines())
    sigma, error = found.figures["sigma"], found.figures["sigma error"]
    assert f"standard deviation {sigma:.3g} ± {error:.1g}" in text and "8 images" in text
    assert abs(sigma - 0.3) < 0.03


def test_the_estimate_names_channels_units_and_warnings():
    channel = {"model": "Gaussian", "sigma": 0.02, "sigma error": 0.001}
    figures = {"images": 1, "channel 0": channel, "channel 1": channel, "warnings": ["clipped"]}
    lines = Estimate("gaussian,sigma=0.02", figures, "").lines()
    assert lines[0] == "1 image" and lines[-1] == "warning: clipped" and len(lines) == 4
    assert lines[1] == "channel 0: standard deviation 0.02 ± 0.001. Gaussian"
    levels = {"images": 3, **channel, "in gray levels": "sigma 5.1 dn"}
    assert "which is sigma 5.1 dn of the files" in Estimate("", levels, "").lines()[1]


def test_a_broken_file_is_one_message_that_names_no_folder(desk, session):
    def broken(path):
        path.write_bytes(b"II*\0 this is no TIFF")

    images = uploaded(desk, session, broken, "broken.tif")
    with pytest.raises(InputError) as found:
        last(desk.measure(session, images))
    assert "broken.tif" in str(found.value) and str(desk.sessions.folder) not in str(found.value)
    assert not session.results


def test_an_image_of_too_many_pixels_is_refused_before_it_is_read(desk, session):
    def large(path):
        tifffile.imwrite(path, np.zeros((1001, 1000), np.uint8))

    images = uploaded(desk, session, large, "large.tif")
    with pytest.raises(InputError, match="1001x1000 pixels, the limit is 1000000"):
        last(desk.measure(session, images))


@pytest.mark.slow
def test_a_painted_hole_is_filled_by_the_command_that_is_shown(desk, session, tmp_path):
    images = uploaded(desk, session, lambda path: np.save(path, noisy()), "digits.npy")
    layer = np.zeros((28, 28, 4), np.uint8)
    layer[10:16, 8:20, 3] = 255
    steps = desk.solve(session, images, "digits", "hole", "0.3", "ddrm", layers=[layer])
    outcome, _ = last(steps)
    assert outcome.files == ["all-files.zip", "images.npy", "mask.png"]
    assert "--operator inpaint:file,path=mask.png --noise 0.3 --method ddrm" in outcome.command
    np.save(tmp_path / "digits.npy", noisy())
    mask = session.find(outcome.key, "mask.png").read_bytes()
    (tmp_path / "mask.png").write_bytes(mask)
    assert main(outcome.command.split()[1:]) == 0
    wanted = np.load(tmp_path / "restored" / "images.npy")
    assert np.array_equal(np.load(session.find(outcome.key, "images.npy")), wanted)
    assert "Chi-square" in session.find(outcome.key, "page.html").read_text()


# -- what clients may not ask for -----------------------------------------------------------------


def test_paths_can_be_named_on_this_machine_alone(desk, remote, session, tmp_path):
    np.save(tmp_path / "y.npy", noisy())
    found = desk.named("y.npy")
    assert found.data == tmp_path / "y.npy" and not found.uploaded
    with pytest.raises(InputError, match="nothing at"):
        desk.named("z.npy")
    for text in ("", " ", "a\0b"):
        with pytest.raises(InputError, match="no path"):
            desk.named(text)
    images = Images(found.data, "y.npy")
    for action in (
        lambda: remote.named(str(tmp_path)),
        lambda: last(remote.solve(session, images, "digits", "inpaint:file,path=/etc/x", "0.3")),
        lambda: last(remote.solve(session, images, "digits", "blur:file, path = x", "0.3")),
        lambda: remote.learn(session, images, "run", "0.3", operator="mri:file,path=x"),
    ):
        with pytest.raises(InputError, match="answers to this machine alone"):
            action()


def test_only_uploads_are_taken(desk, session, tmp_path):
    (tmp_path / "private.txt").write_text("secret")
    link = desk.sessions.uploads / "link.tif"
    link.symlink_to(tmp_path / "private.txt")
    for path in (tmp_path / "private.txt", desk.sessions.uploads / "../../private.txt", link):
        with pytest.raises(InputError, match="not uploaded"):
            desk.upload(session, [path])
    assert (tmp_path / "private.txt").read_text() == "secret"


def test_images_that_lack_a_range_are_kept_and_broken_ones_are_not(desk, session):
    """Their user gives black and white afterwards."""
    images = uploaded(desk, session, lambda path: np.save(path, 4000 * noisy()), "counts.npy")
    with pytest.raises(InputError, match="--range"):
        last(desk.measure(session, images))
    assert desk.readable(images)
    images = uploaded(desk, session, lambda path: path.write_bytes(b"\x93NUMPY"), "broken.npy")
    assert not desk.readable(images)


@pytest.mark.parametrize("prior", ["", None, "/etc", "run:../../x", "run:none", "adm:x:y", "a/b"])
def test_only_priors_of_the_menu_can_be_chosen(desk, session, prior):
    with pytest.raises(InputError, match="prior"):
        desk.prior(session, prior)


def test_the_models_of_the_package_are_offered(desk, session):
    assert desk.priors(session) == [
        ("generic, in the package", "generic"),
        ("generic-color, in the package", "generic-color"),
        ("digits, in the package", "digits"),
        ("nuclei, in the package", "nuclei"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_generic_restores_with_the_estimate_what_it_has_not_learned(desk, session, channels):
    """Gray images, and color images channel by channel; the noise is the one that is shown."""
    clean = unmurk.load_images("nuclei:val", limit=3).images[..., 8:56, 8:56]
    y = unmurk.Problem("identity", 0.1).simulate(clean)
    clean, y = (v.reshape(-1, channels, 48, 48).numpy() for v in (clean, y))
    images = uploaded(desk, session, lambda path: np.save(path, y), "cells.npy")
    found, _ = last(desk.measure(session, images))
    outcome, _ = last(desk.restore(session, images, "generic", estimated=found.noise))
    assert abs(float(found.noise.removeprefix("gaussian,sigma=")) - 0.1) < 0.01
    assert outcome.command.endswith(f"--prior generic --out restored {OPTIONS} {found.noise}")
    restored, std = (np.load(session.find(outcome.key, n)) for n in ("images.npy", "std.npy"))
    assert restored.shape == std.shape == y.shape
    error = np.sqrt(np.square(restored - clean).mean())
    assert error < 0.4 * np.sqrt(np.square(y - clean).mean())
    page = session.find(outcome.key, "page.html").read_text()
    assert "chi-square of the residual" in page and "There is no verdict" not in page


@pytest.mark.parametrize("text", ["--out=/data/x", "-1", "a\nb", "a\x1b[31m", "x" * 301])
def test_texts_that_are_no_arguments(desk, session, tmp_path, text):
    images = Images(tmp_path / "y.npy", "y.npy")
    with pytest.raises(InputError, match="noise"):
        last(desk.restore(session, images, "digits", text))
    with pytest.raises(InputError, match="operator"):
        last(desk.solve(session, images, "digits", text, "0.3"))
    with pytest.raises(InputError, match="noise"):
        desk.learn(session, images, "run", text)


def test_numbers_and_names_out_of_bounds(desk, session, tmp_path):
    images = Images(tmp_path / "y.npy", "y.npy")
    with pytest.raises(InputError, match="unknown solver"):
        last(desk.solve(session, images, "digits", "identity", "0.3", "magic"))
    with pytest.raises(InputError, match="answers must be a whole number from 1 to 16"):
        last(desk.solve(session, images, "digits", "identity", "0.3", samples=10**6))
    with pytest.raises(InputError, match="length must be"):
        desk.learn(session, images, "run", "0.3", kimg=1e9)
    for name in ("", "..", "a/b", "a b", "-a", ".a", "x" * 41, "ä"):
        with pytest.raises(InputError, match="cannot be called"):
            desk.learn(session, images, name, "0.3")
    assert not desk.root.exists()


def test_commands_are_shown_as_a_user_types_them():
    argv = ["solve", "/s/images-1/a b.tif", "--operator", "inpaint:file,path=/s/mask.png"]
    names = {"/s/images-1/a b.tif": "a b.tif", "/s/mask.png": "mask.png"}
    assert shown(argv, names) == ("unmurk solve 'a b.tif' --operator inpaint:file,path=mask.png")
    assert shown(["noise", "$(rm x)\n"]) == "unmurk noise '$(rm x)\\n'"


# -- jobs -----------------------------------------------------------------------------------------


def test_a_job_ends_when_it_is_asked_to(desk, session, tmp_path):
    np.save(tmp_path / "y.npy", noisy(64))
    argv = ["restore", "y.npy", "--prior", "digits", "--samples", "100000"]
    job = Job([*argv, "--out", str(tmp_path / "out.npy")], session.new_folder("log"))
    while job.running and not list(tmp_path.glob(".unmurk-*.lock")):
        time.sleep(0.05)
    job.stop()
    assert not job.running
    with pytest.raises(InputError, match="stopped"):
        job.result()
    assert not list(tmp_path.glob("out*"))


def test_two_users_work_at_the_same_time(desk, session, tmp_path):
    """Neither sees the images, the noise or the messages of the other."""
    other = desk.session("B" * 32)
    first = uploaded(desk, session, lambda path: np.save(path, noisy(8)), "y.npy")
    second = uploaded(desk, other, lambda path: np.save(path, noisy(16)), "y.npy")
    both = [desk.measure(session, first), desk.measure(other, second)]
    found = {}
    while len(found) < 2:
        for number, steps in enumerate(both):
            if number not in found:
                try:
                    next(steps)
                except StopIteration as end:
                    found[number] = end.value
    assert [found[n].figures["images"] for n in (0, 1)] == [8, 16]
    desk.forget(session)
    assert not session.folder.exists() and second.data.exists()


# -- learning -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_learning_goes_on_without_the_page_stops_and_goes_on(desk, session, tmp_path):
    images = uploaded(desk, session, lambda path: np.save(path, noisy(16)), "digits.npy")
    runs = desk.runs(session)
    command = desk.learn(session, images, "cells", "0.3", kimg=0.64)
    assert command == "unmurk learn digits.npy --out runs/cells --noise 0.3 --kimg 0.64"
    kept = tmp_path / "runs" / "cells.images" / "digits.npy"
    assert kept.exists()
    with pytest.raises(InputError, match="there is a run 'cells' already"):
        desk.learn(session, images, "cells", "0.3")
    desk.forget(session)  # the page is closed, and its files are gone
    while not runs.progress("cells").kimg:
        assert runs.progress("cells").running, runs.progress("cells").said
        time.sleep(0.05)
    again = Desk(desk.sessions, desk.root, local=True).runs(desk.session("B" * 32))
    assert again.names() == ["cells"] and again.progress("cells").running  # by its lock
    assert "is learning" in again.progress("cells").text()
    with pytest.raises(InputError, match="is learning"):
        again.resume("cells")
    again.stop("cells")
    while again.progress("cells").running:
        time.sleep(0.05)
    stopped = again.progress("cells")
    assert 0 < stopped.share < 1 and not stopped.finished and stopped.again
    assert "has stopped at" in stopped.text() and kept.exists()
    again.resume("cells")
    while again.progress("cells").running:
        time.sleep(0.05)
    done = again.progress("cells")
    assert done.finished and done.kimg == done.total == 0.64, done
    assert not kept.exists()
    assert desk.priors(session)[0] == ("cells, learned here", "run:cells")
    assert desk.prior(session, "run:cells") == str(tmp_path / "runs" / "cells")


def test_users_of_other_machines_see_their_own_runs(remote, tmp_path):
    first, second = (remote.session(letter * 32) for letter in "AB")
    for session in (first, second):
        folder = remote.runs(session).folder / "cells"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert remote.runs(session).names() == ["cells"]
    assert remote.runs(first).folder != remote.runs(second).folder
    assert remote.runs(first).folder.parent == tmp_path / "runs"
    local = Desk(remote.sessions, tmp_path / "runs", local=True)
    assert os.listdir(local.runs(first).folder) and not local.runs(first).names()


def test_a_damaged_run_is_told_and_not_run(desk, session, tmp_path):
    folder = tmp_path / "runs" / "cells"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    (folder / "metrics.jsonl").write_text('{"kimg": 3, "seconds": "long"}\n{"kimg": NaN}\nxx')
    runs = desk.runs(session)
    found = runs.progress("cells")
    assert (found.total, found.share, found.running, found.again) == (0.0, 0.0, False, False)
    with pytest.raises(InputError, match="not started here"):
        runs.resume("cells")
    for text in ("[]", '{"learn": 3}', '{"learn": ["learn", 3]}', "x"):
        (tmp_path / "runs" / "cells.learn.json").write_text(text)
        with pytest.raises(InputError):
            runs.resume("cells")
    runs.stop("cells")  # nothing runs
