"""A job of `stylise`: it makes one image, saves it as it goes, can be resumed, and overwrites no other image."""

import contextlib
import hashlib
import itertools
import json
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

from .engine.checks import UserError, as_file, reason
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

# Settings that no option sets; with --like they may differ.
FIXED = {
    "content_layer": CONTENT_LAYER,
    "layer_weights": dict.fromkeys(STYLE_LAYERS, 1.0),
    "content_weight": CONTENT_WEIGHT,
    "coarse_to_fine": True,
}
SETTINGS = ("size", "style_size", "style_weight", "start", "seed", "evaluations", "keep_colours", *FIXED)
SECONDS_BETWEEN_SAVES = 30
BAR = "{percentage:3.0f} % |{bar}| {elapsed}{postfix}"


def defaults_for(options: Namespace) -> dict:
    """Defaults for `stylise.parse`: the fixed settings, and with --like those of the saved image.

    Looks for its images beside it, in the current folder, and among the project's. Drops its blend and masks if the
    command line gives a different number of styles. Raises UserError if the image cannot be made again.
    """
    if not options.like:
        return FIXED
    path, saved = options.like, read_settings(options.like)
    if saved["content"] is None or not saved["styles"] or saved["start"] == "present":
        problem = "was made without a content or style image, or began with an image that was not kept"
        raise UserError(f"{str(path)!r} {problem}: open its settings in the panel")

    def find(name):
        return str(find_picture(name, path.parent, Path()) or name)

    defaults = FIXED | {name: saved[name] for name in SETTINGS if name in saved}
    names, blend, masks = zip(*saved["styles"])
    defaults |= {"content": find(saved["content"]), "style": [find(name) for name in names]}
    if len(options.style) in (0, len(names)):
        defaults["blend"] = list(blend)
        defaults["masks"] = [mask and find(mask) for mask in masks]
    return defaults


