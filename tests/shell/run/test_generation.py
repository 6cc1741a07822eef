"""Generation: answers are those of passes that compute every sample anew, on any layout, and those of transformers."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from layouts import job
from mimogrid.core.job.spec import GenerateSpec, JobSpec
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.run.generation import drawn
from mimogrid.shell.run.reference import double_precision, reference
from mimogrid.shell.world.launch import Pool


GREEDY = GenerateSpec(tokens=6)
DRAWN = GenerateSpec(tokens=6, temperature=1.5, top_k=7, top_p=0.9)
GROUPED = {"kv_heads": 2, "window": 4, "tied_embeddings": True}
Opened = Callable[[JobSpec], Job]


def asking(line: str, *, grid: dict[str, Any] | None = None, **options: Any) -> JobSpec:
    """Return a job with room for answers in its sequence."""
    spec = job(line, data={"sequence": 32}, changes={"lm": {"options": {"init_std": 0.5} | options}})
    lm = spec.modules["lm"]
    return attrs.evolve(
        spec,
        modules={**spec.modules, "lm": attrs.evolve(lm, grid=attrs.evolve(lm.grid, **(grid or {})))},
    )


@pytest.mark.world
def test_answers_are_those_of_whole_passes_on_any_layout(pool: Pool, opened: Opened) -> None:
    """Greedy and drawn; every pass but the first has one token of each sample. All layouts answer alike."""
    lines = [
        asking("enc(1,1,1)@0 lm(1,1,1)@0", **GROUPED),
        asking("enc(1,1,2)@0 lm(2,2,1)@0", **GROUPED),
        asking("enc(1,1,1)@0 lm(1,1,3)@1", **GROUPED),
        asking("enc(1,1,1)@0 lm(2,1,1)@0", grid={"cp": 2, "sequence_parallel": True}, **GROUPED),
        asking("enc(1,1,1)@0 lm(2,1,2)@0", grid={"ep": 2}, experts=4),
        asking("enc(1,1,1)@0 lm(1,1,1)@0", experts=4),
    ]
    batch = lines[2].batch
    found = []
    for spec in lines:
        opened_job = opened(attrs.evolve(spec, batch=batch))
        said = pool.run("generating:answered", opened_job.topology.world_size, opened_job, [GREEDY, DRAWN])
        cached, whole, passes = next(one for one in said if one is not None)
        assert cached == whole
        count = opened_job.spec.batch.global_size
        assert {count} == {*passes[1:6], *passes[7:12]}
        assert passes[12] < passes[13] < passes[17]
        found.append(cached)
    assert found[0] == found[1] == found[2] == found[3]
    assert found[4] == found[5]
    greedy, chosen = found[0]
    assert greedy != chosen
    assert len({*itertools.chain(*greedy)}) > 2


@pytest.mark.world
@pytest.mark.parametrize("name", ["llama", "qwen2.5-vl"])
def test_answers_are_those_of_transformers(pool: Pool, tmp_path: Path, name: str) -> None:
    """Greedy, on two stages of two tp ranks; a Qwen counts the positions of images in time and space."""
    folder = tmp_path / "checkpoint"
    checkpoints.make(name, folder)
    towers = {"qwen2.5-vl": "[modules.vision]\n"}.get(name, "")
    images = "grids = { vision = [[1, 4, 6], [1, 8, 4]] }, vocab = 250, " if towers else ""
    language = "[modules.language]\ngrid = { tp = 2, pp = 2, offset = 0 }\nsplit = [2, 1]\n"
    language += "options = { vocab_padding = 1 }\n"
    data = f'[data]\nsource = "synthetic"\noptions = {{ {images}sequence = 64, text = [5, 5] }}\n'
    batch = "[batch]\nglobal_size = 2\nmicrobatches = 2\n"
    head = f'weights = "{folder}"\nprecision = "fp64"\n'
    (tmp_path / "job.toml").write_text(f"{head}{towers}{language}{data}{batch}")
    opened_job = open_job(tmp_path / "job.toml")
    said = pool.run("generating:answered", 4, opened_job, [GREEDY])
    cached, whole, _ = next(one for one in said if one is not None)
    assert cached == whole
    if towers:
        return
    assert opened_job.source is not None
    tokens = [opened_job.source.load(i, "language")["tokens"] for i in range(2)]
    how = {"max_new_tokens": GREEDY.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with double_precision(Counter()):
        theirs = reference(folder).model.generate(torch.stack(tokens), **how)
    assert [tuple(row[5:].tolist()) for row in theirs] == cached[0]


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=9, unique=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 9),
    st.floats(0.01, 1),
)
def test_a_draw_is_of_what_is_left(scores: list[float], draw: float, top_k: int, top_p: float) -> None:
    """Of the `top_k` likeliest tokens the fewest that have `top_p` together; the likeliest is always among them."""
    how = GenerateSpec(tokens=1, temperature=0.7, top_k=top_k, top_p=top_p)
    logits = torch.tensor([scores], dtype=torch.float64)
    token = int(drawn(logits, torch.tensor([draw], dtype=torch.float64), how))
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: top_k or None]
    shares = (logits[0, order] / 0.7).softmax(dim=0)
    likelier = float(shares[: order.index(token)].sum())
    assert likelier < top_p
    if draw == 0:
        assert token == order[0]


def test_draws_have_the_shares_of_the_softmax() -> None:
    """Over many draws, at a temperature."""
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, -1)
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = drawn(logits, draws, GenerateSpec(tokens=1, temperature=2.0)).bincount() / 20_000
    assert found.tolist() == pytest.approx((logits[0] / 2).softmax(dim=0).tolist(), abs=0.015)
