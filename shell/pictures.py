"""Pictures of a finished run: held-out samples with the answer given and the true one."""

from collections.abc import Sequence
from pathlib import Path

from mimogrid.shell.evaluate import Answer, Questions


COLUMNS, ROWS = 5, 8
RIGHT, WRONG = "#0072b2", "#d55e00"  # distinguishable without colour vision; wrong ones also say so


def draw_predictions(path: Path, questions: Questions, answers: Sequence[Answer]) -> None:
    """Draw a grid of samples; the wrong answers come first, then right ones of every length."""
    import matplotlib as mpl  # noqa: PLC0415 -- takes a second to import, and is wanted once a run

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    chosen = sorted(answers, key=lambda answer: answer.is_right)[: COLUMNS * ROWS]
    wrong = sum(not answer.is_right for answer in answers)
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2.6 * COLUMNS, 1.15 * ROWS), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, answer in zip(axes.flat, chosen, strict=False):
        axis.imshow(questions.image(answer.sample_id), cmap="gray_r", aspect="equal")
        given, true = questions.spell(answer.given), questions.spell(answer.true)
        title = given if answer.is_right else f"read {given or 'nothing'}, is {true}"
        axis.set_title(title, fontsize=9, color=RIGHT if answer.is_right else WRONG)
    shown = f"{len(answers)} held-out strips, {wrong} misread"
    figure.suptitle(f"{shown}; misread ones first, the others are read rightly", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)
