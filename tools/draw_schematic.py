"""Draw the schematic of the method that the notebooks begin with: images/schematic*.svg."""

import io
import re
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nst_utils as nst  # noqa: E402

INK, PALE = "#333333", "#d8d8d8"
CONTENT, STYLE, GRADIENT = "#1f77b4", "#d95f02", "#2a9d4a"  # the same three in every figure
BLOCKS = [(2.3, 1.9, 0.62), (3.5, 1.55, 0.7), (4.8, 1.2, 0.85), (6.35, 0.85, 0.95), (8.0, 0.55, 0.95)]  # x, h, w
TAPS = [("conv1_1", 2.42), ("conv1_2", 2.8), ("conv2_1", 3.66), ("conv2_2", 4.04), ("conv3_1", 5.0)]
MIDDLE, GRAMS, BOTTOM, BACK = 2.75, 4.75, 0.95, 1.62
VARIANTS = {  # name: (width in inches, what is lit)
    "schematic": (9.2, ("content", "style")),
    "schematic_style": (7.0, ("style",)),
    "schematic_transfer": (7.0, ("content", "style")),
}


def arrow(axes, start, end, colour, dashed=False, bend=0.0, width=1.6):
    line = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    style = {"linestyle": (0, (4, 2)) if dashed else "-", "connectionstyle": f"arc3,rad={bend}"}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=width, **line, **style))


def picture(axes, image, x, y, height, label, below=True):
    """An image with its lower left corner at (x, y), and a label."""
    width = height * image.shape[-1] / image.shape[-2]
    axes.imshow(nst.to_pil(image), extent=(x, x + width, y, y + height), interpolation="lanczos", zorder=2)
    axes.text(
        x + width / 2, y - 0.08 if below else y + height + 0.08, label, ha="center", va="top" if below else "bottom"
    )
    return width


def gram(axes, x, y, colour, values):
    """A small Gram matrix in the middle of (x, y)."""
    axes.imshow(values, extent=(x - 0.15, x + 0.15, y - 0.15, y + 0.15), cmap="RdBu_r", vmin=-1, vmax=1, zorder=3)
    axes.add_patch(Rectangle((x - 0.15, y - 0.15), 0.3, 0.3, fill=False, edgecolor=colour, linewidth=1, zorder=4))


def box(axes, x, y, width, text, colour):
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "facecolor": "white", "linewidth": 1.6, "zorder": 3}
    axes.add_patch(FancyBboxPatch((x, y - 0.24), width, 0.48, edgecolor=colour, **style))
    axes.text(x + width / 2, y, text, ha="center", va="center", color=colour, zorder=4)


