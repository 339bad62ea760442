"""Fine-tunes a quantized network without making its accumulators wider.

straight_through: gives lookups a gradient.
modules: linear steps and maxima as torch modules.
trainable: makes an integer network a torch module.
requantizable: trains the float weights of a network whose windows follow them.
thinning: removes lookups from a network.
finetuning: the entry: fine-tunes a network.
"""
