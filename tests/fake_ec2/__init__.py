"""EC2 on loopback: moto behind a shim that adds what moto lacks. Its behavior follows AWS documentation."""
