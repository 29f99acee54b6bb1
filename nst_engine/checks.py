"""What is refused, each in one sentence that names the value and what is allowed."""

import math

import torch


def check_picture(image, name):
    """Raise ValueError unless `image` is a picture: (1, 3, H, W), floating point, values in [0, 1]."""
    if not (
        torch.is_tensor(image)
        and image.dim() == 4
        and image.shape[:2] == (1, 3)
        and image.is_floating_point()
        and image.numel()
    ):
        found = f"{tuple(image.shape)} {image.dtype}" if torch.is_tensor(image) else type(image).__name__
        raise ValueError(f"{name} is {found}: a picture is a float tensor (1, 3, H, W), as load_image gives it")
    if not ((image >= 0) & (image <= 1)).all():
        raise ValueError(f"{name} has values outside [0, 1] or not finite: a picture holds RGB in [0, 1]")


def check_shape(shape):
    if not (isinstance(shape, (tuple, list)) and len(shape) == 2) or not all(
        isinstance(side, int) and side > 0 for side in shape
    ):
        raise ValueError(f"shape is {shape!r}: it must be (height, width), whole numbers of pixels, 1 or more")


def check_task(task):
    """Raise ValueError unless a `Task` has something to match."""
    for name in ("content_weight", "style_weight"):
        weight = getattr(task, name)
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}: it must be a finite number, 0 or more")
    if not task.layers:
        raise ValueError("no layers given: name at least one, such as 'conv1_2'")
    if not (task.content_layers and task.content_weight or task.style_layers and task.style_weight):
        raise ValueError(
            f"content_weight is {task.content_weight} and style_weight {task.style_weight}, and every layer named has "
            "weight 0: give one that has layers a weight above 0"
        )


def check_start(init, seed, starts):
    """Raise ValueError unless `init` is a picture or one of the names `starts`, and `seed` a whole number."""
    if not isinstance(init, str):
        check_picture(init, "init")
    elif init not in starts:
        raise ValueError(f"unknown init {init!r}: use {' or '.join(map(repr, starts))} or a picture to start from")
    if not isinstance(seed, int):
        raise ValueError(f"seed is {seed!r}: it must be a whole number")


def check_evaluations(evaluations):
    if not isinstance(evaluations, int) or evaluations < 1:
        raise ValueError(f"evaluations is {evaluations!r}: it must be a whole number, 1 or more")
