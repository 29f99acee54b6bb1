"""Small quadratics over flat images, whose minimum within [0, 1] is known otherwise."""

import functools

import torch

from style_transfer.engine.evaluation import evaluator
from style_transfer.engine.tiles import Objective, cut_tiles


def quadratic(matrix, target, seen=None):
    def objective(image):
        if seen is not None:
            seen.append(image.detach().flatten())
        gap = image.flatten() - target
        return torch.stack([gap @ matrix @ gap, gap.abs().sum()])

    return objective


def projected_solution(matrix, target):
    """The minimum over [0, 1] of the same quadratic, by many small projected gradient steps in float64."""
    matrix, target = matrix.double(), target.double()
    x, step = torch.full_like(target, 0.5), 0.5 / torch.linalg.eigvalsh(matrix)[-1]
    for _ in range(20000):
        x = (x - 2 * step * matrix @ (x - target)).clamp(0, 1)
    return x


def coupled(n=27, seed=0):
    """A positive definite matrix, condition number 100, and a target of which a part lies outside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return basis @ torch.diag(torch.logspace(-1, 1, n)) @ basis.T, torch.randn(n, generator=generator) + 0.5


def whole(image):
    """The image as its single tile."""
    return cut_tiles(image.shape[-2:], max(image.shape), 0, 1)


def evaluation(objective, start):
    """flat image -> (losses, gradient) of an objective without weights; `start` (1, 3, H, W) has its shape."""
    made = Objective(lambda part, tile: [part.clone()], lambda sums, weights: objective(sums[0]), whole(start))
    return functools.partial(evaluator(made, start.shape[-2:], start.device), weights=torch.ones(1))
