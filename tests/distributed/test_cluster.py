"""Every way to describe workers, and every way to get it wrong, with its message."""

import json
import string

import pytest
from support import fuzz

from trainer.distributed.cluster import Cluster, resolve, split_address, worker_index
from trainer.errors import ConfigurationError


def tf_config(cluster, task=None):
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task or {}})}


def indexed(index, hosts="digits-{index}.digits", workers="3", **variables):
    return {
        "TRAINER_WORKERS": workers,
        "TRAINER_HOSTS": hosts,
        "JOB_COMPLETION_INDEX": index,
        **variables,
    }


TWO = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    ("environ", "workers", "index"),
    [
        (tf_config(TWO, {"type": "worker", "index": 0}), ("a:1", "b:2"), 0),
        (tf_config(TWO, {"type": "worker", "index": "1"}), ("a:1", "b:2"), 1),
        (
            tf_config({"chief": ["c:1"], **TWO}, {"type": "worker", "index": 1}),
            ("c:1", "a:1", "b:2"),
            2,
        ),
        (
            tf_config({"worker": ["a:1"], "chief": ["c:1"]}, {"type": "chief", "index": 0}),
            ("c:1", "a:1"),
            0,
        ),
        (
            tf_config({"worker": ["[::1]:1", "[::1]:2"]}, {"type": "worker", "index": 0}),
            ("[::1]:1", "[::1]:2"),
            0,
        ),
        (
            indexed("2"),
            ("digits-0.digits:2222", "digits-1.digits:2222", "digits-2.digits:2222"),
            2,
        ),
        (
            indexed(
                "0", "chief-{index}.d, w-{index}.d", TRAINER_INDEX_OFFSET="1", TRAINER_PORT="9"
            ),
            ("chief-0.d:9", "w-0.d:9", "w-1.d:9"),
            1,
        ),
        (indexed("0", "chief.d,w.d", workers="2"), ("chief.d:2222", "w.d:2222"), 0),
        (
            indexed("1", "chief.d,w-{index}.d", workers="1+2", TRAINER_INDEX_OFFSET="1"),
            ("chief.d:2222", "w-0.d:2222", "w-1.d:2222"),
            2,
        ),
        (indexed("1", "[2001:db8::{index}]"), tuple(f"[2001:db8::{i}]:2222" for i in range(3)), 1),
        (tf_config({**TWO, "ps": []}, {"type": "worker", "index": 1}), ("a:1", "b:2"), 1),
        (
            tf_config({"master": ["c:1"], "worker": ["a:1"]}, {"type": "master", "index": 0}),
            ("c:1", "a:1"),
            0,
        ),
        # As Kubeflow's TFJob writes it.
        (
            {
                "TF_CONFIG": json.dumps(
                    {
                        "cluster": {
                            "chief": ["digits-chief-0.research.svc:2222"],
                            "worker": ["digits-worker-0.research.svc:2222"],
                        },
                        "task": {"type": "worker", "index": 0},
                        "environment": "cloud",
                    }
                )
            },
            ("digits-chief-0.research.svc:2222", "digits-worker-0.research.svc:2222"),
            1,
        ),
        # TF_CONFIG is the one that counts where both are there.
        (
            {**indexed("2"), **tf_config(TWO, {"type": "worker", "index": 1})},
            ("a:1", "b:2"),
            1,
        ),
    ],
)
def test_workers_are_found(environ, workers, index):
    cluster = resolve(environ)
    assert (cluster.workers, cluster.index) == (workers, index)
    assert cluster.is_chief == (index == 0)
    assert resolve({"TF_CONFIG": cluster.tf_config}) == cluster


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"TF_CONFIG": "{}"},  # what TensorFlow takes it for where it is not set
        {"TF_CONFIG": '{"cluster": {}}'},
        {"TF_CONFIG": "{}", "TRAINER_WORKERS": "2"},
        {"JOB_COMPLETION_INDEX": "3"},  # an Indexed Job whose pods do not train together
        tf_config({"worker": ["a:1"]}, {"type": "worker", "index": 0}),
        tf_config({"chief": ["a:1"]}, {"type": "chief", "index": 0}),
        indexed("0", workers="1"),
        {"TRAINER_WORKERS": "1", "TRAINER_HOSTS": "localhost"},
    ],
)
def test_one_is_alone(environ):
    assert resolve(environ) is None


