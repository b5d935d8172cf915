"""Linear layers that come nearest to what is wanted, from rows that are seen a few at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """Weighted least squares with a constant and a ridge. Sums are kept in float64."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, features: Tensor, wanted: Tensor, weight: Tensor | None = None) -> None:
        """Rows (n, P) and (n, Q), each counted ``weight`` ** 2 times; multiplied in their own dtype."""
        rows = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        if weight is not None:
            rows, wanted = rows * weight[:, None], wanted * weight[:, None]
        self.gram = self.gram + (rows.T @ rows).double()
        self.cross = self.cross + (rows.T @ wanted).double()

    def solve(self, *, ridge: float, constant: bool = True) -> tuple[Tensor, Tensor]:
        """Weight (Q, P) and bias (Q,) in float32.

        Args:
            ridge: times the mean energy of the features.
            constant: without one the bias is nought.
        """
        gram, cross = self.gram, self.cross
        assert isinstance(gram, Tensor)
        assert isinstance(cross, Tensor)
        if not constant:
            gram, cross = gram[:-1, :-1], cross[:-1]
        bonus = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        solution = torch.linalg.solve(gram + bonus, cross).float()
        if not constant:
            return solution.T, solution.new_zeros(solution.shape[1])
        return solution[:-1].T, solution[-1]
