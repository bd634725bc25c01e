"""The test bench of the engines: guest programs, and the host CPU as the judge of the translator."""