def draw(size, lit):
    blue, red = (colour if name in lit else PALE for name, colour in (("content", CONTENT), ("style", STYLE)))
    figure = Figure(figsize=(size, size * 0.55))
    axes = figure.add_axes((0, 0, 1, 1))
    castle = nst.load_image(nst.IMAGES / "content" / "chenonceau.jpg", 96)
    painting = nst.load_image(nst.IMAGES / "style" / "starry_night.jpg", 96)
    result = nst.load_image(nst.IMAGES / "poster.jpg", 96)
    maps = nst.features(nst.load_vgg19(), painting, [name for name, _ in TAPS])
    grams = [nst.gram_matrix(F)[:8, :8] for F in maps.values()]

    picture(axes, result, 0.1, MIDDLE - 0.55, 1.1, "the image,\nwhose pixels change", below=False)
    arrow(axes, (1.6, MIDDLE), (2.25, MIDDLE), INK)
    for k, (x, height, width) in enumerate(BLOCKS):
        used = k < 3
        style = {"facecolor": "#f1f1f1", "edgecolor": INK if used else PALE, "linewidth": 1.2}
        axes.add_patch(Rectangle((x, MIDDLE - height / 2), width, height, **style))
        axes.text(x + width / 2, MIDDLE, f"block\n{k + 1}", ha="center", va="center", color=INK if used else "#888888")
        if k < 4:
            arrow(axes, (x + width, MIDDLE), (BLOCKS[k + 1][0] - 0.04, MIDDLE), INK if k < 2 else PALE, width=1.2)
    for (name, x), values in zip(TAPS, grams):
        scale = values.diagonal().sqrt()
        gram(axes, x, GRAMS, red, (values / (scale[:, None] * scale)).numpy())
        top = MIDDLE + next(h for at, h, w in BLOCKS if at <= x <= at + w) / 2
        arrow(axes, (x, top), (x, GRAMS - 0.18), red, width=1.1)
        axes.text(
            x + 0.03,
            GRAMS + 0.2,
            name,
            rotation=45,
            fontsize="small",
            ha="left",
            va="bottom",
            color=red if red != PALE else "#aaaaaa",
        )
    pale = {name: INK if name in lit else "#aaaaaa" for name in ("content", "style")}
    box(axes, 6.35, GRAMS, 1.35, "style loss", red)
    arrow(axes, (5.2, GRAMS), (6.32, GRAMS), red)
    axes.text(5.76, GRAMS + 0.08, "Gram matrices", ha="center", va="bottom", fontsize="small", color=pale["style"])
    picture(axes, painting, 8.65, GRAMS - 0.5, 1.0, "the painting", below=True)
    arrow(axes, (8.62, GRAMS), (7.75, GRAMS), red)
    axes.text(8.18, GRAMS + 0.06, "target", ha="center", va="bottom", fontsize="small", color=pale["style"])

    box(axes, 6.35, BOTTOM, 1.35, "content loss", blue)
    axes.plot([2.8, 2.8], [MIDDLE - 0.95, BOTTOM], color=blue, linewidth=1.6, zorder=1)
    arrow(axes, (2.8, BOTTOM), (6.32, BOTTOM), blue)
    axes.text(
        4.6, BOTTOM + 0.06, "feature map of conv1_2", ha="center", va="bottom", fontsize="small", color=pale["content"]
    )
    picture(axes, castle, 8.65, BOTTOM - 0.5, 1.0, "the photograph")
    arrow(axes, (8.62, BOTTOM), (7.75, BOTTOM), blue)
    axes.text(8.18, BOTTOM + 0.06, "target", ha="center", va="bottom", fontsize="small", color=pale["content"])

    box(axes, 9.15, MIDDLE, 0.95, "total loss", INK)
    arrow(axes, (7.3, GRAMS - 0.26), (9.35, MIDDLE + 0.28), red)
    arrow(axes, (7.3, BOTTOM + 0.26), (9.35, MIDDLE - 0.28), blue)
    axes.text(8.5, 3.75, "× style weight", fontsize="small", color=pale["style"])
    axes.text(8.2, 1.86, "× content weight", fontsize="small", color=pale["content"], ha="right")
    axes.plot([9.75, 9.75, 0.85], [MIDDLE - 0.26, BACK, BACK], color=GRADIENT, linewidth=1.8, linestyle=(0, (4, 2)))
    arrow(axes, (0.85, BACK), (0.85, MIDDLE - 0.58), GRADIENT, width=1.8)
    axes.text(3.1, BACK + 0.06, "gradient, back to the pixels", color=GRADIENT, va="bottom")
    return figure


def main():
    matplotlib.rcParams["svg.hashsalt"] = "nst"  # so that the same drawing is the same file
    for name, (size, lit) in VARIANTS.items():
        matplotlib.rcParams["font.size"] = size / 0.92
        figure, buffer = draw(size, lit), io.StringIO()
        figure.axes[0].set(xlim=(0, 10.2), ylim=(0, 5.61), aspect="equal")
        figure.axes[0].set_axis_off()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = re.sub(r"[ \t]+$", "", buffer.getvalue(), flags=re.MULTILINE)
        (nst.IMAGES / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
