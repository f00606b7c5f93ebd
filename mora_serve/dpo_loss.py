"""Which DPO objective a run minimises: the variants that TRL ships, under TRL's names.

The same section stands in the settings (``trainer.loss``) and in a job (``mora.loss``), where it
replaces the configured one as a whole. Combinations that TRL refuses, or that would train something
else than they say, are refused here, before a job is accepted. Lengths are normalised by
``sigmoid_norm`` (mean instead of summed log ratios), by ``ipo``, and by ``ld_alpha`` (Liu et al.
2024, arXiv 2409.06411), which weighs down what one answer has beyond the length of the other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mora_serve.sections import Positive, Section
from mora_serve.validation import broken_rule

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
SMOOTHED = frozenset({"exo_pair", "robust", "aot", "aot_unpaired"})
"""Losses that read ``label_smoothing``; the others leave it without effect."""
SORTED = frozenset({"aot", "aot_unpaired"})
"""Losses that sort the step's pairs, so that weights of single pairs would not match."""
REWARD_DIFFERENCES = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
)
"""Losses of the reward difference alone, in which a divergence's normaliser cancels."""


class DpoLoss(Section):
    """Fields of :class:`trl.DPOConfig`, for example ``DpoLoss(loss_type=("sigmoid_norm",))``."""

    loss_type: tuple[LossType, ...] = Field(default=("sigmoid",), min_length=1)
    """One loss, or several that are added up."""
    loss_weights: tuple[Positive, ...] | None = None
    """One weight per loss; ``None`` weighs each with 1."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Probability that a label is wrong (``robust``, ``aot``), or the epsilon of ``exo_pair``."""
    ld_alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Weight of tokens beyond the shorter answer's length; ``None`` and 1 leave them alone."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """Divergence to the reference that the objective regularises with."""
    f_alpha_divergence_coef: Positive = 0.5
    """Exponent of ``alpha_divergence``."""
    use_weighting: bool = False
    """Weigh pairs by how probable they are under the policy (WPO)."""
    discopop_tau: Positive = 0.05
    """Temperature of ``discopop``."""

    @model_validator(mode="after")
    def _fits_together(self) -> DpoLoss:
        types: set[str] = set(self.loss_type)
        if len(types) != len(self.loss_type):
            raise broken_rule("loss_type", "must name each loss once")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise broken_rule(
                "loss_weights",
                f"must hold one weight per loss_type ({len(self.loss_type)}), got "
                f"{len(self.loss_weights)}",
            )
        if self.f_divergence_type != "reverse_kl" and (others := types - REWARD_DIFFERENCES):
            raise broken_rule(
                "f_divergence_type", f"must be reverse_kl with the loss {min(others)}"
            )
        if self.use_weighting and (sorting := types & SORTED):
            raise broken_rule(
                "use_weighting", f"must be false with the loss {min(sorting)}, which sorts pairs"
            )
        return self._smoothed(types)

    def _smoothed(self, types: set[str]) -> DpoLoss:
        if "exo_pair" in types and self.label_smoothing == 0.0:
            raise broken_rule(
                "label_smoothing", "must be above 0 with the loss exo_pair (its paper takes 0.001)"
            )
        if self.label_smoothing > 0.0 and not types & SMOOTHED:
            raise broken_rule(
                "label_smoothing",
                f"must be 0 unless a loss reads it ({', '.join(sorted(SMOOTHED))}), got "
                f"{self.label_smoothing}; smoothed sigmoid is called robust",
            )
        return self

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``trl.DPOConfig``."""
        given = self.model_dump()
        given["loss_type"] = list(self.loss_type)
        given["loss_weights"] = None if self.loss_weights is None else list(self.loss_weights)
        return given
