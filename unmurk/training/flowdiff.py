r"""FlowDiff: a posterior flow and a diffusion prior learned together from corrupted images.

:math:`y = A(x) + \sigma_y n` with known :math:`A` and :math:`\sigma_y`. Each image is measured
once, and no clean image is needed.

**The paper's objective** (`objective="elbo"`; Wang et al., 2024, arXiv 2407.11162). With x drawn
by the flow,

.. math::

    \mathcal L = E_y E_{x \sim q(\cdot \mid y)} \Bigl[
        \frac{\lVert y - A x \rVert^2}{2 \sigma_y^2} - b(x) + \log q(x \mid y) \Bigr],

where :math:`-b` is the prior's negative evidence bound. The flow follows :math:`\mathcal L`
through the frozen EMA denoiser; the prior follows denoising score matching on the flow's draws.
This objective stalls. On a flat background the evidence hardly changes while noise is left, by
less than the gap that a finite flow leaves. So the prior keeps noise that the flow can match.

**The default objective** approaches from the smooth side, where noise cannot hide:

1. *R2R pre-training*. For :math:`A = I` the prior itself is trained, just above :math:`\sigma_y`,
   by Recorrupted-to-Recorrupted. For other linear A only :math:`m(y)` is trained by it. There it
   starts from the Wiener solution of a Gaussian prior fitted by expectation maximization
   (`unmurk.gaussian.fit`), with further pixels withheld if A is a mask.
2. *Prior*. For :math:`A = I` the posterior mean is :math:`D(y, \sigma_y)` of the averaged prior,
   to which :math:`m(y)` is fitted from the first step on. Below :math:`\sigma_y` the prior is
   trained on draws around it, and above on the noisy images themselves with it as the ambient
   target. Part of every batch remains R2R to the end, the only target without errors of a network.
   For other A the prior is trained on :math:`m(y)` at all levels.
3. *E-step*. The prior is trained on draws :math:`x \sim p(x \mid y)` at all levels, and the flow
   (forward KL) on pairs of a draw and a fresh corruption of it. This is expectation maximization
   with an amortized posterior, as far as the draws are those of the posterior. For other A m is
   fitted to the pairs again.

For :math:`A = I` the denoiser at :math:`\sigma_y`, linearized, makes new draws for every batch
(`linearized`). For other A draws fill a slowly refreshed replay buffer: those of a solver, or
without one those of the flow itself. The flow also draws for noise that depends on the brightness,
because no level of the diffusion is its level. All that is said of :math:`A = I` is therefore not
for such noise, whose learning is that of other A.

**Repeated captures and clean images.** With N captures of each scene, R2R has some of them as the
input and the others as the target (Noise2Noise, arXiv 1803.04189). The ambient
target and the draws use all N, combined by `repeats.combined`; the flow and m are trained for
every number of captures from 1 to N (`Learner.pick_captures`). Clean images, where there are some,
are part of every batch: for m and the flow with simulated measurements, for the prior at all
levels.

**Blurs.** If A takes fine detail away everywhere (`Operator.blurs`) and the noise is Gaussian,
part of every batch is treated as clean images too: Wiener solutions at half scale (`half_scale`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..devices import host_to
from ..errors import InputError
from ..interrupts import heed_interrupt
from ..io.datasets import head
from ..noise import Gaussian
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId, uniform
from .half_scale import continued, detailed, halve
from .learner import Learner, choices, solver_name
from .linearized import linearized_draw
from .losses import (
    ambient_matching,
    denoising,
    distilled,
    elbo_loss,
    forward_kl,
    levels,
    masked_ambient_matching,
    noise2noise,
    recorrupted,
    recorrupted_matching,
    supervised,
    weighted,
)
from .papers import EM, HALF_SCALE, R2R, TWEEDIE
from .recipe import Recipe
from .replay import PosteriorSampler, Replay, chunk_size
from .schedule import LRPhase
from .trainer import Trainer

__all__ = ["FlowDiff"]

JOINT_RATE = 0.4  # at the full learning rate the paper's objective diverged
FIRST = 1024  # images drawn in the first E-step
FEW = 64  # images restored at half scale at the start
HALVES = 0.25  # and for each image seen, until all are restored
TOGETHER = 2**18  # values of those that are restored at once
AGAIN_RATE = 0.3  # learning rate of the mean network when it is fitted again
LATER_RATE = 0.5  # and of a prior after R2R pre-training
EVALUATIONS = 16  # guess for draws of a solver of which no steps are known
FRESH_FLOW = 0.8  # where the flow begins if every batch has new draws
KEPT_FLOW = 0.94  # and if draws are kept
EARLY = 0.25  # fraction of a batch on which the mean network follows the prior in R2R pre-training


@dataclass(eq=False, kw_only=True)
class FlowDiff(Learner):
    """FlowDiff, for linear operators and Gaussian noise, and for A = I with any noise.

    Attributes:
        objective: "default", or the paper's "elbo".
        recipe: Schedule of the default objective.
        solver: A function of (y, problem, prior, generator) that draws x given y for A other than
            the identity, such as `solvers.Draws("diffpir")`. None lets the flow draw.

    >>> FlowDiff(recipe=Recipe(flow=0.9)).objective
    'default'
    """

    citation: ClassVar[str] = """@misc{wang2024integrating,
  title = {Integrating Amortized Inference with Diffusion Models for Learning Clean Distribution
           from Corrupted Images},
  author = {Wang, Yifei and Bai, Weimin and Luo, Weijian and Chen, Wenzheng and Sun, He},
  year = {2024},
  eprint = {2407.11162},
  archivePrefix = {arXiv}
}"""

    takes_repeats: ClassVar[bool] = True
    takes_clean: ClassVar[bool] = True

    @property
    def default_start(self) -> str:
        """See `Learner.default_start`: the paper's objective alone starts from random weights."""
        return "none" if self.objective == "elbo" else "generic"

    objective: Literal["default", "elbo"] = "default"
    recipe: Recipe = field(default_factory=Recipe)
    solver: PosteriorSampler | None = None

    @classmethod
    def papers(cls, options: Mapping[str, Any]) -> list[str]:
        """See `Learner.papers`: those of the stages of the default objective too.

        With a solver the operator is not the identity, and there is no ambient target. Of a run,
        "operator" is the text form of its operator, and "half scale" tells whether it has learned
        from restorations at half scale.
        """
        found = super().papers(options)
        if options.get("objective") == "elbo":
            return found
        recipe = options.get("recipe") or {}
        ambient = recipe.get("ambient_target", "mean") != "none" and solver_name(options) is None
        ambient &= options.get("operator") in (None, "identity")
        half = [HALF_SCALE] if options.get("half scale") else []
        return [found[0], R2R, *([TWEEDIE] if ambient else []), EM, *half, *found[1:]]

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the learner can learn from measurements of this kind."""
        return problem.linear

    def check_problem(self) -> None:
        """Raise InputError for a target that captures with masks of their own do not have."""
        plain = self.problem.operator.spec == "identity"
        if self.repeats > 1 and self.recipe.ambient_target == "image" and not plain:
            raise InputError(
                "repeated captures have recipe.ambient_target=image for the identity only: take "
                "mean or none"
            )

    @property
    def flow_draws(self) -> bool:
        """Whether the flow itself draws the images of the E-step."""
        return not self.denoising and self.solver is None

    @property
    def flow_start(self) -> float:
        """Fraction of the run at which the flow begins; if it draws itself, with the E-step."""
        if self.flow_draws:
            return self.recipe.e_step
        default = FRESH_FLOW if self.denoising else KEPT_FLOW
        return default if self.recipe.flow is None else self.recipe.flow

    def starts_gaussian(self) -> bool:
        """Whether the mean network starts from the Wiener solution of a fitted Gaussian prior."""
        gaussian = isinstance(self.problem.noise, Gaussian)
        default = self.objective == "default"
        return default and not self.denoising and self.problem.linear and gaussian

    def initial_spread(self) -> float:
        """Return the standard deviation of the posterior at the start, below that of the noise."""
        if not isinstance(self.problem.noise, Gaussian):
            return float(self.problem.noise.variance(head(self.y).mean())) ** 0.5 / 4
        return 0.05 if self.objective == "default" else self.problem.sigma / 2

    def make_buffers(self) -> dict[str, Tensor]:
        """Create the buffers of the default objective: of draws, and of images at half scale."""
        recipe = self.recipe
        kept = 0 if self.denoising or self.objective == "elbo" else recipe.buffer
        self.replay = Replay(kept, self.shape)
        buffers = dict(self.replay.tensors)
        blurred = self.posterior.start is not None and self.problem.operator.blurs
        channels, height, width = self.shape
        self.halves = None
        if self.objective == "elbo" or not blurred or not recipe.half:
            return buffers
        images = min(recipe.buffer, len(self.y))
        self.halves = Replay(images, (channels, height // 2, width // 2))
        halves = {f"half {name}": held for name, held in self.halves.tensors.items()}
        return buffers | halves

    def initialize(self, device: torch.device) -> None:
        """See `Learner.initialize`; restore the first images at half scale."""
        super().initialize(device)
        self.restore_halves(0, device)

    @torch.no_grad()
    def restore_halves(self, observed: int, device: torch.device) -> None:
        """Add restorations at half scale, of each measurement once, as the run goes on.

        Args:
            observed: Images seen in the run.
            device: Device of the networks.
        """
        if self.halves is None:
            return
        assert self.posterior.start is not None
        wanted = FEW + int(HALVES * observed)
        together = min(FEW, max(1, TOGETHER // math.prod(self.shape)))
        while chunk := min(together, len(self.halves) - self.halves.drawn):
            if self.halves.drawn + chunk > wanted:
                break
            heed_interrupt()
            y, problem = self.measurements(self.halves.numbers(chunk), device)
            self.halves.put(halve(self.posterior.start.restore(y, problem)))

    def phases(self) -> dict[str, tuple[LRPhase, ...]]:
        """Return when each part is trained."""
        if self.objective == "elbo":
            joint = (LRPhase(peak=JOINT_RATE),)
            return {"mean": joint, "flow": joint, "prior": joint}
        start, flow = LRPhase(0.0, self.recipe.r2r), LRPhase(self.flow_start)
        rest, again = LRPhase(start.end), LRPhase(flow.start, 1.0, AGAIN_RATE)
        if self.denoising:
            later = LATER_RATE if start.end else 1.0
            prior = (replace(start, pretraining=True), replace(rest, peak=later))
            return {"mean": (LRPhase(),), "flow": (flow,), "prior": prior}
        mean = (LRPhase(),) if flow.start == self.recipe.e_step else (start, again)
        return {"mean": mean, "flow": (flow,), "prior": (rest,)}

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; see `memory`."""
        if self.objective == "elbo":
            return [{"prior": 2.0, "posterior": 1.0}]
        extra = 1.0 if self.recipe.reverse else 0.0
        return [{"prior": 1 + extra, "posterior": 1 + extra, "mean": float(self.denoising)}]

    # -- losses ----------------------------------------------------------------------------------

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step; see `Learner.losses`."""
        recipe = self.recipe
        clean = self.pick_clean(self.clean_count(len(y)), generator)
        half = self.pick_halves(len(y), generator)
        picked = self.pick_captures(generator) if self.repeats > 1 else None
        if self.objective == "elbo":
            return self.joint_losses(*self.view(y, index, picked), clean, generator)
        if self.denoising:
            return self.denoiser_losses(y, index, picked, progress, clean, generator)
        if progress < recipe.r2r:
            sharp = torch.cat([half, clean])
            return {"mean": self.first_mean_loss(y, index, picked, sharp, generator)}
        sigma = levels(len(y), generator)
        if not self.replay.filled:
            y, problem = self.view(y, index)
            mean = self.posterior_mean(y, problem)
            loss = self.first_prior_loss(y, problem, sigma, mean, half, clean, generator)
            return {"prior": loss}
        x = self.replay.pick(len(y) - len(clean), generator)
        x = torch.cat([x, clean]) if len(clean) else x
        losses = {"prior": denoising(self.prior, detailed(x, half, sigma), sigma, generator)}
        if progress < self.flow_start:
            return losses
        y, problem = self.view(y, index, picked)
        x = torch.cat([half, x[len(half) :]])
        losses["flow"], losses["mean"] = forward_kl(self.posterior, x, problem, generator)
        return losses | self.reverse_loss(y, problem, generator)

    def denoiser_losses(
        self,
        y: Tensor,
        index: Tensor,
        picked: list[int] | None,
        progress: float,
        clean: Tensor,
        noise: torch.Generator,
    ) -> dict[str, Tensor]:
        """Compute the losses of a step for A = I and Gaussian noise; see `losses`.

        The first part of the batch is for R2R, in pre-training all that was measured. Clean images
        are the last part. m follows the prior from the first step on, so that a run that is looked
        at early has a posterior.
        """
        recipe, most = self.recipe, len(y) - len(clean)
        given, problem = self.view(y, index, picked)
        if progress < recipe.r2r:
            own = self.recorrupted_loss(y[:most], index[:most], picked, noise)
            return self.pretraining_losses(own, given, problem, clean, noise)
        apart = min(round(recipe.r2r_later * len(y)), most - 1)
        flow = progress >= self.flow_start  # it learns from the whole batch
        drawn = range(0 if flow else apart, most)
        # all captures of a scene say where the draws are, not the picked ones
        joint, their = (given, problem) if self.repeats == 1 else self.view(y, index)
        joint = joint[drawn.start : most]
        if flow or progress >= recipe.e_step or recipe.ambient_target != "none":
            x, mean = linearized_draw(joint, their.sigma, self.teacher.denoise, noise)
        else:  # the prior is trained on posterior means alone
            x = mean = self.posterior_mean(joint, their)
        rest = slice(apart - drawn.start, None)
        part = problem.index_select(range(apart, len(y)))
        target = mean[rest] if self.repeats == 1 else self.posterior_mean(given[apart:], part)
        losses = {"mean": self.distilled_loss(given[apart:], part, target, clean, noise)}
        sigma = levels(len(y) - apart, noise)
        if progress >= recipe.e_step:
            prior = denoising(self.prior, torch.cat([x[rest], clean]), sigma, noise)
        else:
            low, high = sigma.split([most - apart, len(clean)])
            if recipe.ambient_target == "none":
                prior = denoising(self.prior, mean[rest], low, noise)
            else:
                wanted = mean[rest] if recipe.ambient_target == "mean" else None
                prior = ambient_matching(
                    self.prior, x[rest], joint[rest], their.sigma, low, noise, wanted
                )
            if len(clean):
                known = denoising(self.prior, clean, high, noise)
                prior = _mixed(prior, known, len(clean) / len(sigma))
        if apart:
            own = self.recorrupted_loss(y[:apart], index[:apart], picked, noise)
            prior = _mixed(own, prior, len(sigma) / len(y))
        losses["prior"] = prior
        if not flow:
            return losses
        losses["flow"], _ = forward_kl(self.posterior, torch.cat([x, clean]), problem, noise)
        return losses | self.reverse_loss(given, problem, noise)

    def pretraining_losses(
        self,
        own: Tensor,
        given: Tensor,
        problem: Problem,
        clean: Tensor,
        noise: torch.Generator,
    ) -> dict[str, Tensor]:
        """Compute the losses of a step of R2R pre-training, of which `own` is the R2R loss: the
        prior's with clean images, and that of m on a few of the measurements."""
        few = max(round(EARLY * (len(given) - len(clean))), 1)
        y, part = given[:few], problem.index_select(range(few))
        target = self.posterior_mean(y, part)
        losses = {"prior": own, "mean": distilled(self.posterior, y, part, target)}
        if len(clean):
            known = denoising(self.prior, clean, levels(len(clean), noise), noise)
            losses["prior"] = _mixed(own, known, len(clean) / len(given))
        return losses

    def reverse_loss(
        self, y: Tensor, problem: Problem, noise: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the paper's objective beside the forward KL, if it has a weight."""
        if not self.recipe.reverse:
            return {}
        reverse, _ = elbo_loss(self.posterior, self.teacher, y, problem, noise)
        return {"reverse": self.recipe.reverse * reverse}

    def clean_count(self, batch: int) -> int:
        """Return how many images of a batch are clean ones."""
        return 0 if self.clean is None else min(round(self.recipe.clean * batch), batch - 1)

    def pick_halves(self, batch: int, generator: torch.Generator) -> Tensor:
        """Pick restorations at half scale for a batch, so that one measurement is left at least.

        Returns:
            Parts of them and of their mirror images, (count, C, H, W); none if there are none.
        """
        if self.halves is None:
            return torch.zeros(0, *self.shape, device=generator.device)
        most = batch - 1 - self.clean_count(batch)
        choose = choices(generator, StreamId.HALF_SCALE)
        half = self.halves.pick(min(round(self.recipe.half * batch), most), choose)
        return host_to(continued(half, *self.shape[-2:], choose), generator.device)

    def first_mean_loss(
        self,
        y: Tensor,
        index: Tensor,
        picked: list[int] | None,
        clean: Tensor,
        noise: torch.Generator,
    ) -> Tensor:
        """Compute the loss of m(y) at the start.

        Recorrupted-to-Recorrupted is used for single captures, and for all captures of a scene
        together; its pairs are of the first half of the batch. If some captures are picked, the
        others are their target (Noise2Noise). Clean images enter with simulated measurements.
        """
        rest = [j for j in range(self.repeats) if picked is not None and j not in picked]
        given, problem = self.view(y, index, picked)
        dirty, synthetic = _parts(len(y), len(clean))
        own = problem.index_select(dirty) if len(clean) else problem
        if rest:
            target, other = self.view(y, index, rest)
            other = other.index_select(dirty) if len(clean) else other
            loss = noise2noise(
                self.posterior, given[: len(dirty)], own, target[: len(dirty)], other
            )
        else:
            few = range(max(len(dirty) // 2, 1))  # as many evaluations as images
            own, given = own.index_select(few), given[: len(few)]
            recipe = self.recipe
            gaussian = isinstance(own.noise, Gaussian)
            alpha = recipe.alpha if gaussian else recipe.alpha_photons
            loss = recorrupted(self.posterior, given, own, alpha, noise, recipe.hide)
        if not len(clean):
            return loss
        known = supervised(self.posterior, clean, problem.index_select(synthetic), noise)
        return _mixed(loss, known, len(clean) / len(y))

    def recorrupted_loss(
        self, y: Tensor, index: Tensor, picked: list[int] | None, noise: torch.Generator
    ) -> Tensor:
        """Compute the loss of the prior against the noisy images themselves (A = I).

        R2R takes half of the images, in antithetic pairs: at the level of `Recipe.alpha`, or with
        probability 1/2 at one of the levels of the prior, if that is higher. If some captures of a
        scene are picked, the others are their target (Noise2Noise).
        """
        others = [j for j in range(self.repeats) if picked is not None and j not in picked]
        if others:
            given, problem = self.view(y, index, picked)
            target, _ = self.view(y, index, others)
            sigma = given.new_full((len(given),), problem.sigma)
            return weighted(self.prior.denoise(given, sigma) - target, sigma)
        few = max(len(y) // 2, 1)  # as many evaluations as images
        given, problem = self.view(y[:few], index[:few], picked)
        lowest, level = self.recipe.alpha**2, levels(few, noise) / problem.sigma
        wide = uniform((few,), noise, device=y.device) < 0.5
        alpha = torch.where(wide, (level**2 - 1).clamp_min(lowest), lowest).sqrt()
        return recorrupted_matching(self.prior, given, problem, alpha, noise)

    @torch.no_grad()
    def posterior_mean(self, y: Tensor, problem: Problem) -> Tensor:
        """Return the posterior means by the averaged networks."""
        if self.denoising:
            return self.teacher.denoise(y, problem.sigma)
        return self.student.mean(y, problem)

    def distilled_loss(
        self, y: Tensor, problem: Problem, target: Tensor, clean: Tensor, noise: torch.Generator
    ) -> Tensor:
        """Compute the loss of m(y) for A = I: distilled from the prior, and supervised by clean
        images."""
        if not len(clean):
            return distilled(self.posterior, y, problem, target)
        dirty, synthetic = _parts(len(y), len(clean))
        part = problem.index_select(dirty)
        loss = distilled(self.posterior, y[: len(dirty)], part, target[: len(dirty)])
        known = supervised(self.posterior, clean, problem.index_select(synthetic), noise)
        return _mixed(loss, known / problem.sigma**2, len(clean) / len(y))

    def joint_losses(
        self, y: Tensor, problem: Problem, clean: Tensor, noise: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the paper's objective: the flow's loss, then the prior's on the flow's draws.

        Clean images join the prior's images, and the flow's as pairs with simulated measurements.
        """
        dirty, synthetic = _parts(len(y), len(clean))
        own = problem.index_select(dirty) if len(clean) else problem
        flow, x = elbo_loss(self.posterior, self.teacher, y[: len(dirty)], own, noise)
        x = torch.cat([x, clean]) if len(clean) else x
        losses = {"flow": flow, "prior": denoising(self.prior, x, levels(len(x), noise), noise)}
        if len(clean):
            part = problem.index_select(synthetic)
            nats, mean = forward_kl(self.posterior, clean, part, noise)
            share = len(clean) / len(y)
            losses |= {"flow": _mixed(flow, nats, share), "mean": share * mean}
        return losses

    def first_prior_loss(
        self,
        y: Tensor,
        problem: Problem,
        sigma: Tensor,
        mean: Tensor,
        half: Tensor,
        clean: Tensor,
        noise: torch.Generator,
    ) -> Tensor:
        """Compute the prior's loss before the E-step: on posterior means, on restorations at half
        scale, and on clean images."""
        if not len(half) and not len(clean):
            return self.mean_loss(y, problem, sigma, mean, noise)
        dirty, known = _parts(len(y), len(half) + len(clean))
        count, own = len(dirty), problem.index_select(dirty)
        loss = self.mean_loss(y[:count], own, sigma[:count], mean[:count], noise)
        rest = sigma[count:]
        x = torch.cat([detailed(mean[count:][: len(half)], half, rest), clean])
        return _mixed(loss, denoising(self.prior, x, rest, noise), len(known) / len(y))

    def mean_loss(
        self, y: Tensor, problem: Problem, sigma: Tensor, mean: Tensor, noise: torch.Generator
    ) -> Tensor:
        """Compute the prior's loss on posterior means, or against the observed pixels of masks."""
        recipe = self.recipe
        if recipe.ambient_target == "image" and problem.operator.mask is not None:
            return masked_ambient_matching(
                self.prior, self.student, y, problem, sigma, noise, recipe.hide, recipe.above
            )
        return denoising(self.prior, mean, sigma, noise)

    # -- the E-step ------------------------------------------------------------------------------

    @torch.no_grad()
    def draw_posterior(self, count: int, device: torch.device) -> None:
        """Draw x ~ p(x | y) for the next measurements, in place of the buffer's oldest images.

        Args:
            count: Number of images.
            device: Device of the networks.

        Raises:
            InputError: An image is not finite.
        """
        number = self.replay.numbers(count)
        y, problem = self.measurements(number, device)
        streams = PerImageGenerator(
            self.seed, number.tolist(), StreamId.FLOWDIFF_E_STEP, device=device
        )
        if self.flow_draws:
            z = streams.randn(*self.shape)
            x = self.student.transform(z, self.student.context(y, problem))[0]
            self.replay.put(x, self.student, None, self.problem)
            return
        assert self.solver is not None
        x = self.solver(y, problem, self.teacher, streams)
        self.replay.put(x, self.teacher, self.solver, self.problem)

    def lengthen(self, progress: float) -> None:
        """Forget draws that the longer run makes again; see `Learner.lengthen`."""
        if progress < self.recipe.e_step:
            self.replay.restart()

    def evaluations(self, progress: float, images: float) -> float:
        """Return how many evaluations the E-step takes; see `Learner.evaluations`."""
        recipe = self.recipe
        if self.objective == "elbo" or self.denoising or self.flow_draws:
            return 0.0
        rest, most = (1 - max(progress, recipe.e_step)) * images, min(len(self.replay), FIRST)
        first = self.first_draws(most, rest) if progress < recipe.e_step else 0
        drawn = first + recipe.refresh * rest
        inner = getattr(self.solver, "solver", None)
        return drawn * (getattr(inner, "steps", None) or EVALUATIONS)

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Fill and refresh the buffers."""
        recipe = self.recipe
        self.restore_halves(trainer.settings.batch * step, trainer.device)
        if self.objective == "elbo" or self.denoising or progress < recipe.e_step:
            return
        images = (1 - recipe.e_step) * trainer.settings.batch * trainer.steps
        first = self.first_draws(min(len(self.replay), FIRST), images)
        observed = trainer.settings.batch * (step - int(recipe.e_step * trainer.steps))
        chunk = min(256, first, chunk_size(self.teacher, self.solver))
        while first + int(recipe.refresh * observed) - self.replay.drawn >= chunk:
            heed_interrupt()
            self.draw_posterior(chunk, trainer.device)


def _parts(batch: int, clean: int) -> tuple[range, range]:
    """Return the positions in a batch of the measured images, and of the clean ones."""
    return range(batch - clean), range(batch - clean, batch)


def _mixed(loss: Tensor, known: Tensor, share: float) -> Tensor:
    """Return the mean loss of a batch of which a share is clean images."""
    return torch.lerp(loss, known, share)
