"""Which calibrator a configuration means: a file, the shipped one, or the fakes' own.

Used by everything that builds a :class:`~mora_serve.service.MoraService` from settings.
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path
from statistics import NormalDist

from mora_serve.calibration import ANY_REVISION, NUM_QUANTILES, Calibrator, DimensionCalibration
from mora_serve.config import Settings
from mora_serve.errors import CalibrationError
from mora_serve.fakes import REVISION, SIGMA, TAU, raw_scale
from mora_serve.types import Dimension

IDENTITY = "identity"
"""Setting that takes raw rewards for z, for a server on which a calibrator is to be fitted."""
SHIPPED = "data/smol-heads/calibrator.json"


def load_calibrator(settings: Settings) -> Calibrator:
    """The calibrator of ``settings.method.calibrator``, or the one that fits the scorer backends.

    Raises :class:`~mora_serve.errors.CalibrationError` when the file cannot be used, or when the
    scorers are neither fake nor the shipped heads and none is configured.
    """
    if settings.method.calibrator == IDENTITY:
        return Calibrator.identity(
            {k: (item.name, ANY_REVISION) for item in settings.scorers for k in item.dimensions}
        )
    if settings.method.calibrator is not None:
        return Calibrator.load(Path(settings.method.calibrator))
    backends = {scorer.backend for scorer in settings.scorers}
    if backends == {"fake"}:
        return fake_calibrator(settings.dimensions)
    if backends == {"heads"}:
        with resources.as_file(resources.files("mora_serve").joinpath(SHIPPED)) as path:
            return Calibrator.load(path)
    raise CalibrationError(
        "method.calibrator must name a calibrator fitted for the configured scorers, got none; "
        "fit one with 'mora-serve scorers calibrate'"
    )


def fake_calibrator(dimensions: tuple[Dimension, ...]) -> Calibrator:
    """What fitting on the fakes would converge to: their scale and variances are known."""
    pool = NormalDist(0.0, math.hypot(TAU, SIGMA))
    shares = [min(max(i / (NUM_QUANTILES - 1), 0.001), 0.999) for i in range(NUM_QUANTILES)]
    grid = [pool.inv_cdf(share) for share in shares]
    calibrations = {}
    for dimension in dimensions:
        offset, scale = raw_scale(dimension)
        calibrations[dimension] = DimensionCalibration(
            model=f"fake-{dimension}", revision=REVISION, kind="robust_z", center=offset,
            scale=scale, quantiles=tuple(offset + scale * z for z in grid), m=0.0, tau=TAU,
            sigma=SIGMA, sigma_within=SIGMA, median_mean=0.0, length_slope=0.0, share_cut=0.0,
            num_prompts=0, num_rollouts=0,
        )  # fmt: skip
    return Calibrator(calibrations, policy="assumed")
