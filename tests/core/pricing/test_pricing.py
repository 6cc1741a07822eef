"""Prices follow from operations, bytes and the sheet of an accelerator."""

import math
from pathlib import Path

import attrs
import pytest

import jobs
from jobs import program_for
from mimogrid.core.base.errors import PlanError
from mimogrid.core.job.costs import Costs
from mimogrid.core.job.models import FIRST, Gpt, Vit
from mimogrid.core.job.spec import (
    BatchSpec,
    DataSpec,
    GridSpec,
    JobSpec,
    ModuleSpec,
    OptimizerSpec,
    SourceFacts,
)
from mimogrid.core.pricing.accelerators import ACCELERATORS
from mimogrid.core.pricing.flops import Loads, in_row, stage_flops
from mimogrid.core.pricing.machine import EFFICIENCY, LINK_EFFICIENCY, machine_of
from mimogrid.core.pricing.on_machine import measured_on, on_machine
from mimogrid.core.pricing.roofline import QUERY_KEYS, TILE
from mimogrid.core.simulate.simulation import simulate
from mimogrid.core.topology.parse import parse
from mimogrid.core.topology.topology import Stage


LAYERS, HIDDEN, SEQUENCE, PATCHES = 4, 4096, 512, 256
GPT = Gpt(layers=LAYERS, hidden=HIDDEN, heads=32, vocab=32000)
VIT = Vit(layers=2, hidden=1024, heads=16, features=588)
H100 = ACCELERATORS["h100"]
SECONDS = ("forward", "input_gradient", "weight_gradient")


def step_of(batch=8, microbatches=4, vision=None, options=GPT, **language):
    """Samples of 256 patches and as many tokens, so that nothing is padded."""
    modules = {
        "vision": ModuleSpec(model="vit", options=VIT, feeds=("language",), **(vision or {})),
        "language": ModuleSpec(model="gpt", options=options, **language),
    }
    spec = JobSpec(
        modules=modules,
        data=DataSpec(source="none"),
        batch=BatchSpec(global_size=batch, microbatches=microbatches),
    )
    topology = parse(spec, SourceFacts(sequence=SEQUENCE))
    return jobs.step_with(topology, {"vision": (PATCHES,)}, text=SEQUENCE - PATCHES)


def of_accelerator(step, gpu, efficiency=EFFICIENCY):
    """The costs of a job on accelerators of a kind, by name."""
    return on_machine(step, machine_of(gpu, step.topology.spec.precision, efficiency))


