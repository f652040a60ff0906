"""Samples of other heights and widths than the default: which a model may list, and its bundle as it looks at one."""

from collections.abc import Iterator

from latentd.v1 import bundle_pb2, model_pb2

Size = tuple[int, int]
"""Height and width."""


def text(size: Size) -> str:
    """A size in words, e.g. `16x24`."""
    return f"{size[0]}x{size[1]}"


def parse(words: str) -> tuple[Size, ...]:
    """`12x12,16x24` as sizes.

    Raises:
        ValueError: it is something else.
    """
    sizes = []
    for word in words.split(","):
        height, _, width = word.strip().partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise ValueError(f"{word.strip()!r} is no size; sizes are HEIGHTxWIDTH with commas between, as 12x12,16x24")
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def listed(model: model_pb2.Model) -> list[Size]:
    """The sizes beside that of `sample_spec`."""
    return [(size.height, size.width) for size in model.sample_sizes]


def violations(bundle: bundle_pb2.Bundle) -> list[str]:
    """What is wrong with the sizes that a model lists, as far as its bundle's message tells."""
    model, sizes = bundle.model, listed(bundle.model)
    if not sizes:
        return []
    found = []
    if not model.HasField("diffusion") or model.HasField("latent_space"):
        found.append("only a diffusion model over samples can have other sizes")
    if any(network.role != bundle_pb2.Network.ROLE_DENOISER for network in bundle.networks):
        found.append("a model of several sizes can have no graph beside its denoiser")
    seen = {tuple(model.sample_spec.shape[1:])}
    for size in sizes:
        if min(size) < 1:
            found.append(f"{text(size)} must have a positive height and width")
        if size in seen:
            found.append(f"{text(size)} is given twice, or is that of sample_spec")
        seen.add(size)
    return [f"model.sample_sizes: {each}" for each in found]


def followers(network: bundle_pb2.Network) -> frozenset[str]:
    """The inputs and outputs of a denoiser that have the height and width of samples."""
    inputs = [entry.name for entry in network.inputs if entry.source == bundle_pb2.NetworkInput.SOURCE_SAMPLE]
    return frozenset(
        inputs
        + [result.name for result in network.outputs if result.meaning == bundle_pb2.NetworkOutput.MEANING_PREDICTION]
    )


def sized(model: model_pb2.Model, size: Size) -> model_pb2.Model:
    """A model as it would be if its samples had this size and no other."""
    variant = model_pb2.Model()
    variant.CopyFrom(model)
    del variant.sample_sizes[:]
    for spec in (variant.sample_spec, variant.latent_spec):  # x_T is the latent
        spec.shape[1:] = size
    return variant


def at_each(network: bundle_pb2.Network, model: model_pb2.Model) -> Iterator[tuple[Size, bundle_pb2.Network]]:
    """Every other size of a model's samples, and what a bundle of that size alone would say of the denoiser."""
    names = followers(network)
    for size in listed(model):
        variant = bundle_pb2.Network()
        variant.CopyFrom(network)
        specs = {entry.name: entry.spec for entry in variant.inputs}
        specs |= {result.name: result.spec for result in variant.outputs}
        for name in names:
            specs[name].shape[1:] = size
        yield size, variant
