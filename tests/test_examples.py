"""The examples, and scripts as Keras' own examples are with one line rewritten, as two workers:
they end with the same bits whether or not a worker was killed.
"""

import os
import signal
import subprocess
import sys

import pytest
from support import ROOT, TIMEOUT, Pause, children

STEPS = 'config=trainer.TrainConfig(steps_per_execution=1, checkpoint_every="20")'
END = """
import hashlib
weights = [*model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables)]
print("digest", hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest())
print("history", sorted(model.history.history.items()), flush=True)
"""


def rewritten(text):
    """Returns a script of Keras' in which one line, that of model.fit, is trainer.fit's."""
    lines = text.splitlines()
    (number,) = (n for n, line in enumerate(lines) if line.startswith("model.fit("))
    lines[number] = lines[number].replace(
        "model.fit(x_train, y_train, ",
        f'trainer.fit(model, (x_train, y_train), verbose=0, output_dir="out", {STEPS}, ',
    )
    return "\n".join([*lines[:number], "import trainer", *lines[number:], END])


def example(text):
    """Returns an example that saves its position often."""
    assert "output_dir=" in text
    return text.replace("output_dir=", f"verbose=0, {STEPS}, output_dir=") + END


def script_and_end(path, change):
    return pytest.param(path, change, id=path.stem)


SCRIPTS = [
    *(script_and_end(path, rewritten) for path in sorted((ROOT / "tests/keras_scripts").iterdir())),
    *(
        script_and_end(ROOT / "examples" / f"{name}.py", example)
        for name in ("digits", "fine_tuning", "two_inputs")
    ),
]


def lines(stdout, worker):
    start = f"[{worker}] "
    return [line.removeprefix(start) for line in stdout.splitlines() if line.startswith(start)]


@pytest.mark.full
@pytest.mark.parametrize(("path", "change"), SCRIPTS)
def test_a_script_survives_the_loss_of_a_worker(command, tmp_path, path, change):
    pictures = tmp_path / "pictures"
    make = [sys.executable, ROOT / "examples" / "make_pictures.py", pictures]
    subprocess.run(make, check=True)
    results = []
    for name, kills in (("undisturbed", False), ("killed", True)):
        command.folder = tmp_path / name
        command.folder.mkdir()
        (command.folder / "train.py").write_text(change(path.read_text()))
        command.program = ["-m", "trainer.launch", "--max-restarts", "1", "--"]
        at = (2, 2) if "epochs" in path.read_text() else (1, 30)
        pause = Pause(folder=tmp_path / "pause", worker=1, after_step=at if kills else (99, 1))
        launch = command.start("train.py", pictures, hooks=[pause])
        if kills:
            pause.wait(launch)
            os.kill(children(children(launch.pid)[1])[0], signal.SIGKILL)
            pause.go()
        stdout, stderr = launch.communicate(timeout=TIMEOUT)
        assert launch.returncode == 0, stderr
        assert ("Resuming the unfinished run" in stdout) == kills
        ends = [lines(stdout, worker)[-2:] for worker in (0, 1)]
        assert ends[0] == ends[1]
        assert [end.split()[0] for end in ends[0]] == ["digest", "history"]
        results.append((ends[0], sorted(file.name for file in command.folder.iterdir())))
    assert results[0] == results[1]
