import gzip
import os
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT, save_npz

import trainer
from trainer.data import idx, sources
from trainer.data.digits import ARRAYS, Digits
from trainer.errors import DataError, InputError, UsageError


def save_idx(folder, digits, *, suffix="", wrap=bytes):
    """Writes the four files in MNIST's own format."""
    folder.mkdir(exist_ok=True)
    for name, file in idx.FILES.items():
        array = getattr(digits, name)
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{file}{suffix}").write_bytes(wrap(header + array.tobytes()))
    return folder


@pytest.fixture
def few(mnist):
    return mnist.first(50, 20)


def assert_equal(digits, expected):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(digits, name), getattr(expected, name))
    assert digits.sha256 == expected.sha256


def test_the_bundled_data_is_mnist(mnist):
    assert mnist.x_train.shape == (60000, 28, 28)
    assert mnist.x_test.shape == (10000, 28, 28)
    assert mnist.x_train.dtype == mnist.y_train.dtype == np.uint8
    # Figures of MNIST that were published elsewhere.
    assert mnist.x_train.mean() == pytest.approx(33.3184, abs=1e-4)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.y_train).tolist() == counts


def test_the_licence_of_the_data_is_beside_it():
    text = (ROOT / "trainer" / "data" / "assets" / "LICENSE.mnist").read_text()
    assert "Yann LeCun and Corinna Cortes" in text
    assert "Attribution-Share Alike 3.0" in text


@pytest.mark.parametrize(("suffix", "wrap"), [("", bytes), (".gz", gzip.compress)])
def test_idx_files_are_read_gzipped_or_not(tmp_path, few, suffix, wrap):
    assert_equal(sources.load(str(save_idx(tmp_path, few, suffix=suffix, wrap=wrap))), few)


def test_an_npz_of_keras_layout_is_read(tmp_path, few):
    path = tmp_path / "some.npz"
    np.savez(path, **{name: getattr(few, name) for name in ARRAYS})
    assert_equal(sources.load(str(path)), few)


def test_labels_of_any_integer_type_give_the_same_digest(tmp_path, few):
    path = tmp_path / "some.npz"
    arrays = {name: getattr(few, name) for name in ARRAYS}
    np.savez(path, **{**arrays, "y_train": few.y_train.astype(np.int64)})
    assert_equal(sources.load(str(path)), few)


def test_another_pixel_gives_another_digest(few):
    pixels = few.x_test.copy()
    pixels[3, 4, 5] ^= 1
    assert Digits(few.x_train, few.y_train, pixels, few.y_test).sha256 != few.sha256


def test_a_limit_takes_the_first_and_is_never_clamped(few):
    assert len(few.first(7, None).x_train) == 7
    assert len(few.first(None, 7).y_test) == 7
    with pytest.raises(UsageError, match=r"test_limit must be at most the 20 .*test_limit=21"):
        few.first(None, 21)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.full((60, 28, 28), -0.5)}, "values from -0.5 to -0.5. Scale them"),
        ({"x_train": np.full((60, 28, 28), 256)}, "values from 256 to 256"),
        ({"x_test": np.full((20, 28, 28), np.nan)}, "NaN or infinity"),
        ({"x_train": np.zeros((60, 28, 27), np.uint8)}, r"\(28, 27, 1\) in x_train, \(28, 28, 1\)"),
        ({"x_train": np.zeros((60, 3, 28, 28), np.uint8)}, r"numpy\.moveaxis\(images, 1, -1\)"),
        ({"x_train": np.zeros((60, 28, 28, 4), np.uint8)}, r"1 or 3 channels\. Received: uint8"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, int)}, "at least 1"),
        ({"x_train": np.zeros((59, 28, 28), np.uint8)}, "59 images in x_train and 60 labels"),
        (
            {"y_train": np.arange(60) % 11 + 5},
            r"none of class 0, 1, 2, 3, 4, .* labels up to 15\. Number",
        ),
        ({"y_train": np.arange(60) % 3 * 2**40}, "without gaps"),
        ({"y_test": np.arange(20) % 10 - 1}, "labels from -1 to 9"),
        ({"y_test": np.zeros(20)}, r"y_test as integers .*Received: float64"),
        ({"y_test": np.eye(20, 10, dtype=int)}, "one 1 in each row of y_test"),
        ({"y_test": np.array([None] * 20)}, "Python objects in y_test, which are never read"),
    ],
)
def test_arrays_that_are_not_digits_are_refused(tmp_path, arrays, message):
    path = save_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        sources.load(str(path))


