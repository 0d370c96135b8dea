"""This host: images baked and booted with QEMU, the way EC2 boots them."""
