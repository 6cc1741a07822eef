"""A program's own forward step and loss function in a job's program: the numbers of Megatron's model on one process."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import loops
import megatrons
import specs
from mimogrid.adapters.megatron import SequenceFirst, job_of
from mimogrid.adapters.megatron.batches import Batch, examples_of, readings
from mimogrid.adapters.megatron.forward_step import HostLoss, microbatches_of
from mimogrid.adapters.megatron.readings import Reader
from mimogrid.adapters.torch_module import Example
from mimogrid.core.base.errors import PlanError
from mimogrid.core.base.samples import Sample
from mimogrid.core.job.spec import BatchSpec, DataSpec, JobSpec
from mimogrid.core.step.step import Share
from mimogrid.core.topology.topology import Module
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.modules.loss import Predictions
from mimogrid.shell.world.launch import Pool
from scale import nightly_only


Opened = Callable[[JobSpec], Job]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """Give Megatron's grids a world to fit in, without a process group."""
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "4096"}):
        yield


def job_for(
    opened: Opened,
    config: Mapping[str, Any],
    vision: Mapping[str, int],
    language: Mapping[str, int],
    audio: Mapping[str, int] | None = None,
    **fields: Any,
) -> Job:
    """A job of the model on these grids, whose samples are the program's."""
    grids = megatrons.side_by_side(vision, language, audio)
    batch = BatchSpec(global_size=loops.SAMPLES, microbatches=loops.MICROBATCHES)
    return opened(job_of(megatrons.config_of(**config), grids, batch=batch, precision="fp64", **fields))


COMMON = {"layers": 2, "language": {"max_sequence_length": loops.SEQUENCE}}
PARTS = {"scatter_embedding_sequence_parallel": False}


