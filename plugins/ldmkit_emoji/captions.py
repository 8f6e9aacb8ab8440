"""What pictures are called: named background colours, and the many ways to ask for one emoji on one of them.

All randomness is keyed by (seed, name, number), so that a caption does not depend on which others are made.
"""

from __future__ import annotations

import random

from ldmkit_emoji.glyphs import Emoji

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "gray": (150, 150, 150),
    "red": (225, 50, 45),
    "orange": (255, 150, 40),
    "yellow": (255, 225, 80),
    "green": (90, 185, 85),
    "teal": (0, 150, 150),
    "blue": (60, 120, 235),
    "purple": (150, 85, 205),
    "pink": (255, 165, 205),
    "brown": (125, 80, 45),
}
"""Background colours, red, green, blue. White is what a prompt without a colour means."""

SUBJECTS = ("{name}", "{article}{name}", "a picture of {article}{name}", "an emoji of {article}{name}", "{name} emoji")
PLACES = ("{subject} on {article}{colour} background", "{subject} on {colour}", "{subject}, {colour} background")


def spoken(name: str) -> str:
    """A Unicode name as one would say it.

    >>> spoken("flag: Japan"), spoken("waving hand: dark skin tone"), spoken("keycap: 5")
    ('flag of Japan', 'waving hand with dark skin tone', 'keycap 5')
    """
    head, colon, tail = name.partition(": ")
    if not colon:
        return name
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    return f"{head} with {tail.replace(', ', ' and ')}" if "skin tone" in tail or "hair" in tail else f"{head} of {tail}"


def article(name: str) -> str:
    """The word (and a space) that goes before a name, nothing before plurals.

    >>> article("red apple") + "red apple", article("octopus") + "octopus", article("grapes") + "grapes"
    ('a red apple', 'an octopus', 'grapes')
    """
    last = name.partition(":")[0].split()[-1].lower()
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return ""
    return "an " if name[0].lower() in "aeiou" else "a "


def caption(emoji: Emoji, colour: str, number: int, seed: int) -> str:
    """The `number`-th caption of an emoji on a background. On white, number 0 is the plain name."""
    if colour == "white" and number == 0:
        return emoji.name.lower()
    draw = random.Random(f"{seed}/{emoji.name}/{colour}/{number}")
    name = emoji.name if draw.random() < 0.6 else spoken(emoji.name)
    subject = draw.choice(SUBJECTS).format(name=name, article=article(name))
    others = [word for word in emoji.keywords if word.lower() not in name.lower()]
    if others and draw.random() < 0.3:
        subject += ", " + ", ".join(draw.sample(others, min(len(others), draw.randint(1, 2))))
    if colour == "white" and draw.random() < 0.7:
        return subject.lower()
    return draw.choices(PLACES, weights=(6, 2, 2))[0].format(subject=subject, article=article(colour), colour=colour).lower()
