from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.diagnosis import examination
from trainer.diagnosis.examination import examine, failures

if TYPE_CHECKING:
    from trainer.diagnosis.finding import Finding


def test_an_error_that_ends_several_checks_is_reported_once(tmp_path, monkeypatch):
    wrong = {"TF_CONFIG": '{"cluster": 3}', "KERAS_HOME": str(tmp_path)}

    def start(config, *, job):
        # As the strategy finds it in a process of its own.
        first = next(finding for finding in found if finding.check == "workers")
        return {"strategy": {"error": first.seen}, "data": {"error": "Expected an image."}}

    monkeypatch.setattr(examination.probe, "start", start)
    found: list[Finding] = []
    for finding in examine(TrainConfig(output_dir=tmp_path), wrong):
        found.append(finding)
    assert failures(found) == ["workers", "data"]
