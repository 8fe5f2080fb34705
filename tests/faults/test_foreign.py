"""What other libraries bring: used in full, or refused; nothing that it carries is dropped."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

import unmurk
from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior
from unmurk.io.datasets import as_source
from unmurk.io.torch_data import Items
from unmurk.noise import Gaussian, PoissonGaussian
from unmurk.operators import Matrix, as_operator
from unmurk.problem import Problem

SHAPE = (1, 4, 6)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- noise ----------------------------------------------------------------------------------------


class NoiseModel(nn.Module):
    """As deepinv's: a module that carries a function and a generator besides its numbers."""

    def __init__(self, **numbers):
        super().__init__()
        self.noise_model, self.rng = (lambda x: x), None
        for name, value in numbers.items():
            kept = isinstance(value, bool)
            if kept:
                setattr(self, name, value)
            else:
                self.register_buffer(name, torch.as_tensor(value))

    def forward(self, x):
        return self.noise_model(x)


def kind(name):
    return type(name, (NoiseModel,), {})


class Physics:
    def __init__(self, noise_model=None, **more):
        self.noise_model = noise_model
        self.__dict__.update(more)

    def A(self, x):
        return x

    def A_adjoint(self, y):
        return y


TAKEN = [
    (None, Gaussian(0)),
    (kind("ZeroNoise")(), Gaussian(0)),
    (kind("GaussianNoise")(sigma=0.25), Gaussian(0.25)),
    (kind("GaussianNoise")(sigma=[0.5, 0.5]), Gaussian(0.5)),
    (kind("PoissonNoise")(gain=0.5, normalize=True, clip_positive=False), PoissonGaussian(0.5)),
    (kind("PoissonGaussianNoise")(gain=0.5, sigma=0.25), PoissonGaussian(0.5, 0.25)),
    (type("Mine", (kind("GaussianNoise"),), {})(sigma=0.25), Gaussian(0.25)),
]


@pytest.mark.parametrize("model, noise", TAKEN, ids=lambda v: type(v).__name__)
def test_noise_that_we_have(model, noise):
    assert Problem(Physics(model)).noise == noise


DROPPED = [
    kind("UniformNoise")(a=0.1),
    kind("UniformGaussianNoise")(sigma_min=0.1, sigma_max=0.2),
    kind("RicianNoise")(sigma=0.1),
    kind("GammaNoise")(l=1.0),
    kind("SaltPepperNoise")(p=0.1, s=0.1),
    kind("LogPoissonNoise")(N0=1024.0, mu=0.02),
    kind("NoiseModel")(),
    type("GaussianNoise", (NoiseModel,), {"correlation": 0.5})(sigma=0.1),
    kind("GaussianNoise")(sigma=[0.1, 0.2]),
    kind("PoissonNoise")(gain=0.5, normalize=False),
    lambda x: x + torch.rand_like(x),
    nn.Dropout(0.5),
    "loud",
]


@pytest.mark.parametrize("model", DROPPED, ids=lambda v: type(v).__name__)
def test_noise_that_we_lack_is_refused_and_may_be_given(model):
    with pytest.raises(InputError) as error:
        Problem(Physics(model))
    assert "\n" not in str(error.value) and "noise" in str(error.value)
    assert Problem(Physics(model), 0.1).noise == Gaussian(0.1)


def test_a_sensor_is_not_dropped():
    assert as_operator(Physics(sensor_model=lambda x: x)).linear
    for sensor in (torch.sign, lambda x: x.clamp(0, 1), lambda x: None, "cut"):
        with pytest.raises(InputError, match="sensor_model"):
            as_operator(Physics(sensor_model=sensor))


# -- methods that fail ----------------------------------------------------------------------------


class Downsampling:
    """deepinv's without a filter, which its prox and its pseudo-inverse read all the same."""

    def A(self, x):
        return x[..., ::2, ::2]

    def A_adjoint(self, y):
        x = y.new_zeros(*y.shape[:-2], 2 * y.shape[-2], 2 * y.shape[-1])
        x[..., ::2, ::2] = y
        return x

    def A_dagger(self, y):
        return self.prox_l2(0, y, 1.0)

    def prox_l2(self, z, y, gamma):
        return self.Fh * z


def test_the_prox_of_an_object_that_cannot_run_is_computed():
    op = as_operator(Downsampling()).bind([0], SHAPE)
    x, y, gamma = draw(2, *SHAPE), draw(2, 1, 2, 3, seed=1), 3.0
    expected = x.clone()
    expected[..., ::2, ::2] = (x[..., ::2, ::2] + gamma * y) / (1 + gamma)
    assert torch.allclose(op.prox_l2(x, y, gamma), expected, atol=1e-5)
    assert torch.allclose(op.A_dagger(y), Downsampling().A_adjoint(y), atol=1e-5)
    found = unmurk.solve(
        y, Problem(Downsampling(), 0.1), GaussianPrior.exponential(SHAPE), "diffpir", steps=4
    )
    assert found.mean.shape == (2, *SHAPE)


class Sharp(Downsampling):
    """Not linear, so nothing can stand in for the inverse that fails."""

    linear = False


