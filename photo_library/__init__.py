"""What classify.py does for libraries of pictures: sorted copies, tags in XMP sidecars, watched folders.

`sidecars`, `watch` and `xmp` need the packages in requirements-library.txt, the other modules do not.
"""

STYLES = ("extension", "lightroom")
DEFAULT_TAG = "Meme Classifier"


def parse_tag(text: str) -> tuple[str, ...]:
    """The levels of a hierarchical tag like `Meme Classifier` or `Sorted|Memes`.

    Raises:
        ValueError: in a sentence, if it cannot be a keyword.
    """
    levels = tuple(level.strip() for level in text.replace("/", "|").split("|"))
    if not all(levels) or not text.isprintable():
        raise ValueError("each level of a tag needs a visible character, and no control characters")
    return levels
