"""The kinds of operators, as the API server validates them where their definitions are installed.

Their controllers need not be there: nothing runs.
"""

import pytest
from namespaces import ROOT

DEFINITIONS = {
    "jobset": ["jobsets.jobset.x-k8s.io"],
    "kubeflow": ["trainjobs.trainer.kubeflow.org", "clustertrainingruntimes.trainer.kubeflow.org"],
}


@pytest.mark.parametrize("overlay", DEFINITIONS)
def test_the_api_server_accepts_it(namespace, overlay):
    kinds = namespace.kubectl("get", "customresourcedefinitions", "--output=name")
    for definition in DEFINITIONS[overlay]:
        if definition not in kinds:
            pytest.skip(f"the cluster does not know {definition}")
    check = ("apply", "--dry-run=server", "--validate=strict", "--filename=-")
    text = namespace.kubectl("kustomize", ROOT / "k8s" / overlay)
    objects = text.count("\nkind: ")
    created = "created (server dry run)"
    assert namespace.kubectl(*check, input=text).count(created) == objects
    # It would have said so.
    wrong = text.replace("replicatedJobs:", "replicatedJob:")
    assert wrong != text
    assert namespace.kubectl(*check, input=wrong, check=False).count(created) < objects
