"""Images as torch users have them: every way of giving them means the same images and classes."""

from itertools import repeat

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fheconv
from fheconv.basics import samples as module
from fheconv.basics.samples import images_of, samples
from tests.support.nets import random_net

IMAGES = np.random.default_rng(0).random((10, 1, 4, 4), np.float32)
CLASSES = np.arange(10) % 3
X, Y = torch.tensor(IMAGES), torch.tensor(CLASSES)


class Items(Dataset):
    """A dataset of images alone."""

    def __len__(self):
        return len(X)

    def __getitem__(self, at):
        return X[at]


class Stream(IterableDataset):
    """A dataset that has no length."""

    def __iter__(self):
        return ((image, int(one)) for image, one in zip(X, Y, strict=True))


def parts(*sizes):
    return [(X[: sizes[0]], Y[: sizes[0]]), (X[sizes[0] :], Y[sizes[0] :])]


WITHOUT_CLASSES = {
    "array": lambda: IMAGES,
    "tensor": lambda: X,
    "tensor that is trained": lambda: X.clone().requires_grad_(),
    "nested lists": lambda: IMAGES.astype(float).tolist(),
    "list of images": lambda: list(X),
    "list of arrays": lambda: list(IMAGES),
    "list of batches": lambda: [X[:5], X[5:]],
    "batches of several sizes": lambda: [X[:7], X[7:]],
    "generator of batches": lambda: (batch for batch in X.split(3)),
    "generator of images": lambda: iter(X),
    "dataset": Items,
    "loader of images": lambda: DataLoader(Items(), batch_size=4),
    "loader without batches": lambda: DataLoader(Items(), batch_size=None),
    "dataset of tuples of one": lambda: TensorDataset(X),
    "class names": lambda: [(X[:5], ["cat"] * 5), (X[5:], ["dog"] * 5)],
}
WITH_CLASSES = {
    "pair": lambda: (X, Y),
    "pair of arrays": lambda: (IMAGES, CLASSES),
    "list of two": lambda: [IMAGES, CLASSES],
    "pair of nested lists": lambda: (IMAGES.astype(float).tolist(), CLASSES.tolist()),
    "dataset of pairs": lambda: TensorDataset(X, Y),
    "dataset of pairs and more": lambda: TensorDataset(X, Y, Y),
    "iterable dataset": Stream,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "loader with workers' defaults": lambda: DataLoader(Stream(), batch_size=3),
    "read loader": lambda: list(DataLoader(TensorDataset(X, Y), batch_size=4)),
    "list of pairs of batches": lambda: parts(7),
    "generator of pairs of batches": lambda: iter(parts(7)),
    "list of items": lambda: list(TensorDataset(X, Y)),
    "tuple of two items": lambda: ((X[0], 0), (X[1], 1)),
}


@pytest.mark.parametrize("make", WITHOUT_CLASSES.values(), ids=WITHOUT_CLASSES)
def test_images_come_out_as_they_are(make):
    found = samples(make(), "data", axes=3)
    np.testing.assert_array_equal(found.images, IMAGES)
    assert found.classes is None


@pytest.mark.parametrize("make", WITH_CLASSES.values(), ids=WITH_CLASSES)
def test_classes_come_out_with_their_images(make):
    found = samples(make(), "data", axes=3)
    count = len(found.images)
    assert count >= 2
    np.testing.assert_array_equal(found.images, IMAGES[:count])
    np.testing.assert_array_equal(np.asarray(found.classes), CLASSES[:count])


@pytest.mark.parametrize("name", ["list of images", "loader", "dataset of pairs", "generator of batches"])
def test_the_axes_of_an_image_need_not_be_known(name):
    make = {**WITHOUT_CLASSES, **WITH_CLASSES}[name]
    np.testing.assert_array_equal(images_of(make(), "data"), IMAGES)


def test_masks_are_classes_too():
    masks = IMAGES > 0.5
    for data in ((IMAGES, masks), DataLoader(TensorDataset(X, torch.tensor(masks)), batch_size=4)):
        np.testing.assert_array_equal(samples(data, "data", 3).classes, masks)
        np.testing.assert_array_equal(images_of(data, "data", 3), IMAGES)


def test_two_arrays_of_equal_size_in_a_list_are_two_images():
    np.testing.assert_array_equal(images_of([X[0], X[1]], "data", 3), IMAGES[:2])


def test_pictures_keep_their_own_axes():
    pictures = [Image.fromarray(np.full((4, 5), shade, np.uint8)) for shade in (0, 255)]
    assert images_of(pictures, "data", 3).shape == (2, 4, 5)


def test_a_dataset_is_read_evenly_from_end_to_end():
    np.testing.assert_array_equal(images_of(Items(), "data", 3, keep=4), IMAGES[[0, 3, 6, 9]])


