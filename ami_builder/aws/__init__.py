"""EC2: an account, the base AMI, instances, AMIs of ours, what was left behind.

Importing a module of this package imports boto3, so import it where it is used.
"""

from __future__ import annotations
