"""The headers of FITS files: the chain of units, and the selection of one of them.

The chain is walked before astropy sees the file, so that every declared size is compared with the
limits and with the length of the file.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...errors import InputError, size_text
from ..limits import check_numbers

__all__ = [
    "BLOCK",
    "TYPES",
    "Hdu",
    "HduSelection",
    "astropy_header",
    "find",
    "read_bytes",
    "text_of",
    "tile_sides",
    "walk",
]

BLOCK, CARD = 2880, 80
MOST_BLOCKS = 4096  # of a header: 147,456 cards
MOST_HDUS = 10_000
TYPES = {8: "uint8", 16: "int16", 32: "int32", 64: "int64", -32: "float32", -64: "float64"}
SCI = "SCI"
SELECTED = re.compile(r"(?:(?P<name>[^,=]+)(?:,(?P<version>\d+))?)?(?P<more>(?:,?\w+=[^,=]+)*)")


@dataclass
class Hdu:
    """A header and data unit: its name, its cards, and the shape of its image (rows last).

    The header begins at byte `start` of the file, the data at `data`, and they end at `end`.

    >>> unit = Hdu({"EXTNAME": "'SCI'", "EXTVER": "2"}, 0, 2880, 5760, (64, 64))
    >>> unit.name, unit.version, unit.label
    ('SCI', 2, 'SCI,2 64x64')
    """

    cards: dict[str, str]
    start: int
    data: int
    end: int
    shape: tuple[int, ...] = ()
    packed: bool = False
    name: str = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        self.name = text_of(self.cards.get("EXTNAME", ""))
        self.version = integer_of(self.cards.get("EXTVER", "1"), "EXTVER")

    @property
    def label(self) -> str:
        """Name, version and shape, for messages."""
        name = self.name or "primary"
        version = f",{self.version}" if self.version != 1 else ""
        return f"{name}{version} {size_text(self.shape) or '(no image)'}"


def text_of(value: str) -> str:
    """Return the text of a card's value, without its quotes.

    >>> text_of("'O''Hara  '")
    "O'Hara"
    """
    found = re.match(r"\s*'((?:[^']|'')*)'", value)
    return found[1].replace("''", "'").rstrip() if found else value.strip()


def integer_of(value: str, name: str) -> int:
    """Convert the value of the card with this name. Raises ValueError."""
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(f"its header has {name} = {value[:40]}") from error


def walk(file: Path, stream: IO[bytes], length: int | None) -> list[Hdu]:
    """Return the units of a FITS stream; `length`: of the file, None for a compressed one.

    >>> import io
    >>> import numpy as np
    >>> from astropy.io import fits
    >>> stream = io.BytesIO()
    >>> image = fits.ImageHDU(np.zeros((3, 4), np.float32), name="SCI")
    >>> fits.HDUList([fits.PrimaryHDU(), image]).writeto(stream)
    >>> stream.seek(0)
    0
    >>> units = walk(Path("a.fits"), stream, len(stream.getvalue()))
    >>> [(unit.name, unit.shape) for unit in units]
    [('', ()), ('SCI', (3, 4))]
    """
    found: list[Hdu] = []
    while len(found) < MOST_HDUS:
        start = stream.tell()
        cards = _header(file, stream, first=not found)
        if cards is None:
            return found
        size = _data_size(cards)
        data = stream.tell()
        end = data + size
        if length is None:
            check_numbers(file, end, 1)
        short = stream.seek(end) < end if length is None else end > length
        if short:
            raise InputError(
                f"cannot read {file}: it declares {size} bytes of data and is cut short"
            )
        found.append(_unit(cards, start, data, end))
        stream.seek(end + -end % BLOCK)
    raise InputError(f"cannot read {file}: it has more than {MOST_HDUS} extensions")


def _header(file: Path, stream: IO[bytes], first: bool) -> dict[str, str] | None:
    """Read the cards of the next header, the first of each name; None at the end of the file."""
    cards: dict[str, str] = {}
    for number in range(MOST_BLOCKS):
        block = stream.read(BLOCK)
        if number == 0 and not block.startswith((b"SIMPLE  ", b"XTENSION")):
            if first:
                raise InputError(f"cannot read {file}: it is no FITS file, or damaged")
            return None  # the standard allows further records, which are to be ignored
        if len(block) < BLOCK:
            break
        for start in range(0, BLOCK, CARD):
            card = block[start : start + CARD].decode("ascii", "replace")
            if card.rstrip() == "END":
                return cards
            value = card[10:] if "'" in card else card[10:].partition("/")[0]
            cards.setdefault(card[:8].rstrip(), value.strip())
    raise InputError(f"cannot read {file}: a header has no end; it is damaged or cut short")


def _sides(cards: dict[str, str], prefix: str = "") -> tuple[int, ...]:
    count = integer_of(cards.get(f"{prefix}NAXIS", "0"), f"{prefix}NAXIS")
    if not 0 <= count <= 999:
        raise ValueError(f"its header has {prefix}NAXIS = {count}")
    names = [f"{prefix}NAXIS{axis}" for axis in range(count, 0, -1)]
    sides = tuple(integer_of(cards.get(name, ""), name) for name in names)
    if any(side < 0 for side in sides):
        raise ValueError(f"its header has axes of length {min(sides)}")
    return sides


def tile_sides(cards: dict[str, str], shape: tuple[int, ...]) -> list[int]:
    """Return the sides of the tiles of a compressed image; one row without such cards.

    >>> tile_sides({"ZTILE1": "16", "ZTILE2": "8"}, (64, 64)), tile_sides({}, (64, 64))
    ([8, 16], [1, 64])
    """
    names = [f"ZTILE{axis}" for axis in range(len(shape), 0, -1)]
    default = [*[1] * (len(shape) - 1), shape[-1]]
    sides = [integer_of(cards.get(n, str(d)), n) for n, d in zip(names, default, strict=True)]
    if min(sides) < 1:
        raise ValueError(f"its header has tiles of {sides} pixels")
    return sides


def _data_size(cards: dict[str, str]) -> int:
    bits = integer_of(cards.get("BITPIX", ""), "BITPIX")
    more, groups = (
        integer_of(cards.get("PCOUNT", "0"), "PCOUNT"),
        integer_of(cards.get("GCOUNT", "1"), ""),
    )
    sides = _sides(cards)
    if bits not in TYPES or more < 0 or groups < 0:
        raise ValueError(f"its header has BITPIX = {bits}, PCOUNT = {more}")
    return abs(bits) // 8 * groups * (more + math.prod(sides)) if sides else 0


def _unit(cards: dict[str, str], start: int, data: int, end: int) -> Hdu:
    kind = text_of(cards.get("XTENSION", "IMAGE"))
    packed = kind == "BINTABLE" and cards.get("ZIMAGE", "")[:1] == "T"
    if kind != "IMAGE" and not packed:
        return Hdu(cards, start, data, end)
    shape = _sides(cards, "Z" if packed else "")
    if math.prod(shape) == 0 or len(shape) < 2:
        shape = ()
    return Hdu(cards, start, data, end, shape, packed)


@dataclass(frozen=True)
class HduSelection:
    """What a selection says: an extension by name and version or by number; bad pixels.

    >>> HduSelection.parse(Path("a.fits"), "SCI,dq=DQ,bits=3")
    HduSelection(name='SCI', version=None, dq='DQ', bits=3)
    """

    name: str = ""
    version: int | None = None
    dq: str = ""
    bits: int | None = None

    @classmethod
    def parse(cls, file: Path, text: str) -> "HduSelection":
        """Read the text in brackets.

        Raises:
            InputError: It has another form.

        >>> HduSelection.parse(Path("a.fits"), "SCI,2,dq=DQ").version
        2
        """
        found = SELECTED.fullmatch(text.replace(" ", ""))
        pairs = [] if found is None else [p.split("=") for p in found["more"].split(",") if p]
        options = dict(pairs)
        wrong = found is None or not set(options) <= {"dq", "bits"} or len(options) != len(pairs)
        if (
            wrong
            or not options.get("bits", "1").isdecimal()
            or ("bits" in options) > ("dq" in options)
        ):
            raise InputError(
                f"{file}[{text}]: write an extension as [SCI], [SCI,2] or [1], and bad pixels as "
                "[SCI,dq=DQ] or [SCI,dq=DQ,bits=3]"
            )
        assert found is not None
        version = None if found["version"] is None else int(found["version"])
        bits = int(options["bits"]) if "bits" in options else None
        return cls((found["name"] or "").upper(), version, options.get("dq", ""), bits)


def find(file: Path, units: list[Hdu], name: str, version: int | None) -> int:
    """Return the number of the unit that a name, or a number, selects.

    >>> units = [Hdu({}, 0, 2880, 2880), Hdu({"EXTNAME": "'ERR'"}, 2880, 5760, 8640, (64, 64))]
    >>> find(Path("a.fits"), units, "ERR", None)
    1
    >>> find(Path("a.fits"), units, "VAR", None)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: a.fits has no image [VAR]; it holds 1: ERR 64x64
    """
    if not name:
        images = [n for n, unit in enumerate(units) if unit.shape]
        named = [n for n in images if units[n].name.upper() == SCI]
        if not images:
            raise InputError(f"cannot read {file}: it holds no image")
        return (named or images)[0]
    for number, unit in enumerate(units):
        known = unit.name.upper() or ("PRIMARY" if number == 0 else "")
        by_number = name.isdecimal() and int(name) == number and version is None
        if (known == name and version in (None, unit.version)) or by_number:
            if unit.shape:
                return number
    wanted = name if version is None else f"{name},{version}"
    known = "; ".join(f"{n}: {unit.label}" for n, unit in enumerate(units) if unit.shape)
    raise InputError(f"{file} has no image [{wanted}]; it holds {known or 'none'}")


def read_bytes(file: Path, stream: IO[bytes], start: int, size: int) -> bytes:
    """Read bytes of a stream. Raises InputError if it is cut short.

    >>> import io
    >>> read_bytes(Path("a.fits"), io.BytesIO(b"SIMPLE  ="), 0, 6)
    b'SIMPLE'
    >>> read_bytes(Path("a.fits"), io.BytesIO(b"SIMPLE  ="), 0, 80)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot read a.fits: it is cut short
    """
    stream.seek(start)
    data = stream.read(size)
    if len(data) != size:
        raise InputError(f"cannot read {file}: it is cut short")
    return data


def astropy_header(file: Path, stream: IO[bytes], unit: Hdu) -> Any:
    """Return the header of a unit as an object of astropy.

    >>> import io
    >>> from astropy.io import fits
    >>> stream = io.BytesIO()
    >>> fits.PrimaryHDU(header=fits.Header({"TELESCOP": "Hale"})).writeto(stream)
    >>> stream.seek(0)
    0
    >>> unit = walk(Path("a.fits"), stream, None)[0]
    >>> astropy_header(Path("a.fits"), stream, unit)["TELESCOP"]
    'Hale'
    """
    from astropy.io import fits

    data = read_bytes(file, stream, unit.start, unit.data - unit.start)
    return fits.Header.fromstring(data)
