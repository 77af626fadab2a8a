"""Systems that are timed beside this package, each in an environment of its own."""
