"""The decisions: which instance starts, serves, is frozen or stopped. Pure: no clock, no I/O; events bring the time."""
