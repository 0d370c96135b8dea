"""What the host offers: processes, ssh, shipped files, CPU accounting."""