def test_what_nothing_can_stand_in_for_is_said():
    op, y = as_operator(Sharp()).bind([0], SHAPE), draw(1, 1, 2, 3)
    with pytest.raises(InputError, match="its own prox_l2 fails"):
        op.prox_l2(draw(1, *SHAPE), y, 1.0)


# -- matrices and functions -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 24, 30])
@pytest.mark.parametrize("numpy", [False, True])
def test_a_matrix_is_an_operator(rows, numpy):
    m = draw(rows, 24, dtype=torch.float64)
    op = as_operator(m.numpy() if numpy else m).bind([0, 1], SHAPE)
    x, y, z = draw(2, *SHAPE), draw(2, rows, seed=1), draw(2, *SHAPE, seed=2)
    assert torch.allclose(op.A(x).double(), x.flatten(1).double() @ m.T, atol=1e-4)
    assert torch.allclose(op.A_adjoint(y).flatten(1).double(), y.double() @ m, atol=1e-4)
    pinv = torch.linalg.pinv(m)
    assert torch.allclose(op.A_dagger(y).flatten(1).double(), y.double() @ pinv.T, atol=1e-3)
    gamma = torch.tensor([0.5, 3.0])
    for row in range(2):
        left = torch.eye(24, dtype=torch.float64) + gamma[row] * m.T @ m
        right = z[row].flatten().double() + gamma[row] * m.T @ y[row].double()
        expected = torch.linalg.solve(left, right)
        assert torch.allclose(op.prox_l2(z, y, gamma)[row].flatten().double(), expected, atol=1e-4)
    s = torch.linalg.svdvals(m)
    assert torch.allclose(
        op.svd(x).s.sort(descending=True).values[: len(s)].double(), s, atol=1e-4
    )
    assert op.y_shape(SHAPE) == (rows,) and op.x_shape((rows,)) == SHAPE and op.linear


def test_a_matrix_restores_what_its_posterior_says():
    prior, m = GaussianPrior.exponential(SHAPE), draw(40, 24) / 5
    problem, x = Problem(m, 0.01), GaussianPrior.exponential(SHAPE).sample(3, seed=1)
    y = problem.simulate(x, seed=2)
    found = unmurk.solve(y, problem, prior, "ddrm", steps=100).mean
    best = prior.posterior(y, problem.bind(range(3), SHAPE)).mean
    assert (found - best).abs().max() < 0.05


def test_bad_matrices():
    for bad in (
        torch.zeros(3),
        torch.zeros(0, 4),
        torch.zeros(2, 4) + 1j,
        torch.full((2, 4), torch.nan),
    ):
        with pytest.raises(InputError):
            as_operator(bad)
    with pytest.raises(InputError, match="above the limit of 2 GiB"):
        as_operator(torch.zeros(1, 1).expand(50_000, 50_000))
    op = as_operator(torch.eye(24))
    assert isinstance(op, Matrix) and op == as_operator(np.eye(24))
    with pytest.raises(InputError, match="24 numbers, but those of shape"):
        op.A(torch.zeros(1, 1, 5, 5))
    with pytest.raises(InputError, match="bind it with bind"):
        op.A_adjoint(torch.zeros(1, 24))


W = draw(24, 24, dtype=torch.float64)
DOUBLE = {
    "weights in double": lambda x: (x.flatten(1) @ W).reshape(x.shape),
    "casts": lambda x: 3 * x.double(),
    "half of the image": lambda x: x.double()[..., ::2],
}


@pytest.mark.parametrize("name", DOUBLE)
def test_functions_in_double_precision(name):
    fn = DOUBLE[name]
    op, x = as_operator(fn).bind([0, 1], SHAPE), draw(2, *SHAPE)
    y = op.A(x)
    assert y.dtype == torch.float32 and op.linear
    assert torch.allclose(y, fn(x.double()).float(), atol=1e-5)
    v = draw(*y.shape, seed=1)
    back = op.A_adjoint(v)
    assert back.dtype == torch.float32
    assert float((y * v).sum()) == pytest.approx(float((x * back).sum()), abs=1e-3)


def test_functions_that_fail_say_where():
    cases = {
        "fails on images of shape": lambda x: x.flatten(1) @ torch.zeros(7, 7),
        "return real tensors with one": lambda x: torch.fft.fft2(x),
        "entry for each image": lambda x: x.mean(0),
        "to NoneType": lambda x: None,
    }
    for part, fn in cases.items():
        with pytest.raises(InputError, match=part) as error:
            as_operator(fn).A(draw(2, *SHAPE))
        assert "\n" not in str(error.value)


