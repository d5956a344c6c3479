"""GGUF, PowerInfer files, HF checkpoints and bundles: what hotcold reads and writes."""
