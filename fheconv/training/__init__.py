"""Fine-tunes quantized networks, and trains cheaper networks to imitate a model.

straight_through: gives lookups a gradient.
modules: linear steps and maxima as torch modules.
trainable: makes an integer network a torch module.
requantizable: trains the float weights of a network whose windows follow them.
pooling: moves poolings before activations, where one lookup serves a whole window.
linear_channels: takes the activation from a channel.
thinning: removes lookups from a network.
finetuning: the entry: fine-tunes a network.
students: builds small networks whose shapes are cheap in TFHE.
school: trains them on images and logits.
distilling: the entry: trains a small network to imitate a large one.
controls: trains trivial models to compare with.
"""
