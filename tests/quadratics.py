"""Small quadratics over flat images."""

import torch


def coupled(n=27, seed=0):
    """A positive definite matrix of condition number 100, and a target that lies partly outside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return basis @ torch.diag(torch.logspace(-1, 1, n)) @ basis.T, torch.randn(n, generator=generator) + 0.5


def quadratic(matrix, target):
    """image -> two losses, the first with this matrix and this minimum."""

    def objective(image):
        gap = image.flatten() - target
        return torch.stack([gap @ matrix @ gap, gap.abs().sum()])

    return objective


def evaluation(objective):
    """image -> (losses, gradient of the first)."""

    def evaluate(x):
        image = x.clone().requires_grad_()
        losses = objective(image)
        return losses.detach(), torch.autograd.grad(losses[0], image)[0]

    return evaluate
