r"""Magnetic resonance imaging: some columns of the image's Fourier transform, received by coils.

For a complex image x and coils c = 1, ..., N with sensitivities :math:`s_c`,
:math:`\sum_c |s_c|^2 = 1`,

.. math:: y_c = m \odot F (s_c \odot x), \qquad A^T y = \sum_c \bar s_c \odot F^H (m \odot y_c),

with F the orthonormal centered two-dimensional Fourier transform (frequency zero at row H // 2,
column W // 2) and m a mask of zeros and ones over the columns of F. With all columns
:math:`A^T A = I`, so noise of standard deviation sigma in y is noise of that standard deviation in
the image.

Complex numbers are stored as pairs of channels, real and imaginary part. An image of one channel
is a real image. Then :math:`A^T` is the real part of the above, because A acts on the real numbers
only.

**One coil** (s = 1): :math:`A^T A` is a convolution, :math:`F^H w F`, with w = m for complex
images. For real images it is :math:`x \mapsto \operatorname{Re} F^H m F x`. The real part of a
convolution kernel has the mean of m at k and at -k as its transform: w(k) = (m(k) + m(-k)) / 2, so
w is 0, 1/2 or 1. In both cases

.. math::

    A^+ y &= F^H \left[ F A^T y / w \right] \text{ where } w > 0, \text{ zero elsewhere} \\
    \mathrm{prox}(z, y, \gamma) &= z + F^H \left[ \frac{\gamma}{1 + \gamma w} F A^T (y - A z)
        \right]

**Several coils**: conjugate gradients on :math:`A^T A`, which is how K. P. Pruessmann et al.
(2001), "Advances in sensitivity encoding with arbitrary k-space trajectories", reconstruct.
Components that the coils hardly distinguish come with much noise, so the iterations for
:math:`A^+` stop after `ITERATIONS`.

The columns are those of the random masks of J. Zbontar et al. (2018), "fastMRI: an open dataset
and benchmarks for accelerated MRI", arXiv 1811.08839: n = round(center W) columns in the middle,
and each other one with probability (W / acceleration - n) / (W - n), so that W / acceleration are
expected in all.

The sensitivities are simulated. Coil c sits at :math:`q_c`, on a circle of radius `RADIUS` around
an image that fills [-1, 1] x [-1, 1], at the angle :math:`a_c = 360 (c - 1) / N` degrees. The
vector :math:`p - q_c` points from it to the pixel p, and is read as a complex number:

.. math::

    s_c(p) \propto \exp\left( -\frac{|p - q_c|^2}{2\, \mathtt{WIDTH}^2} \right)
        \frac{p - q_c}{|p - q_c|}\, e^{-i a_c}

**Measured data**: `FileMri` reads the mask and the sensitivities from an HDF5 file. Its mask may
cover any pixels of k-space, and w(k) is then the mean over k and -k of both axes. Its
sensitivities are used as they are, so :math:`A^T A = I` holds with all of k-space only where their
squares add up to one.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import SEED, File, Option, Real, Text, Whole, check_tables
from ..errors import InputError, size_text
from ..rng import PerImageGenerator, StreamId
from .base import Operator
from .files import KspaceFile

__all__ = ["CartesianMri", "FileMri", "Mri", "sensitivities"]

ITERATIONS = 20  # of conjugate gradients on A^T A x = A^T y for A^+ with several coils
RADIUS = 2.0  # of the circle of coils, in half sides of the image: well outside its corners
WIDTH = 1.2  # of a coil's Gaussian profile, in half sides of the image


class Mri(Operator):
    """Acquire a part of k-space with several coils: what the operators of this module share.

    Attributes:
        channels: Channels of the image: 2 for complex images, 1 for real ones.
        columns: m, (B, 1, 1, W) for whole columns, or (B, 1, H, W); None before `bind`.
        maps: The sensitivities s_c, complex, (1 or B, coils, H, W); None before `bind`.

    >>> from unmurk.operators import parse
    >>> A = parse("mri:cartesian,acceleration=1,coils=3")  # all of k-space
    >>> x = torch.ones(1, 2, 8, 8)
    >>> bool((A.A_adjoint(A.A(x)) - x).abs().max() < 1e-5)
    True
    """

    pictorial = False
    tensors = ("columns", "maps")
    channels: int
    columns: Tensor | None = None
    maps: Tensor | None = None

    @property
    def uniform(self) -> bool:
        """Whether there is one coil, of sensitivity 1."""
        raise NotImplementedError

    def _coils(self) -> int:
        raise NotImplementedError

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (2 coils, H, W)."""
        self._check_channels(x_shape)
        return 2 * self._coils(), *x_shape[-2:]

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (channels, H, W). Raises InputError if y has not 2 channels for each coil."""
        if y_shape[-3] != 2 * self._coils():
            raise InputError(
                f"{self.form}: a measurement has 2 channels for each coil, {2 * self._coils()},"
                f" this one has {y_shape[-3]}: give the number of coils it was made with"
            )
        return self.channels, *y_shape[-2:]

    def _check_channels(self, shape: Sequence[int]) -> None:
        if shape[-3] != self.channels:
            raise InputError(
                f"{self.form}: the image has {shape[-3]} channels but channels={self.channels}:"
                f" complex images have 2, real ones 1 (with channels=1 in the text form)"
            )

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.maps is not None
        self._check_channels(shape)
        if self.maps.shape[-2:] != tuple(shape[-2:]):
            raise InputError(
                f"{self.form}: it is bound to images of {size_text(self.maps.shape[-2:])} but"
                f" this one is {size_text(shape[-2:])}: bind it again with bind(index, shape)"
            )

    def apply_mask(self, y: Tensor) -> Tensor:
        """Set the columns of y that were not acquired to zero."""
        op = self._bound(y, self.x_shape(y.shape))
        assert isinstance(op, Mri) and op.columns is not None
        return torch.where(op.columns > 0, y, torch.zeros((), dtype=y.dtype, device=y.device))

    # -- the maps --------------------------------------------------------------------------------

    def _A(self, x: Tensor) -> Tensor:
        assert self.columns is not None and self.maps is not None
        image = _complex(x) if self.channels == 2 else x
        return _pairs(self.columns * _fourier(self.maps * image))

    def _A_adjoint(self, y: Tensor) -> Tensor:
        assert self.maps is not None
        each = self.maps.conj() * _inverse(_complex(self.apply_mask(y)))
        return self._image(each.sum(1, keepdim=True))

    def _A_dagger(self, y: Tensor) -> Tensor:
        if not self.uniform:
            return super()._A_dagger(y)
        w = self._weights()
        return self._filter(self._A_adjoint(y), torch.where(w > 0, 1 / w.clamp_min(0.5), 0.0))

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        if not self.uniform:
            return super()._prox(z, y, gamma)
        back = self._A_adjoint(y - self._A(z))
        return z + self._filter(back, gamma / (1 + gamma * self._weights()))

    def _weights(self) -> Tensor:
        """w, in the shape of m."""
        assert self.columns is not None
        if self.channels == 2:
            return self.columns
        found = self.columns
        for axis in (-2, -1):  # m at -k, for the frequencies of `_fourier`
            length = found.shape[axis]
            index = torch.arange(length, device=found.device) - length // 2
            found = found.index_select(axis, (length // 2 - index) % length)
        return (self.columns + found) / 2

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        """F^H gain F x."""
        image = _complex(x) if self.channels == 2 else x
        return self._image(_inverse(gain * _fourier(image)))

    def _image(self, image: Tensor) -> Tensor:
        """Convert complex images (B, 1, H, W) to the channels of this operator's images."""
        return _pairs(image) if self.channels == 2 else image.real


