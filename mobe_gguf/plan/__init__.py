"""What a model becomes in each form, before any work: sizes, memory, speed, an estimate of quality.

``layout`` finds the tensors of the plain GGUF file, from headers or from a bare config.json; ``memory`` asks the runtime what
it takes beside the weights; ``machine`` says what there is to run on; ``forms`` lists what could be written; ``cost`` says
what each takes; ``report`` prints the table.
"""
