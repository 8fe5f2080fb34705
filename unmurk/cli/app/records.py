"""What the actions of the app take and return: images, the estimate of their noise, results."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PAGE", "Estimate", "Images", "Outcome", "first_of"]

PAGE = "page.html"


@dataclass(frozen=True)
class Images:
    """The images that a user works on.

    Attributes:
        data: A file or a folder.
        label: What the user calls it.
        uploaded: Whether it belongs to the session.
        span: Numbers of black and white; None: those of the files.
    """

    data: Path
    label: str
    uploaded: bool = True
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Estimate:
    """The noise of images.

    Attributes:
        noise: Its text form, for --noise.
        figures: What `unmurk noise` printed as JSON.
        command: The command.
    """

    noise: str
    figures: dict[str, Any]
    command: str

    def lines(self) -> list[str]:
        """Return the estimate in words, one line for each channel, then the warnings."""
        channels = [v for k, v in self.figures.items() if k.startswith("channel ")]
        count = self.figures.get("images", 0)
        found = [f"{count} image{'' if count == 1 else 's'}"]
        for number, channel in enumerate(channels or [self.figures]):
            parts = [_with_error(channel, name) for name in ("gain", "sigma", "offset")]
            text = ", ".join(part for part in parts if part)
            levels = channel.get("in gray levels")
            text += f" (image range 1), which is {levels} of the files" if levels else ""
            text += f". {channel.get('model', '')}"
            found.append(f"channel {number}: {text}" if channels else f"noise: {text}")
        return found + [f"warning: {text}" for text in self.figures.get("warnings", [])]


def _with_error(figures: dict[str, Any], name: str) -> str:
    if figures.get(name) is None:
        return ""
    words = {"sigma": "standard deviation", "gain": "gain", "offset": "offset"}
    error = figures.get(f"{name} error")
    return f"{words[name]} {figures[name]:.3g}" + (f" ± {error:.1g}" if error else "")


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        key: Under which its files are offered (`Session.find`).
        files: Their names.
        command: The command.
        remarks: What it said.
    """

    key: str
    files: list[str] = field(default_factory=list)
    command: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def page(self) -> str:
        """The address of the page of the result."""
        return f"results/{self.key}/{PAGE}"


def first_of(images: Images) -> Any:
    """Return the first of the images, (C, H, W)."""
    from ...io.images import read_images

    return read_images(images.data, limit=1, span=images.span, nan="mask").images[0]