def test_large_products_take_their_operations_over_what_the_accelerator_reaches():
    """In proportion to the efficiency; each query of attention takes as long as some more keys."""
    step = step_of()
    counted = stage_flops(step)[Stage("language", 0)]
    queries = 4 * HIDDEN * QUERY_KEYS * 2 * SEQUENCE * LAYERS
    for efficiency in (0.5, 0.25):
        found = of_accelerator(step, "h100", efficiency).of("language.0")
        reached = H100.flops["fp32"] * efficiency
        assert (counted.forward + queries) / reached == pytest.approx(found.forward)
        assert (counted.input_gradient + 2 * queries) / reached == pytest.approx(found.input_gradient)
        assert counted.weight_gradient / reached == pytest.approx(found.weight_gradient)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_results_are_computed_in_whole_tiles(tp):
    """A strip of 32 columns takes as long as one of 128; gradients of weights have no attention."""
    narrow = attrs.evolve(GPT, hidden=256, heads=8, kv_heads=8, head_width=32, ffn=1024)
    step = step_of(options=narrow, grid=GridSpec(tp=tp, offset=0))
    machine = attrs.evolve(
        machine_of("h100", "fp32"), accelerator=attrs.evolve(H100, memory_bytes_per_s=math.inf)
    )
    layer = ((256, 768 // tp), (256 // tp, 256), (256, 1024 // tp), (1024 // tp, 256))
    tiles = sum(-(-a // TILE) * -(-b // TILE) for a, b in (*LAYERS * layer, (256, 32000 // tp)))
    found = on_machine(step, machine).of("language.0")
    expected = 2 * 2 * SEQUENCE * tiles * TILE**2 / machine.flops
    assert expected == pytest.approx(found.weight_gradient)


def test_few_rows_take_as_long_as_reading_the_weights():
    """However few operations that is."""
    step = step_of(batch=4, microbatches=4)
    few = attrs.evolve(
        step, samples=tuple(attrs.evolve(each, length=1, rows={"vision": 1}) for each in step.samples)
    )
    values = sum(math.prod(p.shape) for p in GPT.parameters() if len(p.shape) > 1 and p.layer != FIRST)
    least = values * 2 / H100.memory_bytes_per_s
    found = on_machine(few, machine_of("h100", "bf16")).of("language.0").forward
    assert least < found < 1.05 * least


def test_tensor_parallel_ranks_share_the_layers_and_pay_for_their_sums():
    """Two sums over tp of a block per layer and one of the embedding; what remains is a half."""
    alone, shared = (
        of_accelerator(step_of(grid=GridSpec(tp=tp, offset=0)), "h100").of("language.0") for tp in (1, 2)
    )
    block = 2 * SEQUENCE * HIDDEN * 4
    once = block / (H100.link_bytes_per_s * LINK_EFFICIENCY) + 2 * H100.link_latency_s
    assert alone.forward / 2 + (2 * LAYERS + 1) * once == pytest.approx(shared.forward)
    assert alone.input_gradient / 2 + (2 * LAYERS + 1) * once == pytest.approx(shared.input_gradient)
    assert alone.weight_gradient / 2 == pytest.approx(shared.weight_gradient)


def test_what_is_rounded_up_takes_time_and_counts_as_no_work():
    """A row is a multiple of tp under sequence parallelism; the head reads the tokens that there are."""
    grid = GridSpec(tp=4, sequence_parallel=True)
    short = step_of(grid=grid)
    short = attrs.evolve(short, samples=tuple(attrs.evolve(sample, length=1) for sample in short.samples))
    assert 2 * (PATCHES + 1) % 4
    alone = attrs.evolve(step_of(), samples=short.samples)
    assert stage_flops(short) == stage_flops(alone)
    load = in_row(short.topology.modules["language"], Loads.of(short, "language").over(range(2)))
    assert (516, 514) == (load.positions, load.emitted)


def test_the_dp_rank_with_most_sets_the_price():
    """Three samples over two dp ranks take as long as four."""
    uneven, even = (
        of_accelerator(step_of(batch=batch, grid=GridSpec(dp=2)), "h100").of("language.0").forward
        for batch in (12, 16)
    )
    assert even == uneven


def test_dp_ranks_pay_for_the_sum_of_their_gradients():
    """Each byte crosses twice, but for the part that is already there; a lone dp rank pays nothing."""
    alone, dp_ranks = (of_accelerator(step_of(grid=GridSpec(dp=dp)), "h100") for dp in (1, 2))
    weights = sum(p.shape[0] * (p.shape[1] if len(p.shape) > 1 else 1) for p in GPT.parameters())
    assert 0 == alone.of("language.0").reduce
    bandwidth = H100.link_bytes_per_s * LINK_EFFICIENCY
    assert 2 * weights * 4 / 2 / bandwidth == pytest.approx(dp_ranks.of("language.0").reduce)
    assert 7 * weights * 4 / H100.memory_bytes_per_s == pytest.approx(dp_ranks.of("language.0").update)


def test_a_sharded_update_scatters_gradients_and_gathers_weights():
    """Each byte of a gradient crosses once, and each byte of a weight, which has half as many in bf16."""
    whole, parts = (
        on_machine(_sharing(step_of(grid=GridSpec(dp=2)), shares), machine_of("h100", "bf16")).of(
            "language.0"
        )
        for shares in (False, True)
    )
    assert 0 == whole.gather
    assert whole.reduce / 2 == pytest.approx(parts.reduce)
    assert whole.reduce / 4 == pytest.approx(parts.gather)


def _sharing(step, shares):
    spec = attrs.evolve(step.topology.spec, optimizer=OptimizerSpec(sharded=shares))
    return attrs.evolve(step, topology=attrs.evolve(step.topology, spec=spec))


def test_a_module_takes_as_long_as_it_was_measured_to_however_it_is_cut():
    """Twice and three times what is assumed on one rank stay so on two stages; what took no time stays as assumed."""
    step, machine = step_of(), machine_of("h100", "fp32")
    assumed_costs = on_machine(step, machine)
    found = {
        name: attrs.evolve(of_stage, **{key: times * getattr(of_stage, key) for key in SECONDS})
        for (name, of_stage), times in zip(assumed_costs.stages.items(), (2.0, 3.0), strict=True)
    }
    measured = measured_on(machine, step, Costs(stages=found))
    assert {
        name.split(".")[0]: pytest.approx(times) for name, times in zip(found, (2.0, 3.0), strict=True)
    } == dict(measured.measured)
    cut = step_of(grid=GridSpec(pp=2))
    for name, of_stage in on_machine(cut, measured).stages.items():
        plain = on_machine(cut, machine).of(name)
        assert measured.times(name.split(".")[0]) * plain.forward == pytest.approx(of_stage.forward)
        assert plain.update == of_stage.update
    assert () == measured_on(machine, step, Costs()).measured


def test_frozen_modules_update_nothing():
    """Neither are their gradients summed."""
    of_stage = of_accelerator(step_of(vision={"frozen": True, "grid": GridSpec(dp=2)}), "h100").of("vision.0")
    assert (0.0, 0.0) == (of_stage.reduce, of_stage.update)


def test_links_within_a_node_are_faster_than_those_between():
    """Ranks fill nodes in order: the eighth pipeline link of a chain leaves the first."""
    step = step_of(grid=GridSpec(pp=4, offset=6))
    costs = of_accelerator(step, "h100")
    near, far = (costs.edges[f"language.{p} -> language.{p + 1}"] for p in (0, 1))
    assert H100.link_bytes_per_s * LINK_EFFICIENCY == near.bytes_per_s
    assert H100.network_bytes_per_s * LINK_EFFICIENCY == far.bytes_per_s


def test_the_step_takes_its_work_at_least():
    """On one rank and with one microbatch a step is the sum of what it consists of."""
    step = step_of(batch=2, microbatches=1, vision={"grid": GridSpec(offset=0)}, grid=GridSpec(offset=0))
    costs = of_accelerator(step, "a100")
    parts = [costs.of(stage) for stage in step.topology.stages]
    work = sum(part.forward + part.whole_backward + part.reduce + part.update for part in parts)
    assert work == pytest.approx(simulate(program_for(step), costs).step_s)


def test_what_is_not_known_is_said():
    """With the nearest name."""
    with pytest.raises(PlanError, match="'h1000' is not known"):
        machine_of("h1000", "bf16")


def test_the_documents_have_the_numbers_of_every_accelerator():
    """With the source of each: a row of the table in `docs/plan.md`."""
    page = (Path(__file__).parents[3] / "docs/plan.md").read_text(encoding="utf-8")
    for name, gpu in ACCELERATORS.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        tera = [
            f"{gpu.flops[each] / 1e12:,.5g}" if each in gpu.flops else "-" for each in ("bf16", "fp8", "fp32")
        ]
        memory = f"{gpu.memory_bytes / 1e9:g} GB, {gpu.memory_bytes_per_s / 1e12:g} TB/s"
        links = (f"{size / 1e9:g} GB/s" for size in (gpu.link_bytes_per_s, gpu.network_bytes_per_s))
        sources = f"{gpu.source.link}; {gpu.source.network}"
        cells = (f"`{name}`", ", ".join(tera), memory, *links, str(gpu.per_node), sources)
        assert f"| {' | '.join(cells)} |" == row
