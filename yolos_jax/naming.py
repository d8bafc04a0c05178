"""Compares and checks names that people gave: of classes, images and files."""

import unicodedata

CONTROLS = 'Cc', 'Cs', 'Zl', 'Zp'  # Unicode categories: control characters, surrogates, line separators


def name_key(name: str) -> str:
    """What a name is compared by: in lower case, and with accents as one character (NFC)."""
    return unicodedata.normalize('NFC', name).lower()


def has_controls(text: str) -> bool:
    """Whether a text has characters that break a line, or change what a terminal or a card shows."""
    return any(unicodedata.category(character) in CONTROLS for character in text)
