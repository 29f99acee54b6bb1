"""One image in the style of another, of any size, in bounded memory: stylise photo.jpg painting.jpg

The image is saved every half minute beside its run, a .safetensors file of the same name; after an interruption the
same command goes on from there. For several devices or processes:
    torchrun --nproc-per-node 2 -m style_transfer.stylise ...
An image that the panel or this program has saved says how it was made: stylise --like saved.png makes it again.

Several styles are blended, or each has its place, where its mask is white:
    stylise photo.jpg starry.jpg wave.jpg --blend 2 1
    stylise photo.jpg starry.jpg wave.jpg --masks sky.png rest
"""

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import nst_utils as nst
from style_transfer.engine.losses import resize_mask
from style_transfer.engine.saving import (
    REST,
    alone,
    as_png,
    begin_state,
    find_picture,
    read_settings,
    read_state,
    write,
    write_state,
)
from style_transfer.terminal import Terminal

CHOSEN = ("size", "style_size", "style_weight", "init", "seed", "evaluations", "keep_colours")  # by options
LAYERS = {"content_layer": "conv1_2", "layer_weights": dict.fromkeys(nst.FIRST_FIVE, 1.0)}
TASK = {**LAYERS, "content_weight": 1.0, "coarse_to_fine": True}  # unless --like finds others
SECONDS = 30  # between two times of saving
BAR = "{percentage:3.0f} % |{bar}| {elapsed}, {remaining} left{postfix}"


