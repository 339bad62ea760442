"""Estimates the second moments of what a layer's weights multiply, on images of any kind."""

from collections.abc import Sequence

import numpy as np

from fheconv.basics.arrays import Array, Shape
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.evidence import (
    Mixture,
    evidence,
    middle,
    trust,
    trust_in_mean,
    uniform_variance,
)
from fheconv.quantizer.rows import Batch, Rows


class Moments:
    """Holds what a layer's weights multiply on calibration images, in the quantized and in the float network.

    `tensors` and `floats` hold the tensors of the two networks. As far as the images are few or alike, inputs
    of any kind count too. `evidence` counts the independent images of each term.
    """

    def __init__(
        self,
        rows: Rows,
        inputs: Sequence[Quantization],
        shapes: Sequence[Shape],
        tensors: Sequence[Array],
        floats: Sequence[Array],
    ) -> None:
        self._rows = rows
        self._delivered = rows.windows(tensors, [1.0] * len(inputs), [q.zero_point for q in inputs])
        self._meant = rows.windows(floats, [q.scale for q in inputs], [0] * len(inputs))
        sources = rows.layer.sources
        self.evidence = tuple(evidence(tensors[0], tensors[source]) for source in sources)
        self._positions = [windows.shape[1] / len(tensors[0]) for windows in self._delivered]
        self._variances = rows.spread([uniform_variance(q) for q in inputs], shapes)
        middles = rows.spread([middle(q) for q in inputs], shapes)
        # Images of any brightness are in range. Activations are taken about the mean that the bias relies on.
        known = [
            trust_in_mean(images) if source else trust(images)
            for source, images in zip(sources, self.evidence, strict=True)
        ]
        self._apart = [
            (windows.mean(axis=1) - centre) * np.sqrt(1 - share)
            for windows, centre, share in zip(self._delivered, middles, known, strict=True)
        ]

    def of_batch(self, batch: Batch, weights: Array, free: Array) -> tuple[Array, Array]:
        """Return two covariances of quantized inputs: with each other (n, n), and with the float sums (n, K).

        `weights` (K, N) are the float weights of the batch's inputs, and `free` (K, N) is a mask of those
        that are fitted. Only the n inputs that some row reads count.
        """
        taps, columns = int(free.sum(axis=1).max()), free.any(axis=0)
        shares = [
            np.full(variance.shape, trust(images, taps / positions))
            for variance, images, positions in zip(
                self._variances, self.evidence, self._positions, strict=True
            )
        ]
        rows = self._rows
        variance, apart, share = (
            rows.of_inputs(batch.inputs, values) for values in (self._variances, self._apart, shares)
        )
        seen = rows.covariances(batch, self._delivered, self._meant, weights * np.sqrt(share))
        moment, target = seen[0][np.ix_(columns, columns)], seen[1][columns]
        mixture = Mixture(variance[columns], apart[columns], share[columns])
        return mixture.covariance(moment), mixture.with_sums(target, weights[:, columns])
