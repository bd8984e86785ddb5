"""``python -m trainer.submit`` without a cluster; ``tests/cluster`` has the rest."""

import json

import pytest
import yaml


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


def test_a_dry_run_prints_what_kubectl_takes(submit, tmp_path):
    done = submit.run(
        *("--dry-run", "--name", "mine", "--workers", 3, "--namespace", "research"),
        *("--", "--data", "keras", "--epochs", 4),
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = by_name(yaml.safe_load_all(done.stdout))
    assert container(found["Job", "mine"])["args"][-2:] == ["--epochs", "4"]
    assert all(one["metadata"]["namespace"] == "research" for one in found.values())
    assert len(found["Secret", "mine-token"]["stringData"]["token"]) == 64
    # Keras downloads it.
    egress = found["NetworkPolicy", "mine"]["spec"]["egress"]
    assert {"port": 443} in [port for rule in egress for port in rule.get("ports", [])]
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
        (["--attach", "mine", "--", "--epochs", 3], "the run has started"),
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
