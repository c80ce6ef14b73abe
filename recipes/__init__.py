"""Complete programs, one file each."""
