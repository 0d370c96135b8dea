source "amazon-ebs" "image" {
  ami_name            = var.ami_name
  region              = var.region
  custom_endpoint_ec2 = var.endpoint
  source_ami          = var.source_ami

  instance_type       = var.spot ? null : var.instance_type
  spot_instance_types = var.spot ? [var.instance_type] : null
  spot_price          = var.spot ? "auto" : null
  # Tags of the launch template, at its creation, and of the spot request.
  spot_tags            = var.spot ? var.run_tags : null
  subnet_id            = var.subnet_id
  security_group_ids   = [var.security_group_id]
  iam_instance_profile = var.instance_profile
  user_data_file       = var.user_data_file
  shutdown_behavior    = "terminate"

  launch_block_device_mappings {
    device_name           = var.root_device
    volume_type           = "gp3"
    volume_size           = var.volume_size
    iops                  = 3000
    throughput            = 125
    encrypted             = var.encrypt
    kms_key_id            = var.kms_key
    delete_on_termination = true
  }

  # Two hours: a large or an encrypted snapshot takes longer than Packer would wait.
  aws_polling {
    delay_seconds = var.poll_seconds
    max_attempts  = 7200 / var.poll_seconds
  }

  tags            = var.tags
  snapshot_tags   = var.tags
  run_tags        = var.run_tags
  run_volume_tags = var.run_tags

  communicator         = "ssh"
  ssh_interface        = var.ssh_interface
  ssh_port             = var.ssh_port
  ssh_username         = var.ssh_username
  ssh_private_key_file = var.ssh_private_key_file
  ssh_timeout          = var.ssh_timeout
  # sshd answers before cloud-init has created the user, so refused logins are retried.
  ssh_handshake_attempts    = 1000
  ssh_clear_authorized_keys = true
}
