"""A tree in the shape of ImageNet from real photographs: 16 WordNet classes of 8 small JPEGs of odd sizes.

Among them, as in ImageNet itself: one CMYK, one grey, one PNG named .JPEG, and one that ends early.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

WNIDS = ["n01440764", "n01443537", "n01484850", "n01530575", "n01608432", "n01644373", "n01687978", "n01729322",
         "n01776313", "n01824575", "n02085620", "n02102040", "n02123045", "n02510455", "n03028079", "n07753592"]
CMYK, GREY, PNG, TRUNCATED = (f"{WNIDS[label]}/{WNIDS[label]}_{number}.JPEG"
                              for label, number in ((1, 0), (2, 3), (4, 7), (9, 5)))


def write_photographs(root: Path) -> Path:
    """Write the tree below ``root``; returns it."""
    photographs = [Image.fromarray(picture()).reduce(4) for picture in (data.astronaut, data.chelsea, data.coffee)]
    draw = np.random.default_rng(0)
    for label, wnid in enumerate(WNIDS):
        (root / wnid).mkdir(parents=True)
        for number in range(8):
            photograph = photographs[(label + number) % len(photographs)]
            width, height = (int(side) * 2 + 1 for side in draw.integers(16, 35, 2))  # 33 to 69, odd
            left, top = (int(draw.integers(0, room - side + 1)) for room, side in
                         zip(photograph.size, (width, height)))
            image, name = photograph.crop((left, top, left + width, top + height)), f"{wnid}/{wnid}_{number}.JPEG"
            image = image.convert({CMYK: "CMYK", GREY: "L"}.get(name, "RGB"))
            image.save(root / name, format="PNG" if name == PNG else "JPEG", quality=95)
    whole = (root / TRUNCATED).read_bytes()
    (root / TRUNCATED).write_bytes(whole[: len(whole) * 2 // 3])
    return root
