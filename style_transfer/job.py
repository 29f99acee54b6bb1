"""A job of the program `stylise`: one image, saved as it is made, resumed after an interruption, never overwritten."""

import contextlib
import hashlib
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .engine.checks import UserError, reason
from .engine.figures import Recorder, film_of
from .engine.images import keep_colours, load_image, load_mask, resize
from .engine.losses import resize_mask
from .engine.objective import CONTENT_LAYER, CONTENT_WEIGHT, STYLE_LAYERS, Style, Task
from .engine.run import Run
from .engine.saving import (
    REST,
    as_png,
    find_picture,
    joint_stem,
    locked,
    read_settings,
    read_state,
    write_new,
    write_over,
    write_state,
)

# Settings without an option; those of a saved image may differ.
FIXED = {
    "content_layer": CONTENT_LAYER,
    "layer_weights": dict.fromkeys(STYLE_LAYERS, 1.0),
    "content_weight": CONTENT_WEIGHT,
    "coarse_to_fine": True,
}
SETTINGS = ("size", "style_size", "style_weight", "start", "seed", "evaluations", "keep_colours", *FIXED)
SECONDS_BETWEEN_SAVES = 30
BAR = "{percentage:3.0f} % |{bar}| {elapsed}, {remaining} left{postfix}"


def defaults_for(options: Namespace) -> dict:
    """Defaults for `stylise.parse`: the fixed settings, and with --like those of the saved image.

    Its images are looked for beside it, in the current folder, and among the project's. If another number of styles
    is given, its blend and masks are left out. Raises UserError if the image cannot be made again.
    """
    if not options.like:
        return FIXED
    path, saved = options.like, read_settings(options.like)
    if None in (saved["content"], saved["style"]) or saved["start"] == "present":
        problem = "was made without a content or style image, or began with an image that was not kept"
        raise UserError(f"{str(path)!r} {problem}: open its settings in the panel")

    def find(name):
        return str(find_picture(name, path.parent, Path()) or name)

    defaults = FIXED | {name: saved[name] for name in SETTINGS if name in saved}
    names, blend, masks = zip(*saved.get("styles", [(saved["style"], 1.0, None)]))
    defaults |= {"content": find(saved["content"]), "style": [find(name) for name in names]}
    if len(options.style) in (0, len(names)):
        defaults["blend"] = list(blend)
        defaults["masks"] = [mask and find(mask) for mask in masks]
    return defaults


