"""No command writes over a file that it did not make, whatever the spelling of the path."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.atomic import Partial, clean, partial_of, place_folder, write
from unmurk.io.ledger import LOG, Ledger, log_of
from unmurk.io.outputs import output
from unmurk.io.saving import save_images
from unmurk.io.scale import Scale
from unmurk.io.streams import ImagesWriter, NpyWriter
from unmurk.problem import Problem
from unmurk.training import learn

rng = np.random.default_rng(0)


def unmurk(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder whose networks were never trained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    Prior.create("tiny", (1, 16, 16)).save(folder / "prior")
    Posterior.create("tiny", (1, 16, 16)).save(folder / "posterior")
    return folder


@pytest.fixture
def here(tmp_path) -> Path:
    """Inputs of every kind, and links to them."""
    (tmp_path / "D").mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(60, 200, (16, 16), np.uint8)).save(tmp_path / f"D/{i}.png")
    np.save(tmp_path / "y.npy", rng.uniform(0.2, 0.8, (2, 16, 16)).astype("f4"))
    np.save(tmp_path / "one.npy", rng.uniform(0.2, 0.8, (16, 16)).astype("f4"))
    np.save(tmp_path / "mask.npy", rng.uniform(size=(16, 16)) < 0.5)
    (tmp_path / "link").symlink_to("D")
    (tmp_path / "link.npy").symlink_to("y.npy")
    os.link(tmp_path / "y.npy", tmp_path / "hard.npy")
    (tmp_path / "nothing.npy").symlink_to("nowhere.npy")
    (tmp_path / "new").mkdir()
    return tmp_path


def tree(folder: Path) -> dict[str, object]:
    """Everything below a folder: contents of files, targets of links."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(folder.rglob("*"))
    }


MASK = "inpaint:file,path=mask.npy"