class CartesianMri(Mri):
    """Acquire random columns of k-space and all columns in its middle; each image has its own.

    Text form: "mri:cartesian,acceleration=4,center=0.08,coils=1,seed=0". Images are (2, H, W),
    real and imaginary part, or (1, H, W) with channels=1. Measurements are (2 coils, H, W): coil
    by coil, the real and the imaginary part of k-space. Columns that were not acquired hold zero,
    carry no noise and do not count.

    Args:
        acceleration: W divided by the expected number of columns, a number from 1 to 1024.
        center: Fraction of the columns that are always acquired, in the middle, a number from 0 to
            1, and at most 1 / acceleration; at least one column is.
        coils: Receiver coils, a whole number from 1 to 256. One coil is uniform, with
            sensitivity 1.
        channels: Channels of the image, a whole number from 1 to 2: 2 for complex images, 1 for
            real ones.
        seed: Seed of the masks, a whole number from 0 to 9223372036854775807. The mask of an
            image depends on the seed and on the image's number.

    Attributes:
        columns: m, (B, 1, 1, W); None before `bind`.
        maps: The sensitivities s_c, complex, (1, coils, H, W); None before `bind`.

    Raises:
        InputError: An option is out of its bounds; from `bind`, the sensitivities are above the
            limit of `bounds.TABLES`.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("mri:cartesian,acceleration=4,coils=2,channels=1")
    >>> A.A(torch.zeros(1, 1, 16, 16)).shape
    torch.Size([1, 4, 16, 16])
    """

    form = "mri:cartesian"
    extent = "a frequency is a sum over all pixels of the image"
    options: ClassVar[dict[str, Option]] = {
        "acceleration": Real(1, 1024),
        "center": Real(0, 1),
        "coils": Whole(1, 256),
        "channels": Whole(1, 2),
        "seed": SEED,
    }
    acceleration: float
    center: float
    coils: int
    channels: int
    seed: int

    def __init__(
        self,
        acceleration: float = 4.0,
        center: float = 0.08,
        coils: int = 1,
        channels: int = 2,
        seed: int = 0,
    ) -> None:
        self._take_options(
            acceleration=acceleration, center=center, coils=coils, channels=channels, seed=seed
        )
        if self.center > 1 / self.acceleration:
            raise InputError(
                f"{self.form}: center must be at most 1 / acceleration, got {center} with"
                f" acceleration={acceleration:g}"
            )
        if self.coils > 1:
            self.dagger_iterations = ITERATIONS

    @property
    def uniform(self) -> bool:
        """Whether there is one coil, of sensitivity 1."""
        return self.coils == 1

    def _coils(self) -> int:
        return self.coils

    # -- binding to images and shapes ------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator with the columns of these images; see `Operator.bind`."""
        self._check_channels(shape)
        numbers = [int(i) for i in index]
        if any(i < 0 for i in numbers):
            raise InputError(f"{self.form}: image numbers must be >= 0, got {min(numbers)}")
        height, width = shape[-2:]
        check_tables(
            f"{self.form},coils={self.coils}",
            f"computing the sensitivities for images of {size_text(shape[-2:])}",
            48.0 * self.coils * height * width,
            "lower coils, or use smaller images",
        )
        columns = self._draw(numbers, width).to(self.device)
        maps = sensitivities(self.coils, height, width).to(self.device)
        return self._with(columns=columns, maps=maps)

    def _draw(self, index: list[int], width: int) -> Tensor:
        """Masks (B, 1, 1, W) on the CPU."""
        middle = max(1, round(width * self.center))
        others = max(0.0, width / self.acceleration - middle) / max(1, width - middle)
        # the path is longer than those of other masks, so that the draws are other numbers
        columns = PerImageGenerator(self.seed, index, StreamId.MASK, 2).rand(1, 1, width) < others
        first = (width - middle + 1) // 2
        columns[..., first : first + middle] = True
        return columns.float()


