"""What a model is and can do, as GetModel tells it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from latentd.v1 import model_pb2


@dataclass(frozen=True)
class Model:
    """One model of a server. `proto` has everything; the properties have what callers mostly want, in plain types."""

    proto: model_pb2.Model

    @property
    def name(self) -> str:
        """Canonical reference, `NAME@VERSION`."""
        return self.proto.name

    @property
    def digest(self) -> str:
        """Equal digest, equal weights."""
        return self.proto.digest

    @property
    def family(self) -> str:
        """E.g. `vae`, `gan`, `diffusion`."""
        return enum_name(model_pb2.Model.Family, self.proto.family, "FAMILY_")

    @property
    def state(self) -> str:
        """`unloaded`, `loading`, `active`, `draining` or `failed`."""
        return enum_name(model_pb2.Model.State, self.proto.state, "STATE_")

    @cached_property
    def methods(self) -> frozenset[str]:
        """Which of `sample`, `encode`, `decode`, `denoise` and `score` it answers."""
        return frozenset(enum_name(model_pb2.Model.Method, method, "METHOD_") for method in self.proto.methods)

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis; images are `[C, H, W]`."""
        return tuple(self.proto.sample_spec.shape)

    @cached_property
    def sample_sizes(self) -> tuple[tuple[int, int], ...]:
        """Other heights and widths that samples may be asked for, beside those of `sample_shape`."""
        return tuple((size.height, size.width) for size in self.proto.sample_sizes)

    def shape_at(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """Shape of one sample of this height and width; of the model's own if None."""
        return self.sample_shape if size is None else (*self.sample_shape[:1], *size)

    @cached_property
    def latent_shape(self) -> tuple[int, ...] | None:
        """Shape of one latent code, without the batch axis. A diffusion model's latents are noise of `sample_shape`."""
        if self.proto.HasField("latent_spec"):
            return tuple(self.proto.latent_spec.shape)
        return self.sample_shape if self.is_diffusion else None

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value of a sample."""
        return self.proto.sample_spec.min_value, self.proto.sample_spec.max_value

    @property
    def walks_over_latents(self) -> bool:
        """Whether it is a diffusion model whose samples another model decodes from what it walks over."""
        return self.proto.HasField("latent_space")

    @cached_property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of what a diffusion model walks over, without the batch axis: latents, or samples."""
        return (self.latent_shape or ()) if self.walks_over_latents else self.sample_shape

    @property
    def state_range(self) -> tuple[float, float]:
        """Smallest and largest value of that where it is clean; both 0 where no range is declared."""
        spec = self.proto.latent_spec if self.walks_over_latents else self.proto.sample_spec
        return spec.min_value, spec.max_value

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Display names of the classes; labels index it. Empty for a model without classes."""
        return tuple(self.proto.class_names)

    @property
    def is_diffusion(self) -> bool:
        """Whether it walks from noise to data step by step."""
        return self.proto.HasField("diffusion")

    @cached_property
    def samplers(self) -> tuple[str, ...]:
        """Samplers it can be walked with, the default first; empty unless it is a diffusion model."""
        return tuple(self.proto.diffusion.samplers)

    @property
    def timestep_count(self) -> int:
        """Noise levels of a diffusion model; timesteps run from 0 to one less."""
        return len(self.proto.diffusion.alphas)

    @cached_property
    def capabilities(self) -> Mapping[str, str]:
        """What each method answers, as the card says it; for those not in `methods`, why they do not."""
        return {
            enum_name(model_pb2.Model.Method, each.method, "METHOD_"): each.description
            for each in self.proto.card.capabilities
        }

    @property
    def likelihood(self) -> str:
        """How well ln p(sample) is known: `exact`, `bound`, `none`, or `unspecified` where the card does not say.

        `proto.card.likelihood` has the figures, of what they are, and why there are none.
        """
        kind = model_pb2.ModelCard.Likelihood.Kind
        return enum_name(kind, self.proto.card.likelihood.kind, "KIND_")

    @property
    def metrics(self) -> Mapping[str, float]:
        """Evaluation results by name, from the card."""
        return self.proto.card.metrics


def enum_name(enum: Any, number: int, prefix: str) -> str:
    """The name of a value of a protobuf enum as this library writes it: `FAMILY_INFO_GAN` is `info-gan`.

    Servers newer than this client may send values it does not know; they read `unknown-N`.
    """
    if number not in enum.values():
        return f"unknown-{number}"
    name: str = enum.Name(number)
    return name.removeprefix(prefix).lower().replace("_", "-")
