"""Make the packaged image sets from the original data sets.

    python benchmarks/assets/make_image_assets.py DATA [OUT]

DATA holds mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz (the original files) and
microscopy/dsb2018_patches64.npz (64x64 patches of the fluorescence images of the 2018 Data Science
Bowl; arrays train, val, train_src, val_src). OUT is unmurk/assets by default.
"""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

from unmurk.io.images import read_idx

DIGITS = {"train": ("train", 12_000), "test": ("t10k", 1_000)}
NUCLEI = {"train": 600, "val": 100}


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes as a gzipped idx file, reproducibly."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes(), 9, mtime=0))


def digits(data: Path, out: Path) -> None:
    """Write the first images of each split and their labels, in the original order."""
    for split, (original, count) in DIGITS.items():
        for kind, axes in (("images", "idx3"), ("labels", "idx1")):
            array = read_idx(data / f"{original}-{kind}-{axes}-ubyte.gz")
            write_idx(out / f"{split}.{axes}-ubyte.gz", array[:count])


def nuclei(data: Path, out: Path) -> None:
    """Write patches spread evenly over the source images; the splits share no source image."""
    source = np.load(data / "dsb2018_patches64.npz", allow_pickle=False)
    chosen = {}
    for split, count in NUCLEI.items():
        patches = np.linspace(0, len(source[split]) - 1, count).round().astype(int)
        chosen[split] = source[split][patches]
    assert not set(source["train_src"]) & set(source["val_src"])
    np.savez_compressed(out / "nuclei.npz", **chosen)


def main() -> None:
    """Write both sets and print the files."""
    data = Path(sys.argv[1])
    out = Path(sys.argv[2] if len(sys.argv) > 2 else "unmurk/assets")
    for name, make, folder in (("digits", digits, "mnist"), ("nuclei", nuclei, "microscopy")):
        (out / name).mkdir(parents=True, exist_ok=True)
        make(data / folder, out / name)
        for file in sorted((out / name).glob("*z")):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            print(f"{file}  {file.stat().st_size} bytes  sha256 {digest}")


if __name__ == "__main__":
    main()
