import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

import fheconv
from fheconv import InvalidArgumentError, QuantConfig
from fheconv.analysis import drawing, plots

plt.switch_backend("Agg")

CONFIG = QuantConfig(weight_bits=3, input_bits=3)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def report(filters: int = 4, limit: int | None = 7):
    rng = np.random.default_rng(filters)
    weight = rng.normal(size=(filters, 1, 3, 3)) * rng.uniform(0.1, 1, (filters, 1, 3, 3))
    return fheconv.quantize(weight, rng.uniform(size=(2, 1, 6, 6)), CONFIG).budget(limit)


def bars(ax, label):
    (container,) = [c for c in ax.containers if c.get_label() == label]
    return [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in container]


def limit_lines(ax):
    return [line.get_ydata()[0] for line in ax.lines if len(line.get_ydata())]


class TestLayers:
    def network(self, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 3)
        )
        return fheconv.quantize(model, torch.rand(9, 1, 6, 6), QuantConfig(**options))

    @pytest.mark.parametrize("options", [{}, {"rounding_bits": 4}, {"overflow": "defined"}])
    def test_bars_are_the_bits_and_shares_of_each_layer(self, options):
        budget = self.network(**options).budget(9)
        bits, cost = plots.layers(budget).axes
        assert [y for _, _, y in bars(bits, "accumulator")] == [
            layer.accumulator_bits for layer in budget.layers
        ]
        assert [bar.get_hatch() == "//" for bar in bits.containers[0]] == [
            not layer.proved for layer in budget.layers
        ]
        (shares,) = cost.containers
        np.testing.assert_allclose(
            [bar.get_height() for bar in shares], [100 * layer.cost_share for layer in budget.layers]
        )
        assert [text.get_text() for text in cost.texts] == ["32"]
        assert 9 in limit_lines(bits)

    def test_other_things_are_refused(self):
        with pytest.raises(InvalidArgumentError, match="BudgetReport"):
            plots.layers("budget")


