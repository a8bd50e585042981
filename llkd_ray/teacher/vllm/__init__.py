"""The teacher on a local vLLM engine."""
