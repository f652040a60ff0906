"""Samples of other heights and widths than `Model.sample_spec`, of networks that take them (ADR 33). Pure.

To the server a size is a variant of the bundle: the same graph with other shapes, and everything that is done with a
bundle is done with each of its variants.
"""

from latentd.v1 import bundle_pb2, model_pb2

Size = tuple[int, int]
"""Height and width."""


def text(size: Size) -> str:
    """A size in words, e.g. `16x24`."""
    return f"{size[0]}x{size[1]}"


def listed(model: model_pb2.Model) -> list[Size]:
    """The sizes beside that of `sample_spec`."""
    return [(size.height, size.width) for size in model.sample_sizes]


def problems(bundle: bundle_pb2.Bundle) -> list[str]:
    """Why samples of the sizes that a bundle lists could not be made, as far as its message tells."""
    model, sizes = bundle.model, listed(bundle.model)
    if not sizes:
        return []
    found = []
    if not model.HasField("diffusion") or model.HasField("latent_space"):
        found.append("only a diffusion model over samples can have other sizes")
    if any(network.role != bundle_pb2.Network.ROLE_DENOISER for network in bundle.networks):
        found.append("a model of several sizes can have no graph beside its denoiser")
    if len(model.sample_spec.shape) != 3:
        found.append("sample_spec must be of shape [C, H, W]")
    known = {tuple(model.sample_spec.shape[1:])}
    for size in sizes:
        if min(size) < 1:
            found.append(f"{text(size)} must have a positive height and width")
        if size in known:
            found.append(f"{text(size)} is listed twice, or is that of sample_spec")
        known.add(size)
    return [f"model.sample_sizes: {each}" for each in found]


def shapes_follow(value: bundle_pb2.NetworkInput | bundle_pb2.NetworkOutput) -> bool:
    """Whether an input or output of a denoiser has the height and width of samples."""
    if isinstance(value, bundle_pb2.NetworkInput):
        return value.source == bundle_pb2.NetworkInput.SOURCE_SAMPLE
    return value.meaning == bundle_pb2.NetworkOutput.MEANING_PREDICTION


def at(bundle: bundle_pb2.Bundle, size: Size) -> bundle_pb2.Bundle:
    """The bundle of a model whose samples have this size and no other."""
    variant = bundle_pb2.Bundle()
    variant.CopyFrom(bundle)
    model = variant.model
    del model.sample_sizes[:]
    specs = [model.sample_spec, *([model.latent_spec] if model.HasField("latent_spec") else [])]
    for network in variant.networks:
        specs += [entry.spec for entry in network.inputs if shapes_follow(entry)]
        specs += [result.spec for result in network.outputs if shapes_follow(result)]
    for spec in specs:
        spec.shape[1:] = size
    return variant
