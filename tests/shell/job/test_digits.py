"""Laws of the digits source: description and tensors agree; held-out images stay unseen."""

import collections
import subprocess
import sys

import pytest

from mimogrid.shell.job.sources.digits import COPY, COUNT, STOP, TEXT_MOST, digits, pools


torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

GRAPH = {"row_modules": ("vision", "depth"), "text_modules": ("language",)}
SOURCE = digits(seed=3, **GRAPH)
HELD_OUT = {task: SOURCE.held_out(task=task) for task in ("read", "copy", "count")}


def _all(source, sample_id):
    return {m: source.load(sample_id, m) for m in ("vision", "depth", "language")}


@pytest.mark.parametrize("source", [SOURCE, *HELD_OUT.values()], ids=["train", *HELD_OUT])
def test_describe_agrees_with_load(source):
    """What a description counts is what the tensors hold."""
    for sample_id in [*range(200), 10**9, 2**40 + 1]:
        sample, tensors = source.describe(sample_id), _all(source, sample_id)
        placeholders = sum(sample.rows.values())
        text = tensors["language"]
        shapes = {name: tuple(tensor.shape) for name, tensor in text.items()}
        positions = (placeholders + sample.length,)
        assert dict.fromkeys(("tokens", "labels", "loss_weights"), positions) == shapes
        assert (sample.rows["vision"], source.features) == tensors["vision"]["rows"].shape
        assert torch.float32 == tensors["vision"]["rows"].dtype
        assert sample.units["language"] == text["loss_weights"].sum()
        assert [True] * placeholders + [False] * sample.length == (text["tokens"] < 0).tolist()
        assert positions[0] <= source.sequence
        assert sample.length <= TEXT_MOST


@pytest.mark.parametrize("source", [SOURCE, *HELD_OUT.values()], ids=["train", *HELD_OUT])
def test_labels_are_the_answer(source):
    """Labels are the next tokens; where the weight is 1 they spell the answer and the stop."""
    for sample_id in range(100):
        text = source.load(sample_id, "language")
        tokens, labels, wanted = text["tokens"], text["labels"], text["loss_weights"] == 1
        prompt, answer = source.prompt(sample_id, "language"), source.answer(sample_id)
        assert (*answer, STOP) == tuple(labels[wanted].tolist())
        assert (*prompt, *answer) == tuple(tokens.tolist())
        assert tokens[1:].clamp(min=0).tolist() == labels[:-1].tolist()
        assert (torch.int64, torch.int64, torch.float32) == tuple(t.dtype for t in text.values())
        assert 0 <= int(labels.min())
        assert int(labels.max()) < source.vocab


def test_every_row_module_reads_the_same():
    """All row modules get the same rows, and a language model placeholders for each of them."""
    for sample_id in range(20):
        tensors = _all(SOURCE, sample_id)
        assert torch.equal(tensors["vision"]["rows"], tensors["depth"]["rows"])
        rows = 2 * len(tensors["vision"]["rows"])
        assert rows == int((tensors["language"]["tokens"] == -1).sum())


def test_rows_into_says_who_feeds_whom():
    """A language model waits for the rows that reach it and no others."""
    into = {"plain": (), "reader": ("vision",)}
    source = digits(0, ("vision",), ("plain", "reader"), rows_into=into)
    strip = next(i for i in range(100) if source.describe(i).rows["vision"])
    rows = source.describe(strip).rows["vision"]
    assert [0, rows] == [source.prompt(strip, module).count(-1) for module in into]
    assert source.describe(strip).length == len(source.load(strip, "plain")["tokens"])


def test_images_are_disjoint():
    """No held-out image is trained on, every image is in one pool, and one in five is held out."""
    train, held_out = pools()
    assert list(range(1797)) == sorted(train + held_out)
    assert 0.18 < len(held_out) / 1797 < 0.22
    # Held-out strips are not jittered: their digits are images of the pool, pixel by pixel.
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    known = {(image / 16).astype("float32").tobytes() for image in bunch.images[list(held_out)]}
    for sample_id in range(50):
        strip = HELD_OUT["read"].image(sample_id)
        parts = [strip[:, i : i + 8].tobytes() for i in range(0, strip.shape[1], 8)]
        assert known.issuperset(parts)


def test_a_second_source_gives_the_same_tensors():
    """Everything follows from seed and id, in any order of calls; another seed, other strips."""
    again, other = digits(seed=3, **GRAPH), digits(seed=4, **GRAPH)
    for sample_id in reversed(range(30)):
        here, there = _all(SOURCE, sample_id), _all(again, sample_id)
        for module, tensors in here.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, there[module][name])
    assert [SOURCE.answer(i) for i in range(30)] != [other.answer(i) for i in range(30)]


def test_one_sample_in_ten_is_text_only():
    """A tenth of the training samples, half of them copies, lacks the image; lengths are even."""
    samples = [SOURCE.describe(i) for i in range(20_000)]
    rows = collections.Counter(sample.rows["vision"] for sample in samples)
    assert 0.09 < rows.pop(0) / 20_000 < 0.11
    assert {2, 4, 6, 8, 10} == set(rows)
    assert all(0.17 < count / 20_000 < 0.19 for count in rows.values())
    prompts = [SOURCE.prompt(i, "language")[0] for i in range(20_000)]
    assert 0.04 < prompts.count(COPY) / 20_000 < 0.06
    assert 0.04 < prompts.count(COUNT) / 20_000 < 0.06


def test_lengths_are_equal_in_held_out():
    """Every length from one to five comes equally often among the held-out strips."""
    counts = collections.Counter(len(HELD_OUT["read"].answer(i)) for i in range(500))
    assert dict.fromkeys(range(1, 6), 100) == counts


def test_copies_are_distinct():
    """No digit of a copy comes twice, so that what follows a digit is never ambiguous."""
    copies = [HELD_OUT["copy"].answer(i) for i in range(200)]
    assert [len(set(copy)) for copy in copies] == [len(copy) for copy in copies]


def test_spelling():
    """Tokens print as words, up to the stop."""
    assert "▯ read 3 1" == SOURCE.spell([-1, 10, 3, 1, STOP, 4])


def test_describe_imports_nothing_heavy():
    """A description needs neither torch nor numpy nor scikit-learn."""
    code = (
        "import sys; from mimogrid.shell.job.sources.digits import digits\n"
        "source = digits(0, ('vision',), ('language',))\n"
        "samples = [source.describe(i) for i in range(50)] + [source.held_out().describe(0)]\n"
        "print(sorted({'torch', 'numpy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[]" == done.stdout.strip()
