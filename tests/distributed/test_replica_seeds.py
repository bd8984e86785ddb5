"""Finding layers and their random numbers wherever a model keeps them."""

import pytest

from trainer.distributed.replica_seeds import all_layers, separate_seeds
from trainer.runtime import keras


class Branches(keras.layers.Layer):
    """Keeps layers in a list, a dictionary, a tuple and a set."""

    def __init__(self):
        super().__init__()
        self.inner = [keras.layers.Dropout(0.5, name="in_list")]
        self.named = {"a": [keras.layers.Dropout(0.5, name="in_dictionary")]}
        self.pair = (keras.layers.Dropout(0.5, name="in_tuple"), 1)
        self.some = {keras.layers.Dropout(0.5, name="in_set")}
        self.me = self

    def call(self, x):
        return x


def sequence_model():
    return keras.Sequential(
        [
            keras.Input((4, 3)),
            keras.layers.TimeDistributed(keras.layers.Dropout(0.5, name="in_wrapper")),
            keras.layers.Bidirectional(keras.layers.LSTM(2, dropout=0.5, name="in_both")),
        ]
    )


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Branches, {"in_list", "in_dictionary", "in_tuple", "in_set"}),
        (sequence_model, {"in_wrapper", "forward_in_both", "backward_in_both"}),
        (lambda: keras.Sequential([sequence_model()]), {"in_wrapper", "forward_in_both"}),
    ],
)
def test_layers_are_found_wherever_keras_looks_for_them(model, names):
    found = all_layers(model())
    assert names <= {layer.name for layer in found}
    assert len(found) == len({id(layer) for layer in found})


@pytest.mark.parametrize("model", [Branches, sequence_model])
def test_every_random_number_is_a_replicas_own(model):
    model = model()
    separate_seeds(model)
    generators = [
        layer.seed_generator for layer in all_layers(model) if hasattr(layer, "seed_generator")
    ]
    assert generators
    # Of functions, which keras.random.SeedGenerator has in place of its own methods.
    assert not [one for one in generators if hasattr(one.next, "__self__")]
    replaced = [one.next for one in generators]
    separate_seeds(model)
    assert [one.next for one in generators] == replaced
