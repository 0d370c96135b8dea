"""What all targets share: inputs, guest files, Packer, base image, container."""
