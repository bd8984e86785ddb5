"""The oracle is ``model.fit``: what it computes on the same batches, ``trainer.fit`` computes."""

import signal

import keras_models
import numpy as np
import pytest
from keras_models import FEW, MODELS, assert_alike

from trainer import TrainConfig, evaluate, fit
from trainer.data.order import epoch_order
from trainer.errors import (
    ConfigurationError,
    DataError,
    NotFiniteError,
    StoppedError,
    UsageError,
)
from trainer.runtime import keras, tf

ONE = TrainConfig(steps_per_execution=1)
BATCHES = {"epochs": 2, "batch_size": 16, "shuffle": False, "verbose": 0}


class Steps(keras.callbacks.Callback):
    """Keeps what callbacks are told after each step."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.tested = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(dict(logs))

    def on_test_batch_end(self, batch, logs=None):
        self.tested.append(batch)


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_as_keras_does(name, float64):
    ours, data, options = keras_models.make(MODELS[name])
    theirs, (x, y, *weight), _ = keras_models.make(MODELS[name])
    steps, expected = Steps(), Steps()
    history = fit(
        ours, data, validation_data=data, callbacks=[steps], config=ONE, **BATCHES, **options
    )
    weight = weight[0] if weight else None
    same = theirs.fit(
        x,
        y,
        sample_weight=weight,
        validation_data=data,
        callbacks=[expected],
        **BATCHES,
        **options,
    )
    assert len(steps.seen) == len(expected.seen) == 6
    results = (*steps.seen, history.history), (*expected.seen, same.history)
    for seen, there in zip(*results, strict=True):
        assert seen.keys() == there.keys()
        for key, value in there.items():
            np.testing.assert_allclose(seen[key], value, rtol=1e-6, err_msg=key)
    for a, b in zip(ours.variables, theirs.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-12, err_msg=a.path)


def test_several_devices_train_as_one(replicas):
    one, two = (replicas.compute("fitted", devices=n, names=FEW) for n in (1, 2))
    assert_alike(two, one)


@pytest.mark.full
def test_several_devices_train_models_of_any_kind_as_one(replicas):
    # Two, as two workers: tests/test_script.py.
    one, several = (replicas.compute("fitted", devices=n, batch_size=15) for n in (1, 3))
    assert_alike(several, one)


# Not synchronized batch normalization, whose statistics count the row that a device without any is
# given; nor two outputs, whose losses are means of the devices' means.
SHORT = ["two inputs", "class weights", "sample weights", "accumulation", "top k", "subclassed"]


@pytest.mark.parametrize(
    ("devices", "names"),
    [
        (2, ["regularized", "stateful metrics"]),
        pytest.param(2, SHORT, marks=pytest.mark.full),
        pytest.param(3, ["regularized", "stateful metrics", "lstm"], marks=pytest.mark.full),
    ],
)
def test_a_last_batch_may_have_fewer_examples_than_there_are_devices(replicas, devices, names):
    # It has one.
    how = {"names": names, "batch_size": 7 * devices, "examples": 43}
    one, several = (replicas.compute("fitted", devices=n, **how) for n in (1, devices))
    assert_alike(several, one)


class StopAt(keras.callbacks.Callback):
    """Sends this process a signal after a step."""

    def __init__(self, epoch=None, step=None):
        super().__init__()
        self.at = epoch, step

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch + 1) == self.at:
            signal.raise_signal(signal.SIGTERM)


def long_run(folder, stop=None, resume="auto", **options):
    """Trains until EarlyStopping ends it, in the eighth epoch or so; returns all there is to see.

    The steps of a call are three, of seven in an epoch.
    """
    folder.mkdir(exist_ok=True)
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="tanh"),
            layers.Dropout(0.3, seed=1),
            layers.BatchNormalization(),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.05), loss="binary_crossentropy", metrics=["accuracy", "auc"]
    )
    noise = np.random.default_rng(0)
    x = noise.normal(size=(130, 4)).astype("float32")
    y = (x.sum(1) + noise.normal(size=130) > 0).astype("float32")
    callbacks = [
        keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.5),
        keras.callbacks.ModelCheckpoint(folder / "best.keras", save_best_only=True),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        stop or StopAt(),
    ]
    history = fit(
        model,
        (x, y),
        validation_split=0.2,
        epochs=40,
        batch_size=16,
        verbose=0,
        callbacks=callbacks,
        output_dir=folder,
        config=TrainConfig(steps_per_execution=3, checkpoint_every="1", resume=resume),
        **options,
    )
    best = keras.models.load_model(folder / "best.keras")
    return {
        "history": history.history,
        "epochs": history.epoch,
        "weights": [weight.tobytes() for weight in model.get_weights()],
        "best": [weight.tobytes() for weight in best.get_weights()],
        "optimizer": [variable.numpy().tobytes() for variable in model.optimizer.variables],
        "log": (folder / "log.csv").read_text(),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return long_run(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize(
    ("epoch", "step"),
    [(1, 3), (2, 7), pytest.param(0, 6, marks=pytest.mark.full), (4, 6)],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, undisturbed, epoch, step):
    assert 5 < len(undisturbed["epochs"]) < 40  # EarlyStopping has ended it.
    assert len(set(undisturbed["history"]["learning_rate"])) > 1
    with pytest.raises(StoppedError, match="the same command resumes the run"):
        long_run(tmp_path, StopAt(epoch, step))
    assert long_run(tmp_path) == undisturbed
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_early_stopping_has_ended_is_not_trained_on(tmp_path, undisturbed):
    class Killed(StopAt):
        def on_train_end(self, logs=None):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        long_run(tmp_path, Killed())
    # The name of a callback's class is compared.
    with pytest.raises(ConfigurationError, match=r"StopAt\. Use its callbacks"):
        long_run(tmp_path)
    Killed.on_train_end = StopAt.on_train_end
    assert long_run(tmp_path, Killed()) == undisturbed


@pytest.mark.parametrize(
    ("changes", "difference"),
    [({"batch_size": 8}, "batch_size=8 where it has batch_size=16")],
)
def test_another_run_in_the_folder_is_not_resumed(tmp_path, changes, difference):
    model, data, _ = keras_models.make(keras_models.regularized)
    config = TrainConfig(checkpoint_every="1", steps_per_execution=1)
    options = {"output_dir": tmp_path, "config": config, "batch_size": 16, "verbose": 0}
    with pytest.raises(StoppedError):
        fit(model, data, callbacks=[StopAt(0, 1)], **options)
    model, data, _ = keras_models.make(keras_models.regularized)
    with pytest.raises(ConfigurationError, match=difference):
        fit(model, data, callbacks=[StopAt()], **{**options, **changes})
    other = keras_models.make(keras_models.layer_normalization)[0]
    with pytest.raises(ConfigurationError, match="another model or optimizer"):
        fit(other, data, callbacks=[StopAt()], **options)
    x, y = data
    with pytest.raises(ConfigurationError, match="other images or labels"):
        fit(model, (x + 1, y), callbacks=[StopAt()], **options)


class Items:
    """The rows of arrays, one by one; remembers which were read."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.read = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        self.read.append(number)
        return self.x[number], self.y[number]


