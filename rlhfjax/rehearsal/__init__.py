"""A rehearsal: the launch file of a run on the loopback, with as many processes, tiny widths and faults on purpose."""
