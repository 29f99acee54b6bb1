"""How live the panel is, in a real JupyterLab with a real Chromium: updates a second, latency, and what display costs.

In turn, `--repeats` times, from the content image: the panel runs for some evaluations, then as many run bare, in a
cell, with no panel and no display. And while the panel runs a weight is moved by the keyboard: the latency is the time
until the browser shows the first image made with the new weight. Writes results/NAME.md.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from lab_driver import Notebook, chromium, jupyterlab  # noqa: E402

BARE = """
import platform, time, torch, nst_widgets
panel = nst_widgets._open[0]
painter = nst_widgets.Painter(panel.painter.vgg)
settings = panel.controls.settings()
painter.step(settings, ("content", 0)); painter.step(settings)
begun = time.perf_counter()
for _ in range({count}):
    painter.step(settings)
print({count} / (time.perf_counter() - begun))
"""
MACHINE = """
print(platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), "threads,")
print(*panel.shown.step[:2])
"""


def evaluations(book):
    found = re.search(r"(\d+) evaluations ·", book.status)
    return int(found.group(1)) if found else 0


def wait_for(book, condition, seconds=60):
    """As the driver's, but asking seldom: to ask takes time from what is measured."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, book.status
        time.sleep(0.2)


def restart(book):
    book.page.get_by_label("start from").select_option("content")
    before = evaluations(book)
    book.button("Restart").click()
    wait_for(book, lambda: 2 <= evaluations(book) < max(before, 4))


def rates(book, count):
    """(evaluations, frames) a second of the running panel, the frames as the browser had them."""
    restart(book)
    book.count_frames()
    first, begun = evaluations(book), time.perf_counter()
    wait_for(book, lambda: evaluations(book) >= first + count)
    seconds = time.perf_counter() - begun
    done, frames = evaluations(book) - first, book.frames()
    book.button("Pause").click()
    return done / seconds, frames / seconds


def latency(book, key):
    """Seconds from a key on the style weight's slider to the first image made with the new weight."""
    handle = book.page.locator(".widget-hslider", has_text="style weight").locator(".noUi-handle")
    handle.focus()
    before, begun = book.losses()["loss"], time.perf_counter()
    book.page.keyboard.press(key)
    book.wait_for(lambda: not 0.8 < book.losses()["loss"] / before < 1.25)
    source = book.source
    book.wait_for(lambda: book.source != source)
    return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=20, help="of a measurement")
    parser.add_argument("--name", default="panel", help="of the result file")
    options = parser.parse_args()
    shown, bare, frames, waits = [], [], [], []
    with tempfile.TemporaryDirectory() as home, jupyterlab(Path(home)) as server, chromium() as browser:
        book = Notebook(browser, server, "3_style_transfer.ipynb")
        book.open_panel()
        for _ in range(options.repeats):
            for values, rate in zip((shown, frames), rates(book, options.evaluations)):
                values.append(rate)
            bare.append(float(book.ask(BARE.format(count=options.evaluations))))
            book.show_panel()
            restart(book)
            waits += [latency(book, "PageUp"), latency(book, "PageDown")]
            book.button("Pause").click()
            book.button("Reset").click()
        machine = book.ask(MACHINE)
        book.page.close()
    ratios = [panel / alone for panel, alone in zip(shown, bare)]
    lines = [
        f"The panel of notebook 3, {options.repeats} repeats of {options.evaluations} evaluations. {machine}",
        "",
        "| | least | median | most |",
        "|---|---|---|---|",
    ]
    table = {
        "frames a second": frames,
        "evaluations a second, in the panel": shown,
        "evaluations a second, bare": bare,
        "speed in the panel, share of bare": ratios,
        "seconds from a moved weight to its first image": waits,
    }
    for name, values in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{f(values):.2f}" for f in (min, statistics.median, max)) + " |")
    text = "\n".join([*lines, ""])
    (HERE / "results" / f"{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