def test_a_function_operator_with_a_function_prior():
    """Of which neither says what shape the images have: y does, or init."""
    exact = GaussianPrior.exponential(SHAPE)
    truth = exact.sample(2, seed=1)

    def prior(x, sigma):
        return exact.denoise(x, sigma)

    same, half = Problem(lambda x: 0.5 * x, 0.05), Problem(lambda x: x[..., ::2], 0.05)
    y = same.simulate(truth)
    assert torch.equal(unmurk.solve(y, same, prior).mean, unmurk.solve(y, same, exact).mean)
    y, start = half.simulate(truth), torch.zeros(2, *SHAPE)
    assert unmurk.solve(y, half, prior, init=start).mean.shape == truth.shape
    with pytest.raises(InputError, match="expected measurements of shape"):
        unmurk.solve(y, half, prior)
    matrix = Problem(torch.eye(24), 0.05)
    with pytest.raises(InputError, match="give init="):
        unmurk.solve(truth.flatten(1), matrix, prior)
    assert unmurk.solve(truth.flatten(1), matrix, prior, init=start).mean.shape == truth.shape
    assert unmurk.solve(truth.flatten(1), matrix, exact).mean.shape == truth.shape


# -- denoisers ------------------------------------------------------------------------------------


def test_sigma_of_any_shape_that_has_one_number_for_each_image():
    prior, x = unmurk.Prior.load("digits"), torch.rand(3, 1, 28, 28)
    levels = torch.tensor([0.1, 0.3, 1.0])
    with torch.no_grad():
        expected = prior.denoise(x, levels)
        for shape in ((3, 1, 1, 1), (3, 1), (1, 3)):
            assert torch.equal(prior.denoise(x, levels.reshape(shape)), expected)
        one = prior.denoise(x, 0.3)
        for sigma in (torch.tensor(0.3), torch.tensor([0.3]), torch.full((1, 1, 1, 1), 0.3)):
            assert torch.equal(prior.denoise(x, sigma), one)
    for shape in ((2,), (2, 1, 1, 1), (3, 1, 28, 28), (0,)):
        with pytest.raises(InputError, match="one for each of the 3 images"):
            prior.denoise(x, torch.full(shape, 0.1))


# -- data sets ------------------------------------------------------------------------------------

Y = torch.rand(10, *SHAPE, generator=torch.Generator().manual_seed(5))


class Stream(IterableDataset):
    def __iter__(self):
        return iter((y, 3) for y in Y)


class Single(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


PAIRS = TensorDataset(Y, torch.arange(10))
SETS = {
    "dataset of pairs": (PAIRS, Y),
    "dataset of tensors": (Single(list(Y)), Y),
    "dataset of arrays": (Single([y.numpy() for y in Y]), Y),
    "dataset of flat images": (Single([y[0] for y in Y]), Y),
    "bytes": (Single([(y * 255).byte() for y in Y]), (Y * 255).byte().float() / 255),
    "loader": (DataLoader(PAIRS, batch_size=3), Y),
    "loader that shuffles": (DataLoader(PAIRS, batch_size=3, shuffle=True), Y),
    "loader that drops": (DataLoader(PAIRS, batch_size=3, drop_last=True), Y[:9]),
    "loader that selects": (DataLoader(PAIRS, sampler=SubsetRandomSampler([4])), Y[4:5]),
    "loader that collates": (
        DataLoader(
            PAIRS, batch_size=5, collate_fn=lambda items: 2 * torch.stack([y for y, _ in items])
        ),
        2 * Y,
    ),
    "stream": (Stream(), Y),
    "loader of a stream": (DataLoader(Stream(), batch_size=4), Y),
}


@pytest.mark.parametrize("name", SETS)
def test_torch_data_is_read_in_order(name):
    data, expected = SETS[name]
    found = as_source(data)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


BAD_SETS = {
    "labels": Single(["a", "b"]),
    "nothing": Single([]),
    "of other shapes": Single([Y[0], Y[0, :, :2]]),
    "not finite": Single([Y[0], Y[0] * torch.nan]),
    "records": Single([{"y": Y[0]}]),
    "an empty stream": type("Empty", (IterableDataset,), {"__iter__": lambda self: iter(())})(),
    "complex": Single([Y[0] + 0j]),
    "an object": object(),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_bad_data_is_one_line(name):
    with pytest.raises(InputError) as error:
        as_source(BAD_SETS[name])
    assert "\n" not in str(error.value)


def test_large_sets_are_read_item_by_item(monkeypatch):
    import unmurk.io.torch_data as module

    monkeypatch.setattr(module, "HELD", 500)
    source = as_source(PAIRS)
    assert isinstance(source, Items) and source.shape == (10, *SHAPE)
    assert torch.equal(source[torch.tensor([7, 0])], Y[[7, 0]])
    assert torch.equal(source[2:4], Y[2:4])
    assert source.fingerprint() == Items(PAIRS).fingerprint()
    assert source.fingerprint() != Items(TensorDataset(1 - Y)).fingerprint()
    with pytest.raises(InputError, match="has no length"):
        as_source(Stream())


def test_learning_from_a_loader(tmp_path):
    y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    problem, how = Problem("identity", 0.2), dict(kimg=0.02, batch=4, quiet=True, precision="fp32")
    loader = DataLoader(TensorDataset(y, torch.zeros(8)), batch_size=2, shuffle=True)
    one, _ = unmurk.learn(loader, problem, out=tmp_path / "a", **how)
    other, _ = unmurk.learn(y, problem, out=tmp_path / "b", **how)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
