"""Optimizers, the moving average of the weights, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .recipe import OptimizerSettings, ScheduleSettings
from .team import ALONE, Team

# Quintic x -> a x + b x^3 + c x^5 that drives every singular value in (0, 1] to about 1 within five rounds.
# Coefficients: Keller Jordan, "Muon: an optimizer for hidden layers" (2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, num_rounds: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: same singular vectors, all singular values in 0.7..1.2.

    Args:
        matrix: (rows, columns).

    The rounds run on the Gram matrix of the short side: with G = X X^T and the odd polynomial p(X) = P(G) X,
    the next Gram matrix is P G P, so only one product with the long side is needed at the end.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    gram = x @ x.T
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    total = identity
    for index in range(num_rounds):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        total = factor if index == 0 else factor @ total
        if index + 1 < num_rounds:
            gram = factor @ gram @ factor
    x = total @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, for hidden matrices and convolution kernels.

    A kernel (out, in, ...) counts as the matrix (out, in * ...). Updates are scaled by
    0.2 sqrt(max(rows, columns)), which gives them the size of AdamW's, so both share learning rates
    (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4).

    Every process keeps all of the momentum and orthogonalises its share of the matrices.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        team: Team = ALONE,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.team = team

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            directions = [self._direction(parameter, group["momentum"]) for parameter in trained]
            updates = self.team.map_tensors(orthogonalise, directions, [_cost(d) for d in directions])
            for parameter, update in zip(trained, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """(rows, columns): the gradient looked ahead along its moving average."""
        grad = parameter.grad
        assert grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - momentum)
        return grad.lerp(state["momentum"], momentum).flatten(1)


def _cost(matrix: Tensor) -> float:
    """Multiplications of :func:`orthogonalise`: two products with the long side, about three of the short a round."""
    short, long = sorted(matrix.shape)
    return float(short * short * (2 * long + 15 * short))


@dataclass(frozen=True, slots=True)
class Learner:
    """Parameters that share an optimizer's numbers and a limit on the norm of their gradient."""

    parameters: dict[str, nn.Parameter]
    settings: OptimizerSettings
    optimizers: list[torch.optim.Optimizer]
    peaks: list[float]
    """the highest learning rate of each group of each optimizer"""

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerSettings,
        *,
        is_hidden: Callable[[str], bool],
        team: Team = ALONE,
    ) -> Learner:
        optimizers = build_optimizers(parameters, settings, is_hidden=is_hidden, team=team)
        peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        return cls(dict(parameters), settings, optimizers, peaks)

    def clip(self) -> Tensor:
        """The norm of the gradient before it was clipped."""
        limit = self.settings.clip_norm or math.inf
        return nn.utils.clip_grad_norm_(self.parameters.values(), limit, foreach=True)

    def step(self, factor: float) -> None:
        """One update at ``factor`` times the highest learning rates."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        for optimizer in self.optimizers:
            optimizer.step()


def build_optimizers(
    parameters: Mapping[str, nn.Parameter],
    settings: OptimizerSettings,
    *,
    is_hidden: Callable[[str], bool],
    team: Team = ALONE,
) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the hidden matrices and AdamW over the rest.

    Weight decay applies to matrices and kernels only, never to norms and biases.

    Args:
        parameters: by name, all of them trained.
        is_hidden: whether the parameter of this name may go to Muon (not first and last layers, embeddings).
        team: the processes that share Muon's work.
    """
    hidden = {n for n, p in parameters.items() if settings.name == "muon" and p.ndim >= 2 and is_hidden(n)}
    rest = [(n, p) for n, p in parameters.items() if n not in hidden]
    decayed = [p for _, p in rest if p.ndim >= 2]
    plain = [p for _, p in rest if p.ndim < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, settings.weight_decay), (plain, 0.0))
        if params
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True))
    if hidden:
        optimizers.append(
            Muon(
                [parameters[name] for name in sorted(hidden)],
                lr=settings.muon_lr,
                momentum=settings.muon_momentum,
                weight_decay=settings.weight_decay,
                team=team,
            )
        )
    return optimizers


def learning_rate_factor(settings: ScheduleSettings, *, step: int, position: float) -> float:
    """Learning rate / its peak.

    Args:
        step: steps done; the warm-up counts these.
        position: share of the run that is over, in 0..1 (by steps or by the clock).
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    descent = min(1.0, max(0.0, (position - settings.hold) / max(1e-9, 1.0 - settings.hold)))
    if settings.shape == "constant":
        shape = 1.0
    elif settings.shape == "linear":
        shape = 1.0 - descent
    else:
        shape = 0.5 + 0.5 * math.cos(math.pi * descent)
    return warmup * (settings.final_ratio + (1.0 - settings.final_ratio) * shape)


class Average:
    """Exponential moving average of parameters, kept in fp32.

    Early in a run the decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the random start is
    forgotten quickly.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.num_updates = 0
        self.values = {name: p.detach().clone().float() for name, p in self.parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        if not self.decay:
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = [self.parameters[name].detach() for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the averaged weights."""
        if not self.decay:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            parameter = self.parameters[name]
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)
