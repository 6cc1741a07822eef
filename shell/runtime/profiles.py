"""Profiles: what torch and the device do in a step, under the names of the program's actions.

A step that the job wants profiled runs with torch's profiler on, each action in a range with the name that it has in
the program (``language.1 B3``). The traces open in Perfetto and Chrome, and read like the schedule; tools that watch a
GPU see the same ranges (NVTX). A profiled step is slower than others.
"""

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from mimogrid.core.job.spec import ProfileSpec
from mimogrid.core.schedule.actions import Action
from mimogrid.shell.device.device import Device
from mimogrid.shell.runtime.execute import Executor, RankContext, Timed, execute


def executor_of(wanted: ProfileSpec, folder: Path, device: Device, *, step: int, rank: int) -> Executor:
    """Return what runs a rank's program in a step: `execute`, or `execute` under the profiler where the job wants it.

    A profile is written into the folder, as ``step-STEP-rank-RANK.json``.
    """
    if step not in wanted.steps or rank not in wanted.ranks:
        return execute

    def profiled(actions: tuple[Action, ...], context: RankContext) -> tuple[Timed, ...]:
        timeline: list[Timed] = []
        with profile(activities=_activities(device)) as seen:
            for index, action in enumerate(actions):
                name = str(action)
                with record_function(name), device.streams.named(name):
                    timeline += execute((action,), context, first=index)
            device.finish()
        folder.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(folder / f"step-{step}-rank-{rank}.json"))
        return tuple(timeline)

    return profiled


def _activities(device: Device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_asynchronous else [])]