@pytest.mark.world
@pytest.mark.parametrize(
    ("vision", "language", "transformer", "loss", "options", "encoder_inputs"),
    [
        ({"dp": 2}, {"dp": 1, "pp": 2}, {}, loops.of_losses, {}, {"vision": "pixels"}),
        ({"dp": 3}, {"tp": 2, "dp": 2}, {"sequence_parallel": True}, loops.of_losses, {}, None),
        ({"dp": 1}, {"cp": 2, "dp": 3}, {}, loops.of_logits, {"labels": False}, None),
        ({"dp": 2}, {"dp": 3}, {}, loops.of_losses, {"images": True}, None),
        ({"dp": 1}, {"dp": 3, "pp": 2}, {}, loops.of_losses, {"several": True}, None),
        ({"dp": 1}, {"dp": 3, "pp": 2}, {}, loops.of_losses, {"packed": True}, None),
        ({"dp": 2}, {"tp": 2, "pp": 2}, {"sequence_parallel": True}, loops.of_losses, {"masked": True}, None),
        ({"dp": 2}, {"cp": 2, "dp": 2}, {}, loops.of_means, {}, None),
        ({"dp": 1}, {"dp": 2, "pp": 2}, {}, loops.of_counted_means, {"labels": False}, None),
        *nightly_only([({"dp": 1}, {"cp": 2, "pp": 2}, {}, loops.of_losses, {}, None)]),
    ],
)
def test_a_loss_function_of_the_programs_trains(
    pool: Pool,
    opened: Opened,
    *,
    vision: Mapping[str, int],
    language: Mapping[str, int],
    transformer: Mapping[str, Any],
    loss: Any,
    options: Mapping[str, Any],
    encoder_inputs: Mapping[str, str] | None,
) -> None:
    """Reports add up to those of one process, microbatch by microbatch, and gradients are the same."""
    eyes = {kind: options.get(kind, False) for kind in ("images", "several")}
    whole = {**COMMON, "language": {**COMMON["language"], **PARTS}, **eyes}
    config = {**whole, "pp": language.get("pp", 1), "tp": language.get("tp", 1), **transformer}
    job = job_for(opened, config, vision, language)
    with megatrons.alone():
        expected, weights = loops.expected(whole, loss, options)
    arguments = (job, config, weights, loss, options, encoder_inputs)
    said = pool.run("loops:stepped", job.topology.world_size, *arguments)
    module = job.topology.modules["language"]
    last = [
        rank
        for rank in module.grid.ranks
        if module.grid.position_along("pp", rank) == module.grid.extent("pp") - 1
    ]
    copies = module.grid.extent("tp")
    for reports in ([one.reports for one in said], [one.evaluated for one in said]):
        assert [[] for rank in range(len(said)) if rank not in last] == [
            of_rank for rank, of_rank in enumerate(reports) if rank not in last
        ]
        sums = np.sum([reports[rank] for rank in last], axis=0) / copies
        np.testing.assert_allclose(expected.reports, sums, rtol=1e-12)
    ours = said[0].gradients
    assert len(expected.gradients) == len(ours)
    for name, gradient in expected.gradients.items():
        mine = name.replace("language_model.", "language.").replace("modality_submodules.", "")
        np.testing.assert_allclose(gradient, ours[mine], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.world
@pytest.mark.parametrize(
    ("vision", "audio", "language"),
    [
        ({"dp": 2}, {"dp": 1}, {"dp": 1}),
        *nightly_only([({"dp": 3}, {"dp": 1}, {"tp": 2, "pp": 2}), ({"dp": 1}, {"dp": 2}, {"pp": 3})]),
    ],
)
def test_two_modalities_train(
    pool: Pool,
    opened: Opened,
    vision: Mapping[str, int],
    audio: Mapping[str, int],
    language: Mapping[str, int],
) -> None:
    """Each on ranks of its own, with rows among the text and among each other's."""
    whole = {**COMMON, "layers": max(2, language.get("pp", 1)), "sounds": True}
    config = {**whole, "pp": language.get("pp", 1), "tp": language.get("tp", 1)}
    job = job_for(opened, config, vision, language, audio)
    with megatrons.alone():
        expected, weights = loops.expected(whole, loops.of_losses, {"sounds": True})
    said = pool.run(
        "loops:stepped",
        job.topology.world_size,
        *(job, config, weights, loops.of_losses, {"sounds": True}, None),
    )
    ours = said[0].gradients
    assert len(expected.gradients) == len(ours)
    for name, gradient in expected.gradients.items():
        mine = name.replace("language_model.", "language.").replace("modality_submodules.", "")
        np.testing.assert_allclose(gradient, ours[mine], rtol=1e-9, atol=1e-12, err_msg=name)


TURNED = {"position_embedding_type": "mrope", "max_sequence_length": loops.SEQUENCE}
BY_THREE = {"layers": 3, "mrope_section": [0, 1, 1]}


@pytest.mark.world
@pytest.mark.parametrize(
    ("vision", "language", "transformer"),
    [
        ({"dp": 1}, {"pp": 3}, {}),
        *nightly_only([({"dp": 1}, {"dp": 2}, {})]),
    ],
)
def test_mrope_turns_on_every_stage(
    pool: Pool,
    opened: Opened,
    vision: Mapping[str, int],
    language: Mapping[str, int],
    transformer: Mapping[str, Any],
) -> None:
    """By the three position ids of the batch, also on a stage that reads no tokens."""
    whole = {**BY_THREE, "language": {**TURNED, **PARTS}}
    config = {**whole, "pp": language.get("pp", 1), "tp": language.get("tp", 1), **transformer}
    job = job_for(opened, config, vision, language)
    with megatrons.alone():
        expected, weights = loops.expected(whole, loops.of_losses, {"turned": True})
    arguments = (job, config, weights, loops.of_losses, {"turned": True}, None)
    said = pool.run("loops:stepped", job.topology.world_size, *arguments)
    ours = said[0].gradients
    assert len(expected.gradients) == len(ours)
    for name, gradient in expected.gradients.items():
        mine = name.replace("language_model.", "language.").replace("modality_submodules.", "")
        np.testing.assert_allclose(gradient, ours[mine], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.world
def test_networks_of_the_job_take_a_forward_step_too(pool: Pool, opened: Opened) -> None:
    """Without a model the job's own networks train, and its own loss, said as a loss function, gives the same."""
    config = {**COMMON, "eye": {"layers": 2}}
    facts = {"sequence": loops.SEQUENCE, "features": {"vision": specs.PIXELS}}
    data = DataSpec(source="mimogrid.shell.job.host:samples", options=facts)
    job = job_for(opened, config, {"dp": 2}, {"tp": 2}, data=data)
    for by_loop, by_job in pool.run("loops:both_ways", job.topology.world_size, job):
        assert by_loop == by_job


@pytest.mark.world
def test_a_loss_that_counts_other_tokens_is_refused(pool: Pool, opened: Opened) -> None:
    """Gradients would be divided by another count than the program assumes, so the step is skipped."""
    job = job_for(opened, COMMON, {"dp": 1}, {"dp": 1})
    found = pool.run("loops:miscounted", 2, job, COMMON)
    assert [(False, False)] * 2 == [(changed, updated) for _, changed, updated in found]
    assert re.match(
        r"microbatch 0: the loss function counts 48 tokens on this rank, the loss mask 2\d", found[1][0]
    )


@pytest.mark.world
def test_a_forward_step_that_fails_on_one_rank_ends_the_step_on_all(pool: Pool, opened: Opened) -> None:
    """The others do not wait for its samples: their error names the rank, and the next step works."""
    job = job_for(opened, COMMON, {"dp": 1}, {"dp": 2})
    said = pool.run("loops:failing", 3, job, COMMON, 1)
    assert [("EchoError", True), ("KeyError", True), ("EchoError", True)] == [
        (kind, went) for kind, _, went in said
    ]
    assert "ranks [1] have no batch for this step" in said[0][1]


@pytest.mark.world
def test_a_loss_function_that_is_refused_on_its_ranks_fails_there_first(pool: Pool, opened: Opened) -> None:
    """A mean is seen on ranks of the last stage alone; who waits for their gradients has not failed first."""
    job = job_for(opened, COMMON, {"dp": 1}, {"dp": 1})
    assert ["EchoError", "PlanError"] == pool.run("loops:meaning", 2, job, COMMON)


# -- what a forward step says ------------------------------------------------------------------------------


@pytest.fixture(name="language", scope="module")
def _language(opened: Opened) -> Module:
    """The language model of a job with two dp ranks for it."""
    return job_for(opened, COMMON, {"dp": 1}, {"dp": 2}).topology.modules["language"]


def example_batch(**changes: Any) -> Batch:
    """The first microbatch, changed."""
    return Batch(**{**next(loops.batches()), **changes})


def as_examples(batch: Batch, language: Module, **changes: Any) -> list[Example]:
    """The samples of a batch."""
    size = loops.SAMPLES // loops.MICROBATCHES
    options: dict[str, Any] = {"samples": size, "sequence": loops.SEQUENCE, "rows_of": {}}
    return examples_of(batch, language, {"vision": megatrons.PLACEHOLDER}, **{**options, **changes})


def test_samples_are_described_by_their_tokens(language: Module) -> None:
    """Placeholders, text, counts and rows of each sample, whose parts together are the batch."""
    batch = example_batch()
    examples = as_examples(batch, language)
    is_image = batch.input_ids == megatrons.PLACEHOLDER
    for i, example in enumerate(examples):
        rows = example.sample.rows["vision"]
        assert int(is_image[i].sum()) == rows
        assert loops.SEQUENCE == example.sample.length + rows
        assert float(batch.weights[i].sum()) == example.sample.units["language"]
        assert torch.equal(is_image[i], example.tensors["language"]["tokens"] == -1)
        assert (rows > 0) == ("vision" in example.tensors)
    pixels = [example.tensors["vision"]["rows"] for example in examples if "vision" in example.tensors]
    assert batch.modality_inputs is not None
    eye = batch.modality_inputs["vision"]
    assert eye is not None
    assert torch.equal(eye["eye"]["pixels"], torch.cat(pixels))


def test_items_of_unlike_size_go_to_the_samples_that_have_any(language: Module) -> None:
    """One image of each sample, however many rows each of them becomes; its encoder gets it by name."""
    sizes = torch.tensor([[1, 4], [1, 2]])
    batch = example_batch(modality_inputs={"vision": {"eye": {"sizes": sizes}}})
    found = [e.tensors["vision"] for e in as_examples(batch, language) if "vision" in e.tensors]
    assert sizes.tolist() == [one["sizes"].squeeze(0).tolist() for one in found]
    assert [(4, 0), (2, 0)] == [tuple(one["rows"].shape) for one in found]


def test_a_block_of_positions_and_samples_is_declared(language: Module) -> None:
    """[S, B, F], as Megatron's iterators yield it, is cut along samples; undeclared it is refused."""
    ids = torch.zeros(3, loops.SEQUENCE, dtype=torch.int64)
    ids[:, :4] = megatrons.PLACEHOLDER
    hidden_SBF = torch.arange(4 * 3 * 2.0).view(4, 3, 2)
    batch = example_batch(input_ids=ids, modality_inputs={"vision": {"eye": {"hidden_states": hidden_SBF}}})
    with pytest.raises(
        PlanError, match=r"\[4, 3, 2\] for 3 samples: it may be \[positions, samples, features\]"
    ):
        as_examples(batch, language)
    found = as_examples(batch, language, rows_of={"vision": SequenceFirst("hidden_states")})
    assert [hidden_SBF[:, i].tolist() for i in range(3)] == [
        e.tensors["vision"]["rows"].tolist() for e in found
    ]
    short = example_batch(
        input_ids=ids, modality_inputs={"vision": {"eye": {"hidden_states": hidden_SBF[:3]}}}
    )
    with pytest.raises(PlanError, match=r"has the shape \[3, 3, 2\], declared .* have 4, 4, 4 placeholders"):
        as_examples(short, language, rows_of={"vision": SequenceFirst("hidden_states")})


POSITIONS = torch.arange(loops.SEQUENCE).expand(3, -1)
ENDS = torch.tensor([0, 16, 40, 48])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_ids": torch.zeros(2, 16, dtype=torch.int64)}, r"shape \(2, 16\); a microbatch .* 3 samples"),
        ({"input_ids": torch.zeros(3, 20, dtype=torch.int64)}, "has 20 positions, the job sequences of 16"),
        ({"labels": torch.zeros(3, 15, dtype=torch.int64)}, r"labels: has the shape \(3, 15\), input_ids"),
        ({"position_ids": POSITIONS.flip(1)}, "position_ids: do not count up"),
        (
            {"position_ids": POSITIONS.expand(3, 3, -1)},
            r"position_ids: has the shape \(3, 3, 16\).* are for mrope",
        ),
        (
            {"attention_mask": torch.ones(3, 16, dtype=torch.bool)},
            r"shape \(3, 16\) and torch.bool is no mask",
        ),
        (
            {"attention_mask": torch.ones(1, 1, 16, 16, dtype=torch.bool)},
            "hides everything from position 0 of sample 0",
        ),
        ({"packing_kwargs": {"cu_seqlens_q": None}}, r"says nothing of queries \(cu_seqlens_q\)"),
        (
            {"packing_kwargs": {"cu_seqlens_q": ENDS, "cu_seqlens_kv": ENDS + 1}},
            "or other segments of keys",
        ),
        (
            {"packing_kwargs": {"cu_seqlens_q": ENDS[:-1]}},
            r"end at \[0, 16, 40\], which do not cut 3 rows of 16",
        ),
        (
            {
                "packing_kwargs": {"cu_seqlens_q": ENDS},
                "attention_mask": ~torch.eye(16, dtype=torch.bool)[None, None],
            },
            "attention_mask: comes with packing_kwargs",
        ),
        ({"modality_inputs": None}, "there are placeholders for 'vision', and no input"),
        ({"modality_inputs": {"visoin": {}}}, "the job has no modality 'visoin'.* 'vision'"),
        (
            {"modality_inputs": {"vision": {"eye": {"pixels": [1]}}}},
            r"pixels: is a list; the items of a tensor",
        ),
        (
            {"modality_inputs": {"vision": {"eye": {"pixels": torch.zeros(5, 2)}}}},
            r"pixels: has 5 items for 6 placeholders.*: the samples have 4, 2, 0\.",
        ),
        (
            {"modality_inputs": {"vision": {"a": {"x": torch.zeros(6), "y": torch.zeros(3)}, "b": {}}}},
            r"a\.y: has other numbers of items than another tensor of its encoder",
        ),
        (
            {"input_ids": torch.zeros(3, 16, dtype=torch.int64)},
            r"has 6 items, and input_ids no placeholder for them \(token 99\)",
        ),
        (
            {"input_ids": torch.full((3, 16), 98), "modality_inputs": None},
            "input_ids: has 48 tokens beyond the vocabulary of 32, among them 98",
        ),
        (
            {"labels": torch.full((3, 16), -100), "loss_mask": torch.eye(3, 16)},
            "labels: has 3 tokens beyond the vocabulary of 32, among them -100",
        ),
    ],
)
def test_batches_that_a_job_cannot_say_are_refused(
    language: Module, changes: Mapping[str, Any], said: str
) -> None:
    """By argument, with the numbers."""
    with pytest.raises(PlanError, match=f"(?s){said}"):
        as_examples(example_batch(**changes), language)


