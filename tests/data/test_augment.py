import colorsys

import numpy as np
import pytest
from scipy.interpolate import NdBSpline
from scipy.ndimage import map_coordinates

from trainer.data import augment, pipeline
from trainer.data.arrays import ArrayDataset
from trainer.data.augment import Augmentation
from trainer.data.pipeline import Shard
from trainer.errors import UsageError
from trainer.parameters import AFFINE, AUGMENTATIONS, check_augmentation, parse_augmentation
from trainer.runtime import tf

ALL = "affine elastic flip vertical_flip brightness contrast saturation hue"
KNOWN = [0.9291187524795532, -0.28677523136138916, 0.2027353048324585]


@pytest.fixture(scope="module")
def images(mnist):
    return tf.constant(mnist.x_train[:500])


@pytest.fixture(scope="module")
def colours():
    return tf.constant(np.random.default_rng(0).integers(0, 256, (60, 24, 32, 3), np.uint8))


def changed(text, images, seed=0, epoch=0):
    augmentation = Augmentation.of(text)
    return graph(augmentation, images, augmentation.draw(np.arange(len(images)), seed, epoch))


def graph(augmentation, images, drawn):
    """What a graph makes of images: as where they are trained on, some operations are fused."""
    return tf.function(augmentation, autograph=False)(images, drawn).numpy()


def draw(text, count, seed=0, epoch=0):
    return Augmentation.of(text).draw(np.arange(count), seed, epoch)


# -- what is drawn


@pytest.mark.parametrize(("text", "numbers"), [("affine", 6), ("elastic", 72), ("flip", 6)])
def test_what_is_drawn_is_a_function_of_seed_epoch_and_number(text, numbers):
    drawn = draw(text, 1000, 1, 2)
    assert (drawn.shape, drawn.dtype) == ((1000, numbers), np.float32)
    np.testing.assert_array_equal(draw(text, 5, 1, 2), drawn[:5])
    assert len(np.unique(drawn)) > 0.98 * drawn.size
    assert (draw(text, 1000, 1, 3) != drawn).mean() > 0.99
    assert (draw(text, 1000, 2, 2) != drawn).mean() > 0.99


def test_what_is_drawn_has_known_values():
    # Other bits would change the runs of those who have a checkpoint.
    assert draw("affine", 3)[:, 0].tolist() == KNOWN


@pytest.mark.parametrize("text", ["rotate", "elastic", "flip", ALL])
@pytest.mark.parametrize("order", [[7, 3, 19_999, 7], [19_999], range(50, 150), []])
def test_the_rows_of_some_images_are_computed_alone(text, order):
    augmentation, order = Augmentation.of(text), np.array(order, np.int64)
    whole = augmentation.draw(np.arange(20_000), 5, 6)
    np.testing.assert_array_equal(augmentation.draw(order, 5, 6), whole[order])


def test_the_last_of_six_million_images_needs_no_other(monkeypatch):
    made, philox = [], np.random.Philox

    class Counted:
        def __init__(self, seed):
            self.generator = philox(seed)

        state = property(
            lambda self: self.generator.state,
            lambda self, state: setattr(self.generator, "state", state),
        )

        def random_raw(self, count):
            made.append(count)
            return self.generator.random_raw(count)

    augmentation = Augmentation.of(ALL)
    numbers = np.array([5_999_999, 17])
    expected = augmentation.draw(numbers, 0, 0)
    monkeypatch.setattr(augment.np.random, "Philox", Counted)
    np.testing.assert_array_equal(augmentation.draw(numbers, 0, 0), expected)
    assert 0 < sum(made) < 2 * (augmentation.numbers + 12)


def test_what_is_drawn_for_one_change_does_not_depend_on_the_others(images):
    moved = changed("affine", images)
    both = changed("affine flip=1", images)
    # A flip comes first: it is that of the flipped image.
    np.testing.assert_array_equal(both, changed("affine", images[:, :, ::-1]))
    assert (both != moved).any()
    np.testing.assert_array_equal(draw("affine elastic hue", 50)[:, :6], draw("affine", 50))


@pytest.mark.parametrize("text", ["affine", "flip"])
def test_amounts_are_uniformly_distributed(text):
    drawn = draw(text, 20_000)
    assert drawn.min() >= -1
    assert drawn.max() < 1
    np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=0), 1 / np.sqrt(3), atol=0.01)
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(6), atol=0.03)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_a_share_of_an_epoch_is_changed_as_the_whole_is(colours, monkeypatch, memory):
    monkeypatch.setattr(pipeline, "DRAWN_AT_ONCE", memory)
    augmentation = Augmentation.of(ALL)
    expected = changed(ALL, colours, 3, 4)
    order = np.random.default_rng(1).permutation(len(colours))
    data = ArrayDataset((colours.numpy(), np.arange(len(colours), dtype=np.int32)))
    for shard, first_step in ((Shard(), 0), (Shard(1, 1, 2), 0), (Shard(), 2)):
        batches = pipeline.shard_batches(
            data,
            order,
            batch_size=16,
            shard=shard,
            first_step=first_step,
            augment=augmentation,
            draw=lambda numbers: augmentation.draw(numbers, 3, 4),
        )
        count = 0
        for x, number, _ in batches:
            np.testing.assert_array_equal(x, expected[number.numpy()])
            count += len(x)
        assert count == {(0, 0): 60, (1, 0): 30, (0, 2): 28}[shard.first_replica, first_step]


