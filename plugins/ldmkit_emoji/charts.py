"""Line charts with Pillow alone: small enough to keep in a repository, and no plotting library to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 40
"""Pixels around the plot: for numbers, title and the axis' name."""
INK, RULE = (40, 40, 40), (215, 215, 215)
LINES = ((30, 100, 200), (215, 90, 30), (40, 140, 70))

Points = Sequence[tuple[float, float]]


def chart(title: str, x_name: str, lines: Mapping[str, Points], *, percent: bool = False) -> Image.Image:
    """Named lines over one axis, which begins at 0 upwards.

    Args:
        lines: (x, y) each, with rising x; at least two points in all.
        percent: y are shares, written as percentages; the axis goes to 100%.
    """
    xs = [x for points in lines.values() for x, _ in points]
    top = 1.0 if percent else max(y for points in lines.values() for _, y in points) or 1.0
    low, high = min(xs), max(xs)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low) / ((high - low) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    pen.text((WIDTH / 2, 6), title, fill=INK, font=font, anchor="ma")
    pen.text((WIDTH / 2, HEIGHT - 6), x_name, fill=INK, font=font, anchor="md")
    for k in range(5):
        y = top * k / 4
        _, row = place(low, y)
        pen.line((LEFT, row, WIDTH - RIGHT, row), fill=RULE)
        pen.text((LEFT - 6, row), f"{y:.0%}" if percent else f"{y:.3g}", fill=INK, font=font, anchor="rm")
    for x in sorted(set(xs)) if len(set(xs)) <= 8 else [low, (low + high) / 2, high]:
        column, _ = place(x, 0)
        pen.text((column, HEIGHT - BOTTOM + 5), f"{x:g}", fill=INK, font=font, anchor="ma")
    for k, (name, points) in enumerate(lines.items()):
        colour, drawn = LINES[k % len(LINES)], [place(x, y) for x, y in points]
        pen.line(drawn, fill=colour, width=2, joint="curve")
        if len(points) <= 12:
            for column, row in drawn:
                pen.ellipse((column - 3, row - 3, column + 3, row + 3), fill=colour)
        pen.text((WIDTH - RIGHT - 4, HEIGHT - BOTTOM - 18 - 15 * k), name, fill=colour, font=font, anchor="rm")
    return image


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