CAUSAL_ONLY = Reader(causal_only="its layers are causal")
PACKED = {"cu_seqlens_q": torch.tensor([0, 4, 16, 32, 48])}
INSIDE = torch.cat((torch.arange(4), torch.arange(12), *[torch.arange(16)] * 2)).view(3, 16)


@pytest.mark.parametrize(
    ("reader", "changes", "said"),
    [
        (
            CAUSAL_ONLY,
            {"packing_kwargs": PACKED},
            "packs several samples into a row, and its layers are causal",
        ),
        (
            CAUSAL_ONLY,
            {"attention_mask": ~torch.eye(16, dtype=torch.bool)[None, None]},
            "and its layers are causal",
        ),
        (
            Reader(learns_positions=True),
            {"packing_kwargs": PACKED, "position_ids": INSIDE},
            "begin anew in each packed segment, and the model has learned positions",
        ),
    ],
)
def test_what_a_model_does_not_read_is_refused(
    language: Module, reader: Reader, changes: Mapping[str, Any], said: str
) -> None:
    """A mask that only some attentions read, and positions that only learned embeddings do."""
    with pytest.raises(PlanError, match=said):
        as_examples(example_batch(**changes), language, reader=reader)


def test_a_stage_without_tokens_reads_the_rest() -> None:
    """Loaders give one between the first and the last no tokens; what turns and hides positions, it needs."""
    turns = torch.arange(6).view(3, 2, 1).expand(3, 2, 4)
    hidden = ~torch.eye(4, dtype=torch.bool)[None, None]
    without: Any = {"input_ids": None}
    turned, masked, packed = (
        readings(Batch(**without, **given), 2)
        for given in (
            {"position_ids": turns},
            {"attention_mask": hidden},
            {"packing_kwargs": {"cu_seqlens_q": torch.tensor([0, 3, 4, 8])}},
        )
    )
    assert [[0, 2, 4], [1, 3, 5]] == [
        reading.turn[:, 0].tolist() for reading in turned if reading.turn is not None
    ]
    assert [hidden[0, 0].tolist()] * 2 == [
        reading.hidden.tolist() for reading in masked if reading.hidden is not None
    ]
    assert [[0, 0, 0, 1], [2, 2, 2, 2]] == [
        reading.segments.tolist() for reading in packed if reading.segments is not None
    ]
    assert [] == readings(Batch(**without), 2)


