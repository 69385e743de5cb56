"""The page's HTML: exact pixels, the right group for each image, and no text that becomes markup."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from mutor_img.app import markup


class Reader(HTMLParser):
    """Collect each tag's attributes, and the text of captions."""

    def __init__(self, html):
        super().__init__()
        self.images, self.captions, self.tags = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "figcaption":
            self.captions.append("")
        if tag == "img":
            self.images.append((self.captions[-1], dict(attributes)))

    def handle_data(self, data):
        if self.captions:
            self.captions[-1] += data


def pixels(url):
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def noise(count, side):
    return np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_images_are_grouped_by_class_and_keep_their_pixels():
    images = noise(5, 8)
    grid = markup.Grid("run", [2, 0, 2, 0, 2], ["cat", "dog", "red fox"])
    grid.add(images[:3])
    grid.add(images[3:])
    seen = Reader(grid.html()).images
    assert [(caption, int(image["data-sample"])) for caption, image in seen] == [
        ("cat 0", 1), ("cat 0", 3), ("red fox 2", 0), ("red fox 2", 2), ("red fox 2", 4)]
    for _, image in seen:
        assert np.array_equal(pixels(image["src"]), images[int(image["data-sample"])])
        assert image["width"] == image["height"] == "64" and image["class"] == "magnified"
    assert seen[0][1]["alt"] == "sample 1: cat"


def test_images_of_the_usual_size_are_shown_as_they_are():
    grid = markup.Grid("run", [0], ["0"])
    grid.add(noise(1, 256))
    [(caption, image)] = Reader(grid.html()).images
    assert caption == "0" and image["width"] == "256" and "class" not in image


def test_text_from_files_does_not_become_markup():
    evil = '<script>"x"</script>'
    grid = markup.Grid(evil, [0], [evil])
    grid.add(noise(1, 8))
    for html in (grid.html(), markup.error(evil), markup.empty_grid(evil), markup.note(evil)):
        assert "script" not in Reader(html).tags
    assert Reader(grid.html()).images[0][1]["title"] == f"sample 0: {evil}"


def test_namesakes_can_be_told_apart_in_the_picker():
    assert markup.class_choices(["0", "crane", "crane"]) == [("0", 0), ("crane (1)", 1), ("crane (2)", 2)]


def test_progress_tells_the_time_that_is_left():
    assert "5 of 20 images, 10 s, about 30 s left" in markup.progress(5, 20, 10.0)
    assert "left" not in markup.progress(0, 20, 0.0)
