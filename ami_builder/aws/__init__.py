"""Everything about AWS. Its modules import boto3, which is slow: import them in the function that needs them."""

from __future__ import annotations
