"""Texts of strangers, as they may be shown."""


def escaped(text: str, but: str = "") -> str:
    """The text with every character that shows nothing of itself, or steers what shows it, written out as Python does
    (`\\x9b`, `\\u202e`), except those of `but`. A text that was written out once stays as it is."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in but else repr(char)[1:-1] for char in text)
