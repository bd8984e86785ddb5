"""What survives when the power fails in the middle of a run."""

import pytest
from disks import cut, make, mounted, needs_mount
from support import TIMEOUT, Pause, outcome

RUN = ("--epochs", 2, "--train-limit", 384, "--test-limit", 100, "--threads", 1, "--no-report")
EAGER = (*RUN, "--steps-per-execution", 1, "--checkpoint-every", 1, "--keep-checkpoints", 1)
# After a step, its checkpoint is the only one; before a checkpoint is put on disk, the one before.
POINTS = [
    {"after_step": (1, 1)},
    {"calling": "trainer.training.checkpoint:_put_on_disk", "call": 2},
    {"after_step": (1, 2)},
    {"after_step": (2, 0)},
    {"calling": "trainer.training.checkpoint:_put_on_disk", "call": 5},
    {"after_step": (2, 2)},
]


@needs_mount
@pytest.mark.full
def test_after_a_power_cut_the_run_goes_on_with_the_same_bits(command, tmp_path):
    image = tmp_path / "disk.img"
    make(image, 300)
    pauses = [Pause(folder=tmp_path / f"at-{n}", **point) for n, point in enumerate(POINTS)]
    copies = [tmp_path / f"cut-{n}.img" for n in range(len(POINTS))]
    with mounted(image, tmp_path / "disk") as disk:
        run = command.start(*EAGER, "--output-dir", disk / "out", hooks=pauses)
        for pause, copy in zip(pauses, copies, strict=True):
            pause.wait(run)
            cut(image, copy)
            pause.go()
        _, stderr = run.communicate(timeout=TIMEOUT)
        assert run.returncode == 0, stderr
        undisturbed = outcome(disk / "out")
    for copy in copies:
        with mounted(copy, tmp_path / copy.stem) as disk:
            done = command.run(*EAGER, "--resume", "must", "--output-dir", disk / "out")
            assert (done.returncode, done.stderr) == (0, ""), copy.name
            assert outcome(disk / "out") == undisturbed, copy.name
