"""A script as users write it: fits models of many kinds in float64, and writes what became of them.

    python fit_models.py OUTPUT BATCH_SIZE [NAME ...]

It is the same alone and as one of several workers (python -m trainer.script).
"""

import json
import sys
from pathlib import Path

import keras_models

from trainer import evaluate, fit, is_chief
from trainer.config import TrainConfig
from trainer.runtime import keras


def fit_models(names, batch_size, config=None, examples=keras_models.EXAMPLES):
    """Returns the history and the variables of each model after two epochs."""
    keras_models.EXAMPLES = examples
    for setting in (keras.config.set_floatx, keras.config.set_dtype_policy):
        setting("float64")
    results = {}
    for name in names or keras_models.MODELS:
        model, data, options = keras_models.make(keras_models.MODELS[name])
        history = fit(
            model,
            data,
            validation_data=data,
            epochs=2,
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            config=config or TrainConfig(),
            **options,
        )
        measured = evaluate(
            model, data, batch_size=batch_size, verbose=0, config=config or TrainConfig()
        )
        results[name] = {
            "history": history.history | measured,
            "variables": {
                # Not by path: that counts the layers of the models before.
                f"{number} {variable.name}": variable.numpy().ravel().tolist()
                for number, variable in enumerate(model.variables)
            },
        }
    return results


if __name__ == "__main__":
    output, batch_size, *names = sys.argv[1:]
    results = fit_models(names, int(batch_size))
    if is_chief():
        Path(output).write_text(json.dumps(results))
