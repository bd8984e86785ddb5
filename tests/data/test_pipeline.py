import numpy as np
import pytest

from trainer.data import pipeline
from trainer.data.augment import Augmentation
from trainer.data.digits import Digits
from trainer.data.pipeline import Deferred
from trainer.machine import aligned_empty
from trainer.runtime import tf


def rows(batches):
    """Reads batches whose labels number the examples; returns numbers and weights."""
    read = [(y.numpy(), w.numpy()) for _, y, w in batches]
    return np.concatenate([y for y, _ in read]), np.concatenate([w for _, w in read])


def numbered(n):
    return np.arange(n, dtype=np.uint8)[:, np.newaxis] * np.ones(3, np.uint8), np.arange(n)


def train(n, batch_size=8, seed=0, epoch=0):
    x, y = numbered(n)
    return pipeline.train_batches(x, y, batch_size=batch_size, seed=seed, epoch=epoch)


def test_an_epoch_holds_every_example_once_and_fills_the_last_batch_with_weight_zero():
    batches = train(100, batch_size=32)
    assert batches.cardinality() == 4
    for x, y, weight in batches:
        assert x.shape == (32, 3)
        np.testing.assert_array_equal(x[:, 0], y)
        assert weight.dtype == np.float32
    numbers, weights = rows(batches)
    assert sorted(numbers[weights == 1]) == list(range(100))
    assert weights.sum() == 100


def test_the_shapes_are_static():
    assert all(None not in spec.shape for spec in train(100, batch_size=32).element_spec)


def test_an_epoch_of_mnist_has_469_steps(mnist):
    batches = pipeline.train_batches(mnist.x_train, mnist.y_train, batch_size=128, seed=0, epoch=0)
    assert batches.cardinality() == 469


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    order = rows(train(1000))[0].tolist()
    assert rows(train(1000))[0].tolist() == order
    assert rows(train(1000, batch_size=5))[0].tolist() == order
    assert rows(train(1000, epoch=1))[0].tolist() != order
    assert rows(train(1000, seed=1))[0].tolist() != order
    # (0, 1) and (1, 0) must not fall together.
    assert rows(train(1000, seed=1))[0].tolist() != rows(train(1000, epoch=1))[0].tolist()


def test_the_test_set_comes_in_order_once():
    x, y = numbered(50)
    numbers, weights = rows(pipeline.test_batches(x, y, batch_size=16))
    assert numbers[weights == 1].tolist() == list(range(50))


def test_a_test_set_smaller_than_a_batch_is_one_batch():
    x, y = numbered(5)
    numbers, weights = rows(pipeline.test_batches(x, y, batch_size=16))
    assert numbers[weights == 1].tolist() == list(range(5))


AFFINE = Augmentation.of("affine")


def augmented(seed=0, epoch=0, batch_size=32):
    """What the images of an epoch are augmented by, in the order of the data set."""
    x, y = numbered(100)
    batches = pipeline.train_batches(
        x, y, batch_size=batch_size, seed=seed, epoch=epoch, augment=Deferred(AFFINE)
    )
    assert all(None not in spec.shape for spec in tf.nest.flatten(batches.element_spec))
    drawn = np.concatenate([drawn.numpy() for (_, drawn), _, _ in batches])
    numbers, weights = rows(batches.map(lambda x, y, weight: (x[0], y, weight)))
    assert (
        numbers.tolist()
        == rows(train(100, batch_size=batch_size, seed=seed, epoch=epoch))[0].tolist()
    )
    return drawn[weights == 1][np.argsort(numbers[weights == 1])]


def test_each_image_is_augmented_by_what_is_drawn_for_it():
    drawn = augmented()
    np.testing.assert_array_equal(drawn, AFFINE.draw(np.arange(100), 0, 0))
    np.testing.assert_array_equal(augmented(batch_size=7), drawn)
    np.testing.assert_array_equal(augmented(seed=1), AFFINE.draw(np.arange(100), 1, 0))
    np.testing.assert_array_equal(augmented(epoch=1), AFFINE.draw(np.arange(100), 0, 1))


