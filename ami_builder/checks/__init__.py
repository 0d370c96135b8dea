"""The checks that an image has to pass on a booted machine, and the pytest plugin that they run under."""
