"""The vocabulary of `Pages.metadata`, and its values from OME-XML and ImageJ.

- ``pixel_size``: height and width of a pixel in micrometers, (y, x)
- ``z_step``: distance of neighboring planes in micrometers
- ``time_step``: time between neighboring frames in seconds
- ``exposure``: exposure time in seconds, a number; of several times the first
- ``channels``: names of the channels that are read, a list
- ``datetime``: when the image was taken, as the file writes it
- ``units``: unit of the intensities, where the file names one
- ``source``: the header of the file as it stands there, a text or a dict

A name is missing where the file does not tell. Values that are not finite or not positive are left
out.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any
from xml.etree import ElementTree

__all__ = ["NAMES", "collect", "from_imagej", "from_ome", "micrometers"]

NAMES = (
    *("pixel_size", "z_step", "time_step", "exposure"),
    *("channels", "datetime", "units", "source"),
)
LENGTHS = {  # in micrometers
    **{"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0},
    **{"micrometre": 1.0, "\\u00b5m": 1.0, "nm": 1e-3, "nanometer": 1e-3, "pm": 1e-6, "å": 1e-4},
    **{"mm": 1e3, "millimeter": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "meter": 1e6},
    **{"in": 25400.0, "inch": 25400.0},
}
TIMES = {"s": 1.0, "sec": 1.0, "second": 1.0, "ms": 1e-3, "µs": 1e-6, "us": 1e-6, "ns": 1e-9}
TIMES |= {"min": 60.0, "h": 3600.0}
LONGEST = 2**24  # characters of a text that is parsed


def micrometers(value: Any, unit: str = "µm") -> float | None:
    """Convert a length to micrometers; None for an unknown unit or a length that is not positive.

    >>> micrometers(250, "nm")
    0.25
    """
    return _positive(value, LENGTHS.get(str(unit).strip().lower()))


def _positive(value: Any, factor: float | None = 1.0) -> float | None:
    try:
        found = float(value) * (factor or 0.0)
    except (TypeError, ValueError, OverflowError):
        return None
    return float(f"{found:.12g}") if 0 < found < math.inf else None


def collect(
    y: float | None = None,
    x: float | None = None,
    z: float | None = None,
    channels: Iterable[str] = (),
    **others: Any,
) -> dict[str, Any]:
    """Return metadata with the names of this module, without what is missing.

    Args:
        y, x: Height and width of a pixel in micrometers.
        z: The distance of planes in micrometers.
        channels: Names of all channels; left out if one has no name.
        others: Further entries by name; None is left out.

    >>> collect(0.1, 0.1, exposure=None)
    {'pixel_size': (0.1, 0.1)}
    """
    found: dict[str, Any] = {}
    y, x, z = (_positive(value) for value in (y, x, z))
    if y is not None and x is not None:
        found["pixel_size"] = (y, x)
    names = [str(name) for name in channels]
    if names and all(names):
        found["channels"] = names
    for name in ("time_step", "exposure"):
        others[name] = _positive(others.get(name))
    found |= {"z_step": z, **others}
    return {name: value for name, value in found.items() if value not in (None, "")}


def from_ome(text: str) -> dict[str, Any]:
    """Return the metadata of the first image of OME-XML; none of a text that is not OME-XML.

    >>> from_ome('<OME><Image><Pixels PhysicalSizeX="5" PhysicalSizeY="5"/></Image></OME>')
    {'pixel_size': (5.0, 5.0)}
    """
    if not 0 < len(text) <= LONGEST:
        return {}
    try:
        root = ElementTree.fromstring(text.encode())
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError):
        return {}
    parts = {name: [e for e in root.iter() if _tag(e) == name] for name in ("Image", "Pixels")}
    if not parts["Pixels"]:
        return {}
    pixels = parts["Pixels"][0].attrib
    inside = list(parts["Pixels"][0])
    size = {
        axis: micrometers(
            pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        )
        for axis in "XYZ"
    }
    planes = [e.attrib for e in inside if _tag(e) == "Plane"]
    exposed = next((p for p in planes if "ExposureTime" in p), {})
    dates = [e.text for e in root.iter() if _tag(e) == "AcquisitionDate"]
    return collect(
        size["Y"],
        size["X"],
        size["Z"],
        [e.attrib.get("Name", "") for e in inside if _tag(e) == "Channel"],
        time_step=_time(pixels, "TimeIncrement"),
        exposure=_time(exposed, "ExposureTime"),
        datetime=dates[0] if dates else None,
    )


def _time(given: Mapping[str, str], name: str) -> float | None:
    return _positive(given.get(name), TIMES.get(given.get(f"{name}Unit", "s").lower()))


def _tag(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def from_imagej(given: Mapping[str, Any], resolution: tuple[float, float]) -> dict[str, Any]:
    """Return metadata of ImageJ's description and of the resolution tag.

    Args:
        given: The description, as tifffile parses it.
        resolution: Pixels for each unit along x and y.

    >>> from_imagej({"unit": "micron", "spacing": 2.0}, (4.0, 4.0))
    {'pixel_size': (0.25, 0.25), 'z_step': 2.0}
    """
    unit = str(given.get("unit", ""))
    sides = [micrometers(1 / r, unit) if r > 0 else None for r in resolution]
    return collect(
        sides[1],
        sides[0],
        micrometers(given.get("spacing"), unit),
        time_step=given.get("finterval"),
    )