def settings_of(options: Namespace, identify) -> dict:
    """The settings that determine the image, as `read_settings` returns them. identify: path -> name or digest."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    styles = []
    for style, weight, mask in zip(options.style, options.blend, options.masks):
        styles.append([identify(style), weight, mask if mask in (None, REST) else identify(mask)])
    return settings | {"content": identify(options.content), "styles": styles}


def content_digest(path: str) -> str:
    return digest(as_file(path, "picture").read_bytes())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fingerprint(settings: dict) -> str:
    """A hash of the settings, without the film; files count by content, not by name."""
    return digest(json.dumps(settings | {"film": None}, sort_keys=True).encode())


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
    layers = options.content_layer, options.layer_weights
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
        sys.exit(f"another process has ended, so this one stops too; run the same command to resume: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def make(options: Namespace, first: bool = True) -> None:
    """Make the image. first: this process prints and saves; the others only compute their part."""
    settings = settings_of(options, content_digest) | {"film": options.film and str(options.film)}
    options.output = options.output or free_output(options, settings)
    options.state = options.output.with_suffix(".safetensors")
    with locked(options.output, options.state) if first else contextlib.nullcontext():
        state = find_run(options.output, settings)
        if state is None and options.output.exists():
            if first:
                tqdm.write(f"{options.output} is already made, with the same settings")
            return
        if options.film and options.film.exists():
            raise UserError(f"{str(options.film)!r} already exists: give another name with --film")
        run = Run(
            task_of(options),
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


def free_output(options: Namespace, settings: dict) -> Path:
    """CONTENT_STYLE.png, CONTENT_STYLE_002.png, ...: the first name that no image or run with other settings has."""
    stem = joint_stem(Path(options.content), *map(Path, options.style))
    for number in itertools.count(1):
        output = Path(f"{stem}_{number:03}.png" if number > 1 else f"{stem}.png")
        with contextlib.suppress(TakenError):
            find_run(output, settings)
            return output


class TakenError(UserError):
    """An image or an unfinished run with other settings has this name."""


def find_run(output: Path, settings: dict) -> dict | None:
    """The state of the unfinished run; None if there is none or the image is finished. Raises TakenError.

    The state is {} until the run is first saved.
    """
    path = output.with_suffix(".safetensors")
    found = read_state(path)
    if not found:
        if output.exists() and not is_made(output, settings):
            raise TakenError(f"{str(output)!r} already exists: give another name with --output")
        return None
    state, before = found
    words = {"content": "another content image", "styles": "other styles, blend or masks"}
    others = []
    for name, value in settings.items():
        if before.get(name) != value:
            others.append(words.get(name, f"{name.replace('_', ' ')} {before.get(name)}"))
    if others:
        raise TakenError(f"{str(path)!r} is a run with {' and '.join(others)}: give the same again, or move it away")
    return state


def is_made(output: Path, settings: dict) -> bool:
    """Whether the image was finished with these settings, and its film is there."""
    film = settings["film"]
    if film and not Path(film).exists():
        return False
    with contextlib.suppress(UserError):
        return read_settings(output).get("fingerprint") == fingerprint(settings)
    return False


class Job:
    """A run with its film, and the files that they are saved to."""

    def __init__(self, options: Namespace, settings: dict, run: Run, state: dict | None):
        self.options, self.settings, self.run = options, settings, run
        self.film = Recorder() if options.film else None
        limit_cuda_memory(options.memory, run.device)
        if state:
            run.load_state_dict(state)
            if self.film:
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
                tqdm.write(f"{options.content} has transparent parts, which become white")
            self.compute()
            self.write_image(resize(run.image, run.shape), fingerprint=fingerprint(self.settings))
            if self.film:
                self.write_film()
            options.state.unlink(missing_ok=True)
            tqdm.write(f"{options.output}: {run.shape[1]} x {run.shape[0]} pixels, finished because {run.ended}")
        except UserError:  # report this one, even if saving fails as well
            with contextlib.suppress(UserError):
                self.save()
            raise
        except BaseException:  # an interrupt, or another process that has died
            self.save()
            raise

    def compute(self) -> None:
        """Run all steps with a progress bar; save every half minute, or less often if saving is slow."""
        run, previous, rate, scales = self.run, None, None, len(self.run.scales)
        saved, pause = time.monotonic(), SECONDS_BETWEEN_SAVES
        start = done = 0  # when timing of the present scale began, and pixels since
        with tqdm(total=run.pixels_left, bar_format=BAR, dynamic_ncols=True) as bar:
            while step := run.step():
                if self.film:
                    self.keep_frame()
                height, width = step.shape
                now, pixels = time.monotonic(), height * width
                if previous and step.shape == previous.shape:
                    done += pixels
                    rate = (now - start) / done
                else:  # the first evaluation at a scale includes setup, so it is not timed
                    start, done = now, 0
                    if previous and step.total > previous.total:
                        tqdm.write(f"{width} x {height} pixels: more detail to match, so the loss starts higher")
                    if step.shape == run.shape:
                        tqdm.write(run.describe())
                previous, left = step, "?"
                if rate and (step.shape == run.shape or len(run.scales) < scales):
                    left = tqdm.format_interval(rate * run.pixels_left)
                bar.n += pixels
                bar.total = bar.n + run.pixels_left
                bar.set_postfix_str(f"{left} left, {width} x {height}, loss {step.total:.4g}")
                if now - saved > pause:
                    try:
                        self.save()
                    except UserError as error:
                        tqdm.write(f"warning: {error}; the run goes on")
                    saved = time.monotonic()
                    pause = max(SECONDS_BETWEEN_SAVES, 100 * (saved - now))  # saving takes at most 1 % of the time

    def save(self) -> None:
        """Save the run, its film, and its present image; before the first evaluation, remove the run's file."""
        if self.run.evaluations_left == self.options.evaluations:
            self.options.state.unlink(missing_ok=True)
            return
        state = self.run.state_dict()
        if self.film:
            self.keep_frame()
            state |= self.film.state_dict()
        write_state(self.options.state, state, self.settings)
        self.write_image(self.run.image)

    def keep_frame(self) -> None:
        """Keep the image of the latest evaluation for the film, unless it is kept already."""
        run = self.run
        self.film(self.coloured(run.image), run.best, self.options.evaluations - run.evaluations_left)

    def coloured(self, image: Tensor) -> Tensor:
        return keep_colours(image, self.run.task.content) if self.options.keep_colours else image

    def write_image(self, image: Tensor, **more: str) -> None:
        content = as_png(self.coloured(image), settings_of(self.options, os.path.basename) | more)
        write_over(self.options.output, lambda path: path.write_bytes(content))

    def write_film(self) -> None:
        """Write the film. Raises UserError if another file has taken its name in the meantime."""
        path = self.options.film
        try:
            write_new(path, film_of(self.film.frames, path.suffix[1:]))
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be written, move it away: {reason(error)}") from error


def limit_cuda_memory(memory: float | None, device: torch.device) -> None:
    """Make CUDA refuse more than `memory` GiB. The limit is process-wide, so the program sets it, not the engine."""
    if memory and device.type == "cuda":
        share = memory * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
