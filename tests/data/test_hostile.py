"""Data sets that are damaged, made to do harm, or no files at all: each is one line."""

import contextlib
import errno
import gzip
import io
import os
import socket
import struct
import sys
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
from support import damaged, fuzz, save_npz

from trainer import inputs
from trainer.data import archives, idx, sources
from trainer.data.arrays import ArrayDataset  # noqa: F401  (its import takes memory)
from trainer.data.dataset import Splits
from trainer.data.digits import ARRAYS, Digits
from trainer.errors import DataError, InputError, TrainerError

MEGABYTE = 10**6


@contextlib.contextmanager
def taking_at_most(size: int):
    """Fails if Python and NumPy take more memory in the block."""
    tracemalloc.start()
    try:
        yield
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken <= size, f"{taken:,} bytes"


def refusal(error: type[TrainerError], path) -> str:
    """Returns the one line, naming the source, with which it is refused in little memory."""
    with taking_at_most(5 * MEGABYTE), pytest.raises(error) as caught:
        sources.load(str(path))
    text = str(caught.value)
    assert type(caught.value) is error
    assert str(path) in text
    assert text.isprintable()
    assert len(text) < 1000 + len(str(path))
    return text


def npy(array=None, **header) -> bytes:
    """An array in NumPy's format; ``header`` replaces fields of its header."""
    array = np.zeros(9, np.uint8) if array is None else array
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    text = f"{fields}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + array.tobytes()


def archive(path, compression=zipfile.ZIP_DEFLATED, **members: bytes):
    """Writes an .npz of two images for each part; ``members`` replaces some of its files."""
    images, labels = np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8)
    sound = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, array in sound.items():
            file.writestr(f"{name}.npy", members.get(name, npy(array)))
    return path


# ---- other kinds of files


