"""Damage done to bytes: that of any file, and that which knows a format's structure."""

import ast
import io
import json
import random
import struct
import zipfile
import zlib
from typing import Any

__all__ = ["EXTREMES", "STRUCTURED", "mutated", "odd_json", "odd_text", "structured"]

EXTREMES = [0, 1, 2, 3, 8, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
HUGE = [-1, -(2**31), 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30]

ODD_TEXTS = [
    "",
    " ",
    ".",
    "..",
    "/",
    "-",
    "--",
    "--help",
    "-1",
    "~",
    "*",
    "%s%n",
    "{}",
    "$(x)",
    "\\",
    "'",
    '"',
    "a\nb",
    "a\rb",
    "a\tb",
    "\x1b[2Jx",
    "\x7f",
    "\u202e\u2066",
    "\u0130\u0131",
    "\U0001f9ff" * 3,
    "e\u0301",
    "\u4e2d\u6587",
    "\ufeffx",
    "\udcff",
    "a" * 300,
    "x/" * 200,
    "a:b",
    "a.npz:b",
    "a,b=c",
    "a|b",
    "CON",
]


def odd_text(draws: random.Random) -> str:
    """A text that programs trip over."""
    return draws.choice(ODD_TEXTS)


# -- any file ----------------------------------------------------------------------------------


def mutated(draws: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes with one to four random changes; `other` is what parts may be taken from."""
    for _ in range(draws.choice([1, 1, 1, 2, 4])):
        data = draws.choice(CHANGES)(draws, data, other)
    return data


def _place(draws: random.Random, data: bytes) -> int:
    """A position, in the head of a file in two of three cases."""
    end = len(data) if draws.random() < 0.33 else min(len(data), 160)
    return draws.randrange(end + 1)


def flip(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """Flip one to eight bits."""
    held = bytearray(data)
    for _ in range(draws.choice([1, 1, 2, 8])):
        at = _place(draws, data)
        if at < len(held):
            held[at] ^= 1 << draws.randrange(8)
    return bytes(held)


def cut(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """Keep the beginning."""
    return data[: draws.choice([0, 1, _place(draws, data), draws.randrange(len(data) + 1)])]


def insert(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """Put bytes in."""
    at = _place(draws, data)
    return data[:at] + draws.randbytes(draws.choice([1, 2, 4, 30])) + data[at:]


def remove(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """Take bytes out."""
    at = _place(draws, data)
    return data[:at] + data[at + draws.choice([1, 2, 4, 30]) :]


def swap(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """Exchange two neighbouring pieces."""
    a, b, c = sorted(_place(draws, data) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def extreme(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """Set a number of one, two, four or eight bytes to an extreme."""
    at, size = _place(draws, data), draws.choice([1, 2, 4, 4, 8])
    number = draws.choice(EXTREMES + HUGE) % 256**size
    order = draws.choice(["little", "big"])
    return data[:at] + number.to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]


def splice(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: _place(draws, data)] + other[_place(draws, other) :]


def repeat(draws: random.Random, data: bytes, other: bytes) -> bytes:
    """Repeat a piece."""
    a, b = sorted(_place(draws, data) for _ in range(2))
    return data[:b] + data[a:b] * draws.choice([1, 2, 50]) + data[b:]


CHANGES = [flip, flip, cut, insert, remove, swap, extreme, extreme, splice, repeat]


# -- by structure ------------------------------------------------------------------------------


def structured(draws: random.Random, name: str, data: bytes) -> bytes:
    """A file with one part of its structure changed and the rest kept in order."""
    change = STRUCTURED.get(name.rpartition(".")[2])
    try:
        return change(draws, data) if change else mutated(draws, data)
    except (
        struct.error,
        IndexError,
        ValueError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
    ):  # damaged before
        return mutated(draws, data)


def tiff(draws: random.Random, data: bytes) -> bytes:
    """Change entries of one directory of a TIFF."""
    held = bytearray(data)
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    head, wide = (8, 20) if big else (4, 12)
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, head)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    first = at + (8 if big else 2)
    for _ in range(draws.choice([1, 1, 1, 2, 3])):
        what = draws.random()
        entry = first + wide * draws.randrange(count)
        if what < 0.1:  # the link to the next directory: a loop, or nowhere
            link = first + wide * count
            target = draws.choice([at, at + 1, 0, 8, len(data), *EXTREMES])
            struct.pack_into(order + ("Q" if big else "I"), held, link, target)
        elif what < 0.2:
            struct.pack_into(order + "H", held, entry, draws.choice(TAGS))
        elif what < 0.35:
            struct.pack_into(order + "H", held, entry + 2, draws.choice([*range(20), 255, 65535]))
        elif what < 0.5:
            size = "Q" if big else "I"
            struct.pack_into(order + size, held, entry + 4, draws.choice(EXTREMES))
        elif what < 0.9:
            size, place = ("Q", entry + 12) if big else ("I", entry + 8)
            if draws.random() < 0.5:
                size = "H"
            number = draws.choice([*EXTREMES, 4, 5, 6, 7, 16, 32, 34925, 50000, 50001, 34712])
            struct.pack_into(order + size, held, place, number % 256 ** struct.calcsize(size))
        else:
            held[entry : entry + wide] = held[first : first + wide]
    return bytes(held)


TAGS = [254, 256, 257, 258, 259, 262, 270, 273, 277, 278, 279, 282, 284, 317, 320, 322, 323, 324]
TAGS += [325, 330, 338, 339, 347, 530, 532, 33432, 34118, 34412, 34665, 37724, 50838, 50839, 65535]


def npy(draws: random.Random, data: bytes) -> bytes:
    """Write another header before the numbers of a .npy file, with the right length."""
    size = struct.unpack_from("<H", data, 8)[0]
    body = data[10 + size :]
    header = ast.literal_eval(data[10 : 10 + size].decode("latin1").strip())
    fields: dict[str, list[Any]] = {"descr": DTYPES, "shape": SHAPES, "fortran_order": ORDERS}
    for key in draws.choice([["shape"], ["shape"], ["descr"], ["fortran_order"], list(fields)]):
        header[key] = draws.choice(fields[key])
    if draws.random() < 0.1:
        header.pop(draws.choice(list(header)))
    text = repr(header)
    if draws.random() < 0.15:
        text = draws.choice(
            ["{", "(" * 5000, "()", "", "[" * 90 + "]" * 90, "{'shape': 1}", text[:-1]]
        )
    if draws.random() < 0.3:
        body = draws.choice([b"", body[:-1], body * 2, body + b"\0"])
    raw = text.encode("latin1", "replace")
    raw += b" " * (-(len(raw) + 11) % 64) + b"\n"
    version = draws.choice([1, 1, 1, 2, 3, 0, 9, 255])
    length = struct.pack("<H", len(raw) % 65536) if version == 1 else struct.pack("<I", len(raw))
    return b"\x93NUMPY" + bytes([version, 0]) + length + raw + body


ORDERS = [True, False, 0, 1, "yes", None]
DTYPES = ["<f8", "<f4", "|u1", "<u2", ">u2", "<i4", "<i8", "<u8", "<f2", "<f16", "|b1", "<c8", "O"]
DTYPES += ["V16", "<U10", "S3", "<m8[ns]", "<M8[s]", [("a", "<f4")], [("a", "<f4", (10**9,))], 3]
DTYPES += ["<f4, <f4", "(2,)f4", "zz", "", None, "<V0", "|S0", "|V9999999999", "f" * 999, {"a": 1}]
SHAPES = [(), (0,), (-1,), (16,), (16, 16), (2, 16, 16), (2, 0, 16), (-1, 16, 16), (2, -16, -16)]
SHAPES += [(10**12,), (2**63,), (2**32, 2**32), (2**31, 16, 16), (1,) * 70, (True, 16), (2.0, 16)]
SHAPES += [
    ("2", 16),
    None,
    16,
    [2, 16, 16],
    (2**62, 4),
    (10**40, 1),
    (2, 16, 16, 1),
    (16, 0, 0, 1),
]


def zipped(draws: random.Random, data: bytes) -> bytes:
    """Change a directory field of a zip, or what is in it."""
    if draws.random() < 0.5:
        marks = [b"PK\3\4", b"PK\1\2", b"PK\5\6"]
        mark = draws.choice(marks)
        at = data.find(mark) + draws.randrange(4, 30)
        size = draws.choice([2, 4])
        number = draws.choice([*EXTREMES, 8, 9, 12, 14, 93, 95, 99]) % 256**size
        return data[:at] + number.to_bytes(size, "little") + data[at + size :]
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            method = draws.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
            part = old.read(name)
            part = npy(draws, part) if draws.random() < 0.8 else mutated(draws, part)
            if draws.random() < 0.2:
                name = draws.choice(["images", "a/b.npy", "../x.npy", "images.npy", "\u00e4.npy"])
            if name not in new.namelist():
                new.writestr(name, part, method)
    return stream.getvalue()


def png(draws: random.Random, data: bytes) -> bytes:
    """Change chunks of a PNG, with right checksums."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += 12 + size
    for _ in range(draws.choice([1, 1, 2])):
        what, chunk = draws.random(), draws.choice(chunks)
        if what < 0.5 and len(chunks[0][1]) == 13:
            parts = list(struct.unpack(">IIBBBBB", chunks[0][1]))
            place = draws.randrange(7)
            odd = EXTREMES if place < 2 else [0, 1, 2, 3, 4, 6, 8, 16, 32, 255]
            parts[place] = draws.choice(odd)
            chunks[0][1] = struct.pack(">IIBBBBB", *parts)
        elif what < 0.6:
            chunks.remove(chunk)
        elif what < 0.7:
            kind = draws.choice(
                [b"IDAT", b"tRNS", b"PLTE", b"gAMA", b"acTL", b"eXIf", b"iCCP", b"zTXt"]
            )
            chunks.insert(
                draws.randrange(len(chunks) + 1),
                [kind, draws.randbytes(draws.choice([0, 2, 6, 99]))],
            )
        elif what < 0.8:
            chunk[1] = mutated(draws, chunk[1])
        elif what < 0.9:
            packed = next((c for c in chunks if c[0] == b"IDAT"), chunk)
            raw = zlib.decompress(packed[1])
            packed[1] = zlib.compress(draws.choice([b"", raw[:-1], raw * 2, mutated(draws, raw)]))
        else:
            draws.shuffle(chunks)
        if not chunks:
            break
    out = data[:8]
    for kind, content in chunks:
        size = draws.choice(EXTREMES) if draws.random() < 0.03 else len(content)
        crc = zlib.crc32(kind + content)
        out += struct.pack(">I", size) + kind + content + struct.pack(">I", crc)
    return out


def jpeg(draws: random.Random, data: bytes) -> bytes:
    """Change the length or the content of one segment of a JPEG."""
    marks = [i for i in range(2, len(data) - 9) if data[i] == 255 and 192 <= data[i + 1] < 255]
    at = draws.choice(marks)
    place = at + draws.choice([1, 2, 4, 5, 7, 9])
    number = draws.choice(EXTREMES) % 65536
    return data[:place] + struct.pack(">H", number) + data[place + 2 :]


def bmp(draws: random.Random, data: bytes) -> bytes:
    """Change a field of a BMP's two headers."""
    place, size = draws.choice(
        [(2, 4), (10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (46, 4)]
    )
    number = draws.choice([*EXTREMES, *HUGE, 4, 16, 24, 32]) % 256**size
    return data[:place] + number.to_bytes(size, "little") + data[place + size :]


def idx(draws: random.Random, data: bytes) -> bytes:
    """Change the type or a side of an idx file."""
    place, size = draws.choice([(0, 1), (2, 1), (3, 1), (4, 4), (8, 4), (12, 4)])
    number = draws.choice(EXTREMES) % 256**size
    return data[:place] + number.to_bytes(size, "big") + data[place + size :]


def gz(draws: random.Random, data: bytes) -> bytes:
    """Change what a gzipped idx file holds, or the frame around it."""
    if draws.random() < 0.3:
        return mutated(draws, data)
    packer = zlib.compressobj(wbits=31)
    raw = idx(draws, zlib.decompress(data, 31))
    end = packer.compress(raw) + packer.flush()
    return end + end if draws.random() < 0.1 else end


def safetensors(draws: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, its length right, or its weights."""
    (size,) = struct.unpack_from("<Q", data, 0)
    body = data[8 + size :]
    what = draws.random()
    if what < 0.15:
        return struct.pack("<Q", draws.choice([*EXTREMES, 2**40, 2**63])) + data[8:]
    if what < 0.3:
        odd = draws.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"]
        )  # NaN, inf, 3e38
        at = 4 * draws.randrange(len(body) // 4)
        return data[: 8 + size] + body[:at] + odd + body[at + 4 :]
    text = odd_json(draws, json.loads(data[8 : 8 + size]))
    return struct.pack("<Q", len(text)) + text + body


STRUCTURED = {
    "tif": tiff,
    "tiff": tiff,
    "npy": npy,
    "npz": zipped,
    "png": png,
    "jpg": jpeg,
    "bmp": bmp,
    "idx3-ubyte": idx,
    "gz": gz,
    "safetensors": safetensors,
}


# -- JSON --------------------------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    10**18,
    1e308,
    -1e308,
    1e-320,
]
ODD_VALUES += [
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "\x1b[31m",
    "a\nb",
    [],
    {},
    [[]],
    [1, 2, 3],
]
ODD_VALUES += [
    {"a": {"b": []}},
    ["unet", None],
    [None, None],
    0.5,
    "../..",
    "/dev/zero",
    "e" * 5000,
]
ODD_VALUES += [10**400, [0] * 1000, -(10**400)]


def odd_json(draws: random.Random, value: Any) -> bytes:
    """JSON in which one to three values, keys or types are not what they should be."""
    what = draws.random()
    if what < 0.06:
        depth = draws.choice([100, 2000, 100000])
        bracket = draws.choice(["[]", '{"a":}'])
        return (bracket[:-1] * depth + "1" + bracket[-1] * depth).encode()
    if what < 0.12:
        return json.dumps(draws.choice(ODD_VALUES)).encode()
    for _ in range(draws.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            break
        held, key = draws.choice(places)
        if draws.random() < 0.2:
            del held[key]
        else:
            held[key] = draws.choice(ODD_VALUES)
        if isinstance(held, dict) and draws.random() < 0.1:
            held[odd_text(draws)] = draws.choice(ODD_VALUES)
    text = json.dumps(value).encode()
    if draws.random() < 0.1:
        return draws.choice(
            [b"\xef\xbb\xbf" + text, text[:-1], text + b"x", text.decode().encode("utf-16")]
        )
    return text


def _places(value: Any) -> Any:
    """Every container of nested JSON with every key of it."""
    keys = (
        value.keys()
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        yield value, key
        yield from _places(value[key])
