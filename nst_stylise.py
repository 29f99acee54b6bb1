"""One image in the style of another, of any size, in bounded memory: stylise photo.jpg painting.jpg

The image is saved every half minute beside its run, a .safetensors file of the same name; after an interruption the
same command goes on from there. For several devices or processes: torchrun --nproc-per-node 2 -m nst_stylise ...
An image that the panel or this program has saved says how it was made: stylise --like saved.png makes it again.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from tqdm import tqdm

import nst_utils as nst
from nst_engine.saved import as_png, find_picture, read_settings

IMAGES = ("content", "style")
CHOSEN = ("size", "style_size", "style_weight", "init", "seed", "evaluations")  # by options
LAYERS = {"content_layer": "conv1_2", "layer_weights": dict.fromkeys(nst.FIRST_FIVE, 1.0)}
TASK = {**LAYERS, "content_weight": 1.0, "coarse_to_fine": True}  # unless --like finds others
SECONDS = 30  # between two times of saving
BAR = "{percentage:3.0f} % |{bar}| {elapsed}, {remaining} left{postfix}"


def parse(arguments):
    parser = argparse.ArgumentParser("stylise", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("content", type=Path, nargs="?")
    parser.add_argument("style", type=Path, nargs="?")
    parser.add_argument("--like", type=Path, help="a saved PNG file, whose settings hold where no others are given")
    parser.add_argument("-o", "--output", type=Path, help="a PNG file; by default CONTENT_STYLE.png, here")
    parser.add_argument("--size", type=int, default=256, help="of the shorter side, in pixels (%(default)s)")
    parser.add_argument("--style-size", type=int, help="the same of the style image: a larger one has larger strokes")
    parser.add_argument("--style-weight", type=float, default=1e4, help="the content's is 1 (%(default)g)")
    parser.add_argument("--init", choices=("noise", "content"), default="noise", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--evaluations", type=int, default=80, help="of the network, at most (%(default)s)")
    parser.add_argument("--memory", type=float, help="GiB that a process may take; by default what is free")
    parser.add_argument("--device", help="by default the best here")
    parser.set_defaults(**TASK)
    options = parser.parse_args(arguments)
    if options.like:
        saved = read_settings(options.like)
        parser.set_defaults(**defaults_like(options.like, saved))
        options = parser.parse_args(arguments)
    if missing := [name for name in IMAGES if not getattr(options, name)]:
        named = f"{' and '.join(repr(saved[name]) for name in missing)} not found: " if options.like else ""
        raise nst.UserError(f"{named}give two images, content and style")
    options.style_size = options.size if options.style_size is None else options.style_size
    options.output = options.output or Path(f"{nst.joint_stem(options.content, options.style)}.png")
    if options.output.suffix.lower() != ".png":
        raise nst.UserError(f"--output is {str(options.output)!r}: give a name that ends in .png")
    options.state = options.output.with_suffix(".safetensors")
    return options


def defaults_like(path, saved):
    """The options that make a saved image again; its images are looked for beside it, here, and among the project's."""
    if None in (saved["content"], saved["style"]):
        kind = "content" if saved["content"] else "style"
        raise nst.UserError(f"{str(path)!r} was made from a {kind} image alone: open its settings in the panel")
    if saved["start"] == "present":
        raise nst.UserError(f"{str(path)!r} began with an image that was not kept: open its settings in the panel")
    images = {name: find_picture(saved[name], path.parent, Path()) for name in IMAGES}
    return images | {name: saved[name] for name in (*CHOSEN, *TASK) if name in saved} | {"init": saved["start"]}


# --- What is saved, and read again ---------------------------------------------------------------


def settings_of(options):
    """What a run must have in common with the one that it continues, {option: text}; of the images, what they hold."""
    images = {name: hashlib.sha256(getattr(options, name).read_bytes()).hexdigest() for name in IMAGES}
    return images | {name: str(getattr(options, name)) for name in (*CHOSEN, *TASK)} | {"output": options.output.name}


def picture_of(image, options):
    """The PNG file of an image, which says how it was made."""
    about = {name: getattr(options, name) for name in (*CHOSEN, *TASK)} | {"start": options.init}
    return as_png(image, about | {name: getattr(options, name).name for name in IMAGES})


@contextlib.contextmanager
def alone(options):
    """Have the output to oneself, until the end of this process, however it ends."""
    if not options.output.parent.is_dir():
        raise nst.UserError(f"--output is {str(options.output)!r}: there is no folder {str(options.output.parent)!r}")
    path = options.state.with_name(f".{options.state.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            problem = "another run is making it: give another name with --output"
            raise nst.UserError(f"{str(options.output)!r}: {problem}") from error
        except OSError as error:
            raise nst.UserError(f"{str(options.output)!r} cannot be written: {error.strerror}") from error
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)
        lock.release()


