"""Every setting, its checks, loading, and the schedule that follows from it. Pure."""
