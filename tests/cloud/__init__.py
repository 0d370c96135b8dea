"""An EC2 on loopback, and the tests that use it."""

import os

# moto reads it on import: its own catalogue of images would only be in the way, and takes seconds to load.
os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
