"""EC2 on loopback: moto, and a layer in front of it that adds what moto lacks.

Each behaviour that is added follows AWS's data (botocore's models, the Service Authorization Reference) or a
document that behaviours.toml cites. The tests beside the modules hold the emulator to it; tests/cloud runs
ami-builder against it.
"""

import os

# moto reads this on import: its own catalogue of images is not used here, and takes seconds to load.
os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
