"""What a model becomes in each form, before any work: sizes, memory, speed, an estimate of quality.

``layout`` finds the tensors of the plain GGUF file, from headers or from a config.json alone.  ``memory`` asks the
runtime for its memory besides the weights.  ``machine`` describes the hardware.  ``forms`` lists the possible files,
``cost`` computes what each takes, ``report`` prints the table.
"""
