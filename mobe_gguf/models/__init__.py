"""Reading models.  Every file is checked before its content is used.

``checkpoint`` reads Hugging Face directories, ``families`` has the names in them, ``hub`` downloads them.  ``gguf_source``
reads the experts of a GGUF file.  Factors come as a ``mobe_checkpoint``, as ``gguf_factors`` of a GGUF file, or as ``wab``
from the authors' training.  ``original`` is the interface that factorizing uses.
"""