# the input, the output, options, and what the line says
REFUSED: list[tuple[str, str, list[str], str]] = [
    ("D", "D", [], "is the input"),
    ("D", "D/", [], "is the input"),
    ("D", "./new/../D", [], "is the input"),
    ("D", "link", [], "is the input"),
    ("link", "D", [], "is the input"),
    ("D", ".", [], "contains the input folder"),
    ("D", "D/2.png", [], "is in the input folder"),
    ("D/0.png", "D/0.png", [], "is the input"),
    ("D/0.png", "D", [], "is"),
    ("y.npy", "y.npy", [], "is the input"),
    ("y.npy", "new/../y.npy", [], "is the input"),
    ("y.npy", "link.npy", [], "is the input"),
    ("link.npy", "y.npy", [], "is the input"),
    ("y.npy", "hard.npy", [], "is the input"),
    ("y.npy", "nothing.npy", [], "link to nothing"),
    ("y.npy", "mask.npy", ["--operator", MASK], "is the input mask.npy"),
    ("y.npy", "one.npy", [], " exists"),
    ("y.npy", "", [], "--out is empty"),
]
COMMANDS: dict[str, list[str]] = {
    "corrupt": ["corrupt", "--noise", "0.1"],
    "restore": ["restore", "--noise", "0.1", "--samples", "2", "--prior", "RUN"],
    "solve": ["solve", "--noise", "0.1", "--steps", "1", "--prior", "RUN"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("data", "out", "more", "said"), REFUSED)
def test_an_output_is_no_input(command, data, out, more, said, here, run, capsys, monkeypatch):
    monkeypatch.chdir(here)
    before = tree(here)
    name, *options = COMMANDS[command]
    options = [str(run) if word == "RUN" else word for word in options]
    operator = more or ["--operator", "identity"]
    assert unmurk(name, data, *options, *operator, "--out", out) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and said in shown.err
    assert tree(here) == before


def test_priors_are_inputs_too(here, run, capsys, monkeypatch):
    """A run is never written into, but a new folder or an array file in it is fine."""
    monkeypatch.chdir(here)
    before = tree(run)
    for out in (run, run / "prior", run.parent):
        assert unmurk("sample", "--prior", run, "-n", 1, "--steps", 2, "--out", out) == 2
        source = run / "prior" if out == run / "prior" else run
        argv = ["solve", "D", "--prior", source, "--operator", "identity", "--noise", 0.1]
        assert unmurk(*argv, "--steps", 1, "--out", out) == 2
        assert "input" in capsys.readouterr().err
    assert tree(run) == before
    argv = ["sample", "--prior", run, "-n", 1, "--steps", 2, "--out"]
    assert unmurk(*argv, run / "new") == 0
    assert sorted(p.name for p in (run / "new").iterdir()) == ["00000.png", LOG]
    assert unmurk("learn", here / "D", "--noise", 0.1, "--out", here / "D") == 2


def test_a_new_folder_in_the_input_is_never_read(here, run, monkeypatch):
    """The same command on D gives the same two files, whatever is below D."""
    monkeypatch.chdir(here)
    argv = ["restore", "D", "--prior", run, "--operator", "identity", "--noise", "0.1"]
    argv += ["--samples", "2", "--out"]
    assert unmurk(*argv, "D/restored") == 0
    assert unmurk(*argv, "again") == 0
    names = ["0.png", "1.png", LOG]
    for out in ("D/restored", "again"):
        assert sorted(p.name for p in (here / out).iterdir()) == names
    for name in names[:2]:
        assert (here / "D/restored" / name).read_bytes() == (here / "again" / name).read_bytes()


# -- files of others ----------------------------------------------------------------------------


def of_others(folder: Path) -> list[Callable[[], None]]:
    """What makes a file that unmurk did not make, in a folder of its results."""
    return [
        lambda: (folder / "0.png").write_bytes(b"mine"),
        lambda: (folder / "0.png").symlink_to("elsewhere.png"),
        lambda: (folder / "0.png").mkdir(),
        lambda: (folder / LOG).symlink_to("elsewhere.jsonl"),
        lambda: (folder / LOG).write_text("my own log\n"),
        lambda: (folder / LOG).mkdir(),
    ]


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("command", ["corrupt", "restore"])
def test_files_of_others_stay(command, kind, here, run, capsys, monkeypatch):
    monkeypatch.chdir(here)
    (here / "out").mkdir()
    of_others(here / "out")[kind]()
    before = tree(here)
    name, *options = COMMANDS[command]
    options = [str(run) if word == "RUN" else word for word in options]
    assert unmurk(name, "D", *options, "--operator", "identity", "--out", "out") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert tree(here) == before


def test_arrays_beside_a_result_are_looked_at_first(here, run, capsys, monkeypatch):
    """x-std.npy is somebody's, or the input itself: refused before x.npy is made."""
    monkeypatch.chdir(here)
    (here / "x-std.npy").write_bytes((here / "y.npy").read_bytes())
    argv = ["--prior", run, "--operator", "identity", "--noise", "0.1", "--std", "--out", "x.npy"]
    before = tree(here)
    for data, said in (("y.npy", " exists"), ("x-std.npy", "is an input")):
        assert unmurk("restore", data, *argv, "--samples", 2) == 2
        assert said in capsys.readouterr().err
        assert tree(here) == before


def test_a_report_takes_no_place_of_another_page(here, capsys):
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text('{"method": "noisy"}')
    lines = [json.dumps({"kimg": k, "loss/prior": 1.0 / k}) for k in (1, 2)]
    (here / "run" / "metrics.jsonl").write_text("\n".join(lines))
    assert unmurk("report", here / "run") == 0
    assert unmurk("report", here / "run") == 0  # our own page is made anew
    page = here / "run" / "report.html"
    page.write_text("<html>my notes</html>")
    assert unmurk("report", here / "run") == 2
    assert "is no report" in capsys.readouterr().err
    assert page.read_text() == "<html>my notes</html>"


def test_notes_in_a_model_folder_stay(here):
    """The models of a finished run are written anew; what else is there stays."""
    y, problem = torch.rand(4, 1, 16, 16), Problem("identity", 0.1)
    for _ in range(2):
        learn(y, problem, "noisy", out=here / "run", kimg=0.032, quiet=True)
        (here / "run" / "prior" / "notes.txt").write_text("mine")
    assert (here / "run" / "prior" / "notes.txt").read_text() == "mine"
    assert not list((here / "run").glob("**/.unmurk-*"))


# -- the job's own results ----------------------------------------------------------------------


def test_the_same_command_finds_its_own(here, run, capsys, monkeypatch):
    """Again: nothing is done. Other options: refused. Results removed or lost: made again."""
    monkeypatch.chdir(here)
    argv = ["restore", "y.npy", "--prior", run, "--operator", "identity", "--noise", "0.1"]
    argv += ["--samples", "2", "--std", "--json", "--out", "x.npy"]
    assert unmurk(*argv) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["images"] == 2
    before = tree(here)
    assert unmurk(*argv) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["images"], again["finished"]) == (0, 2) and tree(here) == before
    assert unmurk(*argv, "--seed", 1) == 2
    assert "x-std.npy was made with another seed" in capsys.readouterr().err
    (here / "x.npy").unlink()
    assert unmurk(*argv) == 0
    after = tree(here)
    assert after.pop("x-unmurk.jsonl") != before.pop("x-unmurk.jsonl")  # two lines more
    assert after == before
    data = np.load(here / "x.npy")
    np.save(here / "x.npy", data + 1)  # edited by hand
    np.save(here / "y.npy", np.load(here / "y.npy") * 0.5)  # and another input
    assert unmurk(*argv) == 2
    assert "was changed after unmurk made it" in capsys.readouterr().err
    assert np.array_equal(np.load(here / "x.npy"), data + 1)