TASK = {"type": "worker", "index": 0}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"TF_CONFIG": ""}, "TF_CONFIG: expected JSON. Received: ''"),
        ({"TF_CONFIG": "{worker"}, "TF_CONFIG: expected JSON. Received: '{worker'"),
        ({"TF_CONFIG": "[]"}, "expected an object with cluster and task. Received: []"),
        ({"TF_CONFIG": "3"}, "expected an object with cluster and task. Received: 3"),
        ({"TF_CONFIG": "[" * 100_000}, "TF_CONFIG: expected JSON. Received: '[["),
        ({"TF_CONFIG": '{"task": {}}'}, "expected cluster to be an object like"),
        (tf_config(["a:1"]), "expected cluster to be an object like"),
        (tf_config({"worker": []}, TASK), "of one of the jobs . Received"),
        (tf_config({"worker": {}}, TASK), "cluster.worker to be a list of addresses. Received: {}"),
        (tf_config({"worker": "a:1"}, TASK), "to be a list of addresses. Received: 'a:1'"),
        (
            tf_config({"worker": ["a:1", 2]}, TASK),
            "addresses like host:2222, or [2001:db8::1]:2222. Received: 2",
        ),
        (tf_config({"worker": ["a:1", "b"]}, TASK), "Received: 'b'"),
        (tf_config({"worker": ["a:1", ":2"]}, TASK), "Received: ':2'"),
        (tf_config({"worker": ["a:1", "b:0"]}, TASK), "Received: 'b:0'"),
        (tf_config({"worker": ["a:1", "b:65536"]}, TASK), "Received: 'b:65536'"),
        (tf_config({"worker": ["a:1", "http://b:2"]}, TASK), "Received: 'http://b:2'"),
        (
            tf_config({"worker": ["a:1", "b:2", "a:1"]}, TASK),
            "an address of its own for every worker. Received: 'a:1' twice",
        ),
        (tf_config({"chief": ["a:1"], "worker": ["a:1"]}, TASK), "Received: 'a:1' twice"),
        (
            tf_config({"chief": ["a:1", "b:1"]}, {"type": "chief", "index": 1}),
            "expected one chief. Received: 2. Name the others as workers.",
        ),
        (tf_config({**TWO, "ps": ["c:1"]}, TASK), "Received: 'ps'. There are no parameter servers"),
        (tf_config({**TWO, "evaluator": ["c:1"]}, TASK), "'evaluator'. All workers evaluate"),
        (tf_config({**TWO, "leader": ["c:1"]}, TASK), "the jobs chief and worker. Received: 'lead"),
        (
            tf_config({"chief": ["c:1"], "master": ["m:1"], **TWO}, TASK),
            "expected one chief. Received: 2. Name the others as workers.",
        ),
        # Kubeflow's TFJob gives its evaluator the cluster of the others.
        (
            tf_config({"chief": ["c:1"], **TWO}, {"type": "evaluator", "index": 0}),
            "All workers evaluate: leave the evaluator out",
        ),
        *(
            (tf_config({"worker": ["a:1", address]}, TASK), f"Received: '{address}'")
            for address in (
                *("::1:2222", "[::1:2222", "[a]:2222", "[]:2222", "a b:2222", "a@b:2222"),
                *("b:\uff12", "b:+2", "b:123456"),
            )
        ),
        (tf_config(TWO, {"type": ["worker"], "index": 0}), "of one of the jobs worker. Received:"),
        (tf_config(TWO, {"type": "worker", "index": "1" * 5000}), "for worker. Received: '111"),
        ({"TF_CONFIG": json.dumps({"cluster": TWO})}, "expected task to be an object like"),
        (tf_config(TWO), "expected task to be an object like"),
        (tf_config(TWO, ["worker", 0]), "expected task to be an object like"),
        (tf_config(TWO, {"index": 0}), "of one of the jobs worker. Received: {'index': 0}"),
        (tf_config(TWO, {"type": "chief", "index": 0}), "of one of the jobs worker. Received:"),
        (tf_config(TWO, {"type": "ps", "index": 0}), "of one of the jobs worker. Received:"),
        (tf_config(TWO, {"type": "worker"}), "task.index from 0 to 1, for worker. Received: None"),
        (tf_config(TWO, {"type": "worker", "index": 2}), "for worker. Received: 2"),
        (tf_config(TWO, {"type": "worker", "index": -1}), "for worker. Received: -1"),
        (tf_config(TWO, {"type": "worker", "index": 0.5}), "for worker. Received: 0.5"),
        (tf_config(TWO, {"type": "worker", "index": "x"}), "for worker. Received: 'x'"),
        (tf_config(TWO, {"type": "worker", "index": True}), "for worker. Received: True"),
        (indexed("0", workers="0"), "TRAINER_WORKERS to be a whole number of at least 1. Received"),
        (indexed("0", workers="two"), "TRAINER_WORKERS to be a whole number of at least 1."),
        (indexed("0", workers="1+"), "TRAINER_WORKERS to be a whole number of at least 1."),
        (indexed("0", TRAINER_PORT="99999"), "TRAINER_PORT to be a whole number from 1 to 65535."),
        (indexed("x"), "JOB_COMPLETION_INDEX to be a whole number of at least 0. Received: 'x'."),
        (
            {"TRAINER_WORKERS": "2", "TRAINER_HOSTS": "a-{index}"},
            "Received: nothing. Kubernetes sets it in a Job with completionMode: Indexed.",
        ),
        (indexed("3"), "a worker's number from 0 to 2. Received: 3"),
        (indexed("2", TRAINER_INDEX_OFFSET="1"), "a worker's number from 0 to 2. Received: 3"),
        (indexed("0", TRAINER_INDEX_OFFSET="-1"), "TRAINER_INDEX_OFFSET to be a whole number"),
        (indexed("0", ""), "Expected TRAINER_HOSTS to be one pattern or two"),
        (indexed("0", "digits"), "Expected TRAINER_HOSTS to be one pattern or two"),
        (indexed("0", "a-{index},b"), "Expected TRAINER_HOSTS to be one pattern or two"),
        (indexed("0", "a,b-{index},c-{index}"), "TRAINER_HOSTS to be one pattern or two"),
        (indexed("0", "a-0,a-{index}"), "TRAINER_HOSTS: expected an address of its own for every "),
        (indexed("0", "::{index}"), "TRAINER_HOSTS: expected addresses like host:2222, or [2001:"),
        (indexed("0", TRAINER_PORT="9" * 5000), "TRAINER_PORT to be a whole number from 1 to"),
    ],
)
def test_a_malformed_description_is_named(environ, message):
    with pytest.raises(ConfigurationError) as refused:
        resolve(environ)
    assert message in str(refused.value)
    assert refused.value.exit_code == 78


