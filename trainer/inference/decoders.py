"""Processes that decode pictures of unknown origin, and find the digits in them.

    with decoders.start(2) as decode:
        future = decode(Path("seven.jpg"), "seven.jpg", "one")
        picture, digits = future.result()                       # or a DataError, an InputError
        decode(Path("cat.jpg"), "cat.jpg", (180, 180, 3))       # the whole picture in that shape

Image decoders are written in C, and a picture of 40 million pixels takes up to 0.7 GB while it is
decoded: here that is another process's memory, which is limited; one that crashes or hangs is a
picture that cannot be read, and the next has a new process. It is given a picture's content, and
can open no file.
"""

import contextlib
import io
import math
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.errors import DataError, TrainerError
from trainer.inference import pictures, restrictions, sandbox
from trainer.inference.digit import MAX_DIGITS, SIZE, Digit, DigitCount
from trainer.inference.pictures import LONGEST

MEMORY = 900_000_000  # Bytes of data of one process; code is not counted.
DEADLINE = 60.0  # Seconds for one picture.
CPU_SECONDS = 120  # Of processor time for one; some decoders use several threads.
MAX_PROCESSES = 4  # Each may take that memory.
MODULE = "trainer.inference.decoders"  # What a process runs.

Shape = tuple[int, int, int]  # Height, width and channels.
Wanted = DigitCount | Shape  # Its digits, or the whole picture as one.
Decoded = tuple[np.ndarray, list[Digit]]  # A picture, uint8 (h, w[, channels]), and its digits.
Decode = Callable[[Path | bytes, str, Wanted], Future[Decoded]]


@contextlib.contextmanager
def start(processes: int) -> Iterator[Decode]:
    """Starts processes, at most four, that decode pictures side by side.

    Yields:
        A function that submits a picture: its path or content, the name for its errors, and how
        many digits it shows. The future is the picture, as ``pictures.open_image`` gives it, and
        its digits, as ``segmentation.find`` gives them; or an error of one of the two. With a shape
        in place of their number it is what ``pictures.open_whole`` gives, and that alone.
    """
    processes = min(processes, MAX_PROCESSES)
    idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
    decoders = [_Decoder() for _ in range(processes)]
    for decoder in decoders:
        idle.put(decoder)

    def decode(source: Path | bytes, name: str, wanted: Wanted) -> Decoded:
        decoder = idle.get()
        try:
            return decoder.decode(source, name, wanted)
        finally:
            idle.put(decoder)

    with ThreadPoolExecutor(processes) as pool:
        try:
            yield lambda *request: pool.submit(decode, *request)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for decoder in decoders:
                decoder.end()


class _Decoder:
    """One process; when it has ended, the next picture starts another."""

    def __init__(self) -> None:
        self._child: sandbox.Child | None = sandbox.Child(MODULE)

    def decode(self, source: Path | bytes, name: str, wanted: Wanted) -> Decoded:
        child = self._child = self._child or sandbox.Child(MODULE)
        name = sandbox.printable(name)
        content = source if isinstance(source, bytes) else pictures.read_file(source, name)
        try:
            with child.deadline(DEADLINE):
                request = {"bytes": len(content), "name": name, "wanted": wanted}
                child.send(request, content)
                return _receive(child) if isinstance(wanted, str) else _receive_whole(child, wanted)
        except sandbox.ProtocolError as error:
            child.end()
            self._child = None
            raise DataError(
                f"Expected an image at {name}. Received: a damaged file: {error}. Leave it out."
            ) from error

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        if child := self._child:
            child.end()


def _receive(child: sandbox.Child) -> Decoded:
    """Receives a picture and its digits, within the bounds that every picture keeps."""
    header = child.receive()
    height, width = sandbox.integers(header.get("shape"), count=2, most=LONGEST)
    digits = header.get("digits")
    if not (height and width and isinstance(digits, list) and 1 <= len(digits) <= MAX_DIGITS):
        raise sandbox.ProtocolError
    picture = np.frombuffer(child.read(height * width), np.uint8).reshape(height, width)
    return picture, [_receive_digit(child, digit, width, height) for digit in digits]


def _receive_whole(child: sandbox.Child, shape: Shape) -> Decoded:
    """Receives a picture of that shape."""
    if sandbox.integers(child.receive().get("shape"), count=3, most=max(shape)) != shape:
        raise sandbox.ProtocolError
    picture = np.frombuffer(child.read(math.prod(shape)), np.uint8).reshape(shape)
    return picture, [Digit(picture, (0, 0, shape[1], shape[0]))]


def _receive_digit(child: sandbox.Child, header: object, width: int, height: int) -> Digit:
    match header:
        case {"box": box, "several": bool(several)}:
            left, top, right, bottom = sandbox.integers(box, count=4, most=LONGEST)
            if left <= right <= width and top <= bottom <= height:
                pixels = np.frombuffer(child.read(SIZE * SIZE), np.uint8)
                return Digit(pixels.reshape(SIZE, SIZE), (left, top, right, bottom), several)
    raise sandbox.ProtocolError


def _serve() -> None:
    """Answers the requests of the parent until it ends."""
    channel = sandbox.enter(data=MEMORY)

    from trainer.inference import segmentation

    _read_first()
    restrictions.apply()
    with contextlib.suppress(sandbox.ProtocolError):  # The parent has ended.
        while True:
            request = channel.receive()
            content = io.BytesIO(channel.read(request["bytes"]))
            name = request["name"]
            wanted: Any = request["wanted"]
            sandbox.allow_cpu(CPU_SECONDS)
            try:
                if isinstance(wanted, list):
                    picture = pictures.open_whole(content, tuple(wanted), name)
                    channel.send({"shape": picture.shape}, picture.tobytes())
                    continue
                picture = pictures.open_image(content, name)
                digits = segmentation.find(picture, digits=wanted, name=name)
            except TrainerError as error:
                channel.send_error(error)
                continue
            answer = [{"box": digit.box, "several": digit.several} for digit in digits]
            pixels = [digit.pixels.tobytes() for digit in digits]
            channel.send({"shape": picture.shape, "digits": answer}, picture.tobytes(), *pixels)


def _read_first() -> None:
    """Reads a picture made here: Pillow and scikit-image import much of themselves at first use."""
    from trainer.inference import segmentation

    sheet = np.full((40, 60), 255, np.uint8)
    sheet[8:32, 12:16] = sheet[8:32, 40:44] = 0
    Image.fromarray(sheet).save(content := io.BytesIO(), "PNG")
    content.seek(0)
    segmentation.find(pictures.open_image(content), digits="many")


if __name__ == "__main__":
    _serve()
