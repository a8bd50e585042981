"""The teacher behind a server that speaks the OpenAI protocol."""