def mapped(folder, array):
    path = folder / f"{array.ndim}.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


KINDS = {
    "an object": lambda folder, x, y: Items(x, y),
    "files": lambda folder, x, y: (mapped(folder, x), mapped(folder, y)),
    "arrays": lambda folder, x, y: (x, y),
}


@pytest.mark.parametrize("options", [{}, {"validation_split": 0.3, "class_weight": {1: 2.0}}])
def test_data_of_any_kind_train_to_the_same_bits(tmp_path, options):
    results = []
    for kind in KINDS.values():
        model, (x, y), _ = keras_models.make(keras_models.regularized)
        history = fit(model, kind(tmp_path, x, y), epochs=2, batch_size=16, verbose=0, **options)
        results.append((history.history, [weight.tobytes() for weight in model.get_weights()]))
    assert results[0] == results[1] == results[2]


def test_a_stream_trains_as_its_batches_do_and_says_what_it_cannot(capsys):
    model, (x, y), _ = keras_models.make(keras_models.regularized)
    same = keras_models.make(keras_models.regularized)[0]
    stream = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    ours = fit(model, stream, validation_data=stream, epochs=2, verbose=0)
    assert capsys.readouterr().out.startswith("A tf.data.Dataset is read in its own order")
    theirs = fit(
        same, (x, y), validation_data=(x, y), epochs=2, batch_size=16, shuffle=False, verbose=0
    )
    assert ours.history == theirs.history
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="validation_split is for data with examples by number"):
        fit(model, stream, validation_split=0.5)


