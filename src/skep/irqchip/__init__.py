"""A PC's interrupt controllers and its interval timer."""
