"""Faults on purpose: processes die, calls fail, disks forget, files are damaged; a run must end in the same bits."""
