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


def test_repeated_flags_and_a_file_of_flags(submit, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: filed\nas: jobset\nworkers: 3\nenv: {A: 1}\ntraining: {epochs: 5, seed: 4}\n"
    )
    done = submit.run(
        *("--config", "run.yaml", "--dry-run", "--name", "mine"),
        *("--env-from-secret", "one", "--env-from-secret=two", "--", "--epochs", 3),
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = by_name(yaml.safe_load_all(done.stdout))
    chief, workers = found["JobSet", "mine"]["spec"]["replicatedJobs"]
    assert workers["template"]["spec"]["completions"] == 2
    for job in (chief, workers):
        trainer = job["template"]["spec"]["template"]["spec"]["containers"][0]
        assert trainer["args"][-6:] == ["--epochs", "5", "--seed", "4", "--epochs", "3"]
        assert {"name": "A", "value": "1"} in trainer["env"]
        assert trainer["envFrom"] == [{"secretRef": {"name": name}} for name in ("one", "two")]


def test_a_script_and_the_modules_it_imports_go_with_the_run(submit, tmp_path):
    (tmp_path / "train.py").write_text("import network\n")
    (tmp_path / "network.py").write_text("layers = 3\n")
    flags = ("--dry-run", "--name", "mine", "--module", "network.py")
    done = submit.run(*flags, "--", "train.py", "--lr", 0.1)
    found = by_name(yaml.safe_load_all(done.stdout))
    assert found["ConfigMap", "mine-modules"]["data"] == {
        "network.py": "layers = 3\n",
        "train.py": "import network\n",
    }
    assert container(found["Job", "mine"])["args"][-3:] == ["/modules/train.py", "--lr", "0.1"]


@pytest.mark.parametrize(
    ("flags", "code", "part"),
    [
        (["--config", "none.yaml"], 66, "none.yaml"),
        (["--config", "list.yaml"], 2, "config must be"),
        (["--config", "wrong.yaml"], 2, "Unrecognized options: --worker"),
        (["--patch", "none.yaml", "--dry-run"], 66, "none.yaml"),
        (["--module", "none.py"], 66, "none.py"),
        (["--module", "list.yaml"], 2, "Expected a Python file"),
        (["--", "none.py"], 66, "Expected a Python script at none.py"),
        (["--env", "A"], 2, "env must be NAME=VALUE. Received: env='A'"),
        (["--queue", "q", "--workers", 2], 2, "Use --as jobset"),
        (["--as", "deployment"], 2, "--as"),
    ],
)
def test_what_a_run_is_made_of_is_checked_before_anything_is_started(
    submit, tmp_path, flags, code, part
):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "wrong.yaml").write_text("worker: 1\n")
    assert_refused(submit.run(*flags), code, part)