class FileMri(Mri):
    """Acquire the part of k-space that an HDF5 file holds, with its coil sensitivities.

    Text form: "mri:file,path=scan.h5". The measurements are the data set `kspace`, complex,
    (slices, coils, H, W), or (slices, H, W) for one coil, as in fastMRI; slice i is image i. The
    same file is DATA: `unmurk solve scan.h5 --operator mri:file,path=scan.h5 ...`.

    Args:
        path: The path of a file, at most 4096 characters.
        kspace: Name of the data set of k-space, a text of 1 to 256 characters.
        sampling: Name of the sampling mask, a text of 1 to 256 characters: zeros and ones (W),
            (H, W), (slices, W) or (slices, H, W). Unset: "mask", if there is such a data set;
            otherwise the samples count as acquired that are not zero in all coils.
        sensitivities: Name of the sensitivities, a text of 1 to 256 characters: complex,
            (coils, H, W) or (slices, coils, H, W). Unset: the first of "maps", "sensitivities"
            and "sens_maps" that there is. Several coils need them; one coil without them is
            uniform.
        channels: Channels of the image, a whole number from 1 to 2: 2 for complex images, 1 for
            real ones.

    Raises:
        InputError: An option is out of its bounds; from `bind` and the shapes, the file is not
            readable or its data sets do not fit together.

    >>> import h5py
    >>> with h5py.File("scan.h5", "w") as file:
    ...     file["kspace"] = torch.ones(1, 4, 4, dtype=torch.complex64).numpy()
    >>> A = FileMri("scan.h5")
    >>> x = A.A_dagger(torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(1, 2, 4, 4))
    >>> x[0, 0, 2]  # a flat spectrum is a point, of height sqrt(16)
    tensor([0., 0., 4., 0.])
    """

    form = "mri:file"
    options: ClassVar[dict[str, Option]] = {
        "path": File(),
        "kspace": Text(256),
        "sampling": Text(256, optional=True),
        "sensitivities": Text(256, optional=True),
        "channels": Whole(1, 2),
    }
    path: str
    kspace: str
    sampling: str | None
    sensitivities: str | None
    dagger_iterations = ITERATIONS

    def __init__(
        self,
        path: str | Path,
        kspace: str = "kspace",
        sampling: str | None = None,
        sensitivities: str | None = None,
        channels: int = 2,
    ) -> None:
        self._take_options(
            path=path,
            kspace=kspace,
            sampling=sampling,
            sensitivities=sensitivities,
            channels=channels,
        )
        self.path = str(self.path)

    @property
    def _file(self) -> KspaceFile:
        return KspaceFile.of(self.form, self.path, self.kspace, self.sampling, self.sensitivities)

    def _coils(self) -> int:
        return self._file.shape[1]

    @property
    def uniform(self) -> bool:
        """Whether there is one coil, of sensitivity 1."""
        return self._coils() == 1 and self._file.sensitivities is None

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator with the mask and sensitivities of these slices."""
        self._check_channels(shape)
        numbers, file = [int(i) for i in index], self._file
        slices, coils, height, width = file.shape
        if numbers and not 0 <= min(numbers) <= max(numbers) < slices:
            raise InputError(
                f"{self.form}: {self.path} holds {slices} slices, so there is no image"
                f" {max(numbers)}: give the same file as DATA"
            )
        if (height, width) != tuple(shape[-2:]):
            raise InputError(
                f"{self.form}: k-space in {self.path} is {size_text((height, width))} but the"
                f" image is {size_text(shape[-2:])}: give the same file as DATA"
            )
        check_tables(
            f"{self.form},path={self.path}",
            f"the sensitivities of {len(numbers)} slices",
            8.0 * len(numbers) * coils * height * width,
            "give a smaller --batch",
        )
        columns = torch.from_numpy(file.masks(numbers)).to(self.device)
        maps = torch.from_numpy(file.maps(numbers)).to(self.device)
        return self._with(columns=columns, maps=maps)


def sensitivities(coils: int, height: int, width: int) -> Tensor:
    r"""Simulate the sensitivities :math:`s_c` of coils on a circle around the image.

    Args:
        coils: Number of coils. One coil has sensitivity 1.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Returns:
        complex64, (1, coils, H, W), with :math:`\sum_c |s_c|^2 = 1`.

    >>> sensitivities(3, 4, 4).abs().square().sum(-3).sub(1).abs().max().item() < 1e-6
    True
    """
    if coils == 1:
        return torch.ones(1, 1, height, width, dtype=torch.complex64)
    down, across = ((2 * torch.arange(n).double() + 1) / n - 1 for n in (height, width))
    angle = 2 * math.pi / coils * torch.arange(coils).double()[:, None, None]
    phase = torch.polar(torch.ones_like(angle), angle)
    away = (
        torch.complex(across.expand(height, -1), -down[:, None].expand(-1, width)) - RADIUS * phase
    )
    maps = torch.exp(-away.abs().square() / (2 * WIDTH**2)) * away.sgn() * phase.conj()
    return (maps / maps.abs().square().sum(0).sqrt()).to(torch.complex64)[None]


def _fourier(x: Tensor) -> Tensor:
    """Apply F over the last two axes."""
    x = torch.fft.fft2(torch.fft.ifftshift(x, (-2, -1)), norm="ortho")
    return torch.fft.fftshift(x, (-2, -1))


def _inverse(k: Tensor) -> Tensor:
    """Apply F^H over the last two axes."""
    k = torch.fft.ifft2(torch.fft.ifftshift(k, (-2, -1)), norm="ortho")
    return torch.fft.fftshift(k, (-2, -1))


def _complex(pairs: Tensor) -> Tensor:
    """Convert (B, 2 N, H, W) real to (B, N, H, W) complex."""
    return torch.complex(pairs[:, 0::2], pairs[:, 1::2])


def _pairs(numbers: Tensor) -> Tensor:
    """Convert (B, N, H, W) complex to (B, 2 N, H, W) real: the inverse of `_complex`."""
    return torch.stack([numbers.real, numbers.imag], 2).flatten(1, 2)
