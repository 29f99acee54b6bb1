"""What a network evaluates, seen and changed from its first layer."""

import weakref

import torch


class OnGPU(torch.Tensor):
    """An image that says it is there."""

    device = torch.device("cuda", 0)


class Watch:
    """A forward hook of the first layer and of all its copies; `with Watch(vgg) as watch:`."""

    def __init__(self, vgg):
        self.layer, self.copies = vgg.conv1_1, 0
        self.shapes = []  # of all feature maps
        self.targets = []  # weak references to those without a graph
        self.change = lambda output: None  # what an evaluation goes on with; None: the output as it is

    def __enter__(self):
        self.hook = self.layer.register_forward_hook(self)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def __deepcopy__(self, memo):
        self.copies += 1
        return self

    def __call__(self, module, inputs, output):
        self.shapes.append(tuple(output.shape[-2:]))
        if torch.is_grad_enabled():
            return self.change(output)
        self.targets.append(weakref.ref(output))


def alive(references):
    return sum(reference() is not None for reference in references)


def flat(output):
    """The same without a gradient, so that no step lowers the loss."""
    return output.detach() + 0 * output


def plateau(output):
    """The same but for one channel far off, so that the loss hardly falls, and each stage converges at once."""
    return torch.cat([torch.full_like(output[:, :1], 200), output[:, 1:]], dim=1)