@pytest.mark.parametrize("kind", [None, AFFINE, Augmentation.of("elastic flip contrast")])
def test_what_is_gathered_on_the_device_is_what_the_host_sends(mnist, kind):
    few = mnist.first(50, 20)
    strategy = tf.distribute.get_strategy()
    host, device = (
        pipeline.put_on_devices(few, strategy=where, preprocess=lambda x, y: (x, y), augment=kind)
        for where in (None, strategy)
    )
    for there, here in (
        (
            pipeline.train_batches(
                *device.train, batch_size=16, seed=0, epoch=1, augment=device.augment
            ),
            pipeline.train_batches(
                *host.train, batch_size=16, seed=0, epoch=1, augment=host.augment
            ),
        ),
        (
            pipeline.test_batches(*device.test, batch_size=16),
            pipeline.test_batches(*host.test, batch_size=16),
        ),
    ):
        for (x, y, weight), (expected_x, expected_y, same) in zip(there, here, strict=True):
            x, y = tf.function(device.preprocess, autograph=False)(x, y)
            real = same.numpy() == 1  # Padding is row 0 of each.
            np.testing.assert_array_equal(x[real], expected_x[real])
            np.testing.assert_array_equal(y[real], expected_y[real])
            np.testing.assert_array_equal(weight, same)


@pytest.mark.parametrize("full", ["Variable", "zeros"])
def test_a_device_without_room_for_the_images_gets_them_batch_by_batch(mnist, monkeypatch, full):
    def exhausted(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")

    few = mnist.first(50, 20)
    monkeypatch.setattr(pipeline.tf, full, exhausted)
    data = pipeline.put_on_devices(
        few,
        strategy=tf.distribute.get_strategy(),
        preprocess=lambda x, y: (x, y),
        augment=AFFINE,
    )
    assert data.train[0] is few.x_train
    assert data.augment is AFFINE
    assert data.notice.startswith("The images (0 MiB) do not fit into the devices' memory")


def test_the_arrays_are_not_copied(mnist):
    x, y = mnist.x_test.copy(), mnist.y_test
    x = Digits(x, y, x, y).x_train
    batches = pipeline.test_batches(x, y, batch_size=100)
    x[0] = 77
    assert next(iter(batches))[0][0].numpy().min() == 77


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[1:],  # begins at no multiple of 64 bytes
        lambda x: x[::2],
        np.asfortranarray,
        lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),  # cannot be written
    ],
)
def test_arrays_of_any_kind_are_read(mnist, change):
    x = change(mnist.x_test[:50])
    batches = pipeline.test_batches(x, np.arange(len(x)), batch_size=16)
    read = [x.numpy() for x, _, _ in batches]
    assert len(read) == -(-len(x) // 16)
    np.testing.assert_array_equal(np.concatenate(read)[: len(x)], x)


def test_no_thread_autotunes(mnist):
    # Its end can take as long as it sleeps, up to a minute, and the end of an epoch waits for it.
    few = mnist.first(100, 100)
    for batches in (
        train(100),
        pipeline.train_batches(
            few.x_train, few.y_train, batch_size=8, seed=0, epoch=0, augment=AFFINE
        ),
        pipeline.test_batches(few.x_test, few.y_test, batch_size=8),
    ):
        assert batches.options().autotune.enabled is False


def test_an_epoch_reads_the_arrays_themselves():
    # 5,000 batches, of which the pipeline reads the next few ahead. The default graph rewrites
    # would copy the arrays when the iterator is made.
    x = aligned_empty((40_000, 3), np.uint8)
    x[...] = 1
    batches = pipeline.train_batches(x, np.zeros(len(x), np.uint8), batch_size=8, seed=0, epoch=0)
    iterator = iter(batches)
    assert next(iterator)[0].numpy().max() == 1
    x[...] = 2
    *_, (last, _, _) = iterator
    assert last.numpy().min() == 2
