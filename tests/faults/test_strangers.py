"""Run folders of strangers: anything in them is used, or refused in one line with exit code 2."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unmurk.cli import main as cli
from unmurk.cli.run_page import run_report
from unmurk.diffusion.guided_diffusion import Adm
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.glow import Glow
from unmurk.flows.posterior import Posterior
from unmurk.io.json_files import json_lines, read_json, read_object
from unmurk.problem import Problem

SHAPE = (1, 8, 8)
DEEP = "[" * 100_000
INDEX, LEVELS = "prior/model_index.json", "prior/scheduler/scheduler_config.json"
UNET, FLOW = "prior/unet/config.json", "posterior/config.json"
WEIGHTS = "prior/unet/diffusion_pytorch_model.safetensors"
FLOW_WEIGHTS = "posterior/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run folder, as learning leaves it, and measurements."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    Prior.create("tiny", SHAPE).save(folder / "run" / "prior")
    Posterior.create("tiny", SHAPE).save(folder / "run" / "posterior")
    config = {"method": "flowdiff", "problem": Problem("identity", 0.1).to_dict()}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    lines = [{"kimg": k / 10, "seconds": 1.5 * k, "loss/prior": 1 / (k + 1)} for k in range(4)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in lines))
    np.save(folder / "y.npy", np.full((2, 8, 8), 0.5, np.float32))
    return folder


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copy(made / "y.npy", tmp_path)
    return tmp_path / "run"


COMMANDS = {
    "restore": ["--samples", "2"],
    "solve": ["--operator", "identity", "--noise", "0.1", "--steps", "2"],
    "sample": ["-n", "1", "--steps", "2"],
    "report": [],
    "learn": ["--noise", "0.1", "--kimg", "0.5"],
}


def command(name, run):
    out = run.parent / "out"
    data = [str(run.parent / "y.npy")]
    if name == "report":
        return ["report", str(run)]
    if name == "learn":
        return ["learn", *data, "--out", str(run), *COMMANDS[name]]
    given = [] if name == "sample" else data
    return [name, *given, "--prior", str(run), "--out", str(out), *COMMANDS[name]]


def edit(run, file, **values):
    path = run / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def files(run):
    return {
        p.relative_to(run.parent): p.stat().st_size for p in run.parent.rglob("*") if p.is_file()
    }


def refused(name, run, capfd):
    before = files(run)
    code = cli.main(command(name, run))
    shown = capfd.readouterr()
    assert code == 2 and shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("unmurk: ") and len(line) < 600
    assert files(run) == before
    return line


def test_the_folder_itself_is_fine(run, capfd):
    for name in ("restore", "solve", "sample", "report"):
        assert cli.main(command(name, run)) == 0, capfd.readouterr().err
        shutil.rmtree(run.parent / "out", ignore_errors=True)  # others' results are kept


TEXTS = [
    DEEP,
    '{"a":' * 100_000,
    "",
    "{",
    "3",
    "null",
    "[]",
    "\0",
    "\xff",
    '{"a": ' + "9" * 400 + "}",
]
TEXTS += ['{"a": NaN}', '"' + "x" * 50, '{"kimg": "\\ud800"}', '{"_class_name": "' + "x" * 90_000]
USERS = {
    INDEX: ("sample", "solve"),
    LEVELS: ("sample",),
    UNET: ("sample",),
    FLOW: ("restore",),
    "config.json": ("report", "restore", "learn"),
    "verdict.json": ("report",),
    "progress.json": ("report",),
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:9]))
@pytest.mark.parametrize("file", USERS)
def test_json_that_is_none(file, text, run, capfd):
    (run / file).write_bytes(text.encode("latin-1"))
    for name in USERS[file]:
        line = refused(name, run, capfd)
        assert "json" in line or "run" in line


VALUES = [None, True, -1, 0, 1e308, 10**18, "x", {}, ["a", None, 3]]
KEYS = {
    INDEX: ["_class_name", "unet", "scheduler", "unknown"],
    LEVELS: ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"],
    UNET: [
        *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block"),
        *("down_block_types", "up_block_types", "norm_num_groups", "attention_head_dim", "act_fn"),
        *("freq_shift", "norm_eps", "time_embedding_type", "downsample_type", "dropout"),
    ],
    FLOW: ["channels", "height", "width", "mean", "context", "couplings", "hidden", "unknown"],
    "config.json": ["problem", "method"],
}


@pytest.mark.parametrize("file, key", [(file, key) for file, keys in KEYS.items() for key in keys])
def test_values_of_any_type(file, key, run, capfd):
    """Each is used, where it does no harm, or refused; nothing else gets out."""
    kept, before = (run / file).read_text(), files(run)
    for value in [*VALUES, "absent"]:
        values = json.loads(kept) | {key: value}
        if value == "absent":
            del values[key]
        (run / file).write_text(json.dumps(values))
        try:
            if file == FLOW:
                Posterior.load(run)
            elif file == "config.json":
                code = cli.main(command("restore", run))
                assert code in (0, 2) and len(capfd.readouterr().err.splitlines()) < 2 + (not code)
            else:
                Prior.load(run)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
    assert capfd.readouterr().err.count("Traceback") == 0
    (run / file).write_text(kept)
    shutil.rmtree(run.parent / "out", ignore_errors=True)
    assert before.keys() == files(run).keys()


HUGE = [
    (UNET, {"block_out_channels": [8192, 8192]}, "weights"),
    (UNET, {"layers_per_block": 10**9}, "out of bounds"),
    (UNET, {"layers_per_block": 17}, "layers_per_block"),
    (UNET, {"sample_size": 10**9}, "out of bounds"),
    (UNET, {"sample_size": 65536}, "sample_size"),
    (UNET, {"in_channels": 8000, "out_channels": 8000}, "weights"),
    (UNET, {"down_block_types": ["DownBlock2D"] * 1000}, "out of bounds"),
    (LEVELS, {"num_train_timesteps": 10**12}, "num_train_timesteps must be"),
    (LEVELS, {"trained_betas": [0.5] * 200_000}, "trained_betas"),
    (LEVELS, {"trained_betas": [2.0, 3.0]}, "trained_betas"),
    (LEVELS, {"beta_start": 0.0, "beta_end": 0.0}, "noise levels of the scheduler do not rise"),
    (FLOW, {"height": 8192, "width": 8192, "hidden": 4096}, "other sizes"),
    (FLOW, {"couplings": 10**9}, "couplings must be"),
    (FLOW, {"hidden": 10**9}, "hidden must be"),
    (FLOW, {"height": 10**12}, "height must be"),
]


@pytest.mark.parametrize("file, values, part", HUGE, ids=lambda v: str(v)[:40])
def test_sizes_are_looked_at_before_memory_is_taken(file, values, part, run, capfd):
    edit(run, file, **values)
    line = refused("restore" if file == FLOW else "sample", run, capfd)
    assert part in line


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def longer(path):
    """A sparse file of 100 TB, or as long as the file system lets it be."""
    with path.open("r+b") as file:
        for size in (10**14, 10**13, 10**12):
            try:
                return file.truncate(size)
            except OSError:
                continue


def header(path, text):
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def poisoned(path):
    state = load_file(path)
    name = next(iter(state))
    state[name] = torch.full_like(state[name], float("nan"))
    save_file(state, path)


DAMAGE = {
    "missing": lambda p: p.unlink(),
    "empty": lambda p: p.write_bytes(b""),
    "cut": cut,
    "longer": longer,
    "text": lambda p: p.write_bytes(b"no weights at all"),
    "a header of 2^62 bytes": lambda p: p.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
    "a deep header": lambda p: header(p, DEEP.encode()),
    "no tensors": lambda p: header(p, b"{}"),
    "a tensor of 2^60": lambda p: header(
        p,
        b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}',
    ),
    "others": lambda p: save_file({"other": torch.zeros(3)}, p),
    "not finite": poisoned,
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("file", [WEIGHTS, FLOW_WEIGHTS])
def test_weights_that_are_none(file, name, run, capfd):
    DAMAGE[name](run / file)
    if name == "missing" and file == FLOW_WEIGHTS:
        with pytest.raises(InputError, match="no posterior in"):
            Posterior.load(run)
        return
    refused("restore" if file == FLOW_WEIGHTS else "sample", run, capfd)


def test_sharded_weights_name_files_that_are_not_followed(run, capfd):
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../../secret.safetensors"}}
    path = run / "prior/unet/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert "sharded" in refused("sample", run, capfd)


def test_flows_without_conditions(tmp_path):
    Glow.create("tiny", SHAPE).save(tmp_path / "glow")
    assert Glow.load(tmp_path).shape == SHAPE
    for values in ({}, {"channels": 1}, {"hidden": 7}, {"couplings": 10**9}, {"channels": [1]}):
        whole = {"channels": 1, "height": 8, "width": 8, "couplings": 4, "hidden": 32}
        edited = (
            values
            if len(values) == 0
            else {**whole, **values, "extra": 1}
            if values == {"channels": 1}
            else {**whole, **values}
        )
        (tmp_path / "glow" / "config.json").write_text(json.dumps(edited))
        with pytest.raises(InputError):
            Glow.load(tmp_path)


# -- checkpoints of guided-diffusion --------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 1",)


ADM = {
    "a list": [torch.zeros(2)],
    "a tensor": torch.zeros(2),
    "numbers for names": {1: torch.zeros(2)},
    "a number in it": {"a": 3},
    "views of one number": {"a": torch.zeros(1).expand(10**12)},
    "code": {"a": Harmful()},
    "no fit": {"input_blocks.0.0.weight": torch.zeros(3), "out.2.weight": torch.zeros(3)},
    "not finite": {"a": torch.tensor([float("nan")])},
}


@pytest.mark.parametrize("name", ADM)
def test_checkpoints_of_strangers(name, tmp_path):
    torch.save(ADM[name], tmp_path / "a.pt")
    for layout in ("adm-ffhq256", Adm(16, 32, (1, 2), 1, ())):
        with pytest.raises(InputError) as error:
            Prior.load(tmp_path / "a.pt", layout=layout)
        assert "\n" not in str(error.value)


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    import zipfile

    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as whole,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in whole.namelist():
            small.writestr(entry, whole.read(entry))
    with pytest.raises(InputError, match="unpacks to more than its own size"):
        Prior.load(f"adm:ffhq256:{tmp_path}/b.pt")


# -- metrics --------------------------------------------------------------------------------------

FIGURES = [
    "1e308",
    "-1e308",
    "1e999",
    "NaN",
    "-Infinity",
    '"x"',
    "null",
    "true",
    "[]",
    "{}",
    "0",
    "-0.0",
]


@pytest.mark.parametrize("text", FIGURES)
def test_figures_of_any_kind_are_drawn_or_left_out(text, run):
    with (run / "metrics.jsonl").open("a") as file:
        for kimg in (0.4, 0.5, 0.6):
            for key in ("loss/prior", "seconds", "check/kept", "new"):
                file.write(f'{{"kimg": {kimg}, "{key}": {text}}}\n')
    assert run_report(run).stat().st_size > 1000


LINES = [DEEP, "{", "3", "null", "[1]", '{"loss": 1}', '{"kimg": "x"}', '{"kimg": NaN}']
LINES += ['{"kimg": -1}', '{"kimg": 1e308}', '{"kimg": true}', '{"kimg": ' + "9" * 400 + "}"]
LINES += [
    json.dumps({"kimg": 1} | {str(i): 1 for i in range(10_000)}),
    '{"a": "\\ud800", "kimg": 1}',
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:20])
def test_lines_that_are_none(line, run, capfd):
    kept = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(kept + line + "\n" + '{"kimg": 9}\n')
    assert "line 5" in refused("report", run, capfd)


# -- the reader -----------------------------------------------------------------------------------


def test_the_reader_of_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, "[[[", null, true], "b\\"[": {"c": 12345678901234567890}}')
    expected = {"a": [1, 2.5, "[[[", None, True], 'b"[': {"c": 12345678901234567890}}
    assert read_json(path) == read_object(path) == expected
    path.write_text("[" * 64 + "]" * 64)
    assert isinstance(read_json(path), list)
    path.write_text("[" * 65 + "]" * 65)
    with pytest.raises(InputError, match="more than 64 deep"):
        read_json(path)
    path.write_text('"' + "[" * 100_000 + '"')
    assert len(read_json(path)) == 100_000
    path.write_text("NaN")
    assert np.isnan(read_json(path, infinite=True))
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="larger than 16 MiB"):
        read_json(path)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(InputError):
            read_json(place)
    path.write_text('{"a": 1}\n{"a": NaN}\n{"a"')
    found = [(n, last, None if v is None else sorted(v)) for n, last, v in json_lines(path)]
    assert found == [(1, False, ["a"]), (2, False, ["a"]), (3, True, None)]
