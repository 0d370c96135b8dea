"""What ami-builder keeps on disk: the workspace, records, journals and ledgers."""