def test_masks_and_packed_rows_need_whole_positions(opened: Opened) -> None:
    """A rank that has a part of the positions cannot line them up with a mask."""
    cut = job_for(opened, COMMON, {"dp": 1}, {"cp": 2}).topology.modules["language"]
    for changes in (
        {"packing_kwargs": PACKED},
        {"attention_mask": ~torch.eye(16, dtype=torch.bool)[None, None]},
    ):
        with pytest.raises(PlanError, match="and positions are split over cp=2"):
            as_examples(example_batch(**changes), cut)


def test_a_modality_without_a_special_token_is_refused(language: Module) -> None:
    """Nothing would tell its placeholders from text."""
    with pytest.raises(
        PlanError, match=r"modules\.vision: feeds .* no special token; there are those of \[\]"
    ):
        examples_of(example_batch(), language, {}, samples=3, sequence=loops.SEQUENCE, rows_of={})


def test_labels_that_do_not_count_may_be_anything(language: Module) -> None:
    """Programs mark with them what is not to be predicted."""
    mask = example_batch().weights
    labels = torch.zeros(mask.shape, dtype=torch.int64).masked_fill(mask == 0, -100)
    assert bool((labels < 0).any())
    assert 3 == len(as_examples(example_batch(labels=labels), language))


def test_a_causal_mask_says_nothing_new(language: Module) -> None:
    """It may come along, as in programs that always have one."""
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    with_mask, without = (as_examples(example_batch(**m), language) for m in ({"attention_mask": mask}, {}))
    assert [e.sample for e in without] == [e.sample for e in with_mask]


