"""Independent dropout masks on every replica.

    separate_seeds(model)

It must be called before the training step is traced.
"""

from collections.abc import Callable
from typing import TypeVar

from trainer.runtime import keras, tf

Found = TypeVar("Found")

_SEED_STRIDE = 0x9E3779B9  # 2**32 divided by the golden ratio: far apart for any few replicas


def separate_seeds(model: keras.Model) -> None:
    """Makes every replica draw its own random numbers in the model's layers (dropout masks).

    Keras mirrors the state of a layer's ``SeedGenerator``, so all replicas would drop the same
    units of their slices of a batch. Here each replica adds a multiple of its number to the seed
    that it draws. The state, and so what a checkpoint holds, stays the same on all replicas, the
    layers stay stock Keras layers, and replica 0 draws what a single device would.

    Args:
        model: Any Keras model; layers inside layers are found, too. A second call changes
            nothing.
    """
    for generator in _tracked(model, keras.random.SeedGenerator):
        if not isinstance(generator.next, _ReplicaSeed):
            generator.next = _ReplicaSeed(generator.next)


def all_layers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns a layer or model, and the layers in it: those that it or they have as attributes, or
    in lists, tuples, sets and dictionaries, which is where Keras looks for them, too.
    """
    return _tracked(layer, keras.Layer)


def _tracked(layer: keras.Layer, kind: type[Found]) -> list[Found]:
    found: dict[int, Found] = {}
    seen: set[int] = set()
    waiting: list[object] = [layer]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, kind):
            found[id(value)] = value
        if isinstance(value, keras.Layer):
            waiting.extend(reversed(list(vars(value).values())))
        elif isinstance(value, dict):
            waiting.extend(reversed(list(value.values())))
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(reversed(list(value)))
    return list(found.values())


class _ReplicaSeed:
    """Replaces ``SeedGenerator.next`` of one generator.

    Args:
        draw: The generator's own ``next``.
    """

    def __init__(self, draw: Callable[[bool], tf.Tensor]) -> None:
        self.draw = draw

    def __call__(self, ordered: bool = True) -> tf.Tensor:
        seed = self.draw(ordered)
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return seed
        number = tf.cast(replica.replica_id_in_sync_group, seed.dtype)
        return seed + tf.stack([number * _SEED_STRIDE, tf.zeros_like(number)])
