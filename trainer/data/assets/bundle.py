"""Makes mnist.npz, the data set inside the package, from MNIST's four original files.

    python trainer/data/assets/bundle.py FOLDER      (with the package installed)

FOLDER holds train-images-idx3-ubyte and its three siblings, gzipped or not. The SHA-256 of what
they hold is checked first.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from trainer.data.digits import ARRAYS, Digits
from trainer.data.idx import FILES, read_folder

# Of the four files once unpacked, as they have been published.
SHA256 = {
    "x_train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "y_train": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "x_test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "y_test": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def bundle(folder: Path, target: Path) -> None:
    """Writes ``target`` from the IDX files in ``folder``; the same files give the same bytes."""
    digits = Digits(**read_folder(folder))
    for name in ARRAYS:
        array = getattr(digits, name)
        header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
        found = hashlib.sha256(header + array.tobytes()).hexdigest()
        if found != SHA256[name]:
            raise SystemExit(f"{FILES[name]}: expected {SHA256[name]}, received {found}")
    print(f"Digits.sha256 is {digits.sha256}")
    np.savez_compressed(target, **{name: getattr(digits, name) for name in ARRAYS})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    bundle(Path(sys.argv[1]), Path(__file__).parent / "mnist.npz")
