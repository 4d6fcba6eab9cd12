"""The section `pod` of the configuration schema."""

from __future__ import annotations

from typing import Literal

from app.config_section import Section, operational


class PodConfig(Section):
    """What a rented pod may cost, and what it does when the run has finished, was refused or has used up its budget."""

    on_finish: Literal["auto", "keep", "stop", "terminate"] = operational("auto")
    """`stop` stops the pod through RunPod's API, `keep` leaves it running; `auto` stops on a RunPod pod only.
    `terminate` deletes the pod of a finished run: its network volume, without which that is refused, keeps the work."""
    grace_minutes: float = operational(30.0, ge=0, le=10_000)
    """The dashboard stays up this long before the pod is stopped."""
    max_hours: float | None = operational(None, gt=0)
    """Once all attempts together took so many hours, the run is saved, ended, and refused from then on; null is no
    limit."""
    max_cost_usd: float | None = operational(None, gt=0)
    """The same once all attempts together cost so much. A pod whose price is not known is refused; null is no limit."""
    max_idle_gpu_minutes: float | None = operational(None, gt=0)
    """The run is saved and ended where all GPUs are at 0 % for so long while it trains; null is off."""