@pytest.mark.parametrize(
    ("content", "received"),
    [
        (b"label,1x1,1x2\n7,0,0\n", "text ('label,1x1,1x2 7,0,0'), such as CSV"),
        (b"\n7;0;0", "text ('7;0;0'), such as CSV"),
        (b"\x80\x04\x95", "a pickle, which is never read"),
        (gzip.compress(b"x", mtime=0), "a gzip file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"PAR1", "a Parquet file"),
        (bytes(64), "begins with the bytes 00 00 00 00"),
        (b"\x00\x00\x08\x03", "one IDX file. Name the folder"),
        (b"", "an empty file"),
    ],
    ids=("csv", "text", "pickle", "gzip", "hdf5", "parquet", "zeros", "idx", "empty"),
)
def test_another_kind_of_file_is_called_what_it_is(tmp_path, content, received):
    (tmp_path / "data").write_bytes(content)
    text = refusal(DataError, tmp_path / "data")
    assert received in text
    assert "allow_pickle" not in text
    assert "savez" in text or "Name the folder" in text or "Fetch or make it again" in text


# ---- no regular files


@pytest.fixture
def pipe(tmp_path):
    """A named pipe with a writer that waits; whoever opens it reads nothing, and need not wait."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"",))
    writer.start()
    yield path
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer.join()
    os.close(reader)


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files.")


@needs_pipes
def test_a_pipe_is_refused_and_not_waited_for(pipe):
    assert "a pipe, not a regular file" in refusal(InputError, pipe)


@needs_pipes
def test_a_pipe_in_place_of_an_idx_file_is_refused(pipe):
    pipe.parent.joinpath(idx.FILES["x_train"]).symlink_to(pipe)
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\. Received: a pipe"):
        sources.load(str(pipe.parent))


@needs_pipes
def test_a_pipe_in_keras_cache_is_refused(pipe, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(pipe.parent))
    (pipe.parent / "datasets").mkdir()
    (pipe.parent / "datasets" / "mnist.npz").symlink_to(pipe)
    with pytest.raises(InputError, match=r"datasets/mnist\.npz\. Received: a pipe"):
        sources.load("keras")


@needs_pipes
def test_a_pipe_that_takes_a_files_place_is_refused(pipe, monkeypatch):
    # What a path was when it was looked at says nothing about what is opened.
    (pipe.parent / "file").touch()
    regular = (pipe.parent / "file").stat()
    monkeypatch.setattr("pathlib.Path.stat", lambda path: regular)
    with pytest.raises(OSError, match="a pipe") as caught:
        inputs.open_file(pipe)
    assert caught.value.errno == errno.EINVAL


@needs_pipes
def test_devices_and_sockets_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "a device, not a regular file" in refusal(InputError, os.devnull)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert "a socket, not a regular file" in refusal(InputError, "socket")


@needs_pipes
def test_a_file_that_has_nothing_to_read_yet_is_not_waited_for(pipe):
    # As /proc/kmsg, which is a regular file, and root's.
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # It has a writer, who writes nothing.
    with io.BufferedReader(inputs._File(descriptor)) as file:
        with pytest.raises(BlockingIOError, match="a file that waits"):
            file.read(9)
        os.write(descriptor, b"abc")
        assert file.read1(9) == b"abc"


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(InputError, match=r"name too long|which does not exist") as caught:
        sources.load(name)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="Nothing is closed to root."
)
def test_a_folder_that_is_closed_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "Permission denied" in refusal(InputError, tmp_path / "closed" / "data.npz")


# ---- sizes that are declared


def test_a_header_that_declares_more_than_there_is_is_refused(tmp_path):
    shape = (8_000_000, 28, 28)
    lie = npy(np.zeros(9, np.uint8), shape=shape), npy(np.zeros(9, np.uint8), shape=shape[:1])
    path = archive(tmp_path / "lie.npz", x_train=lie[0], y_train=lie[1])
    assert path.stat().st_size < 1000
    text = refusal(DataError, path)
    assert "Expected 6,272,000,000 bytes in x_train" in text
    assert "Received: 9." in text


@pytest.mark.parametrize("shape", [(-2, 28, 28), (2, -28, -28), (10**30, 28, 28), (True, 28, 28)])
def test_a_shape_of_odd_numbers_is_refused(tmp_path, shape):
    refusal(DataError, archive(tmp_path / "odd.npz", x_train=npy(shape=shape)))


def test_what_unpacks_to_far_more_than_pictures_do_is_refused(tmp_path):
    images = 100_000  # 78 MB of them, blank, in less than 100 kB.
    content = npy(np.zeros((images, 28, 28), np.uint8)), npy(np.zeros(images, np.uint8))
    path = archive(tmp_path / "bomb.npz", x_train=content[0], y_train=content[1])
    text = refusal(DataError, path)
    assert "unpacks to at most 200 times its size. Received: 0.1 GB" in text


def test_a_gzip_file_that_unpacks_to_far_more_is_refused(tmp_path):
    header = bytes((0, 0, 8, 3)) + struct.pack(">III", 100_000, 28, 28)
    pack = zlib_stream(header, 78_400_000)
    (tmp_path / idx.FILES["x_train"]).write_bytes(pack)
    assert "train-images-idx3-ubyte that unpacks to at most 200" in refusal(DataError, tmp_path)


def zlib_stream(head: bytes, zeros: int) -> bytes:
    with gzip.open(content := io.BytesIO(), "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(0, zeros, 10**6):
            file.write(bytes(10**6))
    return content.getvalue()


def test_more_than_half_of_the_memory_is_refused(tmp_path, monkeypatch):
    path = save_npz(tmp_path / "large.npz", train=60, test=20)
    monkeypatch.setattr(archives, "total_memory", lambda: 2 * 80 * 784)
    # The labels, as int64, are beyond.
    assert "half of the memory of this machine or container. Received: 0.0 GB at" in refusal(
        DataError, path
    )
    monkeypatch.setattr(archives, "total_memory", lambda: 2 * 80 * (784 + 8))
    assert len(sources.load(str(path)).x_train) == 60


def test_the_four_idx_files_share_the_memory(tmp_path, monkeypatch):
    for name, count in (("x_train", 3), ("y_train", 3), ("x_test", 2), ("y_test", 2)):
        shape = (count, 28, 28) if name.startswith("x") else (count,)
        header = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes()
        (tmp_path / idx.FILES[name]).write_bytes(header + bytes(int(np.prod(shape))))
    monkeypatch.setattr(archives, "total_memory", lambda: 2 * 5 * 785)
    assert len(sources.load(str(tmp_path)).x_train) == 3
    monkeypatch.setattr(archives, "total_memory", lambda: 2 * 5 * 785 - 1)
    with pytest.raises(DataError, match=r"at .*t10k-labels-idx1-ubyte\. Use fewer"):
        sources.load(str(tmp_path))


def test_a_process_without_that_memory_is_told_so(tmp_path, monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(archives, "aligned_empty", full)
    text = refusal(DataError, save_npz(tmp_path / "large.npz"))
    assert "that this process has memory for" in text


@pytest.mark.skipif(sys.platform == "win32", reason="The file has a hole, which Windows fills.")
def test_a_directory_that_declares_its_length_is_not_believed(tmp_path):
    path, length = tmp_path / "directory.npz", 200_000_000
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(length)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, length - 4, 4, 0))
    assert "a directory of 199,999,996 bytes" in refusal(DataError, path)


# ---- layouts


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_whose_pieces_are_of_any_size_is_refused(tmp_path, compression):
    path = archive(tmp_path / "other.npz", compression)
    assert "stored or deflated" in refusal(DataError, path)


def test_an_encrypted_archive_is_refused(tmp_path):
    content = bytearray(archive(tmp_path / "x.npz").read_bytes())
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + at] |= 1
    (tmp_path / "x.npz").write_bytes(content)
    assert "encrypted" in refusal(DataError, tmp_path / "x.npz")


@pytest.mark.parametrize(
    "header",
    [
        npy(descr="|O"),
        npy(descr="<m8[s]"),
        npy(descr=[("\x1b[31m", "|u1")]),
        npy(shape="(" * 150),
        npy(descr="x" * 5000),
        npy()[:9],
        b"\x93NUMPY\3\0" + npy()[8:],
        b"\x93NUMPY\1\0\x20\0" + b"-" * 31 + b"1",
        b"\x93NUMPY\1\0\x08\0" + b"'\\d'()()",
        b"no array",
        b"",
    ],
)
def test_an_array_with_another_header_is_refused(tmp_path, header):
    text = refusal(DataError, archive(tmp_path / "odd.npz", y_train=header))
    assert "allow_pickle" not in text


def test_arrays_in_other_orders_are_read(tmp_path, mnist):
    few = mnist.first(50, 20)
    arrays = {name: getattr(few, name) for name in ARRAYS}
    arrays["x_train"] = np.asfortranarray(few.x_train)
    arrays["y_train"] = few.y_train.astype(">i8")
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    loaded = sources.load(str(tmp_path / "x.npz"))
    assert loaded.sha256 == few.sha256
    assert loaded.x_train.flags.c_contiguous


def test_an_idx_file_of_many_dimensions_is_refused(tmp_path):
    content = bytes((0, 0, 8, 100)) + struct.pack(">I", 1) * 100 + b"\0"
    (tmp_path / idx.FILES["x_train"]).write_bytes(content)
    with pytest.raises(DataError, match="one to three dimensions"):
        sources.load(str(tmp_path))


# ---- fuzzing: whatever the bytes are, a data set or one line, in bounded memory

MORE = [100, pytest.param(2_000, marks=pytest.mark.full)]


def load_or_refuse(path, written, content: bytes) -> None:
    written.write_bytes(content)
    # Four arrays, each of the size that may be declared without more ado.
    with taking_at_most(4 * archives.SMALL + 5 * MEGABYTE):
        try:
            assert isinstance(sources.load(str(path)), (Digits, Splits))
        except TrainerError as error:
            text = str(error)
            assert str(path) in text
            assert text.isprintable()
            assert "allow_pickle" not in text


@pytest.mark.parametrize("examples", MORE)
def test_any_archive_is_a_data_set_or_one_line(tmp_path, examples):
    corpus = [
        save_npz(tmp_path / "a.npz", train=2, test=1).read_bytes(),
        archive(tmp_path / "b.npz").read_bytes(),
        archive(tmp_path / "c.npz", zipfile.ZIP_STORED).read_bytes(),
    ]
    path = tmp_path / "x.npz"
    fuzz(examples, lambda content: load_or_refuse(path, path, content), damaged(corpus))


@pytest.mark.parametrize("examples", MORE)
def test_any_header_of_an_array_is_a_data_set_or_one_line(tmp_path, examples):
    from hypothesis import strategies as st

    dtypes = st.sampled_from([*np.typecodes["All"], "|u1", ">i8", "<m8[s]", "V3", "U2"])
    lengths = st.sampled_from([0, 1, 2, 28, -1, 2**31, 2**63, True]) | st.integers()
    headers = st.builds(
        lambda content, **fields: npy(np.frombuffer(content, np.uint8), **fields),
        st.sampled_from([bytes(n) for n in (0, 1, 2, 16, 784, 1568, 1569)]),
        descr=dtypes | st.lists(st.tuples(st.text(max_size=3), dtypes), max_size=3) | st.text(),
        shape=st.lists(lengths, max_size=5).map(tuple) | st.just((2, 28, 28)) | st.text(),
        fortran_order=st.booleans() | st.none(),
    )

    def written(name: str, header: bytes) -> None:
        content = archive(tmp_path / "x.npz", **{name: header}).read_bytes()
        load_or_refuse(tmp_path / "x.npz", tmp_path / "x.npz", content)

    fuzz(examples, written, st.sampled_from(ARRAYS), headers | damaged([npy()]))


@pytest.mark.parametrize("examples", MORE)
def test_any_idx_file_is_a_data_set_or_one_line(tmp_path, examples):
    x, y = (
        bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes() + bytes(int(np.prod(shape)))
        for shape in ((2, 28, 28), (2,))
    )
    for name, file in idx.FILES.items():
        (tmp_path / file).write_bytes(x if name.startswith("x") else y)
    images = tmp_path / idx.FILES["x_train"]
    corpus = [x, gzip.compress(x, mtime=0), y, gzip.compress(x[:16] + bytes(99_999), mtime=0)]
    fuzz(examples, lambda content: load_or_refuse(tmp_path, images, content), damaged(corpus))


@pytest.mark.parametrize("examples", MORE)
def test_any_npy_file_is_a_data_set_or_one_line(tmp_path, examples):
    np.save(tmp_path / "y.npy", np.zeros(2, np.uint8))
    images = tmp_path / "x.npy"
    corpus = [npy(np.zeros((2, 28, 28), np.uint8)), npy(np.zeros((2, 28, 28), np.float32)), npy()]
    fuzz(examples, lambda content: load_or_refuse(tmp_path, images, content), damaged(corpus))


@pytest.mark.parametrize("examples", MORE)
def test_any_csv_file_is_a_data_set_or_one_line(tmp_path, examples):
    path = tmp_path / "x.csv"
    corpus = [
        b"label,a,b,c,d\n0,1,2,3,4\n1,2,3,4,5\n",
        b"0,1,2,3,4\n1,2,3,4,5\n",
        b'"label","a"\r\n0,0.5\r\n1,1\r\n',
    ]
    fuzz(examples, lambda content: load_or_refuse(path, path, content), damaged(corpus))


def test_a_csv_of_long_lines_takes_little_memory(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"1," * 4 * MEGABYTE)
    with taking_at_most(40 * MEGABYTE), pytest.raises(DataError):
        sources.load(str(tmp_path / "x.csv"))
