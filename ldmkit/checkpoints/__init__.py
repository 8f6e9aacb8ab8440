"""Weights and configs on disk: safetensors and JSON only, written atomically, every key accounted for."""