# -- what images become


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_an_image_becomes_the_same_in_any_batch(colours, dtype):
    colours = tf.cast(colours, dtype)
    augmentation = Augmentation.of(ALL)
    drawn = augmentation.draw(np.arange(60), 0, 0)
    whole = graph(augmentation, colours, drawn)
    assert (whole.shape, whole.dtype) == (colours.shape, colours.dtype)
    for some in ([7, 59, 7, 0], [3], list(range(31))):
        few = graph(augmentation, tf.gather(colours, some), drawn[some])
        np.testing.assert_array_equal(few, whole[some])


@pytest.mark.parametrize("text", ["affine", "elastic", "rotate", "shear", "zoom", "translate"])
def test_every_image_is_changed_in_a_way_of_its_own(text):
    same = tf.repeat(tf.constant(np.eye(28, dtype=np.uint8) * 255)[tf.newaxis], 50, axis=0)
    assert len(np.unique(changed(text, same), axis=0)) == 50


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_vanishing_amount_changes_nothing(colours, name):
    np.testing.assert_allclose(changed(f"{name}=1e-9", colours), colours, atol=1)
    drawn = changed(f"{name}=1e-9", colours) != colours.numpy()
    assert drawn.mean() < (0.2 if name in {"hue", "saturation"} else 1e-3)


def projected(images, drawn):
    """The affine transformation by TensorFlow's own, in NumPy's float64."""
    rotation, shear = np.radians(AFFINE["rotate"]), np.radians(AFFINE["shear"])
    zoom, shift = AFFINE["zoom"], 28 * AFFINE["translate"]
    amounts = np.float64(drawn) * [rotation, shear, zoom, zoom, shift, shift]
    transforms = []
    for angle, slant, zoom_x, zoom_y, shift_x, shift_y in amounts:
        turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        inverse = np.diag([1 / (1 + zoom_x), 1 / (1 + zoom_y)]) @ [[1, -np.tan(slant)], [0, 1]]
        matrix = inverse @ turn
        offset = np.array([13.5, 13.5]) - matrix @ [13.5, 13.5] + [shift_x, shift_y]
        transforms.append([*matrix[0], offset[0], *matrix[1], offset[1], 0, 0])
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images[..., tf.newaxis], tf.float32),
        transforms=np.float32(transforms),
        output_shape=images.shape[1:],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return warped[..., 0].numpy()


def test_affine_is_the_transformation_that_tensorflow_has(images):
    # TensorFlow's works pixel by pixel in float32: some places fall on the other side of a border.
    expected = projected(images, draw("affine", 500))
    assert np.abs(changed("affine", images) - expected).max() <= 0.6


def test_its_parts_together_are_affine(images):
    parts = " ".join(f"{name}={amount!r}" for name, amount in AFFINE.items())
    np.testing.assert_array_equal(changed(parts, images), changed("affine", images))


def test_elastic_is_the_deformation_that_scipy_has(images):
    narrow = images[:20, :, 4:24]
    expected = []
    knots = np.arange(-3.0, 7)
    y, x = np.meshgrid(np.arange(28.0), np.arange(20.0), indexing="ij")
    places = np.stack([(y + 0.5) / 28 * 3, (x + 0.5) / 20 * 3], axis=-1)
    for image, drawn in zip(narrow.numpy(), np.float64(draw("elastic=0.2", 20)), strict=True):
        along_x, along_y = (
            NdBSpline((knots, knots), grid, 3)(places) for grid in drawn.reshape(2, 6, 6)
        )
        moved = [y + 0.2 * 28 * along_y, x + 0.2 * 20 * along_x]
        expected.append(map_coordinates(np.float64(image), moved, order=1, mode="grid-constant"))
    assert np.abs(changed("elastic=0.2", narrow) - np.array(expected)).max() <= 0.6


@pytest.mark.parametrize(("name", "axis"), [("flip", 2), ("vertical_flip", 1)])
def test_images_are_flipped_as_often_as_asked(images, colours, name, axis):
    for batch in (images, colours):
        flipped = np.flip(batch.numpy(), axis)
        np.testing.assert_array_equal(changed(f"{name}=1", batch), flipped)
        now = changed(f"{name}=0.3", batch)
        turned = (now == flipped).all(axis=tuple(range(1, now.ndim)))
        np.testing.assert_array_equal(now[~turned], batch.numpy()[~turned])
        assert turned.mean() == pytest.approx(0.3, abs=0.15)


