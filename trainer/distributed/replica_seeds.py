"""Independent dropout masks on every replica.

    separate_seeds(model)

It must be called before the training step is traced.
"""

from collections.abc import Callable

from trainer.runtime import keras, tf

_SEED_STRIDE = 0x9E3779B9  # 2**32 divided by the golden ratio: far apart for any few replicas


def separate_seeds(model: keras.Model) -> None:
    """Makes every replica draw its own random numbers in the model's layers (dropout masks).

    Keras mirrors the state of a layer's ``SeedGenerator``, so all replicas would drop the same
    units of their slices of a batch. Here each replica adds a multiple of its number to the seed
    that it draws. The state, and so what a checkpoint holds, stays the same on all replicas, the
    layers stay stock Keras layers, and replica 0 draws what a single device would.

    Args:
        model: Any Keras model; nested layers are found through their ``layers`` attribute. A
            second call changes nothing.
    """
    for layer in all_layers(model):
        for generator in vars(layer).values():
            if isinstance(generator, keras.random.SeedGenerator) and not isinstance(
                generator.next, _ReplicaSeed
            ):
                generator.next = _ReplicaSeed(generator.next)


def all_layers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns a layer or model and the layers in it, nested ones too, by their ``layers``."""
    inner = (nested for child in getattr(layer, "layers", []) for nested in all_layers(child))
    return [layer, *inner]


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
