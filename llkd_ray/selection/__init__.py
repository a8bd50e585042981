"""Score table, policies, acquisition, and the selector actor."""
