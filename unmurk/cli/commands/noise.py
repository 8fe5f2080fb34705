"""`unmurk noise`: the noise of images, its uncertainty, and what no model fits."""

import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...bounds import Whole
from ...errors import InputError, remark
from ...io.outputs import output
from ..data import (
    Sample,
    check_floats,
    hide_missing,
    list_skipped,
    measured,
    note_channels,
    run_frames,
    selection_of,
    warn_of_noise,
)
from ..maps import NEAR, check_maps
from ..options import (
    Axes,
    Channel,
    Command,
    Corrupted,
    Dark,
    Flat,
    FlatNoise,
    HotPixels,
    Json,
    MaybeInt,
    MaybePath,
    NanOption,
    NoiseMaps,
    Ranges,
    SkipBad,
)

if TYPE_CHECKING:
    import torch

    from ...io.axes import Selection
    from ...io.frames import Frames
    from ...io.images import ImageSet
    from ...io.scale import Scale
    from ...noise_estimation import Line, Patches

__all__ = ["Noise"]

HELD = 2**28  # bytes of the images that are examined, as float32
ENOUGH = 512
OTHER_SCENES = 2.0  # noise over time in units of that of single images
QUANTILES = {"dark": 0.02, "middle": 0.5, "bright": 0.98}
UNKNOWN = (
    "Whether fine texture was counted as noise: where no part of an image is flat, the estimate "
    "is too high. The standard errors do not contain this.",
    "Noise that was removed before: averaged, resized, sharpened, debayered or compressed images "
    "have less noise at fine detail than at coarse detail. A warning says so if it is strong.",
    "Fixed pattern, noise of the camera that is the same in every image: single images show it as "
    "noise, repeated captures do not. Use --dark and --flat.",
    "Sigma and offset of Poisson-Gaussian noise apart: only the variance at black is determined.",
)


