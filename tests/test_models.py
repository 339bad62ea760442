import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

MODELS = Path(__file__).parent.parent / "models"
WEIGHTS = sorted(MODELS.glob("*.safetensors"))
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


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, MODELS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        for part in ("weight", "bias")
        if part in layer
    }
    tensors = load_file(weights)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == promised
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.fixture(scope="module")
def tinycnn() -> ModuleType:
    return script("train_tinycnn_digits")


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


def test_both_models_are_shipped():
    assert [path.stem for path in WEIGHTS] == ["classic-filters", "tinycnn-digits"]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda path: path.stem)
def test_card_describes_the_file_beside_it(weights):
    check_card(weights)


class TestTinyCNN:
    def test_split_is_the_one_on_the_card(self, tinycnn):
        data = tinycnn.digits()
        card = read_card(tinycnn.SHIPPED)
        assert len(data.train_images) == len(data.train_labels) == 1347
        assert len(data.test_images) == len(data.test_labels) == card["accuracy"]["test_images"]
        assert list(data.test_images.shape[1:]) == card["input_shape"]
        images = torch.cat([data.train_images, data.test_images])
        assert [images.min(), images.max()] == card["input_range"]

    def test_shipped_weights_have_the_accuracy_on_the_card(self, tinycnn):
        accuracy = read_card(tinycnn.SHIPPED)["accuracy"]
        data = tinycnn.digits()
        with torch.inference_mode():
            right = tinycnn.shipped()(data.test_images).argmax(1) == data.test_labels
        assert right.sum() == accuracy["right_answers"] == 443
        assert tinycnn.evaluate(tinycnn.shipped()) == 443 / 450
        assert accuracy["value"] == round(443 / 450, 4)

    def test_evaluate_measures_and_does_not_quote(self, tinycnn):
        model = tinycnn.shipped()
        with torch.no_grad():
            model.fc1.weight.zero_()
            model.fc1.bias.copy_(functional.one_hot(torch.tensor(3), 10))
        threes = (tinycnn.digits().test_labels == 3).float().mean()
        assert tinycnn.evaluate(model) == pytest.approx(float(threes))

    def test_architecture_on_the_card_computes_the_same_logits(self, tinycnn):
        tensors = load_file(tinycnn.SHIPPED)
        images = tinycnn.digits().test_images
        x = images
        for layer in read_card(tinycnn.SHIPPED)["architecture"]:
            weight = tensors.get(f"{layer.get('name')}.weight")
            bias = tensors.get(f"{layer.get('name')}.bias")
            match layer["kind"]:
                case "Conv2d":
                    x = functional.conv2d(x, weight, bias, layer["stride"], layer["padding"])
                case "Linear":
                    x = functional.linear(x, weight, bias)
                case "ReLU":
                    x = functional.relu(x)
                case "Flatten":
                    x = nn.Flatten()(x)
                case kind:
                    pytest.fail(f"the card has a layer of unknown kind {kind}")
        with torch.inference_mode():
            torch.testing.assert_close(x, tinycnn.shipped()(images))

    def test_training_reaches_the_shipped_accuracy(self, tinycnn, tmp_path, capsys):
        before = {path: path.read_bytes() for path in MODELS.iterdir() if path.is_file()}
        output = tmp_path / "again.safetensors"
        tinycnn.main(["--output", str(output)])
        assert "shipped: 98.44%" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in MODELS.iterdir() if path.is_file()} == before

        check_card(output)
        model = tinycnn.TinyCNN()
        model.load_state_dict(load_file(output))
        accuracy = tinycnn.evaluate(model)
        assert accuracy >= tinycnn.evaluate(tinycnn.shipped()) - 0.01
        assert read_card(output)["accuracy"]["value"] == round(accuracy, 4)

    def test_without_output_nothing_is_written(self, tinycnn, monkeypatch, capsys):
        untrained = tinycnn.TinyCNN()
        monkeypatch.setattr(tinycnn, "train", lambda: untrained)
        monkeypatch.setattr(tinycnn, "write", lambda *_: pytest.fail("wrote without --output"))
        tinycnn.main([])
        printed = f"trained now: {tinycnn.evaluate(untrained):.2%} of the held-out images"
        assert printed in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["weights.json", "missing/weights.safetensors"])
    def test_bad_output_is_refused_before_training(self, tinycnn, monkeypatch, capsys, tmp_path, name):
        monkeypatch.setattr(tinycnn, "train", lambda: pytest.fail("trained first"))
        with pytest.raises(SystemExit) as refusal:
            tinycnn.main(["--output", str(tmp_path / name)])
        assert refusal.value.code == 2
        assert str(tmp_path) in capsys.readouterr().err


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
        written = script("make_classic_filters").write(tmp_path)
        for path in (written, written.with_suffix(".json")):
            assert path.read_bytes() == (MODELS / path.name).read_bytes()
