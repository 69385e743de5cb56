"""Draw docs/drafting.png, the passes that one image takes: ``python docs/draw_drafting.py runs/mnist/mutor2d``."""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

from mutor_img.checkpoints.loading import load_run
from mutor_img.decoding.cpu import PackedDecoder, pack
from mutor_img.decoding.drafting import Draft
from mutor_img.decoding.sampler import Sampler, SamplingSettings

WINDOW, SAMPLE = 8, 3
COLOURS = {"not reached": "#f4f4f4", "certain before": "#c6d5ea", "made certain by this pass": "#4878cf",
           "drawn after a wrong draft": "#e08214"}


class Recorder(PackedDecoder):
    """A decoder that keeps where each window began."""

    starts: list[int]

    def window(self, x: Tensor, start: Tensor, width: int) -> Tensor:
        """Note the place, and go on."""
        self.starts.append(int(start[0]))
        return super().window(x, start, width)


def main(path: str) -> None:
    """Draw the picture."""
    model = load_run(path).model
    settings = SamplingSettings(cfg_scale=2.3, cfg_schedule="linear", top_p=0.95)  # a lower top-p than the demo's
    sampler = Sampler(model, settings, 1, draft=Draft(WINDOW))
    recorder = sampler.decoders[WINDOW] = Recorder(pack(model), 2)
    recorder.starts = []
    sampler.generate(torch.tensor([SAMPLE % model.config.classes]), torch.tensor([SAMPLE]))
    length, starts = model.config.length, [*recorder.starts, model.config.length]
    places, picture = torch.arange(length), torch.zeros(len(starts) - 1, length)
    for row, (begin, end) in enumerate(pairwise(starts)):
        picture[row] = (places < begin) + 2.0 * ((places >= begin) & (places < end))
        picture[row][(places >= end) & (places < begin + WINDOW)] = 3
    figure, axes = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    axes.imshow(picture.numpy(), cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=3, aspect="auto")
    axes.set(xlabel="code", ylabel="pass", title=f"{length} codes in {len(picture)} passes of a window of {WINDOW}")
    axes.set_xticks(torch.arange(0, length, 8).numpy())
    axes.legend(handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()], loc="lower left",
                fontsize=8)
    figure.savefig(Path(__file__).with_name("drafting.png"), dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