def test_a_changed_input_is_restored_again(here, run, monkeypatch):
    """The same number of bytes, but other ones: an uncompressed file that was edited."""
    monkeypatch.chdir(here)
    argv = ["restore", "y.npy", "--prior", run, "--operator", "identity", "--noise", "0.1"]
    argv += ["--samples", "2", "--out", "x.npy"]
    assert unmurk(*argv) == 0
    first = np.load(here / "x.npy")
    size = (here / "y.npy").stat().st_size
    np.save(here / "y.npy", 1 - np.load(here / "y.npy"))
    assert (here / "y.npy").stat().st_size == size
    assert unmurk(*argv) == 0
    assert not np.array_equal(np.load(here / "x.npy"), first)


def test_a_killed_job_finds_what_it_had_begun(tmp_path):
    """Killed between a file's name and the last line of the log, whatever came of the lines."""
    log = tmp_path / LOG
    first = Ledger(log, {"seed": 0})
    first.begin(["a.png", "a-std.npy"])
    (tmp_path / "a.png").write_bytes(b"half a job")
    again = Ledger(log, {"seed": 0})
    assert not again.finished(("a", 0, 1, 2), ["a.png"])
    again.check(["a.png"])
    with pytest.raises(InputError, match="made with another setting"):
        Ledger(log, {"seed": 1}).check(["a.png"])
    with pytest.raises(InputError, match="no result of this command"):
        (tmp_path / "b.png").touch()
        again.check(["b.png"])
    again.begin(["a.png"])
    again.end(("a", 0, 1, 2), ["a.png"])
    assert Ledger(log, {"seed": 0}).finished(("a", 0, 1, 2), ["a.png"])
    log.write_bytes(log.read_bytes()[:-20])  # the last line was cut short
    torn = Ledger(log, {"seed": 0})
    assert not torn.finished(("a", 0, 1, 2), ["a.png"])
    torn.check(["a.png"])
    torn.begin(["a.png"])
    torn.end(("a", 0, 1, 2), ["a.png"])
    assert Ledger(log, {"seed": 0}).finished(("a", 0, 1, 2), ["a.png"])


# -- names and partial files --------------------------------------------------------------------


def test_names_of_255_bytes(here, run, monkeypatch):
    """A name as long as the system allows is written, with its log."""
    monkeypatch.chdir(here)
    for stem in ("a" * 251, "é" * 125 + "a"):
        name = f"{stem}.npy"
        assert len(os.fsencode(name)) == 255
        assert unmurk("corrupt", "y.npy", "--out", name) == 0
        assert np.load(here / name).shape == (2, 1, 16, 16)
        log = log_of(here / name, folder=False)
        assert log.is_file() and len(os.fsencode(log.name)) <= 255
        assert len(partial_of(here / name).name) == 29


def test_partial_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = Partial(tmp_path / "dead.npy")
    dead.put(b"half")
    os.close(os.dup(dead.file.fileno()))
    living = Partial(tmp_path / "living.npy")
    with pytest.raises(InputError, match="another process is writing"):
        Partial(tmp_path / "living.npy")
    dead.file.close()  # as the system does for a killed process
    folder = partial_of(tmp_path / "model")
    folder.mkdir()
    (folder / "weights").write_bytes(b"half")
    (tmp_path / ".mine.part").touch()
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.part", living.path.name]
    living.put(b"whole")
    living.finish()
    assert (tmp_path / "living.npy").read_bytes() == b"whole"
    write(tmp_path / "dead.npy", b"again")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.part", "dead.npy", "living.npy"]