def _computes(data_iterator: Any, model: Any) -> Any:
    output, _ = model(**next(data_iterator))
    return output.mean(), loops.of_losses


def _adds(data_iterator: Any, model: Any) -> Any:
    output, _ = model(**next(data_iterator))
    return torch.ones(()) + output, loops.of_losses


def _calls_twice(data_iterator: Any, model: Any) -> Any:
    model(**next(data_iterator))
    return model(**next(data_iterator))[0], loops.of_losses


def _keeps_it(data_iterator: Any, model: Any) -> Any:
    model(**next(data_iterator))
    return torch.zeros(()), loops.of_losses


def _has_no_tokens(data_iterator: Any, model: Any) -> Any:
    return model(**{**next(data_iterator), "input_ids": None})[0], loops.of_losses


def _has_features(data_iterator: Any, model: Any) -> Any:
    features = {"vision": torch.zeros(6, specs.HIDDEN)}
    return model._forward_encoders(
        next(data_iterator)["input_ids"], None, input_tensors=features
    ), loops.of_losses


@pytest.mark.parametrize(
    ("forward_step", "error", "said"),
    [
        (_has_features, PlanError, r"features of an encoder that ran ahead .*mimo-encoder-prefetch"),
        (_computes, TypeError, "return it as it is"),
        (_adds, TypeError, "return it as it is"),
        (_calls_twice, TypeError, "called the model twice"),
        (_keeps_it, PlanError, "returned a Tensor and a function, not what the model returned"),
        (_has_no_tokens, TypeError, "without input_ids"),
    ],
)
def test_forward_steps_that_compute_with_what_is_not_there_are_refused(
    language: Module, forward_step: Any, error: type[Exception], said: str
) -> None:
    """The error says where to compute instead."""
    with pytest.raises(error, match=said):
        microbatches_of(forward_step, loops.batches(), None, language, rank=1, total=loops.SAMPLES)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.ones(()), r"returns a Tensor, neither \(sum, number of tokens, report\) nor"),
        ((torch.ones(2), 3, {}), "returns a tuple, neither"),
        ((torch.ones(2), {}), "returns a tuple, neither"),
    ],
)
def test_losses_that_are_no_sums_are_refused(language: Module, returned: Any, said: str) -> None:
    """A mean over a dp rank's microbatch depends on the layout."""
    with pytest.raises(PlanError, match=said):
        judged(language, lambda *_: returned)


