"""The lecture's claims, measured: `latentd-train study`.

`CLAIMS` names them in the order of the lecture. Each is a module of that name with a function
`study(settings: Settings) -> Section`, which trains or computes what it needs and says what it found (`section`).
"""

from collections.abc import Sequence

CLAIMS: tuple[str, ...] = (
    "historical_ladder",
    "exact_bounds",
    "wake_and_sleep",
    "gradient_estimators",
    "vanishing_gradient",
    "gan_as_em",
    "kl_directions",
    "ring_of_eight",
    "blur_and_cover",
    "diffusion_and_guidance",
)
"""Every claim by its name on the command line, in the order of the report."""


def chosen(only: Sequence[str]) -> list[str]:
    """The names in `only`, in the order of the report; all of them if it is empty.

    Raises:
        ValueError: a name is no claim's; the message lists those there are.
    """
    if unknown := sorted(set(only) - set(CLAIMS)):
        raise ValueError(f"unknown claims {', '.join(unknown)}: must be of {', '.join(CLAIMS)}")
    return [name for name in CLAIMS if name in only or not only]
