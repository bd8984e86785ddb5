"""The way from pictures to answers, with a model that says of a digit what its first pixel is."""

from concurrent.futures import Future

import numpy as np
import pytest

from trainer.errors import DataError, InputError
from trainer.inference import classifier
from trainer.inference.digit import Digit

PICTURE = np.zeros((4, 6), np.uint8)


def digit(label: int) -> Digit:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[0, 0] = label
    return Digit(pixels, (0, 0, 6, 4))


class Model:
    """Notes what is decoded and classified, in which order."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def decode(self, source: bytes, name: str, digits: str) -> Future:
        """Finds a digit for each byte of the content; none are an error."""
        self.events.append((name, digits))
        future: Future = Future()
        if source:
            future.set_result((PICTURE, [digit(byte) for byte in source]))
        else:
            future.set_exception(DataError(f"Expected a digit in {name}. Received: none."))
        return future

    def load(self):
        self.events.append("load")
        return self.predict

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.events.append(len(images))
        assert (images.shape[1:], images.dtype) == ((28, 28), np.uint8)
        probabilities = np.full((len(images), 10), 0.01, np.float32)
        probabilities[range(len(images)), images[:, 0, 0]] = 0.91
        return probabilities


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def classify(model):
    return classifier.Classifier(model.decode, model.load).classify


def test_each_picture_has_its_answer_in_order(classify):
    contents = [bytes([7]), b"", bytes([1, 2, 3]), bytes([9])]
    names = ("seven", "none", "many", "\x1b[31m")
    answers = list(classify(zip(names, contents, strict=True), digits="many"))
    assert [answer.name for answer in answers] == ["seven", "none", "many", r"'\x1b[31m'"]
    assert [[said.label for said in answer.predictions] for answer in answers] == [
        *([7], [], [1, 2, 3], [9])
    ]
    assert [str(answer.error) for answer in answers if answer.error] == [
        "Expected a digit in none. Received: none."
    ]
    assert answers[1].picture.shape == (0, 0)
    assert answers[0].picture is PICTURE
    [seven] = answers[0].predictions
    assert seven.probability == pytest.approx(0.91)
    assert seven.digit.box == (0, 0, 6, 4)


def test_a_group_is_decoded_while_the_one_before_is_classified(classify, model, monkeypatch):
    monkeypatch.setattr(classifier, "FIRST_GROUP", 1)
    monkeypatch.setattr(classifier, "GROUP", 2)
    answers = classify(((name, bytes([1, 2])) for name in "abcd"), digits="many")
    assert model.events == []  # Nothing is read before it is asked for.
    next(answers)
    assert model.events == [("a", "many"), "load", ("b", "many"), ("c", "many"), 2]
    assert len(list(answers)) == 3
    assert model.events[5:] == [("d", "many"), 4, 2]


def test_no_picture_asks_for_no_model(classify, model):
    assert list(classify([])) == []
    assert model.events == []


def test_pictures_without_digits_are_not_classified(classify, model):
    assert [type(answer.error) for answer in classify([("a", b""), ("b", b"")])] == [DataError] * 2
    assert model.events == [("a", "one"), ("b", "one"), "load"]


def test_the_model_is_loaded_once(model):
    made = classifier.Classifier(model.decode, model.load)
    made.load()
    assert model.events == ["load", 1]
    for _ in range(2):
        [answer] = made.classify([("a", bytes([4]))])
        assert answer.predictions[0].label == 4
    assert model.events.count("load") == 1


def test_an_error_of_the_model_is_raised_and_not_an_answer(model):
    def fail():
        raise InputError("Expected a model.")

    with pytest.raises(InputError, match=r"Expected a model\."):
        list(classifier.Classifier(model.decode, fail).classify([("a", b""), ("b", bytes([1]))]))
