"""Files that were made to do harm, given to the command as a user gives them."""

import collections
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image, ImageDraw
from support import TIMEOUT, Command

from trainer.errors import DataError, InputError
from trainer.inference import model_file, pictures, segmentation
from trainer.training import artifacts as output

GIGABYTE = 10**9
PROG = "python -m trainer.predict"
NAMED = re.compile(rf"{PROG}: error: Expected an? (?:image at|digit in) (.*?)\. Received: .+\.")


class Run:
    """Runs a program as a child of a small process, which says how much memory it took.

    The system counts for a child what its parent had when it started it, and this process is large.
    """

    CODE = (
        "import json, os, subprocess, sys\n"
        "process = subprocess.Popen(sys.argv[2:])\n"
        "_, status, usage = os.wait4(process.pid, 0)\n"
        "scale = 1 if sys.platform == 'darwin' else 1024\n"
        "answer = [os.waitstatus_to_exitcode(status), usage.ru_maxrss * scale]\n"
        "open(sys.argv[1], 'w').write(json.dumps(answer))\n"
    )

    def __init__(self, command: Command, *program: object) -> None:
        answer = command.folder / ".answer.json"
        done = subprocess.run(
            [sys.executable, "-c", self.CODE, answer, sys.executable, *map(str, program)],
            cwd=command.folder,
            env=command.env,
            capture_output=True,
            timeout=TIMEOUT,
            check=True,
        )
        self.stdout = done.stdout.decode(errors="replace").splitlines()
        self.stderr = done.stderr.decode(errors="replace").splitlines()
        self.code, self.memory = json.loads(answer.read_text())
        print(f"exit code {self.code}, {self.memory:,} bytes")  # Shown by pytest -rP.


@pytest.fixture(scope="module")
def cnn():
    from trainer.models import cnn as model

    return model.build(optimizer="adadelta", learning_rate=1.0, seed=0)


@pytest.fixture(scope="module")
def sound(cnn, tmp_path_factory):
    """A model file with nothing wrong."""
    path = tmp_path_factory.mktemp("sound") / "mnist.h5"
    path.write_bytes(output._hdf5(cnn))
    return path


# ---- pictures


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    image.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


def stroke() -> Image.Image:
    image = Image.new("L", (96, 80), 255)
    ImageDraw.Draw(image).line((48, 16, 44, 64), fill=0, width=7)
    return image


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    width: int, height: int, *, bits: int = 8, colour: int = 0, more: bytes = b"", rows: int = -1
) -> bytes:
    """A PNG of zeros, compressed as it is made; ``rows`` of it are really there."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + width * samples * bits // 8)
    pack = zlib.compressobj(1)
    content = [pack.compress(row) for _ in range(height if rows < 0 else rows)] + [pack.flush()]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    parts = chunk(b"IHDR", header), palette, more, chunk(b"IDAT", b"".join(content))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int, int, int], after: int = 0) -> bytes:
    """A little-endian TIFF of one directory: tag, type, count, value."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", after)


