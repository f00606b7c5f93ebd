"""A server without a fitted calibrator: raw rewards pass for z, whatever scorer gives them."""

from mora_serve.calibrators import load_calibrator
from mora_serve.config import load_settings


def test_the_identity_setting_accepts_any_scorer_and_leaves_rewards_as_they_are() -> None:
    settings = load_settings("embedded", overrides={"method": {"calibrator": "identity"}})
    calibrator = load_calibrator(settings)
    calibrator.check(dict.fromkeys(settings.dimensions, ("some model", "some revision")))
    assert calibrator["helpful"].z(1.25) == 1.25
