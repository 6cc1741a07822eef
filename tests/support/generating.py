"""Generating: answers of a job's language model on its layout, with keys and values kept, and without."""

import contextlib
from collections.abc import Sequence
from unittest.mock import patch

from mimogrid.core.job.spec import GenerateSpec
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job
from mimogrid.shell.run import generation
from mimogrid.shell.run.generation import Prompt, Tokens, answers_to
from mimogrid.shell.runtime import forward_only
from mimogrid.shell.runtime.session import open_session


Answers = list[list[Tokens]]


def answered(
    place: RankPlace, job: Job, hows: Sequence[GenerateSpec], stop: int = -1
) -> tuple[Answers, Answers, list[int]] | None:
    """Run on every rank: answer the samples of the first step, each a prompt.

    Returns the answers by `hows`, those of passes that compute every sample anew, and the tokens of each kind of pass.
    """
    with open_session(place, job) as session:
        runtime = session.runtime
        if runtime is None:
            return None
        assert job.source is not None
        (text,) = job.topology.graph.texts
        prompts = [
            Prompt(sample, tuple(job.source.load(sample.id, text)["tokens"].tolist()), frozenset({stop}))
            for sample in job.step(0).samples
        ]
        passes: list[int] = []

        def noting(runtime_, step, *arguments, **options):
            passes.append(sum(sample.length for sample in step.samples))
            return forward_only.predict(runtime_, step, *arguments, **options)

        found: list[Answers] = []
        nothing = patch.object(generation, "caching", lambda _: contextlib.nullcontext(None))
        with patch.object(generation, "predict", noting):
            for way in (contextlib.nullcontext(), nothing):
                with way:
                    found.append([[*answers_to(runtime, prompts, job.source, how).values()] for how in hows])
        return found[0], found[1], passes