def settings_of(options: Namespace, identify) -> dict:
    """What the image depends on, in the form of `read_settings`. identify: a function of a file's path."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    styles = []
    for style, weight, mask in zip(options.style, options.blend, options.masks):
        styles.append([identify(style), weight, mask if mask in (None, REST) else identify(mask)])
    return settings | {"content": identify(options.content), "style": styles[0][0], "styles": styles}


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def task_of(options: Namespace) -> Task:
    """The task, with images and masks read from their files."""
    content = load_image(options.content, options.size, options.device)
    masks = {}
    for name in options.masks:
        if name not in (None, REST):
            masks[name] = resize_mask(load_mask(name, options.size, options.device), content.shape[-2:])
    if REST in options.masks:
        masks[REST] = 1 - sum(masks.values()).clamp(max=1)
    styles = []
    for path, weight, name in zip(options.style, options.blend, options.masks):
        styles.append(Style(load_image(path, options.style_size, options.device), weight, masks.get(name)))
    layers = (options.content_layer,), options.layer_weights
    return Task(content, styles, *layers, options.content_weight, options.style_weight)


def run_alone_or_shared(options: Namespace) -> None:
    """Make the image, together with the other processes if torchrun has started several. Sets `options.state`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        make(options)
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group(backend)
        make(options, first=dist.get_rank() == 0)
    except RuntimeError as error:
        sys.exit(f"another process has ended, and so does this one; the same command resumes: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def make(options: Namespace, first: bool = True) -> None:
    """Make the image. first: this process prints and saves; the others only compute their part."""
    if not options.output:
        options.output = Path(f"{joint_stem(Path(options.content), *map(Path, options.style))}.png")
    options.state = options.output.with_suffix(".safetensors")
    task = task_of(options)
    settings = settings_of(options, digest) | {"output": options.output.name, "film": str(options.film)}
    with locked(options.output, options.state) if first else contextlib.nullcontext():
        state = resumable(options, settings)
        run = Run(
            task,
            init=options.start,
            seed=options.seed,
            evaluations=options.evaluations,
            coarse_to_fine=options.coarse_to_fine,
            memory=options.memory,
        )
        job = Job(options, settings, run, state)
        if dist.is_initialized():
            dist.barrier()  # every process has read the state before the first one writes it
        if first:
            job.make()
        else:
            while run.step():
                pass


def resumable(options: Namespace, settings: dict) -> dict:
    """The state to resume; empty without a file, and before the first evaluation.

    Raises UserError for a state of other settings, and if something would be overwritten.
    """
    film, output, found = options.film, options.output, read_state(options.state)
    if not found and output.exists():
        raise UserError(f"{str(output)!r} is there already: give another name with --output")
    if film and film.exists():
        raise UserError(f"{str(film)!r} is there already: give another name with --film")
    if not found:
        return {}
    state, before = found
    words = {"content": "another content image", "style": None, "styles": "other styles, blend or masks"}
    others = [
        words.get(name, f"{name.replace('_', ' ')} {before.get(name)}")
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if others:
        problem = f"is a run with {' and '.join(filter(None, others))}"
        raise UserError(f"{str(options.state)!r} {problem}: give the same again, or move it away")
    return state


class Job:
    """A run with its film, and the files that they are saved to."""

    def __init__(self, options: Namespace, settings: dict, run: Run, state: dict):
        self.options, self.settings, self.run = options, settings, run
        self.film = Recorder() if options.film else None
        limit_cuda_memory(options.memory, run.device)
        if state:
            run.load_state_dict(state)
        if state and self.film:
            self.film.load_state_dict(state)

    def make(self) -> None:
        """Compute the image and save it; after an interruption or an error, save the run."""
        options, run = self.options, self.run
        try:
            if not options.state.exists():
                write_state(options.state, {}, self.settings)  # fails now rather than after half a minute
            with Image.open(options.content) as file:
                side, transparent = min(file.size), file.has_transparency_data
            if side < options.size:
                tqdm.write(f"{options.content} is {side} pixels wide or high: enlarged, it gains no detail")
            if transparent:
                tqdm.write(f"{options.content} has transparency, which is laid on white")
            self.compute()
            self.write_image(resize(run.image, run.shape))
            if self.film:
                self.write_film()
            options.state.unlink(missing_ok=True)
            tqdm.write(f"{options.output}: {run.shape[1]} x {run.shape[0]} pixels, finished because {run.ended}")
        except UserError:  # it counts, and not that the run cannot be saved either
            with contextlib.suppress(UserError):
                self.save()
            raise
        except BaseException:  # an interrupt, or another process that has died
            self.save()
            raise

    def compute(self) -> None:
        """Step after step, with a progress bar and a save every half minute, or less often if that takes long."""
        run, shape = self.run, None
        saved, pause = time.monotonic(), SECONDS_BETWEEN_SAVES
        with tqdm(total=run.pixels_left / 1e6, unit="Mpx", bar_format=BAR, dynamic_ncols=True) as bar:
            while step := run.step():
                if self.film:
                    self.keep_frame()
                if step.shape == run.shape != shape:
                    tqdm.write(run.describe())
                shape = height, width = step.shape
                bar.update(min(height * width / 1e6, bar.total - bar.n))  # the last scale uses what others leave
                bar.set_postfix_str(f"{width} x {height}, loss {step.total:.4g}")
                before = time.monotonic()
                if before - saved > pause:
                    try:
                        self.save()
                    except UserError as error:
                        tqdm.write(f"warning: {error}; the run goes on")
                    saved = time.monotonic()
                    pause = max(SECONDS_BETWEEN_SAVES, 100 * (saved - before))  # saves take a hundredth of the time

    def save(self) -> None:
        """Save the run, its film, and its present image; before the first evaluation, remove the run's file."""
        state = self.run.state_dict()
        if state["left"] == self.options.evaluations:
            self.options.state.unlink(missing_ok=True)
            return
        if self.film:
            self.keep_frame()
            state |= self.film.state_dict()
        write_state(self.options.state, state, self.settings)
        self.write_image(self.run.image)

    def keep_frame(self) -> None:
        """Keep the image of the latest evaluation for the film, unless it is kept already."""
        state = self.run.state_dict()
        if self.film.evaluations < self.options.evaluations - state["left"]:
            self.film(self.coloured(self.run.image), state["step"])

    def coloured(self, image: Tensor) -> Tensor:
        return keep_colours(image, self.run.task.content) if self.options.keep_colours else image

    def write_image(self, image: Tensor) -> None:
        content = as_png(self.coloured(image), settings_of(self.options, os.path.basename))
        write_over(self.options.output, lambda path: path.write_bytes(content))

    def write_film(self) -> None:
        """Write the film, unless another file has taken its name in the meantime."""
        path = self.options.film
        try:
            write_new(path, film_of(self.film.frames, path.suffix[1:].lower()))
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be written, move it away: {reason(error)}") from error


def limit_cuda_memory(memory: float | None, device: torch.device) -> None:
    """Make CUDA refuse more than `memory` GiB. It holds for the process, so the program sets it, not the engine."""
    if memory and device.type == "cuda":
        share = memory * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