def write(path, save):
    """Write a file aside by `save` and then give it its name, so that the one before is kept until then."""
    aside = path.with_name(f".{path.name}")
    try:
        save(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise nst.UserError(f"{str(path)!r} cannot be written, and is as it was: {why}") from error
    finally:
        aside.unlink(missing_ok=True)


def save(options, run, settings):
    """Save the image, and beside it the state of the run."""
    state = run.state_dict()
    tensors, places = {}, set()
    for name, value in state.items():
        if torch.is_tensor(value):  # of those that share memory, which a file cannot, all but the first are copied
            tensors[name] = value.cpu().clone() if value.data_ptr() in places else value.cpu()
            places.add(value.data_ptr())
    plain = {name: value for name, value in state.items() if name not in tensors}
    about = {"settings": json.dumps(settings), "state": json.dumps(plain)}
    write(options.state, lambda path: save_file(tensors, path, about))
    write(options.output, lambda path: path.write_bytes(picture_of(run.image, options)))


def begin(options, settings):
    """Make the file of a run that has no evaluations yet: what cannot be written is said before the work."""
    try:
        nst.write_new(options.state, to_bytes({}, {"settings": json.dumps(settings)}))
    except OSError as error:
        raise nst.UserError(f"{str(options.state)!r} cannot be written: {error.strerror}") from error


def read(options, settings):
    """The state of the run that is to go on, empty if it has no evaluations yet; None if there is no run."""
    with contextlib.suppress(OSError):
        if options.state.stat().st_size == 0:  # of a run that was killed as it began
            options.state.unlink()
    if not options.state.exists():
        if options.output.exists():
            raise nst.UserError(f"{str(options.output)!r} is there already: give another name with --output")
        return None
    try:
        with safe_open(options.state, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        before, state = (json.loads(about.get(name, "{}")) for name in ("settings", "state"))
    except (OSError, SafetensorError, ValueError) as error:
        problem = "is damaged, or not a run: move it away to begin anew"
        raise nst.UserError(f"{str(options.state)!r} {problem}") from error
    if not before:
        raise nst.UserError(f"{str(options.state)!r} is not a run of this program: move it away to begin anew")
    words = {name: f"another {name.replace('_', ' ')}" for name in TASK}
    words |= {name: f"another {name} image" for name in IMAGES}
    others = " and ".join(
        words.get(name, f"--{name.replace('_', '-')} {before.get(name)}")
        for name, value in settings.items()
        if before.get(name) != value
    )
    if others:
        raise nst.UserError(f"{str(options.state)!r} is of other settings, {others}: give these, or move it away")
    return tensors | state


def warn_of_size(options):
    """Say so where the content image has fewer pixels than the result is to have."""
    with Image.open(options.content) as file:
        side = min(file.size)
    if side < options.size:
        tqdm.write(f"{options.content} is {side} pixels wide or high: enlarged to {options.size} it has no more detail")


# --- The run -------------------------------------------------------------------------------------


def stylise(options, first):
    """Make the image; first: whether this process is the one that prints and saves."""
    content = nst.load_image(options.content, options.size, options.device)
    style, settings = nst.load_image(options.style, options.style_size, options.device), settings_of(options)
    with alone(options) if first else contextlib.nullcontext():
        begun = read(options, settings)
        layers = (options.content_layer,), options.layer_weights
        task = nst.Task(content, style, *layers, options.content_weight, options.style_weight)
        same = {name: getattr(options, name) for name in ("init", "seed", "evaluations", "coarse_to_fine", "memory")}
        run = nst.Run(task, **same)
        hold_to(options.memory, content.device)
        if begun:
            run.load_state_dict(begun)
        if dist.is_initialized():
            dist.barrier()  # all have read
        if first and begun is None:
            begin(options, settings)
        if first:
            warn_of_size(options)
        try:
            work(run, options, settings, first)
            if first:
                image = nst.resize(run.image, run.shape)
                write(options.output, lambda path: path.write_bytes(picture_of(image, options)))
                options.state.unlink(missing_ok=True)
                tqdm.write(f"{options.output}: {run.shape[1]} x {run.shape[0]} pixels")
        except BaseException:  # an interrupt, or another process that has died
            if first and (begun or run.state_dict()["left"] < options.evaluations):
                save(options, run, settings)
            elif first:  # nothing has been evaluated yet
                options.state.unlink(missing_ok=True)
            raise


def hold_to(memory, device):
    """Have CUDA refuse more than so many GiB, if given: to the whole process, so it is not the engine's to set."""
    if memory and device.type == "cuda":
        share = memory * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def work(run, options, settings, first):
    """Step after step, with a bar and a save every half minute."""
    saved, described = time.monotonic(), False
    with tqdm(total=run.pixels_left / 1e6, unit="Mpx", bar_format=BAR, disable=not first, dynamic_ncols=True) as bar:
        while step := run.step():
            if first and not described and step.shape == run.shape:
                tqdm.write(run.describe())
                described = True
            pixels = step.shape[0] * step.shape[1] / 1e6
            bar.update(min(pixels, bar.total - bar.n))  # what a coarse scale spares goes to the last
            bar.set_postfix_str(f"{step.shape[1]} x {step.shape[0]}, loss {step.total:.4g}")
            if first and time.monotonic() - saved > SECONDS:
                save(options, run, settings)
                saved = time.monotonic()


class Terminal(io.TextIOBase):
    """A stream that takes every text: what it cannot show is shown by its codes, and when it has gone nothing is."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except (OSError, ValueError, AttributeError):  # its other end is closed, it is full or closed, or there is none
            with contextlib.suppress(OSError, AttributeError):  # so that what it has kept goes somewhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def fileno(self):
        return self.stream.fileno()


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
