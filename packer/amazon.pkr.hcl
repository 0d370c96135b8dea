locals {
  tags = {
    Name                   = var.image_name
    "ami-builder:image"    = var.image_name
    "ami-builder:digest"   = var.image_digest
    "ami-builder:run"      = var.run_id
    "ami-builder:base-ami" = var.source_ami
  }
}

source "amazon-ebs" "image" {
  ami_name      = "${var.image_name}-${substr(var.image_digest, 0, 12)}-${var.run_id}"
  region        = var.region
  source_ami    = var.source_ami
  instance_type = var.instance_type

  launch_block_device_mappings {
    device_name           = "/dev/xvda"
    volume_type           = "gp3"
    volume_size           = 8
    iops                  = 3000
    throughput            = 125
    delete_on_termination = true
  }

  temporary_security_group_source_cidrs = var.source_cidrs
  shutdown_behavior                     = "terminate"

  tags            = local.tags
  snapshot_tags   = local.tags
  run_tags        = local.tags
  run_volume_tags = local.tags

  communicator              = "ssh"
  ssh_username              = var.ssh_username
  ssh_private_key_file      = var.ssh_private_key_file
  ssh_timeout               = var.ssh_timeout
  ssh_clear_authorized_keys = true
}
