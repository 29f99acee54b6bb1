"""What is kept of a run, to be shown: a few of its images as a figure, or many as a film."""

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checks import as_whole
from .images import resize, to_pil

QUALITY = 95  # of the JPEG in which an image is kept: with 100 of 512 pixels some 10 MB
SHOWN, HELD = 80, 2500  # ms, an image of a film and the last


class Frame(NamedTuple):
    """An image of a run."""

    image: Image.Image  # of Pillow's
    evaluation: int  # its number, from 1
    total: float  # the loss


class Recorder:
    """A callback of `optimise` that keeps images at even steps of evaluations, at most `most`, and the last.

    Where there would be more, every other one goes and the steps become twice as long. Larger ones are scaled to `side`
    pixels along the longer side.
    """

    def __init__(self, most: int = 100, side: int = 512):
        self.most, self.side, self.every = as_whole(most, "most"), as_whole(side, "side", " of pixels"), 1
        self.kept = {}  # {evaluation: (total loss, JPEG file)}

    def __call__(self, image: Tensor, step) -> None:
        """Look at an image; step: its `Step`, or its loss as a number."""
        kept = {n: frame for n, frame in self.kept.items() if (n - 1) % self.every == 0}
        if len(kept) >= self.most:
            self.every *= 2
            kept = {n: frame for n, frame in kept.items() if (n - 1) % self.every == 0}
        scale, buffer = min(1.0, self.side / max(image.shape[-2:])), io.BytesIO()
        smaller = resize(image, tuple(max(1, round(side * scale)) for side in image.shape[-2:]))
        to_pil(smaller).save(buffer, "jpeg", quality=QUALITY, subsampling=0)
        self.kept = kept | {self.evaluations + 1: (getattr(step, "total", step), buffer.getvalue())}

    @property
    def evaluations(self) -> int:
        """How many it has seen."""
        return max(self.kept, default=0)

    @property
    def frames(self) -> list[Frame]:
        """What is kept, in order."""
        return [Frame(Image.open(io.BytesIO(data)), n, total) for n, (total, data) in self.kept.items()]

    def state_dict(self) -> dict:
        """{name: tensor or list}, for `load_state_dict`."""
        files = b"".join(data for _, data in self.kept.values())
        kept = [(n, total, len(data)) for n, (total, data) in self.kept.items()]
        return {
            "film_every": self.every,
            "film_kept": kept,
            "film": torch.from_numpy(np.frombuffer(files, np.uint8).copy()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from the `state_dict` of another, as if it had gone on itself."""
        files = io.BytesIO(state["film"].numpy().tobytes())
        self.every = state["film_every"]
        self.kept = {n: (total, files.read(length)) for n, total, length in state["film_kept"]}


def film_of(frames: list[Frame], form: str) -> bytes:
    """A GIF or WebP file of images, all enlarged to the size of the last, which is held. form: "gif" or "webp"."""
    images = [frame.image.resize(frames[-1].image.size, Image.Resampling.BICUBIC) for frame in frames]
    times, buffer = [SHOWN] * (len(images) - 1) + [HELD], io.BytesIO()
    images[0].save(buffer, form, save_all=True, append_images=images[1:], duration=times, loop=0, quality=85)
    return buffer.getvalue()
