"""From a user's files to numbered EXAMPLES."""
