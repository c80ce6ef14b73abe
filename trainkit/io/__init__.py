"""The outside world: data, files, terminal."""
