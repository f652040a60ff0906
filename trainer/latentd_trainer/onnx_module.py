"""An ONNX graph in the place of a torch module, so that both are checked and packed alike."""

from collections.abc import Sequence
from typing import Self

import onnx
import torch
from torch import Tensor, nn

from latentd_trainer import onnx_graph, parity


class OnnxModule(nn.Module):
    """Runs a graph in ONNX Runtime on the CPU: inputs in the graph's order to a tuple of its outputs in order.

    Raises:
        GraphError: ONNX Runtime refuses the graph; on a call, the graph does not run with these inputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.model = model
        self._session = parity.open_session(onnx_graph.serialize(model))
        self._names = [value.name for value in model.graph.input]
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        feeds = {name: tensor.numpy() for name, tensor in zip(self._names, inputs, strict=True)}
        return tuple(torch.from_numpy(array) for array in parity.run_onnx(self._session, feeds))

    def with_output_shapes(self, shapes: Sequence[Sequence[int]]) -> Self:
        """The same graph with the shapes of its outputs, without the batch axis, written into it."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for value, shape in zip(model.graph.output, shapes, strict=True):
            onnx_graph.set_shape(value, shape)
        return type(self)(model)
