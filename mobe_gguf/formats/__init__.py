"""Files as they are on disk, read and written: GGUF, safetensors."""
