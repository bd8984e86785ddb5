"""Data sets: what is read, what is not, and what is said of data that cannot be used."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import dataset, pipeline
from trainer.data.arrays import ArrayDataset
from trainer.data.cache import Cached
from trainer.data.dataset import ClassWeighted, Subset
from trainer.data.examples import examples
from trainer.data.folders import ImageFolder
from trainer.data.objects import ObjectDataset
from trainer.data.order import epoch_order
from trainer.data.pipeline import Shard
from trainer.data.streams import Stream
from trainer.errors import DataError, InputError, UsageError
from trainer.runtime import keras, tf
from trainer.training.feed import Feed

X = np.arange(40, dtype="float32").reshape(20, 2)
Y = np.arange(20) % 3


class Items:
    """Examples by number, which are counted."""

    def __init__(self, length=20):
        self.length = length
        self.read = []

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        self.read.append(number)
        return {"a": X[number], "b": [float(number)]}, Y[number]


def batches(data, numbers=range(20), batch_size=8):
    return list(data.batches(np.array(numbers), batch_size).as_numpy_iterator())


def write_pictures(
    folder, count=4, *, size=(6, 5), mode="RGB", suffix="png", classes=("cat", "dog")
):
    noise = np.random.default_rng(0)
    for name, number in itertools.product(classes, range(count)):
        path = folder / name / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*size, 3) if mode == "RGB" else size
        Image.fromarray(noise.integers(0, 256, shape, np.uint8), mode).save(path)
    return folder


# -- batches of a worker


@pytest.mark.parametrize("examples", [24, 26, 28, 29])
@pytest.mark.parametrize("shares", [(1,), (1, 1), (2, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("first_step", [0, 2, 3])
def test_workers_read_each_example_of_an_epoch_once(examples, shares, first_step):
    replicas = sum(shares)
    order = np.random.default_rng(1).permutation(examples)
    data = ArrayDataset((np.arange(examples), np.arange(examples)))
    workers = [
        list(
            pipeline.shard_batches(
                data,
                order,
                batch_size=8,
                shard=Shard(sum(shares[:worker]), share, replicas),
                first_step=first_step,
            ).as_numpy_iterator()
        )
        for worker, share in enumerate(shares)
    ]
    steps = -(-examples // 8)
    assert [len(worker) for worker in workers] == [steps - first_step] * len(shares)
    for number, parts in enumerate(zip(*workers, strict=True), first_step):
        expected = order[8 * number : 8 * number + 8]
        if len(expected) < replicas:  # Some workers read a row of another one.
            assert {len(x) for x, _, _ in parts} == {1}
            continue
        assert np.concatenate([x for x, _, _ in parts]).tolist() == expected.tolist()
        assert {int(size) for _, _, size in parts} == {len(expected)}


# -- arrays


def test_arrays_are_read_by_row_and_in_their_structure():
    weight = np.linspace(0, 1, 20)
    data = ArrayDataset(({"x": X, "y": [Y, Y]}, Y, weight))
    (x, y, w), *_ = batches(data, [7, 3, 7])
    assert x["x"].tolist() == X[[7, 3, 7]].tolist()
    assert [part.tolist() for part in x["y"]] == [Y[[7, 3, 7]].tolist()] * 2
    assert (y.tolist(), w.tolist()) == (Y[[7, 3, 7]].tolist(), weight[[7, 3, 7]].tolist())
    assert data.spec[0]["x"] == tf.TensorSpec((2,), tf.float32)


def test_digests_of_arrays_differ_where_they_do():
    first = ArrayDataset((X, Y)).digest
    assert ArrayDataset((X.copy(), Y.copy())).digest == first
    others = (X + 1, Y), (X.astype("float64"), Y), (X.reshape(20, 1, 2), Y), (X, Y, Y), ([X], Y)
    assert len({ArrayDataset(data).digest for data in others} | {first}) == 1 + len(others)


def in_file(array, path):
    """Tells whether the memory of a tensor is that of a file."""
    address = np.asarray(memoryview(array)).ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.endswith(str(path))
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_files_that_are_mapped_are_not_copied(tmp_path, mode):
    path = tmp_path / "x.npy"
    np.save(path, X)
    before = path.read_bytes()
    data = ArrayDataset((np.load(path, mmap_mode=mode), Y))
    assert in_file(data.tensors[0], path)
    assert data.digest == ArrayDataset((X, Y)).digest
    assert [x.tolist() for x, _ in batches(data)] == [
        x.tolist() for x, _ in batches(examples((X, Y)))
    ]
    assert path.read_bytes() == before


def test_a_part_of_a_mapped_file_is_that_part(tmp_path):
    np.save(tmp_path / "x.npy", X)
    part = np.load(tmp_path / "x.npy", mmap_mode="r")[5:]
    (x, _), *_ = batches(ArrayDataset((part, Y[5:])), [0, 1])
    assert x.tolist() == X[5:7].tolist()


# -- parts, and weights


def test_parts_of_data_have_their_own_numbers_and_digests():
    data = ArrayDataset((X, Y))
    first, last = dataset.split(data, 0.25)
    assert (len(first), len(last)) == (15, 5)
    assert batches(last, [0, 4])[0][0].tolist() == X[[15, 19]].tolist()
    assert len({data.digest, first.digest, last.digest, Subset(data, range(14)).digest}) == 4


@pytest.mark.parametrize("kind", ["numbers", "float", "column", "one-hot"])
def test_class_weights_are_keras_own(kind):
    y = {
        "numbers": Y,
        "float": Y.astype("float32") + 0.1,
        "column": Y[:, None],
        "one-hot": np.eye(3, dtype="float32")[Y],
    }[kind]
    weights = {0: 2.0, 2: 0.5}
    data = ClassWeighted(ArrayDataset((X, y)), weights)
    (_, _, found), *_ = batches(data, range(20), 20)
    assert found.tolist() == [weights.get(label, 1.0) for label in Y]
    assert found.dtype == keras.config.floatx()
    assert data.spec[2] == tf.TensorSpec((), keras.config.floatx())


# -- objects


def test_items_of_an_object_are_read_by_number():
    items = Items()
    data = examples(items)
    items.read.clear()
    (x, y), *rest = batches(data, [7, 3, 19], 2)
    assert x["a"].tolist() == X[[7, 3]].tolist()
    assert x["b"][0].tolist() == [7.0, 3.0]
    assert (y.tolist(), len(rest), rest[0][1].tolist()) == (Y[[7, 3]].tolist(), 1, [Y[19]])
    assert sorted(items.read) == [3, 7, 19]


def test_items_are_read_together_where_the_object_can():
    class Together(Items):
        def __getitems__(self, numbers):
            self.calls.append(numbers)
            return [Items.__getitem__(self, number) for number in numbers]

    items = Together()
    items.calls = []
    data = ObjectDataset(items)
    items.calls.clear()
    batches(data, range(20), 8)
    assert sorted(map(len, items.calls)) == [4, 8, 8]


def test_the_digest_of_an_object_is_its_own_or_that_of_three_items():
    class Other(Items):
        def __getitem__(self, number):
            x, y = super().__getitem__(number)
            return x, y + (number == 10)

    class Named(Items):
        digest = "abc"

    assert ObjectDataset(Items()).digest == ObjectDataset(Items()).digest
    assert ObjectDataset(Items()).digest != ObjectDataset(Items(19)).digest
    assert ObjectDataset(Named()).digest == "abc"
    Other.__qualname__ = Items.__qualname__
    assert ObjectDataset(Other()).digest != ObjectDataset(Items()).digest


def failing(items, at, result):
    """Has an object return, or raise, something else for a number."""
    own = items.__class__.__getitem__

    def get(self, number):
        if number == at and isinstance(result, Exception):
            raise result
        return result if number == at else own(self, number)

    return type("Failing", (items.__class__,), {"__getitem__": get})()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (OSError("gone"), r"Expected data, Failing to return example 5\. Received: OSError: gone"),
        (
            ({"a": X[0, :1], "b": [1.0]}, 1),
            r"example 5 of data, Failing .* \(2,\)\. Received: \(1,\)",
        ),
        ((X[0], 1), "example 5 of data, Failing to have the components of the first one"),
        (None, "example 5 of data, Failing to have the components of the first one"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(result, message):
    data = ObjectDataset(failing(Items(), 5, result))
    with pytest.raises(tf.errors.OpError) as caught:
        batches(data)
    reason = data.explain(caught.value)
    assert type(reason) is DataError
    with pytest.raises(DataError, match=message):
        raise reason


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (Items(0), DataError, "Received: none"),
        (failing(Items(), 0, X[0]), UsageError, r"must return \(x, y\)"),
        (failing(Items(), 0, ("a text", 1)), DataError, "Received: text"),
        (failing(Items(), 0, (np.array([[1], [2, 3]], object), 1)), DataError, "need padding"),
        (X, UsageError, r"data must be \(x, y\)"),
        ([X, Y], UsageError, r"data must be \(x, y\)"),
        (iter([1]), UsageError, r"data must be \(x, y\)"),
        (5, UsageError, r"data must be \(x, y\)"),
    ],
)
def test_what_has_no_examples_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        examples(value)


def test_a_keras_data_set_of_batches_is_refused():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, number):
            return X, Y

    with pytest.raises(UsageError, match="Batches, a PyDataset, whose items are batches"):
        examples(Batches())


# -- folders of pictures


def test_a_folder_has_its_pictures_by_class(tmp_path):
    data = ImageFolder(write_pictures(tmp_path))
    assert data.classes == ["cat", "dog"]
    assert data.spec == (tf.TensorSpec((6, 5, 3), tf.uint8), tf.TensorSpec((), tf.int32))
    ((x, y),) = batches(data, [5, 0], 8)
    assert y.tolist() == [1, 0]
    for picture, path in zip(x, ("dog/1.png", "cat/0.png"), strict=True):
        assert picture.tolist() == np.asarray(Image.open(tmp_path / path)).tolist()


def test_grey_pictures_have_one_channel_unless_asked_for_three(tmp_path):
    write_pictures(tmp_path, mode="L")
    (x, _), *_ = batches(ImageFolder(tmp_path), [0])
    assert x.shape == (1, 6, 5, 1)
    (rgb, _), *_ = batches(ImageFolder(tmp_path, channels=3), [0])
    assert rgb.tolist() == np.repeat(x, 3, axis=-1).tolist()
    write_pictures(tmp_path, 1, classes=["cat"])  # One colour picture in place of a grey one.
    assert ImageFolder(tmp_path).channels == 3


def test_pictures_are_resized_as_keras_does(tmp_path):
    write_pictures(tmp_path, size=(12, 9), suffix="jpg")
    write_pictures(tmp_path, size=(7, 30), classes=["bird"])
    data = ImageFolder(tmp_path, image_size=(8, 10))
    ((x, _),) = batches(data, [0, 8], 8)
    assert x.dtype == np.float32
    resize = keras.layers.Resizing(8, 10, antialias=True)
    for picture, path in zip(x, data.files[::8], strict=True):
        raw = tf.cast(tf.io.decode_image(path.path.read_bytes()), tf.float32)
        np.testing.assert_allclose(picture, resize(raw[None])[0], atol=1e-3)


def test_pictures_in_folders_inside_and_hidden_files(tmp_path):
    write_pictures(tmp_path)
    write_pictures(tmp_path / "cat", 2, classes=["indoors", ".hidden"])
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "._0.png").write_text("macOS writes such files")
    write_pictures(tmp_path, 1, classes=[".git"])
    data = ImageFolder(tmp_path)
    assert (len(data), data.classes) == (10, ["cat", "dog"])


def test_the_digest_of_a_folder_is_that_of_names_and_sizes(tmp_path):
    write_pictures(tmp_path / "a")
    write_pictures(tmp_path / "b")
    first = ImageFolder(tmp_path / "a").digest
    assert ImageFolder(tmp_path / "b").digest == first
    assert ImageFolder(tmp_path / "b", channels=1).digest != first
    (tmp_path / "b" / "cat" / "0.png").rename(tmp_path / "b" / "dog" / "9.png")
    assert ImageFolder(tmp_path / "b").digest != first


def spoil(folder):
    """Writes an empty file, one that is no picture, and one of another size."""
    (folder / "cat" / "0.png").write_bytes(b"")
    (folder / "cat" / "1.png").write_text("no picture")
    write_pictures(folder, 1, size=(9, 9), classes=["dog"])


def test_bad_pictures_are_listed_or_skipped(tmp_path):
    write_pictures(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path)
    for text in ("6×5 pixels", "cat/0.png (empty)", "cat/1.png (no picture)", "0.png (9×9 pixels)"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    data = ImageFolder(tmp_path, skip_bad=True)
    assert len(data) == 5
    assert {path.name for path in data.skipped} == {"0.png", "1.png"}
    ((x, _),) = batches(data, range(5))
    assert x.shape == (5, 6, 5, 3)
    assert len(ImageFolder(tmp_path, skip_bad=True, image_size=(4, 4))) == 6


def test_many_bad_pictures_are_counted(tmp_path):
    write_pictures(tmp_path, 9)
    for path in (tmp_path / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"and 4 others\. Remove them, or use skip_bad=True"):
        ImageFolder(tmp_path)


def test_a_picture_that_is_cut_off_is_named_when_it_is_read(tmp_path):
    data = ImageFolder(write_pictures(tmp_path, size=(60, 50)))
    path = tmp_path / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(tf.errors.OpError) as caught:
        batches(data, range(8))
    reason = data.explain(caught.value)
    assert isinstance(reason, DataError)
    assert f"Expected a picture at {path}. Received: another size than at the start" in str(reason)


def test_errors_that_are_not_about_data_are_left_alone(tmp_path, monkeypatch):
    data = ImageFolder(write_pictures(tmp_path))
    lost = tf.errors.UnavailableError(None, None, "connection reset by peer")
    monkeypatch.setattr(Path, "read_bytes", None)  # All pictures would be read.
    assert data.explain(lost) is lost
    items = ObjectDataset(Items())
    items.error = DataError("one that was read ahead")
    stopped = RuntimeError("stopped")
    assert items.explain(stopped) is stopped


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (["cat"], DataError, "at least two classes in .* Received: only cat"),
        ([], DataError, "Received: 0 folders with none"),
        (None, InputError, "Received: No such file or directory"),
    ],
)
def test_a_folder_without_classes_is_refused(tmp_path, classes, error, message):
    folder = tmp_path / "pictures"
    if classes is not None:
        folder.mkdir()
        write_pictures(folder, classes=classes)
    with pytest.raises(error, match=message):
        ImageFolder(folder)


def test_a_class_without_pictures_is_named(tmp_path):
    (write_pictures(tmp_path) / "eel").mkdir()
    with pytest.raises(DataError, match=r"Received: none in eel\. Remove empty folders"):
        ImageFolder(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names.")
def test_names_in_no_encoding_are_read(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / os.fsdecode(b"\xff.png"))
    assert len(batches(ImageFolder(tmp_path), range(8), 8)[0][1]) == 8


# -- tf.data


def test_a_stream_is_divided_and_skipped_as_it_is():
    stream = examples(tf.data.Dataset.from_tensor_slices((X, Y)).batch(8))
    assert (stream.steps, stream.spec[0]) == (3, tf.TensorSpec((2,), tf.float32))
    parts = [list(stream.shard_batches(Shard(n, 1, 2), 1).as_numpy_iterator()) for n in (0, 1)]
    for step, pair in enumerate(zip(*parts, strict=True), start=1):
        expected = X[8 * step : 8 * step + 8]
        assert np.concatenate([x for x, _, _ in pair]).tolist() == expected.tolist()
        assert {int(size) for *_, size in pair} == {len(expected)}


def test_a_stream_that_cannot_be_counted_is_refused():
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    for stream, error, message in (
        (data.batch(2).filter(lambda *_: True), DataError, "an unknown number"),
        (data.batch(2).repeat(), DataError, "endless ones"),
        (data.take(0).batch(2), DataError, "Received: none"),
        (data, DataError, "Expected batches of one shape"),
        (tf.data.Dataset.from_tensor_slices(X).batch(2), UsageError, "must be batches"),
    ):
        with pytest.raises(error, match=message):
            Stream(stream)


# -- what stays in memory


def test_examples_that_were_read_are_not_read_again():
    items = Items()
    data = Cached(ObjectDataset(items))
    del items.read[:]
    order = np.random.default_rng(0).permutation(20)
    first = batches(data, order)
    assert sorted(items.read) == list(range(20))
    again = batches(data, order[::-1])
    assert len(items.read) == 20
    for (x, y), (other, label) in zip(batches(ObjectDataset(Items()), order), first, strict=True):
        assert (x["a"] == other["a"]).all()
        assert y.tolist() == label.tolist()
    assert [y for _, part in again for y in part] == Y[order[::-1]].tolist()


def test_a_share_that_is_in_memory_is_joined_with_what_is_read():
    items = Items()
    data = Cached(ObjectDataset(items))
    batches(data, range(0, 20, 2))
    del items.read[:]
    mixed = batches(data, [3, 2, 4, 7, 0, 19, 18, 5, 1], batch_size=4)
    assert [y.tolist() for _, y in mixed] == [
        Y[part].tolist() for part in ([3, 2, 4, 7], [0, 19, 18, 5], [1])
    ]
    assert [x["a"].tolist() for x, _ in mixed][1] == X[[0, 19, 18, 5]].tolist()
    assert sorted(items.read) == [1, 3, 5, 7, 19]
    assert int(Cached(ObjectDataset(items)).batches(np.arange(9), 4).cardinality()) == 3
    batches(half := Cached(ObjectDataset(items)), range(5))
    assert int(half.batches(np.arange(9), 4).cardinality()) == 3  # Which a training must know.


def test_a_worker_keeps_what_it_has_read_itself():
    items = Items()
    data = Cached(ObjectDataset(items))
    del items.read[:]
    for order in (np.arange(20), np.arange(20)[::-1]):
        list(
            pipeline.shard_batches(
                data, order, batch_size=4, shard=Shard(first_replica=1, replicas=2)
            )
        )
    # The second half of each batch of the one order and of the other.
    assert sorted(items.read) == list(range(20))
    assert len(items.read) == 20


def test_pictures_that_stay_in_memory_are_the_same(tmp_path):
    plain = ImageFolder(write_pictures(tmp_path), image_size=(4, 4))
    cached = Cached(plain)
    for _ in range(2):
        for (x, y), (other, label) in zip(
            batches(plain, range(8)), batches(cached, range(8)), strict=True
        ):
            assert (x == other).all()
            assert (y == label).all()
    assert cached.digest == plain.digest
    assert cached.spec == plain.spec


def test_the_middle_of_an_epoch_of_six_million_reads_no_example_before_it():
    read = []

    class Counted:
        digest = "counted"

        def __len__(self):
            return 6_000_000

        def __getitem__(self, number):
            read.append(number)
            return np.float32([number % 10]), np.int32(number)

    feed = Feed(examples(Counted()), 128, Shard(), seed=0)
    first_step = feed.steps // 2
    read.clear()  # The first example, for the spec.
    order = epoch_order(6_000_000, 0, 3)[first_step * 128 :]
    labels = [labels.numpy() for _, labels, _ in feed(3, first_step).take(3)]
    np.testing.assert_array_equal(np.concatenate(labels), order[: 3 * 128])
    assert set(read) <= set(order[: 200 * 128].tolist())  # What is read ahead, at most.
