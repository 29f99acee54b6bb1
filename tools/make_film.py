"""The film at the top of the README: the castle from noise to The Starry Night, as a GIF of less than 2 MB."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, not an installed copy

import nst_utils as nst  # noqa: E402

SIZE, FRAMES = 240, 30


def main():
    content = nst.load_image(nst.IMAGES / "content" / "chenonceau.jpg", SIZE)
    style = nst.load_image(nst.IMAGES / "style" / "starry_night.jpg", SIZE)
    recorder = nst.Recorder(most=1000)
    nst.transfer_style(content, style, callback=recorder)
    frames = recorder.frames
    # More at the beginning, where more happens: their numbers grow as the square.
    chosen = {round(1 + (len(frames) - 1) * (k / (FRAMES - 1)) ** 2) for k in range(FRAMES)}
    film = nst.film_of([frame for frame in frames if frame.evaluation in chosen], "gif")
    (nst.IMAGES / "film.gif").write_bytes(film)
    print(f"{nst.IMAGES / 'film.gif'}: {len(film) / 1e6:.2f} MB, {len(chosen)} images")


if __name__ == "__main__":
    main()
