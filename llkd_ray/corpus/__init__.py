"""Corpus ingestion: read a user's files and write them as numbered EXAMPLES."""