class TestBudget:
    @pytest.mark.parametrize("filters", [1, 4, 64])
    def test_bars_are_the_ranges(self, filters):
        budget = report(filters, limit=None)
        channels = budget.layers[0].channels
        ax = plots.budget(budget)
        assert bars(ax, "proved range") == [(pytest.approx(c.channel), 0, c.span) for c in channels]
        assert bars(ax, "observed in calibration") == [
            (
                pytest.approx(c.channel),
                c.observed[0] - c.minimum,
                c.observed[1] - c.observed[0],
            )
            for c in channels
        ]

    @pytest.mark.parametrize(("filters", "unit"), [(4, " bits"), (64, "")])
    def test_bits_stand_on_the_bars(self, filters, unit):
        budget = report(filters)
        ax = plots.budget(budget)
        written = [(text.xy, text.get_text()) for text in ax.texts]
        assert written == [((c.channel, c.span), f"{c.offset_bits}{unit}") for c in budget.layers[0].channels]

    def test_limit_divides_the_colours(self):
        spans = sorted(c.span for c in report(16).layers[0].channels)
        limit = spans[len(spans) // 2].bit_length() - 1
        budget = report(16, limit)
        ax = plots.budget(budget)
        channels = budget.layers[0].channels
        fitting = [c.span for c in channels if c.offset_bits <= limit]
        over = [c.span for c in channels if c.offset_bits > limit]
        assert fitting
        assert over
        assert [height for _, _, height in bars(ax, "proved range")] == fitting
        assert [height for _, _, height in bars(ax, "proved, over the limit")] == over
        assert limit_lines(ax) == [2**limit - 1]
        assert max(fitting) <= 2**limit - 1 < min(over)

    def test_limit_a_little_above_is_visible(self):
        budget = report(4)
        limit = budget.accumulator_bits + 1
        ax = plots.budget(report(4, limit))
        assert limit_lines(ax) == [2**limit - 1]
        assert ax.get_ylim()[1] > 2**limit - 1

    def test_limit_far_above_is_written_and_does_not_flatten_the_bars(self):
        budget = report(4, 24)
        ax = plots.budget(budget)
        assert limit_lines(ax) == []
        assert ax.get_ylim()[1] < 2 * budget.layers[0].worst.span
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert "limit: 24 bits, 16,777,215 steps (far above)" in legend

    def test_labels(self):
        budget = report(4)
        ax = plots.budget(budget)
        assert ax.get_title(loc="left") == f"Accumulator budget: {budget.accumulator_bits} bits proved"
        assert ax.get_xlabel() == "output channel of 'conv'"
        assert ax.get_ylabel() == "steps above the channel's minimum"
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2", "3"]

    def test_all_zero_weights(self):
        ax = plots.budget(fheconv.quantize(np.zeros((1, 1, 2, 2)), np.ones((1, 3, 3))).budget(4))
        assert bars(ax, "proved range") == [(0, 0, 0)]

    def test_draws_into_axes_that_are_given(self):
        _, ax = plt.subplots()
        assert plots.budget(report(), ax) is ax
        assert len(plt.get_fignums()) == 1

    @pytest.mark.parametrize("other", [None, 7, "budget"])
    def test_anything_but_a_report_is_refused(self, other):
        with pytest.raises(InvalidArgumentError, match="must be a BudgetReport"):
            plots.budget(other)
        assert plt.get_fignums() == []


def pictures(figure):
    """The axes with a title; the others are scales."""
    return [ax for ax in figure.axes if ax.get_title()]


class TestImages:
    def test_titles_and_values(self):
        a, b = np.arange(6).reshape(2, 3), np.arange(6.0).reshape(1, 3, 2)
        drawn = pictures(plots.images({"one": a, "two": b}))
        assert [ax.get_title() for ax in drawn] == ["one", "two"]
        np.testing.assert_array_equal(drawn[0].images[0].get_array(), a)
        np.testing.assert_array_equal(drawn[1].images[0].get_array(), b[0])

    def test_each_has_its_own_scale(self):
        drawn = pictures(plots.images({"grey": np.array([[2, 7]]), "signed": np.array([[-3, 1]])}))
        grey, signed = (ax.images[0] for ax in drawn)
        assert (grey.get_cmap().name, grey.get_clim()) == ("gray", (2, 7))
        assert (signed.get_cmap().name, signed.get_clim()) == ("signed", (-3, 3))

    def test_common_scale_covers_all(self):
        images = {"grey": np.array([[2, 7]]), "signed": np.array([[-3, 1]])}
        for ax in pictures(plots.images(images, common=True)):
            assert (ax.images[0].get_cmap().name, ax.images[0].get_clim()) == ("signed", (-7, 7))

    def test_zero_is_white(self):
        (ax,) = pictures(plots.images({"": np.array([[-2, 0, 1]]), "x": np.array([[-2, 0, 1]])}))
        assert ax.images[0].to_rgba(np.array([[0.0]]))[0, 0].tolist() == pytest.approx([1, 1, 1, 1], abs=0.01)

    def test_constant_picture(self):
        (ax,) = pictures(plots.images({"black": np.zeros((2, 2))}))
        assert ax.images[0].get_clim() == (0, 1)

    def test_torch_tensors(self):
        torch = pytest.importorskip("torch")
        (ax,) = pictures(plots.images({"tensor": torch.ones(1, 2, 2, requires_grad=True)}))
        assert ax.images[0].get_array().shape == (2, 2)

    @pytest.mark.parametrize("shape", [(3,), (2, 3, 3), (1, 1, 3, 3), (0, 3)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(InvalidArgumentError, match="'bad' has shape"):
            plots.images({"bad": np.zeros(shape)})

    def test_no_picture_is_refused(self):
        with pytest.raises(InvalidArgumentError, match="empty"):
            plots.images({})

    @pytest.mark.parametrize("other", [None, np.zeros((2, 2)), [np.zeros((2, 2))]])
    def test_pictures_without_titles_are_refused(self, other):
        with pytest.raises(InvalidArgumentError, match=r"must be \{title: array\}"):
            plots.images(other)


class TestFilterMatrix:
    MATRIX = fheconv.filter_matrix(np.array([[1, 2], [3, 4]]), (3, 3))

    def test_small_matrix_is_written_out(self):
        ax = plots.filter_matrix(self.MATRIX)
        np.testing.assert_array_equal(ax.images[0].get_array(), self.MATRIX)
        written = np.zeros_like(self.MATRIX)
        for text in ax.texts:
            column, row = text.get_position()
            written[row, column] = int(text.get_text())
        np.testing.assert_array_equal(written, self.MATRIX)

    def test_zero_is_the_middle_of_the_colours(self):
        assert plots.filter_matrix(self.MATRIX).images[0].get_clim() == (-4, 4)

    def test_blocks_are_separated(self):
        ax = plots.filter_matrix(self.MATRIX, block=(3, 2))
        horizontal = [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1]
        vertical = [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1]
        assert (horizontal, vertical) == ([2.5, 5.5], [1.5])

    def test_csr_is_drawn_like_dense(self):
        weight = np.array([[1, 0, -1]])
        dense, sparse = (
            plots.filter_matrix(fheconv.filter_matrix(weight, (20, 20), format=form))
            for form in ("dense", "csr")
        )
        np.testing.assert_array_equal(dense.images[0].get_array(), sparse.images[0].get_array())

    def test_large_matrix_keeps_its_thin_lines(self):
        matrix = fheconv.filter_matrix(np.array([[1, -3]]), (25, 25))
        ax = plots.filter_matrix(matrix)
        dots = ax.images[0].get_array()
        assert max(dots.shape) <= drawing.DOTS
        step = 3
        for row, column in np.ndindex(*dots.shape):
            under = matrix[row * step : (row + 1) * step, column * step : (column + 1) * step]
            assert dots[row, column] == under.flat[np.argmax(np.abs(under))]
        assert ax.images[0].get_extent() == [-0.5, matrix.shape[1] - 0.5, matrix.shape[0] - 0.5, -0.5]
        assert list(ax.texts) == []

    def test_labels(self):
        ax = plots.filter_matrix(self.MATRIX)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("output (flattened)", "image (flattened)")
        assert ax.get_title(loc="left") == "Filter matrix, 9 × 4"

    def test_draws_into_axes_that_are_given(self):
        _, ax = plt.subplots()
        assert plots.filter_matrix(self.MATRIX, ax) is ax
        assert len(plt.get_fignums()) == 1

    @pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 3)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(InvalidArgumentError, match="two axes"):
            plots.filter_matrix(np.zeros(shape))

    @pytest.mark.parametrize("block", [(0, 1), (1, -1), (1, 2.0), (1,), 3, (True, 1)])
    def test_blocks_that_are_not_two_positive_integers_are_refused(self, block):
        with pytest.raises(InvalidArgumentError, match="block"):
            plots.filter_matrix(self.MATRIX, block=block)
        with pytest.raises(InvalidArgumentError, match="block"):
            plots.filter_matrices({"one": self.MATRIX}, blocks={"one": block})
        assert plt.get_fignums() == []


class TestFilterMatrices:
    SMALL = fheconv.filter_matrix(np.array([[1, 2], [3, 4]]), (3, 3))
    WIDE = SMALL.T

    def test_each_is_drawn_under_its_title(self):
        drawn = pictures(plots.filter_matrices({"one": self.SMALL, "two": self.WIDE}))
        assert [ax.get_title() for ax in drawn] == ["one", "two"]
        for ax, matrix in zip(drawn, (self.SMALL, self.WIDE), strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), matrix)
            assert len(ax.texts) == np.count_nonzero(matrix)

    def test_entries_are_of_one_size(self):
        figure = plots.filter_matrices({"one": self.SMALL, "two": self.WIDE})
        figure.canvas.draw()
        sizes = [ax.get_window_extent().width / ax.images[0].get_array().shape[1] for ax in pictures(figure)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.1)

    def test_blocks_go_by_title(self):
        one, two = pictures(
            plots.filter_matrices({"one": self.SMALL, "two": self.SMALL}, blocks={"two": (3, 2)})
        )
        assert (len(one.lines), len(two.lines)) == (0, 3)

    def test_csr_and_large(self):
        csr = fheconv.filter_matrix(np.array([[1, -3]]), (25, 25), format="csr")
        figure = plots.filter_matrices({"large": csr})
        assert max(figure.get_size_inches()) < 10

    def test_none_is_refused(self):
        with pytest.raises(InvalidArgumentError, match="empty"):
            plots.filter_matrices({})

    def test_matrices_and_blocks_without_titles_are_refused(self):
        with pytest.raises(InvalidArgumentError, match=r"must be \{title: matrix\}"):
            plots.filter_matrices([self.SMALL])
        with pytest.raises(InvalidArgumentError, match=r"must be \{title: block\}"):
            plots.filter_matrices({"one": self.SMALL}, blocks=(3, 2))

    def test_other_shapes_are_refused_by_title_and_leave_no_figure(self):
        with pytest.raises(InvalidArgumentError, match="'bad' has shape"):
            plots.filter_matrices({"good": self.SMALL, "bad": np.zeros(3)})
        assert plt.get_fignums() == []


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
import fheconv
try:
    from fheconv.analysis import plots
except fheconv.MissingExtraError as error:
    assert isinstance(error, ImportError)
    print(error)
"""


def test_without_matplotlib_the_error_names_the_extra():
    child = subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB], capture_output=True, text=True)
    assert 'pip install "fheconv[plots]"' in child.stdout, child.stderr


def test_importing_fheconv_does_not_import_matplotlib():
    code = "import sys, fheconv, fheconv.analysis.budget; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