def test_an_array_that_is_missing_is_named(tmp_path):
    np.savez(tmp_path / "bad.npz", x_train=np.zeros(3))
    with pytest.raises(DataError, match="Received: x_train without y_train"):
        sources.load(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match="archive of plain arrays"):
        sources.load(str(tmp_path / "bad.npz"))


def test_a_bare_array_is_refused(tmp_path):
    np.save(tmp_path / "bad.npy", np.zeros(3))
    with pytest.raises(DataError, match="one bare array"):
        sources.load(str(tmp_path / "bad.npy"))


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    path = save_npz(tmp_path / "bad.npz", y_test=np.array([Trap()] * 20, object))
    with pytest.raises(DataError):
        sources.load(str(path))
    assert not (tmp_path / "was run").exists()


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path):
    whole = save_npz(tmp_path / "whole.npz").read_bytes()
    for end in np.linspace(0, len(whole) - 1, 40, dtype=int):
        (tmp_path / "bad.npz").write_bytes(whole[:end])
        with pytest.raises(DataError):
            sources.load(str(tmp_path / "bad.npz"))


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    path = save_npz(tmp_path / "whole.npz", train=4, test=2)
    whole, expected = path.read_bytes(), sources.load(str(path)).sha256
    noise = np.random.default_rng(1)
    # The structure of the archive is at its ends: those bytes are all tried, the pixels by sample.
    places = {*range(300), *range(len(whole) - 500, len(whole)), *noise.integers(0, len(whole), 60)}
    refused = 0
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << noise.integers(8)
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            assert sources.load(str(tmp_path / "bad.npz")).sha256 == expected
        except DataError:
            refused += 1
    assert refused > len(places) / 2


def test_a_changed_byte_in_the_bundled_file_is_refused(tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    assets.mkdir()
    whole = bytearray((ROOT / "trainer" / "data" / "assets" / "mnist.npz").read_bytes())
    whole[len(whole) // 2] ^= 1
    (assets / "mnist.npz").write_bytes(whole)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(DataError):
        sources.load("bundled")


def test_other_data_in_the_bundled_files_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    save_npz(tmp_path / "assets" / "mnist.npz")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(DataError, match=f"SHA-256 {sources.MNIST_SHA256}"):
        sources.load("bundled")


def test_without_the_bundled_file_the_package_is_to_be_installed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(InputError, match=r"mnist\.npz.*: install digits-trainer again\.$"):
        sources.load("bundled")


def test_nothing_at_the_path_names_the_sources(tmp_path):
    with pytest.raises(InputError, match=r"bundled, keras, tfds:NAME, an \.npz file or a folder"):
        sources.load(str(tmp_path / "nothing"))


def test_a_folder_without_a_file_names_it(tmp_path, few):
    folder = save_idx(tmp_path, few)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="without t10k-labels-idx1-ubyte"):
        sources.load(str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "Expected 15680 bytes of shape .* Received: 15679"),
        (lambda raw: raw + b"\0", "Received: 15681"),
        (lambda raw: b"", "an empty file"),
        (lambda raw: raw[:10], "Received: 00 00 08 03"),
        (lambda raw: b"\x00\x00\x09" + raw[3:], "Received: 00 00 09 03"),
        (lambda raw: gzip.compress(raw)[:-9], "damaged"),
        (lambda raw: b"\x1f\x8b" + raw, "damaged"),
    ],
)
def test_a_damaged_idx_file_says_how(tmp_path, few, damage, message):
    path = save_idx(tmp_path, few) / idx.FILES["x_test"]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        sources.load(str(tmp_path))


