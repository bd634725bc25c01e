"""Guests to try Skep with, made on this machine from the distribution's own packages."""
