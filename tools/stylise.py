"""One image in the style of another, of any size, in bounded memory: tools/stylise.py photo.jpg painting.jpg

The image is saved every half minute beside its run, a .safetensors file of the same name; after an interruption the
same command goes on from there. For several devices or processes: torchrun --nproc-per-node 2 tools/stylise.py ...
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import nst_utils as nst

LAYERS = dict.fromkeys(nst.FIRST_FIVE, 1.0)
SECONDS = 30  # between two times of saving
BAR = "{percentage:3.0f} % |{bar}| {elapsed}, {remaining} left{postfix}"


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("content", type=Path)
    parser.add_argument("style", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="a PNG file; by default CONTENT_STYLE.png, here")
    parser.add_argument("--size", type=int, default=256, help="of the shorter side, in pixels (%(default)s)")
    parser.add_argument("--style-size", type=int, help="the same of the style image: a larger one has larger strokes")
    parser.add_argument("--style-weight", type=float, default=1e4, help="the content's is 1 (%(default)g)")
    parser.add_argument("--init", choices=("noise", "content"), default="noise", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--evaluations", type=int, default=80, help="of the network, at most (%(default)s)")
    parser.add_argument("--memory", type=float, help="GiB that a process may take; by default what is free")
    parser.add_argument("--device", help="by default the best here")
    options = parser.parse_args(arguments)
    options.output = options.output or Path(f"{options.content.stem}_{options.style.stem}.png")
    return options


# --- What is saved, and read again ---------------------------------------------------------------


def settings_of(options):
    """What a run that goes on must have in common with the one before, as text."""
    names = ("content", "style", "size", "style_size", "style_weight", "init", "seed", "evaluations")
    return json.dumps({name: str(getattr(options, name)) for name in names})


def write(path, save):
    """Write a file aside by `save` and then give it its name, so that the one before is kept until then."""
    aside = path.with_name(f".{path.name}")
    try:
        save(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} cannot be written, and is as it was: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def save(options, run):
    """Save the image, and beside it the state of the run."""
    state = run.state_dict()
    tensors, places = {}, set()
    for name, value in state.items():
        if torch.is_tensor(value):  # of those that share memory, which a file cannot, all but the first are copied
            tensors[name] = value.cpu().clone() if value.data_ptr() in places else value.cpu()
            places.add(value.data_ptr())
    plain = {name: value for name, value in state.items() if name not in tensors}
    about = {"settings": settings_of(options), "state": json.dumps(plain)}
    write(options.output.with_suffix(".safetensors"), lambda path: save_file(tensors, path, about))
    write(options.output, lambda path: nst.to_pil(run.image).save(path, format="PNG"))


def read(options):
    """The state of the run that is to go on, or None."""
    if options.output.suffix.lower() != ".png":
        raise ValueError(f"--output is {str(options.output)!r}: give a name that ends in .png")
    if not options.output.parent.is_dir():
        raise ValueError(f"--output is {str(options.output)!r}: there is no folder {str(options.output.parent)!r}")
    path = options.output.with_suffix(".safetensors")
    if not path.exists():
        if options.output.exists():
            raise ValueError(f"{str(options.output)!r} is there already: give another name with --output")
        return None
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is damaged, or not a run: move it away to begin anew") from error
    if not {"settings", "state"} <= about.keys():
        raise ValueError(f"{str(path)!r} is not a run of this program: move it away to begin anew")
    if about["settings"] != settings_of(options):
        raise ValueError(f"{str(path)!r} is of other settings, {about['settings']}: give these, or move it away")
    return tensors | json.loads(about["state"])


def warn_of_size(options):
    """Say so where the content image has fewer pixels than the result is to have."""
    with Image.open(options.content) as file:
        side = min(file.size)
    if side < options.size:
        print(f"{options.content} is {side} pixels wide or high: enlarged to {options.size} it has no more detail")


# --- The run -------------------------------------------------------------------------------------


def stylise(options, first):
    """Make the image; first: whether this process is the one that prints and saves."""
    begun = read(options)
    content = nst.load_image(options.content, options.size, options.device)
    if first:
        warn_of_size(options)
    style = nst.load_image(options.style, options.style_size or options.size, options.device)
    task = nst.Task(content, style, ("conv1_2",), LAYERS, 1.0, options.style_weight)
    run = nst.Run(task, init=options.init, seed=options.seed, evaluations=options.evaluations, memory=options.memory)
    if begun:
        run.load_state_dict(begun)
    try:
        work(run, options, first)
        if first:
            write(options.output, lambda path: nst.to_pil(nst.resize(run.image, run.shape)).save(path, format="PNG"))
            options.output.with_suffix(".safetensors").unlink(missing_ok=True)
            print(f"{options.output}: {run.shape[1]} x {run.shape[0]} pixels")
    except BaseException:  # an interrupt, or another process that has died
        if first:
            save(options, run)
        raise


def work(run, options, first):
    """Step after step, with a bar and a save every half minute."""
    saved, described = time.monotonic(), False
    with tqdm(total=run.pixels_left / 1e6, unit="Mpx", bar_format=BAR, disable=not first, dynamic_ncols=True) as bar:
        while step := run.step():
            if first and not described and step.shape == run.shape:
                bar.write(run.describe())
                described = True
            pixels = step.shape[0] * step.shape[1] / 1e6
            bar.update(min(pixels, bar.total - bar.n))  # what a coarse scale spares goes to the last
            bar.set_postfix_str(f"{step.shape[1]} x {step.shape[0]}, loss {step.total:.4g}")
            if first and time.monotonic() - saved > SECONDS:
                save(options, run)
                saved = time.monotonic()


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    options, several = None, int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        options = parse(sys.argv[1:])
        if several:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        stylise(options, not several or dist.get_rank() == 0)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        saved = options and options.output.with_suffix(".safetensors").exists()
        sys.exit(f"interrupted: the same command {'goes on from here' if saved else 'begins again, nothing is saved'}")
    except RuntimeError as error:
        if not several:
            raise
        sys.exit(f"another process has ended, and so does this one; the same command goes on: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