@pytest.mark.full
def test_tensorflow_datasets_are_read_in_their_own_format(command, tmp_path, few):
    import tensorflow_datasets as tfds

    from trainer.runtime import tf

    def examples(images, labels):
        return tf.data.Dataset.from_tensor_slices(
            {"image": images[..., np.newaxis], "label": labels.astype(np.int64)}
        )

    tfds.dataset_builders.store_as_tfds_dataset(
        name="mnist",
        version=str(tfds.builder_cls("mnist").VERSION),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        split_datasets={
            "train": examples(few.x_train, few.y_train),
            "test": examples(few.x_test, few.y_test),
        },
        data_dir=tmp_path,
        disable_shuffling=True,
    )
    # The folder is looked up when the package is imported: so, in a process of its own.
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "from trainer.data import sources; print(sources.load('tfds:mnist').sha256)",
        ],
        env={**command.env, "TFDS_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.stdout == f"{few.sha256}\n", shown.stderr


def test_the_library_takes_a_path_of_any_kind_and_name(tmp_path):
    path = save_npz(tmp_path / "digits.npz").rename(tmp_path / "digits-\udcff.npz")
    assert trainer.load_data(path).sha256 == trainer.load_data(str(path)).sha256


@pytest.mark.full
def test_tensorflow_datasets_of_other_data_are_refused_before_their_download(command):
    program = (
        "from trainer.data import sources\n"
        "from trainer.errors import DataError\n"
        "import tensorflow_datasets as tfds\n"
        "def download(*arguments, **options):\n"
        "    raise SystemExit('downloading')\n"
        "tfds.core.DatasetBuilder.download_and_prepare = download\n"
        "for name in ('imagenette', 'imdb_reviews'):\n"
        "    try:\n"
        "        sources.load(f'tfds:{name}')\n"
        "    except DataError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**command.env, "TFDS_DATA_DIR": str(command.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    pictures, texts = done.stdout.splitlines()
    assert "Expected images of one size in tfds:imagenette. Received: " in pictures
    assert "Expected the features image and label in tfds:imdb_reviews. Received: " in texts


@pytest.mark.full
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tensorflow_datasets_of_any_images_are_read_by_number(command, tmp_path, file_format):
    program = """
import os, sys
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from trainer.data import sources

images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
labels = np.arange(30) % 10
tfds.dataset_builders.store_as_tfds_dataset(
    name="cifar10",
    version=str(tfds.builder_cls("cifar10").VERSION),
    features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
        "id": tfds.features.Text(),
    }),
    split_datasets={
        part: tf.data.Dataset.from_tensor_slices(
            {"image": images[:count], "label": labels[:count], "id": ["a"] * count}
        )
        for part, count in (("train", 30), ("test", 20))
    },
    data_dir=os.environ["TFDS_DATA_DIR"],
    disable_shuffling=True,
    file_format=sys.argv[1],
)
splits = sources.load("tfds:cifar10")
assert (len(splits.train), len(splits.test)) == (30, 20)
[(x, y)] = splits.train.batches(np.array([7, 29, 3]), 3)
assert (x.numpy() == images[[7, 29, 3]]).all()
assert y.numpy().tolist() == [7, 9, 3]
assert len(splits.train.classes) == 10
if sys.argv[1] == "array_record":
    small = sources.load("tfds:cifar10", image_size=(16, 24)).train
    [(x, _)] = small.batches(np.array([3]), 1)
    expected = tf.image.resize(images[3], (16, 24), antialias=True)
    assert x.shape == (1, 16, 24, 3) and x.dtype == small.spec[0].dtype == tf.float32
    assert np.allclose(x[0], expected)
    assert small.digest != splits.train.digest
again = sources.load("tfds:cifar10")
assert len({splits.train.digest, splits.test.digest, again.train.digest}) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program, file_format],
        env={**command.env, "TFDS_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- images that are no digits


def load(path, **options):
    return sources.load(str(path), **options)


def pixels(data, numbers=(0, 5)):
    [(x, _)] = data.batches(np.array(numbers), len(numbers))
    return x.numpy()


COLOUR = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), np.uint8)
THREE = np.arange(12) % 3


@pytest.mark.parametrize(
    "arrays",
    [
        {"x_train": COLOUR, "y_train": THREE, "x_test": COLOUR[:6], "y_test": THREE[:6]},
        {"x_train": COLOUR / 255, "y_train": np.eye(3)[THREE], "x_test": COLOUR[:6] / 255}
        | {"y_test": np.eye(3, dtype=bool).astype(int)[THREE[:6]]},
        {"train_images": COLOUR.astype("int16"), "train_labels": THREE[:, None]}
        | {"test_images": COLOUR[:6].astype(">f4"), "test_labels": THREE[:6, None] + 0},
        {"x_train": COLOUR, "y_train": THREE + 1, "x_test": COLOUR[:6], "y_test": THREE[:6] + 1},
    ],
    ids=["numbers", "fractions and one-hot", "MedMNIST", "from 1"],
)
def test_images_and_labels_of_any_layout_become_the_same(tmp_path, arrays):
    np.savez(tmp_path / "images.npz", **arrays)
    splits = load(tmp_path / "images.npz")
    assert splits.train.spec[0].shape == (8, 6, 3)
    assert splits.train.spec[0].dtype == "uint8"
    assert (len(splits.train), len(splits.test), splits.validation) == (12, 6, None)
    assert len(splits.train.classes) == 3
    assert (pixels(splits.train) == COLOUR[[0, 5]]).all()
    np.savez(
        tmp_path / "same.npz", x_train=COLOUR, y_train=THREE, x_test=COLOUR[:6], y_test=THREE[:6]
    )
    assert load(tmp_path / "same.npz").train.digest == splits.train.digest


@pytest.mark.parametrize("layout", ["(n, h, w, 1)", "fractions", "one-hot", "wide labels"])
def test_digits_of_any_layout_are_digits(tmp_path, few, layout):
    arrays = {name: getattr(few, name) for name in ARRAYS}
    if layout == "(n, h, w, 1)":
        arrays["x_train"] = arrays["x_train"][..., None]
    if layout == "fractions":
        arrays["x_test"] = arrays["x_test"].astype("float32") / 255
    if layout == "one-hot":
        arrays["y_train"] = np.eye(10, dtype="float32")[arrays["y_train"]]
    if layout == "wide labels":
        arrays["y_test"] = arrays["y_test"].astype(">u8")
    np.savez(tmp_path / "digits.npz", **arrays)
    assert_equal(load(tmp_path / "digits.npz"), few)


def test_an_archive_of_one_pair_has_no_test_images(tmp_path, few):
    np.savez(tmp_path / "digits.npz", x=few.x_train, y=few.y_train)
    digits = load(tmp_path / "digits.npz")
    assert (len(digits.x_train), len(digits.x_test)) == (50, 0)


@pytest.mark.parametrize(
    "name", [str, lambda name: name.replace("-idx", ".idx"), lambda name: f"emnist-digits-{name}"]
)
def test_idx_files_are_found_by_either_spelling_of_their_names(tmp_path, few, name):
    save_idx(tmp_path, few)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / name(path.name))
    assert_equal(load(tmp_path), few)


def test_of_several_data_sets_of_idx_files_one_is_named(tmp_path, few, mnist):
    save_idx(tmp_path, mnist.first(9, 3))
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / f"emnist-letters-{path.name}")
    save_idx(tmp_path / "other", few)
    for path in list((tmp_path / "other").iterdir()):
        path.rename(tmp_path / f"emnist-digits-{path.name}")
    with pytest.raises(InputError, match=r"of 2: emnist-digits, emnist-letters\. Name one: data="):
        load(tmp_path)
    assert_equal(load(tmp_path / "emnist-digits"), few)


def test_npy_files_are_mapped_into_memory(tmp_path):
    for name, array in (("x_train", COLOUR), ("y_train", THREE), ("x_val", COLOUR[:4])):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "y_val.npy", THREE[:4])
    splits = load(tmp_path)
    assert (splits.train.arrays[0].filename, splits.test) == (tmp_path / "x_train.npy", None)
    assert (pixels(splits.train) == COLOUR[[0, 5]]).all()
    assert len(splits.validation) == 4


def test_a_damaged_npy_file_is_named(tmp_path):
    np.save(tmp_path / "x.npy", COLOUR)
    np.save(tmp_path / "y.npy", np.array([None] * 12))
    with pytest.raises(DataError, match="Python objects in y, which are never read"):
        load(tmp_path)
    (tmp_path / "y.npy").unlink()
    with pytest.raises(DataError, match="Received: x_train without y_train"):
        load(tmp_path)


@pytest.mark.parametrize("header", ["label,{}\n", ""])
def test_a_csv_file_has_a_row_for_each_image(tmp_path, few, header):
    names = ",".join(f"pixel{number}" for number in range(784))
    rows = np.column_stack([few.y_train, few.x_train.reshape(50, -1)])
    text = header.format(names) + "\n".join(",".join(map(str, row)) for row in rows)
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "test.csv").write_text("of pictures without labels")
    for path in (tmp_path, tmp_path / "train.csv"):
        digits = load(path)
        assert (digits.x_train == few.x_train).all()
        assert digits.y_train.tolist() == few.y_train.tolist()
        assert len(digits.x_test) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixel0,pixel1,pixel2,pixel3\n1,2,3,4\n", "a column label, and one for each pixel"),
        ("label,a,b\n0,1,2\n", "a square image in each row of .* Received: 3 columns"),
        ("label,a,b,c,d\n0,1,2,3,x\n", "5 numbers in each row of .* Received: could not convert"),
        ("label,a,b,c,d\n0,1,2,3,4\n1,2,3\n", "5 numbers in each row of .* number of columns"),
        ("label,a,b,c,d\n0.5,1,2,3,4\n", "integers as labels"),
        ("label,a,b,c,d\n", "Expected rows of numbers"),
        ("label,a,b,c,d\n0,1,2,3,256\n1,1,2,3,4\n", "Received: values from 1 to 256"),
        ("", "Received: an empty file"),
        ("\x80\x04", "Expected a CSV file at"),
    ],
)
def test_a_csv_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "images.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "images.csv")
