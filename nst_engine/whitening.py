"""A metric for a texture's Gram errors, in which faint pairs of channels fall as fast as strong ones."""

import torch


def whitening_of(grams, answers, sizes):
    """How to weigh Gram errors so that descent lowers all their parts about equally fast: {layer: (basis, weights)}.

    grams: {layer: Gram matrix (C, C) of a picture like the one to reach}; answers: {layer: Gram matrix of the change
    of its feature map when white noise is added}; sizes: {layer: C h w}.

    A step down the gradient A with respect to a Gram matrix G changes G by about B A G + G A B, where B says which
    channels answer together to a change of the picture, here to white noise. In the basis Q with Q^T B Q = 1 and
    Q^T G Q diagonal, entry (i, j) of the error therefore falls at the rate G_ii + G_jj, and these differ a
    thousandfold. Its square is divided by that rate: a Gauss-Newton metric, one block a layer. basis, weights: (C, C).
    """
    whitening = {}
    for name, size in sizes.items():
        device = grams[name].device
        answer, gram = answers[name].cpu().double(), grams[name].cpu().double()
        # A little of the identity, and of the largest rate below, for what these estimates do not know; the smallest
        # numbers, against mean activations of 1, for a layer that is silent.
        answer = answer / (answer.diagonal().mean() + 1e-12) + 0.3 * torch.eye(len(gram))
        root = torch.linalg.inv(torch.linalg.cholesky(answer))
        rates, basis = torch.linalg.eigh(root @ gram @ root.T)
        rates = rates.clamp(min=0)[:, None] + rates.clamp(min=0)
        weights = (size / (rates + 0.003 * rates.max() + 1e-6)).sqrt() * len(gram)
        whitening[name] = tuple(matrix.float().to(device) for matrix in (root.T @ basis, weights))
    return whitening


def whiten(error, basis, weights):
    """A Gram error (C, C) as `whitening_of` weighs it: zero for the same pictures, and brought there sooner."""
    error = (error + error.T) / 2  # the same numbers; but now the gradient is symmetric to the last bit as well
    return weights * (basis.T @ error @ basis)
