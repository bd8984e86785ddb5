"""Makes a folder of colour pictures, circles, squares and triangles, for fine_tuning.py:

python examples/make_pictures.py pictures
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

PICTURES = 64  # of each class
SIZE = 64  # pixels


def make_pictures(folder: Path) -> None:
    """Writes the pictures into a folder for each class."""
    chance = random.Random(0)  # noqa: S311
    for kind in ("circle", "square", "triangle"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(PICTURES):
            draw(kind, chance).save(folder / kind / f"{number:03}.jpg", quality=95)


def draw(kind: str, chance: random.Random) -> Image.Image:
    """Returns a shape at a random place, in random colours."""
    background, colour = (tuple(chance.randrange(256) for _ in range(3)) for _ in range(2))
    picture = Image.new("RGB", (SIZE, SIZE), background)
    radius = chance.randrange(SIZE // 6, SIZE // 3)
    x, y = (chance.randrange(radius, SIZE - radius) for _ in range(2))
    pen = ImageDraw.Draw(picture)
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    else:
        corners = 4 if kind == "square" else 3
        pen.regular_polygon((x, y, radius), corners, chance.randrange(360), colour)
    return picture


if __name__ == "__main__":
    make_pictures(Path(sys.argv[1]))
