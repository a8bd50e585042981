"""All settings, their checks, their loading, and the schedule derived from them. Uses no Ray."""