def test_what_is_not_kept_is_not_read():
    """Also of an iterable without an end."""
    assert images_of(repeat(X[:3]), "data", 3, keep=7).shape == (7, 1, 4, 4)
    found = samples(repeat((X[:3], Y[:3])), "data", 3, keep=7)
    assert found.classes.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_what_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 10 * IMAGES.nbytes)
    with pytest.raises(fheconv.InvalidArgumentError, match=r"more than 6,400 bytes.*Subset"):
        images_of(repeat(X), "data", 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "shape|empty"),
        (iter([]), "no images.*read before"),
        (DataLoader(TensorDataset(X[:0]), batch_size=2), "no images"),
        ([X, X[:, :, 1:]], r"2 shapes \[\(1, 3, 4\), \(1, 4, 4\)\]"),
        (iter([1.0, 2.0]), "the item 1.0; give batches"),
        (iter(["a"]), "not an array|dtype"),
        ("images.npy", "dtype"),
        (None, "dtype"),
    ],
    ids=["list", "iterator", "loader", "sizes", "numbers", "words", "path", "none"],
)
def test_what_holds_no_images_is_refused(data, words):
    with pytest.raises(fheconv.FheConvError, match=words):
        fheconv.quantize(random_net(0, size=(1, 5, 5))[0], data)


@pytest.mark.slow
def test_everything_that_takes_images_takes_a_loader():
    """A network that is calibrated on a loader is the one that is calibrated on its array."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    )
    config = fheconv.QuantConfig(accumulator_bits=5)
    network = fheconv.quantize(model, DataLoader(TensorDataset(X, Y), batch_size=4), config)
    np.testing.assert_array_equal(network(IMAGES), fheconv.quantize(model, IMAGES, config)(IMAGES))
    loader = DataLoader(TensorDataset(X, torch.tensor(network(IMAGES).argmax(1))), batch_size=4)
    np.testing.assert_array_equal(network(loader), network(IMAGES))
    assert fheconv.compile(network).score(loader) == 1
    result = fheconv.tune(
        model,
        iter(loader),
        evaluation=TensorDataset(X, Y),
        training=iter(loader),
        epochs=1,
        widths=[(5, None)],
        p_errors=[0.01],
        max_drop=0.99,
    )
    assert len(result.points) == 1
    tuned = fheconv.finetune(network, loader, epochs=1, validation=[(X[:5], Y[:5]), (X[5:], Y[5:])])
    assert tuned.output_shape == (3,)


def test_scores_and_searches_need_classes():
    linear = fheconv.compile(fheconv.quantize(np.ones((1, 1, 4, 4)), IMAGES))
    with pytest.raises(fheconv.InvalidArgumentError, match="give y"):
        linear.score(DataLoader(Items()))


def test_images_of_a_loader_are_encrypted_like_those_of_an_array():
    images = DataLoader(TensorDataset(X[:4]), batch_size=3)
    weight = np.array([[[[1.0, -1.0], [0.5, 2.0]]]])
    circuit = fheconv.compile(fheconv.quantize(weight, images))
    circuit.keygen()
    encrypted = circuit.predict(images, fhe="execute")
    np.testing.assert_array_equal(encrypted, circuit.network(X[:4]))


@pytest.mark.parametrize("classes", [np.arange(4)[::-1], [0, 1, 2, 3], torch.arange(4), np.ones((4, 2, 2))])
def test_batches_may_be_pairs_of_any_arrays(classes):
    batches = ((IMAGES[at : at + 4], classes) for at in (0, 4))
    found = samples(batches, "x", 3)
    np.testing.assert_array_equal(found.images, IMAGES[:8])
    np.testing.assert_array_equal(found.classes, np.concatenate([classes, classes]))


@pytest.mark.parametrize("data", [{"image": X}, [{"image": X}], DataLoader([{"image": x} for x in X])])
def test_dicts_are_told_from_images(data):
    with pytest.raises(fheconv.InvalidArgumentError, match=r"a dict of 'image'; give pairs"):
        samples(data, "calibration", 3)


def test_values_that_run_backwards_are_taken_by_torch():
    found = samples((IMAGES[::-1], CLASSES[::-1]), "x", 3)
    assert torch.as_tensor(found.images).shape == X.shape
    network = fheconv.quantize(np.ones((1, 1, 4, 4)), IMAGES[::-1, :, ::-1])
    assert fheconv.finetune(network, IMAGES[::-1], epochs=1).output_shape == (1, 1, 1)


def test_rows_of_pixels_are_told_how_to_become_images():
    network = fheconv.quantize(np.ones((1, 1, 4, 4)), IMAGES)
    with pytest.raises(fheconv.InputRangeError, match=r"reshape\(-1, 1, 4, 4\)"):
        network(IMAGES.reshape(10, 16))