def test_a_loss_that_fails_says_what_its_input_was(language: Module) -> None:
    """The batch's own loss mask, of all dp ranks, fits no dp rank's output."""
    with pytest.raises(RuntimeError, match="must match") as caught:
        judged(language, lambda _, output: (output * torch.ones(3, 16)).sum())
    (note,) = caught.value.__notes__
    assert "microbatch 0: the loss function was given (1, 2), this rank's samples and positions" in note


def test_a_mean_of_logits_says_its_count(language: Module) -> None:
    """Or it is refused: nothing else tells it from a mean over other tokens."""
    batches = loops.batches(labels=False)
    with pytest.raises(PlanError, match="a mean of logits, whose number of tokens nothing says"):
        judged(language, lambda mask, output: (output.mean(), {"lm loss": mask.sum()}), batches)


TWO = torch.tensor([3.0, 5.0])
"""The losses of the two tokens of `judged`."""


@pytest.mark.parametrize(
    ("mean", "report"),
    [
        (lambda losses: losses.mean(), {}),
        (lambda losses: losses.sum() / 2, {"lm loss": torch.tensor(4.0)}),
        (lambda losses: losses.square().mean(), {"lm loss": torch.tensor([34.0, 2.0])}),
    ],
)
def test_a_mean_over_the_mask_is_a_sum(language: Module, mean: Any, report: Mapping[str, Any]) -> None:
    """Its gradient is that of the sum, whether its report or its gradient says what it is over."""
    losses = TWO.clone().requires_grad_()
    found = judged(language, lambda _, output: (mean(output), report), losses=losses)
    (mean(losses) * 2).backward()
    expected, losses.grad = losses.grad, None
    assert float(mean(TWO) * 2) == pytest.approx(float(found.detach()))
    found.backward()
    assert losses.grad is not None
    assert torch.allclose(expected, losses.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mean", "report"),
    [
        (lambda losses: losses.sum(), {}),
        (lambda losses: losses.sum() / 3, {}),
        (lambda losses: (losses * torch.tensor([0.5, 1.5])).mean(), {}),
        (lambda losses: losses.square().mean(), {}),
        (lambda losses: losses.mean(), {"lm loss": torch.tensor([8.0, 4.0])}),
        (lambda losses: losses.sum() / 4, {"lm loss": torch.tensor([8.0, 4.0])}),
    ],
)
def test_other_means_skip_the_step(language: Module, mean: Any, report: Mapping[str, Any]) -> None:
    """A sum, a mean over other tokens, another weighing of them, and a report that is not about the mean."""
    losses = TWO.clone().requires_grad_()
    assert judged(language, lambda _, output: (mean(output), report), losses=losses).isnan()


