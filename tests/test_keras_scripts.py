"""Scripts as Keras' own examples are, one line of each rewritten, as two workers: they end with the
same bits whether or not a worker was killed.
"""

import os
import signal

import pytest
from support import ROOT, TIMEOUT, Pause, children

SCRIPTS = sorted(path.stem for path in (ROOT / "tests" / "keras_scripts").glob("*.py"))
STEPS = 'config=trainer.TrainConfig(steps_per_execution=1, checkpoint_every="1")'
END = """
import hashlib
weights = [*model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables)]
print("digest", hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest())
print("history", sorted(model.history.history.items()), flush=True)
"""


def rewritten(text):
    """Returns a script in which one line, that of model.fit, is trainer.fit's."""
    lines = text.splitlines()
    (number,) = (n for n, line in enumerate(lines) if line.startswith("model.fit("))
    lines[number] = lines[number].replace(
        "model.fit(x_train, y_train, ",
        f'trainer.fit(model, (x_train, y_train), verbose=0, output_dir="out", {STEPS}, ',
    )
    # It begins with a docstring.
    return "\n".join([*lines[:number], "import trainer", *lines[number:], END])


def lines(stdout, worker):
    start = f"[{worker}] "
    return [line.removeprefix(start) for line in stdout.splitlines() if line.startswith(start)]


@pytest.mark.full
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_keras_survives_the_loss_of_a_worker(command, tmp_path, name):
    text = (ROOT / "tests" / "keras_scripts" / f"{name}.py").read_text()
    results = []
    for folder, hooks in (("undisturbed", []), ("killed", [2, 2])):
        command.folder = tmp_path / folder
        command.folder.mkdir()
        (command.folder / "train.py").write_text(rewritten(text))
        command.program = ["-m", "trainer.launch", "--max-restarts", "1", "--"]
        pause = Pause(folder=tmp_path / "pause", worker=1, after_step=hooks or (99, 1))
        launch = command.start("train.py", hooks=[pause])
        if hooks:
            pause.wait(launch)
            os.kill(children(children(launch.pid)[1])[0], signal.SIGKILL)
            pause.go()
        stdout, stderr = launch.communicate(timeout=TIMEOUT)
        assert launch.returncode == 0, stderr
        assert ("Resuming the unfinished run" in stdout) == bool(hooks)
        ends = [lines(stdout, worker)[-2:] for worker in (0, 1)]
        assert ends[0] == ends[1]
        results.append((ends[0], sorted(path.name for path in command.folder.iterdir())))
    assert results[0] == results[1]
