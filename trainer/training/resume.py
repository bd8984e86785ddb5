"""Which checkpoint a run resumes: the newest readable one of the same, unfinished run.

    position, manifest = resume(checkpoints, model, manifest, policy="auto", ...)

Worker 0 reads the checkpoint, and broadcasts it to the others.
"""

import dataclasses
import json
from collections.abc import Callable

import numpy as np

from trainer.config import Resume, may_differ_fields
from trainer.distributed.collectives import Workers
from trainer.errors import ConfigurationError, DataError, InputError, TrainerError
from trainer.runtime import keras, tf
from trainer.training.checkpoint import Checkpoints, variables_of
from trainer.training.manifest import RunManifest
from trainer.training.position import Position


def resume(
    checkpoints: Checkpoints,
    model: keras.Model,
    manifest: RunManifest,
    *,
    policy: Resume,
    finished_run: str | None,
    workers: Workers,
    notify: Callable[[str], None],
) -> tuple[Position, RunManifest]:
    """Restores model and optimizer from the newest readable checkpoint of the unfinished run;
    leaves them as they are where there is none.

    Args:
        checkpoints: Those in the output folder, which track the model.
        model: Built and compiled.
        manifest: The manifest of the new run.
        policy: As ``TrainConfig.resume``. In a Kubernetes Job ``never`` does not discard what
            another pod of the same Job has saved.
        finished_run: Identity of the run that the files in the output folder are of, if any.
        workers: The workers of the run. All of them call this together; worker 0 alone reads the
            folder, and broadcasts what it has restored.
        notify: Called with each sentence for the user.

    Returns:
        The position to resume from, and the manifest with the identity of the run it belongs to.

    Raises:
        ConfigurationError: The unfinished run has another configuration or other data.
        DataError: ``policy`` is ``must``, and no checkpoint can be read.
        InputError: ``policy`` is ``must`` and there is nothing to resume.
        OutputError: There is a checkpoint of another program, which this run would replace.
    """
    resumed = None
    if workers.index == 0:
        checkpoints.check_ours()
        checkpoints.delete_unfinished()
        if policy == "never" and not manifest.job:
            checkpoints.delete_all()
        resumed = _restore_newest(checkpoints, manifest, policy, finished_run, notify)
        if resumed is None and policy == "must":
            raise InputError(
                f"Expected an unfinished run to resume in {checkpoints.folder}. Received: none. "
                "Use resume='auto' to start one."
            )
    if workers.count > 1:
        resumed = _broadcast(resumed, model, checkpoints, workers)
    if resumed is None:
        return Position(), manifest
    return Position(**resumed["position"]), dataclasses.replace(manifest, run=resumed["run"])


def _restore_newest(
    checkpoints: Checkpoints,
    manifest: RunManifest,
    policy: Resume,
    finished_run: str | None,
    notify: Callable[[str], None],
) -> dict | None:
    """Returns the state of the checkpoint that was restored; None where there is none."""
    paths = checkpoints.newest_first()
    for path in paths:
        try:
            state = checkpoints.read_state(path)
            if is_obsolete(state, manifest, policy=policy, finished_run=finished_run):
                checkpoints.delete_all()
                return None
            check_same_run(state, manifest, where=str(checkpoints.folder))
            checkpoints.restore(path)
        except TrainerError:
            raise
        except (OSError, tf.errors.PermissionDeniedError) as error:  # It need not be damaged.
            raise InputError(
                f"Expected to read the checkpoint {path}. Received: {' '.join(str(error).split())}."
                " Make it readable, or use resume='never' to start anew."
            ) from error
        except Exception as error:  # TensorFlow and JSON have one for each kind of damage.
            checkpoints.set_unreadable(path)
            reason = " ".join(str(error).split())[:200]
            notify(f"The checkpoint {path} cannot be read ({reason}): trying the one before")
            continue
        if changes := changed_environment(state, manifest):
            notify(
                "The run is resumed, but its last bits will differ from those of an uninterrupted "
                f"one: {', '.join(changes)}"
            )
        notify(
            f"Resuming the unfinished run in {checkpoints.folder} at "
            f"{Position(**state['position'])}"
        )
        return state
    if paths and policy == "must":
        raise DataError(
            f"Expected a readable checkpoint in {checkpoints.folder}. Received: {len(paths)}, all "
            "damaged. Use resume='auto' to start anew."
        )
    if paths:
        notify(f"No checkpoint in {checkpoints.folder} can be read: the run starts anew")
    return None