def parse(arguments):
    parser = argparse.ArgumentParser("stylise", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("content", type=Path, nargs="?")
    parser.add_argument("style", type=Path, nargs="*", help="a painting, or several")
    parser.add_argument("--blend", type=float, nargs="+", help="how much of each style, in their order (equal parts)")
    text = "for each style where it goes: an image, white there, or 'rest', where the others are not"
    parser.add_argument("--masks", nargs="+", help=text)
    text = "keep the photograph's, and change light and dark alone"
    parser.add_argument("--keep-colours", action=argparse.BooleanOptionalAction, default=False, help=text)
    parser.add_argument("--like", type=Path, help="a saved PNG file, whose settings hold where no others are given")
    parser.add_argument("-o", "--output", type=Path, help="a PNG file; by default CONTENT_STYLE.png, here")
    parser.add_argument("--size", type=int, default=256, help="of the shorter side, in pixels (%(default)s)")
    parser.add_argument("--style-size", type=int, help="the same of the style image: a larger one has larger strokes")
    parser.add_argument("--style-weight", type=float, default=1e4, help="the content's is 1 (%(default)g)")
    parser.add_argument("--init", choices=("noise", "content"), default="noise", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument(
        "--film", type=Path, help="a .gif or .webp file: the run in up to 100 images of at most 512 pixels"
    )
    parser.add_argument("--evaluations", type=int, default=80, help="of the network, at most (%(default)s)")
    parser.add_argument("--memory", type=float, help="GiB that a process may take; by default what is free")
    parser.add_argument("--device", help="by default the best here")
    parser.set_defaults(**TASK)
    options = parser.parse_intermixed_args(arguments)
    if options.like:
        saved = read_settings(options.like)
        parser.set_defaults(**defaults_like(options.like, saved, len(options.style or ())))
        options = parser.parse_intermixed_args(arguments)
    if None in (options.content, *(options.style or [None])):
        if not options.like and (options.masks or options.blend):
            raise nst.UserError("give the images first, content and styles, and then --masks and --blend")
        names = [saved["content"], *styles_in(saved)[0]] if options.like else []
        missing = [name for name, path in zip(names, [options.content, *options.style]) if path is None]
        named = f"{' and '.join(map(repr, missing))} not found: " if missing else ""
        raise nst.UserError(f"{named}give two images, content and style")
    count = len(options.style)
    for name in ("blend", "masks"):
        if len(getattr(options, name) or options.style) != count:
            problem = f"--{name} has {len(getattr(options, name))} and there are {count} styles"
            raise nst.UserError(f"{problem}: give one for each style")
    options.blend = [*map(float, options.blend or [1] * count)]
    options.style_size = options.size if options.style_size is None else options.style_size
    options.output = options.output or Path(f"{nst.joint_stem(options.content, *options.style)}.png")
    for name, suffixes in (("output", [".png"]), ("film", [".gif", ".webp"])):
        path = getattr(options, name)
        if path and path.suffix.lower() not in suffixes:
            raise nst.UserError(f"--{name} is {str(path)!r}: give a name that ends in {' or '.join(suffixes)}")
    if options.film and not os.access(options.film.parent, os.W_OK):
        problem = "it cannot be written" if options.film.parent.is_dir() else "there is no such folder"
        raise nst.UserError(f"--film is {str(options.film)!r}: {problem}")
    options.state = options.output.with_suffix(".safetensors")
    return options


def defaults_like(path, saved, given):
    """The options that make a saved image again; its images are looked for beside it, here, and among the project's.

    given: how many other styles there are in place of its own. Of another number they have no weights and masks here.
    """
    if None in (saved["content"], saved["style"]):
        kind = "content" if saved["content"] else "style"
        raise nst.UserError(f"{str(path)!r} was made from a {kind} image alone: open its settings in the panel")
    if saved["start"] == "present":
        raise nst.UserError(f"{str(path)!r} began with an image that was not kept: open its settings in the panel")

    def find(name):
        return find_picture(name, path.parent, Path())

    styles, blend, masks = styles_in(saved)
    found = {"content": find(saved["content"]), "style": [*map(find, styles)], "init": saved["start"]}
    same = given in (0, len(styles))
    if same and len(styles) > 1:
        found |= {"blend": blend}
    if same and any(masks):
        found |= {"masks": [name if name in (None, REST) else find(name) or name for name in masks]}
    return {name: saved[name] for name in (*CHOSEN, *TASK) if name in saved} | found


def styles_in(saved):
    """The names of the styles, their weights and their masks, in saved settings."""
    return [*zip(*saved.get("styles", [(saved["style"], 1.0, None)]))]


# --- What is saved, and read again ---------------------------------------------------------------


def settings_of(options):
    """What a run must have in common with the one that it continues, {option: text}; of the images, what they hold."""

    def digest(path):
        return path if path in (None, REST) else hashlib.sha256(Path(path).read_bytes()).hexdigest()

    found = {name: str(getattr(options, name)) for name in (*CHOSEN, *TASK, "blend")}
    found |= {"content": digest(options.content), "output": options.output.name}
    found |= {"film": options.film and options.film.name}
    return found | {"style": str([*map(digest, options.style)]), "masks": str([*map(digest, options.masks or [])])}


def picture_of(image, options):
    """The PNG file of an image, which says how it was made."""
    about = {name: getattr(options, name) for name in (*CHOSEN, *TASK)} | {"start": options.init}
    about |= {"content": options.content.name, "style": options.style[0].name}
    if len(options.style) > 1 or options.masks:
        names = [mask and Path(mask).name for mask in options.masks or [None] * len(options.style)]
        about["styles"] = [(path.name, *rest) for path, *rest in zip(options.style, options.blend, names)]
    return as_png(image, about)


def save(options, run, settings, recorder):
    """Save the image, and beside it the state of the run and of its film."""
    state = run.state_dict()
    if options.film:
        if recorder.evaluations < options.evaluations - state["left"]:  # interrupted before it saw the last
            recorder(image_of(run.image, run, options), nst.Step(*state["step"]))
        state |= recorder.state_dict()
    write_state(options.state, state, settings)
    write(options.output, lambda path: path.write_bytes(picture_of(image_of(run.image, run, options), options)))


def read(options, settings):
    """The state of the run that is to go on, empty if it has no evaluations yet; None if there is no run."""
    words = {name: f"another {name.replace('_', ' ')}" for name in TASK}
    words |= {"content": "another content image", "style": "another style image", "masks": "other masks"}
    words |= {"blend": "another blend", "film": "another film, or none", "keep_colours": "other colours"}
    state = read_state(options.state, settings, words)
    for name, new in (("output", state is None), ("film", True)):  # a film is written when all is done
        path = getattr(options, name)
        if new and path and path.exists():
            raise nst.UserError(f"{str(path)!r} is there already: give another name with --{name}")
    return state


def warn_of_size(options):
    """Say so where the content image has fewer pixels than the result is to have."""
    with Image.open(options.content) as file:
        side = min(file.size)
    if side < options.size:
        tqdm.write(f"{options.content} is {side} pixels wide or high: enlarged to {options.size} it has no more detail")


# --- The run -------------------------------------------------------------------------------------


def stylise(options, first):
    """Make the image; first: whether this process is the one that prints and saves."""
    task, settings, recorder = task_of(options), settings_of(options), nst.Recorder()
    with alone(options.output, options.state) if first else contextlib.nullcontext():
        begun = read(options, settings)
        same = {name: getattr(options, name) for name in ("init", "seed", "evaluations", "coarse_to_fine", "memory")}
        run = nst.Run(task, **same)
        hold_to(options.memory, run.device)
        if begun:
            run.load_state_dict(begun)
            if options.film:
                recorder.load_state_dict(begun)
        if dist.is_initialized():
            dist.barrier()  # all have read
        if first and begun is None:
            begin_state(options.state, settings)
        if first:
            warn_of_size(options)
        try:
            work(run, options, settings, recorder, first)
            if first:
                image = image_of(nst.resize(run.image, run.shape), run, options)
                write(options.output, lambda path: path.write_bytes(picture_of(image, options)))
                if options.film:
                    save_film(options.film, nst.film_of(recorder.frames, options.film.suffix[1:].lower()))
                options.state.unlink(missing_ok=True)
                tqdm.write(f"{options.output}: {run.shape[1]} x {run.shape[0]} pixels")
        except BaseException:  # an interrupt, or another process that has died
            if first and (begun or run.state_dict()["left"] < options.evaluations):
                save(options, run, settings, recorder)
            elif first:  # nothing has been evaluated yet
                options.state.unlink(missing_ok=True)
            raise


def task_of(options):
    """The task, of images and masks that are read here."""
    content = nst.load_image(options.content, options.size, options.device)
    names = options.masks or [None] * len(options.style)
    masks = {
        name: resize_mask(nst.load_mask(name, options.size, options.device), content.shape[-2:])
        for name in names
        if name not in (None, REST)
    }
    if REST in names:
        if not masks:
            raise nst.UserError(
                f"--masks are {' '.join(names)}: 'rest' is where the others are not, so give another one"
            )
        masks[REST] = 1 - sum(masks.values()).clamp(max=1)
    styles = [
        nst.Style(nst.load_image(path, options.style_size, options.device), weight, masks.get(name))
        for path, weight, name in zip(options.style, options.blend, names)
    ]
    layers = (options.content_layer,), options.layer_weights
    return nst.Task(content, styles, *layers, options.content_weight, options.style_weight)


def image_of(image, run, options):
    """An image of the run as it is saved."""
    return nst.keep_colours(image, run.task.content) if options.keep_colours else image


def save_film(path, film):
    """Write the film, unless another was written to its name in the meantime."""
    try:
        nst.write_new(path, film)
    except OSError as error:
        raise nst.UserError(f"{str(path)!r} cannot be written, move it away: {error.strerror}") from error


def hold_to(memory, device):
    """Have CUDA refuse more than so many GiB, if given: to the whole process, so it is not the engine's to set."""
    if memory and device.type == "cuda":
        share = memory * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def work(run, options, settings, recorder, first):
    """Step after step, with a bar and a save every half minute."""
    saved, described = time.monotonic(), False
    with tqdm(total=run.pixels_left / 1e6, unit="Mpx", bar_format=BAR, disable=not first, dynamic_ncols=True) as bar:
        while step := run.step():
            if first and options.film:
                recorder(image_of(run.image, run, options), step)
            if first and not described and step.shape == run.shape:
                tqdm.write(run.describe())
                described = True
            pixels = step.shape[0] * step.shape[1] / 1e6
            bar.update(min(pixels, bar.total - bar.n))  # what a coarse scale spares goes to the last
            bar.set_postfix_str(f"{step.shape[1]} x {step.shape[0]}, loss {step.total:.4g}")
            if first and time.monotonic() - saved > SECONDS:
                save(options, run, settings, recorder)
                saved = time.monotonic()


def main():
    options, several = None, int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        for name in ("SIGTERM", "SIGHUP"):  # ends as Ctrl-C does
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
                signal.signal(getattr(signal, name), signal.default_int_handler)
        with contextlib.redirect_stdout(Terminal(sys.stdout)), contextlib.redirect_stderr(Terminal(sys.stderr)):
            options = parse(sys.argv[1:])
            run_alone_or_with_others(options, several)
    except nst.UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        saved = options and options.state.exists()
        sys.exit(f"interrupted: the same command {'goes on from here' if saved else 'begins again, nothing is saved'}")
    except RuntimeError as error:
        if not several:
            raise
        sys.exit(f"another process has ended, and so does this one; the same command goes on: {error}")


def run_alone_or_with_others(options, several):
    if several:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        stylise(options, not several or dist.get_rank() == 0)
    finally:
        if several:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
