"""A job whose source kills, raises, hangs or loads odd tensors, as its options say; and what a rank sees of it."""

import itertools
from pathlib import Path
from typing import Any

from mimogrid.core.schedule.loads import SampleLoad
from mimogrid.shell.device.place import RankPlace
from mimogrid.shell.job.jobs import Job, open_job
from mimogrid.shell.runtime.ahead import open_ahead


SOURCE = """
import os, pathlib, signal, time
import torch
from mimogrid.core.base.samples import Sample

class Pictures:
    def __init__(self, folder, kills, dies, raises, hangs):
        self.folder, self.kills, self.dies, self.raises, self.hangs = folder, kills, dies, raises, hangs

    def describe(self, sample_id):
        return Sample(id=sample_id, length=3, rows={"eyes": sample_id % 3})

    def load(self, sample_id, module):
        if module == "eyes":
            before = pathlib.Path(self.folder, f"killed-{sample_id}")
            if sample_id in self.dies or (sample_id in self.kills and not before.exists()):
                before.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if sample_id in self.raises:
                raise ValueError("no such picture")
            if sample_id in self.hangs:
                time.sleep(1e6)
            generator = torch.Generator().manual_seed(sample_id)
            return {"rows": torch.rand(sample_id % 3, 5, generator=generator)}
        tokens = torch.tensor([-1] * (sample_id % 3) + [1, 2, sample_id % 7])
        return {"tokens": tokens, "labels": tokens.roll(-1).clamp(min=0), "loss_weights": (tokens >= 0).float()}

class Odd(Pictures):
    def load(self, sample_id, module):
        return {"pid": torch.tensor(os.getpid()), "none": torch.zeros(0, 3), "half": torch.ones(2, 3).bfloat16(),
                "turned": torch.arange(6).reshape(2, 3).T, "flags": torch.tensor([True, False])}

def right(logits, sample):
    counts = sample["loss_weights"] > 0
    found = (logits.argmax(dim=-1) == sample["labels"])[counts].float().mean()
    return {"right": found, "long": len(counts)} if len(counts) > 3 else {"right": found}

def said(answer, sample):
    return {"said": len(answer)}

def strange(logits, sample):
    return 0.5

def pictures(sequence, folder, kills=(), dies=(), raises=(), hangs=()):
    return Pictures(folder, kills, dies, raises, hangs)

def odd(sequence, folder):
    return Odd(folder, (), (), (), ())
"""
JOB = """
[modules.eyes]
model = "vit"
feeds = ["language"]
options = { layers = 1, hidden = 8, heads = 2, features = 5 }
[modules.language]
model = "gpt"
options = { layers = 1, hidden = 8, heads = 2, vocab = 8 }
[data]
source = "NAME:pictures"
options = { folder = "FOLDER", sequence = 8 }
[batch]
global_size = 8
microbatches = 4
[train]
steps = 3
evaluate = false
"""
_NUMBERS = itertools.count()


def job_in(folder: Path, *overrides: str, function: str = "pictures") -> Job:
    """Open such a job in a folder, with a source that no rank has imported yet."""
    name = f"failing_pictures_{next(_NUMBERS)}"
    (folder / f"{name}.py").write_text(SOURCE)
    text = JOB.replace("NAME:pictures", f"{name}:{function}").replace("FOLDER", str(folder))
    (folder / "job.toml").write_text(text)
    return open_job(folder / "job.toml", overrides)


def read(_: RankPlace, job: Job, samples: list[int]) -> tuple[list[Any], list[str]]:
    """Read samples for the encoder through workers; return the tensors or the error of each, and the warnings."""
    found: list[Any] = []
    warned: list[str] = []
    with open_ahead(job, warned.append) as ahead:
        assert ahead is not None
        ahead.expect((SampleLoad(sample_id, "eyes", 1),) for sample_id in samples)
        for sample_id in samples:
            try:
                found.append({name: of.clone() for name, of in ahead.load(sample_id, "eyes").items()})
            except Exception as error:
                found.append(error)
    return found, warned
