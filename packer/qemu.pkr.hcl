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

  accelerator = var.accelerator
  memory      = var.memory_mib
  cpus        = var.cpus
  net_device  = "virtio-net"
  qemuargs    = var.qemu_args
  headless    = true
  boot_wait   = "-1s" # type nothing into a boot menu

  communicator         = "ssh"
  ssh_username         = var.ssh_username
  ssh_private_key_file = var.ssh_private_key_file
  ssh_timeout          = var.ssh_timeout
  # sshd answers before cloud-init has created the user, so refused logins are retried.
  ssh_handshake_attempts = 1000
  shutdown_command       = "sudo -n systemctl poweroff"
  shutdown_timeout       = "5m"
}
