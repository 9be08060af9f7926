"""What tests ask of a picture."""

from pathlib import Path

SHADES = 16  # of lines, marks and text with smooth edges; a blank picture has one


def assert_drawn(path: Path) -> None:
    """Assert that the file is a picture with something on it."""
    from PIL import Image

    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(image.width * image.height)
        assert min(image.size) > 100, image.size
    assert colors is not None and len(colors) > SHADES, f"{path} is (nearly) blank"