def test_an_address_is_split():
    assert split_address("localhost:1") == ("localhost", 1)


def test_the_command_refuses_it_in_one_line(command):
    command.env["TF_CONFIG"] = "[]"
    done = command.run()
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr.startswith(
        "python -m trainer.task: error: TF_CONFIG: expected an object with"
    )
    assert done.stderr.count("\n") == 1
    assert list(command.folder.iterdir()) == []


VARIABLES = (
    *("TRAINER_WORKERS", "TRAINER_HOSTS", "TRAINER_INDEX_OFFSET", "TRAINER_PORT"),
    *("JOB_COMPLETION_INDEX", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
)


@pytest.mark.parametrize("examples", [200, pytest.param(5_000, marks=pytest.mark.full)])
def test_any_environment_describes_workers_or_is_refused_in_one_line(examples):
    from hypothesis import strategies as st

    names = st.sampled_from(["cluster", "task", "type", "index", "chief", "master", "worker", "ps"])
    scalars = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=8)
    usual = st.sampled_from(["a:1", "b:2", "[::1]:3", "::1:4", "chief", "worker", "evaluator", "0"])
    values = st.recursive(
        scalars | usual,
        lambda value: st.lists(value, max_size=3) | st.dictionaries(names, value, max_size=3),
        max_leaves=12,
    )
    addresses = st.lists(usual, max_size=3)
    config = st.fixed_dictionaries(
        {
            "cluster": st.dictionaries(names, addresses | values, max_size=3),
            "task": st.fixed_dictionaries({"type": usual | values, "index": st.integers(-1, 3)}),
        }
    )
    texts = st.sampled_from(["0", "1", "2", "1+1", "2(x2)", "n[1-2]", "n[1", "a{index}", "a,b"])
    texts |= st.text("01259-+,()[]{}x" + string.ascii_lowercase, max_size=8)
    environments = st.dictionaries(st.sampled_from(VARIABLES), texts) | st.builds(
        lambda text: {"TF_CONFIG": text},
        st.text() | st.builds(json.dumps, config | values, indent=st.none() | st.just(1)),
    )

    def resolve_or_refuse(environ: dict[str, str]) -> None:
        try:
            cluster = resolve(environ)
        except ConfigurationError as error:
            text = str(error)
            assert text.isprintable()
            assert len(text) < 1000
            return
        if cluster is not None:
            assert 0 <= cluster.index < len(cluster.workers) > 1
            assert resolve({"TF_CONFIG": cluster.tf_config}) == cluster

    fuzz(examples, resolve_or_refuse, environments)


def test_a_worker_knows_its_number_without_the_secret():
    tf_config = Cluster(("a:1", "b:2"), 1).tf_config
    environ = {"TF_CONFIG": tf_config, "TRAINER_TOKEN_FILE": "/nowhere"}
    assert worker_index(environ) == 1
    with pytest.raises(ConfigurationError, match="TRAINER_TOKEN_FILE"):
        resolve(environ)
    assert worker_index({"TF_CONFIG": "{"}) == 0
