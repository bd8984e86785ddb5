"""What ``python -m trainer.submit`` does without a cluster; ``tests/cluster`` has the rest."""

import json
from types import SimpleNamespace

import pytest
import yaml
from support import ROOT

from trainer.k8s import manifests
from trainer.submit import SubmitConfig, _Submitted

ASSETS = ROOT / "trainer" / "k8s" / "assets"


@pytest.fixture
def submit(command):
    command.program = ["-m", "trainer.submit"]
    command.env.pop("KUBECONFIG", None)
    command.env["HOME"] = str(command.home)
    return command


def assert_refused(done, code, *parts):
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    for part in ("python -m trainer.submit: error: ", *parts):
        assert part in done.stderr


def by_name(objects):
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def container(job):
    return job["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({}, "job"),
        ({"gpus": 1}, "gpu"),
        ({"workers": 2}, "multiworker"),
        ({"workers": 2, "gpus": 1}, "multiworker-gpu"),
    ],
)
def test_a_run_with_the_manifests_own_numbers_is_the_manifest(options, file):
    expected = yaml.safe_load_all((ASSETS / f"{file}.yaml").read_text())
    assert by_name(manifests.build("digits", **options)) == by_name(expected)


def test_a_run_has_the_name_image_numbers_and_flags_that_it_is_given():
    objects = manifests.build(
        "mine", image="registry/x:1", workers=5, gpus=2, flags=["--epochs", "3"]
    )
    found = by_name(objects)
    assert set(found) == {
        ("PersistentVolumeClaim", "mine"),
        ("Service", "mine"),
        ("NetworkPolicy", "mine"),
        ("Job", "mine"),
        ("Job", "mine-workers"),
    }
    for name, pods in (("mine", 1), ("mine-workers", 4)):
        job = found["Job", name]
        assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (pods, pods)
        trainer = container(job)
        assert trainer["image"] == "registry/x:1"
        assert trainer["args"][-3:] == ["--gpus=2", "--epochs", "3"]
        assert trainer["resources"]["limits"]["nvidia.com/gpu"] == 2
        environ = {entry["name"]: entry.get("value") for entry in trainer["env"]}
        assert environ["TRAINER_WORKERS"] == "1+4"
        assert environ["TRAINER_HOSTS"] == "mine-{index}.mine,mine-workers-{index}.mine"
    # Not a word of another run is left, the program's own name aside.
    assert "digits" not in manifests.dump(objects).replace("digits-trainer", "")


def test_a_dry_run_prints_what_kubectl_takes(submit, tmp_path):
    done = submit.run(
        *("--dry-run", "--name", "mine", "--workers", 3, "--namespace", "research"),
        *("--", "--epochs", 4),
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = by_name(yaml.safe_load_all(done.stdout))
    assert container(found["Job", "mine"])["args"][-2:] == ["--epochs", "4"]
    assert all(one["metadata"]["namespace"] == "research" for one in found.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--workers", 0], "workers must be at least 1. Received: workers=0"),
        (["--gpus", -1], "gpus must be at least 0"),
        (["--name", "Mine"], "Received: name='Mine'"),
        (["--name", "m" * 41], "at most 40"),
        (["--", "--epoch", 3], "Perhaps you meant --epochs"),
        (["--", "--epochs", 0], "Received: epochs=0"),
        (["--", "--output-dir", "out"], "Expected --output-dir before --"),
        (["--", "--gpus=2"], "Expected --gpus before --"),
        (["--", "--output_dir=out"], "Expected --output-dir before --"),
        (["--attach", "a\\1"], "Received: attach="),
        (["--attach", "mine", "--", "--epochs", 3], "the run has begun"),
    ],
)
def test_usage_is_2_and_asks_no_cluster(submit, flags, part):
    assert_refused(submit.run(*flags), 2, part)


def test_no_kubeconfig_is_78(submit):
    assert_refused(submit.run(), 78, "kubeconfig", "Set KUBECONFIG")


EMPTY = {"apiVersion": "v1", "kind": "Config", "contexts": [], "users": [], "clusters": []}


@pytest.mark.parametrize("config", [json.dumps(EMPTY), "{", "[]", "contexts: 3"])
def test_a_kubeconfig_that_names_no_such_context_is_78(submit, tmp_path, config):
    (tmp_path / "config").write_text(config)
    submit.env["KUBECONFIG"] = str(tmp_path / "config")
    assert_refused(submit.run("--context", "mine"), 78, "kubectl config get-contexts")


def test_an_output_that_cannot_be_written_is_73_before_anything_is_started(submit, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert_refused(submit.run("--output-dir", "out"), 73, "out")


def test_an_installation_without_the_extra_is_78(submit):
    submit.program = [
        "-c",
        "import sys; sys.modules['kubernetes'] = sys.modules['yaml'] = None\n"
        "from trainer.submit import main; sys.exit(main())",
    ]
    assert_refused(submit.run(), 78, "pip install 'digits-trainer[k8s]'")


def test_the_remedies_name_namespace_and_context_as_they_are():
    config = SubmitConfig(context="a-n")
    run = _Submitted(config, SimpleNamespace(namespace="team-north"), "mine", None, None)
    where = "--namespace team-north --context a-n"
    assert run.how_to_come_back == f"python -m trainer.submit --attach mine {where}"
    assert f"pvc {where} -l " in run.how_to_delete
