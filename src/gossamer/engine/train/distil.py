"""Distillation of a diffusion model to a few steps, along the steps that it will take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import UsageError

Batch = tuple[Tensor, Any]
"""Noise (batch, ...), and what the model is told beside it."""


@dataclass(frozen=True)
class DistilResult:
    """What a distillation did.

    Attributes
    ----------
    updates : int
        Of the student; the fake model has as many.
    student_losses, fake_losses : tuple of float
        Of every update.
    """

    updates: int
    student_losses: tuple[float, ...]
    fake_losses: tuple[float, ...]


@dataclass(frozen=True)
class _Distillation:
    """The models, how they are told, and the options of `distil_steps`."""

    student: nn.Module
    teacher: nn.Module
    fake: nn.Module
    steps: int
    guidance: float
    nothing: Any
    mix: float
    agree: float
    cap: float
    generator: torch.Generator
    before: Callable[[int], object]

    def rolled_out(self, noise: Tensor, told: Any) -> tuple[Tensor, Tensor]:
        """(clean, noise) as the student predicts them at a random one of its steps, with gradients
        through that step alone."""
        x = noise
        last = int(torch.randint(self.steps, (1,), generator=self.generator))
        for number in range(last + 1):
            self.before(number)
            time = 1 - number / self.steps
            with torch.set_grad_enabled(number == last):
                velocity = self.student(x, x.new_full((len(x),), time), told)
            if number < last:
                x = x - velocity / self.steps
        return x - time * velocity, x + (1 - time) * velocity

    def noised(self, clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The clean part at a random time, with a mixture of its own noise and fresh one."""
        shape = (len(clean), *([1] * (clean.dim() - 1)))
        time = 0.02 + 0.96 * torch.rand(shape, generator=self.generator)
        fresh = torch.randn(clean.shape, generator=self.generator)
        time, fresh = time.to(clean), fresh.to(clean)
        mixed = self.mix * noise + (1 - self.mix**2) ** 0.5 * fresh
        return (1 - time) * clean + time * mixed, time

    def real(self, x: Tensor, time: Tensor, told: Any) -> Tensor:
        """The teacher's clean prediction, with guidance."""
        with torch.no_grad():
            velocity = self.teacher(x, time.flatten(), told)
            if self.guidance != 1:
                plain = self.teacher(x, time.flatten(), self.nothing)
                velocity = plain + self.guidance * (velocity - plain)
        return x - time * velocity

    def fake_loss(self, clean: Tensor, noise: Tensor, told: Any) -> Tensor:
        """How far the fake model is from the student's samples, and from the teacher."""
        x, time = self.noised(clean, noise)
        found = x - time * self.fake(x, time.flatten(), told)
        own = ((found - clean) / time).square().mean()
        return own + self.agree * (found - self.real(x, time, told)).square().mean()

    def student_loss(self, clean: Tensor, noise: Tensor, told: Any) -> Tensor:
        """Pseudo-Huber distance to where teacher and fake model differ, over the teacher's own."""
        x, time = self.noised(clean.detach(), noise.detach())
        with torch.no_grad():
            real = self.real(x, time, told)
            target = clean + real - (x - time * self.fake(x, time.flatten(), told))
            apart = (clean - real).abs().flatten(1).mean(1)
            weight = (1 / apart.clamp(min=1e-8)).clamp(max=self.cap)
        distance = ((clean - target).flatten(1).square().sum(1) + 1e-6).sqrt() - 1e-3
        size = clean[0].numel() ** 0.5
        return (weight * distance / size).mean()


def distil_steps(
    student: nn.Module,
    teacher: nn.Module,
    fake: nn.Module,
    data: Iterable[Batch],
    *,
    steps: int,
    rate: float = 1e-4,
    fake_rate: float = 5e-4,
    guidance: float = 1.0,
    nothing: Any = None,
    mix: float = 0.9,
    agree: float = 0.5,
    cap: float = 5.0,
    seed: int = 0,
    before: Callable[[int], object] = int,
) -> DistilResult:
    """Train a diffusion model to sample in a few steps, by trajectory distribution matching.

    The student goes some of its own steps from noise. Where it stops, its clean prediction is noised
    again. The student learns from where the teacher's prediction differs from that of the fake
    model, which learns what the student's samples look like. Sparse attention belongs inside: open
    `sparse_denoising` around the student and pass `before=run.step`.

    Models are called `model(x, time, told)`, time (batch,) in [0, 1] with 1 for noise, and give the
    velocity noise - clean of flow matching.

    Parameters
    ----------
    student, teacher, fake : nn.Module
        Three copies of a trained model; the first and the third are trained in place.
    data : iterable of (Tensor, object)
        Noise (batch, ...) and what the models are told; one update of both for each.
    steps : int
        Of the student's sampler, equal in time.
    rate, fake_rate : float
        Learning rates of AdamW.
    guidance : float
        Of the teacher; above 1 it is called with `nothing` too.
    nothing : object
        What a teacher is told that should not be guided.
    mix : float
        The share of the student's own noise when it is noised again, in [0, 1].
    agree : float
        The weight that pulls the fake model to the teacher.
    cap : float
        The largest weight of a sample in the student's loss.
    seed : int
        Of steps, times and fresh noise.
    before : callable
        Given the number of each step before the student is called.

    Returns
    -------
    DistilResult
        The losses of every update.

    Raises
    ------
    UsageError
        Before anything changes, for options that cannot be; at an update, for a loss that is not
        finite.

    Notes
    -----
    The step at which a student stops is drawn evenly, and so is the time at which its prediction is
    noised again, from 0.02 to 0.98. The published code may draw both otherwise.

    References
    ----------
    Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation
    (2025), which uses the distillation of Learning Few-Step Diffusion Models by Trajectory
    Distribution Matching (2025).

    Examples
    --------
    >>> import copy, gossamer as gs, torch
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(3, 2)
    ...     def forward(self, x, time, told):
    ...         return self.layer(torch.cat([x, time.unsqueeze(1)], dim=1))
    >>> teacher = Model()
    >>> student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    >>> data = ((torch.randn(8, 2), None) for _ in range(3))
    >>> gs.distil_steps(student, teacher, fake, data, steps=4).updates
    3
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UsageError(f"steps is a whole number from 1, not {steps!r}")
    if not 0 <= mix <= 1:
        raise UsageError(f"mix is a number from 0 to 1, not {mix!r}")
    if student is teacher or student is fake or teacher is fake:
        raise UsageError("student, teacher and fake are three models: pass copies")
    generator = torch.Generator().manual_seed(seed)
    task = _Distillation(
        student, teacher, fake, steps, guidance, nothing, mix, agree, cap, generator, before
    )
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0)
        for model, lr in ((student, rate), (fake, fake_rate))
    ]
    losses: tuple[list[float], list[float]] = ([], [])
    for noise, told in data:
        clean, own = task.rolled_out(noise, told)
        fake_loss = task.fake_loss(clean.detach(), own.detach(), told)
        _update(optimizers[1], fake_loss, losses[1], "fake")
        _update(optimizers[0], task.student_loss(clean, own, told), losses[0], "student")
    return DistilResult(len(losses[0]), tuple(losses[0]), tuple(losses[1]))


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, losses: list[float], who: str) -> None:
    """One step of a model; raises UsageError where the loss is not finite."""
    if not bool(loss.isfinite()):
        raise UsageError(f"the {who} model's loss is {loss.item()} at update {len(losses)}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    losses.append(loss.item())
