"""Whether images look as usual: a model is trained on others, too, and fails on digits.

for notice in notices(digits): print(notice)
"""

from collections.abc import Callable, Iterator

import numpy as np

from trainer.data.digits import NUM_CLASSES, Digits

EXAMPLES = 2000  # that are looked at, spread over the training images

# The mean training image of each class of MNIST over squares of 4x4 pixels, in fifteenths of the
# brightest: 7 rows of 7.
MNIST_MEANS = (
    "0000000003ab3002ba9a006b24b10983a7005dd8100011000",
    "000000000056100009700000e200003d10000681000000000",
    "0001100017b9200144a300138a2005cea5104a76400000000",
    "0000000027b8100148b20006db200223a4004ac9100011000",
    "00000000022430028494004d9e30026ba1000265100001100",
    "00000000037851018953101aa6100235830039b7100011000",
    "00022000038510017821002b9a6002dcc50005a5100000000",
    "0000000012331004bbe400233c200019810004a3000034100",
    "0000000003a9300198a60017f910019b71002ac7100012100",
    "0000000001651001a8b3003b9e10014991000285100023200",
)

# Correlation with them, class by class, above which images are digits, and by how much another
# orientation must be above the images' own. MNIST's are at 0.995, its test images with the labels
# exchanged in 500 ways at 0.55 at most, and drawn shapes at 0.2.
ALIKE = 0.6
BETTER = 0.2

# Ways back from images that are not upright, as expressions of NumPy.
ORIENTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "images": lambda images: images,
    "images.swapaxes(1, 2)": lambda images: images.swapaxes(1, 2),
    "images[:, :, ::-1]": lambda images: images[:, :, ::-1],
    "images[:, ::-1]": lambda images: images[:, ::-1],
    "images[:, ::-1, ::-1]": lambda images: images[:, ::-1, ::-1],
    "np.rot90(images, 1, (1, 2))": lambda images: np.rot90(images, 1, (1, 2)),
    "np.rot90(images, 3, (1, 2))": lambda images: np.rot90(images, 3, (1, 2)),
    "images[:, ::-1, ::-1].swapaxes(1, 2)": lambda images: images[:, ::-1, ::-1].swapaxes(1, 2),
}


def notices(digits: Digits) -> Iterator[str]:
    """Yields a sentence for each way in which the training images look unusual: dark, inverted, or
    turned.

    Args:
        digits: The data that is trained on.
    """
    every = -(-len(digits.x_train) // EXAMPLES)
    images, labels = digits.x_train[::every], digits.y_train[::every]
    if (brightest := int(images.max())) < 128:
        yield (
            f"The training images look dark: the brightest pixel is {brightest}, usual is 255. "
            "Their values are taken as from 0 to 255: scale them to that"
        )
    border = np.ones(images.shape[1:], bool)
    border[1:-1, 1:-1] = False
    outside, inside = images[:, border].mean(), images[:, ~border].mean()
    if outside > 128 and outside > inside + 16:
        yield (
            f"The training images look inverted: {outside:.0f} at the border and {inside:.0f} "
            "inside on average, usual is 0 for the background and 255 for ink. Use 255 - images"
        )
        images = 255 - images
    if expression := _turned(images, labels):
        yield (
            "The training images look turned, mirrored or transposed: they are like MNIST's digits "
            f"as {expression}, and less so as they are"
        )


def _turned(images: np.ndarray, labels: np.ndarray) -> str:
    """Returns the orientation in which images are like MNIST's digits; empty where that is their
    own, or where they are no digits.
    """
    classes = np.unique(labels)
    if len(classes) < NUM_CLASSES:
        return ""
    means = np.stack([_pooled(images[labels == label].mean(axis=0)) for label in classes])
    usual = np.array([[int(value, 16) for value in row] for row in MNIST_MEANS], float)
    alike = {
        expression: _correlation(turn(means), usual.reshape(means.shape))
        for expression, turn in ORIENTATIONS.items()
    }
    best = max(alike, key=lambda expression: alike[expression])
    turned = alike[best] > ALIKE and alike[best] > alike["images"] + BETTER
    return best if turned else ""


def _pooled(image: np.ndarray) -> np.ndarray:
    """Returns the means over squares of 4x4 pixels, (7, 7)."""
    return image.reshape(7, 4, 7, 4).mean(axis=(1, 3))


def _correlation(means: np.ndarray, usual: np.ndarray) -> float:
    """Returns how alike the classes' differences from the mean of all classes are, -1 to 1."""
    a, b = (values - values.mean(axis=0) for values in (means, usual))
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norms) if norms else 0.0
