"""Models that were trained elsewhere, made into bundles: ONNX graphs, torch modules, diffusers pipelines.

All three end in `export.package`, so an imported bundle keeps every rule that a trained one keeps.
"""


class ImportingError(ValueError):
    """A model that cannot be imported as it is described; the message lists everything that is wrong with it."""
