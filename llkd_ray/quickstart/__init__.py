"""The quickstart: a corpus and a small teacher, created on this machine without downloads."""
