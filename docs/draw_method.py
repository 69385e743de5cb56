"""Draw docs/method.png, the method in one picture, from the project's own rule and law."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from mutor_img.attention import may_attend
from mutor_img.registers import RegisterLaw

GRID, D_MAX, COUNT = (4, 4), 3, 5
COLOURS = {"hidden": "#f4f4f4", "regular input": "#4878cf", "register": "#e08214"}


def draw_mask(axes) -> None:
    """Draw who may attend to whom in one packed sequence."""
    law = RegisterLaw("2d", GRID, D_MAX, COUNT)
    anchors, offsets = law.draw(0, 0, torch.arange(1))  # (1, R) each
    length, total = law.length, law.length + COUNT
    places = torch.arange(total)
    anchor = torch.cat([torch.zeros(length, dtype=torch.int64), anchors[0]])  # (N + R,)
    seen = may_attend(places[:, None], places[None], anchor[:, None], length).numpy()
    picture = np.where(seen, np.where(places.numpy()[:, None] < length, 1, 2), 0)
    axes.imshow(picture, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2)
    names = ["c", *(f"$x_{{{t}}}$" for t in range(1, length)),
             *(f"$r_{{{a}}}$" for a in anchors[0].tolist())]
    axes.set_xticks(range(total), names, fontsize=6)
    axes.set_yticks(range(total), names, fontsize=6)
    axes.set_xticks(np.arange(-0.5, total), minor=True)
    axes.set_yticks(np.arange(-0.5, total), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.set(title=f"Who attends (row) to whom (column): {length} regular inputs, {COUNT} registers\n"
                   f"at drawn anchors; one offset per sequence, here d = {int(offsets[0, 0])}", xlabel="key",
             ylabel="query")
    axes.title.set_fontsize(8)
    axes.legend(handles=[Patch(color=c, label=n) for n, c in list(COLOURS.items())[1:]], loc="upper right", fontsize=7)


def draw_targets(axes) -> None:
    """Draw what a register may be asked for: the paper's d_max = 4 on a 16 x 16 grid, cut to 8 x 8."""
    rows, columns, d_max = 8, 8, 4
    law = RegisterLaw("2d", (rows, columns), d_max)
    row, column = 2, 2
    anchor = row * columns + column + 1  # the regular input x_t of that cell
    picture = np.full((rows, columns), np.nan)
    picture.flat[:anchor] = 0.2
    for offset in law.offsets:
        picture.flat[anchor + offset - 1] = 0.7
    axes.imshow(picture, cmap="Blues", vmin=0, vmax=1)
    axes.text(column, row, "anchor\n$x_t$", ha="center", va="center", fontsize=7, weight="bold")
    for offset in law.offsets:
        down, right = divmod(offset, columns)
        axes.text(column + right, row + down, f"+{offset}", ha="center", va="center", fontsize=8, color="white")
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(which="minor", color="grey", linewidth=0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(which="both", length=0)
    axes.set_title(f"What the register after $x_t$ may predict: one of {len(law.offsets)}\n"
                   f"2D offsets (d_max = {d_max}); light: what it sees", fontsize=8)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", width_ratios=(1.25, 1))
    draw_mask(left)
    draw_targets(right)
    figure.savefig(Path(__file__).with_name("method.png"), dpi=130)


if __name__ == "__main__":
    main()
