# Read by Packer 1.7 and later, which keeps its builders in plugins (`packer init`).
# Packer 1.6 carries them inside and can't read this block: ami-builder leaves this file out there.
packer {
  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = ">= 1.2.0"
    }
    qemu = {
      source  = "github.com/hashicorp/qemu"
      version = ">= 1.1.0"
    }
  }
}
