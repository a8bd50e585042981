"""The teacher on a server with an OpenAI-compatible API."""
