"""Patches of the objects of a run, by the kubectl that is installed."""

import shutil

import pytest

from trainer.errors import ConfigurationError, UsageError
from trainer.k8s import objects
from trainer.k8s.patches import apply_patches
from trainer.k8s.settings import PodSettings

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not on the PATH")

SIDECAR = """
kind: Job
spec:
  template:
    metadata:
      annotations: {example.com/scrape: "yes"}
    spec:
      containers:
      - name: trainer
        env:
        - {name: EXTRA, value: "1"}
      volumes:
      - {name: tmp, $patch: delete}
"""


def build(**options):
    kind = options.pop("kind", "job")
    return objects.build("mine", PodSettings(**options), kind=kind)


def templates(built):
    for one in built:
        if one["kind"] == "Job":
            yield one["spec"]["template"]
        for replicated in one["spec"].get("replicatedJobs", ()):
            yield replicated["template"]["spec"]["template"]


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_lists_are_merged_by_their_keys_in_every_job(kind):
    built = build(workers=2, kind=kind)
    before = list(templates(built))
    after = list(templates(apply_patches(built, SIDECAR)))
    assert len(after) == 2
    for old, new in zip(before, after, strict=True):
        assert new["metadata"]["annotations"] == {"example.com/scrape": "yes"}
        assert new["metadata"]["labels"] == old["metadata"]["labels"]
        (container,) = new["spec"]["containers"]
        assert container["image"] == old["spec"]["containers"][0]["image"]
        names = [one["name"] for one in container["env"]]
        assert "EXTRA" in names
        assert set(names) > {one["name"] for one in old["spec"]["containers"][0]["env"]}
        volumes = {one["name"] for one in new["spec"]["volumes"]}
        assert volumes == {one["name"] for one in old["spec"]["volumes"]} - {"tmp"}


def test_a_patch_with_a_name_is_for_that_object_alone():
    patch = "kind: Job\nmetadata: {name: mine-workers}\nspec: {backoffLimit: 9}\n"
    jobs = [one for one in apply_patches(build(workers=2), patch) if one["kind"] == "Job"]
    assert {one["metadata"]["name"]: one["spec"]["backoffLimit"] for one in jobs} == {
        "mine": 4,
        "mine-workers": 9,
    }


def test_several_patches_and_other_kinds():
    patch = (
        "kind: PersistentVolumeClaim\nspec: {accessModes: [ReadWriteMany]}\n---\n"
        "kind: JobSet\nmetadata: {annotations: {a: b}}\n"
    )
    found = {one["kind"]: one for one in apply_patches(build(workers=2, kind="jobset"), patch)}
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert found["JobSet"]["metadata"]["annotations"] == {"a": "b"}
    assert len(found["JobSet"]["spec"]["replicatedJobs"]) == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("kind: [", "YAML"),
        ("spec: {}", "with its kind"),
        ("- kind: Job", "with its kind"),
        ("kind: Deployment", "Deployment of any name"),
        ("kind: Job\nmetadata: {name: other}", "Job of other"),
        ("kind: Job\nspec: {template: {spec: {containers: [{image: a}]}}}", "kubectl applies to"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(text, part):
    with pytest.raises(UsageError, match="Received") as caught:
        apply_patches(build(), text)
    assert part in str(caught.value)


def test_without_kubectl_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="Install kubectl"):
        apply_patches(build(), SIDECAR)
