"""Turns a torch model, a weight array or a file into a network in floats.

model: the entry: a model or a single convolution.
tracing: modules as torch.export takes them, and whether they repeat their results.
numbers: numbers that a module reads from its own weights.
refusals: why a module cannot be captured, and what to do.
eager: modules of torch.ao.quantization as modules of floats.
exported: from torch.export's graph to a network.
tidying: what changes no result of a graph.
outputs: which of several outputs is meant.
calls: one call of an operator, with its arguments.
folding: tensors whose first axis is not the batch.
probing: whatever torch can show to be linear.
proof: that a function is affine.
jacobian: the sparse matrix of a linear function.
graph: tensors between calls, and the layers they become.
quantizers: what training for integers left in a network.
merging: layers in a row with no activation between them.
products: products of two encrypted values.
elementwise: operators that act on each value.
poolings: operators that read windows.
operators: the table of operators.
last: what moves the results of a softmax.
checkpoint: layers and models from files.
onnx_file: models from ONNX files.
onnx_model: an ONNX graph as a torch module.
onnx_node: nodes of ONNX graphs, and what depends on shapes alone.
onnx_operators: the table of ONNX's operators.
onnx_windows: ONNX's convolutions and poolings.
onnx_quantizers: ONNX operators that round to integers, and back.
onnx_moves: ONNX's operators of shapes and places.
splitting: a public and a private part of a model.
pickles: what to do with files of torch.save.
"""
