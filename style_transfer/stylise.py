"""Make one image in the style of another, at any size, in bounded memory: stylise photo.jpg painting.jpg

Every half minute it saves the image and, beside it, the run: a .safetensors file of the same name. After an
interruption, the same command resumes the run. To share the work among devices or processes:
    torchrun --nproc-per-node 2 -m style_transfer.stylise ...
An image saved by this program or the panel contains its settings: stylise --like saved.png makes it again.

Several styles are blended, or each fills the white part of its mask:
    stylise photo.jpg starry.jpg wave.jpg --blend 2 1
    stylise photo.jpg starry.jpg wave.jpg --masks sky.png rest
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from . import __version__

INTERRUPTED = "interrupted: the same command"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message):
        sys.exit(f"error: {message}")


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that names an option's value once: -o, --output OUTPUT."""

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        several = " ..." if action.nargs == "+" else ""
        return f"{', '.join(action.option_strings)} {action.dest.upper()}{several}"


class Output:
    """A text stream that cannot fail: it escapes what it cannot encode, and after an error it discards everything."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.reconfigure(errors="backslashreplace")
            self.stream.write(text)
            self.stream.flush()
        except (AttributeError, OSError, ValueError):  # no stream, a closed one, a closed pipe, a full disk
            self.stream = open(os.devnull, "w")

    def flush(self):
        """Nothing: `write` flushes."""


def parse(arguments: list[str], defaults: dict | None = None) -> argparse.Namespace:
    """The options on a command line.

    defaults: more of them, from `job.defaults_for`. Without these, options with --like are not checked.
    """
    parser = Parser("stylise", "%(prog)s content style [style ...] [options]", __doc__, formatter_class=Help)
    add = parser.add_argument
    add("content", nargs="?", help="a photograph; where it is transparent, it becomes white")
    add("style", nargs="*", help="a painting, or several")
    add("--blend", type=float, nargs="+", help="the weight of each style, in their order (equal weights)")
    add(
        "--masks",
        nargs="+",
        help="for each style, an image that is white where it goes, or 'rest' for everywhere else",
    )
    add(
        "--keep-colours",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep the photograph's colours, and change only lightness",
    )
    add("--like", type=Path, help="a saved PNG file; its settings are the defaults of the other options")
    add("-o", "--output", type=Path, help="a PNG file (CONTENT_STYLE.png in this folder, or numbered)")
    add("--size", type=int, default=256, help="of the shorter side, in pixels (%(default)s)")
    add("--style-size", type=int, help="the same for the style image: a larger one gives larger strokes (--size)")
    add("--style-weight", type=float, default=1e4, help="relative to the content's (%(default)g)")
    add(
        "--init",
        dest="start",
        choices=("noise", "content"),
        default="noise",
        help="where to start: 'noise', soft random clouds, or 'content', the photograph itself (%(default)s)",
    )
    add("--seed", type=int, default=0, help="a number; another one makes other noise (%(default)s)")
    add("--film", type=Path, help="a .gif or .webp file: the run in up to 100 images of at most 512 pixels")
    add("--evaluations", type=int, default=80, help="of the network, at most (%(default)s)")
    add("--memory", type=float, help="GiB that a process may use (what is free)")
    add("--device", help="where to compute: cpu, cuda, cuda:1 or mps (the fastest that is available)")
    add("--version", action="version", version=__version__, help="show the version")
    parser.set_defaults(state=None, **defaults or {})
    options = parser.parse_intermixed_args(arguments)
    if defaults or not options.like:
        check(options, parser.error)
        if options.style_size is None:
            options.style_size = options.size
    return options


def check(options, error):
    """Call `error` with a sentence if options are invalid or contradict each other, or a folder is not writable."""
    if not options.content or not options.style:
        error("give two images, content and style, and after them any --blend and --masks")
    count = len(options.style)
    for name, default in (("blend", 1.0), ("masks", None)):
        values = getattr(options, name) or [default] * count
        if len(values) != count:
            error(f"--{name} has {len(values)} and there are {count} styles: give one for each style")
        setattr(options, name, values)
    if not any(options.blend) or not all(0 <= weight <= 1e12 for weight in options.blend):
        error(f"--blend is {' '.join(map(str, options.blend))}: give numbers from 0 to 1e12, not all of them 0")
    if {*options.masks} == {"rest"}:
        error("--masks has only 'rest', which is where the other masks are not: give another one")
    for name, suffixes in (("output", ".png"), ("film", ".gif or .webp")):
        path = getattr(options, name)
        if path and path.suffix not in suffixes.split(" or "):
            error(f"--{name} is {str(path)!r}: give a name that ends in {suffixes}")
        if path and not os.access(path.parent, os.W_OK):
            error(f"--{name} is {str(path)!r}: folder {str(path.parent)!r} is missing or not writable")


def stop(*_):
    """End the process at once. While torch is being imported, libraries may swallow a KeyboardInterrupt."""
    sys.stderr.write(f"{INTERRUPTED} starts over; nothing was saved\n")
    os._exit(1)


def handle_signals(handler):
    """Install `handler` for the signals that end a process, unless they are ignored, as by nohup."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def main() -> None:
    """Run the program."""
    handle_signals(stop)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    arguments = sys.argv[1:]
    options = parse(arguments)
    if os.environ.get("RANK", "0") == "0":
        print("loading ...", file=sys.stderr)
    from . import job  # importing torch takes seconds
    from .engine.checks import UserError

    try:
        try:
            handle_signals(signal.default_int_handler)  # raises KeyboardInterrupt
            options = parse(arguments, job.defaults_for(options))
            job.run_alone_or_shared(options)
        finally:
            handle_signals(signal.SIG_DFL)  # nothing is left to be saved
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        saved = options.state and options.state.exists()
        sys.exit(f"{INTERRUPTED} {'resumes' if saved else 'starts over; nothing was saved'}")


if __name__ == "__main__":
    main()
