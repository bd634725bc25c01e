"""The interfaces between rooms. Nothing here knows an implementation."""