def progressive(scans: int) -> bytes:
    """A JPEG whose last scan comes again and again: little to read, long to decode."""
    content = encoded(Image.new("L", (2000, 2000), 255), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def samples() -> dict[str, bytes]:
    """One small picture of each format and mode."""
    pictures._formats()  # HEIC too, where it can be read.
    image, exif = stroke(), Image.Exif()
    exif[0x112] = 6
    made = {f"png-{mode}.png": encoded(image.convert(mode), "PNG") for mode in ("L", "P", "RGBA")}
    made |= {f"jpeg-{mode}.jpg": encoded(image.convert(mode), "JPEG") for mode in ("L", "CMYK")}
    made["jpeg-exif.jpg"] = encoded(image, "JPEG", exif=exif, progressive=True)
    made["bmp.bmp"], made["gif.gif"] = encoded(image, "BMP"), encoded(image, "GIF")
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg"):
        made[f"tiff-{compression}.tif"] = encoded(image, "TIFF", compression=compression)
    for kind in ("WEBP", "AVIF", "HEIF", "MPO"):
        if kind in pictures._formats() and kind in Image.SAVE:
            name = f"{kind.lower()}.{'jpg' if kind == 'MPO' else kind.lower()}"
            more = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
            made[name] = encoded(image.convert("RGB"), kind, **more)
    return made


def damaged(name: str, content: bytes, draw: random.Random) -> dict[str, bytes]:
    cut = {
        f"{part:02}": content[: max(1, len(content) * part // 100)] for part in (1, 20, 50, 80, 99)
    }
    for number in range(5):
        flipped = bytearray(content)
        for _ in range(4):
            # Where the header is, more often.
            at = draw.randrange(min(len(content), draw.choice((64, len(content)))))
            flipped[at] ^= 1 << draw.randrange(8)
        cut[f"flip{number}"] = bytes(flipped)
    return {f"{how}-{name}": made for how, made in cut.items()}


def odd() -> dict[str, bytes]:
    """What is no picture, or none with a digit, and takes little time to say so."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (200, 200), np.uint8)
    text = b"A" * 5_000_000
    webp = encoded(stroke(), "WEBP", lossless=True)
    at = webp.index(b"VP8L") + 9
    values = np.full((40, 40), np.nan, np.float32)
    values[5:9] = np.inf
    dots = np.full((640, 640), 255, np.uint8)
    for top in range(4, 636, 20):
        for left in range(4, 636, 20):
            dots[top : top + 9, left : left + 9] = 0
    width, height = (256, 4, 1, 20_000), (257, 4, 1, 20_000)
    return {
        "empty.png": b"",
        "text.png": b"no picture\n" * 100,
        "zip.png": zipped({"x.png": b"x"}),
        "pickle.png": pickle.dumps(Marks("pickled")),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(m) (w) file\n",
        "pdf.png": b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj\n",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        "ppm.png": b"P6 9 9 255\n" + bytes(243),
        "fits.tif": b"SIMPLE  =                    T" + bytes(2850),
        "one.png": png(1, 1),
        "tall.png": png(1, 40_000),
        "wide.png": png(40_000, 1),
        "black.png": png(99, 99),
        "white.bmp": encoded(Image.new("L", (99, 99), 255), "BMP"),
        "clear.png": png(99, 99, colour=6),
        "noise.png": encoded(Image.fromarray(noise), "PNG"),
        "dots.png": encoded(Image.fromarray(dots), "PNG"),
        "slope.png": encoded(Image.linear_gradient("L"), "PNG"),
        "circle.png": encoded(Image.radial_gradient("L"), "PNG"),
        "nan.tif": encoded(Image.fromarray(values), "TIFF"),
        "inf.tif": encoded(Image.fromarray(np.full((9, 9), -np.inf, np.float32)), "TIFF"),
        "max.tif": encoded(Image.fromarray(np.float32([[3e38, -3e38]] * 9)), "TIFF"),
        "none.png": png(0, 0, rows=1),
        "2-31.png": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)),
        "claim.png": png(6000, 6000, rows=3),
        "claim.bmp": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 2**30, 2**30, 1, 24, *[0] * 6),
        "claim.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x02\0\0\0;",
        "claim.webp": webp[:at] + b"\xff\xff\xff\x0f" + webp[at + 4 :],
        "claim.tif": tiff(width, height, (273, 4, 1, 8), (279, 4, 1, 2**32 - 1)),
        "tags.tif": tiff((256, 4, 2**31, 8), (257, 4, 2**31, 8), (273, 4, 2**30, 8)),
        "loop.tif": tiff((256, 4, 1, 9), (257, 4, 1, 9), (330, 4, 1, 8), (34665, 4, 1, 8), after=8),
        "text-bomb.png": png(9, 9, more=chunk(b"zTXt", b"k\0\0" + zlib.compress(text)) * 50),
        "icc-bomb.png": png(9, 9, more=chunk(b"iCCP", b"k\0\0" + zlib.compress(text))),
        "exif.png": png(9, 9, more=chunk(b"eXIf", b"II*\0\xff\xff\xff\xff" * 9)),
        "exif.jpg": encoded(stroke(), "JPEG", exif=b"Exif\0\0" + tiff((274, 3, 2**31, 9)) * 9),
        "scans.jpg": progressive(2000),
        "frames.gif": encoded(
            Image.new("P", (9, 9)), "GIF", save_all=True, append_images=[Image.new("P", (9, 9), 1)]
        )[:-1]
        + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x02\0\0\0;" * 500,
        "jpeg.png": encoded(stroke(), "JPEG"),
        "large.png": png(10_000, 10_000, rows=1),
        "new\nline.png": b"no picture",
        "\x1b[31mred\x1b]0;title\x07.png": b"no picture",
        "\u202egpj.png": b"no picture",
        "-rf.png": b"no picture",
        "$(touch marked).png": b"no picture",
        "x" * 240 + ".png": b"no picture",
    }


def bombs() -> dict[str, bytes]:
    """Pictures that are really as large as they say: just within the limit, and far beyond."""
    side = 6316  # 39.9 million pixels.
    made = {f"39-{colour}.png": png(side, side, colour=colour) for colour in (0, 2, 3, 4, 6)}
    made["39-16-bit.png"] = png(side, side, bits=16)
    made["39-16-bit-rgba.png"] = png(side, side, bits=16, colour=6)
    made["39-wide.png"] = png(39_900_000, 1)
    made["400.png"] = png(20_000, 20_000)
    for mode, name, options in (
        ("CMYK", "39.jpg", {"progressive": True}),
        ("RGB", "39.webp", {"method": 0}),
        ("RGBA", "39-rgba.webp", {"method": 0, "lossless": True}),
        ("P", "39.gif", {}),
        ("RGBA", "39.tif", {"compression": "tiff_deflate", "strip_size": 2**31 - 1}),
        ("F", "39-float.tif", {"compression": "tiff_deflate"}),
        ("I;16", "39-16-bit.tif", {}),
        ("RGB", "39.avif", {"speed": 10}),
        ("L", "200.gif", {}),
        ("L", "200.tif", {"compression": "tiff_deflate"}),
    ):
        wide = 14_000 if name.startswith("200") else side
        kind = Image.registered_extensions()[Path(name).suffix]
        if kind in Image.SAVE:
            made[name] = encoded(Image.new(mode, (wide, wide)), kind, **options)
    return made


class Marks:
    """What writes a file when it is unpickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple:
        return exec, (f"open({self.name!r}, 'w').close()",)


def zipped(files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        for name, part in files.items():
            archive.writestr(name, part)
    return content.getvalue()


def no_files(folder: Path) -> list[str]:
    """Puts what is no file into a folder; returns the names."""
    (folder / "folder.png").mkdir()
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "around.png").symlink_to("around.png")
    names = ["folder.png", "broken.png", "around.png"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
        names.append("pipe.png")
    if sys.platform == "linux":  # Whose names are any bytes.
        name = os.fsdecode(b"\xff\xfe.png")
        (folder / name).write_bytes(b"no picture")
        names.append(name)
    if hasattr(os, "geteuid") and os.geteuid():  # Nothing is closed to root.
        (folder / "closed.png").write_bytes(encoded(stroke(), "PNG"))
        (folder / "closed.png").chmod(0)
        names.append("closed.png")
    return names


def digits(mnist, folder: Path, cnn) -> dict[str, str]:
    """Writes digits; returns the lines that are to be said of them."""
    lines = {}
    for number in range(5):
        path = folder / f"{'0mz~é'[number]}-good.png"
        picture = Image.fromarray(255 - mnist.x_test[number])
        picture.resize((112, 112)).save(path)
        [seen] = segmentation.find(pictures.open_image(path))
        [answer] = cnn(seen.pixels[np.newaxis, ..., np.newaxis] / np.float32(255)).numpy()
        lines[path.name] = f"{path}  {answer.argmax()}  {answer.max():.1%}"
    return lines


def predict_all(
    command: Command, model: Path, folder: Path, made: dict[str, bytes], good: dict, others=()
):
    """Has the command read a folder, and checks that each file has its line and all goes on."""
    for name, content in made.items():
        (folder / name).write_bytes(content)
    there = [*made, *others, *no_files(folder), *good]
    flags = ("--threshold", 0, "--threads", 2)  # Each thread takes memory.
    done = Run(command, "-m", "trainer.predict", model, *flags, folder)
    assert not [line for line in done.stderr if not line.startswith(f"{PROG}: error: ")]
    assert not any(ord(letter) < 32 for line in done.stdout + done.stderr for letter in line)
    said = [line.rsplit("  ", 2)[0] for line in done.stdout if not line.endswith("--digits many")]
    said += [line.rsplit("  ", 3)[0] for line in done.stdout if line.endswith("--digits many")]
    matches = [NAMED.fullmatch(line) for line in done.stderr[:-1]]
    assert all(matches), done.stderr
    said += [match[1] for match in matches]
    paths = (str(folder / name) for name in there)
    expected = [path if path.isprintable() else repr(path) for path in paths]
    assert collections.Counter(said) == collections.Counter(expected)
    assert set(good.values()) <= set(done.stdout)
    assert f"Expected digits in all of {len(there):,} pictures" in done.stderr[-1]
    assert not list(command.folder.glob("marked*"))
    assert not list(command.folder.glob("pickled*"))
    assert done.memory < GIGABYTE, f"{done.memory:,} bytes"
    return done


@pytest.mark.full
def test_hostile_pictures_are_named_and_the_others_read(command, cnn, sound, mnist, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    made = {name: content for name, content in odd().items() if len(content) < 100_000}
    for number, (name, content) in enumerate(samples().items()):
        made |= dict(list(damaged(name, content, random.Random(number)).items())[number % 5 :: 5])
    made[" first.png"] = b""
    done = predict_all(command, sound, folder, made, digits(mnist, folder, cnn))
    assert done.code == 65  # The first one's.


@pytest.mark.full
def test_a_corpus_of_hostile_pictures(command, cnn, sound, mnist, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    made = odd() | bombs()
    for number, (name, content) in enumerate(samples().items()):
        made |= damaged(name, content, random.Random(number))
    assert len(made) >= 150
    (folder / "\x01.png").mkdir()
    good = digits(mnist, folder, cnn)
    done = predict_all(command, sound, folder, made, good, others=["\x01.png"])
    assert done.code == 66  # The first one's.


# ---- models


Change = Callable[[h5py.File], None]


def kernel(file: h5py.File) -> tuple[h5py.Group, str]:
    """Returns the group of the first layer's weights, and the name of its kernel in it."""
    layer = file["model_weights"][file["model_weights"].attrs["layer_names"][0]]
    path = layer.attrs["weight_names"][0]
    path = path.decode() if isinstance(path, bytes) else path
    return layer[path].parent, path.rsplit("/", 1)[1]


def replaced(make: Callable[[h5py.Group, str], None]) -> Change:
    def change(file: h5py.File) -> None:
        group, name = kernel(file)
        del group[name]
        make(group, name)

    return change


def dataset(data: object = None, **options) -> Change:
    return replaced(lambda group, name: group.create_dataset(name, data=data, **options))


def linked(link: object) -> Change:
    return replaced(lambda group, name: group.__setitem__(name, link))


def attribute(name: str, value: object, *, of: str = "/") -> Change:
    return lambda file: file[of].attrs.__setitem__(name, value)


def configured(change: Callable[[list[dict]], object]) -> Change:
    def rewrite(file: h5py.File) -> None:
        config = json.loads(file.attrs["model_config"])
        change(config["config"]["layers"])
        file.attrs["model_config"] = json.dumps(config)

    return rewrite


def layer(layers: list[dict], kind: str) -> dict:
    return next(layer["config"] for layer in layers if layer["class_name"] == kind)


def virtual(group: h5py.Group, name: str) -> None:
    layout = h5py.VirtualLayout((3, 3, 1, 32), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3, 3, 1, 32))
    group.create_virtual_dataset(name, layout)


def giant_chunk(group: h5py.Group, name: str) -> None:
    """A few numbers, in a compressed block of 1.2 GB."""
    length = 300_000_000
    made = group.create_dataset(
        name, (9,), "f4", maxshape=(None,), chunks=(length,), compression="gzip"
    )
    pack = zlib.compressobj(1)
    content = [pack.compress(bytes(4_000_000)) for _ in range(length // 1_000_000)]
    made.id.write_direct_chunk((0,), b"".join(content) + pack.flush())


def endless(file: h5py.File) -> None:
    weights = file["model_weights"]
    weights["loop"] = weights
    del weights.attrs["layer_names"]
    weights.attrs["layer_names"] = ["loop/" * 2000 + "nowhere"]


def many_layers(file: h5py.File) -> None:
    del file["model_weights"]
    weights = file.create_group("model_weights")
    weights.create_group("x")
    weights.attrs["layer_names"] = ["x"] * 20_000


SHAPE = (3, 3, 1, 32)
CHANGES: dict[str, Change] = {
    "nan": dataset(np.full(SHAPE, np.nan, np.float32)),
    "inf": dataset(np.full(SHAPE, np.inf, np.float64)),
    "overflow": dataset(np.full(SHAPE, 1e300)),
    "int": dataset(np.zeros(SHAPE, int)),
    "complex": dataset(np.zeros(SHAPE, complex)),
    "bytes": dataset(np.full(SHAPE, b"x")),
    "texts": dataset(shape=SHAPE, dtype=h5py.string_dtype()),
    "lists": dataset(shape=SHAPE, dtype=h5py.vlen_dtype(np.float32)),
    "opaque": dataset(np.zeros(SHAPE, "V16")),
    "compound": dataset(np.zeros(SHAPE, [(f"\x1b[31m{n}", "f4") for n in range(200)])),
    "references": dataset(shape=SHAPE, dtype=h5py.ref_dtype),
    "shape": dataset(np.zeros((3, 3, 32, 1), np.float32)),
    "scalar": dataset(np.float32(1)),
    "null": dataset(h5py.Empty("f4")),
    "no numbers": dataset(np.zeros((0, 3), np.float32)),
    "declared": dataset(shape=(2**40,), dtype="f4", chunks=(2**20,), compression="gzip"),
    "declared whole": dataset(shape=(2**33,), dtype="f4"),
    "filled": dataset(shape=(2**23,), dtype="f8", chunks=(2**20,), fillvalue=1.0),
    "block": replaced(giant_chunk),
    "group": replaced(lambda group, name: group.create_group(name)),
    "missing": replaced(lambda group, name: None),
    "soft link": linked(h5py.SoftLink("/model_weights")),
    "soft loop": linked(h5py.SoftLink(".")),
    "external link": linked(h5py.ExternalLink("mnist.h5", "/model_weights")),
    "external device": linked(h5py.ExternalLink("/dev/zero", "/")),
    "virtual": replaced(virtual),
    "external storage": dataset(shape=SHAPE, dtype="f4", external=[("/etc/passwd", 0, 1152)]),
    "endless": endless,
    "no layers": attribute("layer_names", np.zeros(0, "S1"), of="model_weights"),
    "layers above": attribute("layer_names", ["../../etc"], of="model_weights"),
    "layers of root": attribute("layer_names", ["/", ""], of="model_weights"),
    "layers of escapes": attribute("layer_names", ["\x1b[2J\nred"], of="model_weights"),
    "layers of bytes": attribute("layer_names", np.array([b"\xff\xfe"]), of="model_weights"),
    "a number of layers": attribute("layer_names", 5.0, of="model_weights"),
    "many layers": many_layers,
    "long name": attribute("layer_names", ["x" * 10**6], of="model_weights"),
    "many configured": configured(lambda layers: layers.extend(layers * 20_000)),
    "no configuration": attribute("model_config", "no JSON"),
    "deep configuration": attribute("model_config", "[" * 500_000),
    "long configuration": attribute("model_config", "[" + "[]," * 10_000_000 + "[]]"),
    "large number": attribute("model_config", "9" * 100_000),
    "list": attribute("model_config", '{"config": {"layers": [1, "x", null]}}'),
    "bytes in it": attribute("model_config", np.bytes_(b"\xff\xfe{}")),
    "array": attribute("model_config", np.zeros(9)),
    "activation": configured(lambda layers: layer(layers, "Conv2D").update(activation="tanh")),
    "strides": configured(lambda layers: layer(layers, "Conv2D").update(strides=[2, 2])),
    "pool": configured(lambda layers: layer(layers, "MaxPooling2D").update(pool_size=[3, 3])),
    "one layer less": configured(lambda layers: layers.pop(1)),
    "one layer more": configured(lambda layers: layers.append({"class_name": "Lambda"})),
    "no weights": lambda file: file.__delitem__("model_weights"),
    "weights of no group": lambda file: (
        file.__delitem__("model_weights"),
        file.__setitem__("model_weights", 1.0),
    ),
}

QUICK = ("nan", "external link", "external storage", "layers of escapes", "activation", "declared")


def changed(source: Path, target: Path, change: Change) -> Path:
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+", libver="latest") as file:
        change(file)
    return target


def refusal(path: Path) -> str:
    """Returns the one line with which a file is refused."""
    with pytest.raises((DataError, InputError)) as caught:
        model_file.load(path)
    text = str(caught.value)
    assert text.startswith(f"Expected a model of the digits CNN at {path}. Received: "), text
    assert text.endswith(model_file.REMEDY)
    assert text.isprintable(), text
    assert len(text) < 1000 + len(str(path))
    return text


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CHANGES],
)
def test_a_changed_model_is_refused(sound, tmp_path, name):
    path = changed(sound, tmp_path / "changed.h5", CHANGES[name])
    assert "damaged" not in refusal(path) or name in (
        *("layers of bytes", "a number of layers", "overflow", "null"),
        *("long name", "bytes in it", "block"),
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["block", "declared", "declared whole", "filled", "many layers"])
def test_reading_a_model_takes_little_memory(command, sound, tmp_path, name):
    path = changed(sound, tmp_path / "changed.h5", CHANGES[name])
    done = Run(command, "-P", "-m", "trainer.inference.read_hdf5", path)
    assert done.memory < GIGABYTE, f"{done.memory:,} bytes"


@pytest.mark.parametrize("part", [0, 4, 8, 100, 2000, pytest.param(0.1, id="tenth"), 0.5, 0.999])
def test_a_truncated_model_is_refused(sound, tmp_path, part):
    content = sound.read_bytes()
    end = round(part * len(content)) if isinstance(part, float) else part
    (tmp_path / "cut.h5").write_bytes(content[:end])
    refusal(tmp_path / "cut.h5")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(24))
def test_a_model_with_flipped_bytes_is_refused_or_loads(sound, tmp_path, seed):
    draw, content = random.Random(seed), bytearray(sound.read_bytes())
    places = [at for at, byte in enumerate(content[:20_000]) if byte]
    for _ in range(1 + seed % 8):
        content[draw.choice(places)] ^= 1 << draw.randrange(8)
    (tmp_path / "flipped.h5").write_bytes(content)
    with contextlib.suppress(DataError):
        assert model_file.load(tmp_path / "flipped.h5").count_params() == 2_380_938


def test_code_in_a_file_is_never_run(command, sound, tmp_path):
    from trainer.runtime import keras

    marker = tmp_path / "marked"
    mark = str(marker)
    lambdas = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Lambda(lambda x: (open(mark, "w").close(), x)[1], output_shape=(2,)),  # noqa: PTH123
        ]
    )
    lambdas.save(tmp_path / "lambda.keras")
    with h5py.File(sound) as file:
        config = json.loads(file.attrs["model_config"])
    config["config"]["layers"].append(json.loads(lambdas.to_json())["config"]["layers"][-1])
    changed(sound, tmp_path / "lambda.h5", attribute("model_config", json.dumps(config)))
    (tmp_path / "pickle.h5").write_bytes(pickle.dumps(Marks(str(marker))))
    # They are what they are said to be: other programs run what is in them.
    for run in (
        lambda: pickle.loads((tmp_path / "pickle.h5").read_bytes()),  # noqa: S301
        lambda: keras.models.load_model(tmp_path / "lambda.keras", safe_mode=False)(np.eye(2)),
    ):
        marker.unlink(missing_ok=True)
        run()
        assert marker.exists()
    marker.unlink()
    assert "another network" in refusal(tmp_path / "lambda.h5")
    assert "not HDF5" in refusal(tmp_path / "lambda.keras")
    assert "not HDF5" in refusal(tmp_path / "pickle.h5")
    assert not marker.exists()


def test_what_is_no_model_is_refused(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(content := io.BytesIO(), a=np.zeros(3))
    Path("arrays.h5").write_bytes(content.getvalue())
    Path("text.h5").write_text("no model")
    Path("packed.h5").write_bytes(gzip.compress(sound.read_bytes()[:9999]))
    with h5py.File("other.h5", "w") as file:
        file["x"] = np.zeros(3)
    for name in ("arrays.h5", "text.h5", "packed.h5"):
        assert "not HDF5" in refusal(Path(name))
    assert "without the weights" in refusal(Path("other.h5"))


@pytest.mark.full
def test_a_hostile_model_ends_the_command_in_one_line(command, sound, tmp_path):
    changed(sound, tmp_path / "changed.h5", CHANGES["layers of escapes"])
    (tmp_path / "one.png").write_bytes(encoded(stroke(), "PNG"))
    done = Run(command, "-m", "trainer.predict", "changed.h5", "one.png")
    assert (done.code, done.stdout, len(done.stderr)) == (65, [], 1)
    assert done.stderr[0].startswith(f"{PROG}: error: Expected a model of the digits CNN at ")
    assert done.memory < GIGABYTE
