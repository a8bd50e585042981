"""The embedded default: a corpus and a small teacher made on this machine."""
