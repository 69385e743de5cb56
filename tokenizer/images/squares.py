"""Cropped images as a dataset, read in worker processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mutor_img.common.errors import UserError
from tokenizer.images.crops import CropRule, read_squares
from tokenizer.images.source import ImageSource


class Squares(Dataset):
    """The cropped images of some image numbers, read in worker processes; a reading error is data, not a crash."""

    def __init__(self, source: ImageSource, numbers: Sequence[int], channels: int, image_size: int, rule: CropRule):
        self.source, self.numbers, self.channels = source, numbers, channels
        self.image_size, self.rule = image_size, rule

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return (squares, channels, size, size) uint8 and an empty string, or zeros and what was wrong."""
        try:
            number = int(self.numbers[index])
            return read_squares(self.source, number, self.channels, self.image_size, self.rule), ""
        except UserError as error:
            shape = (len(self.rule.squares), self.channels, self.image_size, self.image_size)
            return torch.zeros(shape, dtype=torch.uint8), str(error)
