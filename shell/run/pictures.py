"""Pictures of a finished run: held-out samples with the answer given and the true one."""

from collections.abc import Sequence
from pathlib import Path

from mimogrid.shell.run.evaluate import Answer, Questions


COLUMNS, ROWS = 5, 8
RIGHT, WRONG = "#0072b2", "#d55e00"  # distinguishable without colour vision; wrong ones also say so


def draw_predictions(path: Path, questions: Questions, answers: Sequence[Answer]) -> None:
    """Draw a grid of samples; wrong answers come first and take at most half of it."""
    import matplotlib as mpl  # noqa: PLC0415 -- takes a second to import, and is wanted once a run

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    wrong = [answer for answer in answers if not answer.is_right]
    right = [answer for answer in answers if answer.is_right]
    chosen = [*wrong[: COLUMNS * ROWS // 2], *right][: COLUMNS * ROWS]
    pictures = [questions.image(answer.sample_id) for answer in chosen]
    widest = max(picture.shape[1] for picture in pictures)
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2.6 * COLUMNS, 0.95 * ROWS), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, answer, picture in zip(axes.flat, chosen, pictures, strict=False):
        axis.imshow(picture, cmap="gray_r", aspect="equal", vmin=0, vmax=1)
        axis.set_xlim(-0.5, widest - 0.5)  # one scale for all, however long
        given, true = questions.spell(answer.given), questions.spell(answer.true)
        title = given if answer.is_right else f"read {given or 'nothing'}, is {true}"
        colour = RIGHT if answer.is_right else WRONG
        axis.set_title(title, fontsize=9, color=colour, loc="left")
    shown = f"{len(answers)} held-out strips, {len(wrong)} misread"
    figure.suptitle(f"{shown} (misread ones first, with what they are)", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)
