"""What models are read from, each checked before anything in it is believed.

``checkpoint`` reads Hugging Face directories, ``families`` says what is called what in them, ``hub`` downloads them.
``gguf_file`` reads the head of a GGUF file, ``gguf_source`` the experts in one.  Factors come as a ``mobe_checkpoint``, as
``gguf_factors`` of a GGUF file, or as ``wab``, out of the authors' training.  ``original`` is what factorizing asks of a model.
"""
