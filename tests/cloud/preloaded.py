"""Imported once by the server that forks commands (stopping.py), for what each of them would read anew."""

import pytest

from ami_builder.aws.session import Account

with pytest.MonkeyPatch.context() as environment:
    environment.setenv("AWS_ACCESS_KEY_ID", "nobody")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "nobody")
    Account.open("us-east-1").client("ec2")
