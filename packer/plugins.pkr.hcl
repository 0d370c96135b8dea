# For Packer 1.7 and later, which has its builders in plugins (`packer init`).
# Packer 1.6 has them built in and cannot read this block, so ami-builder leaves this file out.
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