def test_brightness_is_added(images):
    amounts = draw("brightness", 500)[:, 2].reshape(-1, 1, 1) * 0.2 * 255
    expected = np.clip(np.float64(images) + amounts, 0, 255)
    assert np.abs(changed("brightness=0.2", images) - expected).max() <= 0.51


def test_contrast_changes_about_the_mean(colours):
    amounts = 1 + draw("contrast", 60)[:, 3].reshape(-1, 1, 1, 1) * 0.3
    pictures = np.float64(colours)
    mean = pictures.mean(axis=(1, 2, 3), keepdims=True)
    expected = np.clip((pictures - mean) * amounts + mean, 0, 255)
    assert np.abs(changed("contrast=0.3", colours) - expected).max() <= 0.51


def test_saturation_and_hue_are_those_of_the_colour(colours):
    few = colours[:8, :4, :4]
    drawn = draw("hue", 8)
    now = changed("saturation=0.5 hue=0.2", few)
    for image, result, amounts in zip(few.numpy(), now, drawn, strict=True):
        for before, after in zip(image.reshape(-1, 3), result.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
            saturation = min(saturation * (1 + 0.5 * amounts[4]), 1)
            expected = colorsys.hsv_to_rgb((hue + 0.2 * amounts[5]) % 1, saturation, value)
            assert np.abs(np.array(expected) * 255 - after).max() <= 0.6


@pytest.mark.full
@pytest.mark.parametrize("text", ["affine", ALL])
def test_xla_compiles_it_to_the_same(colours, text):
    augmentation = Augmentation.of(text)
    drawn = tf.constant(augmentation.draw(np.arange(60), 0, 0))
    compiled = tf.function(augmentation, jit_compile=True, autograph=False)(colours, drawn)
    difference = np.abs(np.int32(compiled) - np.int32(changed(text, colours)))
    assert difference.max() <= 1  # Where rounding meets a half.
    assert (difference > 0).mean() < 1e-3


def centres(images):
    """Where the ink of each image is: x and y."""
    images = np.asarray(images, np.float64)
    mass = images.sum(axis=(1, 2))
    grid = np.arange(28)
    return np.stack([(images.sum(axis=axis) @ grid) / mass for axis in (1, 2)], axis=1)


@pytest.mark.parametrize(("text", "least", "most"), [("affine", 1.0, 1.4), ("elastic", 0.4, 1.2)])
def test_images_stay_where_and_as_large_as_they_are_on_average(images, text, least, most):
    warped = changed(text, images)
    moved = centres(warped) - centres(images)
    assert np.abs(moved).max() < 4
    assert np.abs(moved.mean(axis=0)).max() < 0.25
    # MNIST's digits are centred: they move by the shift, up to 2 pixels, and a little by the rest.
    assert least < moved.std(axis=0).min() < moved.std(axis=0).max() < most
    assert warped.mean() == pytest.approx(images.numpy().mean(), rel=0.05)


def test_what_comes_from_outside_is_background():
    white = tf.fill((50, 28, 28), tf.constant(255, tf.uint8))
    assert changed("affine", white)[:, [0, 0, -1, -1], [0, -1, 0, -1]].min() == 0


@pytest.mark.parametrize("text", ["affine", "elastic flip"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_all_channels_of_an_image_are_moved_alike(images, dtype, text):
    grey = changed(text, images)
    planes = tf.cast(tf.stack([images, images, images // 2], axis=-1), dtype)
    colour = changed(text, planes)
    assert (colour.shape, colour.dtype) == ((500, 28, 28, 3), dtype)
    np.testing.assert_array_equal(colour[..., 0], grey)
    np.testing.assert_array_equal(colour[..., 1], grey)
    np.testing.assert_array_equal(colour[..., 2], changed(text, images // 2))
    np.testing.assert_array_equal(changed(text, images[..., tf.newaxis])[..., 0], grey)


# -- what is asked for


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none flip",
        "elastics",
        "flip flip",
        "rotate=",
        "rotate=ten",
        "rotate=nan",
        "rotate=0",
        "rotate=-5",
        "rotate=181",
        "flip=1.1",
        "affine=2",
        "rotate = 10",
        "rotate,flip",
    ],
)
def test_what_cannot_be_is_named(text):
    with pytest.raises(UsageError, match=r"must be .*Received: .*\.") as raised:
        parse_augmentation(text)
    assert "\n" not in str(raised.value)


def test_affine_can_be_changed_in_part():
    assert parse_augmentation("affine rotate=20") == {**AFFINE, "rotate": 20}
    assert parse_augmentation("rotate=20 affine") == {**AFFINE, "rotate": 20}


def test_colours_are_changed_of_colour_images_alone():
    check_augmentation("hue saturation", 3)
    check_augmentation(ALL.replace("saturation hue", ""), 1)
    with pytest.raises(UsageError, match="hue of augment is for images of three channels"):
        check_augmentation("flip hue", 1)