def is_obsolete(
    state: dict, manifest: RunManifest, *, policy: Resume, finished_run: str | None
) -> bool:
    """Tells whether a checkpoint is to be deleted: it is of a run that has finished, and was killed
    before it could delete it; or of one that is to start anew, unless another pod of the same Job
    has done so already.
    """
    if state["run"] == finished_run:
        return True
    return policy == "never" and state.get("job") != manifest.job


def check_same_run(state: dict, manifest: RunManifest, *, where: str) -> None:
    """Compares the run of a checkpoint with the one that would resume it.

    Settings marked ``MAY_DIFFER`` in ``TrainConfig`` may differ. ``epochs`` may grow, where the
    learning rate is constant; a schedule depends on the number of epochs.

    Raises:
        ConfigurationError: They differ in configuration or data.
    """
    theirs, ours = state["config"], manifest.config
    may_differ = {"epochs", *may_differ_fields()}
    names = [name for name in ours if name not in may_differ and name in theirs]
    if theirs["epochs"] > ours["epochs"] or theirs.get("schedule", "constant") != "constant":
        names.append("epochs")
    differences = [
        f"{name}={ours[name]!r} where it has {name}={theirs[name]!r}"
        for name in names
        if ours[name] != theirs[name] and name != "model"
    ]
    if ours.get("model") != theirs.get("model", ours.get("model")):  # A name; of fit, a digest.
        differences.append("another model or optimizer")
    if manifest.data.get("model_sha256") != state["data"].get("model_sha256"):
        differences.append("another model or optimizer")
    if manifest.data["sha256"] != state["data"]["sha256"]:
        differences.append("other images or labels")
    if differences:
        raise ConfigurationError(
            f"Expected the configuration of the unfinished run in {where}. Received: "
            f"{', '.join(differences)}. Use its settings, or resume='never' to start anew."
        )


def changed_environment(state: dict, manifest: RunManifest) -> list[str]:
    """Describes which versions or settings that affect last bits changed since a checkpoint."""
    changes = []
    for part in ("versions", "environment"):
        ours, theirs = manifest.as_dict()[part], dict(state[part])
        # A checkpoint of an earlier version of this package has not recorded them.
        if (variables := theirs.pop("variables", None)) is not None:
            names = sorted({*variables, *ours["variables"]})
            theirs |= {name: variables.get(name, "not set") for name in names}
            ours |= {name: ours["variables"].get(name, "not set") for name in names}
        changes += [
            f"{name} is {ours.get(name)} and was {value}"
            for name, value in theirs.items()
            if value != ours.get(name)
        ]
    return changes


def _broadcast(
    state: dict | None, model: keras.Model, checkpoints: Checkpoints, workers: Workers
) -> dict | None:
    """Gives the other workers what worker 0 has restored, bit for bit."""
    state = json.loads(workers.broadcast(json.dumps(state).encode()))
    if state is None:
        return None
    variables = [variable for part in variables_of(model).values() for variable in part]
    content = workers.broadcast(b"".join(value.numpy().tobytes() for value in variables))
    if workers.index:
        start = 0
        for variable in variables:
            dtype, shape = variable.dtype.as_numpy_dtype, variable.shape
            value = np.frombuffer(content, dtype, shape.num_elements(), start).reshape(shape)
            variable.assign(value)
            start += value.nbytes
    checkpoints.extra.assign(workers.broadcast(checkpoints.extra.numpy()))
    return state
