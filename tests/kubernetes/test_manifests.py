"""The manifests follow the schemas of Kubernetes and of Kubeflow Trainer, with no key that these do not know."""

from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob as TrainJob


MANIFESTS = Path(__file__).parents[2] / "examples/kubernetes"
VERSIONS = ("1.31", "1.37")


def resources(name: str) -> list[dict[str, object]]:
    """The resources of a manifest."""
    return list(yaml.safe_load_all((MANIFESTS / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_indexed_job(version: str) -> None:
    """A service and a job, of old and of new versions of Kubernetes."""
    found = resources("job.yaml")
    assert ["Service", "Job"] == [resource["kind"] for resource in found]
    for resource in found:
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_train_job() -> None:
    """What the types of Kubeflow Trainer keep of it is all of it."""
    (found,) = resources("trainjob.yaml")
    job = TrainJob.from_dict(found)
    assert job is not None
    assert found == job.to_dict()
