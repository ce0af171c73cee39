"""Clocks that chunk programs run on in place of a device: where the time of an overlapped pair goes."""
