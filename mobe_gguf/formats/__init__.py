"""Reading and writing files: GGUF, safetensors, importance matrices, moments."""
