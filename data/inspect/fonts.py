"""Fonts for captions in any script."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

#: For a character that no font draws.
_PLACEHOLDER = "\N{WHITE SQUARE}"
#: Comes with matplotlib.
_DEFAULT_FONT = "DejaVu Sans"


@lru_cache(16)
def _characters(family: str) -> frozenset[int]:
    """Code points that a font can draw; none if the font is absent or cannot be read."""
    try:
        return frozenset(get_font(findfont(FontProperties(family=family), fallback_to_default=False)).get_charmap())
    except (ValueError, RuntimeError, OSError):
        return frozenset()


def choose_fonts(titles: Sequence[str]) -> list[str]:
    """matplotlib's font, and the installed fonts that draw most of the characters that it lacks."""
    missing = {ord(character) for title in titles for character in title} - _characters(_DEFAULT_FONT)
    upright = {font.name for font in fontManager.ttflist if font.weight in (400, "normal") and font.style == "normal"}
    # "Last Resort" draws a placeholder for every character.
    families = [name for name in sorted(upright - {_DEFAULT_FONT}) if not name.startswith("Last Resort")]
    drawable = {name: missing & _characters(name) for name in families} if missing else {}
    chosen = [_DEFAULT_FONT]
    while best := max(drawable, key=lambda name: len(drawable[name]), default=None):
        if not (found := drawable[best]):
            break
        chosen.append(best)
        drawable = {name: characters - found for name, characters in drawable.items()}
    return chosen


def replace_missing(title: str, fonts: Sequence[str]) -> str:
    """A title with a box for each character that no font draws; invisible characters are removed."""

    def replace(character: str) -> str:
        kind = unicodedata.category(character)
        if kind != "Cc" and any(ord(character) in _characters(font) for font in fonts):
            return character
        return "" if kind in ("Cf", "Mn") else _PLACEHOLDER

    return "".join(map(replace, title))