def test_a_resumed_epoch_reads_nothing_before_where_it_goes_on(tmp_path):
    def train(items, stop=None, folder=tmp_path):
        model = keras_models.make(keras_models.regularized)[0]
        fit(
            model,
            items,
            epochs=2,
            batch_size=4,
            verbose=0,
            output_dir=folder,
            callbacks=[stop or StopAt()],
            config=TrainConfig(steps_per_execution=1, checkpoint_every="1"),
        )
        return [weight.tobytes() for weight in model.get_weights()]

    x, y = keras_models.make(keras_models.regularized)[1]
    whole = train(Items(x, y), folder=tmp_path / "whole")
    stopped, resumed = Items(x, y), Items(x, y)
    with pytest.raises(StoppedError):
        train(stopped, StopAt(1, 7))
    assert train(resumed) == whole
    order = epoch_order(len(x), 0, 1).tolist()
    sample = [0, 0, len(x) // 2, len(x) - 1]  # for spec and digest
    assert sorted(resumed.read) == sorted(order[7 * 4 :] + sample)


def test_an_example_that_cannot_be_read_ends_the_run_and_can_be_mended(tmp_path):
    class Broken(Items):
        def __getitem__(self, number):
            if number == 11 and broken:
                raise OSError("the disk is gone")
            return super().__getitem__(number)

    model, (x, y), _ = keras_models.make(keras_models.regularized)
    broken = True
    options = {"batch_size": 2, "shuffle": False, "verbose": 0, "output_dir": tmp_path}
    with pytest.raises(DataError, match=r"return example 11\. Received: OSError: the disk is gone"):
        fit(model, Broken(x, y), config=TrainConfig(checkpoint_every="1"), **options)
    broken = False
    model = keras_models.make(keras_models.regularized)[0]
    fit(model, Broken(x, y), config=TrainConfig(checkpoint_every="1"), **options)
    assert int(model.optimizer.iterations) == 21


@pytest.mark.parametrize("name", ["two outputs", "stateful metrics", "sample weights"])
def test_it_evaluates_as_keras_does(name, float64):
    model, data, _ = keras_models.make(MODELS[name])
    x, y, *weight = data
    expected = model.evaluate(
        x, y, 16, sample_weight=weight[0] if weight else None, return_dict=True, verbose=0
    )
    steps = Steps()
    found = evaluate(model, data, batch_size=16, verbose=0, callbacks=[steps], config=ONE)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=key)
    assert steps.tested == [0, 1, 2]


def test_the_model_is_the_users_own_afterwards(replicas):
    # Its variables are TensorFlow's plain ones again, on one device and after several.
    model, data, _ = keras_models.make(keras_models.batch_normalization)
    before = [variable.value for variable in model.variables]
    fit(model, data, batch_size=16, verbose=0)
    assert all(a is b.value for a, b in zip(before, model.variables, strict=True))
    history = model.fit(*data, verbose=0)  # Keras goes on with it, its optimizer too.
    assert history.history["loss"]
    assert int(model.optimizer.iterations) == 3 + 2


class OwnStep(keras.Sequential):
    """Trains in a way of its own."""

    def train_step(self, data):
        return {}


def compiled(model, **options):
    model.compile("sgd", loss="mse", **options)
    return model


def small(kind=keras.Sequential):
    return kind([keras.Input((4,)), keras.layers.Dense(1)])


def in_a_scope():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        return compiled(small())


DATA = (np.zeros((8, 4)), np.zeros((8, 1)))


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (small, DATA, {}, ConfigurationError, "Call model.compile first"),
        (lambda: compiled(small(OwnStep)), DATA, {}, ConfigurationError, "own train_step"),
        (
            lambda: compiled(small(), run_eagerly=True),
            DATA,
            {},
            ConfigurationError,
            "Received: run_eagerly=True",
        ),
        (in_a_scope, DATA, {}, ConfigurationError, "Leave the scope out"),
        (None, DATA[0], {}, UsageError, r"data must be \(x, y\)"),
        (None, (DATA[0], DATA[1][:5]), {}, DataError, r"Received: \[5, 8\] examples"),
        (None, (np.array([[1], [2, 3]], object), DATA[1][:2]), {}, DataError, "need padding"),
        (None, (DATA[0], 5.0), {}, DataError, "Received: one number"),
        (None, (DATA[0][:0], DATA[1][:0]), {}, DataError, r"Received: \[0\] examples"),
        (None, DATA, {"batch_size": 0}, UsageError, "batch_size must be an integer"),
        (None, DATA, {"epochs": 1.5}, UsageError, "epochs must be an integer"),
        (None, DATA, {"validation_split": 1.0}, UsageError, "validation_split must be from 0"),
        (None, DATA, {"validation_split": 0.95}, UsageError, "must leave examples on both sides"),
        (None, (*DATA, np.ones(8)), {"class_weight": {0: 2.0}}, UsageError, "sample weights, too"),
        (None, DATA, {"config": TrainConfig(epochs=3)}, UsageError, "Received: epochs=3"),
        (
            None,
            DATA,
            {"callbacks": [keras.callbacks.BackupAndRestore("b")], "output_dir": "o"},
            ConfigurationError,
            "Received: BackupAndRestore",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    tmp_path, monkeypatch, model, data, options, error, message
):
    monkeypatch.chdir(tmp_path)
    model = model() if model else compiled(small())
    with pytest.raises(error, match=message):
        fit(model, data, verbose=0, **options)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where():
    x, y = DATA
    bad = x.copy()
    bad[5] = np.nan
    with pytest.raises(NotFiniteError, match="in epoch 1, step 3"):
        fit(compiled(small()), (bad, y), batch_size=2, shuffle=False, verbose=0)


def test_the_order_of_an_epoch_is_the_seeds():
    def train(**options):
        model, data, _ = keras_models.make(keras_models.regularized)
        fit(model, data, epochs=2, batch_size=16, verbose=0, **options)
        return b"".join(weight.tobytes() for weight in model.get_weights())

    first = train()
    assert train() == first
    assert train(config=TrainConfig(seed=1)) != first
    assert train(shuffle=False) != first