@dataclass
class Noise(Command):
    """Estimate the noise of images, with its uncertainty, and print the --noise text to paste.

    Each channel gets Gaussian or Poisson-Gaussian noise, whichever its images show. Noise that no
    model fits is reported: correlated, striped, clipped, compressed or Rician.
    """

    data: Corrupted
    out: MaybePath = None
    """Picture of the variance over the mean (.png), or a page with all results (.html)."""
    repeats: Annotated[MaybeInt, Whole(2, 10_000)] = None
    """Number of consecutive images that show one scene, a whole number from 2 to 10000: the noise
    is also measured from their differences, whatever the scene holds."""
    noise_maps: NoiseMaps = None
    range: Ranges = ()
    axes: Axes = None
    channel: Channel = ()
    dark: Dark = None
    flat: Flat = None
    flat_noise: FlatNoise = "map"
    hot_pixels: HotPixels = "off"
    nan: NanOption = "refuse"
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        """See `Command`."""
        if self.out is None:
            return self._results()[0]
        if self.out.suffix.lower() not in (".png", ".html"):
            raise InputError(f"--out {self.out}: give a name that ends with .png or .html")
        inputs = [path for path in (self.data, self.dark, self.flat) if path is not None]
        with output(self.out, inputs, folder=False) as to:
            to.expect([self.out.name])
            result, lines = self._results()
            _write(self.out, str(self.data), result, lines)
        return {**result, "out": self.out}

    def _results(self) -> "tuple[dict[str, Any], list[Panel]]":
        """Return the result of the command, and what its picture shows."""
        import torch

        from ...noise_estimation import choose_noise, finite_values

        check_maps(self)
        y, scale, count, sample = self._measurements()
        check_floats(lambda: y, scale)
        note_channels(y, scale)
        over = {} if self.noise_maps is None else _over_maps(self, sample, scale)
        filled, operator = hide_missing(y, "identity")
        choice = choose_noise(filled, operator)
        models = getattr(choice.noise, "models", (choice.noise,) * y.shape[1])
        reasons = choice.reasons if len(choice.reasons) > 1 else choice.reasons * y.shape[1]
        warnings = warn_of_noise(filled, operator)
        panels, channels = [], []
        for i, (model, reason) in enumerate(zip(models, reasons, strict=True)):
            panel = _panel(filled[:, i : i + 1], operator, model, y[:, i], self.repeats)
            marks = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
            values = finite_values(y[:, i])
            marks = values[:: max(1, len(values) // 1_000_000)].double().quantile(marks)
            panels.append(panel)
            channels.append(_describe(panel, model, reason, marks, scale.channel(i)))
        names = {f"channel {i}": channel for i, channel in enumerate(channels)}
        result: dict[str, Any] = {"images": count, "noise": choice.noise.spec}
        result |= names if len(channels) > 1 else channels[0]
        result |= over
        result["warnings"] = warnings
        result["paste"] = f"--noise {choice.noise.spec}"
        if self.noise_maps is not None:
            scaled = not 1 / NEAR < over.get("noise over noise maps", 0.0) < NEAR
            auto = " --noise auto" if scaled else ""
            result["paste"] = f"--noise-maps {shlex.quote(self.noise_maps)}{auto}"
        elif not any(getattr(m, "gain", 0) or getattr(m, "sigma", 0) for m in models):
            result["paste"] = None  # `learn` refuses images without noise
        if result["paste"] is not None:
            result["paste"] = " ".join([result["paste"], *self._given()])
        return result, panels

    def _given(self) -> list[str]:
        """Return the options that decide what the noise is of, as they were given."""
        found: list[str] = []
        for name in (
            "range",
            "axes",
            "channel",
            "dark",
            "flat",
            "flat_noise",
            "hot_pixels",
            "nan",
        ):
            value = getattr(self, name)
            if value != getattr(type(self), name):
                several = value if name == "range" else (value,)
                for one in several:
                    words = one if isinstance(one, tuple) else (one,)
                    found += [f"--{name.replace('_', '-')}", *(_word(word) for word in words)]
        return found

    def _measurements(self) -> "tuple[torch.Tensor, Scale, int, Sample]":
        """Return measurements (N, C, H, W), their scale, the number of images, and the images.

        Images of one size are the measurements, or the first ones of a large set. Those of
        several sizes are cut into tiles. Hidden pixels are not finite.
        """
        from ...io.captures import sizes_in

        select = selection_of(self)
        if len(set(sizes_in(self.data, select))) > 1:
            return self._tiles(select)
        data = self._images(select)
        frames = self._frames(lambda: data)
        y = frames.correct(data.images)
        return y, data.scale, len(data), Sample(y, data.numbers or None)

    def _frames(self, sample: "Callable[[], ImageSet]") -> "Frames":
        """Read the calibration frames. The noise of images as recorded needs no division."""
        given = (self.dark, self.flat, self.hot_pixels)
        frames = run_frames(*given, sample, select=selection_of(self))
        return frames if self.flat_noise == "even" else frames.undivided()

    def _tiles(self, select: "Selection") -> "tuple[torch.Tensor, Scale, int, Sample]":
        """Return tiles of images of several sizes; see `_measurements`."""
        import torch

        from ...io.captures import open_captures
        from ...io.crops import tiles
        from ...io.images import ImageSet
        from ...io.scale import Scale
        from ...operators import as_operator

        scratch = Path(tempfile.gettempdir())
        given = (self.skip_bad, self.range, self.nan)
        captures = open_captures(self.data, *given, scratch, select)
        list_skipped(dict(captures.skipped))
        if captures.note:
            remark(f"{self.data}: {captures.note}")
        scale = captures.scale or Scale()
        frames = self._frames(lambda: ImageSet(captures.first(), [], scale))
        cut = captures.corrected(frames)
        y, operator = tiles(cut, as_operator("identity"), self.repeats or 1)
        observed = operator.bind(range(len(y)), tuple(y.shape[1:])).apply_mask(torch.ones_like(y))
        y = y.masked_fill(observed == 0, float("nan"))
        return y, scale, len(captures), Sample(cut)

    def _images(self, select: "Selection") -> "ImageSet":
        """Read the images, or the first ones of a large set."""
        from ...io.images import ImageSet
        from ...io.scale import Scale

        data = measured(self.data, self.skip_bad, self.range, self.nan, select)
        found = getattr(data, "images", data)
        most = max(1, HELD // (4 * found.shape[1] * found.shape[2] * found.shape[3]))
        most = min(len(found), most, ENOUGH * (self.repeats or 1))
        if self.repeats is not None:
            if len(found) % self.repeats:
                raise InputError(
                    f"{len(found)} images are not {self.repeats} for each scene: give another "
                    "--repeats, or remove images of incomplete scenes"
                )
            most = max(self.repeats, most // self.repeats * self.repeats)
        numbers = list(getattr(data, "numbers", []))[:most]
        return ImageSet(found[:most], [], data.scale or Scale(), numbers=numbers)

    def show(self, result: dict[str, Any]) -> None:
        """Print the results, what they cannot show, and the text to paste."""
        super().show({k: v for k, v in result.items() if k not in ("warnings", "paste")})
        print("what the images cannot show:")
        for text in UNKNOWN:
            print(f"  {text.partition(':')[0]}")
        if result["paste"] is None:
            print("nothing to paste: the images show no noise")
        else:
            doubt = " (the warning above says why it does not fit)" if result["warnings"] else ""
            print(f"paste: {result['paste']}{doubt}")


def _word(value: Any) -> str:
    """Return a value as a word of a command line."""
    return f"{value:.15g}" if isinstance(value, float) else shlex.quote(str(value))


def _over_maps(command: Noise, sample: Sample, scale: "Scale") -> dict[str, Any]:
    """Return the noise that images show in units of their noise maps, which is 1 if these hold it.

    For weights it is the standard deviation at the mean weight.
    """
    from ...io.map_scale import measured_scale
    from ...io.noise_maps import kind_of, read_noise_maps
    from ...operators import as_operator

    text, select = str(command.noise_maps), selection_of(command).beside()
    weights = kind_of(text)[0] == "weights"
    maps = read_noise_maps(
        text,
        gain=scale.gain,
        sigma=1.0 if weights else 0.0,
        select=select,
        skip_bad=command.skip_bad,
    )
    found = measured_scale(maps, sample.y, as_operator("identity"), sample.numbers)
    name = "noise at the mean weight" if weights else "noise over noise maps"
    return _with_error(name, found.factor, found.error)


class Panel:
    """One channel of the photon-transfer picture.

    Attributes:
        line: The line of single images.
        patches: Its patches.
        temporal: The line of repeated captures, or None.
    """

    def __init__(self, line: "Line", patches: "Patches", temporal: "Line | None") -> None:
        self.line, self.patches, self.temporal = line, patches, temporal


def _panel(
    y: "torch.Tensor", operator: Any, model: Any, measured: "torch.Tensor", repeats: int | None
) -> Panel:
    """Estimate one channel with its uncertainty, also over time from `measured` (N, H, W)."""
    from ...noise import Gaussian
    from ...noise_estimation import bootstrap, temporal_line

    kind = "gaussian" if isinstance(model, Gaussian) else "poisson-gaussian"
    line, patches = bootstrap(y, operator, kind)  # type: ignore[arg-type]
    temporal = None
    if repeats is not None:
        temporal = temporal_line(measured.unflatten(0, (-1, repeats)))
    return Panel(line, patches, temporal)


def _describe(
    panel: Panel, model: Any, reason: str, marks: "torch.Tensor", scale: "Scale"
) -> dict[str, Any]:
    """Return the numbers of a channel: parameters and their standard errors."""
    from ...noise import Gaussian

    line = panel.line
    found: dict[str, Any] = {"model": reason}
    error = line.covariance.diagonal().clamp_min(0).sqrt().tolist()
    if isinstance(model, Gaussian):
        found |= _with_error("sigma", model.sigma, error[1] / max(2 * model.sigma, 1e-12))
    else:
        found |= _with_error("gain", model.gain, error[0])
        if model.sigma:
            found |= _with_error("sigma", model.sigma, error[1] / (2 * model.sigma))
        else:
            found |= _with_error("offset", model.offset, error[1] / model.gain)
    if scale.gain != 1.0:
        found["in gray levels"] = _in_levels(model, scale)
    if panel.temporal is None:
        return found
    other = panel.temporal
    errors = other.covariance.diagonal().clamp_min(0).sqrt().tolist()
    over_time: dict[str, Any] = _with_error("gain", other.gain, errors[0])
    over_time |= _with_error("variance at 0", other.rest, errors[1])
    for name, mark in zip(QUANTILES, marks.tolist(), strict=True):
        spatial = float(model.variance(marks.new_tensor(mark))) ** 0.5
        temporal = max(0.0, other.gain * mark + other.rest) ** 0.5
        over_time[name] = {
            "mean": mark,
            "sigma of single images": spatial,
            "sigma over time": temporal,
            "ratio": spatial / temporal if temporal else None,
        }
    found["repeats"] = over_time
    ratios = [1 / over_time[name]["ratio"] for name in QUANTILES if over_time[name]["ratio"]]
    if ratios and max(ratios) > OTHER_SCENES:
        remark(
            f"consecutive captures differ by {max(ratios):.1f} times the noise of single images:"
            " are they of one scene, and in focus alike?"
        )
    return found


def _with_error(name: str, value: float, error: float) -> dict[str, Any]:
    return {name: value, f"{name} error": error}


def _levels(value: float) -> str:
    """Write gray levels without a power of ten, as they stand in the files."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _in_levels(model: Any, scale: "Scale") -> str:
    """Return the numbers of a model in gray levels of the files; the scale is of one channel."""
    black, white = scale.ends.pairs[0]
    step, parts = white - black, []
    if getattr(model, "gain", 0):
        parts.append(f"gain {1 / (model.gain * step):.3g} e/dn")
    if model.sigma:
        parts.append(f"sigma {_levels(model.sigma * step)} dn")
    if getattr(model, "offset", 0):
        parts.append(f"offset {_levels(model.offset * step + black)} dn")
    return ", ".join(parts)


# -- the picture ----------------------------------------------------------------------------------


def _write(out: Path, title: str, result: dict[str, Any], panels: list[Panel]) -> None:
    """Write the picture, or a page with it."""
    from ...io import atomic

    picture = _draw(panels)
    if out.suffix.lower() == ".png":
        atomic.write(out, picture)
        return
    from ..console import lines, plain
    from ..report import Pictures, Table, Text, write

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "transfer.png"
        file.write_bytes(picture)
        rows = [
            line.strip().split(None, 1) if " " in line.strip() else (line.strip(), "")
            for line in lines(plain({k: v for k, v in result.items() if k != "warnings"}))
        ]
        caption = "Variance of the noise over the mean intensity"
        sections: list[Any] = [
            Text("To paste", result["paste"] or "nothing: the images show no noise"),
            Pictures("Photon transfer", {caption: file}),
        ]
        if result["warnings"]:
            sections.insert(1, Text("Noise that no model fits", result["warnings"]))
        sections += [
            Table("Numbers", ["name", "value"], [list(row) for row in rows]),
            Text("What the images cannot show", UNKNOWN),
        ]
        write(out, f"Noise of {title}", sections)


BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#888888"  # Okabe and Ito: safe for color blindness


def _draw(panels: list[Panel]) -> bytes:
    """Draw the photon-transfer picture as PNG, one panel below the other, for 400 pixels width."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3.3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        _draw_panel(axis, panel)
        if len(panels) > 1:
            axis.set_title(f"channel {number}", fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=200)
    return stream.getvalue()


def _draw_panel(axis: Any, panel: Panel) -> None:
    import torch

    line, patches = panel.line, panel.patches
    step = max(1, len(patches.mean) // 3000)
    mean, power = patches.mean[::step], patches.power[::step]
    axis.scatter(mean, power, s=3, c=GRAY, alpha=0.35, linewidths=0, label="patches")
    means = line.means.numpy()
    axis.errorbar(
        means,
        line.variances.numpy(),
        line.errors.numpy(),
        fmt="o",
        ms=4,
        color=BLUE,
        capsize=2,
        label="lower edge",
    )
    ends = torch.stack([patches.mean.min(), patches.mean.max()])
    grid = torch.linspace(float(ends[0]), float(ends[1]), 50, dtype=torch.float64)
    axis.plot(grid, line.gain * grid + line.rest, color=BLUE, lw=1.8, label="model")
    highest = max(line.variances.max().item(), (line.gain * ends + line.rest).max().item())
    if panel.temporal is not None:
        other = panel.temporal
        axis.plot(other.means, other.variances, "s", ms=4, mfc="none", color=ORANGE)
        axis.plot(
            grid, other.gain * grid + other.rest, "--", color=ORANGE, lw=1.8, label="repeats"
        )
        highest = max(highest, other.variances.max().item())
    axis.set_ylim(0, 1.6 * highest)
    axis.set_xlabel("mean (0 black, 1 white)", fontsize=10)
    axis.set_ylabel("variance", fontsize=10)
    axis.tick_params(labelsize=9)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axis.legend(fontsize=9, frameon=False, loc="upper left")
