"""The networks of a diffusers pipeline, wrapped to take and give what the contract names."""

import math
from typing import Any

import torch
from torch import Tensor, nn


class TimestepTable(nn.Module):
    """What a network's time embedding says of every timestep, read by index: [n] i64 -> [n, width] f32.

    Sines in a graph are rounded otherwise at other places in a batch; a table is not.
    """

    def __init__(self, embed: nn.Module, timestep_count: int) -> None:
        super().__init__()
        self.codes: Tensor
        with torch.no_grad():
            self.register_buffer("codes", embed(torch.arange(timestep_count)).float())

    def forward(self, timestep: Tensor) -> Tensor:
        """See the class."""
        return self.codes[timestep]


class Denoiser(nn.Module):
    """A UNet2DModel: x_t [n, C, H, W] f32, t [n] i64 and, if it has classes, labels [n] i64 -> the shape of x_t.

    Args:
        unet: The network; its time embedding is replaced by a table.
        timestep_count: T.
        unconditional_class: The row of its class embedding that stands for no class, if one does. Labels count
            the others, and -1 is that one.
    """

    def __init__(self, unet: Any, timestep_count: int, unconditional_class: int | None) -> None:
        super().__init__()
        if unet.config.time_embedding_type == "positional":
            unet.time_proj = TimestepTable(unet.time_proj, timestep_count)
        self.unet = unet
        self.has_classes = unet.class_embedding is not None
        self.unconditional_class = unconditional_class
        self.eval()

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """See the class."""
        if label is not None and self.unconditional_class is not None:
            row = label + (label >= self.unconditional_class)
            label = torch.where(label < 0, self.unconditional_class, row)
        prediction: Tensor = self.unet(sample, timestep, class_labels=label, return_dict=False)[0]
        return prediction


class LatentEncoder(nn.Module):
    """An autoencoder's encoder: images [n, C, H, W] f32 to mean and, with a KL, log variance of latents.

    Latents are on the scale on which the pipeline's diffusion works: (z - shift) * scale.
    """

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.shift, self.scale = shift_and_scale(autoencoder)
        self.variational = hasattr(autoencoder.config, "use_quant_conv")
        self.eval()

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        if not self.variational:
            return ((self.autoencoder.encode(sample, return_dict=False)[0] - self.shift) * self.scale,)
        (posterior,) = self.autoencoder.encode(sample, return_dict=False)
        return (posterior.mean - self.shift) * self.scale, posterior.logvar + 2 * math.log(self.scale)


class LatentDecoder(nn.Module):
    """An autoencoder's decoder: latents on the scale of `LatentEncoder` to images [n, C, H, W] f32."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.shift, self.scale = shift_and_scale(autoencoder)
        self.eval()

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        image: Tensor = self.autoencoder.decode(latent / self.scale + self.shift, return_dict=False)[0]
        return image


def shift_and_scale(autoencoder: Any) -> tuple[float, float]:
    """What a pipeline takes from an autoencoder's latents, and then multiplies them by."""
    config = autoencoder.config
    return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)