def test_a_mean_of_no_tokens_is_nothing(language: Module) -> None:
    """0/0 in the loss function adds 0 to the loss and to the gradient."""
    losses = TWO.clone().requires_grad_()
    found = judged(
        language,
        lambda _, output: ((output * 0).sum() / torch.zeros(()), {}),
        losses=losses,
        weights=torch.zeros(2),
    )
    found.backward()
    assert losses.grad is not None
    assert [0.0, 0.0, 0.0] == [float(found.detach()), *losses.grad.tolist()]


def judged(
    language: Module,
    loss_func: Any,
    batches: Iterator[Any] | None = None,
    *,
    losses: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a loss function comes to for the first microbatch, of which this rank has one sample of two tokens."""
    forward_step = loops.step_with(loss_func)
    asked = microbatches_of(
        forward_step, batches or loops.batches(), None, language, rank=1, total=loops.SAMPLES
    )
    sample = Sample(id=0, length=2, rows={})
    share = Share((sample,), {}, (2,), (2,), ((),), loops.SAMPLES, (2, 1), segments=(2,))
    two = torch.zeros(2, dtype=torch.int64)
    ones = torch.ones(2) if weights is None else weights
    predictions = Predictions(torch.zeros(2, 4), two, ones, share, specs.OneOf(0, 1))  # type: ignore[arg-type]
    with mock.patch.object(Predictions, "cross_entropies", return_value=TWO if losses is None else losses):
        return HostLoss(asked, loops.SAMPLES)(predictions)
