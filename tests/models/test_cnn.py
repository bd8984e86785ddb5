import numpy as np
import pytest

from trainer.errors import NotFiniteError
from trainer.models import cnn, optimizers
from trainer.runtime import keras
from trainer.training.artifacts import weights_sha256


def build(seed=0, optimizer="adadelta", learning_rate=1.0, **options):
    return cnn.build(optimizer=optimizer, learning_rate=learning_rate, seed=seed, **options)


def test_it_is_the_notebooks_network():
    model = build()
    assert model.count_params() == 2_380_938
    facts = [
        (type(layer).__name__, {key: layer.get_config()[key] for key in keys})
        for layer, keys in zip(
            model.layers,
            [
                ("filters", "kernel_size", "strides", "padding", "activation"),
                ("filters", "kernel_size", "strides", "padding", "activation"),
                ("pool_size", "strides", "padding"),
                ("rate",),
                (),
                ("units", "activation"),
                ("rate",),
                ("units", "activation"),
            ],
            strict=True,
        )
    ]
    convolution = {"kernel_size": (3, 3), "strides": (1, 1), "padding": "valid"}
    assert facts == [
        ("Conv2D", {"filters": 32, **convolution, "activation": "relu"}),
        ("Conv2D", {"filters": 64, **convolution, "activation": "relu"}),
        ("MaxPooling2D", {"pool_size": (2, 2), "strides": (2, 2), "padding": "valid"}),
        ("Dropout", {"rate": 0.25}),
        ("Flatten", {}),
        ("Dense", {"units": 256, "activation": "relu"}),
        ("Dropout", {"rate": 0.5}),
        ("Dense", {"units": 10, "activation": "softmax"}),
    ]
    assert model.input_shape == (None, 28, 28, 1)
    assert model.output_shape == (None, 10)


def test_it_is_compiled_as_the_notebooks_file_is():
    model = build(learning_rate=0.5)
    assert model.loss == "categorical_crossentropy"
    assert type(model.optimizer).__name__ == "Adadelta"
    assert float(model.optimizer.learning_rate) == 0.5
    assert type(build(optimizer="sgd").optimizer).__name__ == "SGD"


def test_a_schedule_and_smoothed_labels_are_in_the_file(tmp_path):
    rate = optimizers.schedule("one-cycle", peak=0.5, steps=100)
    drop = {"pooling_dropout": 0.0, "dense_dropout": 0.3}
    model = build(optimizer="adam", learning_rate=rate, label_smoothing=0.1, **drop)
    model.save(tmp_path / "mnist.h5")
    loaded = keras.models.load_model(tmp_path / "mnist.h5")
    assert loaded.loss.label_smoothing == 0.1
    assert float(loaded.optimizer.learning_rate) == pytest.approx(0.05)
    assert [loaded.layers[index].rate for index in (3, 6)] == [0.0, 0.3]
    x, y = np.random.default_rng(0).random((20, 28, 28, 1), np.float32), np.eye(10)[[0, 1] * 10]
    expected = np.mean(cnn.loss(0.1)(y.astype(np.float32), model(x)))
    assert loaded.evaluate(x, y, verbose=0)[0] == pytest.approx(expected, rel=1e-5)


def test_mixed_precision_keeps_weights_and_answers_in_float32():
    mixed = cnn.build(optimizer="sgd", learning_rate=0.1, seed=0, precision="mixed_bfloat16")
    assert {weight.dtype for weight in mixed.trainable_weights} == {"float32"}
    assert [layer.compute_dtype for layer in mixed.layers] == ["bfloat16"] * 7 + ["float32"]
    assert weights_sha256(mixed) == weights_sha256(build(optimizer="sgd", learning_rate=0.1))
    for precision in ("float32", "tensorfloat32"):
        plain = cnn.build(optimizer="sgd", learning_rate=0.1, seed=0, precision=precision)
        assert {layer.compute_dtype for layer in plain.layers} == {"float32"}


def test_the_seed_alone_decides_the_weights():
    assert weights_sha256(build(seed=3)) == weights_sha256(build(seed=3))
    assert weights_sha256(build(seed=3)) != weights_sha256(build(seed=4))


def test_layers_of_one_shape_would_not_share_weights():
    seeds = [
        layer.get_config()["kernel_initializer"]["config"]["seed"]
        for layer in build().layers
        if hasattr(layer, "kernel")
    ]
    dropouts = [layer.seed for layer in build().layers if hasattr(layer, "seed")]
    assert len({*seeds, *dropouts}) == 6


def test_the_global_random_state_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    build()
    assert np.random.get_state()[1].tolist() == before


def test_preprocess_makes_what_the_saved_model_takes():
    images = np.array([[[0, 255], [51, 102]]], np.uint8)
    inputs, targets = cnn.preprocess(images, np.array([7], np.uint8))
    np.testing.assert_array_equal(inputs.numpy()[0, ..., 0], np.float32([[0, 1], [0.2, 0.4]]))
    assert inputs.dtype == targets.dtype == np.float32
    assert targets.numpy().tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, 0, 0]]


@pytest.mark.parametrize("name", ["loss", "accuracy"])
def test_losses_and_metrics_give_one_value_an_example(name):
    function = {"loss": cnn.LOSS, **cnn.METRICS}[name]
    assert function(np.eye(10, dtype=np.float32), np.full((10, 10), 0.1, np.float32)).shape == 10


def test_probabilities_do_not_depend_on_the_batches(mnist):
    network, calls = build(), []
    images = mnist.x_test[:50]
    one = cnn.probabilities(network, images, batch_size=50)
    several = cnn.probabilities(
        network, images, batch_size=20, after_batch=lambda: calls.append(None)
    )
    assert len(calls) == 3
    assert one.shape == (50, 10)
    np.testing.assert_allclose(one, several, rtol=1e-5)
    np.testing.assert_allclose(
        one, network.predict(images[..., None].astype("float32") / 255, verbose=0), rtol=1e-5
    )


def test_weights_that_overflow_are_named(mnist):
    network = build()
    # The last ones: what is behind them lets NaN through, on every processor.
    network.layers[-1].kernel.assign(np.full((256, 10), 3e38, "float32"))
    with pytest.raises(NotFiniteError, match="for 5 of 5 images"):
        cnn.probabilities(network, mnist.x_test[:5], batch_size=5)


def test_a_precision_that_it_has_not_is_refused():
    with pytest.raises(ValueError, match=r"mixed_bfloat16\. Received: 'mixed_float16'"):
        build(precision="mixed_float16")
