"""What only boards need: compiling for Axera's NPUs, their runtime, what they can hold and when."""
