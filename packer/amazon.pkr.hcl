source "amazon-ebs" "image" {
  ami_name            = var.ami_name
  region              = var.region
  custom_endpoint_ec2 = var.endpoint
  source_ami          = var.source_ami
  # ami-builder has tried these credentials already.
  skip_credential_validation = true

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

  # Two hours: a large or an encrypted snapshot takes longer than Packer would wait. Plugin 1.8 takes the product
  # of both as its bound, and waits for 15 to 120 seconds between two requests.
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

variable "region" {
  type        = string
  description = "Region of the build."
  default     = "us-east-1"
}

variable "endpoint" {
  type        = string
  description = "Address of an EC2 API other than AWS's (AWS_ENDPOINT_URL)."
  default     = ""
}

variable "poll_seconds" {
  type        = number
  description = "Seconds between two requests for a state."
  default     = 5
  validation {
    condition     = var.poll_seconds >= 1
    error_message = "The poll_seconds must be at least 1."
  }
}

variable "ami_name" {
  type        = string
  description = "The AMI's name; it contains the run's id, so that the AMI can be found without a tag."
  default     = "ami-builder"
}

variable "tags" {
  type        = map(string)
  description = "Tags of the AMI and its snapshots."
  default     = {}
}

variable "run_tags" {
  type        = map(string)
  description = "Tags of resources that exist only during the build."
  default     = {}
}

variable "source_ami" {
  type        = string
  description = "The source AMI, resolved before the build."
  default     = "ami-00000000000000000"
  validation {
    condition     = regex_replace(var.source_ami, "^ami-[0-9a-f]+$", "") == "" && var.source_ami != ""
    error_message = "The source_ami must be an AMI id."
  }
}

variable "instance_type" {
  type        = string
  description = "Type of the building instance."
  default     = "m6i.large"
}

variable "spot" {
  type        = bool
  description = "Whether the building instance is a spot instance."
  default     = false
}

variable "subnet_id" {
  type        = string
  description = "Subnet of the building instance; empty for the default VPC."
  default     = ""
}

variable "security_group_id" {
  type        = string
  description = "The run's security group; Packer's temporary one would be open to every address."
  default     = "sg-00000000000000000"
  validation {
    condition     = regex_replace(var.security_group_id, "^sg-[0-9a-f]+$", "") == "" && var.security_group_id != ""
    error_message = "The security_group_id must be the id of a security group."
  }
}

variable "instance_profile" {
  type        = string
  description = "Instance profile; empty for none."
  default     = ""
}

variable "ssh_interface" {
  type        = string
  description = "How to connect: session_manager, or empty to connect to the instance's address."
  default     = ""
  validation {
    condition     = contains(["", "session_manager"], var.ssh_interface)
    error_message = "The ssh_interface must be empty or session_manager."
  }
}

variable "ssh_port" {
  type        = number
  description = "Port of ssh."
  default     = 22
}

variable "user_data_file" {
  type        = string
  description = "User data with the login key, and a timer that terminates a lost instance."
  default     = ""
}

variable "root_device" {
  type        = string
  description = "The source AMI's root device."
  default     = "/dev/xvda"
}

variable "volume_size" {
  type        = number
  description = "Size of the AMI's disk, in GiB."
  default     = 8
}

variable "encrypt" {
  type        = bool
  description = "Whether the AMI's snapshot is encrypted."
  default     = false
}

variable "kms_key" {
  type        = string
  description = "The key that encrypts it; empty for the account's default key."
  default     = ""
}
