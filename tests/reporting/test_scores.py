import json
import math

import numpy as np
import pytest

from trainer.reporting import scores
from trainer.reporting.scores import BINS, score


def predictions(*rows, classes=10):
    """Probabilities, given a digit and its probability by row; the other digits share the rest."""
    probabilities = np.empty((len(rows), classes))
    for row, (digit, probability) in zip(probabilities, rows, strict=True):
        row[:] = (1 - probability) / (classes - 1)
        row[digit] = probability
    return probabilities


def test_each_mistake_is_counted_by_true_and_predicted_digit():
    found = score(
        np.array([7, 7, 7, 2, 2, 0]), predictions(*((d, 0.5) for d in (7, 7, 2, 2, 2, 2)))
    )
    assert found.accuracy == 4 / 6
    assert found.examples == 6
    assert found.counts.tolist() == [1, 0, 2, 0, 0, 0, 0, 3, 0, 0]
    expected = np.zeros((10, 10), int)
    expected[7, 7], expected[7, 2], expected[2, 2], expected[0, 2] = 2, 1, 2, 1
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.precision[[2, 7]].tolist() == [2 / 4, 1]
    assert found.recall[[0, 2, 7]].tolist() == [0, 1, 2 / 3]
    assert np.isnan(found.precision[[0, 1, 9]]).all()  # never predicted
    assert np.isnan(found.recall[[1, 9]]).all()  # no example


def test_the_worst_mistake_is_the_most_confident_one():
    found = score(
        np.array([0, 1, 2, 3, 4]), predictions((1, 0.6), (1, 0.99), (0, 0.9), (0, 0.6), (9, 0.4))
    )
    assert found.worst.tolist() == [2, 0, 3, 4]  # equal ones in their order
    assert score(np.array([3]), predictions((3, 0.9))).worst.tolist() == []


def test_the_loss_is_that_of_keras():
    from trainer.models.cnn import LOSS

    draw = np.random.default_rng(0)
    probabilities = draw.dirichlet(np.full(10, 0.05), 200).astype(np.float32)
    probabilities[0], probabilities[1] = np.eye(10)[[0, 1]]
    labels = draw.integers(0, 10, 200)
    labels[:2] = (0, 5)  # as right, and as wrong, as can be
    expected = np.mean(LOSS(np.eye(10, dtype=np.float32)[labels], probabilities))
    assert score(labels, probabilities).loss == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_one_example_is_computed_by_hand():
    assert score(np.array([3]), predictions((3, 0.25))).loss == pytest.approx(math.log(4))
    assert score(np.array([3]), np.eye(10)[[4]]).loss == pytest.approx(-math.log(1e-7))
    assert score(np.array([3]), np.eye(10)[[3]]).loss == pytest.approx(1e-7, rel=1e-6)


def test_the_calibration_error_is_computed_by_hand():
    # Fifteen bins of 1/15. 0.95 and 0.97 are in the last one: 1 of 2 right, 0.96 sure.
    # 0.50 is in (7/15, 8/15]: right. 0.30 and 0.32 are in (4/15, 5/15]: none right, 0.31 sure.
    # ECE = 2/5 |0.5 - 0.96| + 1/5 |1 - 0.5| + 2/5 |0 - 0.31| = 0.184 + 0.1 + 0.124
    found = score(
        np.array([0, 0, 0, 0, 0]), predictions((0, 0.95), (1, 0.97), (0, 0.5), (1, 0.3), (1, 0.32))
    )
    assert found.ece == pytest.approx(0.408)
    assert found.bin_counts.tolist() == [0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2]
    assert found.bin_accuracy[[4, 7, 14]].tolist() == [0, 1, 0.5]
    assert found.bin_confidence[[4, 7, 14]] == pytest.approx([0.31, 0.5, 0.96])
    assert np.isnan(np.delete(found.bin_accuracy, [4, 7, 14])).all()


def test_a_model_that_is_certain_and_correct_is_calibrated():
    found = score(np.arange(10), np.eye(10))
    assert (found.accuracy, found.ece) == (1, 0)
    assert found.bin_counts.tolist() == [0] * (BINS - 1) + [10]


def test_a_model_that_is_certain_and_wrong_is_not_calibrated():
    found = score((np.arange(10) + 1) % 10, np.eye(10))
    assert (found.accuracy, found.ece) == (0, 1)


def test_a_bin_reaches_up_to_its_upper_edge():
    edge = scores.score(np.array([0]), predictions((0, 0.6))).bin_edges[9]
    for probability, place in ((edge, 8), (np.nextafter(edge, 1), 9)):
        found = score(np.array([0]), predictions((0, probability)))
        assert found.bin_counts.nonzero()[0].tolist() == [place]


@pytest.mark.parametrize(
    ("labels", "shape"), [([0, 1], (3, 10)), ([0], (10,)), ([[0]], (1, 10)), ([], (0, 10))]
)
def test_shapes_that_do_not_match_are_refused(labels, shape):
    with pytest.raises(ValueError, match=r"n of at least 1\. Received: "):
        score(np.array(labels), np.full(shape, 0.1))


def test_integer_types_of_any_size_are_labels():
    for dtype in (np.uint8, np.int64):
        assert score(np.array([9, 1], dtype), predictions((9, 0.5), (1, 0.5))).accuracy == 1


def test_an_undefined_rate_is_a_dash_and_null():
    found = score(np.array([3]), np.eye(10)[[3]])
    assert scores.as_dict(found)["digits"][4] == {
        "digit": 4,
        "examples": 0,
        "precision": None,
        "recall": None,
    }
    json.dumps(scores.as_dict(found), allow_nan=False)
    assert "    4       0          -        -" in scores.as_text(found)
