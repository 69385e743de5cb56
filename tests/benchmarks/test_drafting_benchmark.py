"""What the benchmark of drafts says of a checkpoint: measures written again from their definitions, and its tables."""

import numpy as np
import pytest
import torch
from reference import sampling as reference

from benchmarks.drafting import drawn_model, main, overlaps
from mutor_img.common.errors import UserError
from mutor_img.common.streams import Stream, uniform
from mutor_img.decoding.sampler import SamplingSettings, generate_samples


@pytest.mark.parametrize(("schedule", "top_p"), [("constant", 1.0), ("linear", 0.8)])
def test_overlap_and_right_drafts_are_those_of_each_register_by_itself(random_model, schedule, top_p):
    model, labels = random_model((2, 3)), torch.tensor([1, 2])
    settings = SamplingSettings(2.0, schedule, top_p=top_p, seed=4)
    codes = generate_samples(model, labels, torch.arange(2), settings)
    for row, offset in zip(overlaps(model, labels, codes, settings, (1, 3)), (1, 3)):
        shared, right = [], []
        for image, label in enumerate(labels):
            for anchor in range(6 - offset + 1):
                before, number = codes[image, : anchor + offset - 1].tolist(), torch.tensor(anchor + offset - 1)
                scale = reference.scale_at(schedule, 2.0, None, int(number), 6)
                true = reference.next_distribution(model, int(label), before, scale=scale, top_p=top_p)
                with torch.no_grad():
                    with_class, without = (model(torch.tensor([c]), codes[image : image + 1, :-1], torch.tensor(
                        [[anchor]]), torch.tensor([[offset]]))[1][0, 0].double().numpy() for c in (label, 3))
                draft = reference.filtered(without + scale * (with_class - without), top_p=top_p)
                shared.append(np.minimum(true, draft).sum())
                drawn = np.searchsorted(draft.cumsum(), float(uniform(4, Stream.TOKEN, torch.tensor(image), number)))
                right.append(drawn == codes[image, number])
        assert row["offset"] == offset
        assert row["overlap"] == pytest.approx(np.mean(shared), abs=1e-5) and row["right"] == np.mean(right)


def test_a_drawn_model_has_the_entropy_that_is_asked_for():
    torch.manual_seed(0)
    model = drawn_model("mnist", 64, 3.0, (4, 4))
    with torch.no_grad():
        logits = model(torch.zeros(8, dtype=torch.int64), torch.randint(64, (8, 15)))
    assert torch.distributions.Categorical(logits=logits).entropy().mean().item() == pytest.approx(3.0, abs=0.3)


def test_the_command_counts_passes_and_times_images(run_of, capsys):
    main(["--checkpoint", run_of(), "--images", "3", "--windows", "4,1", "--batch-sizes", "1", "--rounds", "1",
          "--threads", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counted = [line for line in lines if len(line) == 6 and line[0] in ("window", "frequency", "registers")]
    assert [line[:2] for line in counted] == [[s, w] for s in ("window", "frequency", "registers") for w in "14"]
    assert all(line[3] == "16.00" for line in counted[::2]) and all(line[5] == "0" for line in counted)
    assert any(line[0] == "best:" for line in lines)


@pytest.mark.parametrize(("argv", "words"), [
    ([], "give --checkpoint or --preset"), (["--preset", "mnist", "--checkpoint", "x"], "give --checkpoint or"),
    (["--preset", "minst"], "did you mean 'mnist'"), (["--preset", "mnist", "--grid", "4", "--windows", "17"], "is 17"),
    (["--preset", "mnist", "--batch-sizes", "1,x"], "give whole numbers"), (["--checkpoint", "nowhere"], "nowhere"),
    (["--preset", "mnist", "--images", "0"], "--images is 0"),
    (["--preset", "mnist", "--cfg-schedule", "linaer"], "did you mean 'linear'"),
    (["--preset", "mnist", "--top-p", "2"], "top_p is 2.0"),
    (["--preset", "mnist", "--vocabulary", "8", "--entropy", "3"], "--entropy is 3"),
], ids=" ".join)
def test_bad_input_is_one_line(argv, words):
    with pytest.raises(UserError) as error:
        main([*argv, "--threads", "1"])
    assert words in str(error.value) and "\n" not in str(error.value)
