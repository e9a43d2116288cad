"""From a program over tokens to values and gradients, in chunks: specification, chunk loop, autograd, operators."""
