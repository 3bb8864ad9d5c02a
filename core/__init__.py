"""What every room stands on: errors, whole-or-nothing files, the log, units."""
