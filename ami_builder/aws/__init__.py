"""Everything about AWS. Importing its modules imports boto3, which is slow: do it where they are used."""

from __future__ import annotations
