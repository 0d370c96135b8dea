source "qemu" "image" {
  vm_name          = "image.qcow2"
  output_directory = var.output_directory

  iso_url      = var.base_disk
  iso_checksum = "none" # checked by ami-builder, when the disk entered its cache
  disk_image   = true
  disk_size    = var.disk_size
  format       = "qcow2"

  # The disk of a build that crashes is thrown away.
  disk_cache   = "unsafe"
  disk_discard = "unmap"
  # 90-clean.sh overwrites free space with zeros, which then take no space.
  disk_detect_zeroes = "unmap"
  disk_interface     = "virtio"
  disk_compression   = true
  qemu_img_args {
    # Four times faster than zlib to write, and to read at every boot.
    convert = ["-o", "compression_type=zstd"]
  }

  qemu_binary  = var.qemu_binary
  machine_type = var.machine_type
  accelerator  = var.accelerator
  memory       = var.memory_mib
  cpus         = var.cpus
  net_device   = "virtio-net"
  qemuargs     = var.qemu_args
  headless     = true
  boot_wait    = "-1s" # type nothing into a boot menu

  communicator         = "ssh"
  ssh_username         = var.ssh_username
  ssh_private_key_file = var.ssh_private_key_file
  ssh_timeout          = var.ssh_timeout
  # sshd answers before cloud-init has created the user, so refused logins are retried.
  ssh_handshake_attempts = 1000
  shutdown_command       = "sudo -n systemctl poweroff"
  shutdown_timeout       = "5m"
}

variable "base_disk" {
  type        = string
  description = "The base disk image."
}

variable "disk_size" {
  type        = string
  description = "Size of the image's disk, in MiB with the suffix M."
  default     = "8192M"
  validation {
    condition     = regex_replace(var.disk_size, "^[0-9]+M$", "") == "" && var.disk_size != ""
    error_message = "The disk_size must be whole MiB, such as 8192M."
  }
}

variable "output_directory" {
  type        = string
  description = "Folder of the finished disk, which must not exist."
  default     = "output"
}

variable "qemu_binary" {
  type        = string
  description = "QEMU's program for the image's architecture."
  default     = "qemu-system-x86_64"
}

variable "machine_type" {
  type        = string
  description = "QEMU's machine."
  default     = "pc"
}

variable "accelerator" {
  type        = string
  description = "Accelerator: kvm or tcg."
  default     = "tcg"
  validation {
    condition     = contains(["kvm", "tcg"], var.accelerator)
    error_message = "The accelerator must be kvm or tcg."
  }
}

variable "memory_mib" {
  type        = number
  description = "Memory of the building VM, in MiB."
  default     = 2048
  validation {
    condition     = var.memory_mib >= 512
    error_message = "The memory_mib must be at least 512."
  }
}

variable "cpus" {
  type        = number
  description = "CPUs of the building VM."
  default     = 2
  validation {
    condition     = var.cpus >= 1
    error_message = "The cpus must be at least 1."
  }
}

variable "qemu_args" {
  type        = list(list(string))
  description = "Further arguments (boot method, console log, the container archive as a disk)."
  default     = []
}