def test_what_fails_takes_away_its_own_files_only(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), output(out):
        write(out / "ours.txt", b"1")
        (out / "theirs.txt").write_text("written by somebody in the meantime")
        raise RuntimeError
    assert [p.name for p in out.iterdir()] == ["theirs.txt"]
    with pytest.raises(RuntimeError), output(tmp_path / "other" / "out") as to:
        write(to.path / "ours.txt", b"1")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_a_folder_of_a_model_keeps_other_files(tmp_path):
    for text in ("one", "two"):
        with place_folder(tmp_path / "model") as part:
            (part / "unet").mkdir()
            (part / "unet" / "w").write_text(text)
        (tmp_path / "model" / "notes").write_text("mine")
    assert (tmp_path / "model" / "unet" / "w").read_text() == "two"
    assert (tmp_path / "model" / "notes").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# -- arrays written part by part ----------------------------------------------------------------


def test_parts_make_the_array(tmp_path):
    """(S, N, C, H, W) in parts of N, in any order, is what numpy writes at once."""
    whole = rng.normal(size=(3, 7, 1, 4, 5)).astype(np.float32)
    writer = NpyWriter(tmp_path / "a.npy", whole.shape)
    for first, last in ((4, 7), (0, 1), (1, 4)):
        writer.write(first, whole[:, first:last], -4)
    assert not (tmp_path / "a.npy").exists()
    writer.close()
    np.save(tmp_path / "b.npy", whole)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize("form", ["npy", "npz", "idx", "idx.gz"])
@pytest.mark.parametrize("layout", ["NCHW", "NHW", "NHWC", "HW"])
def test_images_part_by_part_are_those_at_once(form, layout, tmp_path):
    count = 1 if layout == "HW" else 5
    images = torch.from_numpy(rng.uniform(size=(count, 1, 4, 6))).float()
    scale = Scale(gain=255.0, dtype="uint8", layout=layout)
    files = [tmp_path / f"{name}-idx3-ubyte.{form}" for name in "ab"]
    for file, step in zip(files, (count, 2), strict=True):
        kind = "idx" if "idx" in form else form
        writer = ImagesWriter(file, count, (1, 4, 6), scale, kind)
        for first in range(0, count, step):
            writer.write(images[first : first + step])
        writer.close()
    one, other = (file.read_bytes() for file in files)
    if form == "npz":
        one, other = (np.load(file)["images"].tobytes() for file in files)
    assert one == other and len(one) > 0


def test_an_interrupt_right_after_a_partial_file_is_made_leaves_nothing(tmp_path):
    other = Partial(tmp_path / "elsewhere" / "b.png")
    held = []
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "out", folder=True):
        held.append(Partial(tmp_path / "out" / "a.png"))  # nobody knows of it yet
        assert held[0].path.exists()
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    assert other.path.exists()  # of another output
    held[0].abandon()
    other.abandon()
    assert not list(tmp_path.rglob(".unmurk-*.part"))


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.fits", "x.dcm", "x.h5", "x.czi"])
def test_arrays_do_not_become_files_of_scans(name, tmp_path, capsys, monkeypatch):
    """Neither a folder of that name nor a line about another file."""
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", np.full((2, 28, 28), 0.5, np.float32))
    of_digits = ["--prior", "digits", "--noise", "0.3"]
    for argv in (
        ["corrupt", "y.npy", "--noise", "0.3"],
        ["sample", "--prior", "digits", "-n", "2", "--steps", "2"],
        ["restore", "y.npy", *of_digits, "--samples", "2"],
        ["solve", "y.npy", *of_digits, "--operator", "identity", "--steps", "2"],
    ):
        assert unmurk(*argv, "--out", name) == 2, argv
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1 and name in said and ".npy" in said
        assert "images.npy" not in said and sorted(os.listdir()) == ["y.npy"]
    with pytest.raises(InputError, match=r"cannot write x\."):
        save_images(torch.zeros(2, 1, 8, 8), name)
    assert sorted(os.listdir()) == ["y.npy"]
