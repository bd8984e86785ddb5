"""The recipes: values for the settings that a configuration leaves at None.

docs/performance.md has the accuracy of each recipe, and how its values were chosen.
"""

# Keras' own defaults, but for Adadelta: Keras 3 has 0.001 there, with which two epochs end at 58%.
# 1.0 is the learning rate of Zeiler (2012), https://arxiv.org/abs/1212.5701, and of the first Keras
# example.
LEARNING_RATES: dict[str, float] = {
    "adadelta": 1.0,
    "adafactor": 0.001,
    "adagrad": 0.001,
    "adam": 0.001,
    "adamax": 0.001,
    "adamw": 0.001,
    "ftrl": 0.001,
    "lamb": 0.001,
    "lion": 0.001,
    "muon": 0.001,
    "nadam": 0.001,
    "rmsprop": 0.001,
    "sgd": 0.01,
}

# By recipe: values for the fields of TrainConfig that are None. A recipe's learning_rate is for its
# own optimizer only.
RECIPES: dict[str, dict] = {
    "default": {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": "adadelta",
        "schedule": "constant",
        "label_smoothing": 0.0,
        "pooling_dropout": 0.25,
        "dense_dropout": 0.5,
        "augment": "none",
    },
    "fast": {
        "epochs": 1,
        "batch_size": 64,
        "optimizer": "adam",
        "learning_rate": 0.004,
        "schedule": "one-cycle",
        "label_smoothing": 0.05,
        "pooling_dropout": 0.0,
        "dense_dropout": 0.3,
        "augment": "none",
    },
    "best": {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": "adam",
        "learning_rate": 0.002,
        "schedule": "one-cycle",
        "label_smoothing": 0.05,
        "pooling_dropout": 0.25,
        "dense_dropout": 0.3,
        "augment": "affine",
    },
}


def learning_rate(recipe: str, optimizer: str) -> float:
    """Returns the learning rate of a recipe for an optimizer: the recipe's own for its optimizer,
    else the optimizer's default.

    >>> learning_rate("fast", "adam"), learning_rate("fast", "sgd")
    (0.004, 0.01)
    """
    values = RECIPES[recipe]
    if optimizer == values["optimizer"]:
        return values.get("learning_rate", LEARNING_RATES[optimizer])
    return LEARNING_RATES[optimizer]
